"""What tiles cost, in cycles of one core: to rank candidates, not to predict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from schedules.counted import counted
from schedules.division import over, up
from schedules.rules import LEAST_WOVEN_LAST, so_large
from schedules.tiles import CACHE_LINE, factors

if TYPE_CHECKING:
    from opcompile.target import Machine
    from schedules.layer import Layer
    from schedules.tiles import Tiles

# Cycles by counting multiply-adds, loads, and the bytes that each level of cache must deliver. The constants were
# fitted to 1000 measured candidates of 24 layers on a core with AVX-512 (Intel), to 1100 of 60 layers on another (Zen
# 4), and there again, those of loads and weights, to 370 of 45 layers that are not depthwise; that of a copy that was
# asked for, to 189 more of 21; those of bands, of weaving, of what lies on the stack and of what passes from the
# second cache, to 249 of 27 that are small or depthwise, and 522 of 53 of all kinds; what a load takes with AVX2
# (`Machine.loading`), to 798 of 42 on Zen 3, and in sums by taps, beside chunks, to 1219 of 85; what chunks cost, to
# 338 more of 35; what rows that share vectors of X cost, to 259 of 20 that are depthwise. They are to rank, not to
# predict: the first of the ranking was 2 % slower than the best of those 522, in the geometric mean over the layers,
# 14 % at most; on Zen 3, by times that vary by 5 %, 3 to 4 % over 116 that are not depthwise, 28 % at most, and over
# those 20, 20 % at most; 1 to 4 % over 24 whose phases have several taps in a row, to which nothing was fitted. What
# reading a copy of all X costs with channels last, copying squares and weights from the third cache were fitted to 856
# of 39 there, with turns of several channels: the first of the ranking is 2 to 5 % slower than the best. On Zen 5 all
# but multiplying takes a quarter of the cycles (`Machine.overhead`, fitted with `Machine.settling`, what a load takes
# and lines of X from the second cache to 1500 of 99 layers there): the first is 3 % slower than the best, and so it
# is where tiles write rows of Y, fitted to 1372 of 87 there; 5 % for few output channels whose taps overlap, with
# copies of planes fitted to 200 of 13 there, and what adding up masked sums costs to 75 of 29.

# Bytes of X that come from the second cache in a cycle where vectors are of positions; of channels, `Machine.l2_rate`.
_FROM_SECOND = 28
# A byte of X that is read where it lies, by each row of phases: lines of neighbouring channels lie far apart.
_IN_PLACE = 0.06
# Two products take as much longer than one until their sum can be added to: 6 cycles to 4 on Zen 4.
_PAIR_LATENCY = 1.5
# For so few elements of X, weights come from memory, and multiplying is no matter.
_FEW_ELEMENTS = 16


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
        vectors = {
            "channels": "output channels",
            "groups": "channels, each a group of its own, times elements of X side by side",
            "row": "columns of a row",
            "line": "positions of rows laid end to end",
            "taps": "elements of rows of X laid end to end, multiplied by many taps at once",
            "plane": "elements of planes of X as they lie, multiplied by many taps at once",
        }
        beside = "column" if t.vector == "groups" else "broadcast value"
        summed = "tap" if t.by_taps else "phase"
        phases = counted(self.accumulators // (t.vectors * t.scalars * t.rows), "phase")
        bands = [
            (n, axis) for n, axis in ((t.bands_m, "channels"), (t.bands_d, "planes"), (t.bands_h, "rows")) if n > 1
        ]
        several = f"{' x '.join(str(n) for n, _ in bands)} times, along {' and '.join(axis for _, axis in bands)}"
        return (
            f"vectors of {t.lanes} {vectors[t.vector]}; "
            f"a register tile of {counted(t.vectors, 'vector')} x {counted(t.scalars, beside)}"
            + (f" x {t.rows} rows" if t.rows > 1 else ""),
            *(["two products of bfloat16 by one instruction, each added to the float32 sum"] if t.products > 1 else []),
            f"registers hold {counted(self.accumulators, 'sum')}; {self.used:.0%} of what the tiles compute is output",
            f"a task computes{', then writes,' if t.woven == 'band' else ''} {counted(t.task, 'channel')} of "
            f"{counted(t.height, 'row')} in {counted(t.depth, 'plane')} of every {summed}"
            + (f", {several}" if bands else ""),
            *([f"a register tile has {phases}, and writes what it sums"] if t.woven == "tile" else []),
            {
                "task": "each task copies, and pads, the rows of X that it reads",
                "chunk": f"each task copies, and pads, the rows of X that it reads, {counted(t.chunk, 'channel')} at a "
                "time through all its sums",
                "whole": "X is copied, and padded, before the first task",
                "none": "X is read where it lies",
            }[t.copy],
            *(["Y is written past the caches, in whole cache lines"] if t.store == "streamed" else []),
            f"estimated cycles: {self.computing:.3g} computing, {self.storing:.3g} storing",
        )


class _Sizes(NamedTuple):
    """What several sums need of tiles: `Layer.band`, `Layer.held`, `Layer.window`, and how many bands there are."""

    band: int
    held: int
    window: int
    bands: int


def estimate(layer: Layer, machine: Machine, t: Tiles) -> Estimate:
    """Count the cycles of a layer with these tiles."""
    bands = over(layer.depth, t.depth) * over(layer.height, t.height)
    sizes = _Sizes(layer.band(t), layer.held(t), layer.window(t), bands)
    sums = t.vectors * t.scalars * t.rows
    summing, moving = (_summing_by_tap if t.by_taps else _summing_by_phase)(layer, machine, t, sums, sizes)
    moving += _copying(layer, machine, t, sizes)
    if widening := layer.widening(t):
        moving += layer.tasks(t) * widening / (6 * layer.itemsize)
    computing = summing + machine.overhead * moving
    storing = machine.overhead * layer.outputs * _weaving(layer, machine, t, sizes)
    if t.woven == "band":
        storing += machine.settling * layer.images * bands * over(layer.m, t.task)
    used = layer.m * layer.depth * layer.height * layer.width / (up(layer.m, t.task) * bands * sizes.band)
    return Estimate(t, computing + storing, computing, storing, used, sums * layer.at_once(t))


def _summing_by_phase(layer: Layer, machine: Machine, t: Tiles, sums: int, sizes: _Sizes) -> tuple[float, float]:
    """The products, and what else sums take: each tile goes through the taps of all phases, or of those that read X."""
    positions = layer.images * sizes.bands * sizes.band
    tiles = positions // (t.rows * t.columns) * (up(layer.m, t.task) // t.channels)
    beside_d, beside_h, beside_w = layer.beside
    no_rows = layer.apart and t.trims_rows(layer.height, layer.most_taps[1] * layer.most_taps[2])
    no_columns = layer.apart and t.trims(layer.width, layer.most_taps[2])
    trimmed = (1 - beside_h * no_rows) * (1 - beside_w * no_columns)
    if math.prod(layer.sizes) > _FEW_ELEMENTS:  # fewer sums than hide the latency of one are no faster
        trimmed = max(trimmed, min(1, machine.fma_in_flight / sums))
    read = (1 - beside_d) * (1 - beside_h * t.skips_rows(layer.most_taps)) * trimmed
    moved, phases, products = 4.5 * sums + 27, layer.phases, read * layer.taps * layer.c
    if t.copy == "chunk":  # sums are put down and taken up
        moved += (layer.c * t.products // t.chunk - 1) * (2 * sums + 40)
    if t.woven == "tile":  # sums do not leave their registers
        moved = 2 * sums + 10
    at_once = layer.at_once(t)
    phases, products = phases // at_once, products / at_once
    moving = tiles * phases * moved + _reading(layer, machine, t, sizes)
    return tiles * products * _step(layer, machine, t, sizes.band), moving


def _summing_by_tap(layer: Layer, machine: Machine, t: Tiles, sums: int, sizes: _Sizes) -> tuple[float, float]:
    """The same where vectors of X are loaded where they begin, once for all weights of a tile; taps add up later."""
    tiles = layer.images * sizes.bands * sizes.band // t.columns * layer.m * layer.kernel // t.scalars
    # no more sums than hide the latency of one leave nothing to hide a load that is late
    multiplying = max(sums, 1.25 * machine.fma_in_flight) / machine.fma_units
    # a vector that is a whole line is loaded while more is multiplied
    a_load = machine.loading / (2 if machine.vector_bytes == CACHE_LINE else 1)
    step = multiplying + a_load * (t.vectors + t.scalars)
    # of planes as they lie, what a tile reads is side by side
    if t.columns * layer.itemsize * t.chunk > machine.l1_bytes * (3 if t.vector == "plane" else 2) // 4:
        step += t.columns * layer.itemsize / 100
    if t.vector == "plane" and layer.joined(t) == 1:  # planes beside X are left out
        step *= 1 - layer.beside[0]
    sums_moved = 6 * sums + 40 + (layer.c // t.chunk - 1) * (2 * sums + 40)
    return tiles * layer.c * step, tiles * sums_moved


def _weaving(layer: Layer, machine: Machine, t: Tiles, sizes: _Sizes) -> float:
    """Writing one element of Y; a new stretch is a new page and a new stream for the prefetcher."""
    transposed = t.of_channels == layer.channels_first
    if not layer.channels_first and not t.of_channels:
        transposed = not layer.woven or t.task < layer.m or t.lanes < LEAST_WOVEN_LAST
    in_first, in_second = min(1, sizes.held / machine.l1_bytes), min(1, sizes.held / machine.l2_bytes)
    weaving = 4.4 if transposed else 0.8 + 1.2 * in_first + 0.4 * in_second
    if t.by_taps:  # those of its phase are added up
        summed = layer.taps / layer.phases
        masked = (0 if layer.channels_first else 8 / layer.phases) + 0.2 * summed if t.vector == "plane" else 0
        weaving += (2.2 + masked) * summed / t.lanes
    by_tiles = t.woven == "tile" and t.of_channels
    if by_tiles or (layer.own and t.bands_m > 1):  # few lines of each position at a time, far apart, or half a line
        of_position = (t.channels if by_tiles else t.task) * layer.itemsize
        weaving += 100 / of_position * (1 if of_position < CACHE_LINE else min(1, layer.m * layer.itemsize / 1024))
    far = so_large(layer.outputs * layer.itemsize, machine)
    if machine.stretch and far and layer.shares_lines and t.store == "cached":  # a line is read before it is written
        weaving += 1.5
    return weaving + 300 / (layer.stretch(t) * layer.itemsize)


def _reading(layer: Layer, machine: Machine, t: Tiles, sizes: _Sizes) -> float:
    """Each phase reads what the one before it has just read, as each band does, and finds in cache what part fits."""
    rows = layer.images * up(layer.depth, t.depth) * up(layer.height, t.height) * over(layer.m, t.task)
    band = layer.read(t, 1, 1) * (1 if t.copy == "whole" else 2) + sizes.held
    # what a task copied comes back for the first of the bands that read it, beside what else the cache is for
    far_of_band, far_of_task = (max(0, 1 - machine.l2_bytes / held) / 6 for held in (band, 2 * sizes.window))
    a_phase = layer.itemsize * rows * (t.task if layer.own else layer.c) * layer.width
    phases = layer.phases // layer.at_once(t)
    reading = a_phase * (phases * (1 / 240 + far_of_band) + far_of_task / t.bands_m)
    if t.copy == "whole" and t.of_channels and not layer.channels_first:
        # a few columns of all channels at a time, too short for the prefetcher, from where all of the copy is
        of_copy = layer.itemsize * layer.images * layer.c * math.prod(layer.reach)
        reading += 0.4 * min(1, max(0, of_copy / machine.l2_bytes - 1)) * layer.tasks(t) * sizes.window
    return reading


def _copying(layer: Layer, machine: Machine, t: Tiles, sizes: _Sizes) -> float:
    """What tasks share is copied by each of them; a copy of all X goes through the caches that hold it, and back."""
    depth, height, width = layer.sizes if t.vector == "plane" else layer.reach
    a_plane = layer.itemsize * (layer.m if layer.own else layer.c) * height * width
    in_their_order = t.of_channels and not layer.channels_first
    a_row = 4 / (width * layer.channels_read(t) if in_their_order else width)
    # where taps overlap, as measured: each plane as one row, and by chunks what several tasks read
    planes = machine.whole_planes and t.vector == "plane" and layer.c > 1 and max(layer.most_taps) > 1
    if planes:
        a_row = 8 / (height * width)
    if not layer.channels_first and not in_their_order:  # transposed
        a_row += 0.2 if layer.in_squares else 0.6
    far = min(1, depth * a_plane / (8 * machine.l2_bytes))
    if t.copy == "none":
        return layer.tasks(t) * sizes.window * _IN_PLACE * layer.phases / layer.at_once(t)
    if t.copy == "whole":
        # lines that share rows have each its own copy of them
        shared = over(layer.height, t.height) * (t.height + height - layer.height) / height if t.line else 1
        return layer.images * depth * a_plane * shared * ((0.1 if planes else 0.4) + 0.8 * far + a_row)
    # what a task shares with one in the next plane is read again after a plane of tasks
    missed = max(0, 1 - machine.l2_bytes / (layer.most_taps[0] * a_plane))
    # the rows of each channel and plane are in pages of their own
    pages = layer.c * layer.planes(t.depth * t.bands_d) if layer.channels_first else 0
    # what the task before asked for is near, as far as the second cache holds both
    a_byte = 0.22
    if layer.channels_first:
        a_byte = min(a_byte, 0.05 + 0.3 * (2 * sizes.window / machine.l2_bytes) ** 2)
    # a chunk is copied while it is near: the one before it has asked for it
    a_chunk = 2 if planes else 0.5
    window = sizes.window * (a_chunk * layer.c * t.products / t.chunk if t.copy == "chunk" else 1)
    return layer.tasks(t) * (window * (a_byte + a_row + 0.17 * missed) + 30 * far * pages)


def _step(layer: Layer, machine: Machine, t: Tiles, band: int) -> float:
    """The products of one channel, or of a pair, added to one register tile: of a tap of each phase that it sums."""
    _, taps_h, taps_w = layer.most_taps
    together = layer.at_once(t)
    scalars = together * t.scalars
    of_plane = t.unrolls(taps_h * taps_w)
    unrolled = of_plane or (not t.of_channels and t.scalars == layer.c == 1)
    a_weight = _a_weight(layer, machine, t, band)
    # beside a single vector a broadcast is folded into its multiply-add, where a unit may have one in each cycle
    a_broadcast = machine.fma_units - 0.5 if t.vectors * (1 if t.vector == "channels" else t.rows) == 1 else 1
    if t.vector == "groups":
        loads, loading = float(t.vectors), (t.vectors + t.vectors * t.scalars * t.rows) / machine.fma_units
        a_load, passing, waiting = machine.loading, 0.0, 0.0
    elif t.vector == "channels":
        loads, loading = t.vectors + t.scalars * t.rows * a_broadcast, 0.0
        a_load = machine.loading
        # what the first cache does not hold until it is read again: all taps of the weights, a tap with its X
        weights = t.channels * layer.itemsize
        # half a cache line at either end, where columns are side by side
        x = t.rows * layer.itemsize * (min(layer.reach[2], t.columns + 12) if layer.channels_first else t.columns)
        passing = 0.0 if layer.weights(t.channels) // layer.phases <= machine.l1_bytes // 2 else weights
        waiting = passing / layer.itemsize * a_weight
        passing += x if (weights + x) * layer.c > machine.l1_bytes else 0
        if layer.widened:  # as they are loaded, each time
            waiting += t.vectors
    else:
        # where there is more than one tap, most vectors straddle two cache lines
        rows, a_load, straddling = float(t.rows), machine.loading, 1 + machine.vector_bytes / CACHE_LINE
        if layer.most_taps == (1, 1, 1):
            straddling = 1
        if unrolled:
            rows = (t.rows + taps_h - 1) / taps_h
            a_load, straddling = 0.3 * machine.fma_units, 1.1
        if of_plane and t.shares_rows:  # each row is lines of its own
            a_load, straddling = 0.4 * machine.fma_units, 1 + 0.7 / t.vectors
        vectors = straddling * t.vectors * rows * (layer.shared if together > 1 else 1)
        loads, loading = vectors + scalars * a_broadcast, vectors / machine.fma_units + scalars / 2
        passing, waiting = 0.0, scalars * a_weight
        if layer.read(t, 1, 1) > machine.l1_bytes:  # a phase has passed it all by before the next one reads it
            passing = t.vectors * rows * machine.vector_bytes / (1 if unrolled else taps_w)
            if together > 1 and straddling > 1:  # and the line behind them, that one of the taps reads
                passing += rows * CACHE_LINE / (1 if unrolled else taps_w)
        a_row = t.columns * layer.itemsize + CACHE_LINE
        if t.rows * a_row * layer.c > machine.l1_bytes:
            waiting += (t.rows + taps_h - 1) * a_row / (200 * taps_h * taps_w)
    sums, chunk = t.vectors * scalars * t.rows, t.chunk // t.products
    waiting += _on_the_stack(layer, machine, t, sums, unrolled)
    # the longer multiply-adds take, the more loads go beside them; to begin a loop over channels costs a few
    in_flight = machine.fma_in_flight * (_PAIR_LATENCY if t.products > 1 else 1)
    multiplying = max(sums, in_flight) / machine.fma_units
    a_loop = 2 if layer.c == 1 else 5 if t.copy == "chunk" else 20
    at_once = taps_h * taps_w if unrolled else 1 if t.of_channels else taps_w
    beginning = a_loop / (chunk * at_once)
    summing = max(multiplying, loading) + a_load * loads
    summing = max(summing, passing / (machine.l2_rate if t.of_channels else _FROM_SECOND))
    return summing + machine.overhead * (waiting + beginning)


def _a_weight(layer: Layer, machine: Machine, t: Tiles, band: int) -> float:
    """Cycles of a weight that a neighbouring tile has just used, or that a whole task passed by since.

    What a tile has of them may be too many for the second cache; the third then has some.
    """
    near, far = 1 / 200, 1 / (50 if layer.weights(t.task * t.bands_m) <= machine.l2_bytes // 2 else 11)
    third = min(far, 1 / 20)
    again = 1 - t.columns * t.rows / band
    lost = min(1, max(0, layer.weights(t.channels) // layer.phases / machine.l2_bytes - 0.7))
    return layer.itemsize * (again * (near + lost * (third - near)) + (1 - again) * far)


def _on_the_stack(layer: Layer, machine: Machine, t: Tiles, sums: int, unrolled: bool) -> float:
    """What LLVM holds beside the sums, and has no registers for."""
    _, taps_h, taps_w = layer.most_taps
    if t.vector == "groups":  # what the taps of a row share of X
        return 1.5 * max(0, 2 * sums - machine.registers)
    if t.shares_rows and t.unrolls(taps_h * taps_w):  # the weights of a column of taps, and some vectors of X
        spilled = 2.0 * max(0, sums + taps_h + 3 - machine.registers)
        if layer.at_once(t) > 1:  # of all phases some of the weights, which all rows multiply
            spilled += 6 * max(0, sums + taps_h * layer.taps_of_row / 4 + 13 - machine.registers)
        return spilled
    if unrolled:  # what all taps read
        return 0.6 * max(0, sums + t.vectors * (t.rows + taps_h - 1) * taps_w - machine.registers)
    if 1 < t.chunk // t.products < 16:  # both sides of so short a loop, which is unrolled
        sides = factors(t.vector, t.vectors, layer.at_once(t) * t.scalars, t.rows)
        return 1.5 * max(0, sums + sum(sides) - machine.registers)
    return 0.0
