"""Schedules for GPUs: one kernel a layer, its tiles decided by arithmetic or sampled by the tuner.

A block of threads owns a tile of output channels and positions, in all phases, and writes it once; nothing
goes through device memory in between. Four families share the first and the last step:

*direct*
    Each thread sums its own tile in registers, from X and W as they lie in memory. Right where little is shared:
    depthwise layers, few output channels, hundreds of phases. Legal for every spec.
*staged*
    The threads copy what the tile needs of X and W, some input channels at a time, to shared memory: an implicit
    matrix product, one a phase, or one for all phases where they read the same columns (k2 s2).
*split*
    Threads share the input channels of one tile as well, and add up at the end, in shared memory: for small
    spatial sizes with many channels, where tiles alone are too few to fill the device.
*matrix*
    As *staged*, for the matrix instructions of tensor cores: warps own the tiles, sum them in fragments, and hand
    them to their threads through shared memory, 16 channels at a time. For float16 and bfloat16, where the input
    channels of a group are whole fragments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schedules.gpu_tiles import EDGE, PAD, WARP, GpuEstimate, GpuTiles, baseline, candidates
from schedules.wmma import intrinsics

if TYPE_CHECKING:
    from tvm.s_tir import Schedule

    from opcompile.spec import ConvTranspose3d

__all__ = ["GpuEstimate", "GpuTiles", "baseline", "candidates", "packed", "schedule"]


def packed(spec: ConvTranspose3d, tiles: GpuTiles, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How the declared W of ``shape`` is laid out for these tiles: a view of it, and an order of the view's axes.

    As for a CPU: W ``(C, M/g, kD, kH, kW)`` becomes ``(g, M/block, kD, kH, kW, C/g, block)``, with a block's
    channels side by side; a layer that reads no weight leaves it as it is.
    """
    if not spec.terms:
        return shape, tuple(range(5))
    c, m, *kernel = shape
    view = (spec.groups, c // spec.groups, m // tiles.channels, tiles.channels, *kernel)
    return view, (0, 2, 4, 5, 6, 1, 3)


def schedule(sch: Schedule, spec: ConvTranspose3d, tiles: GpuTiles) -> None:
    """Apply the moves to the function of `opcompile.declare_flat`, declared for these tiles; legal for every spec."""
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}
    names = [name for name in blocks if name.startswith("phase")]
    _lay_out(sch, spec, tiles, [blocks[name] for name in names])
    if tiles.family == "matrix":
        for name in names:
            _in_fragments(sch, tiles, blocks[name])
    summed = {name: _split_sums(sch, tiles, blocks[name]) for name in names} if tiles.family == "split" else {}

    # --- a block of threads owns a tile, and writes it ---
    n, g, m, q, *phases = sch.get_loops(blocks["output"])
    m, m_in = sch.split(m, [None, tiles.channels])
    q, q_in = sch.split(q, [None, tiles.positions])
    grid, own = ([n, g, m, q, *phases], []) if tiles.apart else ([n, g, m, q], phases)
    sch.reorder(*grid, m_in, q_in, *own)
    block = sch.fuse(*grid)
    thread, home, inside = _deal(sch, tiles, m_in, q_in)
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    sch.compute_at(blocks["result"], home, preserve_unit_loops=True)
    sch.set_scope(blocks["result"], 0, "local")
    vectors = _whole_vectors(spec, tiles)
    for loop in (*_own(sch, blocks["result"], home), *inside, *(own[:2] if vectors else own)):
        sch.unroll(loop)
    if vectors:
        sch.vectorize(own[2])

    # --- the sums ---
    for name in names:
        columns = blocks[name.replace("phase", "columns")]
        if tiles.family == "split":
            _sum_in_groups(sch, tiles, blocks[name], summed[name], columns, block, home)
        elif tiles.family == "matrix":
            _sum_in_fragments(sch, tiles, spec.dtype, blocks[name], columns, block, inside[0])
        else:
            _sum_in_registers(sch, tiles, blocks[name], columns, thread)


def _lay_out(sch: Schedule, spec: ConvTranspose3d, t: GpuTiles, phases: list[Any]) -> None:
    if not phases:
        return
    c_in = spec.channels_in // spec.groups

    def blocked(c: Any, m: Any, kd: Any, kh: Any, kw: Any) -> tuple[Any, ...]:
        return c // c_in, m // t.channels, kd, kh, kw, c % c_in, m % t.channels

    sch.transform_layout(phases[0], ("read", 1), blocked)


