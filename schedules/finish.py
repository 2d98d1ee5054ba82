"""What no move of a schedule can say: vectors of some columns of a loop, rows woven, pairs, taps left out, fetches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import Range
from tvm.ir.expr import TensorLoad
from tvm.sym import Analyzer
from tvm_ffi import structural_map

from schedules import halves, pairs, streams, stretches
from schedules.chunks import by_chunks
from schedules.fetches import asking, channels_ahead, of_later_channel
from schedules.imported import WITHOUT_LSR, importing
from schedules.layer import joined
from schedules.pairs import added, narrowed
from schedules.rows import in_rows
from schedules.rules import puts_together
from schedules.squares import in_squares
from schedules.statements import (
    ADDING_ANY,
    ROW,
    WRITING,
    begin,
    bound,
    channel_of,
    every,
    in_turn,
    interlaced,
    loop_over,
    replaced,
    side_by_side,
    vector_of,
    with_body,
    with_turns,
)
from schedules.taps import sharing_rows, skipping, skipping_planes, trimmed
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
        function = structural_map(function, (tirx.For, lambda loop: trimmed(loop, spec, 1)))
    if tiles.trims(width, taps_w):
        function = structural_map(function, (tirx.For, lambda loop: trimmed(loop, spec, 2)))
    if joined(spec, tiles) == 1:  # a line through several planes has all that they have
        if tiles.vector == "plane":
            function = structural_map(function, (tirx.For, lambda loop: skipping_planes(loop, spec)))
        else:
            function = structural_map(function, (tirx.For, lambda loop: skipping(loop, spec, tiles)))
    function = asking(function, spec, tiles)
    if tiles.shares_rows:
        function = structural_map(function, (tirx.For, lambda loop: sharing_rows(loop, spec)))
    if tiles.woven == "tile":
        function = written_by_tiles(function, spec, tiles)
    elif not tiles.of_channels:
        function = structural_map(function, (tirx.For, lambda loop: in_rows(loop, spec, tiles)))
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
    if tiles.vector == "channels" and tiles.woven == "tile" and tiles.bands_h > 1:
        # of so many loops LLVM made an address for each element of X that a turn reads, on the stack, and moved all of
        # them on in each: on some layers up to half as slow again
        function = function.with_attr(WITHOUT_LSR, True)
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
        return tirx.BufferLoad(buffer, [*others, side_by_side(last, count)])

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
    at = [*others, side_by_side(last, lanes)]
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
    of_channels = [body]
    if isinstance(body, tirx.For):
        of_channels = [replaced(body.body, {body.loop_var: tirx.const(i, kind)}) for i in range(int(body.extent))]
    at_once = tirx.ForKind.VECTORIZED if lanes > 1 and len(of_channels) == 1 else tirx.ForKind.SERIAL
    copy = loop_over(lane, lanes, body, at_once)
    if lanes > 1 and len(of_channels) > 1:
        copy = _interleaved(of_channels, {vector: Range(0, count), lane: Range(0, lanes)}, lane) or copy
    inner = [copy]
    if lanes > 1 and ahead:
        inner = [*(of_later_channel(each, lane, channels, ahead) for each in of_channels), copy]
    return loop_over(vector, count, in_turn(inner))


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
    at = [*others, side_by_side(last, lanes * count)]
    woven = tirx.BufferStore(store.buffer, interlaced(vectors, lanes), at)
    return s_tir.SBlockRealize(copy.iter_values, copy.predicate, with_body(copy.block, woven))
