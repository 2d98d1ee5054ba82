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
from opcompile.spec import ConvTranspose3d
from opcompile.target import target
from schedules.imported import WITHOUT_LSR
from schedules.llvm import Tiles
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


def test_addresses_of_many_bands_are_computed_where_they_are_needed() -> None:
    """Each element of X that a turn reads had an address of its own on the stack, which every turn loaded."""
    spec = ConvTranspose3d.parse("in=1x32x16x32x32 co=32 k=3 s=1 p=1 layout=NDHWC")
    tiles = Tiles("channels", 16, 2, 8, 1, 32, 1, 2, 32, "task", 4, 4, woven="tile")
    module = scheduled(spec, tiles)
    assert loads_of_addresses(module) == 0
    assert loads_of_addresses(tvm.IRModule({KERNEL: module[KERNEL].without_attr(WITHOUT_LSR)})) > 8


def loads_of_addresses(module: tvm.IRModule) -> int:
    """Count what the longest loop of multiply-adds loads from the stack into registers for addresses."""
    text = compiled(module, MACHINE.tvm()).mod.inspect_source("asm")
    blocks = re.split(r"^\.L\w+:", text, flags=re.M)
    longest = max(blocks, key=lambda block: block.count("vfmadd"))
    return len(re.findall(r"movq\s+-?\d*\(%rsp\), %r", longest))
