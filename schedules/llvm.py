"""Schedules for CPUs: register tiles over the phases, decided by arithmetic or sampled by the tuner.

Every schedule here is the same straight line of moves with other numbers (`Tiles`):

* X is copied, zero-padded, to ``(n, g, d, h, c, w)``, or tile by tile where tiles read the same
  positions in all taps: the reduction over channels then walks through neighbouring cache lines.
* A task is a block of positions ``(n, g, channels, planes of qD, rows of qH)``. It computes all
  phases of them, tile by tile, and then writes the interleaved output while the phases are
  still in cache.
* A register tile holds ``vectors`` vectors times ``scalars`` broadcast values (times ``rows``).
  With ``vector="channels"`` the vectors run along output channels and the scalars are columns of
  X: right when there are many channels, however few the positions. Else the scalars are weights:
  right for few channels, and when writing the output matters most, for the tile then needs no
  transposition. Vectors run along each row (``"row"``), or along all rows of a task laid end to end
  (``"line"``), which wastes less where rows are short or not a multiple of a vector.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import _ffi_api
from tvm_ffi import structural_map

from schedules.tiles import Estimate, Tiles, baseline, candidates, factors

if TYPE_CHECKING:
    from tvm.s_tir import Schedule

    from opcompile.spec import Axis, ConvTranspose3d

__all__ = ["Estimate", "Tiles", "baseline", "candidates", "packed", "schedule", "space"]

Span = tuple[Any, Any]

# Marks a loop over columns of the copy of X.
_VECTORS = "opcompile.vectors"
# The block that moves the sums of one phase, where each has a block, out of registers.
_LEAVING = re.compile(r"phase_\d+_\d+_\d+_local")


def packed(spec: ConvTranspose3d, tiles: Tiles, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How the declared W of ``shape`` is laid out for these tiles: a view of it, and an order of the view's axes.

    W ``(C, M/g, kD, kH, kW)``, viewed as ``(g, C/g, M/block, block, kD/pD, pD, ...)``, becomes
    ``(g, M/block, pD, pH, pW, kD/pD, kH/pH, kW/pW, C/g, block)``: the taps of a phase lie together
    (`_periods`). A layer whose taps all fall beyond the output reads no weight: W stays as it is.
    """
    if not spec.terms:
        return shape, tuple(range(5))
    c, m, *kernel = shape
    taps = [size for k, p in zip(kernel, _periods(spec, kernel), strict=True) for size in (k // p, p)]
    view = (spec.groups, c // spec.groups, m // tiles.block, tiles.block, *taps)
    return view, (0, 2, 5, 7, 9, 4, 6, 8, 1, 3)


def _periods(spec: ConvTranspose3d, kernel: Sequence[int]) -> list[int]:
    """How far apart the taps of a phase are along each axis, where they divide the kernel; else 1, which leaves it."""
    return [a.tap_step if k % a.tap_step == 0 else 1 for k, a in zip(kernel, spec.axes, strict=True)]


def schedule(sch: Schedule, spec: ConvTranspose3d, tiles: Tiles) -> None:
    """Apply the moves to the declared function; legal for every spec."""
    phases = [b for b in sch.get_child_blocks(sch.get_sblock("root")) if sch.get(b).name_hint.startswith("phase")]
    output = sch.get_sblock("output")
    as_axes = [sch.get(p).name_hint for p in phases] == ["phase"]

    # --- layouts ---
    wide = sch.get_sblock("wide") if phases and spec.dtype != spec.sum_dtype else None
    if wide and tiles.vector == "channels":  # a vector of weights is widened as it is loaded
        sch.compute_inline(wide)
        wide = None
    if phases:  # there are none, and no padded copy, where every tap falls beyond the output
        _lay_out(sch, spec, tiles, phases, wide, as_axes)

    # --- tasks: rows of positions, with their phases inside ---
    axes = sch.get_loops(output)
    n, m, *spatial = axes if spec.layout == "NCDHW" else [axes[0], axes[-1], *axes[1:-1]]
    split = [sch.split(loop, [None, axis.stride]) for loop, axis in zip(spatial, spec.axes, strict=True)]
    (q_d, f_d), (q_h, f_h), (q_w, f_w) = split
    g, m = sch.split(m, [spec.groups, None])
    m, m_in = sch.split(m, [None, min(tiles.task, spec.channels_out // spec.groups)])
    q_d, q_d_in = sch.split(q_d, [None, tiles.depth])
    q_h, q_h_in = sch.split(q_h, [None, tiles.height])
    row = [q_d_in, f_d, q_h_in, f_h, q_w, f_w]
    if spec.layout == "NCDHW":
        of_task, inside = [n, g, m, q_d, q_h], [m_in, *row]
    else:  # all groups: the channels of one would be a few bytes of each cache line
        of_task, inside = [n, m, q_d, q_h], [*row, g, m_in]
    sch.reorder(*of_task, *inside)
    _claim_whole_tiles(sch, spec, tiles, output, as_axes)
    task = sch.fuse(*of_task)
    for p in phases:
        if tiles.line:
            _claim_whole_lines(sch, p)
        sch.compute_at(p, task, preserve_unit_loops=True)
        _tile(sch, tiles, p, sch.get_loops(p)[1:])
    if phases and tiles.copy == "task":
        sch.compute_at(sch.get_sblock("pad"), task, preserve_unit_loops=True)
    if wide:
        sch.compute_at(wide, task, preserve_unit_loops=True)
        *_, c, block = sch.get_loops(wide)
        _, lane = sch.split(sch.fuse(c, block), [None, tiles.lanes])
        sch.vectorize(lane)

    # --- spend the cores; a copy of all X is a task a plane ---
    sch.parallel(task)
    for p in phases:
        # after `parallel`, which refuses a decomposed block: sums start at the loops over the taps
        sch.decompose_reduction(p, sch.get_loops(p)[-9])
    if not as_axes:
        for loop in (f_d, f_h, f_w):
            sch.unroll(loop)
    if phases:
        n, g, c, d, h, *row = sch.get_loops(sch.get_sblock("pad"))[-6:]
        if tiles.line:
            pitch = int(sch.get(sch.get_sblock("pad")).annotations["pitch"])
            row = sch.split(row[0], [None, _unit(spec, tiles) if _in_tiles(sch, spec, tiles) else pitch])
        sch.reorder(n, g, d, h, c, *row)
        if tiles.copy == "whole":
            sch.parallel(sch.fuse(n, g, d))
        _copy_by_vectors(sch, spec, tiles, row[-1])


def space(spec: ConvTranspose3d, choices: Sequence[Tiles], decision: int | None = None) -> Callable[[Schedule], None]:
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


def _lay_out(
    sch: Schedule, spec: ConvTranspose3d, t: Tiles, phases: list[Any], wide: Any | None, as_axes: bool
) -> None:
    c_in = spec.channels_in // spec.groups

    p_d, p_h, p_w = _periods(spec, [int(k) for k in sch.get(phases[0]).reads[1].source.shape[2:]])

    def blocked(c: Any, m: Any, kd: Any, kh: Any, kw: Any) -> tuple[Any, ...]:
        taps = (kd % p_d, kh % p_h, kw % p_w, kd // p_d, kh // p_h, kw // p_w)
        return c // c_in, m // t.block, *taps, c % c_in, m % t.block

    _lay_out_pad(sch, spec, t)
    sch.transform_layout(phases[0], ("read", 1), blocked)
    if wide:
        sch.transform_layout(wide, ("read", 0), blocked)
        sch.transform_block_layout(wide, blocked)
    if t.vector != "channels":
        return
    # an index map is asked for its number of arguments, so each rank has its own
    six: Any = lambda n, g, m, d, h, w: (n, g, m // t.lanes, d, h, w, m % t.lanes)  # noqa: E731
    nine: Any = lambda n, g, m, i, j, k, d, h, w: (n, g, m // t.lanes, i, j, k, d, h, w, m % t.lanes)  # noqa: E731
    for p in phases:
        sch.transform_layout(p, ("write", 0), nine if as_axes else six)


def _lay_out_pad(sch: Schedule, spec: ConvTranspose3d, t: Tiles) -> None:
    pad = sch.get_sblock("pad")
    length = int(sch.get(pad).writes[0].source.shape[-1])
    if _tiled(spec, t, length):
        # what a register tile reads lies together, in the order in which it is read
        of_tile: Any = lambda n, g, c, d, h, w: (n, g, d, h, w // t.columns, c, w % t.columns)  # noqa: E731
        sch.transform_layout(pad, ("write", 0), of_tile)
        return
    sch.transform_layout(pad, ("write", 0), lambda n, g, c, d, h, w: (n, g, d, h, c, w))
    if t.line:  # each channel's line begins where a vector may
        sch.storage_align(pad, 0, 4, t.lanes, 0)


def _reach(axis: Axis) -> int:
    """How many elements of X, zeros around it included, the positions of an axis read."""
    first, last = axis.reads
    return last - first + axis.positions


def _tiled(spec: ConvTranspose3d, t: Tiles, length: int) -> bool:
    one_offset = all(first == last for first, last in (axis.reads for axis in spec.axes[1:]))
    return bool(t.line) and one_offset and length % t.columns == 0


def _in_tiles(sch, spec, t):
    return len(sch.get(sch.get_sblock("pad")).writes[0].source.shape) > 6


def _unit(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many columns of a row never cross from one register tile into the next, where these are laid end to end."""
    return math.gcd(_reach(spec.axes[2]), t.lanes)


def _copy_by_vectors(sch: Schedule, spec: ConvTranspose3d, t: Tiles, columns: Any) -> None:
    """Say which columns of the copy are X's, and how wide a vector of them may be: `finish` makes the vectors."""
    first, _ = spec.axes[2].reads
    extent = int(sch.get(columns).extent)
    low, high = min(max(0, -first), extent), max(0, min(extent, spec.axes[2].size - first))
    if low < high and spec.layout == "NCDHW":
        sch.annotate(columns, _VECTORS, [low, high, t.lanes])


def finish(module: tvm.IRModule, spec: ConvTranspose3d, tiles: Tiles) -> tvm.IRModule:
    """What a schedule cannot say: rows of X are copied by vectors, and a task asks early for the part of Y it writes.

    TVM splits no loop that begins elsewhere than at 0, and the columns between two pads are such; LLVM would unroll
    short rows into scalars, a tenth of the time of a layer with few channels.
    """
    ((name, function),) = module.functions.items()
    function = structural_map(function, (tirx.For, _in_vectors))
    y = function.params[-1]
    if tiles.vector == "channels" or spec.layout == "NCDHW":  # else a vector's elements lie apart
        function = structural_map(function, (tirx.For, lambda loop: _fetching(loop, spec, tiles, y)))
    return tvm.IRModule({name.name_hint: function})


def _in_vectors(loop: tirx.For) -> tirx.Stmt:
    if _VECTORS not in loop.annotations:
        return loop
    low, high, widest = (int(i) for i in loop.annotations[_VECTORS])
    parts, at = [], 0
    for end, lanes in ((low, 1), (low + (high - low) // widest * widest, widest), (high, high), (int(loop.extent), 1)):
        lanes = min(lanes, end - at)
        if lanes > 0:
            parts.append(_columns(loop, at, (end - at) // lanes, lanes))
        at = max(at, end)
    return parts[0] if len(parts) == 1 else tirx.SeqStmt(parts)


def _fetching(loop: tirx.For, spec: ConvTranspose3d, t: Tiles, y: Any) -> tirx.Stmt:
    """Where a vector of sums leaves its registers, ask for a line of Y that the task will write when it is through.

    The vectors of all phases of a row ask for as many lines as they fill, each for another one.
    """
    block = loop.body.block if isinstance(loop.body, s_tir.SBlockRealize) else None
    if loop.kind != tirx.ForKind.VECTORIZED or block is None or not _LEAVING.fullmatch(block.name_hint):
        return loop
    first = {loop.loop_var: tirx.const(0, loop.loop_var.ty.dtype)}
    n, g, m, d, h, w, *lane = [_with(value, first) for value in loop.body.iter_values]
    phase = [int(f) for f in block.name_hint.split("_")[1:4]]
    if t.vector == "channels":
        m *= t.lanes
    else:
        w += phase[2] * t.lanes // spec.axes[2].stride
    if t.line:
        pitch = _reach(spec.axes[2])
        h, w = h * t.height + tirx.floordiv(w, pitch), tirx.floormod(w, pitch)
    o = [i * axis.stride + f for i, axis, f in zip((d, h, w), spec.axes, phase, strict=True)]
    if t.vector == "channels" and spec.layout == "NCDHW":  # each of the vector's channels is a line of its own
        m += tirx.floormod(o[2], t.lanes)
    m += g * (spec.channels_out // spec.groups)
    line = y[(n, m, *o)] if spec.layout == "NCDHW" else y[(n, *o, m)]
    hints = [tirx.const(i, "int32") for i in (0, 2, 1)]  # to read, into the second cache, of data
    fetch = tirx.call_llvm_intrin("void", "llvm.prefetch", tirx.address_of(line), *hints)
    return tirx.SeqStmt([loop, tirx.Evaluate(fetch)])


def _with(tree: Any, values: Mapping[tirx.Var, Any]) -> Any:
    """``tree`` with variables replaced."""
    return structural_map(tree, (tirx.Var, lambda var: values.get(var, var)))


def _columns(loop: tirx.For, first: int, count: int, lanes: int) -> tirx.Stmt:
    """The columns from ``first`` on, as ``count`` vectors."""
    kind = loop.loop_var.ty.dtype
    outer, lane = (tirx.Var(f"{loop.loop_var.name}_{part}", kind) for part in ("vector", "lane"))
    column = outer * lanes + lane + first
    body = _with(loop.body, {loop.loop_var: column})
    zero, one = tirx.const(0, kind), tirx.const(1, kind)
    inner = tirx.For(lane, zero, tirx.const(lanes, kind), tirx.ForKind.VECTORIZED if lanes > 1 else tirx.ForKind.SERIAL, body)
    return tirx.For(outer, zero, tirx.const(count, kind), tirx.ForKind.SERIAL, inner)


def _tile(sch: Schedule, t: Tiles, phase: Any, loops: list[Any]) -> None:
    """Cut one phase's loops ``(n, g, m, [phases,] d, h, w, taps, c)`` into register tiles."""
    n, g, m, *of_phases, d, h, w, t_d, t_h, t_w, c = loops
    h, h_in = sch.split(h, [None, t.rows])
    c, c_in = sch.split(c, [None, t.chunk])
    if t.vector == "channels":
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
    sch.reorder(n, g, *of_phases, *tiles, c, t_d, t_h, t_w, c_in, *tile, lane)
    sch.vectorize(lane)
    for loop in tile:
        sch.unroll(loop)

    # the sums live in registers, and leave them once
    leave = sch.cache_write(phase, 0, "local")
    sch.reverse_compute_at(leave, tiles[-1], preserve_unit_loops=True)
    if t.vector == "channels":
        *_, h, w, lane = own = sch.get_loops(leave)[-7 - len(of_phases) :]
    else:
        *_, h, w = own = sch.get_loops(leave)[-6 - len(of_phases) :]
        w, lane = sch.split(w, [None, t.lanes])
    sch.vectorize(lane)
    for loop in (own[2], h, w):
        sch.unroll(loop)


def _claim_whole_tiles(sch: Schedule, spec: ConvTranspose3d, t: Tiles, output: Any, as_axes: bool) -> None:
    """Let each output element claim the whole tiles of its task.

    `compute_at` shrinks a phase to what the output reads, which at the ragged end is less than a
    tile, and would put that test into the inner loop.
    """
    block = sch.get(output)
    of = [v.var for v in block.iter_vars]
    n, m, *o = of if spec.layout == "NCDHW" else [of[0], of[-1], *of[1:-1]]
    index = n.ty.dtype
    m_out = spec.channels_out // spec.groups
    q = [tirx.floordiv(i, a.stride) for i, a in zip(o, spec.axes, strict=True)]
    if t.task >= m_out:
        first_m = tirx.const(0, index)
    else:  # without groups the remainder is m itself, which a ragged last task needs to see
        first_m = tirx.floordiv(m if spec.groups == 1 else tirx.floormod(m, m_out), t.task) * t.task
    first_d = tirx.floordiv(q[0], t.depth) * t.depth

    def one(start: Any) -> Span:
        return (start, start + 1)

    def whole(extent: Any) -> Span:
        return (tirx.const(0, index), extent)

    height = tirx.floordiv(q[1], t.height)
    rows = one(height) if t.line else (height * t.height, (height + 1) * t.height)

    for i, read in enumerate(block.reads):
        if not read.source.name.startswith("phase"):
            continue
        shape = list(read.source.shape)
        in_channels = t.vector == "channels"
        channels = (first_m, first_m + t.task)
        if in_channels:
            first_block = tirx.floordiv(first_m, t.lanes)
            channels = (first_block, first_block + t.task // t.lanes)
        groups = one(tirx.floordiv(m, m_out)) if spec.layout == "NCDHW" else whole(shape[1])
        spans = [one(n), groups, channels]
        if as_axes:
            spans += [one(tirx.floormod(k, a.stride)) for k, a in zip(o[:2], spec.axes[:2], strict=True)]
            spans += [whole(shape[5])]
        spans += [
            (first_d, first_d + t.depth),
            rows,
            whole(shape[-2] if in_channels else shape[-1]),
        ]
        if in_channels:
            spans.append(whole(shape[-1]))
        _claim(sch, output, i, spans)


def _claim_whole_lines(sch: Schedule, phase: Any) -> None:
    """Let each sum claim the lines of X that it reads from whole, so that they are copied row by row."""
    pad = sch.get(phase).reads[0]
    spans = [(r.min, r.min + r.extent) for r in pad.region[:-1]]
    _claim(sch, phase, 0, [*spans, (tirx.const(0, pad.source.shape[-1].ty.dtype), pad.source.shape[-1])])


def _claim(sch: Schedule, block: Any, read: int, spans: Sequence[Span]) -> None:
    """Say that ``block`` reads ``spans`` (first and end of each axis) of its operand number ``read``."""
    claim = tirx.IndexMap(
        initial_indices=[v.var for v in sch.get(block).iter_vars],
        final_indices=[end for span in spans for end in span],
        inverse_index_map=None,
    )
    # the Python method demands as many ranges as the block has iterators; the function below it does not
    _ffi_api.ScheduleAnnotateBufferAccess(sch, block, read, 0, claim)
