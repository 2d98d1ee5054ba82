"""Schedules for CPUs: register tiles over the phases, decided by arithmetic or sampled by the tuner.

Every schedule here is the same straight line of moves with other numbers (`Tiles`):

* X is copied, zero-padded, to ``(n, g, d, h, c, w)``, or tile by tile where tiles read the same
  positions in all taps: the reduction over channels then walks through neighbouring cache lines.
  Where channels come last and vectors are of channels, they stay side by side.
* A band is a block of positions ``(n, g, channels, planes of qD, rows of qH)``: all phases of them are
  computed, tile by tile, and then the interleaved output is written while the phases are still in
  cache, if the tiles do not write it (`schedules.woven`). A task is one band, or several in turn that
  share a copy of X.
* A register tile holds ``vectors`` vectors times ``scalars`` broadcast values (times ``rows``).
  With ``vector="channels"`` the vectors run along output channels and the scalars are columns of
  X: right when there are many channels, however few the positions. With ``"groups"`` each output
  channel has an input channel of its own, and the columns are vectors as well. Else the scalars are
  weights: right for few channels, and when writing the output matters most, for the tile then needs no
  transposition. Vectors run along each row (``"row"``), or along all rows of a task laid end to end
  (``"line"``), which wastes less where rows are short or not a multiple of a vector. With very few
  channels (``"taps"``) they run along lines of X, times the weights of many taps: each tap is summed
  by itself, and the output adds up those that meet in it. Where positions are few too (``"plane"``),
  they run along planes of X as they lie, without the zeros beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import tvm
from tvm import tirx

from schedules.candidates import baseline, candidates
from schedules.cost import Estimate
from schedules.finish import VECTORS, finish
from schedules.layer import joined, length_of_row, phases_at_once, reach
from schedules.rules import square
from schedules.squares import SQUARES
from schedules.tiles import CACHE_LINE, Tiles, by_rows, divided, factors
from schedules.unchecked import claim

if TYPE_CHECKING:
    from tvm.s_tir import Schedule

    from opcompile.spec import ConvTranspose3d

__all__ = ["Estimate", "Tiles", "baseline", "candidates", "finish", "joined", "packed", "schedule", "space"]

Span = tuple[Any, Any]

# Columns so many channels apart, or a multiple, would lie in the same places of the first cache.
_POWER = 64
# The blocks that sum products begin so.
_SUMS = ("phase", "tap_")


def packed(spec: ConvTranspose3d, tiles: Tiles, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How the declared W of ``shape`` is laid out for these tiles: a view of it, and an order of the view's axes.

    W ``(C, M/g, kD, kH, kW)``, viewed as ``(g, C/g, M/block, block, kD/pD, pD, ...)``, becomes
    ``(g, M/block, pD, pH, pW, kD/pD, kH/pH, kW/pW, C/g, block)``: the taps of a phase lie together
    (`_periods`), and those of its rows within each channel, ``(..., C/g, kW/pW, block)``, where they are taken
    at once (`by_rows`). A layer whose taps all fall beyond the output has no phase that reads W, which stays as it is.
    Channels that are multiplied in pairs lie side by side: ``(..., block, 2)``, of C/g/2 pairs.
    Where each tap has sums of its own, the weights of a register tile do (`_tap_tile`), in each channel.
    """
    if not spec.terms:
        return shape, tuple(range(5))
    cuts, order = _cuts(spec, tiles, shape)
    return tuple(chain.from_iterable(cuts)), order


