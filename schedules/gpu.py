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
    spatial sizes with many channels, where tiles alone are too few to fill the device. Of a derivative they share
    positions, which are staged before.
*matrix*
    As *staged*, for the matrix instructions of tensor cores: warps own the tiles, sum them in fragments, and hand
    them to their threads through shared memory, 16 channels at a time. Factors are copied there in vectors of
    channels. For the types of a device's matrix instructions, where the input channels of a group are whole
    fragments.

*staged* and *matrix* may fetch the next channels to registers while they multiply (``ahead``): where a tap has several
chunks of them.

The derivatives are the same sums under other names: `sums` makes a kernel of either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import DataType, tirx

from schedules.gpu_tiles import (
    EDGE,
    FILLS,
    PAD,
    PAD_X,
    WARP,
    GpuEstimate,
    GpuTiles,
    at_once,
    baseline,
    candidates,
)
from schedules.matrix import HELD_AS, HOISTED, SCOPE, WIDEST, Unit, intrinsics

if TYPE_CHECKING:
    from tvm.s_tir import Schedule

    from opcompile.spec import ConvTranspose3d

__all__ = ["FILLS", "HOISTED", "GpuEstimate", "GpuTiles", "baseline", "candidates", "packed", "schedule"]

# Loops over the taps of an axis carry its number under this name, where phases are apart and may have fewer.
TAPS_OF = "opcompile_taps_of"
# Loops over what one thread copies of a chunk carry this name, where registers hold it meanwhile.
TURNS = "opcompile_turns"
# Products of a loop that stays one: some 64 instructions hide what the loop itself costs.
_UNROLLED = 64
# Of these, what a matrix of 16x16x16 counts as: two instructions, which take more than one cycle each.
_INSTRUCTIONS = 8
# Bytes of X that stay in the second cache of a large GPU, which holds 40 to 60 MiB.
_STAYS = 32 << 20
# Elements by which rows in shared memory are set apart, where neighbouring threads write them: a vector.
_SPREAD = 4


