"""Load a compiled layer and call it: NumPy, `apache-tvm-ffi` and the library itself, no compiler.

An artifact is a directory with a manifest; `load` refuses one that does not match it or this
machine, so that a call can only fail with a `CallError`. Tensors go to the kernel as they are:
contiguous ones at any address that suits their element are never copied, others are copied first. NumPy arrays
give their address directly; everything else (torch, JAX, ...) comes through DLPack, by ``tvm_ffi``.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import operator
import os
import sys
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from glob import escape
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, cast, overload

import numpy as np
from numpy.lib import format
from numpy.typing import NDArray

from opcompile.errors import ArtifactError, CallError, EngineError, SpecError, TargetError
from opcompile.gpus import is_gpu
from opcompile.gradients.gradient import WRT, Wrt
from opcompile.index import INDEX
from opcompile.needed import bfloat16
from opcompile.packing import Packing
from opcompile.paths import checked_path
from opcompile.spec import ConvTranspose3d, at_batch, fits
from opcompile.target import host, processor_flags

if TYPE_CHECKING:
    from opcompile.gradients.runtime import GradientArtifact

FORMAT = "opcompile-artifact"
# 2: the field ``derivative``, without which a reader would take a derivative for the layer
VERSION = 2
MANIFEST = "manifest.json"
HEADER = "conv_transpose3d.h"
MODEL = "model.onnx"
GOLDEN = "golden.npz"
WEIGHTS = "weights.npz"
REPORT = "report.json"

KERNEL = "__tvm_ffi_conv_transpose3d"
# Bytes of a cache line, or of the widest vector: packed weights begin at a multiple.
ALIGNMENT = 64
EXPORTS = ("opcompile_run", "opcompile_error")
MOST_THREADS = 1024

# bfloat16 travels as its bits: NumPy has no such type of its own, and `ml_dtypes` is optional here.
STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float64": np.dtype(np.float64),
}

# DLPack's numbers for memory that a CPU can read: its own, and CUDA's and ROCm's pinned host memory.
_HOST_MEMORY = (1, 3, 11)
# What a DLPack producer may raise when it cannot export.
NOT_EXPORTED = (AssertionError, BufferError, RuntimeError, TypeError, ValueError)
_LARGE = 8 << 20
_PART = 1 << 20
_ATTEMPTS = 8


# --- tensors ---


# Memory of a contiguous tensor: its address, its shape, and the object that keeps it alive.
Borrowed = tuple[int, tuple[int, ...], object]


@dataclass(frozen=True, slots=True)
class Slot:
    """One argument of the kernel: what it must be. A None in ``shape`` stands for any batch of at least 1.

    ``storage`` is NumPy's type for the memory, ``plain`` the same where arrays of ``dtype`` have it.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    storage: np.dtype[Any]
    plain: np.dtype[Any] | None

    def borrow(self, value: Any, *, to_write: bool = False) -> Borrowed:
        """Return the memory of ``value``, or of a contiguous copy; never a copy ``to_write``. Raises `CallError`."""
        if type(value) is np.ndarray:
            # most calls end here, and every microsecond of theirs counts
            if value.shape == self.shape and value.dtype is self.plain and value.flags.carray:
                return _tvm_ffi().from_dlpack(value).data_ptr(), value.shape, value
            return self._borrow_numpy(value, to_write)
        if isinstance(value, np.ndarray):
            return self._borrow_numpy(value, to_write)
        return self._borrow_dlpack(value, to_write)

    def _borrow_numpy(self, value: NDArray[Any], to_write: bool) -> Borrowed:
        # NumPy takes float64 for equal to None
        if self.plain is None or value.dtype != self.plain:
            self._require_dtype(value.dtype.name if value.dtype.isnative else f"byte-swapped {value.dtype.name}")
        shape = value.shape
        if shape != self.shape:
            self._require_shape(shape)
        if isinstance(value, np.ma.MaskedArray):
            raise CallError(f"{self.name} is masked, and the kernel knows no mask; pass {self.name}.filled(...)")
        flags = value.flags
        if not (flags.c_contiguous and flags.aligned):
            value = self._copy(value, to_write)
        if to_write and not flags.writeable:
            raise CallError(f"{self.name} is read-only; pass a writable array")
        return address_of(value), shape, value

    def _borrow_dlpack(self, value: Any, to_write: bool) -> Borrowed:
        if to_write and type(value).__module__.partition(".")[0] in ("jax", "jaxlib"):
            # it shares its memory all the same
            raise CallError(f"{self.name} is a JAX array, which is immutable; pass another kind of tensor")
        tensor = self._import(value)
        self._require_dtype(dtype_name(tensor, value))
        shape = tuple(tensor.shape)
        self._require_shape(shape)
        address = tensor.data_ptr()
        if not address:
            raise CallError(f"{self.name} of type {_type_name(value)} has no values; pass a tensor that has")
        if tensor.is_contiguous() and address % self.storage.itemsize == 0:
            return address, shape, tensor
        copy = self._copy(_as_numpy(tensor, self.storage), to_write)
        return address_of(copy), shape, copy

    def _import(self, value: Any) -> Any:
        """``value`` as a `tvm_ffi.Tensor` that shares its memory."""
        if not (hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")):
            if type(value).__module__.startswith("jax.") and type(value).__name__.endswith("Tracer"):
                raise CallError(
                    f"{self.name} is traced by JAX, and has no values yet; call this layer by jax.pure_callback"
                )
            raise CallError(f"{self.name} is of type {_type_name(value)}; pass a NumPy array or a DLPack tensor")
        value = detached(self.name, value)
        try:
            device = value.__dlpack_device__()[0]
            if device not in _HOST_MEMORY:
                raise CallError(f"{self.name} is on DLPack device type {int(device)}, not the CPU; copy it there first")
            return _tvm_ffi().from_dlpack(value)
        except NOT_EXPORTED as error:
            if isinstance(error, CallError):
                raise
            raise not_exported(self.name, value, error) from error

    def _require_dtype(self, given: str) -> None:
        if given != self.dtype:
            raise CallError(f"{self.name} is {given}, but this layer computes in {self.dtype}; convert it first")

    def _require_shape(self, given: tuple[int, ...]) -> None:
        """Accept the shape itself, or with any batch of at least 1 where that is dynamic."""
        if not fits(given, self.shape):
            least = ", N at least 1" if None in self.shape else ""
            raise CallError(
                f"{self.name} has shape {sizes_text(given)}, but this layer needs {sizes_text(self.shape)}{least}"
            )

    def _copy(self, value: NDArray[Any], to_write: bool) -> NDArray[Any]:
        if to_write and value.flags.c_contiguous:
            raise CallError(
                f"{self.name} is at an address that is no multiple of its element's size, {self.storage.itemsize}; "
                "pass a tensor that is"
            )
        if to_write:
            raise CallError(f"{self.name} is not contiguous in memory; pass a contiguous tensor")
        return np.array(value, order="C", subok=False)


def address_of(array: NDArray[Any]) -> int:
    """Return the address of a contiguous array's first element."""
    # a fifth of the time of `array.ctypes.data`, but for plain and writable arrays only
    if array.dtype.isbuiltin == 1 and array.flags.writeable:
        return int(_tvm_ffi().from_dlpack(array).data_ptr())
    return int(array.ctypes.data)


@cache
def _tvm_ffi() -> ModuleType:
    try:
        import tvm_ffi
    except ImportError as error:
        raise EngineError(f"calling a layer needs the package apache-tvm-ffi: {error}") from error
    module: ModuleType = tvm_ffi
    return module


def _as_numpy(tensor: Any, storage: np.dtype[Any]) -> NDArray[Any]:
    """Return a strided view of a `tvm_ffi.Tensor`, which must outlive it; bfloat16, which NumPy refuses, as bits."""
    strides = [stride * storage.itemsize for stride in tensor.strides]
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True) if stride > 0)
    start = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True) if stride < 0)
    memory = _memory(tensor.data_ptr() + start, reach - start + storage.itemsize)
    return np.ndarray(tuple(tensor.shape), storage, memory, -start, strides)


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an uninitialised array that begins at a cache line.

    NumPy's own start anywhere: each vector would straddle two lines, and some frameworks would copy it.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _moved(data: NDArray[Any]) -> NDArray[Any]:
    """Copy to aligned, contiguous memory."""
    moved = aligned(data.shape, data.dtype)
    moved[...] = data
    return moved


