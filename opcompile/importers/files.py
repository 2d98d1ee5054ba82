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
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from opcompile.errors import EngineError, ModelError
from opcompile.importers.imported import Tensor, array, bfloat16


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return every array of a file by its name.

    Raises `ModelError` for a file that is none of these or is damaged, `EngineError` where the package that
    reads its format is missing.
    """
    text = os.fspath(path)
    for ending, reader in _READERS.items():
        if text.endswith(ending):
            try:
                return {name: _with_type(a) for name, a in reader(Path(text)).items()}
            except (EngineError, ModelError):
                raise
            except Exception as error:  # of many kinds, and each means that it cannot be read
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ModelError(f"cannot read {text}: {reason}; save it again as one of {_ENDINGS}") from error
    raise ModelError(f"{text} is not a file of weights known here; its name must end in one of {_ENDINGS}")


def layer_arrays(path: str | os.PathLike[str], name: str = "") -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias (or None) of the layer ``name`` in a file, as the file's system stores them.

    They are ``<name>.weight`` and ``<name>.bias``, or in Keras's files ``<name>/vars/0`` and ``/vars/1``.
    Raises as `read_arrays`, and `ModelError` where there is no such layer.
    """
    arrays = read_arrays(path)
    dot = "." if name else ""
    for weight, bias in ((f"{name}{dot}weight", f"{name}{dot}bias"), (f"{name}/vars/0", f"{name}/vars/1")):
        if weight in arrays:
            return arrays[weight], arrays.get(bias)
    known = ", ".join(sorted(_layers(arrays)))
    if not known:
        listed = ", ".join(sorted(arrays)) or "none"
        known = f"none; its arrays are: {listed}; read_arrays gives each by its name"
    raise ModelError(f"{os.fspath(path)} has no layer {name!r}; layers with 5-D weights are: {known}")


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
    content = torch.load(path, map_location="cpu", weights_only=True)
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


def _h5(source: Path | io.BytesIO) -> dict[str, Tensor]:
    h5py = _package("h5py", "h5py")
    found: dict[str, Tensor] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = np.asarray(item)

    with h5py.File(source, "r") as file:
        file.visititems(visit)
    return found


def _keras(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        return _h5(io.BytesIO(archive.read("model.weights.h5")))


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
    ".weights.h5": _h5,
    ".keras": _keras,
}
_ENDINGS = ", ".join(_READERS)
