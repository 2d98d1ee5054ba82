"""What `finish` adds to a schedule: vectors in the copy of X, and every line of Y asked for before it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from tvm import s_tir, tirx
from tvm.sym import Analyzer
from tvm_ffi import structural_map

from opcompile.lower import KERNEL, scheduled
from opcompile.spec import ConvTranspose3d
from opcompile.target import target
from schedules.llvm import Tiles, candidates

MACHINE = target("llvm:x86-64-v4").machine
LANES = MACHINE.vector_bytes // 4


def tiles_of(spec: ConvTranspose3d, vector: str) -> Tiles:
    return next(e.tiles for e in candidates(spec, MACHINE) if e.tiles.vector == vector)


def statements(at: Any, loops: tuple[tirx.For, ...] = ()) -> Iterator[tuple[Any, tuple[tirx.For, ...]]]:
    """Every statement that is no sequence, with the loops around it."""
    if isinstance(at, tirx.SeqStmt):
        for part in at.seq:
            yield from statements(part, loops)
        return
    yield at, loops
    if isinstance(at, tirx.For):
        yield from statements(at.body, (*loops, at))
    elif isinstance(at, s_tir.SBlockRealize):
        yield from statements(at.block.body, loops)
    elif isinstance(at, tirx.IfThenElse):
        yield from statements(at.then_case, loops)


@pytest.mark.parametrize(
    ("text", "widths"),
    [
        ("in=1x4x3x4x40 co=3 k=3 s=2 p=1 op=1", [16, 8, 1]),  # the last column is a zero
        ("in=1x4x3x4x40 co=3 k=3 s=2", [1, 16, 8, 1]),  # so is the first
        ("in=1x4x3x4x22 co=3 k=3 s=1x1x2 p=1 op=0x0x1", [16, 6, 1]),
        ("in=1x4x3x4x40 co=3 k=3 s=2 p=1 op=1 layout=NDHWC", []),  # columns lie apart
    ],
)
def test_columns_between_the_zeros_are_copied_as_vectors(text: str, widths: list[int]) -> None:
    spec = ConvTranspose3d.parse(text)
    body = scheduled(spec, tiles_of(spec, "row"))[KERNEL].body
    copies = [
        loops[-1]
        for at, loops in statements(body)
        if isinstance(at, s_tir.SBlockRealize) and at.block.name_hint == "pad"
    ]
    assert [int(loop.extent) for loop in copies if widths] == widths
    assert all((loop.kind == tirx.ForKind.VECTORIZED) == (bool(widths) and int(loop.extent) > 1) for loop in copies)


@pytest.mark.parametrize(
    ("text", "tests"),
    [
        ("in=1x4x3x4x40 co=3 k=3 s=2 p=1 op=1", 8),
        ("in=1x4x3x4x40 co=3 k=2 s=2", 0),  # no tap reads beside X
        ("in=1x4x3x4x40 co=3 k=3 s=1 p=0x1x1", 1),
    ],
)
def test_taps_that_read_zeros_are_left_out(text: str, tests: int) -> None:
    spec = ConvTranspose3d.parse(text)
    body = scheduled(spec, tiles_of(spec, "row"))[KERNEL].body
    assert sum(isinstance(at, tirx.IfThenElse) for at, _ in statements(body)) == tests


def asked_for(body: Any) -> Iterator[tuple[int, ...]]:
    """The elements of Y whose lines the kernel asks for, all loops walked through."""
    simplify = Analyzer().simplify
    for at, loops in statements(body):
        if not isinstance(at, tirx.Evaluate) or "llvm.prefetch" not in str(at):
            continue
        (element,) = (a.args[0] for a in at.value.args if hasattr(a, "op") and a.op.name == "tirx.address_of")
        for values in _turns(loops):
            known = {var: tirx.const(value, var.ty.dtype) for var, value in values.items()}
            yield tuple(int(simplify(_known(i, known))) for i in element.indices)


def _known(expression: Any, known: Mapping[tirx.Var, Any]) -> Any:
    return structural_map(expression, (tirx.Var, lambda var: known.get(var, var)))


def _turns(loops: tuple[tirx.For, ...]) -> Iterator[dict[tirx.Var, int]]:
    if not loops:
        yield {}
        return
    for rest in _turns(loops[1:]):
        for i in range(int(loops[0].extent)):
            yield {loops[0].loop_var: i, **rest}


@pytest.mark.parametrize("vector", ["channels", "row", "line"])
def test_every_line_of_y_is_asked_for(vector: str) -> None:
    spec = ConvTranspose3d.parse("in=1x2x2x3x32 co=16 k=2 s=2")
    body = scheduled(spec, replace(tiles_of(spec, vector), depth=1))[KERNEL].body
    lines = {(n, m, d, h, w // LANES) for n, m, d, h, w in asked_for(body)}
    _, channels, depth, height, width = spec.y_shape
    every = {
        (0, m, d, h, w)
        for m in range(channels)
        for d in range(depth)
        for h in range(height)
        for w in range(width // LANES)
    }
    assert every <= lines


@pytest.mark.parametrize(("vector", "asks"), [("channels", True), ("row", False)])
def test_with_channels_last_only_vectors_of_channels_are_lines(vector: str, asks: bool) -> None:
    spec = ConvTranspose3d.parse("in=1x2x2x3x32 co=16 k=2 s=2 layout=NDHWC")
    assert any(asked_for(scheduled(spec, tiles_of(spec, vector))[KERNEL].body)) == asks
