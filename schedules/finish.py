"""What no move of a schedule can say: vectors of some columns of a loop, rows woven, pairs, taps left out, fetches."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import Range
from tvm.ir.expr import TensorLoad
from tvm.sym import Analyzer
from tvm_ffi import structural_map

from schedules import pairs, streams
from schedules.imported import importing
from schedules.pairs import added, narrowed
from schedules.tiles import CACHE_LINE, joined, reach, weaves

if TYPE_CHECKING:
    from opcompile.spec import Axis, ConvTranspose3d
    from schedules.tiles import Tiles

# Marks a loop: what it takes from the first number to the second may be vectors, of as many lanes as the third.
VECTORS = "opcompile.vectors"

# The block that adds one product to the sums of a phase, or of all phases as axes.
_ADDING_ANY = re.compile(r"phase(_\d+_\d+_\d+)?_update")
# The block that adds one product to the sums of one phase.
_ADDING = re.compile(r"phase_\d+_\d+_\d+_update")
# The block that moves the sums of one phase out of registers, where each phase has blocks of its own.
_LEAVING = re.compile(r"phase_\d+_\d+_\d+_local")
# The block that writes Y, one element at a time.
_WRITING = "output"
# The block that writes vectors of a row of Y.
_ROW = "row"

# So many bytes ahead are X and Y asked for, and X some channels at least: what memory needs to answer.
_BYTES_AHEAD = 4096
_CHANNELS_AHEAD = 4
# Weights of no more bytes stay in the second cache; for no more elements of X, memory sends them as fast as it can.
_NEAR = 512 << 10
_FEW = 16


def finish(module: tvm.IRModule, spec: ConvTranspose3d, tiles: Tiles) -> tvm.IRModule:
    """Rewrite a scheduled module: vectors copy X and write Y, zeros are not multiplied, memory is asked for early.

    TVM splits no loop that begins elsewhere than at 0, and the columns of X between two pads are such; LLVM unrolls
    short rows into scalars, and writes what is left of long ones element by element. And between its last sum and its
    first store a task would wait for memory, line by line: by then the second cache has the lines.
    """
    ((name, function),) = module.functions.items()
    y, in_llvm = function.params[-1], ""
    channels = spec.channels_in // spec.groups
    if tiles.products > 1:
        function = structural_map(function, (tirx.For, lambda loop: _paired(loop, tiles)))
    ahead = _channels_ahead(spec, tiles)
    function = structural_map(function, (tirx.For, lambda loop: _in_vectors(loop, channels, ahead)))
    column = spec.axes[2]
    if tiles.trims(column.positions, column.most_taps):
        function = structural_map(function, (tirx.For, lambda loop: _trimmed(loop, column)))
    if joined(spec, tiles) == 1:  # a line through several planes has all that they have
        function = structural_map(function, (tirx.For, lambda loop: _skipping(loop, spec, tiles)))
    if asking := _ahead(spec, tiles):
        function = structural_map(function, (tirx.For, lambda loop: _asking(loop, tiles, asking)))
    if tiles.vector == "channels" or spec.layout == "NCDHW":  # else the elements of a vector lie apart in Y
        function = structural_map(function, (tirx.For, lambda loop: _fetching(loop, spec, tiles, y)))
    if tiles.vector != "channels" and spec.layout == "NCDHW":
        function = structural_map(function, (tirx.For, lambda loop: _woven(loop, spec, tiles)))
    if tiles.products > 1 or tiles.store == "streamed":
        function = structural_map(function, (tirx.For, _as_vectors))
    if tiles.products > 1:
        function = structural_map(function, (s_tir.SBlock, _narrowing))
        in_llvm += pairs.FUNCTIONS
    if tiles.store == "streamed":
        function = _past_caches(function, y)
        in_llvm += streams.FUNCTIONS
    if in_llvm:
        root = function.body
        body = _with_body(root.block, importing(root.block.body, in_llvm))
        function = function.with_body(s_tir.SBlockRealize(root.iter_values, root.predicate, body))
    return tvm.IRModule({name.name_hint: function})


def _paired(loop: tirx.For, t: Tiles) -> tirx.Stmt:
    """Where a vector of sums takes the products of two channels, let one instruction do both."""
    pair = loop.body
    realize = pair.body if isinstance(pair, tirx.For) else None
    if loop.kind != tirx.ForKind.VECTORIZED or not isinstance(realize, s_tir.SBlockRealize):
        return loop
    block = realize.block
    if not _ADDING_ANY.fullmatch(block.name_hint):
        return loop
    _, _, m, *_, c = (v.var for v in block.iter_vars)
    # where the vector and the pair begin
    begin = {c: tirx.floordiv(c, t.products) * t.products}
    if t.vector == "channels":
        begin[m] = tirx.floordiv(m, t.lanes) * t.lanes
    analyzer = Analyzer()

    def elements(of: Any, count: int) -> Any:
        *others, last = [analyzer.simplify(_with(i, begin)) for i in of.indices]
        buffer = of.source if isinstance(of, TensorLoad) else of.buffer
        return tirx.BufferLoad(buffer, [*others, tirx.Ramp(last, tirx.const(1, last.ty.dtype), count)])

    def vector(load: Any) -> Any:
        return tirx.reinterpret(f"int32x{t.lanes}", elements(load, t.lanes * t.products))

    def broadcast(load: Any) -> Any:
        return tirx.Broadcast(tirx.reinterpret("int32", elements(load, t.products)), t.lanes)

    loads = {str(load.source.name): load for load in _every(TensorLoad, block.body.value)}
    x, w, sums = loads["pad"], loads["W"], elements(block.body, t.lanes)
    factors = (vector(w), broadcast(x)) if t.vector == "channels" else (vector(x), broadcast(w))
    adding = _with_body(block, tirx.BufferStore(sums.source, added(sums, *factors), sums.indices))
    return s_tir.SBlockRealize(
        [_with(value, _begin((loop, pair))) for value in realize.iter_values], realize.predicate, adding
    )


def _as_vectors(loop: tirx.For) -> tirx.Stmt:
    """Where lanes of Y are written at once, write them as a vector; TVM rounds them where they need tests."""
    realize = loop.body
    if loop.kind != tirx.ForKind.VECTORIZED or not isinstance(realize, s_tir.SBlockRealize):
        return loop
    block, lane, lanes = realize.block, loop.loop_var, int(loop.extent)
    if block.name_hint != _WRITING:
        return loop
    analyzer, zero = Analyzer(), tirx.const(0, lane.ty.dtype)
    analyzer.bind(lane, Range(0, lanes))
    values = dict(zip((v.var for v in block.iter_vars), realize.iter_values, strict=True))
    value = analyzer.simplify(_with(block.body.value, values))
    alike = [realize.predicate, *(i for load in _every(TensorLoad, value) for i in load.indices[:-1])]
    tested = any(var.same_as(lane) for each in alike for var in _every(tirx.Var, each))
    vector = None if tested else _vector_of(value, lane, lanes)
    if vector is None:
        left = s_tir.SBlockRealize(realize.iter_values, realize.predicate, _with_body(block, block.body, "lanes"))
        return tirx.For(lane, zero, loop.extent, loop.kind, left)
    *others, last = block.body.indices
    at = [*others, tirx.Ramp(last, tirx.const(1, last.ty.dtype), lanes)]
    written = _with_body(block, tirx.BufferStore(block.body.buffer, vector, at))
    return s_tir.SBlockRealize([_with(i, {lane: zero}) for i in realize.iter_values], realize.predicate, written)


def _narrowing(block: s_tir.SBlock) -> s_tir.SBlock:
    """Round by one instruction what a block writes to Y."""
    if block.name_hint not in (_WRITING, _ROW):
        return block

    def rounded(cast: tirx.Cast) -> Any:
        return narrowed(cast.value) if str(cast.ty.dtype).startswith("bfloat16") else cast

    return _with_body(block, structural_map(block.body, (tirx.Cast, rounded)))


def _past_caches(function: tirx.PrimFunc, y: Any) -> tirx.PrimFunc:
    """Stream what is stored to Y, ask for its lines only where it is not, and wait for it at the end of a task."""

    def streamed(store: tirx.BufferStore) -> tirx.Stmt:
        return streams.streamed(store) if store.buffer.same_as(y) else store

    def asked(statement: tirx.Evaluate) -> tirx.Stmt:
        of_y = [load for load in _every(TensorLoad, statement.value) if load.source.same_as(y)]
        return streams.asked(*of_y) if of_y else statement

    def arrived(loop: tirx.For) -> tirx.Stmt:
        if loop.kind != tirx.ForKind.PARALLEL or not any(
            block.name_hint in (_WRITING, _ROW) for block in _every(s_tir.SBlock, loop.body)
        ):
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, _in_turn([loop.body, streams.arrived()]))

    function = structural_map(function, (tirx.Evaluate, asked))  # before there are others that name Y
    return structural_map(structural_map(function, (tirx.BufferStore, streamed)), (tirx.For, arrived))


def _with_body(block: s_tir.SBlock, body: tirx.Stmt, name: str = "") -> s_tir.SBlock:
    """The block with other statements, and maybe another name."""
    return s_tir.SBlock(
        block.iter_vars,
        block.reads,
        block.writes,
        name or block.name_hint,
        body,
        block.init,
        block.alloc_buffers,
        block.match_buffers,
        block.annotations,
    )


def _channels_ahead(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many channels ahead the copy of X asks for it; 0 where it reads them in their order, or has too few."""
    plane, column = spec.axes[1], spec.axes[2]
    rows = joined(spec, t) * (t.height + reach(plane) - plane.positions) if t.line else 1
    ahead = max(_CHANNELS_AHEAD, _BYTES_AHEAD // (rows * reach(column) * spec.itemsize))
    return min(ahead, spec.channels_in // spec.groups // 2) if spec.layout == "NCDHW" else 0


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
    return _in_turn(parts)


def _columns(loop: tirx.For, first: int, count: int, lanes: int, channels: int, ahead: int) -> tirx.Stmt:
    """``count`` times ``lanes`` turns, from ``first`` on, and columns of a channel that will be copied soon."""
    kind, name = loop.loop_var.ty.dtype, loop.loop_var.name
    vector, lane = tirx.Var(f"{name}_vector", kind), tirx.Var(f"{name}_lane", kind)
    body = _with(loop.body, {loop.loop_var: vector * lanes + lane + first})
    zero, of_channels = tirx.const(0, kind), [body]
    if isinstance(body, tirx.For):
        of_channels = [_with(body.body, {body.loop_var: tirx.const(i, kind)}) for i in range(int(body.extent))]
    at_once = tirx.ForKind.VECTORIZED if lanes > 1 and len(of_channels) == 1 else tirx.ForKind.SERIAL
    copy = tirx.For(lane, zero, tirx.const(lanes, kind), at_once, body)
    if lanes > 1 and len(of_channels) > 1:
        copy = _interleaved(of_channels, {vector: Range(0, count), lane: Range(0, lanes)}, lane) or copy
    inner = [copy]
    if lanes > 1 and ahead:
        inner = [*(_of_later_channel(each, lane, channels, ahead) for each in of_channels), copy]
    return tirx.For(vector, zero, tirx.const(count, kind), tirx.ForKind.SERIAL, _in_turn(inner))


def _interleaved(
    of_channels: Sequence[s_tir.SBlockRealize], ranges: Mapping[tirx.Var, Range], lane: tirx.Var
) -> s_tir.SBlockRealize | None:
    """Copy vectors of neighbouring channels as one, column by column; None where single columns are tested."""
    analyzer, lanes = Analyzer(), int(ranges[lane].extent)
    for var, extent in ranges.items():
        analyzer.bind(var, extent)

    def loaded(copy: s_tir.SBlockRealize) -> Any:
        values = dict(zip((v.var for v in copy.block.iter_vars), copy.iter_values, strict=True))
        return _vector_of(analyzer.simplify(_with(copy.block.body.value, values)), lane, lanes)

    vectors = [loaded(each) for each in of_channels]
    if any(each is None for each in vectors):
        return None
    count = len(of_channels)
    copy = _with(of_channels[0], {lane: tirx.const(0, lane.ty.dtype)})
    store, (channel,) = copy.block.body, [v.var for v in copy.block.iter_vars if v.var.name == "v_c"]
    first = {channel: tirx.floordiv(channel, count) * count}
    *others, last = [analyzer.simplify(_with(i, first)) for i in store.indices]
    at = [*others, tirx.Ramp(last, tirx.const(1, last.ty.dtype), lanes * count)]
    woven = tirx.BufferStore(store.buffer, _interlaced(vectors, lanes), at)
    return s_tir.SBlockRealize(copy.iter_values, copy.predicate, _with_body(copy.block, woven))


def _of_later_channel(copy: s_tir.SBlockRealize, lane: tirx.Var, channels: int, ahead: int) -> tirx.Stmt:
    """Ask for what the block copies, some channels further on."""
    (load,) = _every(TensorLoad, copy.block.body.value)
    values = dict(zip((v.var for v in copy.block.iter_vars), copy.iter_values, strict=True))
    names = [v.var.name for v in copy.block.iter_vars]
    channel = copy.block.iter_vars[names.index("v_c")].var
    values[channel] = tirx.min(values[channel] + ahead, tirx.const(channels - 1, channel.ty.dtype))
    first_lane = {lane: tirx.const(0, lane.ty.dtype)}
    return _fetch(load.source, [_with(_with(i, values), first_lane) for i in load.indices])


def _trimmed(loop: tirx.For, axis: Axis) -> tirx.Stmt:
    """Where a tile is a whole row, give each tap those columns that read X, and not the zeros beside it."""
    inner, unrolled = loop.body, []
    while isinstance(inner, tirx.For):
        unrolled += [inner] if inner.kind == tirx.ForKind.UNROLLED else []
        inner = inner.body
    block = inner.block if isinstance(inner, s_tir.SBlockRealize) else None
    if loop.kind != tirx.ForKind.SERIAL or block is None or not _ADDING.fullmatch(block.name_hint):
        return loop
    w, tap = inner.iter_values[5], inner.iter_values[8]
    if not loop.loop_var.same_as(tap):
        return loop
    (columns,) = [each for each in unrolled if any(var.same_as(each.loop_var) for var in _every(tirx.Var, w))]
    phase = axis.phases[int(block.name_hint.split("_")[3])]
    read = [(max(0, -at), min(axis.positions, axis.size - at)) for at in phase.offsets()]
    if all(span == (0, int(columns.extent)) for span in read):
        return loop
    parts = []
    for k, (low, high) in enumerate(read):
        if low < high:
            of_span = structural_map(loop.body, (tirx.For, partial(_span, columns, low, high)))
            parts.append(_with(of_span, {loop.loop_var: tirx.const(k, tap.ty.dtype)}))
    return _in_turn(parts or [tirx.Evaluate(0)])


def _span(columns: tirx.For, low: int, high: int, loop: tirx.For) -> tirx.For:
    """The loop over columns, from ``low`` to ``high`` alone; others as they are."""
    if not loop.loop_var.same_as(columns.loop_var):
        return loop
    kind = loop.loop_var.ty.dtype
    column = tirx.Var(loop.loop_var.name, kind)
    body = _with(loop.body, {loop.loop_var: column + low})
    return tirx.For(column, tirx.const(0, kind), tirx.const(high - low, kind), loop.kind, body)


def _skipping(loop: tirx.For, spec: ConvTranspose3d, t: Tiles) -> tirx.Stmt:
    """Leave out a tap, with all its channels, where the plane or the row that it reads is zeros beside X.

    That is an eighth of all products where X has 8 x 8 x 8 elements and a kernel of 3 a stride of 2.
    """
    found = _over_channels(loop)
    if found is None:
        return loop
    adding, tile = found
    phase = [int(f) for f in adding.block.name_hint.split("_")[1:4]]
    _, _, _, d, h, _, tap_d, tap_h, *_ = [_with(value, _begin(tile)) for value in adding.iter_values]
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


def _over_channels(loop: tirx.For) -> tuple[s_tir.SBlockRealize, list[tirx.For]] | None:
    """Where a loop goes through channels: the block that adds their products, and the loops of its register tile."""
    inner, tile = loop.body, []
    while isinstance(inner, tirx.For) and inner.kind != tirx.ForKind.SERIAL:
        tile.append(inner)
        inner = inner.body
    adding = isinstance(inner, s_tir.SBlockRealize) and _ADDING.fullmatch(inner.block.name_hint)
    return (inner, tile) if loop.kind == tirx.ForKind.SERIAL and adding and tile else None


Ahead = Callable[[s_tir.SBlockRealize, list[tirx.For], "Tiles"], list[tirx.Stmt]]


def _ahead(spec: ConvTranspose3d, t: Tiles) -> list[Ahead]:
    """What to ask for as channels are multiplied."""
    asking: list[Ahead] = []
    channels = spec.channels_in // spec.groups
    if t.copy == "whole" and t.vector != "channels" and 1 < t.chunk < channels:
        asking.append(_of_next_chunk)
    several = math.prod(axis.size for axis in spec.axes) > _FEW
    if several and channels > 1 and math.prod(spec.w_shape) * spec.itemsize > _NEAR:
        asking.append(_of_next_tap)
    return asking


def _asking(loop: tirx.For, t: Tiles, asking: Sequence[Ahead]) -> tirx.Stmt:
    """Where a loop goes through channels, ask for what comes later."""
    found = _over_channels(loop)
    fetches = [fetch for ask in asking for fetch in ask(*found, t)] if found else []
    if not fetches:
        return loop
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, _in_turn([*fetches, loop.body]))


def _of_next_chunk(adding: s_tir.SBlockRealize, tile: list[tirx.For], t: Tiles) -> list[tirx.Stmt]:
    """Where the taps of a row begin, what they will read of the next chunk of channels.

    The lines of neighbouring channels lie too far apart for the prefetcher, and a copy of all X in the third cache.
    """
    x, values = _first(adding, tile, "pad")
    *_, tap_w, channel = (v.var for v in adding.block.iter_vars)
    values[channel] = values[channel] + t.chunk
    *line, first = _at(x, values)
    a_line = CACHE_LINE * 8 // tvm.DataType(x.source.dtype).bits
    asked = [_fetch(x.source, [*line, first + i]) for i in range(0, t.columns * t.products + a_line, a_line)]
    return [tirx.IfThenElse(values[tap_w] == 0, _in_turn(asked), None)]


def _of_next_tap(adding: s_tir.SBlockRealize, tile: list[tirx.For], t: Tiles) -> list[tirx.Stmt]:
    """The weights of these channels for the next tap, which follow in memory.

    The prefetcher begins anew with each tap, and only the first of the tiles that read a weight waits for it.
    """
    if all(read.source.name != "W" for read in adding.block.reads):  # a task has widened them, and has them near
        return []
    w, values = _first(adding, tile, "W")
    g, block, *taps, channel, first = _at(w, values)[:10]
    rest = [tirx.const(0, first.ty.dtype)] * (len(w.indices) - 10)
    channels = int(w.source.shape[8])
    blocks = range(t.vectors if t.vector == "channels" else 1)
    return [_fetch(w.source, [g, block + i, *taps, channel + channels, first, *rest]) for i in blocks]


def _first(adding: s_tir.SBlockRealize, tile: list[tirx.For], name: str) -> tuple[Any, dict[tirx.Var, Any]]:
    """What the block reads of a buffer, and the block's variables where its register tile begins."""
    block = adding.block
    values = {v.var: _with(i, _begin(tile)) for v, i in zip(block.iter_vars, adding.iter_values, strict=True)}
    (load,) = (load for load in _every(TensorLoad, block.body.value) if load.source.name == name)
    return load, values


def _at(load: Any, values: Mapping[tirx.Var, Any]) -> list[Any]:
    """The indices of an element, or of the first of a vector."""
    return [i.base if isinstance(i, tirx.Ramp) else i for i in (_with(each, values) for each in load.indices)]


def _fetching(loop: tirx.For, spec: ConvTranspose3d, t: Tiles, y: Any) -> tirx.Stmt:
    """Where a vector of sums leaves its registers, ask for one line of Y into the second cache.

    The phases of a row fill as many lines as they have vectors, and each vector asks for another one.
    """
    block = loop.body.block if isinstance(loop.body, s_tir.SBlockRealize) else None
    if loop.kind != tirx.ForKind.VECTORIZED or block is None or not _LEAVING.fullmatch(block.name_hint):
        return loop
    n, g, m, d, h, w, *_ = [_with(value, _begin([loop])) for value in loop.body.iter_values]
    phase = [int(f) for f in block.name_hint.split("_")[1:4]]
    if t.vector == "channels":
        m = m * t.lanes
    else:
        w = w + phase[2] * t.lanes // spec.axes[2].stride
    if t.line:
        of_row = reach(spec.axes[2])
        h, w = h * t.height + tirx.floordiv(w, of_row), tirx.floormod(w, of_row)
        if (planes := joined(spec, t)) > 1:
            d, h = d * planes + tirx.floordiv(h, t.height), tirx.floormod(h, t.height)
    o = [q * axis.stride + f for q, axis, f in zip((d, h, w), spec.axes, phase, strict=True)]
    if t.vector == "channels" and spec.layout == "NCDHW":  # the channels of a vector are a line each
        m = m + tirx.floormod(o[2], t.lanes)
    m = g * (spec.channels_out // spec.groups) + m
    return tirx.SeqStmt([loop, _fetch(y, (n, m, *o) if spec.layout == "NCDHW" else (n, *o, m))])


def _woven(loop: tirx.For, spec: ConvTranspose3d, t: Tiles) -> tirx.Stmt:
    """Write a row of Y as vectors, each woven from one vector of every phase, unless an activation is for scalars.

    What whole vectors leave of the row is a narrower one that ends where the row does, and may write again what the
    one before it wrote: LLVM would write the last 2 to 31 elements one by one.
    """
    stride, row = spec.axes[2].stride, spec.axes[2].out
    block = loop.body.body if isinstance(loop.body, tirx.For) else None
    if not isinstance(block, s_tir.SBlockRealize) or block.block.name_hint != _WRITING:
        return loop
    if not weaves(spec.axes[2]):
        return loop
    lanes = min(t.lanes, 1 << ((row // stride).bit_length() - 1))
    whole, left = divmod(row, lanes * stride)
    parts = [_weave(loop, block, stride, 0, whole, lanes)]
    if left:
        lanes = max(2, 1 << (-(-left // stride) - 1).bit_length())
        parts.append(_weave(loop, block, stride, row - lanes * stride, 1, lanes))
    woven = [part for part in parts if part is not None]
    return _in_turn(woven) if len(woven) == len(parts) else loop


def _weave(
    loop: tirx.For, realize: s_tir.SBlockRealize, stride: int, first: int, count: int, lanes: int
) -> tirx.For | None:
    """``count`` times ``lanes * stride`` elements of a row of Y, from ``first`` on; None where that needs a loop."""
    kind, block = loop.loop_var.ty.dtype, realize.block
    y, column = block.body.buffer, block.iter_vars[-1].var
    *row, _ = block.body.indices
    vector, lane = (tirx.Var(f"{loop.loop_var.name}_{name}", kind) for name in ("vector", "lane"))
    analyzer, zero, size = Analyzer(), tirx.const(0, kind), lanes * stride
    analyzer.bind(vector, Range(0, count))
    analyzer.bind(lane, Range(0, lanes))
    of_phases = [
        analyzer.simplify(_with(block.body.value, {column: (vector * lanes + lane) * stride + (first + k)}))
        for k in range(stride)
    ]
    vectors = [_vector_of(value, lane, lanes) for value in of_phases]
    if any(each is None for each in vectors):
        return None
    itemsize = tvm.DataType(y.dtype).bits // 8
    later = range(_BYTES_AHEAD // itemsize, _BYTES_AHEAD // itemsize + size, CACHE_LINE // itemsize)
    body = [_fetch(y, [*row, column + i]) for i in later]
    body.append(tirx.BufferStore(y, _interlaced(vectors, lanes), [*row, tirx.Ramp(column, tirx.const(1, kind), size)]))
    written = [*block.writes[0].region[:-1], Range.from_min_extent(column, size)]
    weaving = s_tir.SBlock(
        block.iter_vars,
        block.reads,
        [tirx.BufferRegion(y, written)],
        _ROW,
        tirx.SeqStmt(body),
        annotations=block.annotations,
    )
    # every column is one of the row's: of the test there remain planes and rows
    test = analyzer.simplify(_with(realize.predicate, {loop.loop_var: zero, loop.body.loop_var: zero}))
    start = vector * size + first
    woven_row = s_tir.SBlockRealize([*realize.iter_values[:-1], start], test, weaving)
    return tirx.For(vector, zero, tirx.const(count, kind), tirx.ForKind.SERIAL, woven_row)


def _interlaced(vectors: Sequence[Any], lanes: int) -> Any:
    """One vector of the first lanes of all ``vectors``, then the second, and so on."""
    count = len(vectors)
    order = [tirx.const(i % count * lanes + i // count, "int32") for i in range(lanes * count)]
    return vectors[0] if count == 1 else tirx.Shuffle(vectors, order)


def _vector_of(value: Any, lane: tirx.Var, lanes: int) -> Any:
    """What ``value`` is for all lanes, as one vector; None where it needs a loop."""
    kind = lane.ty.dtype
    to = tirx.decl_buffer((lanes,), value.ty.dtype)
    store = tirx.BufferStore(to, value, [lane])
    loop = tirx.For(lane, tirx.const(0, kind), tirx.const(lanes, kind), tirx.ForKind.VECTORIZED, store)
    module = tirx.transform.VectorizeLoop()(tvm.IRModule({"vector": tirx.PrimFunc([to], loop)}))
    body = module["vector"].body
    return body.value if isinstance(body, tirx.BufferStore) else None


def _fetch(buffer: Any, at: Sequence[Any]) -> tirx.Stmt:
    """Ask for the line of an element into the second cache; one beyond the buffer is not fetched, and does no harm."""
    to_read, into_second_cache, data = (tirx.const(i, "int32") for i in (0, 2, 1))
    address = tirx.address_of(tirx.BufferLoad(buffer, list(at)))
    return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, to_read, into_second_cache, data))


def _every(kind: Any, tree: Any) -> list[Any]:
    """The nodes of a kind in ``tree``."""
    found: list[Any] = []

    def seen(node: Any) -> Any:
        found.append(node)
        return node

    structural_map(tree, (kind, seen))
    return found


def _begin(loops: Sequence[tirx.For]) -> dict[tirx.Var, Any]:
    """The variables of the loops, each at 0."""
    return {loop.loop_var: tirx.const(0, loop.loop_var.ty.dtype) for loop in loops}


def _in_turn(statements: list[tirx.Stmt]) -> tirx.Stmt:
    """The statements, one after the other."""
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)


def _with(tree: Any, values: Mapping[tirx.Var, Any]) -> Any:
    """``tree`` with variables replaced."""
    return structural_map(tree, (tirx.Var, lambda var: values.get(var, var)))
