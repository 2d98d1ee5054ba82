"""Schedules of the three derivatives for CPUs; `schedules.gradient_tiles` decides their numbers.

* dX: a task is a block of positions. It copies the part of dY that these meet, zero-padded, and
  computes its channels tile by tile, as the forward operator does it for a single phase. W is
  transposed before the first task, in the kernel: weights that are trained change with each call.
* dW: a task is a block of channels, and a slice of the planes. It takes the positions in blocks: for
  each it copies X with the channels side by side and the part of dY that is met, and adds what a
  register tile sums over the whole block to sums that stay in cache. dW is written at the end, once.
* dB: sums along the contiguous axis, a channel or a slice of positions a task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import tirx

from schedules.division import largest_divisor
from schedules.gradient_tiles import (
    BiasTiles,
    Estimate,
    InputTiles,
    WeightTiles,
    bias_candidates,
    input_candidates,
    weight_candidates,
)
from schedules.unchecked import claim

if TYPE_CHECKING:
    from tvm.s_tir import Schedule

    from opcompile.gradients.gradient import Gradient
    from opcompile.spec import ConvTranspose3d
    from opcompile.target import Machine

__all__ = ["BiasTiles", "Estimate", "GradientTiles", "InputTiles", "WeightTiles", "candidates", "schedule"]

GradientTiles = InputTiles | WeightTiles | BiasTiles

# Code beside which a loop over the taps of a weight is not unrolled.
_MOST_UNROLLED = 64


def candidates(gradient: Gradient, machine: Machine) -> list[Estimate[Any]]:
    """Every sensible choice of tiles, best first by estimated cycles; never empty, and deterministic."""
    choose: dict[str, Callable[[Gradient, Machine], list[Estimate[Any]]]] = {
        "x": input_candidates,
        "w": weight_candidates,
        "b": bias_candidates,
    }
    return choose[gradient.wrt](gradient, machine)


def schedule(sch: Schedule, gradient: Gradient, tiles: GradientTiles) -> None:
    """Apply the moves to the declared function; legal for every derivative."""
    if isinstance(tiles, InputTiles):
        _of_input(sch, gradient.layer, tiles)
    elif isinstance(tiles, WeightTiles):
        _of_weight(sch, gradient.layer, tiles)
    else:
        _of_bias(sch, gradient.layer)


# --- dX ---


def _of_input(sch: Schedule, layer: ConvTranspose3d, t: InputTiles) -> None:
    pad, weights, total, output = (sch.get_sblock(name) for name in ("pad", "weights", "sum", "output"))
    first = layer.layout == "NCDHW"
    c_in = layer.c_in

    # --- layouts ---
    block = t.block
    _lay_out_pad(sch, layer, t.vector, pad)
    sch.transform_layout(weights, ("write", 0), lambda g, c, m, i, j, k: (g, c // block, m, i, j, k, c % block))
    if t.vector == "channels":
        sch.transform_layout(total, ("write", 0), lambda n, g, c, d, h, w: (n, g, c // block, d, h, w, c % block))

    # --- tasks: blocks of positions, with their channels inside ---
    n, c, d, h, w = layer.from_layout(sch.get_loops(output))
    g, c = sch.split(c, [layer.groups, None])
    c, c_in_task = sch.split(c, [None, min(t.channels, c_in)])
    d, d_in_task = sch.split(d, [None, t.depth])
    h, h_in_task = sch.split(h, [None, t.height])
    of_task = [n, g, d, h, c] if first else [n, d, h, c]
    in_turn = t.ahead == "weights"
    inside = [c_in_task, d_in_task, h_in_task, w] if first else [d_in_task, h_in_task, w, g, c_in_task]
    sch.reorder(*of_task, *inside)
    _claim_whole_tiles(sch, layer, t, output)
    task = sch.fuse(*of_task)
    sch.compute_at(total, task, preserve_unit_loops=True)
    of_channels = _tile_input(sch, t, total)
    if in_turn:
        sch.compute_at(pad, task, preserve_unit_loops=True)
    else:
        sch.compute_at(weights, of_channels, preserve_unit_loops=True)
    _order_pad(sch, layer, pad)

    # --- spend the cores, also on what is done ahead ---
    sch.parallel(task)
    # after `parallel`, which refuses a decomposed block: sums start at the loops over channels and taps
    sch.decompose_reduction(total, sch.get_loops(total)[-9])
    if first:
        _, few = sch.split(w, [None, largest_divisor(layer.axes[2].size, t.lanes)])
        sch.unroll(few)
    if not in_turn:
        n, g, d, *_ = sch.get_loops(pad)
        sch.parallel(sch.fuse(n, g, d))
    g, c, m, *taps = sch.get_loops(weights)[-6:]
    c, c_in_block = sch.split(c, [None, block])
    m, m_in_turn = sch.split(m, [None, t.turn])
    sch.reorder(g, c, m, c_in_block, m_in_turn, *taps)
    _unroll_taps(sch, layer, taps)
    if in_turn:
        sch.parallel(sch.fuse(g, c, m))


def _tile_input(sch: Schedule, t: InputTiles, total: Any) -> Any:
    """Cut the loops ``(task, n, g, c, d, h, w, taps, m)`` into register tiles; return the loop over their channels."""
    n, g, c, d, h, w, t_d, t_h, t_w, m = sch.get_loops(total)[1:]
    h, h_in = sch.split(h, [None, t.rows])
    if t.vector == "channels":
        c, c_in, lane = sch.split(c, [None, t.vectors, t.lanes])
        w, w_in = sch.split(w, [None, t.scalars])
        tiles, weights_are_few = [c, d, h, w], t.vectors <= t.scalars * t.rows
    else:
        c, c_in = sch.split(c, [None, t.scalars])
        w, w_in, lane = sch.split(w, [None, t.vectors, t.lanes])
        tiles, weights_are_few = [d, h, w, c], t.scalars <= t.vectors * t.rows
    # the smaller side of factors stays in registers while the other passes by
    tile = [h_in, w_in, c_in] if weights_are_few else [c_in, h_in, w_in]
    sch.reorder(n, g, *tiles, m, t_d, t_h, t_w, *tile, lane)
    _vectorised(sch, [t_w, *tile], lane)

    # the sums live in registers, and leave them once
    leave = sch.cache_write(total, 0, "local")
    sch.reverse_compute_at(leave, tiles[-1], preserve_unit_loops=True)
    if t.vector == "channels":
        *_, c, _, h, w, lane = sch.get_loops(leave)
    else:
        *_, c, _, h, w = sch.get_loops(leave)
        w, lane = sch.split(w, [None, t.lanes])
    sch.vectorize(lane)
    for loop in (c, h, w):
        sch.unroll(loop)
    return tiles[0] if t.vector == "channels" else g


def _claim_whole_tiles(sch: Schedule, layer: ConvTranspose3d, t: InputTiles, output: Any) -> None:
    """Let each output element claim the whole tiles of its task, ragged ends included: no test in the inner loop."""
    block = sch.get(output)
    n, c, d, h, _ = layer.from_layout([v.var for v in block.iter_vars])
    c_in, zero = layer.c_in, tirx.const(0, n.ty.dtype)
    (read,) = block.reads
    shape = list(read.source.shape)
    group = tirx.floordiv(c, c_in)
    c = c if layer.groups == 1 else tirx.floormod(c, c_in)
    first_c = zero if t.channels >= c_in else tirx.floordiv(c, t.channels) * t.channels
    first_d, first_h = tirx.floordiv(d, t.depth) * t.depth, tirx.floordiv(h, t.height) * t.height
    lanes = t.lanes if t.vector == "channels" else 1
    first_c = tirx.floordiv(first_c, lanes)
    spans = [
        (n, n + 1),
        (group, group + 1) if layer.layout == "NCDHW" else (zero, shape[1]),
        (first_c, first_c + t.channels // lanes),
        (first_d, first_d + t.depth),
        (first_h, first_h + t.height),
        *((zero, extent) for extent in shape[5:]),
    ]
    claim(sch, output, 0, spans)


# --- dW ---


def _of_weight(sch: Schedule, layer: ConvTranspose3d, t: WeightTiles) -> None:
    names = ("pad", "copy", "part", "total", "whole", "output")
    pad, copy, part, total, whole, output = (sch.get_sblock(name) for name in names)
    in_channels, lanes = t.vector == "channels", t.lanes

    # --- layouts ---
    _lay_out_pad(sch, layer, t.vector, pad)
    if in_channels:
        sch.transform_layout(copy, ("write", 0), lambda n, g, c, d, h, w: (n, g, c // lanes, d, h, w, c % lanes))
        sch.transform_layout(
            total, ("write", 0), lambda s, g, c, m, i, j, k, o: (s, g, c // lanes, m, i, j, k, o, c % lanes)
        )
    else:
        sch.transform_layout(copy, ("write", 0), lambda n, g, c, d, h, w: (n, g, d, h, c, w))

    # --- tasks: blocks of channels, with the positions inside ---
    s, g, c, m, t_d, t_h, t_w, lane, n, d, h = sch.get_loops(total)
    c, c_tile = sch.split(c, [None, t.task_c])
    m, m_tile = sch.split(m, [None, t.task_m])
    m_tile, m_in = sch.split(m_tile, [None, t.scalars])
    t_w, t_w_in = sch.split(t_w, [None, t.taps])
    if in_channels:
        c_tile, c_in, c_lane = sch.split(c_tile, [None, t.vectors, lanes])
        tile, vector = [m_in, t_w_in, c_in, lane], c_lane
    else:
        c_tile, c_in = sch.split(c_tile, [None, t.vectors])
        tile, vector = [m_in, t_w_in, c_in], lane
    sch.reorder(s, g, c, m, n, d, h, c_tile, m_tile, t_d, t_h, t_w, *tile, vector)
    task = sch.fuse(s, g, c, m)
    _vectorised(sch, tile, vector)
    sch.compute_at(part, t_w, preserve_unit_loops=True)
    sums_begin = _tile_weight(sch, t, part)
    for block in (pad, copy):
        sch.compute_at(block, h, preserve_unit_loops=True)
    _order_pad(sch, layer, pad)
    if layer.layout == "NDHWC":
        *_, g, c, d, h, w = sch.get_loops(copy)
        sch.reorder(d, h, w, g, c)

    # --- spend the cores; dW is written when all sums are there ---
    sch.parallel(task)
    sch.decompose_reduction(part, sums_begin)
    sch.decompose_reduction(total, sch.get_loops(total)[1])
    c, m, *taps = sch.get_loops(output)
    c, c_in_block = sch.split(c, [None, largest_divisor(layer.c_in, lanes) if in_channels else 1])
    m, m_in_turn = sch.split(m, [None, t.turn])
    sch.reorder(c, m, c_in_block, m_in_turn, *taps)
    _unroll_taps(sch, layer, taps)
    sch.compute_at(whole, taps[-1])
    sch.parallel(sch.fuse(c, m))


def _tile_weight(sch: Schedule, t: WeightTiles, part: Any) -> Any:
    """Keep one register tile of a part in registers; return the first of its loops over positions."""
    n, d_o, h_o, g, c, m, t_d, t_h, t_w, lane, d, h, w = sch.get_loops(part)[-13:]
    outer = [n, d_o, h_o, g, t_d, t_h]
    if t.vector == "channels":
        c, c_lane = sch.split(c, [None, t.lanes])
        outer, tile, vector = [*outer, lane], [m, t_w, c], c_lane
    else:
        tile, vector = [m, t_w, c], lane
    sch.reorder(*outer, d, h, w, *tile, vector)
    _vectorised(sch, tile, vector)
    sch.set_scope(part, 0, "local")
    if t.vector == "channels":
        lanes = t.lanes
        sch.transform_layout(
            part,
            ("write", 0),
            lambda n, d, h, g, c, m, i, j, k, o: (n, d, h, g, c // lanes, m, i, j, k, o, c % lanes),
        )
    return d


def _vectorised(sch: Schedule, tile: list[Any], vector: Any) -> None:
    sch.vectorize(vector)
    for loop in tile:
        sch.unroll(loop)


# --- dB ---


def _of_bias(sch: Schedule, layer: ConvTranspose3d) -> None:
    part = sch.get_sblock("part")
    n, s, m, lane, k = sch.get_loops(part)
    if layer.layout == "NCDHW":
        sch.vectorize(lane)
        leave = sch.cache_write(part, 0, "local")
        sch.reverse_compute_at(leave, m)
        sch.vectorize(sch.get_loops(leave)[-1])
        sch.reorder(k, lane)
        task = sch.fuse(n, s, m)
    else:  # a position's channels lie side by side
        sch.reorder(k, m)
        task = sch.fuse(n, s)
    sch.parallel(task)
    sch.decompose_reduction(part, k)


# --- what they share ---


def _lay_out_pad(sch: Schedule, layer: ConvTranspose3d, vector: str, pad: Any) -> None:
    """Lay dY out for its reader: vectors of a row find its phases apart, broadcast values have it as it comes."""
    stride = layer.axes[2].stride
    if vector == "row":
        sch.transform_layout(pad, ("write", 0), lambda n, g, m, d, h, w: (n, g, d, h, m, w % stride, w // stride))
    elif layer.layout == "NCDHW":
        sch.transform_layout(pad, ("write", 0), lambda n, g, m, d, h, w: (n, g, d, h, m, w))
    else:
        sch.transform_layout(pad, ("write", 0), lambda n, g, m, d, h, w: (n, g, d, h, w, m))


def _order_pad(sch: Schedule, layer: ConvTranspose3d, pad: Any) -> None:
    """Copy dY in the order in which it is stored."""
    n, g, m, d, h, w = sch.get_loops(pad)[-6:]
    if layer.layout == "NCDHW":
        sch.reorder(n, g, d, h, m, w)
    else:
        sch.reorder(n, d, h, w, g, m)


def _unroll_taps(sch: Schedule, layer: ConvTranspose3d, taps: list[Any]) -> None:
    count = 1
    for loop, axis in zip(reversed(taps), reversed(layer.axes), strict=True):
        count *= axis.kernel
        if count <= _MOST_UNROLLED:
            sch.unroll(loop)
