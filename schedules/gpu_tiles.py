"""Which numbers a GPU schedule uses, decided by arithmetic over the layer and the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

from schedules.division import divisors, over

if TYPE_CHECKING:
    from opcompile.gpus import Gpu
    from opcompile.spec import Axis, ConvTranspose3d
    from schedules.matrix import Unit

Family = Literal["direct", "staged", "split", "matrix"]

# Threads of a warp, on every GPU that has a name here.
WARP = 32
# Rows and columns of what a warp multiplies at once (`schedules.matrix`).
EDGE = 16
# Elements between the rows that matrix instructions read in shared memory, so that these begin in different banks: of
# W, whose rows are channels of X, and, by bytes of an element, of X, whose rows are positions.
PAD, PAD_X = 8, {2: 8, 4: 4}
# What a layer must have to fill matrices (`_fragments`).
FILLS = (
    f"matrices need a multiple of {EDGE} input channels in a group, and {EDGE} or more output channels and positions"
)


@dataclass(frozen=True, slots=True, order=True)
class GpuTiles:
    """The numbers of one schedule.

    ``threads_m * threads_q`` threads each own ``tile_m`` channels of ``tile_q`` positions; ``lanes`` says along
    which of the two neighbouring threads lie: positions where Y has them last, channels where it has those last.
    ``chunk`` input channels are staged at a time, ``split`` groups of threads share them. With ``apart`` the
    phases are tiles of the grid too: a block of threads sums one of them. With ``ahead`` the next chunk is on its way
    to registers while this one is multiplied. In the family ``matrix`` it is warps that own tiles. Of derivatives, read
    rows and columns of the product (`opcompile.gradients.declare_flat`) for channels and positions, and what is summed
    last for input channels; with lanes ``terms`` it is that which lies side by side in memory.
    """

    family: Family
    lanes: Literal["positions", "channels", "terms"]
    threads_m: int
    threads_q: int
    tile_m: int
    tile_q: int
    chunk: int
    split: int
    apart: bool
    ahead: bool = False

    def fields(self) -> dict[str, int | str]:
        """Return the numbers by name; of `LATER` only those that differ, as in records from before they were."""
        return {name: n for name, n in asdict(self).items() if n != LATER.get(name)}

    @property
    def channels(self) -> int:
        """Channels of a block's tile: also what lies side by side in the packed weight."""
        return self.threads_m * self.tile_m

    @property
    def positions(self) -> int:
        """Positions of a block's tile."""
        return self.threads_q * self.tile_q

    @property
    def own(self) -> int:
        """How many neighbouring positions of the declaration are one thread's, which lie apart in memory.

        So what neighbouring threads load and store at a time lies side by side. Not where all of a tile's positions
        go through shared memory to be written.
        """
        return self.tile_q if self.family in ("direct", "staged") and self.lanes == "positions" else 1

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.owners * (WARP if self.family == "matrix" else 1)

    @property
    def owners(self) -> int:
        """Threads, or warps, of a block that own tiles."""
        return self.threads_m * self.threads_q * self.split

    @property
    def block(self) -> tuple[int, ...]:
        """Threads of a block along x, and along y where warps own the tiles."""
        return (WARP, self.owners) if self.family == "matrix" else (self.owners,)


# What records from before it was stand for.
LATER = {"ahead": False}


@dataclass(frozen=True, slots=True)
class GpuEstimate:
    """Tiles and what the arithmetic says of them, for one image: cycles, and what a block takes of the device."""

    tiles: GpuTiles
    cycles: float
    computing: float
    moving: float
    blocks: int
    registers: int
    shared: int

    def why(self, unit: Unit = "mma") -> tuple[str, ...]:
        """The argument in words, one line a fact. ``unit`` multiplies the matrices, where these are."""
        t = self.tiles
        lines = [
            f"{self.blocks} blocks of {t.threads} threads; each writes {t.channels} channels x {t.positions} positions "
            + ("of one phase" if t.apart else "in all phases"),
            f"a {'warp' if t.family == 'matrix' else 'thread'} sums {t.tile_m} channels x {t.tile_q} positions; "
            f"about {self.registers} registers",
        ]
        if t.family in ("staged", "matrix"):
            ahead = ", the next ones fetched meanwhile" if t.ahead else ""
            lines.append(f"{t.chunk} input channels at a time through {self.shared} bytes of shared memory{ahead}")
        if t.family == "split":
            lines.append(f"{t.split} groups of threads share the input channels, and add up in {self.shared} bytes")
        if t.family == "matrix":
            lines.append(_PRODUCTS[unit])
        return (*lines, f"estimated cycles: {self.computing:.3g} computing, {self.moving:.3g} moving bytes")


