"""What a call is given and gives: tensors of NumPy, or of any framework by DLPack, as memory that a kernel takes.

Contiguous ones at any address that suits their element are never copied, others are copied first. NumPy arrays
give their address directly; everything else (torch, JAX, ...) comes through DLPack, by ``tvm_ffi``.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.errors import CallError, EngineError
from opcompile.needed import bfloat16
from opcompile.spec import fits

# Bytes of a cache line, or of the widest vector: packed weights begin at a multiple.
ALIGNMENT = 64

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
                return ffi().from_dlpack(value).data_ptr(), value.shape, value
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
            return ffi().from_dlpack(value)
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
        return int(ffi().from_dlpack(array).data_ptr())
    return int(array.ctypes.data)


@cache
def ffi() -> ModuleType:
    """Import `apache-tvm-ffi`, on use. Raises `EngineError` where it is missing."""
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
    memory = memory_at(tensor.data_ptr() + start, reach - start + storage.itemsize)
    return np.ndarray(tuple(tensor.shape), storage, memory, -start, strides)


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an uninitialised array that begins at a cache line.

    NumPy's own start anywhere: each vector would straddle two lines, and some frameworks would copy it.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def moved(data: NDArray[Any]) -> NDArray[Any]:
    """Copy to aligned, contiguous memory."""
    moved = aligned(data.shape, data.dtype)
    moved[...] = data
    return moved


def memory_at(address: int, size: int) -> memoryview:
    """View ``size`` bytes, whose owner must outlive it."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def sizes_text(shape: Iterable[int | None]) -> str:
    """Write a shape for a person, a dynamic batch as N."""
    return "(" + ", ".join("N" if size is None else str(size) for size in shape) + ")"


def stored(dtype: str, values: NDArray[Any]) -> NDArray[Any]:
    """Round to ``dtype``. Raises `EngineError` for bfloat16 without ml_dtypes, for NumPy does not know it."""
    return values.astype(bfloat16() if dtype == "bfloat16" else dtype)


def detached(name: str, value: Any) -> Any:
    """Return a tensor of PyTorch out of its graph; others as they are.

    Raises `CallError` for what exporting would drop without a word: a graph or a tangent that is recorded, a sign.
    """
    require_values(name, value)
    require_no_tangent(name, value)
    if getattr(value, "requires_grad", False) is True:
        if _is_recorded(value):
            lacks = "which this kernel has not; pass"
            if name == "dy":
                lacks = "and there are no second derivatives; leave create_graph=True out, or pass"
            # inside `backward`, `detach` alone would lose a second derivative without an error
            raise CallError(f"{name} requires a gradient, {lacks} {name}.detach() if the result may be a constant")
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
