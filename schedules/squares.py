"""X with channels last, copied row by row of each channel: squares of channels and columns, transposed in registers.

Element by element such a copy took more than half the time of layers with few output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import Range
from tvm.ir.expr import TensorLoad
from tvm.sym import Analyzer

from schedules.fetches import BYTES_AHEAD, fetch
from schedules.statements import (
    bound,
    every,
    in_turn,
    loop_over,
    replaced,
    side_by_side,
    vector_of,
    with_turns,
    within,
)
from schedules.tiles import CACHE_LINE

# Marks a loop over columns, around two over channels: columns from the first number to the second may be copied with as
# many channels at a time as the third says.
SQUARES = "opcompile.squares"


def in_squares(loop: tirx.For) -> tirx.Stmt:
    """A marked loop: single columns, squares, the last of which ends where the row of X does, single columns."""
    if SQUARES not in loop.annotations:
        return loop
    low, high, size = (int(i) for i in loop.annotations[SQUARES])
    whole, extent = (high - low) // size, int(loop.extent)
    parts = [_columns(loop, 0, low)] if low > 0 else []
    parts.append(_squares(loop, low, whole, size))
    if low + whole * size < high:
        parts.append(_squares(loop, high - size, 1, size))
    if high < extent:
        parts.append(_columns(loop, high, extent))
    return in_turn(parts)


def _columns(loop: tirx.For, first: int, end: int) -> tirx.Stmt:
    """The columns from ``first`` to ``end``, row by row of each channel: zeros, side by side."""
    kind, channels = loop.loop_var.ty.dtype, loop.body
    column = tirx.Var(f"{loop.loop_var.name}_column", kind)
    body = replaced(channels.body.body, {loop.loop_var: column + first})
    row = loop_over(column, end - first, body)
    return within([channels, channels.body], row)


def _squares(loop: tirx.For, first: int, count: int, size: int) -> tirx.For:
    """``count`` squares of ``size`` columns, from ``first`` on, of as many channels as there are."""
    channels = loop.body
    of_square, kind = channels.body, loop.loop_var.ty.dtype
    realize = of_square.body
    block = realize.block
    square, lane = (tirx.Var(f"{loop.loop_var.name}_{name}", kind) for name in ("square", "lane"))
    analyzer = Analyzer()
    for var, extent in ((square, count), (lane, size), (channels.loop_var, int(channels.extent))):
        analyzer.bind(var, Range(0, extent))

    def at(expression: Any, column: int, channel: Any) -> Any:
        here = {loop.loop_var: square * size + (first + column), of_square.loop_var: channel}
        return analyzer.simplify(replaced(replaced(expression, bound(realize)), here))

    store = block.body
    (x,) = every(TensorLoad, store.value)
    statements: list[tirx.Stmt] = []
    if int(x.source.shape[-1]) == int(channels.extent) * size:  # of a group, they are not all that X has of a column
        statements += _further(x, [at(index, 0, tirx.const(0, kind)) for index in x.indices], channels.loop_var, size)
    columns = [_named(statements, vector_of(at(store.value, i, lane), lane, size)) for i in range(size)]
    for channel, row in enumerate(_transposed(statements, columns)):
        *others, last = [at(index, 0, tirx.const(channel, kind)) for index in store.indices]
        statements.append(tirx.BufferStore(store.buffer, row, [*others, side_by_side(last, size)]))
    written = [Range.from_min_extent(index, size) for index in store.indices[-2:]]
    write = tirx.BufferRegion(store.buffer, [*block.writes[0].region[:-2], *written])
    copy = s_tir.SBlock(block.iter_vars, block.reads, [write], block.name_hint, in_turn(statements))
    at_first = {loop.loop_var: square * size + first, of_square.loop_var: tirx.const(0, kind)}
    iter_values = [replaced(value, at_first) for value in realize.iter_values]
    body = with_turns(channels, s_tir.SBlockRealize(iter_values, replaced(realize.predicate, at_first), copy))
    return loop_over(square, count, body)


def _further(x: Any, first: Sequence[Any], turn: Any, size: int) -> list[tirx.Stmt]:
    """Ask, in each turn of its loop over channels, for as many lines of X as a square has, a page further on.

    Rows of X lie side by side: so each line is asked for once. ``first`` is where the square of the turn begins.
    """
    *column, channel = first
    of_line, ahead = (count * 8 // tvm.DataType(x.source.dtype).bits for count in (CACHE_LINE, BYTES_AHEAD))
    begins = channel + turn * (size * size - size) + ahead  # the channel is `size` times the turn
    return [fetch(x.source, [*column, begins + i]) for i in range(0, size * size, of_line)]


def _named(statements: list[tirx.Stmt], value: Any) -> tirx.Var:
    """A variable for a value, which is computed once."""
    name = tirx.Var("square", value.ty.dtype)
    statements.append(tirx.Bind(name, value))
    return name


def _transposed(statements: list[tirx.Stmt], rows: Sequence[tirx.Var]) -> Sequence[tirx.Var]:
    """The columns of a square of ``rows``: each step exchanges one bit of the numbers of rows and of their elements."""
    size = len(rows)
    rows, distance = list(rows), size // 2
    while distance:
        for i in (i for i in range(size) if not i & distance):
            pair = rows[i], rows[i + distance]
            for j, moved in ((i, 0), (i + distance, distance)):
                order = [e + moved + (size - distance if e & distance else 0) for e in range(size)]
                rows[j] = _named(statements, tirx.Shuffle(list(pair), [tirx.const(e, "int32") for e in order]))
        distance //= 2
    return rows
