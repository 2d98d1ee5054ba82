"""Rows of Y written as vectors, each woven from vectors of the phases that a band has summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from tvm import s_tir, tirx
from tvm.ir import Range
from tvm.ir.expr import Call, TensorLoad
from tvm.sym import Analyzer
from tvm_ffi import structural_map

from schedules.division import over
from schedules.fetches import later
from schedules.layer import joined, length_of_row, reach
from schedules.rules import LEAST_WOVEN_LAST, weaves
from schedules.statements import (
    ROW,
    WRITING,
    begin,
    every,
    in_turn,
    interlaced,
    loop_over,
    nest,
    replaced,
    side_by_side,
    vector_of,
)

if TYPE_CHECKING:
    from opcompile.spec import ConvTranspose3d
    from schedules.tiles import Tiles


def in_rows(loop: tirx.For, spec: ConvTranspose3d, t: Tiles) -> tirx.Stmt:
    """Write a row of Y as vectors, each woven from one vector of every phase, unless an activation is for scalars.

    Where channels come last, of every phase of all channels. What whole vectors leave of the row is a narrower one that
    ends where the row does, and may write again what the one before it wrote: LLVM would write the last 2 to 31
    elements one by one. A row of less than two vectors is woven from vectors twice as wide, and written as two.
    """
    stride, row = spec.axes[2].stride, spec.axes[2].out
    loops, block = nest(loop)
    of_row = 2 if spec.layout == "NCDHW" else 4  # columns and phases, groups and channels
    if len(loops) != of_row or not isinstance(block, s_tir.SBlockRealize) or block.block.name_hint != WRITING:
        return loop
    if not weaves(spec):
        return loop
    if spec.layout == "NDHWC":
        some_channels = math.prod(int(each.extent) for each in loops[2:]) < spec.channels_out
        if some_channels or t.lanes < LEAST_WOVEN_LAST:
            return loop
    if t.vector == "plane" and not _among_sums(block.block, spec, t):
        return loop
    lanes = min(t.lanes, 1 << ((row // stride).bit_length() - 1))
    whole, left = divmod(row, lanes * stride)
    short = whole == 1 and left > 0 and lanes < t.lanes and stride > 1
    if short and 2 * lanes <= _columns_of_rows(block.block, spec, t):
        at_once = _weave(loops, block, stride, 0, 1, 2 * lanes, (0, left))
        return loop if at_once is None else at_once
    parts = [
        _weave(loops, block, stride, first * lanes * stride, count, lanes)
        for first, count in _parts(spec, t, whole, lanes)
    ]
    if left:
        lanes = max(2, 1 << (over(left, stride) - 1).bit_length())
        parts.append(_weave(loops, block, stride, row - lanes * stride, 1, lanes))
    woven = [part for part in parts if part is not None]
    return in_turn(woven) if len(woven) == len(parts) else loop


def _among_sums(writing: s_tir.SBlock, spec: ConvTranspose3d, t: Tiles) -> bool:
    """Whether vectors of a row of Y, where X has nothing beside it, read what other taps or rows have summed.

    None reads before the first sum: no pad is negative, and a tap that is read at all is less than a row away.
    """
    sums = next(load.source for load in every(TensorLoad, writing.body.value) if load.source.name.startswith("tap_"))
    channels, kh, kw, _, _, line = (int(n) for n in sums.shape[2:])
    column, of_tap = spec.axes[2], line * (1 if joined(spec, t) > 1 else t.depth)
    last_row = of_tap - line + length_of_row(spec, t) - column.size
    taps = [(i * of_tap, column.offset(i % kw)) for i in range(channels * kh * kw)]
    ends = [start + last_row + offset + column.positions for start, offset in taps if column.reaches(offset)]
    return max(ends) <= len(taps) * of_tap


def _parts(spec: ConvTranspose3d, t: Tiles, whole: int, lanes: int) -> list[tuple[int, int]]:
    """Where the first ``whole`` vectors of a row are cut, so that those inside need no test for what lies beside X."""
    if t.vector != "plane":
        return [(0, whole)]
    first, last = spec.axes[2].reads
    low = min(whole, over(max(0, -first), lanes))
    high = max(low, min(whole, (spec.axes[2].size - max(0, last)) // lanes))
    return [(start, end - start) for start, end in ((0, low), (low, high), (high, whole)) if end > start]


def _masked(value: Any, lane: tirx.Var) -> Any:
    """The value with tests that differ between lanes as selections, which vectors can have."""

    def each(call: Call) -> Any:
        if call.op.name != "prim.if_then_else":
            return call
        tests, inside, outside = call.args
        of_lanes: list[Any] = []
        of_all: list[Any] = []
        for test in _conjuncts(tests):
            (of_lanes if any(var.same_as(lane) for var in every(tirx.Var, test)) else of_all).append(test)
        chosen = tirx.Select(tirx.all(*of_lanes), inside, outside) if of_lanes else inside
        return tirx.if_then_else(tirx.all(*of_all), chosen, outside) if of_all else chosen

    return structural_map(value, (Call, each))


def _conjuncts(test: Any) -> list[Any]:
    """The tests that must all hold."""
    return [*_conjuncts(test.a), *_conjuncts(test.b)] if isinstance(test, tirx.And) else [test]


def _columns_of_rows(writing: s_tir.SBlock, spec: ConvTranspose3d, t: Tiles) -> int:
    """How many columns may be read from the begin of each row of the phases, what lies behind the row included."""
    phases = [load for load in every(TensorLoad, writing.body.value) if load.source.name.startswith("phase")]
    rows_before = t.height * joined(spec, t) - 1 if t.line else 0
    return min((int(load.source.shape[-1]) for load in phases), default=0) - rows_before * reach(spec.axes[2])


def _weave(
    loops: Sequence[tirx.For],
    realize: s_tir.SBlockRealize,
    stride: int,
    first: int,
    count: int,
    lanes: int,
    begins: Sequence[int] = (0,),
) -> tirx.For | None:
    """``count`` times ``lanes * stride`` columns of a row of Y, from ``first`` on; None where that needs a loop.

    They are written as a vector from each of ``begins`` on, each of its part of the columns. ``loops`` go through
    columns, phases and, where channels come last, groups and channels.
    """
    loop = loops[0]
    kind, block = loop.loop_var.ty.dtype, realize.block
    y, last = block.body.buffer, len(loops) > 2
    column = block.iter_vars[-2 if last else -1].var
    of_channels = [{block.iter_vars[-1].var: tirx.const(i, kind)} for i in range(int(y.shape[-1]))] if last else [{}]
    # of a row with channels last, Y's index of a channel goes on through its columns
    *row, at_first = block.body.indices if not last else [*block.body.indices[:-1], tirx.const(0, kind)]
    vector, lane = (tirx.Var(f"{loop.loop_var.name}_{name}", kind) for name in ("vector", "lane"))
    analyzer, zero, size = Analyzer(), tirx.const(0, kind), lanes * stride
    analyzer.bind(vector, Range(0, count))
    analyzer.bind(lane, Range(0, lanes))
    of_phases = [
        analyzer.simplify(
            replaced(block.body.value, {column: (vector * lanes + lane) * stride + (first + k), **channel})
        )
        for k, channel in product(range(stride), of_channels)
    ]
    vectors = [vector_of(_masked(value, lane), lane, lanes) for value in of_phases]
    if any(each is None for each in vectors):
        return None
    each = len(of_channels)
    part = size // len(begins) * each
    end = begins[-1] * each + part
    body = later(y, [*row, at_first], end)
    for begin_at in (column_at * each for column_at in begins):
        at = [*row, side_by_side(at_first + begin_at, part)]
        body.append(tirx.BufferStore(y, interlaced(vectors, lanes, begin_at, part), at))
    columns = Range.from_min_extent(column, end // each)
    written = [*block.writes[0].region[: -2 if last else -1], columns]
    if last:
        written.append(Range.from_min_extent(at_first, each))
    weaving = s_tir.SBlock(
        block.iter_vars,
        block.reads,
        [tirx.BufferRegion(y, written)],
        ROW,
        tirx.SeqStmt(body),
        annotations=block.annotations,
    )
    # every column is one of the row's: of the test there remain planes and rows
    test = analyzer.simplify(replaced(realize.predicate, begin(loops)))
    start = [vector * size + first, *([zero] if last else [])]
    woven_row = s_tir.SBlockRealize([*realize.iter_values[: -len(start)], *start], test, weaving)
    return loop_over(vector, count, woven_row)