def _memory(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def sizes_text(shape: Iterable[int | None]) -> str:
    """Write a shape for a person, a dynamic batch as N."""
    return "(" + ", ".join("N" if size is None else str(size) for size in shape) + ")"


def detached(name: str, value: Any) -> Any:
    """Return a tensor of PyTorch out of its graph; others as they are.

    Raises `CallError` for what exporting would drop without a word: a graph or a tangent that is recorded, a sign.
    """
    require_values(name, value)
    require_no_tangent(name, value)
    if getattr(value, "requires_grad", False) is True:
        if _is_recorded(value):
            raise CallError(f"{name} requires a gradient, which this kernel has not; pass {name}.detach()")
        # older versions of PyTorch export no tensor that requires a gradient, under `torch.no_grad` either
        value = value.detach()
    # torch exports such a view (the imaginary part of a conjugate) as its memory
    if getattr(value, "is_neg", bool)():
        raise CallError(f"{name} is a lazily negated view; pass {name}.resolve_neg()")
    return value


def _is_recorded(value: Any) -> bool:
    """Whether what is done with a tensor that requires a gradient is recorded now; not under ``torch.no_grad()``."""
    torch = sys.modules.get("torch")
    return torch is None or not isinstance(value, torch.Tensor) or bool(torch.is_grad_enabled())


def require_values(name: str, value: Any) -> None:
    """Raise `CallError` for a tensor of PyTorch that has a shape and no values."""
    if type(value).__name__ == "FakeTensor":
        raise CallError(
            f"{name} is a FakeTensor and has no values; pass a real one, or wrap this call in torch.library.custom_op"
        )
    if getattr(value, "is_meta", False) is True:
        raise CallError(f"{name} is a meta tensor and has no values; pass one that has")


def require_no_tangent(name: str, value: Any) -> None:
    """Raise `CallError` for a tensor that carries a forward-mode derivative: its export would drop that."""
    forward = sys.modules.get("torch.autograd.forward_ad")
    # -1 outside of every level, where asking PyTorch would take a microsecond a tensor
    if forward is None or getattr(forward, "_current_level", 0) < 0:
        return
    if isinstance(value, sys.modules["torch"].Tensor) and forward.unpack_dual(value).tangent is not None:
        raise CallError(f"{name} carries a forward-mode tangent, which this kernel drops; pass {name}.detach()")


def dtype_name(tensor: Any, value: Any) -> str:
    """Return the name of the type of an exported tensor's elements."""
    try:
        return str(tensor.dtype)
    except ValueError:
        # tvm_ffi has no name for complex numbers
        return str(getattr(value, "dtype", "of a type without a name"))


def not_exported(name: str, value: Any, error: Exception) -> CallError:
    """Return the error for a tensor that its producer does not export; of PyTorch's words the first line says why."""
    layout = str(getattr(value, "layout", ""))
    if layout.startswith(("torch.sparse", "torch._mkldnn")):
        return CallError(f"{name} is a tensor of layout {layout}, not a dense one; pass {name}.to_dense()")
    if getattr(value, "is_quantized", False) is True:
        return CallError(f"{name} is quantized; pass {name}.dequantize()")
    if getattr(value, "is_nested", False) is True:
        return CallError(f"{name} is a nested tensor; pass torch.nested.to_padded_tensor({name}, 0)")
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return CallError(f"{name} of type {_type_name(value)} cannot be exported by DLPack: {reason}")


def framework_of(value: Any) -> ModuleType:
    """Return the module that makes tensors of ``value``'s kind from DLPack. Raises `CallError`."""
    if hasattr(value, "__array_namespace__"):
        namespace: ModuleType = value.__array_namespace__()
        return namespace
    name = type(value).__module__
    while name:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "from_dlpack"):
            return module
        name = name.rpartition(".")[0]
    raise CallError(f"a result of type {_type_name(value)} cannot be made: no from_dlpack beside it; pass out=")