def _cuts(spec: ConvTranspose3d, t: Tiles, shape: tuple[int, ...]) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """The parts of each axis of W in the view of `packed`, and their order."""
    c, m, *kernel = shape
    groups = spec.groups
    if t.vector == "groups":  # of channels with one each, as of one group with all of them
        groups, c, m = 1, m, c
    of_c = (groups, c // groups) if t.products == 1 else (groups, c // groups // t.products, t.products)
    if t.by_taps:
        kd, kh, kw = kernel
        of_m, of_kh = _tap_tile(t, kernel)
        return [of_c, (m // of_m, of_m), (kd,), (kh // of_kh, of_kh), (kw,)], (0, 4, 2, 5, 1, 3, 6, 7)
    taps = [(size // p, p) for size, p in zip(kernel, _periods(spec, kernel), strict=True)]
    at = len(of_c)
    of_row = (1, at + 6) if by_rows(spec, t) else (at + 6, 1)
    order = (0, at, at + 3, at + 5, at + 7, at + 2, at + 4, *of_row, at + 1, *range(2, at))
    return [of_c, (m // t.block, t.block), *taps], order


def _parts(i: Any, sizes: tuple[int, ...]) -> list[Any]:
    """An index of an axis that is cut into parts of these sizes, the last innermost."""
    first, *others = [i // math.prod(sizes[n:]) for n in range(1, len(sizes) + 1)]
    return [first, *(part % size for part, size in zip(others, sizes[1:], strict=True))]


def _periods(spec: ConvTranspose3d, kernel: Sequence[int]) -> list[int]:
    """How far apart the taps of a phase are along each axis, where they divide the kernel; else 1, which leaves it."""
    return [a.tap_step if k % a.tap_step == 0 else 1 for k, a in zip(kernel, spec.axes, strict=True)]


def _tap_tile(tiles: Tiles, kernel: Sequence[int]) -> tuple[int, int]:
    """Channels and rows of taps whose weights are the scalars of a register tile: whole rows, then whole planes."""
    _, kh, kw = kernel
    return max(1, tiles.scalars // (kh * kw)), min(kh, tiles.scalars // kw)


def schedule(sch: Schedule, spec: ConvTranspose3d, tiles: Tiles) -> None:
    """Apply the moves to the declared function; legal for every spec."""
    phases = [b for b in sch.get_child_blocks(sch.get_sblock("root")) if sch.get(b).name_hint.startswith(_SUMS)]
    output = sch.get_sblock("output")

    # --- layouts ---
    wide = sch.get_sblock("wide") if phases and spec.dtype != spec.sum_dtype and tiles.products == 1 else None
    if wide and tiles.of_channels:  # a vector of weights is widened as it is loaded
        sch.compute_inline(wide)
        wide = None
    if phases:  # there are none, and no padded copy, where every tap falls beyond the output
        _lay_out(sch, spec, tiles, phases, wide)

    # --- tasks: bands of rows of positions, with their phases inside ---
    n, m, *spatial = spec.from_layout(sch.get_loops(output))
    split = [sch.split(loop, [None, axis.stride]) for loop, axis in zip(spatial, spec.axes, strict=True)]
    (q_d, f_d), (q_h, f_h), (q_w, f_w) = split
    groups, m_out = divided(spec, tiles)
    g, m = sch.split(m, [groups, None])
    m, m_in = sch.split(m, [None, min(tiles.task, m_out)])
    q_d, q_d_in = sch.split(q_d, [None, tiles.depth])
    q_h, q_h_in = sch.split(q_h, [None, tiles.height])
    (q_d, band_d), (q_h, band_h) = sch.split(q_d, [None, tiles.bands_d]), sch.split(q_h, [None, tiles.bands_h])
    m, band_m = sch.split(m, [None, tiles.bands_m])
    row = [q_d_in, f_d, q_h_in, f_h, q_w, f_w]
    if spec.layout == "NCDHW":
        of_task, of_band = [n, g, m, q_d, q_h], [m_in, *row]
    else:  # all groups: the channels of one would be a few bytes of each cache line
        of_task, of_band = [n, m, q_d, q_h], [*row, g, m_in]
    around = [*of_task, band_d, band_h, band_m]
    sch.reorder(*around, *of_band)
    _claim_whole_tiles(sch, spec, tiles, output)
    for p in phases:
        if tiles.line:
            _claim_whole_lines(sch, p)
        sch.compute_at(p, band_m, preserve_unit_loops=True)
        if tiles.by_taps:
            _tile_of_taps(sch, spec, tiles, p, sch.get_loops(p)[len(around) :])
        else:
            _tile(sch, spec, tiles, p, sch.get_loops(p)[len(around) :])
    if phases and tiles.copy in ("task", "chunk"):
        sch.compute_at(sch.get_sblock("pad"), of_task[-1], preserve_unit_loops=True)
    if wide:
        sch.compute_at(wide, of_task[-1], preserve_unit_loops=True)
        together = sch.get_loops(wide)[-3:]  # channels, taps of a row, a block
        _, lane = sch.split(sch.fuse(*together), [None, tiles.lanes])
        sch.vectorize(lane)

    # --- spend the cores ---
    # fused after the phases have their places: of one loop, group and channel are no longer affine
    sch.parallel(sch.fuse(*of_task))
    for p in phases:
        # after `parallel`, which refuses a decomposed block: sums start at the loops over the taps
        depth = 8 if tiles.by_taps else 10
        sch.decompose_reduction(p, sch.get_loops(p)[-depth if tiles.products == 1 else -depth - 1])
    if not spec.many_phases:
        for loop in (f_d, f_h, f_w):
            sch.unroll(loop)
    if phases and tiles.copy != "none":
        _order_pad(sch, spec, tiles)
    if phases and _in_their_order(spec, tiles):
        sch.annotate(m_in, VECTORS, [0, int(sch.get(m_in).extent), tiles.lanes])


def space(spec: ConvTranspose3d, choices: Sequence[Tiles], decision: int | None) -> Callable[[Schedule], None]:
    """Return the function of a MetaSchedule `ScheduleFn`: sample one of ``choices``, then make its moves.

    All ``choices`` must agree on what the declaration is rounded up to. ``decision`` fixes the sample.
    The moves depend on what was sampled, so the space is for strategies that call the function
    (``replay-func``), not for those that change a decision in a finished trace.
    """

    def sample(sch: Schedule) -> None:
        (function,) = sch.mod.functions
        sch.work_on(function.name_hint)
        index = sch.sample_categorical(list(range(len(choices))), [1 / len(choices)] * len(choices), decision)
        schedule(sch, spec, choices[int(sch.get(index))])

    return sample


def _lay_out(sch: Schedule, spec: ConvTranspose3d, t: Tiles, phases: list[Any], wide: Any | None) -> None:
    shape = tuple(int(n) for n in sch.get(phases[0]).reads[1].source.shape)
    cuts, order = _cuts(spec, t, shape)

    def blocked(c: Any, m: Any, kd: Any, kh: Any, kw: Any) -> tuple[Any, ...]:
        whole = (m, c, kd, kh, kw) if t.vector == "groups" else (c, m, kd, kh, kw)
        parts = [part for i, sizes in zip(whole, cuts, strict=True) for part in _parts(i, sizes)]
        return tuple(parts[n] for n in order)

    if t.copy == "none":
        sch.compute_inline(sch.get_sblock("pad"))
    else:
        _lay_out_pad(sch, spec, t)
    sch.transform_layout(phases[0], ("read", 1), blocked)
    if wide:
        sch.transform_layout(wide, ("read", 0), blocked)
        sch.transform_block_layout(wide, blocked)
    if not t.of_channels:
        return
    # an index map is asked for its number of arguments, so each rank has its own
    six: Any = lambda n, g, m, d, h, w: (n, g, m // t.lanes, d, h, w, m % t.lanes)  # noqa: E731
    nine: Any = lambda n, g, m, i, j, k, d, h, w: (n, g, m // t.lanes, i, j, k, d, h, w, m % t.lanes)  # noqa: E731
    for p in phases:
        sch.transform_layout(p, ("write", 0), nine if _has_axes_of_phases(spec, t) else six)


def _has_axes_of_phases(spec: ConvTranspose3d, t: Tiles) -> bool:
    """Whether the phases are axes of the blocks that sum them."""
    return spec.phases_as_axes and not t.by_taps


def _beside(t: Tiles, c: Any, w: Any) -> tuple[Any, ...]:
    """Where the copy of X has column ``w`` of input channel ``c``: those that are multiplied as a pair lie together."""
    return (c, w) if t.products == 1 else (c // t.products, w * t.products + c % t.products)


def _tiled(spec: ConvTranspose3d, t: Tiles, length: int) -> bool:
    """Whether a line of X is cut as its register tiles are: all taps of a phase read the same rows and columns."""
    return t.line > 0 and (t.vector == "plane" or _one_offset(spec)) and length % t.columns == 0


def _one_offset(spec: ConvTranspose3d) -> bool:
    """Whether all taps read the same rows and columns."""
    return all(first == last for first, last in (axis.reads for axis in spec.axes[1:]))


def _lay_out_pad(sch: Schedule, spec: ConvTranspose3d, t: Tiles) -> None:
    pad = sch.get_sblock("pad")
    length = int(sch.get(pad).writes[0].source.shape[-1])
    if _tiled(spec, t, length):
        # what a register tile reads lies together, in the order in which it is read
        of_tile: Any = lambda n, g, c, d, h, w: (n, g, d, h, w // t.columns, *_beside(t, c, w % t.columns))  # noqa: E731
        sch.transform_layout(pad, ("write", 0), of_tile)
        if t.vector == "plane":  # a channel of all tiles would lie in few places of the first cache
            of_line = CACHE_LINE * 8 // tvm.DataType(sch.get(pad).writes[0].source.dtype).bits
            sch.storage_align(pad, 0, 4, 2 * of_line, of_line)
        return
    if _in_their_order(spec, t):
        sch.transform_layout(pad, ("write", 0), lambda n, g, c, d, h, w: (n, g, d, h, w, c))
        if _channels_copied(spec, t) % (_POWER * t.products) == 0:
            sch.storage_align(pad, 0, 4, _POWER * t.products, t.lanes * t.products)
        return
    sch.transform_layout(pad, ("write", 0), lambda n, g, c, d, h, w: (n, g, d, h, *_beside(t, c, w)))
    if t.line:  # each channel's line begins where a vector may; where all vectors do, they lie in few cache lines so
        itemsize = tvm.DataType(sch.get(pad).writes[0].source.dtype).bits // 8
        aligned = CACHE_LINE // itemsize if _one_offset(spec) else t.lanes * t.products
        sch.storage_align(pad, 0, 4, aligned, 0)


def _channels_copied(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many channels of a group lie side by side in a copy of X: of one with all of them, those of a task."""
    if t.vector != "groups":
        return spec.c_in
    return t.of_task[0] if t.copy == "task" else spec.channels_in


def _in_their_order(spec: ConvTranspose3d, t: Tiles) -> bool:
    """Whether channels stay side by side, in the copy of X and where Y is written: where vectors are of channels."""
    return spec.layout == "NDHWC" and t.of_channels


def _side_by_side(spec: ConvTranspose3d, t: Tiles, length: int) -> int:
    """How many elements of a line of X to copy at a time: a row, or what of it no two register tiles share."""
    if t.vector == "plane":
        return length
    row = reach(spec.axes[2])
    part = math.gcd(row, t.lanes)
    return part if _tiled(spec, t, length) and part >= 4 and _own_columns(spec, t) == (0, row) else row


def _own_columns(spec: ConvTranspose3d, t: Tiles) -> tuple[int, int]:
    """Which columns of a row of the copy are X's, and not zeros beside it: the first, and the one after the last."""
    if t.vector == "plane":
        return 0, length_of_row(spec, t)
    first, _ = spec.axes[2].reads
    return max(0, -first), min(reach(spec.axes[2]), spec.axes[2].size - first)


def _square(spec: ConvTranspose3d, t: Tiles, length: int) -> int:
    """The `square` of the copy of X, of columns that are X's; 0 where it has pairs, or channels side by side."""
    if t.of_channels or t.products > 1:
        return 0
    low, high = _own_columns(spec, t)
    columns = high - low
    if _tiled(spec, t, length) and t.vector != "plane":
        columns = _side_by_side(spec, t, length)
        if t.lanes % columns:  # a row goes from one register tile to the next anywhere
            return 0
    return square(spec, min(t.lanes, columns))


def _order_pad(sch: Schedule, spec: ConvTranspose3d, t: Tiles) -> None:
    """Copy X row by row of each channel, by all channels of a column, or by squares; all of it in a task a plane."""
    n, g, c, d, h, *row = sch.get_loops(sch.get_sblock("pad"))[-6:]
    length = int(sch.get(row[-1]).extent)
    if t.line:
        row = sch.split(row[0], [None, _side_by_side(spec, t, length)])
    in_their_order, size = _in_their_order(spec, t), _square(spec, t, length)
    together = size or (1 if in_their_order else t.products)
    c, *of_c = sch.split(c, [None, together]) if together > 1 else [c]
    order = [*row, c] if size or in_their_order else [c, *row]
    sch.reorder(n, g, d, h, *order, *of_c)
    if t.copy == "whole":
        sch.parallel(sch.fuse(n, g, d))
    _mark_copied(sch, spec, t, c if in_their_order else row[-1], length, size)


def _mark_copied(sch: Schedule, spec: ConvTranspose3d, t: Tiles, side_by_side: Any, length: int, size: int) -> None:
    """Tell `finish` which columns, or channels, of the copy of X may be vectors, or squares of ``size``."""
    extent, row, (low, high) = int(sch.get(side_by_side).extent), length_of_row(spec, t), _own_columns(spec, t)
    columns = [0, extent] if extent < row else [low, high]
    if _in_their_order(spec, t):
        sch.annotate(side_by_side, VECTORS, [0, min(extent, spec.channels_in), t.lanes * t.products])
    elif size:
        if t.vector == "plane":  # what is left is no square: one that ends with it would lie in two register tiles
            columns = [0, high // size * size]
        sch.annotate(side_by_side, SQUARES, [*columns, size])
    elif spec.layout == "NCDHW":  # with channels last they lie apart in X
        # LLVM copies whole rows of a tile as fast, but asks for nothing; of X for a task, the one before it has asked
        of_tile = extent < row or (t.copy == "whole" and t.lanes % row == 0)
        if t.vector == "plane" or (low < high and (of_tile or not _tiled(spec, t, length))):
            sch.annotate(side_by_side, VECTORS, [*columns, t.lanes])


def _tile(sch: Schedule, spec: ConvTranspose3d, t: Tiles, phase: Any, loops: list[Any]) -> None:
    """Cut one phase's loops ``(n, g, m, [phases,] d, h, w, taps, c)`` into register tiles."""
    n, g, m, *of_phases, d, h, w, t_d, t_h, t_w, c = loops
    h, h_in = sch.split(h, [None, t.rows])
    # phases that are summed in one loop take as many channels in a turn
    phases = phases_at_once(spec, t)
    of_row = spec.axes[2].most_taps if phases > 1 else int(sch.get(t_w).extent)
    if t.unrolls(int(sch.get(t_h).extent) * of_row):
        # the taps of a channel share vectors of X
        of_taps, at_once = [t_d], [t_h, t_w]
    elif not t.of_channels:
        # those of a row share lines of X
        of_taps, at_once = [t_d, t_h], [t_w]
    else:
        of_taps, at_once = [t_d, t_h, t_w], []
    taps = math.prod(of_row if loop is t_w else int(sch.get(loop).extent) for loop in at_once)
    of_turn = t.channels_of_turn(taps, phases)
    pair = [t.products] if t.products > 1 else []
    c, c_in, turn, *pair = sch.split(c, [None, t.chunk // t.products // of_turn, of_turn, *pair])
    if t.of_channels:
        m, m_in, lane = sch.split(m, [None, t.vectors, t.lanes])
        w, w_in = sch.split(w, [None, t.scalars])
        tiles = [m, d, h, w]
    else:
        m, m_in = sch.split(m, [None, t.scalars])
        w, w_in, lane = sch.split(w, [None, t.vectors, t.lanes])
        tiles = [d, h, w, m]
    # the smaller side of factors stays in registers while the other passes by
    weights, elements = factors(t.vector, t.vectors, t.scalars, t.rows)
    tile = [h_in, w_in, m_in] if weights <= elements else [m_in, h_in, w_in]
    tile = [turn, *at_once, *tile]
    # the taps of one plane of X at a time; a chunk that its task copies by itself goes through all of them
    in_turn = [c, *of_taps] if t.copy == "chunk" else [of_taps[0], c, *of_taps[1:]]
    sch.reorder(n, g, *of_phases, *tiles, *in_turn, c_in, *tile, lane, *pair)
    sch.vectorize(lane)
    for loop in tile:
        sch.unroll(loop)

    # the sums live in registers, and leave them once
    leave = sch.cache_write(phase, 0, "local")
    sch.reverse_compute_at(leave, tiles[-1], preserve_unit_loops=True)
    if t.of_channels:
        *_, h, w, lane = own = sch.get_loops(leave)[-7 - len(of_phases) :]
    else:
        *_, h, w = own = sch.get_loops(leave)[-6 - len(of_phases) :]
        w, lane = sch.split(w, [None, t.lanes])
    sch.vectorize(lane)
    for loop in (own[2], h, w):
        sch.unroll(loop)


def _tile_of_taps(sch: Schedule, spec: ConvTranspose3d, t: Tiles, taps: Any, loops: list[Any]) -> None:
    """Cut the loops ``(n, g, m, kh, kw, d, line, i, c)`` of a plane of taps into register tiles."""
    _, _, m, kh, kw, d, line, i, c = loops
    of_m, of_kh = _tap_tile(t, [axis.kernel for axis in spec.axes])
    m, m_in = sch.split(m, [None, of_m])
    kh, kh_in = sch.split(kh, [None, of_kh])
    i, i_in, lane = sch.split(i, [None, t.vectors, t.lanes])
    of_turn = t.channels_of_turn(taps=1)
    c, c_in, turn = sch.split(c, [None, t.chunk // of_turn, of_turn])
    # the smaller side of factors stays in registers while the other passes by
    tile = [i_in, m_in, kh_in, kw] if t.scalars <= t.vectors else [m_in, kh_in, kw, i_in]
    tile = [turn, *tile]
    sch.reorder(d, line, i, m, kh, c, c_in, *tile, lane)
    leave = sch.cache_write(taps, 0, "local")
    sch.reverse_compute_at(leave, kh, preserve_unit_loops=True)
    *_, of_channels, of_rows, of_columns, _, _, columns = sch.get_loops(leave)
    columns, own_lane = sch.split(columns, [None, t.lanes])
    for vector in (lane, own_lane):
        sch.vectorize(vector)
    for loop in (*tile, of_channels, of_rows, of_columns, columns):
        sch.unroll(loop)


def _claim_whole_tiles(sch: Schedule, spec: ConvTranspose3d, t: Tiles, output: Any) -> None:
    """Let each output element claim the whole tiles of its task.

    `compute_at` shrinks a phase to what the output reads, which at the ragged end is less than a
    tile, and would put that test into the inner loop.
    """
    block = sch.get(output)
    n, m, *o = spec.from_layout([v.var for v in block.iter_vars])
    index = n.ty.dtype
    of_groups, m_out = divided(spec, t)
    q = [tirx.floordiv(i, a.stride) for i, a in zip(o, spec.axes, strict=True)]
    if t.task >= m_out:
        first_m = tirx.const(0, index)
    else:  # without groups the remainder is m itself, which a ragged last task needs to see
        first_m = tirx.floordiv(m if of_groups == 1 else tirx.floormod(m, m_out), t.task) * t.task
    first_d = tirx.floordiv(q[0], t.depth) * t.depth

    def one(start: Any) -> Span:
        return (start, start + 1)

    def whole(extent: Any) -> Span:
        return (tirx.const(0, index), extent)

    planes = (first_d, first_d + t.depth)
    if (through := joined(spec, t)) > 1:
        planes = one(tirx.floordiv(q[0], through))
    height = tirx.floordiv(q[1], t.height)
    rows = one(height) if t.line else (height * t.height, (height + 1) * t.height)

    for i, read in enumerate(block.reads):
        if not read.source.name.startswith(_SUMS):
            continue
        shape = list(read.source.shape)
        channels = (first_m, first_m + t.task)
        if t.of_channels:
            first_block = tirx.floordiv(first_m, t.lanes)
            channels = (first_block, first_block + t.task // t.lanes)
        groups = one(tirx.floordiv(m, m_out)) if spec.layout == "NCDHW" else whole(shape[1])
        spans = [one(n), groups, channels]
        if t.by_taps:
            spans += [whole(shape[3]), whole(shape[4])]
        if _has_axes_of_phases(spec, t):
            spans += map(whole, shape[3:6])
        spans += [planes, rows, *map(whole, shape[-2:] if t.of_channels else shape[-1:])]
        claim(sch, output, i, spans)


def _claim_whole_lines(sch: Schedule, phase: Any) -> None:
    """Let each sum claim the lines of X that it reads from whole, so that they are copied row by row."""
    pad = sch.get(phase).reads[0]
    spans = [(r.min, r.min + r.extent) for r in pad.region[:-1]]
    claim(sch, phase, 0, [*spans, (tirx.const(0, pad.source.shape[-1].ty.dtype), pad.source.shape[-1])])