_PRODUCTS: dict[Unit, str] = {
    "mma": "products by matrix instructions, summed in float32 that is cut off and not rounded",
    "tf32": "products by matrix instructions, of float32 factors that are rounded to TF32 (11 significant bits), "
    "summed in float32 that is cut off and not rounded",
    "simdgroup": "products by simdgroup matrices, summed in float32; Apple does not say how these round",
}


def candidates(spec: ConvTranspose3d, gpu: Gpu) -> list[GpuEstimate]:
    """Every sensible choice of tiles within the limits of ``gpu``, best first by estimated cycles; never empty.

    Deterministic: the order depends on ``spec`` and ``gpu`` alone.
    """
    layer = Sums.of(spec, gpu)
    fragments = _fragments(layer, gpu.ahead) if spec.dtype in gpu.matrix_types else ()
    return ranked(layer, gpu, [*sensible(layer, gpu.ahead), *fragments])


def ranked(layer: Sums, gpu: Gpu, tiles: Iterable[GpuTiles]) -> list[GpuEstimate]:
    """Those ``tiles`` that keep to the limits of ``gpu``, best first by estimated cycles."""
    legal = [_estimate(layer, gpu, t) for t in tiles if _within_limits(layer, gpu, t)]
    # where the count says the same: threads with less each, and longer rows of weights
    return sorted(legal, key=lambda e: (e.cycles, e.tiles.tile_m * e.tiles.tile_q, -e.tiles.channels, e.tiles))


def baseline(spec: ConvTranspose3d, gpu: Gpu) -> GpuEstimate:
    """The tiles to use where nothing was measured."""
    return candidates(spec, gpu)[0]


