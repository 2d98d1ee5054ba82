"""What of Y register tiles write themselves, with no buffer of a band in between.

Vectors of channels that come last are written as they lie in Y, by the tiles of each phase.

Vectors of positions are woven. The phases of a row are summed in one loop, so that a vector of X that several multiply
is loaded once, and their sums are woven into a row of Y while they are still in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm import s_tir, tirx
from tvm.ir import Range
from tvm.ir.expr import TensorLoad
from tvm.sym import Analyzer
from tvm_ffi import structural_map

from schedules.fetches import later
from schedules.layer import phases_at_once
from schedules.rules import puts_together
from schedules.statements import (
    OF_PHASE,
    ROW,
    WRITING,
    allocating,
    every,
    in_turn,
    interlaced,
    nest,
    phase_of,
    replaced,
    side_by_side,
    vector_of,
    with_turns,
    within,
)
from schedules.stretches import in_stretches, stretches
from schedules.tiles import divided, left_over

if TYPE_CHECKING:
    from opcompile.spec import ConvTranspose3d
    from schedules.tiles import Tiles


def written_by_tiles(function: tirx.PrimFunc, spec: ConvTranspose3d, t: Tiles) -> tirx.PrimFunc:
    """Let the tiles write what they have summed; nothing is left that a band's buffers are for."""
    y = function.params[-1]
    buffer = stretches(spec, t) if puts_together(spec, t) else None

    def band(statements: tirx.SeqStmt) -> tirx.Stmt:
        *phases, writing = statements.seq
        names = [_first_block(each) for each in statements.seq]
        if names[-1] != WRITING or not all(OF_PHASE.match(name) for name in names[:-1]):
            return statements
        width = phases_at_once(spec, t)
        rows = [phases[first : first + width] for first in range(0, len(phases), width)]
        _, realize = nest(writing)
        written = [_row(row, realize.block, spec, t, y) for row in rows]
        return in_turn(written) if buffer is None else in_stretches(written, writing, spec, t, y, buffer)

    function = structural_map(function, (tirx.SeqStmt, band))
    return function if buffer is None else allocating(function, buffer)


def _first_block(statement: tirx.Stmt) -> str:
    blocks = every(s_tir.SBlock, statement)
    return str(blocks[0].name_hint) if blocks else ""


def _row(
    phases: Sequence[tirx.Stmt], writing: s_tir.SBlock, spec: ConvTranspose3d, t: Tiles, y: tirx.Buffer
) -> tirx.Stmt:
    """The tiles of one phase, or of those of a row, which all have the same loops, and what these write."""
    around, _ = nest(phases[0])
    begins, sums, leaves = [], [], []
    for phase in phases:
        loops, tile = nest(phase)
        same = {own.loop_var: loop.loop_var for own, loop in zip(loops, around, strict=True)}
        *begin, summing, leaving = (replaced(each, same) for each in tile.seq)
        begins += begin
        sums.append(summing)
        leaves.append(leaving)
    return within(around, in_turn([*begins, _together(sums), _writing(leaves, writing, spec, t, y, around)]))


