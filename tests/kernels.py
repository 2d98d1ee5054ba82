"""Compiled kernels as the tests call them: in this process, without our runtime, on NumPy arrays."""

from __future__ import annotations

import ctypes
import mmap
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray

from opcompile import lower
from opcompile.compiled import compiled
from opcompile.reference import reference
from opcompile.spec import ConvTranspose3d
from opcompile.target import Target, target
from schedules.llvm import Tiles

Kernel = Callable[..., NDArray[Any]]
HERE = target("llvm")
# what a test looks at before it has it compiled
scheduled = lru_cache(maxsize=1)(lower.scheduled)


def dtype_of(spec: ConvTranspose3d) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if spec.dtype == "bfloat16" else spec.dtype)


def kernel(spec: ConvTranspose3d, tiles: Tiles | None = None, *, optimised: bool = True, on: Target = HERE) -> Kernel:
    """Compile ``spec`` for this machine, by whatever name, and return ``y = call(x, w, b)``; Y starts out as garbage.

    Without ``optimised`` LLVM takes the schedule as it is, a fifth of the time: for tests of many layers.
    """
    tiles = tiles or lower.choose(spec, on, "baseline")[0]
    function = callable_in(scheduled(spec, tiles), lower.KERNEL, optimised=optimised, on=on)
    pack = lower.packing(spec, tiles)
    dtype = dtype_of(spec)

    def call(x: NDArray[Any], w: NDArray[Any], b: NDArray[Any] | None = None) -> NDArray[Any]:
        y = np.full((x.shape[0], *spec.y_shape[1:]), np.nan, dtype)
        given = [x, pack(w), *([b] if spec.bias else []), y]
        tensors = [_tensor(np.ascontiguousarray(a, dtype), spec.dtype) for a in given if a is not None]
        function(*tensors)
        result = tensors[-1].numpy()
        return result.view(dtype) if spec.dtype == "bfloat16" else result

    return call


def callable_in(module: tvm.IRModule, name: str, *, optimised: bool, on: Target = HERE) -> Callable[..., None]:
    """Compile a scheduled module and return one of its functions."""
    executable = compiled(module, {**on.tvm(), "opt-level": 3 if optimised else 0})
    if optimised:
        return executable[name]
    # in this process LLVM's JIT would select instructions with as much care as ever
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "kernel.so")
        executable.export_library(library)
        return tvm.runtime.load_module(library)[name]


def _tensor(array: NDArray[Any], dtype: str) -> Any:
    tensor = tvm.runtime.empty(array.shape, dtype)
    tensor.copyfrom(array)
    return tensor


def guarded(array: NDArray[Any], *, end: bool) -> NDArray[Any]:
    """A copy that ends, or begins, at a page that no one may touch: who reads or writes beyond it dies there."""
    pages = -(-array.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(first + page * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    begin = (pages + 1) * mmap.PAGESIZE - array.nbytes if end else mmap.PAGESIZE
    copy = np.frombuffer(memory, array.dtype, array.size, begin).reshape(array.shape)
    copy[...] = array
    return copy


def within_guards(spec: ConvTranspose3d, tiles: Tiles, *, end: bool, on: Target = HERE) -> NDArray[Any]:
    """Y of small integers (`integers`), where X, W, B and Y lie beside pages that no one may touch."""
    function = callable_in(scheduled(spec, tiles), lower.KERNEL, optimised=False, on=on)
    x, w, b = integers(spec)
    y = guarded(np.full((x.shape[0], *spec.y_shape[1:]), np.nan, dtype_of(spec)), end=end)
    given = [x, lower.packing(spec, tiles)(w), *([b] if spec.bias else [])]
    function(*(tvm_ffi.from_dlpack(a, require_alignment=1) for a in (*(guarded(a, end=end) for a in given), y)))
    return y


def assert_writes_y_alone(
    spec: ConvTranspose3d, tiles: Tiles, *, on: Target = HERE, offsets: tuple[int, ...] = (0, 16, 48)
) -> None:
    """The kernel is right for a Y of float32 so many bytes behind a cache line, and writes nothing beside it."""
    function = compiled(lower.scheduled(spec, tiles), on.tvm())[lower.KERNEL]
    x, w, b = integers(spec)
    given = [x, np.ascontiguousarray(lower.packing(spec, tiles)(w)), *([b] if spec.bias else [])]
    wanted = reference(spec, x, w, b if spec.bias else None)
    for offset in offsets:
        memory = np.full(wanted.size + 64, np.nan, np.float32)
        # a line at least before and behind
        begin = 16 + (offset - memory.ctypes.data) % 64 // 4
        y = memory[begin : begin + wanted.size].reshape(wanted.shape)
        function(*(tvm_ffi.from_dlpack(each, require_alignment=1) for each in (*given, y)))
        np.testing.assert_array_equal(y, wanted)
        assert np.isnan(memory).sum() == memory.size - y.size


def integers(spec: ConvTranspose3d, seed: int = 0, batch: int = 2) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Small integers whose sums every type holds exactly; ``batch`` is used where the spec leaves it open."""
    return _draw(spec, batch, lambda rng, shape: rng.integers(-2, 3, shape), seed)


def reals(spec: ConvTranspose3d, seed: int = 0, batch: int = 2) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return _draw(spec, batch, lambda rng, shape: rng.standard_normal(shape), seed)


def _draw(spec: ConvTranspose3d, batch: int, make: Any, seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    x_shape = spec.with_batch(spec.batch or batch).x_shape
    x, w, b = (make(rng, shape).astype(dtype_of(spec)) for shape in (x_shape, spec.w_shape, (spec.channels_out,)))
    return x, w, b