def packed(spec: ConvTranspose3d, tiles: GpuTiles, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How the declared W of ``shape`` is laid out for these tiles: a view of it, and an order of the view's axes.

    As for a CPU: W ``(C, M/g, kD, kH, kW)`` becomes ``(g, M/block, kD, kH, kW, C/g, block)``, with a block's
    channels side by side; a layer that reads no weight leaves it as it is.
    """
    if not spec.terms and not tiles.apart:
        return shape, tuple(range(5))
    c, m, *kernel = shape
    view = (spec.groups, c // spec.groups, m // tiles.channels, tiles.channels, *kernel)
    return view, (0, 2, 4, 5, 6, 1, 3)


def schedule(sch: Schedule, spec: ConvTranspose3d, tiles: GpuTiles, unit: Unit) -> None:
    """Apply the moves to the function of `opcompile.declare_flat`, declared for these tiles; legal for every spec.

    ``unit`` multiplies the matrices of the family ``matrix``.
    """
    phases = [block for name, block in _blocks(sch).items() if name.startswith("phase")]
    if phases:
        _lay_out(sch, spec, tiles, phases[0])
    if tiles.family == "matrix":
        for phase in phases:
            _in_fragments(sch, tiles, phase)
    vectors, long_first = _whole_vectors(spec, tiles), tiles.apart and longest_first(spec)
    sums(sch, tiles, spec.dtype, unit, vectors=vectors, own=tiles.own, long_first=long_first)


def longest_first(spec: ConvTranspose3d) -> bool:
    """Whether, for each image, blocks of phases that are apart start in the order of their taps, but for a row's.

    A block of eight taps that starts last keeps the device waiting. Not where each phase would then read X from memory
    again; nor can it matter where all phases have as many taps.
    """
    uneven = any(a.kernel % a.tap_step for a in spec.axes)
    return uneven and spec.bytes_of(spec.x_shape) <= _STAYS


def sums(
    sch: Schedule,
    tiles: GpuTiles,
    dtype: str,
    unit: Unit = "mma",
    *,
    vectors: bool = False,
    own: int = 1,
    long_first: bool = False,
) -> None:
    """Make one kernel of ``columns``, perhaps ``weights``, ``phase``, ``result`` and ``output``; see `schedule`.

    ``dtype`` is that of what is multiplied. Without a block ``weights`` the phases read a parameter that is packed.
    With ``vectors`` the last phases are written as one vector. ``own`` is that of the declaration's `FlatGrain`,
    ``long_first`` the order of blocks (`longest_first`).
    """
    blocks = _blocks(sch)
    names = [name for name in blocks if name.startswith("phase")]
    parts = {name: _split_sums(sch, tiles, blocks[name]) for name in names} if tiles.family == "split" else {}

    # --- a block of threads owns a tile, and writes it ---
    n, g, m, q, *phases = sch.get_loops(blocks["output"])
    m, m_in = sch.split(m, [None, tiles.channels])
    q, q_in = sch.split(q, [None, tiles.positions])
    grid, together = ([n, g, m, q, *phases], []) if tiles.apart else ([n, g, m, q], phases)
    if long_first:
        grid = [n, *phases[:2], g, m, q, phases[2]]
    sch.reorder(*grid, m_in, q_in, *together)
    block = sch.fuse(*grid)
    sch.bind(block, "blockIdx.x")
    home, inside = _deal(sch, tiles, m_in, q_in)
    if tiles.family == "matrix" and not HOISTED[unit]:
        # left to the compiler, whose copies share one place for the sums
        sch.annotate(inside[0], "pragma_unroll_explicit", 0)
    sch.compute_at(blocks["result"], home, preserve_unit_loops=True)
    sch.set_scope(blocks["result"], 0, "local")
    for loop in (*_own(sch, blocks["result"], home), *inside, *(together[:2] if vectors else together)):
        sch.unroll(loop)
    if vectors:
        sch.vectorize(together[2])

    # --- the sums ---
    for name in names:
        if tiles.family == "matrix":
            columns = blocks[name.replace("phase", "columns")]
            _sum_in_fragments(sch, tiles, unit, dtype, blocks[name], columns, block, inside[0])
            continue
        sch.compute_at(blocks[name], home, preserve_unit_loops=True)
        sch.set_scope(blocks[name], 0, "local")
        factors = _Factors(blocks[name.replace("phase", "columns")], blocks.get("weights"), own)
        if parts:
            _sum_in_groups(sch, tiles, parts[name], factors, block)
        else:
            _sum_in_registers(sch, tiles, blocks[name], factors, home)
    if tiles.family == "split":
        _take_turns(sch, tiles, home)


def _blocks(sch: Schedule) -> dict[str, Any]:
    return {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}


def _lay_out(sch: Schedule, spec: ConvTranspose3d, t: GpuTiles, phase: Any) -> None:
    c_in = spec.c_in

    def blocked(c: Any, m: Any, kd: Any, kh: Any, kw: Any) -> tuple[Any, ...]:
        return c // c_in, m // t.channels, kd, kh, kw, c % c_in, m % t.channels

    sch.transform_layout(phase, ("read", 1), blocked)


def _deal(sch: Schedule, t: GpuTiles, m: Any, q: Any) -> tuple[Any, list[Any]]:
    """Deal the tile ``m x q`` out to the threads; return the loop where one begins to write, and those inside of it.

    Where groups share a tile, that loop is over its elements, and `_take_turns` deals them out.
    """
    if t.family == "matrix":
        return _deal_to_warps(sch, t, m, q)
    if t.family == "split":
        both = [m, q] if t.lanes == "positions" else [q, m]
        sch.reorder(*both)
        return sch.fuse(*both), []
    m, m_in = sch.split(m, [t.threads_m, t.tile_m])
    q, q_in = sch.split(q, [t.threads_q, t.tile_q])
    threads = [m, q] if t.lanes == "positions" else [q, m]
    sch.reorder(*threads, m_in, q_in)
    thread = sch.fuse(*threads)
    sch.bind(thread, "threadIdx.x")
    return thread, [m_in, q_in]


def _take_turns(sch: Schedule, t: GpuTiles, elements: Any) -> None:
    """Let all groups write: neighbours take neighbouring elements, in turns.

    Last of all moves: a tile with fewer elements than threads then is cut for everything in the loop alike.
    """
    turns, thread = sch.split(elements, [None, t.threads])
    sch.reorder(thread, turns)
    sch.bind(thread, "threadIdx.x")


def _deal_to_warps(sch: Schedule, t: GpuTiles, m: Any, q: Any) -> tuple[Any, list[Any]]:
    """Deal fragments to warps; the threads of a warp write one after the other."""
    m, fragments, m_in = sch.split(m, [t.threads_m, t.tile_m // EDGE, EDGE])
    q, q_in = sch.split(q, [t.threads_q, t.tile_q])
    far, near = (m_in, q_in) if t.lanes == "positions" else (q_in, m_in)
    side = min(WARP, sch.get(near).extent)
    again, near = sch.split(near, [None, side])
    turns, far = sch.split(far, [None, WARP // side])
    sch.reorder(m, q, fragments, far, near, again, turns)
    sch.bind(sch.fuse(m, q), "threadIdx.y")
    sch.bind(sch.fuse(far, near), "threadIdx.x")
    return sch.fuse(again, turns), [fragments]


def _whole_vectors(spec: ConvTranspose3d, t: GpuTiles) -> bool:
    """Whether the phases of a row, neighbours in Y, can be written as one vector: never cut, always aligned."""
    row = spec.axes[2]
    # phases that read the same columns are numbered by their taps
    in_order = not all(a.even_taps for a in spec.axes) or (row.dilation == 1 and row.begin % row.stride == 0)
    return not t.apart and in_order and spec.layout == "NCDHW" and row.stride in (2, 4) and row.out % row.stride == 0


@dataclass(frozen=True, slots=True)
class _Factors:
    """The blocks that copy what is multiplied; ``weights`` is None where a packed parameter is read, or nothing.

    ``own`` is that of the declaration: above 1, a thread's columns do not lie side by side.
    """

    columns: Any
    weights: Any
    own: int


def _sum_in_registers(sch: Schedule, t: GpuTiles, phase: Any, factors: _Factors, thread: Any) -> None:
    (n, g, m, *f, q), (*taps, c) = _kinds(sch, phase, thread)
    c, c_in = sch.split(c, [None, t.chunk or 1])
    sch.reorder(n, g, *taps, c, c_in, m, *f, q)
    _name_taps(sch, t, taps)
    for loop in (m, *f, q):
        sch.unroll(loop)
    products = c_in
    if t.ahead:
        products, c_in = _in_turns(sch, c_in, math.prod(sch.get(loop).extent for loop in (m, *f, q)))
    _feed(sch, t, phase, factors, c, c_in, products)
    sch.decompose_reduction(phase, taps[0])


def _name_taps(sch: Schedule, t: GpuTiles, taps: Sequence[Any]) -> None:
    if t.apart:
        for axis, loop in enumerate(taps):
            sch.annotate(loop, TAPS_OF, axis)


def _kinds(sch: Schedule, block: Any, at: Any) -> tuple[list[Any], list[Any]]:
    """Return the loops of ``block`` inside of loop ``at`` that are spatial, and those that sum."""
    loops, summed = _own(sch, block, at), tirx.IterVar.CommReduce
    count = sum(v.iter_type == summed for v in sch.get(block).iter_vars)
    return loops[:-count], loops[-count:]


def _feed(sch: Schedule, t: GpuTiles, sums: Any, factors: _Factors, step: Any, each: Any, products: Any = None) -> None:
    """Bring what ``sums`` multiply to the threads: at loop ``each`` to registers, before at ``step`` to shared memory.

    The latter where it is staged, and perhaps ahead of the loop ``products``.
    """
    columns, weights = factors.columns, factors.weights
    packed = weights is None and len(sch.get(sums).reads) > 1
    if packed:
        weights = sch.cache_read(sums, 1, "local", [sums])
    copies = [(columns, 1, t.tile_q if factors.own == 1 else 1)]
    if weights is not None:
        copies.append((weights, at_once(t.channels) if packed else 1, t.tile_m))
    for number, (copy, together, tile) in enumerate(copies):
        if not t.chunk:
            sch.set_scope(copy, 0, "local")
            _to_registers(sch, copy, each, tile if together > 1 else 1)
            continue
        near = sch.cache_read(sums, number, "local", [sums])
        sch.set_scope(copy, 0, "shared")
        _to_registers(sch, near, each, tile)
        _to_shared(sch, t, copy, step, together)
    if t.ahead:
        for copy, _, _ in copies:
            _by_registers(sch, copy)
        _fetch_ahead(sch, step, products, len(copies))


def _to_registers(sch: Schedule, copy: Any, at: Any, length: int) -> None:
    """Copy at loop ``at``, in vectors where the innermost ``length`` elements are whole ones."""
    sch.compute_at(copy, at, preserve_unit_loops=True)
    *others, last = _own(sch, copy, at)
    for loop in others:
        sch.unroll(loop)
    if at_once(length) > 1:
        last, lane = sch.split(last, [None, at_once(length)])
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
    loops = _own(sch, copy, at)
    if t.lanes == "terms":
        *others, term, last = loops
        sch.reorder(*others, last, term)
        loops = [*others, last, term]
        sch.storage_align(copy, 0, -2, 2 * _SPREAD, _SPREAD)
    fused = sch.fuse(*loops)
    turns, *threads, lane = sch.split(fused, [None, *reversed(t.block), vector])
    if t.ahead:
        sch.annotate(turns, TURNS, True)
    if vector > 1:
        sch.vectorize(lane)
    for loop, index in zip(reversed(threads), "xy", strict=False):
        sch.bind(loop, f"threadIdx.{index}")


def _by_registers(sch: Schedule, copy: Any) -> None:
    """Copy to shared memory in two: TVM makes it loads of all that a thread copies, and then stores."""
    sch.annotate(copy, "tirx.manifest_shared_memory_local_stage", True)


def _in_turns(sch: Schedule, terms: Any, each: int) -> tuple[Any, Any]:
    """Unroll a part of the loop ``terms``, of ``each`` products: two turns are left, or more. Returns both loops."""
    count = int(sch.get(terms).extent)
    part = max(n for n in range(1, max(1, count // 2) + 1) if count % n == 0 and (n == 1 or n * each <= _UNROLLED))
    turns, part = sch.split(terms, [None, part])
    sch.unroll(part)
    return turns, part


def _fetch_ahead(sch: Schedule, step: Any, products: Any, copies: int) -> None:
    """Load the next chunk before this one is multiplied, and store it behind.

    The body of loop ``step`` is the loads and the stores of a chunk, for each of ``copies``, and the loop ``products``.
    """
    behind = range(copies + 1, 2 * copies + 1)
    order = [place for number in range(copies) for place in (number, behind[number])]
    sch.annotate(step, "software_pipeline_stage", [*[0] * len(order), 1])
    sch.annotate(step, "software_pipeline_order", [*order, copies])
    # unrolled, nvcc would move the loads behind most of the products, to spare registers
    sch.annotate(products, "disable_unroll", True)


# --- split: several groups of threads for one tile ---


def _split_sums(sch: Schedule, t: GpuTiles, phase: Any) -> Any:
    """Cut a phase's sums into one part a group of threads, which take turns. Returns the block of the parts."""
    *_, c = sch.get_loops(phase)
    *_, group = sch.split(c, [None, max(1, t.chunk // t.split), t.split])
    return sch.rfactor(group, 0)


def _sum_in_groups(sch: Schedule, t: GpuTiles, parts: Any, factors: _Factors, block: Any) -> None:
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
    spatial, summed = _kinds(sch, parts, thread)
    sch.reorder(*summed, *spatial)
    _name_taps(sch, t, summed[:3])
    for loop in spatial:
        sch.unroll(loop)
    _feed(sch, t, parts, factors, summed[-2], summed[-1])
    sch.decompose_reduction(parts, summed[0])


# --- matrix: fragments of warps ---


def _in_fragments(sch: Schedule, t: GpuTiles, phase: Any) -> None:
    """Lay a phase out as fragments, told apart by warp and by place in the warp."""

    def fragments(n: Any, g: Any, m: Any, *fq: Any) -> tuple[Any, ...]:
        *f, q = fq
        places = (m // EDGE % (t.tile_m // EDGE), q // EDGE % (t.tile_q // EDGE))
        return (n, g, *f, m // t.tile_m, q // t.tile_q, *places, m % EDGE, q % EDGE)

    sch.transform_layout(phase, ("write", 0), fragments)


def _sum_in_fragments(
    sch: Schedule,
    t: GpuTiles,
    unit: Unit,
    dtype: str,
    phase: Any,
    columns: Any,
    block: Any,
    step: Any,
) -> None:
    """Sum in matrix instructions; ``step`` is the loop that hands one fragment of channels to the threads."""
    does = intrinsics(unit, dtype, t.tile_q // EDGE)
    leave = sch.cache_write(phase, 0, SCOPE[unit])
    sch.compute_at(leave, step, preserve_unit_loops=True)
    sch.set_scope(leave, 0, "shared")
    sch.compute_at(phase, block, preserve_unit_loops=True)
    n, g, m, *f, q, t_d, t_h, t_w, c = _own(sch, phase, block)
    warp, m, m_in = sch.split(m, [t.threads_m, t.tile_m // EDGE, EDGE])
    q_warp, q = sch.split(q, [t.threads_q, t.tile_q])
    c, c_step, c_in = sch.split(c, [None, t.chunk // EDGE, EDGE])
    sch.reorder(n, g, warp, q_warp, t_d, t_h, t_w, c, c_step, *f, m, m_in, q, c_in)
    _name_taps(sch, t, (t_d, t_h, t_w))
    sch.bind(sch.fuse(warp, q_warp), "threadIdx.y")
    for loop in (*f, m):
        sch.unroll(loop)
    products = c_step
    if t.ahead:
        fragments = math.prod(sch.get(loop).extent for loop in (*f, m, q)) // EDGE
        products, c_step = _in_turns(sch, c_step, _INSTRUCTIONS * fragments)
    elements = sch.cache_read(phase, 0, SCOPE[unit], [phase])
    if unit in HELD_AS:
        sch.unsafe_set_dtype(elements, 0, HELD_AS[unit])
    weights = sch.cache_read(phase, 1, "shared", [phase])
    sch.transform_layout(elements, ("write", 0), lambda *i: (*i[:-2], i[-1] // EDGE, i[-2], i[-1] % EDGE))
    sch.compute_at(elements, c_step, preserve_unit_loops=True)
    *_, loaded, column = _own(sch, elements, c_step)
    _by_matrices(sch, loaded, column)
    shared = _columns_to_shared(sch, t, columns, c, WIDEST[unit])
    _to_shared(sch, t, weights, c, WIDEST[unit])
    if t.ahead:
        _by_registers(sch, weights)
        _fetch_ahead(sch, c, products, 2)
    sch.storage_align(shared, 0, -2, EDGE, PAD_X[DataType(dtype).itemsize])
    sch.storage_align(weights, 0, -2, EDGE, PAD)
    *_, filled, column = sch.get_loops(sch.decompose_reduction(phase, t_d))
    _by_matrices(sch, filled, column)
    *outer, m, _ = _own(sch, leave, step)
    for loop in outer:
        sch.unroll(loop)
    sch.tensorize(m, does["store"])
    sch.tensorize(loaded, does["load"])
    sch.tensorize(filled, does["fill"])
    sch.tensorize(m_in, does["multiply"])


def _by_matrices(sch: Schedule, row: Any, column: Any) -> None:
    """Go through rows and columns of all that a warp has side by side matrix by matrix: each begins at loop ``row``."""
    matrix, column = sch.split(column, [None, EDGE])
    sch.reorder(matrix, row, column)
    sch.unroll(matrix)


def _columns_to_shared(sch: Schedule, t: GpuTiles, columns: Any, at: Any, widest: int) -> Any:
    """Copy X at loop ``at``, each thread some channels of one position: X has them all, or none.

    They come to registers, all that a thread copies, and from there to shared memory, where they lie side by side: as
    vectors of ``widest`` elements at the most. Returns the second copy.
    """
    shared = sch.cache_write(columns, 0, "local")
    sch.set_scope(shared, 0, "shared")
    sch.transform_layout(shared, ("write", 0), lambda *i: (*i[:-2], i[-1], i[-2]))
    own = t.chunk * t.positions // t.threads
    # of what lies apart in memory TVM writes no vector of eight
    for copy, most in ((shared, widest), (columns, widest if t.lanes == "channels" else widest // 2)):
        sch.compute_at(copy, at, preserve_unit_loops=True)
        *_, c, q = _own(sch, copy, at)
        c, vectors, lane = sch.split(c, [t.chunk // own, None, math.gcd(own, most)])
        threads = [c, q] if t.lanes == "positions" else [q, c]
        sch.reorder(*threads, vectors, lane)
        y, x = sch.split(sch.fuse(*threads), [None, WARP])
        sch.bind(y, "threadIdx.y")
        sch.bind(x, "threadIdx.x")
        sch.unroll(vectors)
        sch.vectorize(lane)
    return shared
