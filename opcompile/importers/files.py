"""Files of weights: ``.npz``, ``.safetensors``, state dicts (``.pt``, ``.pth``), ``.weights.h5`` and ``.keras``.

Such a file says nothing of strides and paddings: a layer's words do, and take the arrays from here::

    layer = mlx.ConvTranspose3d(64, 32, 3, stride=2, input=(1, 8, 8, 8, 64))
    layer = layer.with_weights(*files.layer_arrays("decoder.safetensors", "up.0"))

Nothing in a file is run: no pickled objects are read.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from opcompile.errors import EngineError, ModelError, first_words
from opcompile.importers.imported import Tensor, array
from opcompile.needed import bfloat16
from opcompile.paths import checked_path


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return every array of a file by its name.

    Raises `ModelError` for a file that is none of these or is damaged, `EngineError` where the package that
    reads its format is missing.
    """
    text = str(checked_path(path, "path"))
    for ending, reader in _READERS.items():
        if text.endswith(ending):
            if not os.path.isfile(text):
                raise ModelError(f"there is no file {text!r}; name one of {_ENDINGS}")
            try:
                return {name: _with_type(a) for name, a in reader(Path(text)).items()}
            except (EngineError, ModelError):
                raise
            except Exception as error:  # of many kinds, and each means that it cannot be read
                raise ModelError(
                    f"cannot read {text}: {first_words(error)}; save it again as one of {_ENDINGS}"
                ) from error
    raise ModelError(f"{text} is not a file of weights known here; its name must end in one of {_ENDINGS}")


def layer_arrays(path: str | os.PathLike[str], name: str = "") -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias (or None) of the layer ``name`` in a file, as the file's system stores them.

    They are ``<name>.weight`` and ``<name>.bias``. Keras's files number their groups by class, whatever the layers
    are called: ``name`` is there a layer's own name, or its group's path, as ``layers/conv3d_transpose``.
    Raises as `read_arrays`, and `ModelError` where there is no such layer, or several.
    """
    arrays = read_arrays(path)
    dot = "." if name else ""
    if f"{name}{dot}weight" in arrays:
        return arrays[f"{name}{dot}weight"], arrays.get(f"{name}{dot}bias")
    own = _own_names(Path(path)) if os.fspath(path).endswith(_BY_KERAS) else {}
    meant = [group for group in _groups(arrays) if _may_mean(name, group, own.get(group))]
    if len(meant) == 1:
        return arrays[f"{meant[0]}/vars/0"], arrays.get(f"{meant[0]}/vars/1")
    if meant:
        raise ModelError(
            f"{name!r} may mean {len(meant)} layers of {os.fspath(path)}: {_listed(meant, own)}; say a name or a group "
            "that only one has, or take <group>/vars/0 and <group>/vars/1 from read_arrays"
        )
    known = _listed(_layers(arrays), own)
    if not known:
        listed = ", ".join(sorted(arrays)) or "none"
        known = f"none; its arrays are: {listed}; read_arrays gives each by its name"
    raise ModelError(f"{os.fspath(path)} has no layer {name!r}; layers with 5-D weights are: {known}")


def _groups(arrays: Mapping[str, Tensor]) -> list[str]:
    return [name.removesuffix("/vars/0") for name in arrays if name.endswith("/vars/0")]


def _may_mean(name: str, group: str, own: str | None) -> bool:
    """Whether ``name`` is the group of a layer, or the layer's ``own`` name, with or without its folder."""
    folder, _, last = name.rpartition("/")
    return name == group or (last == own and folder in ("", group.rpartition("/")[0]))


def _listed(layers: Iterable[str], own: Mapping[str, str]) -> str:
    return ", ".join(f"{own[layer]} ({layer})" if layer in own else layer for layer in sorted(layers))


def _with_type(a: Tensor) -> Tensor:
    """Return bfloat16 as such: ``.npz`` and HDF5 keep its bits, and forget what they are."""
    return a.view(bfloat16()) if a.dtype == np.dtype("V2") else a


def _layers(arrays: Mapping[str, Tensor]) -> set[str]:
    """The layers that `layer_arrays` finds by their names."""
    found = [re.fullmatch(r"(?:(.*)\.)?weight|(.*)/vars/0", name) for name, a in arrays.items() if a.ndim == 5]
    return {match[1] or match[2] or "''" for match in found if match}


def _npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _safetensors(path: Path) -> dict[str, Tensor]:
    numpy = _package("safetensors.numpy", "safetensors")
    with suppress(ImportError):
        import_module("ml_dtypes")  # which tells NumPy what bfloat16 is
    return dict(numpy.load_file(path))


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict, or a checkpoint that holds one: as ``state_dict`` or ``model``, or with its key in names."""
    torch = _package("torch", "torch")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ModelError(
            f"{path} holds more than tensors, or is damaged, and no pickled objects are read; save the module's "
            "state_dict()"
        ) from error
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a state dict; save the module's state_dict()")
    for key in ("state_dict", "model"):
        content = content[key] if isinstance(content.get(key), Mapping) and content[key] else content
    return dict(_tensors(content))


def _tensors(content: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{before}{name}.")
        elif hasattr(value, "shape"):
            yield f"{before}{name}", array(value)


@contextmanager
def _h5(path: Path) -> Iterator[Any]:
    """Open the HDF5 file that holds the weights."""
    h5py = _package("h5py", "h5py")
    content: Path | io.BytesIO = path
    if path.name.endswith(".keras"):
        with zipfile.ZipFile(path) as archive:
            content = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(content, "r") as file:
        yield file


def _by_keras(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def visit(name: str, item: Any) -> None:
        if hasattr(item, "dtype"):
            found[name] = np.asarray(item)

    with _h5(path) as file:
        file.visititems(visit)
    return found


def _own_names(path: Path) -> dict[str, str]:
    """The layers' own names by their groups, which Keras notes where it keeps their variables."""
    found: dict[str, str] = {}

    def visit(name: str, item: Any) -> None:
        if name.endswith("/vars") and "name" in item.attrs:
            found[name.removesuffix("/vars")] = str(item.attrs["name"])

    with _h5(path) as file:
        file.visititems(visit)
    return found


def _package(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise EngineError(f"the package {name} is not installed ({error}); pip install 'opcompile[words]'") from error


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _state_dict,
    ".pth": _state_dict,
    ".weights.h5": _by_keras,
    ".keras": _by_keras,
}
_BY_KERAS = (".weights.h5", ".keras")
_ENDINGS = ", ".join(_READERS)