def _together(phases: Sequence[tirx.Stmt]) -> tirx.Stmt:
    """One nest of all, as far as their loops are the same: down to the lanes of a vector, or to the taps of a row."""
    first = phases[0]
    if len(phases) == 1:
        return first
    if isinstance(first, tirx.IfThenElse):  # what lies beside X for one phase of a row does for all
        return tirx.IfThenElse(first.condition, _together([each.then_case for each in phases]), None)
    if isinstance(first, tirx.SeqStmt):  # what a turn asks for, and what it adds, row by row of X
        return in_turn([_together(parts) for parts in zip(*(each.seq for each in phases), strict=True)])
    if not isinstance(first, tirx.For) or first.kind == tirx.ForKind.VECTORIZED:
        return in_turn(list(phases))
    if len({int(each.extent) for each in phases}) == 1:
        bodies = [replaced(each.body, {each.loop_var: first.loop_var}) for each in phases]
        return with_turns(first, _together(bodies))
    if isinstance(first.body, tirx.SeqStmt):
        of_rows = zip(*([with_turns(each, row) for row in each.body.seq] for each in phases), strict=True)
        return in_turn([_together(rows) for rows in of_rows])
    return in_turn(list(phases))


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
    n, g, m, *q = leave.iter_values[:6]
    kind, analyzer = lane.loop_var.ty.dtype, Analyzer()
    analyzer.bind(lane.loop_var, Range(0, t.lanes))
    for loop in [*around, *loops]:
        analyzer.bind(loop.loop_var, Range.from_min_extent(loop.min, loop.extent))
    _, m_out = divided(spec, t)
    first_of_row = [i * axis.stride + f for i, axis, f in zip(q, spec.axes, phase_of(leave.block), strict=True)]
    if t.of_channels:
        # the channel's block, and its place there
        places = [[n, *first_of_row, g * m_out + m * t.lanes + leave.iter_values[6]]]
    else:
        *of_row, column = first_of_row
        places = [[n, g * m_out + m, *of_row, column + f] for f in range(phases_at_once(spec, t))]
    variables = [v.var for v in writing.iter_vars]

    def of_registers(load: Any) -> Any:
        buffer = next((to for of, to in local if of.same_as(load.source)), None)
        return load if buffer is None else tirx.BufferLoad(buffer, load.indices)

    values = [
        analyzer.simplify(replaced(writing.body.value, dict(zip(variables, place, strict=True)))) for place in places
    ]
    vectors = [vector_of(structural_map(value, (TensorLoad, of_registers)), lane.loop_var, t.lanes) for value in values]
    first_lane = {lane.loop_var: tirx.const(0, kind)}
    *row, first = [analyzer.simplify(replaced(i, first_lane)) for i in places[0]]
    *reads, last = [replaced(i, first_lane) for i in leave.iter_values]
    of_tile = [*(Range.from_min_extent(i, 1) for i in reads), Range.from_min_extent(last, t.lanes)]

    def written(offset: int, size: int) -> s_tir.SBlockRealize:
        """So many elements of the woven vector, from the one at ``offset`` on."""
        begin = first + offset
        at = side_by_side(begin, size) if size > 1 else begin
        write = tirx.BufferStore(y, interlaced(vectors, t.lanes, offset, size), [*row, at])
        of_y = [*(Range.from_min_extent(i, 1) for i in row), Range.from_min_extent(begin, size)]
        block = s_tir.SBlock(
            [],
            [tirx.BufferRegion(b, of_tile) for _, b in local],
            [tirx.BufferRegion(y, of_y)],
            ROW,
            in_turn([*later(y, [*row, begin], size), write]),
        )
        return s_tir.SBlockRealize([], tirx.const(1, "bool"), block)

    *loops, of_row = loops
    if t.of_channels:  # position by position: a channel's are so far apart that they compete for places in a cache
        *loops, of_channels, of_planes, of_rows = loops
        loops, (_, *at, column) = [*loops, of_planes, of_rows], row
        of_position = within([of_channels], written(0, t.lanes))
        part = _columns_to_the_end(of_row, of_position, column, phase_of(leave.block)[2], spec, t)
    else:
        _, _, *at = row
        part = _to_the_end(of_row, written, first, spec, t)
    ends = zip((m, *at), (m_out, spec.axes[0].out, spec.axes[1].out), left_over(spec, t), strict=True)
    tests = [place < end for place, end, over in ends if over]
    return within(loops, tirx.IfThenElse(tirx.all(*tests), part, None) if tests else part)


def _columns_to_the_end(
    of_row: tirx.For, write: tirx.Stmt, column: Any, phase: int, spec: ConvTranspose3d, t: Tiles
) -> tirx.Stmt:
    """The columns of ``phase`` that a tile writes, as far as the row goes: the last tile may have fewer, or none."""
    axis, start = spec.axes[2], of_row.min
    before = t.columns * ((axis.positions - 1) // t.columns)
    left = len(range(phase, axis.out, axis.stride)) - before

    def columns(count: int) -> tirx.Stmt:
        turns = tirx.For(of_row.loop_var, start, tirx.const(count, start.ty.dtype), of_row.kind, of_row.body)
        return within([turns], write)

    if left == t.columns or before == 0:
        return columns(left)
    whole = replaced(column, {of_row.loop_var: start}) < before * axis.stride
    return tirx.IfThenElse(whole, columns(t.columns), columns(left) if left else None)


def _to_the_end(
    of_row: tirx.For, written: Callable[[int, int], tirx.Stmt], first: Any, spec: ConvTranspose3d, t: Tiles
) -> tirx.Stmt:
    """The vectors that a tile writes, the first of them at ``first``, as far as the row goes."""
    start, out, lanes = of_row.min, spec.axes[2].out, t.lanes * phases_at_once(spec, t)

    def vectors(elements: int) -> tirx.Stmt:
        whole, left = divmod(elements, lanes)
        parts: list[tirx.Stmt] = []
        if whole:
            count = tirx.const(whole, start.ty.dtype)
            turns = tirx.For(of_row.loop_var, start, count, of_row.kind, of_row.body)
            parts.append(within([turns], written(0, lanes)))
        if left:  # two that may overlap: the second ends where the row does
            size = 1 << (left.bit_length() - 1)
            ends = in_turn([written(offset, size) for offset in sorted({0, left - size})])
            parts.append(replaced(ends, {of_row.loop_var: start + whole}))
        return in_turn(parts)

    of_tile = lanes * t.vectors
    left = out % of_tile
    if left in (0, out):
        return vectors(left or of_tile)
    last = replaced(first, {of_row.loop_var: start}) + of_tile > out
    return tirx.IfThenElse(last, vectors(left), vectors(of_tile))