@dataclass(frozen=True, slots=True)
class Sums:
    """What the arithmetic needs of a layer, or of a derivative.

    With ``gathered`` weights lie as they come, not packed. An element is of ``itemsize`` bytes in memory, and of
    ``held`` where it is staged, which may be wider. ``m`` and ``c`` are channels of a group, ``images`` the groups of a
    batch (of one image where N is open), ``positions`` of a phase, ``together`` positions of all of them at once.
    ``phases`` counts them, ``with_taps`` those with taps, ``taps`` the taps of all, ``most_taps`` of the one that has
    the most; ``alike`` says that together they read the same columns, ``many`` that they must lie apart, ``gaps`` that
    some have no taps, whatever the kernel: stride and dilation have a common factor.
    """

    itemsize: int
    held: int
    sum_bytes: int
    gathered: bool
    m: int
    c: int
    images: int
    positions: int
    together: int
    phases: int
    with_taps: int
    taps: int
    most_taps: int
    alike: bool
    many: bool
    gaps: bool
    row_stride: int
    channels_last: bool
    x_bytes: int
    w_bytes: int
    y_bytes: int

    @classmethod
    def of(cls, spec: ConvTranspose3d, gpu: Gpu) -> Sums:
        """Describe a layer on a device."""
        alike, (with_taps, every) = all(a.even_taps for a in spec.axes), spec.phases
        positions = math.prod(a.positions for a in spec.axes)
        return cls(
            itemsize=spec.itemsize,
            held=spec.sum_itemsize if spec.dtype in gpu.widened else spec.itemsize,
            sum_bytes=spec.sum_itemsize,
            gathered=False,
            m=spec.m_out,
            c=spec.c_in,
            images=spec.groups * (spec.batch or 1),
            positions=positions,
            together=math.prod(map(_positions_together, spec.axes)) if alike else positions,
            phases=math.prod(a.stride for a in spec.axes),
            with_taps=with_taps,
            taps=math.prod(len(a.offsets) for a in spec.axes),
            most_taps=math.prod(max(phase.taps for phase in a.phases) for a in spec.axes),
            alike=alike,
            many=every > _MOST_TOGETHER,
            gaps=any(math.gcd(a.stride, a.dilation) > 1 for a in spec.axes),
            row_stride=spec.axes[2].stride,
            channels_last=spec.layout == "NDHWC",
            x_bytes=spec.bytes_of(spec.x_shape),
            w_bytes=spec.bytes_of(spec.w_shape),
            y_bytes=spec.bytes_of(spec.y_shape),
        )

    def blocks(self, t: GpuTiles) -> int:
        """Thread blocks of the whole batch."""
        positions = self.positions if t.apart else self.together
        tiles = over(self.m, t.channels) * over(positions, t.positions)
        return self.images * tiles * (self.phases if t.apart else 1)

    def summed(self, t: GpuTiles) -> int:
        """Phases that one block sums."""
        return 1 if t.apart else self.phases if self.alike else self.with_taps

    def sharing(self, t: GpuTiles) -> int:
        """Phases that one block sums from the same columns of X."""
        return self.summed(t) if self.alike else 1

    def steps(self, t: GpuTiles) -> tuple[float, float]:
        """Channels of taps that a thread sums: of the average block, and of the one with the most taps."""
        share = self.phases if t.apart or self.alike else 1
        of_a_tap = self.c / t.split
        return self.taps / share * of_a_tap, (self.most_taps if t.apart else self.taps / share) * of_a_tap

    def registers(self, t: GpuTiles) -> int:
        """Registers of a thread: the sums, the factors at hand, and some for addresses."""
        words, sharing = self.sum_bytes // 4, self.sharing(t)
        sums = self.summed(t) * t.tile_m * t.tile_q
        if t.family == "matrix":  # and the fragments of factors: one of W
            return (sums + (EDGE + t.tile_q) * EDGE * self.itemsize // 4) // WARP + 40 + self.fetched(t)
        return words * (sums + t.tile_m * sharing + t.tile_q) + 32 + self.fetched(t)

    def fetched(self, t: GpuTiles) -> int:
        """Registers of a thread for what it holds of the next chunk."""
        if not t.ahead:
            return 0
        rows = t.channels * self.sharing(t)
        held = self.itemsize if t.family == "matrix" else self.held
        return over(t.chunk * (t.positions + rows) * held, 4 * t.threads)

    def shared(self, t: GpuTiles) -> int:
        """Bytes of shared memory that a block uses."""
        together, sharing = self.summed(t), self.sharing(t)
        if t.family == "matrix":
            weights = t.chunk * sharing * (t.channels + PAD)
            factors = (weights + t.positions * (t.chunk + PAD_X[self.itemsize])) * self.itemsize
            pairs = 1 if self.alike else together
            return pairs * factors + together * t.threads_m * EDGE * t.positions * self.sum_bytes
        # rows of shared memory that are set apart
        apart = 2 * 4 if t.lanes == "terms" else 0
        staged = t.chunk * (t.channels * sharing + t.positions + apart) * self.held
        parts = together * t.split * t.channels * t.positions * self.sum_bytes
        return staged + (parts if t.family == "split" else 0)

    def declared(self, t: GpuTiles) -> int:
        """Bytes of shared memory that the text declares: as if threads had whole turns at copying, the last one too."""
        if t.family == "matrix" or not t.chunk:
            return self.shared(t)
        beyond = _beyond(t.chunk, t.positions, t.threads)
        if not self.alike or self.summed(t) == 1:  # else phases come first, of which there are no more
            beyond += _beyond(t.chunk, t.channels, t.threads * (1 if self.gathered else at_once(t.channels)))
        return self.shared(t) + beyond * self.held


# With more phases each block of threads sums one.
_MOST_TOGETHER = 27


def sensible(layer: Sums, ahead: bool) -> Iterator[GpuTiles]:
    """Yield tiles that fit the layer: powers of two, none twice as large as what there is to cover.

    Some fetch chunks ``ahead``, where that is wanted and a tap has several.
    """
    lanes: Literal["positions", "channels"] = "channels" if layer.channels_last else "positions"
    apart = _apart(layer)
    for threads_m, threads_q, tile_m, tile_q in product(_powers(64), _powers(256), _powers(8), _powers(8)):
        if threads_m * tile_m >= 2 * layer.m or threads_q * tile_q >= 2 * layer.positions:
            continue
        threads = threads_m * threads_q
        for a in apart:
            if 32 <= threads <= 256:
                yield GpuTiles("direct", lanes, threads_m, threads_q, tile_m, tile_q, 0, 1, a)
            if not layer.taps or layer.c < 4:
                continue
            if 64 <= threads <= 256 and threads_m >= 2:
                chunks = divisors(layer.c, 32)
                for chunk in chunks[-2:]:
                    yield GpuTiles("staged", lanes, threads_m, threads_q, tile_m, tile_q, chunk, 1, a)
                # shorter ones too: registers hold them
                for chunk in chunks[-4:] if ahead else ():
                    if 4 <= chunk < layer.c:
                        yield GpuTiles("staged", lanes, threads_m, threads_q, tile_m, tile_q, chunk, 1, a, ahead=True)
            for split in (2, 4, 8, 16):
                even = layer.c % split == 0 and tile_m * tile_q % split == 0
                if even and 64 <= threads * split <= 512:
                    yield GpuTiles("split", lanes, threads_m, threads_q, tile_m, tile_q, 0, split, a)
    if layer.m * layer.positions < 32:  # too few for a warp
        yield GpuTiles("direct", lanes, 1, 32, 1, 1, 0, 1, layer.many)


def _apart(layer: Sums) -> list[bool]:
    """Whether phases may lie together, and apart."""
    return [True] if layer.many else [False, True] if layer.phases > 1 and layer.taps else [False]


# Input channels that are staged at a time, at the most.
_MOST_STAGED = 96
# Fragments of channels and of positions that are one warp's, and how many sums its threads have registers for.
_OWN_M, _OWN_Q, _MOST_OWN = (1, 2, 3, 4, 6, 8), (1, 2, 4), 16


def _fragments(layer: Sums, ahead: bool) -> Iterator[GpuTiles]:
    """Yield tiles of whole fragments, for layers that are large enough to fill them; see `sensible`."""
    if not layer.taps or min(layer.m, layer.positions) < EDGE:
        return
    lanes: Literal["positions", "channels"] = "channels" if layer.channels_last else "positions"
    chunks = [n for n in range(EDGE, _MOST_STAGED + 1, EDGE) if layer.c % n == 0]
    for warps_m, warps_q, own_m, own_q, chunk in product(_powers(8), _powers(8), _OWN_M, _OWN_Q, chunks):
        tile_m, tile_q = EDGE * own_m, EDGE * own_q
        if tile_m * warps_m >= 2 * layer.m or tile_q * warps_q >= 2 * layer.positions:
            continue
        # a thread copies channels of one position
        if not 2 <= warps_m * warps_q <= 8 or own_m * own_q > _MOST_OWN or tile_q > WARP * warps_m:
            continue
        # with gaps TVM would declare what the sums leave through once for each phase
        for apart in (each for each in _apart(layer) if not (each and layer.gaps)):
            yield GpuTiles("matrix", lanes, warps_m, warps_q, tile_m, tile_q, chunk, 1, apart)
            if ahead and chunk < layer.c:
                yield GpuTiles("matrix", lanes, warps_m, warps_q, tile_m, tile_q, chunk, 1, apart, ahead=True)


def _positions_together(axis: Axis) -> int:
    """Positions that all phases of an axis cover, where they are numbered by their taps."""
    return max(span.stop for span in axis.spans) - min(span.start for span in axis.spans)


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def _within_limits(layer: Sums, gpu: Gpu, t: GpuTiles) -> bool:
    threads, registers = t.threads, layer.registers(t)
    fits = threads <= gpu.threads and registers <= gpu.registers and registers * threads <= gpu.register_file
    return fits and layer.declared(t) <= gpu.shared


def _beyond(rows: int, length: int, turn: int) -> int:
    """How many elements rows have beyond ``rows`` of ``length`` that are copied in several turns."""
    if rows * length <= turn:
        return 0
    return (over(over(rows * length, turn) * turn, length) - rows) * length


# --- what they cost ---
#
# Cycles of the device by counting instructions of a thread and bytes. The form is the manufacturers' account of
# throughput; the weights were fitted to 1636 candidates of 29 layers in float32 and float16, measured on an H100. They
# are to rank, not to predict: of what was measured, the first of the ranking took 1.11 times as long as the best, in
# the geometric mean, and 1.83 times at the most.

# Issue slots of a load from shared memory, of one through the first cache, of computing where an element of X
# is and whether, of two barriers and waiting for what is loaded between them, of an output, of a block.
_SHARED_LOAD, _CACHED_LOAD, _ADDRESS, _BARRIERS, _OUTPUT, _BLOCK = 1.01, 3.9, 3.95, 22.9, 47.8, 64.5
# The same of two barriers before which everything was loaded. Not fitted: no device has timed such kernels.
_BARRIERS_ALONE = 12
# The same of a fragment of 16-bit elements: four cycles of the banks and more, where a vector of a warp takes one.
_FRAGMENT_LOAD = 4.85 * _SHARED_LOAD
# How much faster than a warp alone could go its matrix instructions are, for they overlap.
_OVERLAP = 2.3
# Channels for which the address of an element serves, by how many elements a thread reads: beyond two it holds
# fewer addresses than it needs.
_SERVES = {1: 8.0, 2: 8.0, 4: 1.93, 8: 0.834}
# Warps that hide latency, of arithmetic on shared memory and of loads from further away; those of one block alone.
_BUSY, _BUSY_LOADING, _BUSY_ALONE = 8.66, 14.0, 6.79
# Registers that the compiler takes for each that is counted, but for those of the next chunk.
_TAKEN = 1.28
# How much faster the second cache is than memory; what share of direct loads the first one leaves to it.
_L2, _MISSED = 2.6, 0.394
# What of the memory's bandwidth kernels reach: a copy reaches 0.73.
_REACHED = 0.587
# Cycles that a block waits for a chunk, whoever else computes. With it, where matrix instructions multiply, the
# counts of 21 baselines in float16 are as far from what an H100 measured as a factor of 1.37 (the root mean square of
# the logarithms); 1.52 without.
_LATENCY = 400
# Cycles that a thread waits for one element of a phase apart, each of which is loaded behind a branch of its own: what
# of the time that L30 took there multiplying does not explain.
_ALONE = 160


def _estimate(layer: Sums, gpu: Gpu, t: GpuTiles) -> GpuEstimate:
    blocks, registers, shared = layer.blocks(t), layer.registers(t), layer.shared(t)
    threads = t.threads
    taken = int(_TAKEN * (registers - layer.fetched(t))) + layer.fetched(t)
    fit = min(gpu.resident // threads, gpu.register_file // (taken * threads) or 1)
    if shared:
        fit = min(fit, gpu.shared_file // shared)
    each = blocks / gpu.processors
    warps = max(1.0, min(fit, each)) * threads / gpu.warp
    busy = min(1.0, warps / (_BUSY if t.chunk else _BUSY_LOADING))
    rate = gpu.lanes if layer.sum_bytes == 4 else gpu.lanes / 2
    step, rest = _step(layer, gpu, t), _rest(layer, t)
    average, most = layer.steps(t)
    computing = max(1.0, each) * threads * (average * step + rest) / (rate * busy)
    # a block of the phase with the most taps may outlast all others
    alone = min(1.0, threads / gpu.warp / _BUSY_ALONE)
    computing = max(computing, threads * (most * step + rest) / (rate * alone))
    if t.chunk:
        turn, longest = (
            threads * (steps * step + rest) / (rate * alone)
            + _waits(layer, gpu, t, steps, threads * t.chunk * step / (rate * alone))
            for steps in (average, most)
        )
        computing = max(computing, max(1.0, each / fit) * turn, longest)
    moving = _moving(layer, gpu, t, blocks)
    cycles = max(computing, moving) + 0.1 * min(computing, moving)
    return GpuEstimate(t, cycles, computing, moving, blocks, registers, layer.declared(t))


def _waits(layer: Sums, gpu: Gpu, t: GpuTiles, steps: float, multiplying: float) -> float:
    """Cycles that a block waits for the chunks of ``steps``, each of which takes so long to be multiplied."""
    chunks = steps / t.chunk
    if t.ahead:
        # a tap's first, and of the others what multiplying the one before does not cover
        first = steps / layer.c
        return first * _LATENCY + (chunks - first) * max(0.0, _LATENCY - multiplying)
    if t.family == "matrix":
        return chunks * _LATENCY
    more = over(t.chunk * t.positions, t.threads) - 1
    return chunks * (_LATENCY + more * _ALONE) if t.apart and gpu.ahead else 0.0


def _step(layer: Sums, gpu: Gpu, t: GpuTiles) -> float:
    """Issue slots of one thread for a channel of a tap: of all phases where they are alike."""
    rows = t.tile_m * layer.sharing(t)
    weights, elements = rows / at_once(t.tile_m), t.tile_q / (at_once(t.tile_q) if t.own == 1 else 1)
    step: float = rows * t.tile_q
    if not t.chunk:
        weights = rows if layer.gathered else weights
        address = _ADDRESS / min(layer.c / t.split, _SERVES[t.tile_q])
        return step + _CACHED_LOAD * (weights + t.tile_q) + address * t.tile_q
    copied = t.positions * (_CACHED_LOAD + _ADDRESS)
    weight = _CACHED_LOAD + _ADDRESS if layer.gathered else _CACHED_LOAD / at_once(t.channels)
    copied += t.channels * rows / t.tile_m * weight
    if t.family == "matrix":  # a load of a fragment brings 16 channels, of which this is one
        wide = layer.itemsize / 2
        own_units = gpu.matrix > gpu.lanes
        step *= (gpu.lanes / gpu.matrix * wide / WARP / _OVERLAP) if own_units else 1 / WARP
        load = _FRAGMENT_LOAD * wide / _SHARED_LOAD
        weights, elements = load * rows / EDGE / EDGE, load * t.tile_q / EDGE / EDGE
    barriers = _BARRIERS_ALONE if t.ahead else _BARRIERS
    return step + _SHARED_LOAD * (weights + elements) + t.split * (copied / t.threads + barriers / t.chunk)


def _rest(layer: Sums, t: GpuTiles) -> float:
    """Issue slots of one thread beside its sums."""
    outputs = max(1.0, layer.summed(t) * t.channels * t.positions / t.threads)
    return outputs * (_OUTPUT + (t.split / 2 if t.family == "split" else 0)) + _BLOCK


def _moving(layer: Sums, gpu: Gpu, t: GpuTiles, blocks: int) -> float:
    """Cycles that moving bytes takes: once through memory, and what every block reads through the second cache."""
    bytes_per_cycle = _REACHED * gpu.bandwidth_gbs / gpu.clock_ghz
    # a phase apart writes single elements of sectors of 32 bytes
    wasted = min(layer.row_stride, 32 // layer.itemsize) if t.apart and not layer.channels_last else 1
    memory = layer.x_bytes + layer.w_bytes + layer.y_bytes * wasted
    taps = layer.taps / (layer.phases if layer.alike or t.apart else 1)
    rows = t.channels * layer.sharing(t)
    read = blocks * layer.c * layer.itemsize * taps * (t.positions + rows) * (1 if t.chunk else _MISSED)
    return max(memory / bytes_per_cycle, read / (_L2 * bytes_per_cycle))


def at_once(length: int) -> int:
    """How many of ``length`` neighbouring elements to move at once."""
    return 4 if length % 4 == 0 else 2 if length % 2 == 0 else 1