def as_kind_of(x: Any, y: NDArray[Any], framework: ModuleType, dtype: str) -> Any:
    """Return ``y`` as a tensor like ``x``, in the same memory. Raises `CallError`."""
    try:
        if dtype != "bfloat16":
            return framework.from_dlpack(y)
        return framework.from_dlpack(y.view(np.int16)).view(x.dtype)
    except (AttributeError, *NOT_EXPORTED) as error:
        raise CallError(f"{framework.__name__} does not take the result: {error}; pass out=") from error


def require_apart(out: Borrowed, inputs: Mapping[str, tuple[int, tuple[int, ...]]], itemsize: int) -> None:
    """Raise `CallError` if ``out`` holds what is still to be read: one of ``inputs``, each an address and a shape."""
    address, shape, _ = out
    stop = address + math.prod(shape) * itemsize
    for name, (start, sizes) in inputs.items():
        if start < stop and address < start + math.prod(sizes) * itemsize:
            raise CallError(f"out shares memory with {name}; pass one of its own")


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
    return Packed.of(w_shape, dtype, packing, _moved(data))


# --- the test vector ---

# amplitudes are in 64ths
X_SALT, W_SALT, B_SALT = 1, 2, 3
X_AMPLITUDE = B_AMPLITUDE = 64


def golden_values(index: NDArray[Any], salt: int, amplitude: int) -> NDArray[np.float64]:
    """Return ``k / 64`` with whole ``-amplitude <= k <= amplitude`` for each element index.

    ``k`` hashes the index by unsigned 32-bit arithmetic, which the C header repeats; with an
    amplitude of at most 128 every dtype holds the values exactly.
    """
    h = (np.asarray(index) & 0xFFFFFFFF).astype(np.uint32) + np.uint32(salt * 0x9E3779B9 & 0xFFFFFFFF)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    return ((h % np.uint32(2 * amplitude + 1)).astype(np.int64) - amplitude) / 64