def _deal(sch: Schedule, t: GpuTiles, m: Any, q: Any) -> tuple[Any, Any, list[Any]]:
    """Deal the tile ``m x q`` out to the threads.

    Returns the loop over the threads, the loop where a thread begins to write, and the loops that it unrolls.
    """
    if t.family == "matrix":
        return _deal_to_warps(sch, t, m, q)
    if t.family == "split":
        # all groups take part in writing: neighbours take neighbouring elements, in turns
        both = [m, q] if t.lanes == "positions" else [q, m]
        sch.reorder(*both)
        turns, thread = sch.split(sch.fuse(*both), [None, t.threads])
        sch.reorder(thread, turns)
        return thread, turns, []
    m, m_in = sch.split(m, [t.threads_m, t.tile_m])
    q, q_in = sch.split(q, [t.threads_q, t.tile_q])
    threads = [m, q] if t.lanes == "positions" else [q, m]
    sch.reorder(*threads, m_in, q_in)
    thread = sch.fuse(*threads)
    return thread, thread, [m_in, q_in]


def _deal_to_warps(sch: Schedule, t: GpuTiles, m: Any, q: Any) -> tuple[Any, Any, list[Any]]:
    """Deal fragments to warps; the threads of a warp write one after the other."""
    m, fragments, m_in = sch.split(m, [t.threads_m, t.tile_m // EDGE, EDGE])
    q, q_in = sch.split(q, [t.threads_q, EDGE])
    far, near = (m_in, q_in) if t.lanes == "positions" else (q_in, m_in)
    turns, far = sch.split(far, [None, WARP // EDGE])
    sch.reorder(m, q, fragments, far, near, turns)
    sch.bind(sch.fuse(m, q), "threadIdx.y")
    # left to the compiler, whose copies share one place for the sums
    sch.annotate(fragments, "pragma_unroll_explicit", 0)
    return sch.fuse(far, near), turns, [fragments]


def _whole_vectors(spec: ConvTranspose3d, t: GpuTiles) -> bool:
    """Whether the phases of a row, neighbours in Y, can be written as one vector: never cut, always aligned."""
    row = spec.axes[2]
    return not t.apart and spec.layout == "NCDHW" and row.stride in (2, 4) and row.out % row.stride == 0


def _sum_in_registers(sch: Schedule, t: GpuTiles, phase: Any, columns: Any, thread: Any) -> None:
    sch.compute_at(phase, thread, preserve_unit_loops=True)
    sch.set_scope(phase, 0, "local")
    n, g, m, *f, q, t_d, t_h, t_w, c = _own(sch, phase, thread)
    if t.family == "staged":
        c, c_in = sch.split(c, [None, t.chunk])
        taps = [t_d, t_h, t_w, c]
    else:
        c_in, taps = c, [t_d, t_h, t_w]
    sch.reorder(n, g, *taps, c_in, m, *f, q)
    for loop in (m, *f, q):
        sch.unroll(loop)
    if not _affine(sch, columns):
        sch.set_scope(columns, 0, "local")
        _to_registers(sch, columns, c_in, 1)
        sch.decompose_reduction(phase, t_d)
        return
    weights = sch.cache_read(phase, 1, "local", [phase])
    if t.family == "staged":
        staged = sch.cache_read(weights, 0, "shared", [weights])
        elements = sch.cache_read(phase, 0, "local", [phase])
        sch.set_scope(columns, 0, "shared")
        _to_registers(sch, elements, c_in, t.tile_q)
        _to_registers(sch, weights, c_in, t.tile_m)
        _to_shared(sch, t, columns, c, 1)
        _to_shared(sch, t, staged, c, _vector(t.channels))
    else:
        sch.set_scope(columns, 0, "local")
        _to_registers(sch, columns, c_in, 1)
        _to_registers(sch, weights, c_in, t.tile_m)
    sch.decompose_reduction(phase, t_d)


def _affine(sch: Schedule, columns: Any) -> bool:
    """Whether the taps of a phase are an affine function of its axes: they are not where X is read by phase.

    Only of affine reads does `compute_at` know which part of W to copy.
    """
    return len(sch.get(columns).iter_vars) == len(("n", "g", "td", "th", "tw", "c", "q"))


def _to_registers(sch: Schedule, copy: Any, at: Any, length: int) -> None:
    """Copy at loop ``at``, in vectors where the innermost ``length`` elements are whole ones."""
    sch.compute_at(copy, at, preserve_unit_loops=True)
    *others, last = _own(sch, copy, at)
    for loop in others:
        sch.unroll(loop)
    if _vector(length) > 1:
        last, lane = sch.split(last, [None, _vector(length)])
        sch.vectorize(lane)
    sch.unroll(last)


def _own(sch: Schedule, block: Any, at: Any) -> list[Any]:
    """Return the loops of ``block`` inside of loop ``at``."""
    variable, loops = sch.get(at).loop_var, sch.get_loops(block)
    (place,) = (i for i, loop in enumerate(loops) if sch.get(loop).loop_var.same_as(variable))
    return list(loops[place + 1 :])


def _to_shared(sch: Schedule, t: GpuTiles, copy: Any, at: Any, vector: int) -> None:
    """Copy at loop ``at``, all threads together, neighbours taking neighbours."""
    sch.compute_at(copy, at, preserve_unit_loops=True)
    fused = sch.fuse(*_own(sch, copy, at))
    _, *threads, lane = sch.split(fused, [None, *reversed(t.block), vector])
    if vector > 1:
        sch.vectorize(lane)
    for loop, index in zip(reversed(threads), "xy", strict=False):
        sch.bind(loop, f"threadIdx.{index}")


def _vector(length: int) -> int:
    """How many of ``length`` neighbouring elements to move at once."""
    return next(width for width in (4, 2, 1) if length % width == 0)


# --- split: several groups of threads for one tile ---


def _split_sums(sch: Schedule, t: GpuTiles, phase: Any) -> Any:
    """Cut a phase's sums into one part a group of threads. Returns the block of the parts."""
    *_, c = sch.get_loops(phase)
    group, _ = sch.split(c, [t.split, None])
    return sch.rfactor(group, 0)


def _sum_in_groups(sch: Schedule, t: GpuTiles, phase: Any, parts: Any, columns: Any, block: Any, home: Any) -> None:
    sch.compute_at(phase, home, preserve_unit_loops=True)
    sch.set_scope(phase, 0, "local")
    sch.set_scope(parts, 0, "shared")
    leave = sch.cache_write(parts, 0, "local")
    sch.compute_at(leave, block, preserve_unit_loops=True)
    group, n, g, m, *f, q = _own(sch, leave, block)
    m, m_in = sch.split(m, [t.threads_m, t.tile_m])
    q, q_in = sch.split(q, [t.threads_q, t.tile_q])
    # neighbouring threads read neighbouring weights, whatever they will write
    sch.reorder(n, g, group, q, m, m_in, *f, q_in)
    thread = sch.fuse(group, q, m)
    sch.bind(thread, "threadIdx.x")
    for loop in (m_in, *f, q_in):
        sch.unroll(loop)
    sch.compute_at(parts, thread, preserve_unit_loops=True)
    *spatial, t_d, t_h, t_w, c = _own(sch, parts, thread)
    sch.reorder(t_d, t_h, t_w, c, *spatial)
    for loop in spatial:
        sch.unroll(loop)
    weights = sch.cache_read(parts, 1, "local", [parts])
    sch.set_scope(columns, 0, "local")
    _to_registers(sch, columns, c, 1)
    _to_registers(sch, weights, c, t.tile_m)
    sch.decompose_reduction(parts, t_d)


# --- matrix: fragments of warps ---


def _in_fragments(sch: Schedule, t: GpuTiles, phase: Any) -> None:
    """Lay a phase out as fragments, told apart by warp and by place in the warp."""
    own = t.tile_m // EDGE

    def fragments(n: Any, g: Any, m: Any, *fq: Any) -> tuple[Any, ...]:
        *f, q = fq
        return (n, g, *f, m // (EDGE * own), m // EDGE % own, q // EDGE, m % EDGE, q % EDGE)

    sch.transform_layout(phase, ("write", 0), fragments)


def _sum_in_fragments(sch: Schedule, t: GpuTiles, dtype: str, phase: Any, columns: Any, block: Any, step: Any) -> None:
    """Sum in matrix instructions; ``step`` is the loop that hands one fragment of channels to the threads."""
    does = intrinsics(dtype)
    leave = sch.cache_write(phase, 0, "wmma.accumulator")
    sch.compute_at(leave, step, preserve_unit_loops=True)
    sch.set_scope(leave, 0, "shared")
    sch.compute_at(phase, block, preserve_unit_loops=True)
    n, g, m, *f, q, t_d, t_h, t_w, c = _own(sch, phase, block)
    warp, m, m_in = sch.split(m, [t.threads_m, t.tile_m // EDGE, EDGE])
    q, q_in = sch.split(q, [t.threads_q, EDGE])
    c, c_step, c_in = sch.split(c, [None, t.chunk // EDGE, EDGE])
    sch.reorder(n, g, warp, q, t_d, t_h, t_w, c, c_step, *f, m, m_in, q_in, c_in)
    sch.bind(sch.fuse(warp, q), "threadIdx.y")
    for loop in (*f, m):
        sch.unroll(loop)
    elements = sch.cache_read(phase, 0, "wmma.matrix_b", [phase])
    staged = sch.cache_read(phase, 1, "shared", [phase])
    sch.set_scope(columns, 0, "shared")
    sch.compute_at(elements, c_step, preserve_unit_loops=True)
    for copy, vector in ((columns, 1), (staged, _vector(t.channels))):
        _to_shared(sch, t, copy, c, vector)
        # rows that begin in different banks
        sch.storage_align(copy, 0, -2, EDGE, PAD)
    fill = sch.decompose_reduction(phase, t_d)
    *outer, m, _ = _own(sch, leave, step)
    for loop in outer:
        sch.unroll(loop)
    sch.tensorize(m, does["store"])
    sch.tensorize(_own(sch, elements, c_step)[-2], does["load"])
    sch.tensorize(sch.get_loops(fill)[-2], does["fill"])
    sch.tensorize(m_in, does["multiply"])
