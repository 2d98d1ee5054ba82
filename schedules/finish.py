"""What no move of a schedule can say: vectors of some columns of a loop, rows woven, pairs, taps left out, fetches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import Range
from tvm.ir.expr import Call, TensorLoad
from tvm.sym import Analyzer
from tvm_ffi import structural_map

from schedules import halves, pairs, streams, stretches
from schedules.chunks import by_chunks
from schedules.division import over
from schedules.fetches import asking, channels_ahead, later, of_later_channel
from schedules.imported import importing
from schedules.layer import joined, length_of_row, reach
from schedules.pairs import added, narrowed
from schedules.rules import LEAST_WOVEN_LAST, puts_together, weaves
from schedules.squares import in_squares
from schedules.statements import (
    ADDING,
    ADDING_ANY,
    ROW,
    WRITING,
    begin,
    bound,
    channel_of,
    every,
    in_turn,
    interlaced,
    nest,
    over_channels,
    phase_of,
    replaced,
    vector_of,
    with_body,
    with_turns,
    within,
)
from schedules.woven import written_by_tiles

if TYPE_CHECKING:
    from opcompile.spec import ConvTranspose3d
    from schedules.tiles import Tiles

# Marks a loop: what it takes from the first number to the second may be vectors, of as many lanes as the third.
VECTORS = "opcompile.vectors"


def finish(module: tvm.IRModule, spec: ConvTranspose3d, tiles: Tiles) -> tvm.IRModule:
    """Rewrite a scheduled module: vectors copy X and write Y, zeros are not multiplied, memory is asked for early.

    TVM splits no loop that begins elsewhere than at 0, and the columns of X between two pads are such; LLVM unrolls
    short rows into scalars, and writes what is left of long ones element by element. And between its last sum and its
    first store a task would wait for memory, line by line: by then the second cache has the lines.
    """
    ((name, function),) = module.functions.items()
    y, in_llvm = function.params[-1], ""
    channels = spec.c_in
    if tiles.copy == "chunk":
        function = structural_map(function, (tirx.For, lambda loop: by_chunks(loop, tiles)))
    if tiles.products > 1:
        function = structural_map(function, (tirx.For, lambda loop: _paired(loop, tiles)))
    if tiles.vector == "plane":
        through = joined(spec, tiles) > 1
        function = structural_map(function, (s_tir.SBlockRealize, lambda copy: _as_it_lies(copy, spec, through)))
    ahead = channels_ahead(spec, tiles)
    function = structural_map(function, (tirx.For, lambda loop: _in_vectors(loop, channels, ahead)))
    function = structural_map(function, (tirx.For, in_squares))
    _, height, width = (axis.positions for axis in spec.axes)
    _, taps_h, taps_w = (axis.most_taps for axis in spec.axes)
    if tiles.trims_rows(height, taps_h * taps_w):
        function = structural_map(function, (tirx.For, lambda loop: _trimmed(loop, spec, 1)))
    if tiles.trims(width, taps_w):
        function = structural_map(function, (tirx.For, lambda loop: _trimmed(loop, spec, 2)))
    if joined(spec, tiles) == 1:  # a line through several planes has all that they have
        skipping = _skipping_planes if tiles.vector == "plane" else _skipping
        function = structural_map(function, (tirx.For, lambda loop: skipping(loop, spec, tiles)))
    function = asking(function, spec, tiles)
    if tiles.shares_rows:
        function = structural_map(function, (tirx.For, lambda loop: _sharing_rows(loop, spec)))
    if tiles.woven == "tile":
        function = written_by_tiles(function, spec, tiles)
    elif not tiles.of_channels:
        function = structural_map(function, (tirx.For, lambda loop: _woven(loop, spec, tiles)))
    if spec.dtype == "bfloat16" and tiles.products == 1:
        function = structural_map(function, (tirx.Shuffle, halves.halves))
        in_llvm += halves.FUNCTIONS
    if tiles.products > 1 or tiles.store == "streamed":
        function = structural_map(function, (tirx.For, _as_vectors))
    if tiles.products > 1:
        function = structural_map(function, (s_tir.SBlock, _narrowing))
        in_llvm += pairs.FUNCTIONS
    if tiles.store == "streamed":
        if puts_together(spec, tiles):
            in_llvm += stretches.FUNCTIONS
        else:
            function = _past_caches(function, y)
        function = structural_map(function, (tirx.For, _arriving))
        in_llvm += streams.FUNCTIONS
    if in_llvm:
        root = function.body
        body = with_body(root.block, importing(root.block.body, in_llvm))
        function = function.with_body(s_tir.SBlockRealize(root.iter_values, root.predicate, body))
    return tvm.IRModule({name.name_hint: function})


def _as_it_lies(copy: s_tir.SBlockRealize, spec: ConvTranspose3d, end_to_end: bool) -> s_tir.SBlockRealize:
    """Copy no planes beside X, and say how far what is copied lies behind the first element of a plane, or of all.

    LLVM cannot always tell from quotients and rests that rows follow each other, and would copy element by element.
    """
    block = copy.block
    if block.name_hint != "pad":
        return copy
    i = block.iter_vars[-1].var
    (load,), zero = every(TensorLoad, block.body.value), tirx.const(0, i.ty.dtype)
    n, c, d, *_ = spec.from_layout(load.indices)
    element = tirx.BufferLoad(load.source, spec.in_layout(n, c, zero if end_to_end else d, zero, i))
    body = with_body(block, structural_map(block.body, (TensorLoad, lambda _: element)))
    if end_to_end:
        return s_tir.SBlockRealize(copy.iter_values, copy.predicate, body)
    plane = replaced(d, bound(copy))
    beside = tirx.all(copy.predicate, plane >= 0, plane < spec.axes[0].size)
    return s_tir.SBlockRealize(copy.iter_values, beside, body)


def _paired(loop: tirx.For, t: Tiles) -> tirx.Stmt:
    """Where a vector of sums takes the products of two channels, let one instruction do both."""
    pair = loop.body
    realize = pair.body if isinstance(pair, tirx.For) else None
    if loop.kind != tirx.ForKind.VECTORIZED or not isinstance(realize, s_tir.SBlockRealize):
        return loop
    block = realize.block
    if not ADDING_ANY.fullmatch(block.name_hint):
        return loop
    _, _, m, *_, c = (v.var for v in block.iter_vars)
    # where the vector and the pair begin
    at_first = {c: tirx.floordiv(c, t.products) * t.products}
    if t.vector == "channels":
        at_first[m] = tirx.floordiv(m, t.lanes) * t.lanes
    analyzer = Analyzer()

    def elements(of: Any, count: int) -> Any:
        *others, last = [analyzer.simplify(replaced(i, at_first)) for i in of.indices]
        buffer = of.source if isinstance(of, TensorLoad) else of.buffer
        return tirx.BufferLoad(buffer, [*others, tirx.Ramp(last, tirx.const(1, last.ty.dtype), count)])

    def vector(load: Any) -> Any:
        return tirx.reinterpret(f"int32x{t.lanes}", elements(load, t.lanes * t.products))

    def broadcast(load: Any) -> Any:
        return tirx.Broadcast(tirx.reinterpret("int32", elements(load, t.products)), t.lanes)

    loads = {str(load.source.name): load for load in every(TensorLoad, block.body.value)}
    x, w, sums = loads["pad"], loads["W"], elements(block.body, t.lanes)
    factors = (vector(w), broadcast(x)) if t.vector == "channels" else (vector(x), broadcast(w))
    adding = with_body(block, tirx.BufferStore(sums.source, added(sums, *factors), sums.indices))
    return s_tir.SBlockRealize(
        [replaced(value, begin((loop, pair))) for value in realize.iter_values], realize.predicate, adding
    )


def _as_vectors(loop: tirx.For) -> tirx.Stmt:
    """Where lanes of Y are written at once, write them as a vector; TVM rounds them where they need tests."""
    realize = loop.body
    if loop.kind != tirx.ForKind.VECTORIZED or not isinstance(realize, s_tir.SBlockRealize):
        return loop
    block, lane, lanes = realize.block, loop.loop_var, int(loop.extent)
    if block.name_hint != WRITING:
        return loop
    analyzer, zero = Analyzer(), tirx.const(0, lane.ty.dtype)
    analyzer.bind(lane, Range(0, lanes))
    value = analyzer.simplify(replaced(block.body.value, bound(realize)))
    alike = [realize.predicate, *(i for load in every(TensorLoad, value) for i in load.indices[:-1])]
    tested = any(var.same_as(lane) for each in alike for var in every(tirx.Var, each))
    vector = None if tested else vector_of(value, lane, lanes)
    if vector is None:
        left = s_tir.SBlockRealize(realize.iter_values, realize.predicate, with_body(block, block.body, "lanes"))
        return tirx.For(lane, zero, loop.extent, loop.kind, left)
    *others, last = block.body.indices
    at = [*others, tirx.Ramp(last, tirx.const(1, last.ty.dtype), lanes)]
    written = with_body(block, tirx.BufferStore(block.body.buffer, vector, at))
    return s_tir.SBlockRealize([replaced(i, {lane: zero}) for i in realize.iter_values], realize.predicate, written)


def _narrowing(block: s_tir.SBlock) -> s_tir.SBlock:
    """Round by one instruction what a block writes to Y."""
    if block.name_hint not in (WRITING, ROW):
        return block

    def rounded(cast: tirx.Cast) -> Any:
        return narrowed(cast.value) if str(cast.ty.dtype).startswith("bfloat16") else cast

    return with_body(block, structural_map(block.body, (tirx.Cast, rounded)))


def _past_caches(function: tirx.PrimFunc, y: Any) -> tirx.PrimFunc:
    """Stream what is stored to Y, and ask for its lines only where it is not."""

    def streamed(store: tirx.BufferStore) -> tirx.Stmt:
        return streams.streamed(store) if store.buffer.same_as(y) else store

    def asked(statement: tirx.Evaluate) -> tirx.Stmt:
        of_y = [load for load in every(TensorLoad, statement.value) if load.source.same_as(y)]
        return streams.asked(*of_y) if of_y else statement

    function = structural_map(function, (tirx.Evaluate, asked))  # before there are others that name Y
    return structural_map(function, (tirx.BufferStore, streamed))


def _arriving(loop: tirx.For) -> tirx.Stmt:
    """Let each task wait for what it has streamed."""
    written = any(block.name_hint in (WRITING, ROW) for block in every(s_tir.SBlock, loop.body))
    if loop.kind != tirx.ForKind.PARALLEL or not written:
        return loop
    return with_turns(loop, in_turn([loop.body, streams.arrived()]))


def _in_vectors(loop: tirx.For, channels: int, ahead: int) -> tirx.Stmt:
    """A marked loop: scalars, whole vectors, what is left of them as one, scalars, of X ``ahead`` of ``channels``."""
    if VECTORS not in loop.annotations:
        return loop
    low, high, widest = (int(i) for i in loop.annotations[VECTORS])
    whole = low + (high - low) // widest * widest
    parts, at = [], 0
    for end, lanes in ((low, 1), (whole, widest), (high, high - whole), (int(loop.extent), 1)):
        if end > at:
            parts.append(_columns(loop, at, (end - at) // lanes, lanes, channels, ahead))
            at = end
    return in_turn(parts)


def _columns(loop: tirx.For, first: int, count: int, lanes: int, channels: int, ahead: int) -> tirx.Stmt:
    """``count`` times ``lanes`` turns, from ``first`` on, and columns of a channel that will be copied soon."""
    kind, name = loop.loop_var.ty.dtype, loop.loop_var.name
    vector, lane = tirx.Var(f"{name}_vector", kind), tirx.Var(f"{name}_lane", kind)
    body = replaced(loop.body, {loop.loop_var: vector * lanes + lane + first})
    zero, of_channels = tirx.const(0, kind), [body]
    if isinstance(body, tirx.For):
        of_channels = [replaced(body.body, {body.loop_var: tirx.const(i, kind)}) for i in range(int(body.extent))]
    at_once = tirx.ForKind.VECTORIZED if lanes > 1 and len(of_channels) == 1 else tirx.ForKind.SERIAL
    copy = tirx.For(lane, zero, tirx.const(lanes, kind), at_once, body)
    if lanes > 1 and len(of_channels) > 1:
        copy = _interleaved(of_channels, {vector: Range(0, count), lane: Range(0, lanes)}, lane) or copy
    inner = [copy]
    if lanes > 1 and ahead:
        inner = [*(of_later_channel(each, lane, channels, ahead) for each in of_channels), copy]
    return tirx.For(vector, zero, tirx.const(count, kind), tirx.ForKind.SERIAL, in_turn(inner))


def _interleaved(
    of_channels: Sequence[s_tir.SBlockRealize], ranges: Mapping[tirx.Var, Range], lane: tirx.Var
) -> s_tir.SBlockRealize | None:
    """Copy vectors of neighbouring channels as one, column by column; None where single columns are tested."""
    analyzer, lanes = Analyzer(), int(ranges[lane].extent)
    for var, extent in ranges.items():
        analyzer.bind(var, extent)

    def loaded(copy: s_tir.SBlockRealize) -> Any:
        return vector_of(analyzer.simplify(replaced(copy.block.body.value, bound(copy))), lane, lanes)

    vectors = [loaded(each) for each in of_channels]
    if any(each is None for each in vectors):
        return None
    count = len(of_channels)
    copy = replaced(of_channels[0], {lane: tirx.const(0, lane.ty.dtype)})
    store, channel = copy.block.body, channel_of(copy)
    first = {channel: tirx.floordiv(channel, count) * count}
    *others, last = [analyzer.simplify(replaced(i, first)) for i in store.indices]
    at = [*others, tirx.Ramp(last, tirx.const(1, last.ty.dtype), lanes * count)]
    woven = tirx.BufferStore(store.buffer, interlaced(vectors, lanes), at)
    return s_tir.SBlockRealize(copy.iter_values, copy.predicate, with_body(copy.block, woven))


def _trimmed(loop: tirx.For, spec: ConvTranspose3d, along: int) -> tirx.Stmt:
    """Where a tile has all rows of a plane (``along`` 1) or all columns (2), give each tap those that read X.

    The others read zeros beside it.
    """
    loops, inner = nest(loop.body)
    block = inner.block if isinstance(inner, s_tir.SBlockRealize) else None
    if loop.kind != tirx.ForKind.SERIAL or block is None or not ADDING.fullmatch(block.name_hint):
        return loop
    position, tap = inner.iter_values[3 + along], inner.iter_values[6 + along]
    if not loop.loop_var.same_as(tap):
        return loop
    unrolled = [each for each in loops if each.kind == tirx.ForKind.UNROLLED]
    (positions,) = [each for each in unrolled if any(var.same_as(each.loop_var) for var in every(tirx.Var, position))]
    axis = spec.axes[along]
    phase = axis.phases[phase_of(block)[along]]
    read = [(max(0, -at), min(axis.positions, axis.size - at)) for at in phase.offsets()]
    if all(span == (0, int(positions.extent)) for span in read):
        return loop
    parts = []
    for k, (low, high) in enumerate(read):
        if low < high:
            of_span = structural_map(loop.body, (tirx.For, partial(_span, positions, low, high)))
            parts.append(replaced(of_span, {loop.loop_var: tirx.const(k, tap.ty.dtype)}))
    return in_turn(parts or [tirx.Evaluate(0)])


def _span(positions: tirx.For, low: int, high: int, loop: tirx.For) -> tirx.For:
    """The loop over positions, from ``low`` to ``high`` alone; others as they are."""
    if not loop.loop_var.same_as(positions.loop_var):
        return loop
    kind = loop.loop_var.ty.dtype
    position = tirx.Var(loop.loop_var.name, kind)
    body = replaced(loop.body, {loop.loop_var: position + low})
    return tirx.For(position, tirx.const(0, kind), tirx.const(high - low, kind), loop.kind, body)


def _skipping(loop: tirx.For, spec: ConvTranspose3d, t: Tiles) -> tirx.Stmt:
    """Leave out a tap, with all its channels, where the plane or the row that it reads is zeros beside X.

    That is an eighth of all products where X has 8 x 8 x 8 elements and a kernel of 3 a stride of 2.
    """
    found = over_channels(loop)
    if found is None:
        return loop
    adding, tile = found
    phase = phase_of(adding.block)
    _, _, _, d, h, _, tap_d, tap_h, *_ = [replaced(value, begin(tile)) for value in adding.iter_values]
    reads = [(spec.axes[0], phase[0], d, tap_d), (spec.axes[1], phase[1], h, tap_h)]
    tests = []
    several = any(adding.iter_values[7].same_as(each.loop_var) and int(each.extent) > 1 for each in tile)
    rows_apart = not t.line and t.rows == 1 and not several
    for axis, f, q, tap in reads[: 2 if rows_apart else 1]:  # several rows or taps at once read several rows of X
        first, last = axis.reads
        i = q + (axis.phases[f].first_offset - tap * axis.offset_step)
        if first < 0:
            tests.append(i >= 0)
        if last + axis.positions > axis.size:
            tests.append(i < axis.size)
    return tirx.IfThenElse(tirx.all(*tests), loop, None) if tests else loop


def _sharing_rows(loop: tirx.For, spec: ConvTranspose3d) -> tirx.Stmt:
    """Where taps are unrolled beside several rows, take in turn all products of a row of X, and then of the next.

    LLVM keeps their order: a vector of X is loaded, and soon not needed again. Tap by tap, it would load what all taps
    read, and put most of it on the stack.
    """
    found = over_channels(loop)
    if found is None:
        return loop
    adding, (channels, of_tap_h, of_tap_w, of_h, *columns) = found
    if not adding.iter_values[7].same_as(of_tap_h.loop_var):  # more taps than are unrolled
        return loop
    kind, step = loop.loop_var.ty.dtype, spec.axes[1].offset_step
    # a tap reads the row that lies a step before that of the tap before it
    products = sorted(
        product(range(int(of_tap_h.extent)), range(int(of_h.extent))), key=lambda at: at[1] - at[0] * step
    )
    rows = []
    for tap_h, h in products:
        at = {of_tap_h.loop_var: tirx.const(tap_h, kind), of_h.loop_var: tirx.const(h, kind)}
        rows.append(within(columns, replaced(adding, at)))
    tile = with_turns(channels, with_turns(of_tap_w, in_turn(rows)))
    before = loop.body.seq[:-1] if isinstance(loop.body, tirx.SeqStmt) else []
    return with_turns(loop, in_turn([*before, tile]))


def _skipping_planes(loop: tirx.For, spec: ConvTranspose3d, _tiles: Tiles) -> tirx.Stmt:
    """Leave out what a tap sums by itself at a plane beside X."""
    found = over_channels(loop, ADDING_ANY)
    if found is None:
        return loop
    adding, _ = found
    tap = int(adding.block.name_hint.split("_")[1])
    plane = adding.iter_values[5] + spec.axes[0].offset(tap)
    return tirx.IfThenElse(tirx.all(plane >= 0, plane < spec.axes[0].size), loop, None)


def _woven(loop: tirx.For, spec: ConvTranspose3d, t: Tiles) -> tirx.Stmt:
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
        at = [*row, tirx.Ramp(at_first + begin_at, tirx.const(1, kind), part)]
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
    return tirx.For(vector, zero, tirx.const(count, kind), tirx.ForKind.SERIAL, woven_row)
