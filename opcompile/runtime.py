"""Load a compiled layer and call it: NumPy, `apache-tvm-ffi` and the library itself, no compiler.

An artifact is a directory with a manifest; `load` refuses one that does not match it or this
machine, so that a call can only fail with a `CallError`.
"""

from __future__ import annotations

import ctypes
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from opcompile.errors import ArtifactError, CallError, SpecError, TargetError
from opcompile.golden import Golden, read_golden
from opcompile.gpus import is_gpu
from opcompile.gradients.gradient import Wrt
from opcompile.manifest import (
    WEIGHTS,
    check_files,
    fingerprint,
    identity,
    own_weights,
    parse_manifest,
    read_manifest,
)
from opcompile.packing import Packing
from opcompile.paths import checked_path
from opcompile.spec import ConvTranspose3d
from opcompile.target import host, processor_flags
from opcompile.tensors import (
    STORAGE,
    Borrowed,
    Slot,
    address_of,
    aligned,
    as_kind_of,
    ffi,
    framework_of,
    memory_at,
    moved,
    require_apart,
    sizes_text,
)

if TYPE_CHECKING:
    from opcompile.gradients.runtime import GradientArtifact

KERNEL = "__tvm_ffi_conv_transpose3d"
EXPORTS = ("opcompile_run", "opcompile_error")
MOST_THREADS = 1024
_ATTEMPTS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Weights in one kernel's own layout: what `Artifact.pack` returns and calls take, and nothing else is.

    ``data`` is read-only and holds the bits where the dtype is bfloat16.
    """

    w_shape: tuple[int, ...]
    dtype: str
    packing: Packing
    data: NDArray[Any]
    address: int

    @classmethod
    def of(cls, w_shape: tuple[int, ...], dtype: str, packing: Packing, data: NDArray[Any]) -> Packed:
        """Wrap ``data``, which must be contiguous and of ``packing.shape``; it becomes read-only."""
        if data.shape != packing.shape or data.dtype != STORAGE[dtype] or not data.flags.c_contiguous:
            raise ArtifactError(f"packed weights are {data.dtype} {data.shape}, not {dtype} {packing.shape}")
        data.flags.writeable = False
        return cls(w_shape, dtype, packing, data, int(data.ctypes.data))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy, or pickle, what has a new address then."""
        return _packed_again, (self.w_shape, self.dtype, self.packing, self.data)


def _packed_again(w_shape: tuple[int, ...], dtype: str, packing: Packing, data: NDArray[Any]) -> Packed:
    return Packed.of(w_shape, dtype, packing, moved(data))


# --- the artifact ---


class OnCpu:
    """A library for this machine, loaded: what a layer and its derivatives share. ``shapes`` ends with ``out``."""

    __slots__ = ("_error", "_run", "_slots", "directory", "manifest", "threads")

    def __init__(
        self,
        directory: Path,
        manifest: dict[str, Any],
        library: ctypes.CDLL,
        threads: int,
        dtype: str,
        shapes: Mapping[str, tuple[int | None, ...]],
    ) -> None:
        """Take for granted what `load` checks."""
        self.directory, self.manifest, self.threads = directory, manifest, threads
        storage = STORAGE[dtype]
        plain = None if dtype == "bfloat16" else storage
        self._slots = {name: Slot(name, shape, dtype, storage, plain) for name, shape in shapes.items()}
        self._run, self._error = library.opcompile_run, library.opcompile_error
        self._run.argtypes = [ctypes.c_int, ctypes.c_int64, *[ctypes.c_void_p] * 4]
        self._run.restype, self._error.restype = ctypes.c_int, ctypes.c_char_p

    def __reduce__(self) -> tuple[Any, ...]:
        """Name the directory, and what it holds: a library has its place in one process alone."""
        return load_again, (str(self.directory), fingerprint(self.manifest), self.threads or None)

    def _borrow_out(self, out: Any, inputs: Mapping[str, tuple[int, tuple[int, ...]]]) -> int:
        """Return the address of ``out``; raise `CallError` if it does not fit, or holds what is still to be read.

        Each of ``inputs`` is an address and a shape; the first one says the batch.
        """
        slot, (first, (_, (batch, *_))) = self._slots["out"], next(iter(inputs.items()))
        borrowed = address, shape, _ = slot.borrow(out, to_write=True)
        if slot.shape[0] is None and shape[0] != batch:
            raise CallError(f"out has batch {shape[0]}, but {first} has {batch}")
        require_apart(borrowed, inputs, slot.storage.itemsize)
        return address


