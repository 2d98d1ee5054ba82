"""NVIDIA's driver by ctypes: which GPU is there, its memory, and the time that kernels take on it.

No toolkit, no PyTorch, no TVM. Tensors lie in the device's primary context, which the CUDA runtime inside of a
compiled library uses too, and what is timed runs in its default stream.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from opcompile.errors import TargetError
from opcompile.gpus import runs_on, suited

# DLPack's number of a CUDA device, and its codes and bits of element types.
CUDA = 2
_DTYPES = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "float64": (2, 64)}

_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR, _L2_BYTES = 75, 76, 38
_OUT_OF_MEMORY, _NO_DEVICE = 2, 100
# Overwritten before each sample: more than any second cache holds, and so much that the calls are all
# waiting in the stream before the first one starts.
_FLUSHED_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU: its name, compute ``capability`` (major, minor), bytes of its second cache, and its ``driver``."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    l2_bytes: int
    driver: str

    @property
    def compute(self) -> str:
        """The compute capability as NVIDIA writes it: ``9.0``."""
        return ".".join(map(str, self.capability))


@cache
def device(ordinal: int = 0) -> Device:
    """Return the GPU that CUDA numbers ``ordinal``. Raises `TargetError` where there is no driver, or no such GPU."""
    _call("cuInit", 0)
    count, handle, version, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    _call("cuDeviceGetCount", ctypes.byref(count))
    if ordinal >= count.value:
        raise TargetError(f"there is no GPU {ordinal} here, CUDA sees {count.value}; CUDA_VISIBLE_DEVICES chooses them")
    _call("cuDeviceGet", ctypes.byref(handle), ordinal)
    _call("cuDeviceGetName", name, len(name), handle)
    _call("cuDriverGetVersion", ctypes.byref(version))
    module = Path("/sys/module/nvidia/version")
    words = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return Device(
        ordinal,
        name.value.decode(errors="replace"),
        (_attribute(_MAJOR, handle), _attribute(_MINOR, handle)),
        _attribute(_L2_BYTES, handle),
        f"{module.read_text().strip()}, {words}" if module.exists() else words,
    )


def require_runs_on(archs: Sequence[str], gpu: Device, what: str) -> None:
    """Raise `TargetError` where ``what``, made for ``archs``, holds no code that ``gpu`` runs."""
    if runs_on(archs, gpu.capability):
        return
    arch = suited(gpu.capability)
    held = f"machine code for {', '.join(archs)}, and PTX for {archs[-1]} and later"
    several = "+".join([str(arch), *archs])
    way_out = f"compile the layer with --target cuda:{arch}, whose PTX later GPUs run too, or cuda:{several}"
    raise TargetError(
        f"GPU {gpu.ordinal}, {gpu.name}, has compute capability {gpu.compute}, but {what} holds {held}; "
        f"{way_out if arch else 'no target there is runs on it'}"
    )


@cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise TargetError(
            f"there is no driver of an NVIDIA GPU on this machine: {error}; run this where there is one"
        ) from error


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status == _NO_DEVICE:
        raise TargetError("the driver of NVIDIA's GPUs sees none on this machine; run this where there is one")
    if status:
        words = ctypes.c_char_p()
        _library().cuGetErrorString(status, ctypes.byref(words))
        said = (words.value or b"unknown").decode(errors="replace")
        way_out = "; end what else uses the GPU, or take a smaller layer" if status == _OUT_OF_MEMORY else ""
        raise TargetError(f"the GPU's driver answered {name} with error {status}: {said}{way_out}")


def _attribute(number: int, handle: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _call("cuDeviceGetAttribute", ctypes.byref(value), number, handle)
    return value.value


# --- tensors ---


class _DLTensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_: ClassVar = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


# What was handed on, and stays until the process ends: whoever took it reads it last when it gives it back.
_HANDED: list[tuple[Any, ...]] = []


@dataclass(slots=True, eq=False)
class DeviceTensor:
    """Contiguous memory of a GPU at ``address``, which DLPack hands on; ``owner`` is kept with it."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    ordinal: int = 0
    owner: object = None

    @property
    def bytes(self) -> int:
        """Bytes of memory."""
        return math.prod(self.shape) * _DTYPES[self.dtype][1] // 8

    def __dlpack_device__(self) -> tuple[int, int]:
        """Name the device, as DLPack does."""
        return CUDA, self.ordinal

    def __dlpack__(self, **_: Any) -> Any:
        """Hand the memory on, unmanaged: nobody frees it when it is given back."""
        sizes = (ctypes.c_int64 * len(self.shape))(*self.shape)
        steps = (ctypes.c_int64 * len(self.shape))(*(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))))
        code, bits = _DTYPES[self.dtype]
        tensor = _DLTensor(self.address, CUDA, self.ordinal, len(sizes), code, bits, 1, sizes, steps, 0)
        managed = _Managed(tensor, None, None)
        _HANDED.append((managed, sizes, steps, self))
        capsule = ctypes.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return capsule(ctypes.addressof(managed), b"dltensor", None)


