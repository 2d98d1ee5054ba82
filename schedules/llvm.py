"""Schedules for CPUs: register tiles over the phases, decided by arithmetic or sampled by the tuner.

Every schedule here is the same straight line of moves with other numbers (`Tiles`):

* X is copied once, zero-padded, to ``(n, g, d, h, c, w)``: the reduction over channels then walks
  through neighbouring cache lines.
* A task is one row of positions ``(n, g, block of channels, qD, rows of qH)``. It computes all
  phases of that row, tile by tile, and then writes the interleaved output while the phases are
  still in cache.
* A register tile holds ``vectors`` vectors times ``scalars`` broadcast values (times ``rows``).
  With ``vector="channels"`` the vectors run along output channels and the scalars are columns of
  X: right when there are many channels, however short the rows. With ``vector="row"`` the vectors
  run along the row and the scalars are weights: right for few channels, and when writing the
  output matters most, for the tile then needs no transposition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from tvm import tirx
from tvm.s_tir.schedule import _ffi_api

if TYPE_CHECKING:
    from tvm.s_tir import Schedule

    from opcompile.spec import ConvTranspose3d
    from opcompile.target import Machine

Span = tuple[Any, Any]

# TVM puts smaller buffers on the stack, where LLVM merges the sums into them and out of the registers
_LEAST_BUFFER = 1024


@dataclass(frozen=True, slots=True)
class Tiles:
    """The numbers of one schedule.

    ``lanes`` is the number of elements in a vector register, ``vectors`` and ``scalars`` the register
    tile, ``rows`` how many rows of qH it spans, ``task`` how many channels one task covers.
    """

    vector: Literal["channels", "row"]
    lanes: int
    vectors: int
    scalars: int
    rows: int
    task: int

    @property
    def channels(self) -> int:
        """Channels in the register tile."""
        return self.vectors * self.lanes if self.vector == "channels" else self.scalars

    @property
    def columns(self) -> int:
        """Columns of the row in the register tile."""
        return self.scalars if self.vector == "channels" else self.vectors * self.lanes

    @property
    def block(self) -> int:
        """Channels that lie side by side in the packed weight."""
        return self.lanes if self.vector == "channels" else self.scalars

    @property
    def positions(self) -> tuple[int, int, int]:
        """Multiples to which qD, qH, qW are rounded up."""
        return (1, self.rows, self.columns)


# --- which numbers ---


@dataclass(frozen=True, slots=True)
class Estimate:
    """Tiles and what the arithmetic says of them: cycles of one core for the whole layer."""

    tiles: Tiles
    cycles: float
    computing: float
    storing: float
    used: float
    accumulators: int

    def why(self) -> tuple[str, ...]:
        """The argument in words, one line a fact."""
        t = self.tiles
        along = "output channels" if t.vector == "channels" else "columns of the row"
        return (
            f"vectors of {t.lanes} {along}; a register tile of {t.vectors} vectors x {t.scalars} broadcast values"
            + (f" x {t.rows} rows" if t.rows > 1 else ""),
            f"{self.accumulators} sums stay in registers; {self.used:.0%} of what the tiles compute is output",
            f"a task covers {t.task} channels of {t.rows} row(s) in every phase",
            f"estimated cycles: {self.computing:.3g} computing, {self.storing:.3g} storing",
        )


def candidates(spec: ConvTranspose3d, machine: Machine) -> list[Estimate]:
    """Every sensible choice of tiles, best first by estimated cycles; never empty.

    Deterministic: the order depends on ``spec`` and ``machine`` alone.
    """
    estimates = [_estimate(spec, machine, tiles) for tiles in _sensible(spec, machine)]
    return sorted(estimates, key=lambda e: (e.cycles, e.tiles.vectors, e.tiles.scalars, e.tiles.rows, e.tiles.task))


def baseline(spec: ConvTranspose3d, machine: Machine) -> Estimate:
    """The tiles to use where nothing was measured."""
    return candidates(spec, machine)[0]


def _factors(vector: str, vectors: int, scalars: int, rows: int) -> tuple[int, int]:
    """How many weights and how many elements of X a register tile multiplies, in registers."""
    return (vectors, scalars * rows) if vector == "channels" else (scalars, vectors * rows)


def _itemsize(spec: ConvTranspose3d) -> int:
    return 8 if spec.sum_dtype == "float64" else 4


def _lanes(spec: ConvTranspose3d, machine: Machine) -> int:
    return machine.vector_bytes // _itemsize(spec)


def _sensible(spec: ConvTranspose3d, machine: Machine) -> Iterator[Tiles]:
    lanes = _lanes(spec, machine)
    m = spec.channels_out // spec.groups
    _, height, width = (axis.positions for axis in spec.axes)
    for vector, vectors, scalars, rows in product(
        ("channels", "row"), range(1, 7), range(1, 17), range(1, min(4, height) + 1)
    ):
        accumulators = vectors * scalars * rows
        # beside the sums: the factors of one side, and one of the other at a time
        if accumulators + min(_factors(vector, vectors, scalars, rows)) + 1 > machine.registers:
            continue
        channels, columns = (vectors * lanes, scalars) if vector == "channels" else (scalars, vectors * lanes)
        if channels >= m + lanes or columns >= width + lanes or (vector == "row" and scalars > m):
            continue
        if vector == "channels" and scalars > width:
            continue
        task = _tasks(spec, machine, channels, rows, columns)
        yield Tiles(vector, lanes, vectors, scalars, rows, task)  # type: ignore[arg-type]


def _tasks(spec: ConvTranspose3d, machine: Machine, channels: int, rows: int, columns: int) -> int:
    """Channels a task covers: as many tiles as leave its phases and weights in the second cache.

    Whole tasks only, where the tiles divide the channels: a ragged last task costs a test for each
    output element, and in a grouped layer it would straddle two groups, for which the packed
    weight has no place.
    """
    m = spec.channels_out // spec.groups
    tiles = -(-m // channels)
    taps = math.prod(a.kernel for a in spec.axes)
    phases = math.prod(len(a.phases) for a in spec.axes)
    width = _up(spec.axes[2].positions, columns)
    a_tile = _itemsize(spec) * channels * (phases * rows * width + taps * spec.channels_in // spec.groups)
    fits = max(1, machine.l2_bytes // 2 // a_tile)
    return max(count for count in range(1, tiles + 1) if tiles % count == 0 and count <= fits) * channels


def _estimate(spec: ConvTranspose3d, machine: Machine, t: Tiles) -> Estimate:
    """Cycles by counting multiply-adds, loads, and what each level of cache must deliver.

    The constants, here and in `_step`, were fitted to 250 measured candidates of twenty layers on a
    core with AVX-512. They are to rank, not to predict: the first of the ranking was 2% slower than the
    best that was measured, in the geometric mean.
    """
    m, c = spec.channels_out // spec.groups, spec.channels_in // spec.groups
    depth, height, width = (axis.positions for axis in spec.axes)
    taps = math.prod(sum(p.taps for p in a.phases) for a in spec.axes)
    phases = math.prod(len(a.phases) for a in spec.axes)
    sums = t.vectors * t.scalars * t.rows
    rows = depth * (_up(height, t.rows) // t.rows) * spec.groups * (spec.batch or 1)
    tiles = rows * (_up(m, t.task) // t.channels) * (_up(width, t.columns) // t.columns)
    read_rows = rows * (_up(m, t.task) // t.task) * phases * t.rows * c * _itemsize(spec) * width
    computing = tiles * (taps * c * _step(spec, machine, t) + phases * (2 * sums + 100)) + read_rows / 40
    if t.task * t.rows * _up(width, t.columns) * _itemsize(spec) < _LEAST_BUFFER:
        computing *= 2
    transposed = (t.vector == "channels") == (spec.layout == "NCDHW")
    storing = math.prod(n or 1 for n in spec.y_shape) * (6.5 if transposed else 5.5)
    used = m * height * width / (_up(m, t.task) * _up(height, t.rows) * _up(width, t.columns))
    return Estimate(t, computing + storing, computing, storing, used, sums)


def _step(spec: ConvTranspose3d, machine: Machine, t: Tiles) -> float:
    """Cycles in which one channel's products are added to one register tile."""
    c, width, itemsize = spec.channels_in // spec.groups, spec.axes[2].positions, _itemsize(spec)
    kernel = math.prod(a.kernel for a in spec.axes)
    # cycles a byte of weights: what a neighbouring tile has just used, and what a whole task passed by since
    near, far = 1 / 50, 1 / (50 if t.task * c * kernel * itemsize <= machine.l2_bytes * 2 else 11)
    again = 1 - t.columns / _up(width, t.columns)
    a_tile = t.channels * c * kernel // math.prod(len(a.phases) for a in spec.axes) * itemsize
    a_weight = itemsize * (again * (near if a_tile <= machine.l2_bytes // 2 else far) + (1 - again) * far)
    if t.vector == "channels":
        # with a single vector a broadcast is folded into its multiply-add, which then costs two issue slots
        loads = t.vectors + t.scalars * t.rows * (1.25 if t.vectors == 1 else 1)
        waiting = 0 if a_tile <= machine.l1_bytes // 2 else t.channels * a_weight
    else:
        # vectors of a row start anywhere: most of them straddle two cache lines
        loads = 1.7 * t.vectors * t.rows + t.scalars
        span = t.rows * (t.columns * itemsize + 64)
        waiting = t.scalars * a_weight + (0 if span * c <= machine.l1_bytes * 2 else span / 100)
    return max(t.vectors * t.scalars * t.rows, machine.fma_in_flight) / 2 + 0.32 * loads + waiting


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# --- the moves ---


def packed(spec: ConvTranspose3d, tiles: Tiles, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How the declared W of ``shape`` is laid out for these tiles: a view of it, and an order of the view's axes.

    W ``(C, M/g, kD, kH, kW)``, viewed as ``(g, C/g, M/block, block, kD, kH, kW)``, becomes
    ``(g, M/block, kD, kH, kW, C/g, block)``. A layer whose taps all fall beyond the output reads no
    weight: W stays as it is.
    """
    if not spec.terms:
        return shape, tuple(range(5))
    c, m, *kernel = shape
    view = (spec.groups, c // spec.groups, m // tiles.block, tiles.block, *kernel)
    return view, (0, 2, 4, 5, 6, 1, 3)


def schedule(sch: Schedule, spec: ConvTranspose3d, tiles: Tiles) -> None:
    """Apply the moves to the declared function; legal for every spec."""
    phases = [b for b in sch.get_child_blocks(sch.get_sblock("root")) if sch.get(b).name_hint.startswith("phase")]
    output = sch.get_sblock("output")
    as_axes = [sch.get(p).name_hint for p in phases] == ["phase"]

    # --- layouts ---
    if phases:  # there are none, and no padded copy, where every tap falls beyond the output
        _lay_out(sch, spec, tiles, sch.get_sblock("pad"), phases, as_axes)

    # --- tasks: rows of positions, with their phases inside ---
    axes = sch.get_loops(output)
    n, m, *spatial = axes if spec.layout == "NCDHW" else [axes[0], axes[-1], *axes[1:-1]]
    split = [sch.split(loop, [None, axis.stride]) for loop, axis in zip(spatial, spec.axes, strict=True)]
    (q_d, f_d), (q_h, f_h), (q_w, f_w) = split
    g, m = sch.split(m, [spec.groups, None])
    m, m_in = sch.split(m, [None, min(tiles.task, spec.channels_out // spec.groups)])
    q_h, q_h_in = sch.split(q_h, [None, tiles.rows])
    row = [f_d, q_h_in, f_h, q_w, f_w]
    sch.reorder(n, g, m, q_d, q_h, *([m_in, *row] if spec.layout == "NCDHW" else [*row, m_in]))
    _claim_whole_tiles(sch, spec, tiles, output, as_axes)
    task = sch.fuse(n, g, m, q_d, q_h)
    for p in phases:
        sch.compute_at(p, task, preserve_unit_loops=True)
        _tile(sch, tiles, p, sch.get_loops(p)[1:])

    # --- spend the cores; the padded copy is a task a plane ---
    sch.parallel(task)
    for p in phases:
        # after `parallel`, which refuses a decomposed block: sums start at the loops over the taps
        sch.decompose_reduction(p, sch.get_loops(p)[-8])
    if not as_axes:
        for loop in (f_d, f_h, f_w):
            sch.unroll(loop)
    if phases:
        n, g, c, d, h, w = sch.get_loops(sch.get_sblock("pad"))
        sch.reorder(n, g, d, h, c, w)
        sch.parallel(sch.fuse(n, g, d))


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


def _lay_out(sch: Schedule, spec: ConvTranspose3d, t: Tiles, pad: Any, phases: list[Any], as_axes: bool) -> None:
    c_in = spec.channels_in // spec.groups
    sch.transform_layout(pad, ("write", 0), lambda n, g, c, d, h, w: (n, g, d, h, c, w))
    reads = [r.source.name for r in sch.get(phases[0]).reads]
    sch.transform_layout(
        phases[0],
        ("read", reads.index("W")),
        lambda c, m, kd, kh, kw: (c // c_in, m // t.block, kd, kh, kw, c % c_in, m % t.block),
    )
    if t.vector == "row":
        return
    # an index map is asked for its number of arguments, so each rank has its own
    six: Any = lambda n, g, m, d, h, w: (n, g, m // t.lanes, d, h, w, m % t.lanes)  # noqa: E731
    nine: Any = lambda n, g, m, i, j, k, d, h, w: (n, g, m // t.lanes, i, j, k, d, h, w, m % t.lanes)  # noqa: E731
    for p in phases:
        sch.transform_layout(p, ("write", 0), nine if as_axes else six)


def _tile(sch: Schedule, t: Tiles, phase: Any, loops: list[Any]) -> None:
    """Cut one phase's loops ``(n, g, m, [phases,] d, h, w, taps, c)`` into register tiles."""
    n, g, m, *of_phases, d, h, w, t_d, t_h, t_w, c = loops
    h, h_in = sch.split(h, [None, t.rows])
    if t.vector == "channels":
        m, m_in, lane = sch.split(m, [None, t.vectors, t.lanes])
        w, w_in = sch.split(w, [None, t.scalars])
        tiles = [m, h, w]
    else:
        m, m_in = sch.split(m, [None, t.scalars])
        w, w_in, lane = sch.split(w, [None, t.vectors, t.lanes])
        tiles = [h, w, m]
    # the smaller side of factors stays in registers while the other passes by
    weights, elements = _factors(t.vector, t.vectors, t.scalars, t.rows)
    tile = [h_in, w_in, m_in] if weights <= elements else [m_in, h_in, w_in]
    sch.reorder(n, g, *of_phases, d, *tiles, t_d, t_h, t_w, c, *tile, lane)
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
    first_h = tirx.floordiv(q[1], t.rows) * t.rows

    def one(start: Any) -> Span:
        return (start, start + 1)

    def whole(extent: Any) -> Span:
        return (tirx.const(0, index), extent)

    for i, read in enumerate(block.reads):
        if not read.source.name.startswith("phase"):
            continue
        shape = list(read.source.shape)
        in_channels = t.vector == "channels"
        channels = (first_m, first_m + t.task)
        if in_channels:
            first_block = tirx.floordiv(first_m, t.lanes)
            channels = (first_block, first_block + t.task // t.lanes)
        spans = [one(n), one(tirx.floordiv(m, m_out)), channels]
        if as_axes:
            spans += [one(tirx.floormod(k, a.stride)) for k, a in zip(o[:2], spec.axes[:2], strict=True)]
            spans += [whole(shape[5])]
        spans += [one(q[0]), (first_h, first_h + t.rows), whole(shape[-2] if in_channels else shape[-1])]
        if in_channels:
            spans.append(whole(shape[-1]))
        claim = tirx.IndexMap(
            initial_indices=of, final_indices=[end for span in spans for end in span], inverse_index_map=None
        )
        # the Python method demands as many ranges as the block has iterators; the function below it does not
        _ffi_api.ScheduleAnnotateBufferAccess(sch, output, i, 0, claim)