class Artifact(OnCpu):
    """A loaded layer: call it as ``y = artifact(x, w, b)``. Safe to call from several threads at once.

    Pickled, for another process, it is its directory, which must hold the same artifact when it is loaded there.
    """

    __slots__ = ("_image", "_weights", "packing", "spec")

    def __init__(self, directory: Path, manifest: dict[str, Any], library: ctypes.CDLL, threads: int) -> None:
        """Prefer `load`, which checks what is taken for granted here."""
        self.spec = spec = ConvTranspose3d.parse(manifest["spec"])
        self.packing = Packing.from_json(manifest["packing"])
        shapes = {"x": spec.x_shape, "w": spec.w_shape, "b": (spec.channels_out,), "out": spec.y_shape}
        super().__init__(directory, manifest, library, threads, spec.dtype, shapes)
        self._image = tuple(size for size in spec.y_shape[1:] if size is not None)
        self._weights = self._read_weights()

    def __repr__(self) -> str:
        """Name the layer, the target and the place."""
        return f"<Artifact {self.spec} for {self.manifest['target']['name']} in {self.directory}>"

    def __call__(self, x: Any, w: Any = None, b: Any = None, *, out: Any = None, threads: int | None = None) -> Any:
        """Return Y for ``x``, as the kind of tensor that ``x`` is (or ``out``, filled, where that is given).

        ``w`` is a canonical weight, packed anew in each call, or better what `pack` made of it; it and
        ``b`` are left out where they were known at compile time. Tensors that are not contiguous are
        copied first. ``threads`` is the most to use in this call. Raises `CallError`.
        """
        most = self.threads if threads is None else checked_threads(threads, "threads")
        given = self._slots["x"].borrow(x)
        address, (batch, *_), _ = given
        weight = self._weight(w)
        bias = self._bias(b, own=w is None or self._weights[0] is None)
        framework = None if out is not None or isinstance(x, np.ndarray) else framework_of(x)
        if out is None:
            shape = (batch, *self._image)
            y: Any = aligned(shape, x.dtype if framework is None else self._slots["out"].storage)
            target = address_of(y)
        else:
            y = out
            of_bias = {} if bias is None else {"b": bias[:2]}
            target = self._borrow_out(out, {"x": given[:2], "w": (weight.address, weight.data.shape), **of_bias})
        if self._run(most, batch, address, weight.address, None if bias is None else bias[0], target):
            raise CallError(f"the kernel failed: {self._error().decode(errors='replace')}")
        return y if framework is None else as_kind_of(x, y, framework, self.spec.dtype)

    def pack(self, w: Any) -> Packed:
        """Lay a canonical weight ``(C, M/g, kD, kH, kW)`` out for this kernel, for many calls. Raises `CallError`."""
        slot = self._slots["w"]
        address, shape, owner = slot.borrow(w)
        canonical = np.ndarray(shape, slot.storage, memory_at(address, math.prod(shape) * slot.storage.itemsize))
        packed = moved(self.packing.arranged(canonical))
        del owner  # it had to live until here
        return Packed.of(shape, self.spec.dtype, self.packing, packed)

    def golden(self) -> Golden:
        """Return the test vector that was computed when the artifact was written.

        Raises `ArtifactError` when its file has changed since.
        """
        weight, bias = self._weights
        return read_golden(self.directory, self.manifest, self.spec, weight is not None, bias is not None)

    # --- arguments ---

    def _weight(self, w: Any) -> Packed:
        if isinstance(w, Packed):
            if w.packing is not self.packing:
                self._require_own(w)
            return w
        if w is not None:
            return self.pack(w)
        own = self._weights[0]
        if own is None:
            raise CallError(
                f"w is missing: this layer was compiled without weights; pass {sizes_text(self.spec.w_shape)}"
            )
        return own

    def _require_own(self, w: Packed) -> None:
        spec = self.spec
        if (w.w_shape, w.dtype, w.packing) != (spec.w_shape, spec.dtype, self.packing):
            raise CallError(
                f"w was packed for another layer: {w.dtype} {sizes_text(w.w_shape)} as {w.packing.shape}, and this "
                f"one needs {spec.dtype} {sizes_text(spec.w_shape)} as {self.packing.shape}; use this artifact's pack"
            )

    def _bias(self, b: Any, *, own: bool) -> Borrowed | None:
        if b is not None:
            if not self.spec.bias:
                raise CallError("b was given, but this layer has no bias; leave it out")
            return self._slots["b"].borrow(b)
        bias = self._weights[1] if own else None
        if bias is None and self.spec.bias:
            raise CallError(f"b is missing: this layer has a bias; pass {self.spec.dtype} ({self.spec.channels_out})")
        return bias

    def _read_weights(self) -> tuple[Packed | None, Borrowed | None]:
        """Packed W and B that were known at compile time, each or none."""
        stored, spec = own_weights(self.directory, self.manifest), self.spec
        weight = Packed.of(spec.w_shape, spec.dtype, self.packing, stored["W"]) if "W" in stored else None
        if "B" not in stored:
            return weight, None
        bias = stored["B"]
        if bias.shape != (spec.channels_out,) or bias.dtype != STORAGE[spec.dtype]:
            raise ArtifactError(f"{WEIGHTS} holds a bias {bias.dtype} {bias.shape}, which does not fit {spec}")
        return weight, (int(bias.ctypes.data), bias.shape, bias)