# --- memory and time ---


class Gpu:
    """One GPU at work, for a short-lived process: what is allocated is freed with the process."""

    def __init__(self, ordinal: int = 0) -> None:
        """Make the GPU's primary context the calling thread's. Raises `TargetError`."""
        self.device = device(ordinal)
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        _call("cuDeviceGet", ctypes.byref(handle), ordinal)
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        _call("cuCtxSetCurrent", context)
        self._flushed = self._allocated(_FLUSHED_BYTES)
        self._begin, self._end = ctypes.c_void_p(), ctypes.c_void_p()
        for event in (self._begin, self._end):
            _call("cuEventCreate", ctypes.byref(event), 0)

    def _allocated(self, size: int) -> int:
        address = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, size)))
        return address.value

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        """Return a tensor that is NaN everywhere, so that what a kernel leaves unwritten is seen."""
        tensor = DeviceTensor(0, shape, dtype, self.device.ordinal)
        tensor.address = self._allocated(tensor.bytes)
        _call("cuMemsetD8_v2", ctypes.c_uint64(tensor.address), ctypes.c_ubyte(255), ctypes.c_size_t(tensor.bytes))
        return tensor

    def put(self, array: NDArray[Any], dtype: str) -> DeviceTensor:
        """Return a copy of ``array``, whose elements are ``dtype`` (or its bits), on the GPU."""
        host = np.ascontiguousarray(array)
        tensor = self.empty(host.shape, dtype)
        there = ctypes.c_uint64(tensor.address)
        _call("cuMemcpyHtoD_v2", there, ctypes.c_void_p(host.ctypes.data), ctypes.c_size_t(tensor.bytes))
        return tensor

    def get(self, tensor: DeviceTensor, like: np.dtype[Any]) -> NDArray[Any]:
        """Wait for the GPU and return what ``tensor`` holds, its elements being of type ``like``."""
        host = np.empty(tensor.shape, like)
        there = ctypes.c_uint64(tensor.address)
        _call("cuMemcpyDtoH_v2", ctypes.c_void_p(host.ctypes.data), there, ctypes.c_size_t(tensor.bytes))
        return host

    def timed_us(self, calls: Sequence[Callable[[], object]]) -> float:
        """Return the mean time of ``calls``, which start kernels, in microseconds, by the GPU's own clock.

        Nothing that they read is in a cache at first, and the GPU does not wait for this thread between them: the
        stream overwrites a large buffer before. Raises `TargetError` for what went wrong on the GPU meanwhile.
        """
        stream, elapsed_ms = ctypes.c_void_p(), ctypes.c_float()
        there, size = ctypes.c_uint64(self._flushed), ctypes.c_size_t(_FLUSHED_BYTES)
        _call("cuMemsetD8Async", there, ctypes.c_ubyte(0), size, stream)
        _call("cuEventRecord", self._begin, stream)
        for call in calls:
            call()
        _call("cuEventRecord", self._end, stream)
        _call("cuEventSynchronize", self._end)
        _call("cuEventElapsedTime", ctypes.byref(elapsed_ms), self._begin, self._end)
        return elapsed_ms.value * 1e3 / len(calls)