def elements(
    spec: ConvTranspose3d,
    shape: Sequence[int | None],
    images: Iterable[int],
    channels: NDArray[np.int64],
    ranges: Sequence[range],
) -> NDArray[np.int64]:
    """Return where the elements of a box of an activation tensor lie in memory, in the order ``(N, C, D, H, W)``."""
    strides = spec.from_layout([math.prod(at_batch(shape[axis + 1 :], 1)) for axis in range(5)])
    box = np.ix_(np.array(list(images)), channels, *(np.array(r) for r in ranges))
    return np.asarray(sum(i * stride for i, stride in zip(box, strides, strict=True)), np.int64)


def w_amplitude(spec: ConvTranspose3d) -> int:
    """Return the amplitude of W that gives sums of about unit size, so that no activation saturates or overflows."""
    return max(1, min(128, math.isqrt(192**2 // max(1, spec.terms))))


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """A test vector: call with ``x, w, b``, compare the elements ``indices`` (flat, of Y) with ``expected``.

    ``w`` and ``b`` are None where the artifact holds its own; ``expected`` is the oracle's, in float64.
    """

    x: NDArray[Any]
    w: NDArray[Any] | None
    b: NDArray[Any] | None
    indices: NDArray[np.int64]
    expected: NDArray[np.float64]


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
        return load_again, (str(self.directory), content(self.manifest), self.threads or None)

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
        canonical = np.ndarray(shape, slot.storage, _memory(address, math.prod(shape) * slot.storage.itemsize))
        packed = _moved(self.packing.arranged(canonical))
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


def read_golden(
    directory: Path, manifest: dict[str, Any], spec: ConvTranspose3d, own_weight: bool, own_bias: bool
) -> Golden:
    """Return the test vector of an artifact, without what the artifact holds of its own. Raises `ArtifactError`."""
    stored = read_arrays(directory, manifest, GOLDEN)
    bias = spec.bias and not own_bias
    try:
        batch, indices, expected = (stored[name] for name in ("batch", "indices", "expected"))
        x_shape, y_shape = (at_batch(shape, int(batch)) for shape in (spec.x_shape, spec.y_shape))
        fitting = fits(x_shape, spec.x_shape) and indices.size and indices.shape == expected.shape
        if not fitting or indices.min() < 0 or indices.max() >= math.prod(y_shape):
            raise ValueError("its indices are none of this layer's Y")
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{GOLDEN} is no test vector of this layer: {error}; compile the layer again") from error
    return Golden(
        x=golden_tensor(x_shape, X_SALT, X_AMPLITUDE, spec.dtype),
        w=None if own_weight else golden_tensor(spec.w_shape, W_SALT, w_amplitude(spec), spec.dtype),
        b=golden_tensor((spec.channels_out,), B_SALT, B_AMPLITUDE, spec.dtype) if bias else None,
        indices=indices,
        expected=expected,
    )


def golden_tensor(shape: tuple[int, ...], salt: int, amplitude: int, dtype: str) -> NDArray[Any]:
    """Return a tensor of `golden_values`. Raises as `stored`."""
    return stored(dtype, golden_values(np.arange(math.prod(shape)), salt, amplitude).reshape(shape))


def stored(dtype: str, values: NDArray[Any]) -> NDArray[Any]:
    """Round to ``dtype``. Raises `EngineError` for bfloat16 without ml_dtypes, for NumPy does not know it."""
    return values.astype(bfloat16() if dtype == "bfloat16" else dtype)


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


def content(manifest: dict[str, Any]) -> dict[str, str]:
    """Return the hash of each file of an artifact, but the report's, which verifying it writes anew."""
    return {name: str(entry["sha256"]) for name, entry in manifest["files"].items() if name != REPORT}


def load_again(path: str, held: dict[str, str], threads: int | None = None) -> Artifact | GradientArtifact:
    """Load what was pickled. Raises `ArtifactError` where its directory is gone or holds another artifact by now."""
    loaded = load_any(path, threads=threads)
    if content(loaded.manifest) != held:
        raise ArtifactError(f"{path} holds another artifact than the one that was pickled; load it and pickle that")
    return loaded


def _load_gpu(directory: Path, manifest: dict[str, Any]) -> Artifact | GradientArtifact:
    """Load what was compiled for CUDA, which is called alike. Raises `TargetError` for Metal: that starts from text."""
    _check_files(directory, manifest, set(manifest["files"]))
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
    _check_files(directory, manifest, set(manifest["files"]) - {WEIGHTS} if check else {path.name})
    _tvm_ffi()
    kind = GradientArtifact if manifest["derivative"] else Artifact
    try:
        # the name holds the content's hash, so a library already loaded by this name is this one
        return kind(directory, manifest, ctypes.CDLL(str(path)), threads)
    except (OSError, AttributeError, SpecError) as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error


def opened(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Return the directory of an artifact for any machine, and its manifest; every hash is checked.

    Raises `ArtifactError`.
    """
    directory = checked_path(path, "path").absolute()
    manifest = parse_manifest(read_manifest(directory), directory)
    _check_files(directory, manifest, set(manifest["files"]))
    return directory, manifest


def own_weights(directory: Path, manifest: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Return what an artifact holds of packed ``W`` and of ``B``; bfloat16 as bits. Raises `ArtifactError`."""
    return read_arrays(directory, manifest, WEIGHTS) if manifest["weights"] else {}


def identity(place: Path) -> tuple[int, ...] | None:
    """Tell a directory from any that takes its place; None where there is none, or none to be seen."""
    try:
        found = place.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def read_manifest(directory: Path) -> bytes:
    """Return the manifest's text. Raises `ArtifactError` where there is none."""
    patience, written = time.monotonic() + 1, False
    while True:
        try:
            return (directory / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if written or time.monotonic() > patience:
                break
            # where directories cannot be exchanged, a writer leaves the place empty for an instant; one that is not
            # seen any more may have filled it since
            written = not any(directory.parent.glob(f".{escape(directory.name)}.*"))
            time.sleep(0 if written else 0.005)
        except OSError as error:
            raise ArtifactError(f"{directory / MANIFEST} cannot be read: {error.strerror}") from error
    if (directory / INDEX).is_file():
        raise ArtifactError(f"{directory} holds the artifacts of a model; name one of them, like {directory}/<node>")
    what = "has no manifest.json, so it is not an artifact" if directory.exists() else "does not exist"
    raise ArtifactError(f"{directory} {what}; name a directory that `opcompile compile` wrote")


_FIELDS: dict[str, type] = {
    "spec": str,
    "target": dict,
    "plan": dict,
    "packing": dict,
    "workspace_bytes": int,
    "library": str,
    "weights": list,
    "files": dict,
    "versions": dict,
}
_TARGET_FIELDS: dict[str, type] = {"name": str, "architecture": str, "system": str, "features": list}


def digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its field ``sha256``, so that an edited one is noticed too."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def parse_manifest(text: bytes, directory: Path) -> dict[str, Any]:
    """Read a manifest and check all that can be without the other files. Raises `ArtifactError`."""
    where = directory / MANIFEST
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{where} is not the manifest of an artifact: its format is not {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise ArtifactError(
            f"{where} has format version {manifest.get('version')!r}, and this program reads version {VERSION}; "
            "compile the layer again, or load it with the program that wrote it"
        )
    if manifest.get("sha256") != digest(manifest):
        raise ArtifactError(f"{where} was changed after it was written; compile the layer again")
    for fields, values in ((_FIELDS, manifest), (_TARGET_FIELDS, manifest.get("target"))):
        for name, kind in fields.items():
            if not isinstance(values, dict) or not isinstance(values.get(name), kind):
                raise ArtifactError(f"{where} lacks {name}, which must be a {kind.__name__}")
    if not all(isinstance(feature, str) for feature in manifest["target"]["features"]):
        raise ArtifactError(f"{where} lists {manifest['target']['features']} as features, which must be names")
    for name, entry in manifest["files"].items():
        if not name or name in (".", "..", MANIFEST) or "/" in name or "\\" in name:
            raise ArtifactError(f"{where} lists {name!r}, which is not a file of the artifact")
        if not (
            isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)
        ):
            raise ArtifactError(f"{where} lists {name} without its size and hash")
    if manifest.get("derivative", "") not in (None, *WRT):
        raise ArtifactError(f"{where} must say which derivative it is, x, w or b, or null for the layer itself")
    # an artifact for Metal may have none
    needed = [
        *([manifest["library"]] if manifest["library"] else []),
        GOLDEN,
        *([WEIGHTS] if manifest["weights"] else []),
    ]
    for name in needed:
        if name not in manifest["files"]:
            raise ArtifactError(f"{where} does not list {name}, which it needs")
    return manifest


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


def _check_files(directory: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    files = manifest["files"]
    if sum(files[name]["bytes"] for name in names) < _LARGE:
        for name in names:
            open_checked(directory, manifest, name).close()
        return
    from concurrent.futures import ThreadPoolExecutor  # hashing runs beside the interpreter

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(open_checked, directory, manifest, name) for name in names]:
            done.result().close()


def open_checked(directory: Path, manifest: dict[str, Any], name: str) -> BinaryIO:
    """Open a listed file. Raises `ArtifactError` when it is not what the manifest says."""
    entry, found = manifest["files"][name], hashlib.sha256()
    try:
        with ExitStack() as on_error:
            file = on_error.enter_context((directory / name).open("rb"))
            while part := file.read(_PART):
                found.update(part)
            if file.tell() != entry["bytes"] or found.hexdigest() != entry["sha256"]:
                _require_same(directory, manifest)
                raise ArtifactError(f"{directory / name} was changed after it was written; compile the layer again")
            file.seek(0)
            on_error.pop_all()
            return file
    except OSError as error:
        _require_same(directory, manifest)
        raise ArtifactError(f"{directory / name} cannot be read: {error.strerror}; compile the layer again") from error


def _require_same(directory: Path, manifest: dict[str, Any]) -> None:
    """Raise `ArtifactError` where another artifact took the place of the one with this manifest."""
    if content(parse_manifest(read_manifest(directory), directory)) != content(manifest):
        raise ArtifactError(
            f"{directory} was replaced by another artifact meanwhile; give each layer its own directory"
        )


def read_arrays(directory: Path, manifest: dict[str, Any], name: str) -> dict[str, NDArray[Any]]:
    """Return the arrays of a listed NumPy archive, each at a cache line. Raises `ArtifactError`."""
    checked = open_checked(directory, manifest, name)
    try:
        with checked as file, zipfile.ZipFile(file) as stored:
            return {member.removesuffix(".npy"): _read_array(stored, member) for member in stored.namelist()}
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{name} is not an archive of arrays: {error}") from error


def _read_array(archive: zipfile.ZipFile, member: str) -> NDArray[Any]:
    """Read a member into its place part by part: `numpy.load` holds an array twice, and starts it anywhere."""
    with archive.open(member) as file:
        read_header = {(1, 0): format.read_array_header_1_0, (2, 0): format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[format.read_magic(file)](file)
        if by_columns or dtype.hasobject:
            raise ValueError(f"{member} holds {dtype} by columns" if by_columns else f"{member} holds objects")
        array = aligned(shape, dtype)
        memory = array.reshape(-1).view(np.uint8)
        filled = 0
        while part := file.read(_PART):
            memory[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
            filled += len(part)
        if filled != memory.size:
            raise ValueError(f"{member} has {filled} of {memory.size} bytes")
        return array