def checked_threads(threads: Any, name: str) -> int:
    """Return a number of threads. Raises `CallError` for what is none."""
    try:
        count = 0 if isinstance(threads, bool) else operator.index(threads)
    except TypeError:
        count = 0
    if not 1 <= count <= MOST_THREADS:
        raise CallError(f"{name} is {threads!r}, but must be a whole number from 1 to {MOST_THREADS}")
    return count


def _default_threads(threads: int | None) -> int:
    """Return what was asked for, else ``OPCOMPILE_NUM_THREADS``, else 0: the CPUs that a call finds usable."""
    if threads is not None:
        return checked_threads(threads, "threads")
    text = os.environ.get("OPCOMPILE_NUM_THREADS", "")
    if not text:
        return 0
    return checked_threads(int(text) if text.isascii() and text.isdigit() else text, "OPCOMPILE_NUM_THREADS")


# --- loading ---


@overload
def load(
    path: str | os.PathLike[str], *, derivative: None = None, threads: int | None = None, check: bool = True
) -> Artifact: ...


@overload
def load(
    path: str | os.PathLike[str], *, derivative: Wrt, threads: int | None = None, check: bool = True
) -> GradientArtifact: ...


def load(
    path: str | os.PathLike[str], *, derivative: Wrt | None = None, threads: int | None = None, check: bool = True
) -> Artifact | GradientArtifact:
    """Load the artifact in directory ``path``: the layer itself, or its ``derivative``, as it was compiled.

    ``threads`` is the most that a call uses, unless it says otherwise; by default
    ``OPCOMPILE_NUM_THREADS``, or every usable CPU. ``check=False`` spares the hashes of the files that
    are not used here: the model, the header and the report (SHA-256 takes one to three milliseconds a
    MiB, which only a model with large weights makes felt). Raises `ArtifactError` for a directory that
    does not match its manifest or holds another derivative, `TargetError` for another kind of machine,
    `CallError` for what is no path, and a wrong number of threads.
    """
    loaded = load_any(path, threads=threads, check=check)
    held = loaded.manifest["derivative"]
    if held != derivative:
        what = f"the derivative d{held}" if held else "the layer itself, no derivative"
        way_out = f"load it with derivative={held!r}" if held else "load it without a derivative"
        raise ArtifactError(f"{loaded.directory} holds {what}; {way_out}, or name another directory")
    return loaded


