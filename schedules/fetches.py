"""What is asked for before it is needed: X, weights and Y, into the second cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import tvm
from tvm import s_tir, tirx
from tvm.ir.expr import TensorLoad
from tvm.sym import Analyzer
from tvm_ffi import structural_map

from schedules.division import over
from schedules.layer import joined, length_of_row, reach, tiles_of_band
from schedules.statements import (
    ADDING_ANY,
    LEAVING,
    begin,
    bound,
    channel_of,
    every,
    in_turn,
    over_channels,
    phase_of,
    replaced,
    with_turns,
)
from schedules.tiles import CACHE_LINE, by_rows, divided

if TYPE_CHECKING:
    from opcompile.spec import ConvTranspose3d
    from schedules.tiles import Tiles

# So many bytes ahead are X and Y asked for, and X some channels at least: what memory needs to answer.
BYTES_AHEAD = 4096
_CHANNELS_AHEAD = 4
# Weights of no more bytes stay in the second cache; for no more elements of X, memory sends them as fast as it can.
_NEAR = 512 << 10
_FEW = 16
# Each register tile of a band asks for the same weights: for more of them the asking costs more than the waiting.
_MOST_TILES = 8
# A loop of so many channels asks for X of its own: less for each would cost more than the products beside it.
_SEVERAL = 8
# So many lines may be asked for at a time; a core cannot wait for many more.
_AT_ONCE = 8

Ahead = Callable[[tirx.For, "Tiles"], list[tirx.Stmt]]
Loops = tuple[tirx.For, ...]


def asking(function: tirx.PrimFunc, spec: ConvTranspose3d, t: Tiles) -> tirx.PrimFunc:
    """Let the loops over channels, and the sums that leave their registers, ask for what comes later."""
    x, *_, y = function.params
    if t.copy != "whole" and spec.layout == "NCDHW":  # where channels come last, all rows of a plane are side by side
        function = structural_map(function, (tirx.For, lambda loop: _of_next_task(loop, spec, t, x)))
    if ahead := _ahead(spec, t):
        function = structural_map(function, (tirx.For, lambda loop: _asking(loop, t, ahead)))
    # else the elements of a vector lie apart in Y, or its row or its tile asks as it is written
    if (t.of_channels or spec.layout == "NCDHW") and t.woven == "band":
        function = structural_map(function, (tirx.For, lambda loop: _of_y(loop, spec, t, y)))
    return function


def channels_ahead(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many channels ahead the copy of X asks for it; 0 where it reads them in their order, or has too few."""
    axis = spec.axes[1]
    rows = joined(spec, t) * (t.height + reach(axis) - axis.positions) if t.vector in ("line", "taps") else 1
    ahead = max(_CHANNELS_AHEAD, BYTES_AHEAD // (rows * length_of_row(spec, t) * spec.itemsize))
    return min(ahead, spec.c_in // 2) if spec.layout == "NCDHW" else 0


def of_later_channel(copy: s_tir.SBlockRealize, lane: tirx.Var, channels: int, ahead: int) -> tirx.Stmt:
    """Ask for what the block copies, some channels further on."""
    (load,) = every(TensorLoad, copy.block.body.value)
    values, channel = bound(copy), channel_of(copy)
    values[channel] = tirx.min(values[channel] + ahead, tirx.const(channels - 1, channel.ty.dtype))
    first_lane = {lane: tirx.const(0, lane.ty.dtype)}
    return fetch(load.source, [replaced(replaced(i, values), first_lane) for i in load.indices])


def _of_next_task(task: tirx.For, spec: ConvTranspose3d, t: Tiles, x: Any) -> tirx.Stmt:
    """Let the sums of a task ask for what of X will be copied after them, spread evenly over them.

    A task copies its part of X, or of a chunk of it, before it multiplies, and would wait for memory meanwhile.
    """
    alone = isinstance(task.extent, tirx.IntImm) and int(task.extent) == 1
    several = t.chunk // t.products >= _SEVERAL
    small_chunks = t.copy == "chunk" and not several
    if task.kind != tirx.ForKind.PARALLEL or alone or small_chunks:
        return task
    sums = list(_sums(task.body, several, ()))
    loops = [_told_apart(loop, around, several, t) for loop, around in sums]
    if not loops:  # no tap meets Y
        return task
    next_task, next_channel = _next(task, sums[0][1], spec, t)
    n, of_group, d, h = _begins(spec, t, next_task)
    first_channel = of_group + next_channel
    stretch, planes = _lines(spec, t)
    channels = 1 if several else spec.c_in
    lines = stretch * planes * channels

    def line(channel: Any, number: Any) -> tirx.Stmt:
        rest, at = _parted(number, stretch, planes * channels)
        more, plane = _parted(rest, planes, channels)
        return fetch(x, (n, first_channel + channel + more, d + plane, h, at * (CACHE_LINE // spec.itemsize)))

    turns = [math.prod(int(loop.extent) for loop in around) for *_, around in loops]
    at_once = over(lines, sum(turns))
    if at_once > _AT_ONCE:
        return task
    fetches, before = [], 0
    for (channel, of_turn, around), own in zip(loops, turns, strict=True):
        turn: Any = tirx.const(0, task.loop_var.ty.dtype)
        for loop in around:
            turn = turn * loop.extent + loop.loop_var
        share = (turn + before) * lines
        first = tirx.floordiv(share, sum(turns))
        asked = [line(channel + j, first + i) for i in range(at_once) for j in range(of_turn)]
        if sum(turns) > lines:  # once for each: where channels lie a power of two apart, asking again evicts others
            asked = [tirx.IfThenElse(tirx.floormod(share, sum(turns)) < lines, in_turn(asked), None)]
        fetches.append(asked)
        before += own
    return with_turns(task, _with_fetches(task.body, several, iter(fetches)))


def _next(task: tirx.For, around: Loops, spec: ConvTranspose3d, t: Tiles) -> tuple[Any, Any]:
    """Which task copies X next, and how many channels further on than the sums are: the last chunk is before a task."""
    if t.copy != "chunk":
        return task.loop_var + 1, 0
    chunk = around[0].loop_var
    last = tirx.floordiv(chunk + 1, around[0].extent)
    return task.loop_var + last, t.chunk // t.products - last * (spec.c_in // t.products)


def _begins(spec: ConvTranspose3d, t: Tiles, task: Any) -> tuple[Any, Any, Any, Any]:
    """Where of X a task begins: image, channel, plane and row."""
    axis_d, axis_h, _ = spec.axes
    channels, planes, rows = t.of_task
    digits = []
    for count in (
        over(axis_h.positions, rows),
        over(axis_d.positions, planes),
        over(spec.m_out, channels),
        spec.groups,
    ):
        digits.append(tirx.floormod(task, count))
        task = tirx.floordiv(task, count)
    h, d, _, g = digits
    d, h = (
        tirx.max(q * several + axis.reads[0], tirx.const(0, q.ty.dtype))
        for q, several, axis in ((d, planes, axis_d), (h, rows, axis_h))
    )
    if t.vector == "plane":
        h = tirx.const(0, h.ty.dtype)
        d = h if joined(spec, t) > 1 else d
    return task, g * spec.c_in, d, h


def _lines(spec: ConvTranspose3d, t: Tiles) -> tuple[int, int]:
    """What a task reads of a channel of X: cache lines side by side, and how many such planes.

    Where a task reads all rows, its planes are side by side, and count as one.
    """
    axis_d, axis_h, axis_w = spec.axes
    _, *covered = t.of_task
    planes, rows = (
        min(several + reach(axis) - axis.positions, axis.size)
        for several, axis in zip(covered, (axis_d, axis_h), strict=True)
    )
    if t.vector == "plane":
        planes, rows = axis_d.size if joined(spec, t) > 1 else planes, axis_h.size
    stretch, apart = (planes * rows, 1) if rows == axis_h.size else (rows, planes)
    return over(stretch * axis_w.size * spec.itemsize, CACHE_LINE), apart


def _parted(number: Any, low: int, high: int) -> tuple[Any, Any]:
    """Quotient and rest by ``low`` of a number below ``low`` times ``high``; no division where one of them is 1."""
    if 1 in (low, high):
        return (number, 0) if low == 1 else (0, number)
    return tirx.floordiv(number, low), tirx.floormod(number, low)


def _asks(loop: tirx.For, several: bool) -> bool:
    """Whether the loop asks for X: one over several channels, else the outermost of those that only add."""
    if several:
        return over_channels(loop, ADDING_ANY) is not None
    return all(ADDING_ANY.fullmatch(block.name_hint) for block in every(s_tir.SBlock, loop))


def _sums(statement: tirx.Stmt, several: bool, around: Loops) -> Iterator[tuple[tirx.For, Loops]]:
    """The loops of a statement that ask for X, in their order, each with those around it."""
    if isinstance(statement, tirx.SeqStmt):
        for each in statement.seq:
            yield from _sums(each, several, around)
    elif isinstance(statement, tirx.IfThenElse):
        yield from _sums(statement.then_case, several, around)
    elif isinstance(statement, tirx.For):
        if _asks(statement, several):
            yield statement, around
        else:
            yield from _sums(statement.body, several, (*around, statement))


def _told_apart(loop: tirx.For, around: Loops, several: bool, t: Tiles) -> tuple[Any, int, Loops]:
    """The first channel of a turn of the loop, how many it takes, and the loops that tell apart turns of the same ones.

    Channel 0, one and all loops where the loop is not over several channels.
    """
    if not several:
        return tirx.const(0, loop.loop_var.ty.dtype), 1, around
    adding, tile = over_channels(loop, ADDING_ANY)  # type: ignore[misc]
    channel = replaced(adding.iter_values[-1], begin(tile))
    of_channel = every(tirx.Var, channel)
    apart = tuple(each for each in around if not any(each.loop_var.same_as(var) for var in of_channel))
    return channel, _of_turn(loop, t), apart


def _of_turn(loop: tirx.For, t: Tiles) -> int:
    """How many channels a turn of a loop over a chunk of them takes."""
    return t.chunk // int(loop.extent)


def _with_fetches(statement: tirx.Stmt, several: bool, fetches: Iterator[list[tirx.Stmt]]) -> tirx.Stmt:
    """The statement, with ``fetches`` in turn: in each turn of a loop over several channels, else before a loop."""
    if isinstance(statement, tirx.SeqStmt):
        return in_turn([_with_fetches(each, several, fetches) for each in statement.seq])
    if isinstance(statement, tirx.IfThenElse):
        then = _with_fetches(statement.then_case, several, fetches)
        return tirx.IfThenElse(statement.condition, then, statement.else_case)
    if not isinstance(statement, tirx.For):
        return statement
    if _asks(statement, several):
        return _beginning(statement, next(fetches)) if several else in_turn([*next(fetches), statement])
    return with_turns(statement, _with_fetches(statement.body, several, fetches))


def _beginning(loop: tirx.For, fetches: list[tirx.Stmt]) -> tirx.For:
    """The loop, whose turns begin with ``fetches``."""
    return with_turns(loop, in_turn([*fetches, loop.body]))


def _ahead(spec: ConvTranspose3d, t: Tiles) -> list[Ahead]:
    """What to ask for as channels are multiplied."""
    ahead: list[Ahead] = []
    channels = spec.c_in
    if t.copy == "whole" and not t.of_channels and 1 < t.chunk < channels:
        ahead.append(_of_next_chunk)
    if _asks_for_weights(spec, t):
        ahead.append(partial(_of_next_tap, spec))
    return ahead


def _asks_for_weights(spec: ConvTranspose3d, t: Tiles) -> bool:
    """Whether loops over channels ask for weights: where they are far, and shared by some positions, but few tiles."""
    near = spec.bytes_of(spec.w_shape) <= _NEAR
    few = math.prod(axis.size for axis in spec.axes) <= _FEW
    # a task has widened them, and has them near
    widened = spec.dtype != spec.sum_dtype and not t.of_channels and t.products == 1
    many = tiles_of_band(spec, t) > _MOST_TILES
    return not (near or few or widened or many) and spec.channels_in > spec.groups


def _asking(loop: tirx.For, t: Tiles, ahead: Sequence[Ahead]) -> tirx.Stmt:
    """Where a loop goes through channels, ask for what comes later."""
    fetches = [fetch for ask in ahead for fetch in ask(loop, t)] if over_channels(loop) else []
    return _beginning(loop, fetches) if fetches else loop


def _of_next_chunk(loop: tirx.For, t: Tiles) -> list[tirx.Stmt]:
    """What the taps of a row will read of the next chunk of channels.

    The lines of neighbouring channels lie too far apart for the prefetcher, and a copy of all X in the third cache.
    """
    x, values = _first(loop, "pad")
    *_, channel = values
    a_line = CACHE_LINE * 8 // tvm.DataType(x.source.dtype).bits
    asked = []
    for next_chunk in range(t.chunk, t.chunk + _of_turn(loop, t), t.products):
        *line, first = _at(x, {**values, channel: values[channel] + next_chunk})
        asked += [fetch(x.source, [*line, first + i]) for i in range(0, t.columns * t.products + a_line, a_line)]
    return asked


def _of_next_tap(spec: ConvTranspose3d, loop: tirx.For, t: Tiles) -> list[tirx.Stmt]:
    """The weights of these channels for the next tap, or row of taps, which follow in memory.

    The prefetcher begins anew with each, and only the first of the tiles that read a weight waits for it. Behind the
    last tap of a block of them follows the next block. Where a band has all positions, and takes taps as they lie,
    that is one of its own: so there the block is asked for that the next band begins with.
    """
    w, values = _first(loop, "W")
    channels = 7 if by_rows(spec, t) else 8
    at = _at(w, values)
    axis_d, axis_h, _ = spec.axes
    firsts = [[phase.first_tap % axis.tap_step for phase in axis.phases] for axis in spec.axes]
    as_they_lie = all(taps == sorted(taps) for taps in firsts)
    if as_they_lie and t.depth >= axis_d.positions and t.height >= axis_h.positions:
        is_last = tirx.all(*(at[i] == w.source.shape[i] - 1 for i in range(2, channels)))
        at[1] = Analyzer().simplify(at[1] + tirx.Select(is_last, t.task // t.block - 1, 0))
    at[channels] = at[channels] + int(w.source.shape[channels])
    elements = _of_turn(loop, t) // t.products * math.prod(int(n) for n in w.source.shape[channels + 1 :])
    a_line = CACHE_LINE * 8 // tvm.DataType(w.source.dtype).bits
    (g, of_weights, *taps, first), rest = at[:10], at[10:]
    asked = product(range(t.vectors if t.vector == "channels" else 1), range(0, elements, a_line))
    return [fetch(w.source, [g, of_weights + block, *taps, first + i, *rest]) for block, i in asked]


def _first(loop: tirx.For, name: str) -> tuple[Any, dict[tirx.Var, Any]]:
    """What the block in a loop over channels reads of a buffer, and its variables where its register tile begins."""
    adding, tile = over_channels(loop)  # type: ignore[misc]
    values = {var: replaced(i, begin(tile)) for var, i in bound(adding).items()}
    (load,) = (load for load in every(TensorLoad, adding.block.body.value) if load.source.name == name)
    return load, values


def _at(load: Any, values: Mapping[tirx.Var, Any]) -> list[Any]:
    """The indices of an element, or of the first of a vector."""
    return [i.base if isinstance(i, tirx.Ramp) else i for i in (replaced(each, values) for each in load.indices)]


def _of_y(loop: tirx.For, spec: ConvTranspose3d, t: Tiles, y: Any) -> tirx.Stmt:
    """Where a vector of sums leaves its registers, ask for one line of Y into the second cache.

    The vectors of all phases of a row fill the row: where each is a line, each asks for another one.
    """
    block = loop.body.block if isinstance(loop.body, s_tir.SBlockRealize) else None
    if loop.kind != tirx.ForKind.VECTORIZED or block is None or not LEAVING.fullmatch(block.name_hint):
        return loop
    n, g, m, d, h, w, *_ = [replaced(value, begin([loop])) for value in loop.body.iter_values]
    phase = phase_of(block)
    if t.of_channels:
        m = m * t.lanes
    else:
        if phase[2] * t.lanes * spec.itemsize % CACHE_LINE:  # in the line that the vector of an earlier phase asks for
            return loop
        w = w + phase[2] * t.lanes // spec.axes[2].stride
    if t.line:
        of_row = reach(spec.axes[2])
        h, w = h * t.height + tirx.floordiv(w, of_row), tirx.floormod(w, of_row)
        if (planes := joined(spec, t)) > 1:
            d, h = d * planes + tirx.floordiv(h, t.height), tirx.floormod(h, t.height)
    o = [q * axis.stride + f for q, axis, f in zip((d, h, w), spec.axes, phase, strict=True)]
    if t.vector == "channels" and spec.layout == "NCDHW":  # the channels of a vector are a line each
        m = m + tirx.floormod(o[2], t.lanes)
    _, m_out = divided(spec, t)
    m = g * m_out + m
    return tirx.SeqStmt([loop, fetch(y, spec.in_layout(n, m, *o))])


def fetch(buffer: Any, at: Sequence[Any]) -> tirx.Stmt:
    """Ask for the line of an element into the second cache; one beyond the buffer is not fetched, and does no harm."""
    to_read, into_second_cache, data = (tirx.const(i, "int32") for i in (0, 2, 1))
    address = tirx.address_of(tirx.BufferLoad(buffer, list(at)))
    return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, to_read, into_second_cache, data))


def later(y: Any, at: Sequence[Any], elements: int) -> list[tirx.Stmt]:
    """Ask for the lines that lie a page behind so many ``elements`` of a row of Y, from ``at`` on."""
    *row, column = at
    itemsize = tvm.DataType(y.dtype).bits // 8
    first = BYTES_AHEAD // itemsize
    return [fetch(y, [*row, column + i]) for i in range(first, first + elements, CACHE_LINE // itemsize)]
