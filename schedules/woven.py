"""What of Y register tiles write themselves, with no buffer of a band in between.

Vectors of channels that come last are written as they lie in Y, by the tiles of each phase.

Vectors of positions are woven. Where the kernel is the stride, all phases multiply the same elements of X, each by a
weight of its own: two phases that are neighbours in a row are summed in one loop, so that each vector of X is loaded
once for both, and their sums are woven into a row of Y while they are still in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm import s_tir, tirx
from tvm.ir import Range
from tvm.ir.expr import TensorLoad
from tvm.sym import Analyzer
from tvm_ffi import structural_map

from schedules.fetches import later
from schedules.statements import (
    OF_PHASE,
    ROW,
    WRITING,
    every,
    in_turn,
    interlaced,
    nest,
    replaced,
    vector_of,
    with_turns,
    within,
)
from schedules.tiles import divided

if TYPE_CHECKING:
    from opcompile.spec import ConvTranspose3d
    from schedules.tiles import Tiles


def written_by_tiles(function: tirx.PrimFunc, spec: ConvTranspose3d, t: Tiles) -> tirx.PrimFunc:
    """Let the tiles write what they have summed; nothing is left that a band's buffers are for."""
    y = function.params[-1]

    def band(statements: tirx.SeqStmt) -> tirx.Stmt:
        *phases, writing = statements.seq
        names = [_first_block(each) for each in statements.seq]
        if names[-1] != WRITING or not all(OF_PHASE.match(name) for name in names[:-1]):
            return statements
        width = t.phases_at_once
        rows = [phases[first : first + width] for first in range(0, len(phases), width)]
        _, realize = nest(writing)
        return in_turn([_row(row, realize.block, spec, t, y) for row in rows])

    return structural_map(function, (tirx.SeqStmt, band))


def _first_block(statement: tirx.Stmt) -> str:
    blocks = every(s_tir.SBlock, statement)
    return str(blocks[0].name_hint) if blocks else ""


def _row(
    phases: Sequence[tirx.Stmt], writing: s_tir.SBlock, spec: ConvTranspose3d, t: Tiles, y: tirx.Buffer
) -> tirx.Stmt:
    """The tiles of one phase, or of those of a row, which all have the same loops, and what these write."""
    around, _ = nest(phases[0])
    begins, sums, leaves = [], None, []
    for phase in phases:
        loops, tile = nest(phase)
        same = {own.loop_var: loop.loop_var for own, loop in zip(loops, around, strict=True)}
        *begin, summing, leaving = (replaced(each, same) for each in tile.seq)
        begins += begin
        sums = summing if sums is None else _together(sums, summing)
        leaves.append(leaving)
    return within(around, in_turn([*begins, sums, _writing(leaves, writing, spec, t, y, around)]))


def _together(first: tirx.Stmt, second: tirx.Stmt) -> tirx.Stmt:
    """One nest of both: their loops are the same, down to the lanes of a vector."""
    if isinstance(first, tirx.For) and first.kind != tirx.ForKind.VECTORIZED:
        body = replaced(second.body, {second.loop_var: first.loop_var})
        return with_turns(first, _together(first.body, body))
    if isinstance(first, tirx.SeqStmt):  # what a turn asks for, and what it adds
        *asked, adding = first.seq
        *also_asked, also_adding = second.seq
        return in_turn([*asked, *also_asked, _together(adding, also_adding)])
    return in_turn([first, second])


def _writing(
    leaves: Sequence[tirx.Stmt],
    writing: s_tir.SBlock,
    spec: ConvTranspose3d,
    t: Tiles,
    y: tirx.Buffer,
    around: Sequence[tirx.For],
) -> tirx.Stmt:
    """Where the sums of the phases would leave their registers for a band's buffers, write them to Y.

    What the loops ``around`` can be tells which group a channel is of.
    """
    local = [(store.buffer, store.value.source) for leaving in leaves for store in every(tirx.BufferStore, leaving)]
    loops, leave = nest(leaves[0])
    *loops, lane = loops
    places: list[list[Any]]
    phase = [int(f) for f in OF_PHASE.match(leave.block.name_hint).groups()]  # type: ignore[union-attr]
    n, g, m, *q = leave.iter_values[:6]
    kind, analyzer = lane.loop_var.ty.dtype, Analyzer()
    analyzer.bind(lane.loop_var, Range(0, t.lanes))
    for loop in [*around, *loops]:
        analyzer.bind(loop.loop_var, Range.from_min_extent(loop.min, loop.extent))
    _, m_out, _ = divided(spec, t)
    first_of_row = [i * axis.stride + f for i, axis, f in zip(q, spec.axes, phase, strict=True)]
    if t.of_channels:
        # the channel's block, and its place there
        places = [[n, *first_of_row, g * m_out + m * t.lanes + leave.iter_values[6]]]
    else:
        *of_row, column = first_of_row
        places = [[n, g * m_out + m, *of_row, column + f] for f in range(t.phases_at_once)]
    variables = [v.var for v in writing.iter_vars]

    def of_registers(load: Any) -> Any:
        buffer = next((to for of, to in local if of.same_as(load.source)), None)
        return load if buffer is None else tirx.BufferLoad(buffer, load.indices)

    values = [
        analyzer.simplify(replaced(writing.body.value, dict(zip(variables, place, strict=True)))) for place in places
    ]
    vectors = [vector_of(structural_map(value, (TensorLoad, of_registers)), lane.loop_var, t.lanes) for value in values]
    lanes = t.lanes * len(places)
    *row, begin = places[0]
    first = analyzer.simplify(replaced(begin, {lane.loop_var: tirx.const(0, kind)}))
    at = tirx.Ramp(first, tirx.const(1, kind), lanes)
    write = in_turn([*later(y, [*row, first], lanes), tirx.BufferStore(y, interlaced(vectors, t.lanes), [*row, at])])
    written = [*(Range.from_min_extent(i, 1) for i in row), Range.from_min_extent(first, lanes)]
    *reads, last = [replaced(i, {lane.loop_var: tirx.const(0, kind)}) for i in leave.iter_values]
    of_tile = [*(Range.from_min_extent(i, 1) for i in reads), Range.from_min_extent(last, t.lanes)]
    block = s_tir.SBlock(
        [],
        [tirx.BufferRegion(b, of_tile) for _, b in local],
        [tirx.BufferRegion(y, written)],
        ROW,
        write,
    )
    return within(loops, s_tir.SBlockRealize([], tirx.const(1, "bool"), block))