def load_any(
    path: str | os.PathLike[str], *, threads: int | None = None, check: bool = True
) -> Artifact | GradientArtifact:
    """Load the artifact in ``path``, whatever it computes. Raises as `load` does."""
    directory, most = checked_path(path, "path").absolute(), _default_threads(threads)
    for attempt in range(_ATTEMPTS):
        found, text = identity(directory), read_manifest(directory)
        try:
            return _load(directory, text, most, check)
        except ArtifactError:
            # a writer may have put another artifact in this place meanwhile: then begin again
            if attempt == _ATTEMPTS - 1 or (identity(directory), read_manifest(directory)) == (found, text):
                raise
    raise AssertionError("unreachable")


def load_again(path: str, held: str, threads: int | None = None) -> Artifact | GradientArtifact:
    """Load what was pickled. Raises `ArtifactError` where its directory is gone or holds another artifact by now."""
    loaded = load_any(path, threads=threads)
    if fingerprint(loaded.manifest) != held:
        raise ArtifactError(f"{path} holds another artifact than the one that was pickled; load it and pickle that")
    return loaded


def _load_gpu(directory: Path, manifest: dict[str, Any]) -> Artifact | GradientArtifact:
    """Load what was compiled for CUDA, which is called alike. Raises `TargetError` for Metal: that starts from text."""
    check_files(directory, manifest, set(manifest["files"]))
    if manifest["target"]["architecture"] != "cuda":
        raise TargetError(
            f"{directory} was compiled for {manifest['target']['name']}; a Mac runs its kernel.metal as launch.json "
            "says (docs/examples), and `opcompile verify --simulate` runs it here"
        )
    if manifest["derivative"]:
        from opcompile.gradients.runtime_cuda import CudaGradient

        return cast("GradientArtifact", CudaGradient(directory, manifest))
    from opcompile.runtime_cuda import CudaArtifact

    return cast("Artifact", CudaArtifact(directory, manifest))


def _load(directory: Path, text: bytes, threads: int, check: bool) -> Artifact | GradientArtifact:
    from opcompile.gradients.runtime import GradientArtifact  # it is made of what is here

    manifest = parse_manifest(text, directory)
    if is_gpu(manifest["target"]["name"]):
        return _load_gpu(directory, manifest)
    _require_machine(manifest["target"], directory)
    path = directory / manifest["library"]
    # `Artifact` reads the weights and checks them then: not twice
    check_files(directory, manifest, set(manifest["files"]) - {WEIGHTS} if check else {path.name})
    ffi()
    kind = GradientArtifact if manifest["derivative"] else Artifact
    try:
        # the name holds the content's hash, so a library already loaded by this name is this one
        return kind(directory, manifest, ctypes.CDLL(str(path)), threads)
    except (OSError, AttributeError, SpecError) as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error


def _require_machine(target: dict[str, Any], directory: Path) -> None:
    """Raise `TargetError` where the library would not run: a wrong instruction ends the process."""
    needed = (target["architecture"], target["system"])
    if needed != host():
        emulated = "; `opcompile verify --simulate` runs it in an emulated one" if needed[0] == "aarch64" else ""
        raise TargetError(
            f"{directory} was compiled for {target['name']} ({' '.join(needed)}), and this is {' '.join(host())}; "
            f"take it to such a machine, or compile it for this one{emulated}"
        )
    # macOS lists no flags; there the architecture alone decides
    present = processor_flags()
    missing = [str(flag) for flag in target["features"] if flag not in present]
    if present and missing:
        raise TargetError(
            f"{directory} was compiled for {target['name']}, and this processor lacks {', '.join(missing)}; "
            "compile it for a smaller target, like llvm:x86-64-v2"
        )
