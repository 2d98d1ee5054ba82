"""What machine code of a CPU does with memory: when workspaces are allocated, and where the stack begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import pytest
import tvm
from tvm import tirx
from tvm.tirx.compilation_pipeline import get_tir_pipeline

from opcompile.cases import case
from opcompile.compiled import compiled
from opcompile.gradients import lower as gradients
from opcompile.gradients.gradient import Gradient
from opcompile.lower import KERNEL, choose, scheduled
from opcompile.target import target
from schedules.statements import every

MACHINE = target("llvm:x86-64-v4")


@cache
def kernel(layer: str) -> tvm.IRModule:
    spec = case(layer).spec
    return scheduled(spec, choose(spec, MACHINE, "baseline")[0])


def allocated(statements: Sequence[tirx.Stmt]) -> int:
    buffers = [allocation.buffer for each in statements for allocation in every(tirx.AllocBuffer, each)]
    return sum(buffer.scope() == "global" for buffer in buffers)


def test_threads_allocate_workspaces_and_tasks_none() -> None:
    cpu = tvm.target.Target(MACHINE.tvm())
    function = kernel("L33-surroundocc-deblock")[KERNEL].with_attr("target", cpu.with_host(cpu))
    passes, _, _ = get_tir_pipeline("opcompile")
    (function,) = passes(tvm.IRModule({KERNEL: function})).functions.values()
    tasks = [loop for loop in every(tirx.For, function.body) if loop.kind == tirx.ForKind.PARALLEL]
    threads = [at for at in every(tirx.AttrStmt, function.body) if at.attr_key == "pragma_parallel_launch_point"]
    # the copy of X, and eight phases
    assert allocated(threads) == 1 + 8
    assert tasks
    assert allocated(tasks) == 0


@pytest.mark.parametrize("layer", ["L14-swinunetr-dec1", "L34-mednext-up0", "L18-3dgan-layer1"])
def test_the_stack_of_a_thread_is_at_a_cache_line(layer: str) -> None:
    assert aligned(kernel(layer), MACHINE.tvm())


@pytest.mark.parametrize("wrt", ["x", "w", "b"])
def test_the_stack_of_a_derivative_too(wrt: str) -> None:
    gradient = Gradient(case("L34-mednext-up0").spec, wrt)
    tiles, _ = gradients.choose(gradient, MACHINE, "baseline")
    assert aligned(gradients.scheduled(gradient, tiles), MACHINE.tvm())


def aligned(module: tvm.IRModule, machine: dict[str, object]) -> bool:
    """Every function that a thread runs lays its frame at a cache line."""
    text = str(compiled(module, machine).mod.inspect_source("asm"))
    threads = re.findall(r"^\.L__tvm_parallel_lambda[\w.]*:$(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL)
    assert threads
    return all("andq\t$-64, %rsp" in each for each in threads)
