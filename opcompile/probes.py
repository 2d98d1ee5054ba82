"""The two limits of this machine, measured: its peak rate of multiply-adds, the bandwidth of its memory.

Two functions do it, which TVM compiles for the widest vectors there are, whatever the layer is compiled for:

* *multiply-add*: three quarters of the vector registers hold ``y``, each step makes it ``y/2 + 1``. A
  register waits for itself alone, and there are more of them than multiply-adds in flight. For pairs of
  bfloat16 it is ``y + 1/4 + 1/4``, for the target ``llvm+bf16``.
* *copy*: ``Y = X`` by ordinary stores, both buffers together four times the largest cache. A byte read
  and a byte written count as two; that a store first reads its line is the machine's own affair.

Each thread runs a copy of its own, on buffers of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script import tirx as T

from opcompile.bounds import PAIRS
from opcompile.roofline import Sample
from opcompile.target import Machine, target
from schedules.imported import importing
from schedules.pairs import FUNCTIONS, LANES, PRODUCTS, added

# Some 5 ms: 24 multiply-adds of 16 lanes, two a cycle, take 12 cycles.
_STEPS = 1_000_000
# Where the system does not tell the size of its caches.
_LARGE_CACHE = 32 << 20


class Probes:
    """The two probes for ``threads`` threads, which must be pinned before; ``dtype`` says what multiplies.

    It is the type that sums are in, or `PAIRS`.
    """

    def __init__(self, dtype: str, threads: int) -> None:
        """Compile both, allocate the buffers and warm up."""
        self.dtype, self._threads = dtype, threads
        self._fma, self._copy, self._lanes, self._sums = _compiled(dtype)
        self._chunks = -(-2 * _largest_cache() // 64 // threads)
        source = np.ones(self._chunks * 64, np.uint8)
        self._buffers = [(tvm.runtime.tensor(source), tvm.runtime.tensor(source)) for _ in range(threads)]
        kept = np.zeros(self._sums * self._lanes, "float32" if dtype == PAIRS else dtype)
        self._registers = [tvm.runtime.tensor(kept) for _ in range(threads)]
        self.sample()

    def samples(self, count: int = 5) -> tuple[Sample, ...]:
        """Measure both ``count`` times, taking turns."""
        return tuple(self.sample() for _ in range(count))

    def sample(self) -> Sample:
        """Measure both once."""
        fma_ns = self._time([partial(self._fma, y, _STEPS) for y in self._registers])
        copy_ns = self._time([partial(self._copy, x, y, self._chunks) for x, y in self._buffers])
        products = PRODUCTS if self.dtype == PAIRS else 1
        flop = 2 * self._sums * self._lanes * products * _STEPS * self._threads
        moved = 2 * 64 * self._chunks * self._threads
        return Sample(flop / fma_ns, moved / copy_ns)

    def _time(self, runs: list[Callable[[], None]]) -> int:
        """Return the nanoseconds until all of ``runs``, a thread each, are done; compiled code holds no lock."""
        if len(runs) == 1:
            return _elapsed(runs[0])
        with ThreadPoolExecutor(len(runs)) as pool:
            list(pool.map(lambda _: time.sleep(1e-3), runs))  # all threads exist before the clock starts
            return _elapsed(lambda: [None for _ in pool.map(lambda run: run(), runs)])


def _elapsed(run: Callable[[], Any]) -> int:
    start = time.perf_counter_ns()
    run()
    return time.perf_counter_ns() - start


@lru_cache(maxsize=3)
def _compiled(dtype: str) -> tuple[Any, Any, int, int]:
    """Return both functions, the lanes of a vector of ``dtype``, and how many vectors hold sums."""
    pairs = dtype == PAIRS
    here = target("llvm+bf16" if pairs else "llvm")
    lanes, sums = vectors(here.machine, "float32" if pairs else dtype)
    multiplying = multiply_pairs(sums) if pairs else multiply_add(dtype, lanes, sums)
    module = tvm.IRModule({"multiply_add": multiplying, "copy": copy()})
    with tvm.target.Target(here.tvm()) as tvm_target:
        compiled = tvm.compile(module, target=tvm_target)
    return compiled["multiply_add"], compiled["copy"], lanes, sums


def vectors(machine: Machine, dtype: str) -> tuple[int, int]:
    """Return the lanes of a vector of ``dtype``, and how many vectors the sums shall fill."""
    return machine.vector_bytes // np.dtype(dtype).itemsize, machine.registers * 3 // 4


def multiply_add(dtype: str, lanes: int, sums: int) -> tirx.PrimFunc:
    """Return ``multiply_add(Y, steps)``, which LLVM keeps in registers: nothing else is in the loop."""

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(y: T.handle, steps: T.int64):  # type: ignore[no-untyped-def]
        T.func_attr({"global_symbol": "multiply_add"})
        Y = T.match_buffer(y, (sums * lanes,), dtype)
        for _ in T.serial(steps):
            for i in T.unroll(sums):
                for j in T.vectorized(lanes):
                    Y[i * lanes + j] = Y[i * lanes + j] * T.Cast(dtype, 0.5) + T.Cast(dtype, 1)

    function: tirx.PrimFunc = main
    return function


def multiply_pairs(sums: int) -> tirx.PrimFunc:
    """Return ``multiply_add(Y, steps)`` by the instruction for pairs of bfloat16, in registers as well."""
    halves = tirx.const(0x3F003F00, "int32")  # 0.5 twice

    def at(i: int) -> list[Any]:
        return [tirx.Ramp(tirx.const(i * LANES, "int32"), tirx.const(1, "int32"), LANES)]

    y, steps, step = (
        tirx.decl_buffer((sums * LANES,), "float32", "Y"),
        tirx.Var("steps", "int64"),
        tirx.Var("i", "int64"),
    )
    pair = tirx.Broadcast(halves, LANES)
    adding = [tirx.BufferStore(y, added(tirx.BufferLoad(y, at(i)), pair, pair), at(i)) for i in range(sums)]
    loop = tirx.For(step, tirx.const(0, "int64"), steps, tirx.ForKind.SERIAL, tirx.SeqStmt(adding))
    return tirx.PrimFunc([y, steps], importing(loop, FUNCTIONS)).with_attr("global_symbol", "multiply_add")


def copy() -> tirx.PrimFunc:
    """Return ``copy(X, Y, chunks)`` of chunks of 64 bytes."""

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(x: T.handle, y: T.handle, chunks: T.int64):  # type: ignore[no-untyped-def]
        T.func_attr({"global_symbol": "copy"})
        X = T.match_buffer(x, (chunks * 64,), "uint8")
        Y = T.match_buffer(y, (chunks * 64,), "uint8")
        for i in T.serial(chunks):
            for j in T.vectorized(64):
                Y[i * 64 + j] = X[i * 64 + j]

    function: tirx.PrimFunc = main
    return function


def _largest_cache() -> int:
    """Return the bytes of the largest cache that Linux lists for the first processor, or a usual size."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([int(size.removesuffix("K")) << 10 for size in sizes], default=_LARGE_CACHE)
