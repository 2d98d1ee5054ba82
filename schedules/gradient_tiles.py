"""Which numbers the schedules of the derivatives use, decided by arithmetic over the layer and the machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from schedules.counted import counted
from schedules.division import divisors, largest_divisor, over, up

if TYPE_CHECKING:
    from opcompile.gradients.gradient import Gradient
    from opcompile.target import Machine

# What vectors run along.
Vector = Literal["channels", "row"]
_ALONG: tuple[Vector, ...] = ("channels", "row")
# What a task keeps beside its sums should leave the second cache room for what passes through.
_SHARE_OF_L2 = 2
# Up to so many positions, weights may outweigh what they meet.
_FEW_POSITIONS = 1024
# Lines of a transposed block that the first cache is trusted to hold while each is visited once an element.
_LINES = 256


@dataclass(frozen=True, slots=True, order=True)
class InputTiles:
    """The numbers of a schedule of dX.

    ``lanes`` is the number of elements in a vector register. A register tile holds ``vectors`` vectors
    times ``scalars`` broadcast values times ``rows`` rows of X: vectors of input channels times columns,
    or vectors of columns times channels. A task covers ``channels`` of ``height`` rows in ``depth``
    planes of X. ``turn`` weights of a channel are transposed together. ``ahead`` of the first task either
    the ``weights`` are transposed, and each task copies the part of dY that it meets; or all dY is
    copied, and each task transposes its own weights: right where these outweigh dY.
    """

    vector: Vector
    lanes: int
    vectors: int
    scalars: int
    rows: int
    channels: int
    depth: int
    height: int
    turn: int
    ahead: Literal["weights", "dy"]

    @property
    def block(self) -> int:
        """Channels that lie side by side in the transposed weight."""
        return self.lanes if self.vector == "channels" else self.scalars

    @property
    def columns(self) -> int:
        """Columns of X in the register tile."""
        return self.scalars if self.vector == "channels" else self.vectors * self.lanes


@dataclass(frozen=True, slots=True, order=True)
class WeightTiles:
    """The numbers of a schedule of dW.

    A register tile holds the sums of ``vectors`` vectors of input channels (or, with ``vector="row"``,
    of ``vectors`` channels, each a vector of partial sums along the row), ``scalars`` output channels
    and ``taps`` neighbouring taps. A task covers ``task_c`` by ``task_m`` channels and one of ``slices``
    of the planes; it takes the positions in blocks of ``depth`` planes and ``height`` rows. ``turn``
    output channels are transposed together when dW is written.
    """

    vector: Vector
    lanes: int
    vectors: int
    scalars: int
    taps: int
    task_c: int
    task_m: int
    depth: int
    height: int
    slices: int
    turn: int

    @property
    def width(self) -> int:
        """Input channels in the register tile."""
        return self.vectors * self.lanes if self.vector == "channels" else self.vectors


@dataclass(frozen=True, slots=True, order=True)
class BiasTiles:
    """The numbers of a schedule of dB: sums along ``vector`` in ``lanes``, of ``slices`` of the positions apart."""

    vector: Vector
    lanes: int
    slices: int


T = TypeVar("T", InputTiles, WeightTiles, BiasTiles)


@dataclass(frozen=True, slots=True)
class Estimate(Generic[T]):
    """Tiles and what the arithmetic says of them: cycles of one core for the whole derivative."""

    tiles: T
    computing: float
    moving: float
    used: float

    @property
    def cycles(self) -> float:
        """All of them."""
        return self.computing + self.moving

    def why(self) -> tuple[str, ...]:
        """The argument in words, one line a fact."""
        return (
            *_WORDS[type(self.tiles)](self.tiles),
            f"estimated cycles: {self.computing:.3g} computing, {self.moving:.3g} copying, transposing and storing; "
            f"{self.used:.0%} of what the tiles compute is needed",
        )


def _input_words(t: InputTiles) -> tuple[str, ...]:
    along = "input channels" if t.vector == "channels" else "columns of the row"
    return (
        f"vectors of {t.lanes} {along}; a register tile of {counted(t.vectors, 'vector')} x "
        f"{counted(t.scalars, 'broadcast value')}" + (f" x {t.rows} rows" if t.rows > 1 else ""),
        f"a task covers {counted(t.channels, 'channel')} of {counted(t.height, 'row')} in "
        f"{counted(t.depth, 'plane')}, and "
        + ("copies the dY they meet" if t.ahead == "weights" else "transposes its weights; dY is copied ahead"),
    )


def _weight_words(t: WeightTiles) -> tuple[str, ...]:
    along = f"vectors of {t.lanes} input channels" if t.vector == "channels" else f"channels, {t.lanes} sums of each"
    return (
        f"a register tile of {t.vectors} {along} x {counted(t.scalars, 'output channel')} x {counted(t.taps, 'tap')}",
        f"a task covers {t.task_c} x {t.task_m} channels, in blocks of {counted(t.height, 'row')} in "
        f"{counted(t.depth, 'plane')}"
        + (f"; {t.slices} slices of the planes are summed apart" if t.slices > 1 else ""),
    )


def _bias_words(t: BiasTiles) -> tuple[str, ...]:
    along = "channels" if t.vector == "channels" else "positions"
    return (f"vectors of {t.lanes} {along}; {t.slices} slices of the positions are summed apart",)


_WORDS: dict[type, Callable[[Any], tuple[str, ...]]] = {
    InputTiles: _input_words,
    WeightTiles: _weight_words,
    BiasTiles: _bias_words,
}


# --- what the arithmetic needs of a layer ---


@dataclass(frozen=True, slots=True)
class _Layer:
    """``c`` and ``m`` are channels of a group, ``images`` the groups of all batch elements; bytes are of sums."""

    itemsize: int
    c: int
    m: int
    groups: int
    images: int
    size: tuple[int, int, int]
    stride: tuple[int, int, int]
    kernel: tuple[int, int, int]
    dilation: tuple[int, int, int]
    channels_first: bool

    @classmethod
    def of(cls, gradient: Gradient) -> _Layer:
        spec = gradient.layer
        d, h, w = spec.axes
        return cls(
            itemsize=spec.sum_itemsize,
            c=spec.c_in,
            m=spec.m_out,
            groups=spec.groups,
            images=spec.groups * (spec.batch or 1),
            size=(d.size, h.size, w.size),
            stride=(d.stride, h.stride, w.stride),
            kernel=(d.kernel, h.kernel, w.kernel),
            dilation=(d.dilation, h.dilation, w.dilation),
            channels_first=spec.layout == "NCDHW",
        )

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def together(self) -> int:
        """Groups that a task computes."""
        return 1 if self.channels_first else self.groups

    def window(self, depth: int, height: int, width: int) -> int:
        """Bytes of one channel of dY that meet a block of positions."""
        spans = zip((depth, height, width), self.stride, self.kernel, self.dilation, strict=True)
        return self.itemsize * math.prod(up((n - 1) * s + (k - 1) * d + 1, s) for n, s, k, d in spans)


def input_candidates(gradient: Gradient, machine: Machine) -> list[Estimate[InputTiles]]:
    """Every sensible choice for dX, best first; never empty. Deterministic."""
    layer = _Layer.of(gradient)
    return _ranked(_estimate_input(layer, machine, t) for t in _inputs(layer, machine))


def weight_candidates(gradient: Gradient, machine: Machine) -> list[Estimate[WeightTiles]]:
    """Every sensible choice for dW, best first; never empty. Deterministic."""
    layer = _Layer.of(gradient)
    return _ranked(_estimate_weight(layer, machine, t) for t in _weights(layer, machine))


def bias_candidates(gradient: Gradient, machine: Machine) -> list[Estimate[BiasTiles]]:
    """The one choice for dB: as many slices as there are cores, and no empty ones."""
    layer = gradient.layer
    lanes = machine.vector_bytes // layer.sum_itemsize
    positions = math.prod(axis.out for axis in layer.axes)
    along = layer.layout == "NDHWC"
    vectors = positions if along else over(positions, lanes)
    # several sums at a time would hide the additions' latency, but memory is slower still
    busy = 1 if along else layer.channels_out * (layer.batch or 1)
    slices = max(1, min(over(machine.cores, busy), vectors // 64))
    y_bytes = layer.bytes_of(layer.y_shape)
    tiles = BiasTiles("channels" if along else "row", lanes, slices)
    return [Estimate(tiles, y_bytes / layer.itemsize / lanes * 4, y_bytes / 4, 1.0)]


def _ranked(estimates: Iterator[Estimate[T]]) -> list[Estimate[T]]:
    return sorted(estimates, key=lambda e: (e.cycles, e.tiles))


# --- dX ---


def _inputs(layer: _Layer, machine: Machine) -> Iterator[InputTiles]:
    lanes = machine.vector_bytes // layer.itemsize
    planes, lines, width = layer.size
    for vector, vectors, scalars, rows in product(_ALONG, range(1, 7), range(1, 17), range(1, min(4, lines) + 1)):
        if _registers(vectors, scalars * rows) > machine.registers:
            continue
        channels, columns = (vectors * lanes, scalars) if vector == "channels" else (scalars, vectors * lanes)
        if channels >= layer.c + (lanes if vector == "channels" else 1):
            continue
        if columns >= width + (lanes if vector == "row" else 1):
            continue
        whole = up(layer.c, channels)
        turn = largest_divisor(layer.m, _LINES // layer.taps)
        for depth, height in product((1, 2, planes), sorted({rows, 2 * rows, 4 * rows, up(lines, rows)})):
            if depth > planes or height >= lines + rows:
                continue
            held = layer.together * (
                layer.m * layer.window(depth, height, up(width, columns))
                + layer.itemsize * whole * depth * height * up(width, columns)
            )
            tasks = layer.images // layer.together * over(planes, depth) * over(lines, height)
            task = _part_of(whole, channels, over(machine.cores, tasks), exact=layer.groups > 1)
            if held <= machine.l2_bytes // _SHARE_OF_L2 or (depth, height) == (1, rows):
                yield InputTiles(vector, lanes, vectors, scalars, rows, task, depth, height, turn, "weights")
        task = _part_of(whole, channels, over(machine.cores, layer.images), exact=layer.groups > 1)
        if layer.channels_first and math.prod(layer.size) <= _FEW_POSITIONS:
            yield InputTiles(vector, lanes, vectors, scalars, rows, task, planes, up(lines, rows), turn, "dy")


def _estimate_input(layer: _Layer, machine: Machine, t: InputTiles) -> Estimate[InputTiles]:
    planes, lines, width = (up(n, of) for n, of in zip(layer.size, (t.depth, t.height, t.columns), strict=True))
    a_tile = t.vectors * t.lanes if t.vector == "channels" else t.scalars
    channels, sums = up(layer.c, t.channels), t.vectors * t.scalars * t.rows
    tiles = layer.images * planes * (lines // t.rows) * (width // t.columns) * (channels // a_tile)
    # weights pass by once a tile: out of the first cache, the second, or beyond
    of_tile = layer.itemsize * a_tile * layer.m * layer.taps
    again = t.depth * t.height * width // (t.rows * t.columns)
    near = 0.0 if of_tile <= machine.l1_bytes // 2 else 1 / 50 if of_tile <= machine.l2_bytes // 2 else 1 / 11
    a_weight = layer.itemsize * a_tile * (near * (1 - 1 / again) + 1 / 11 / again)
    if t.vector == "channels":
        loads = t.vectors + t.scalars * t.rows
        a_line = layer.itemsize * t.rows * min(layer.stride[2] * t.columns, 2 * t.columns)
        step = a_weight + a_line / 50
    else:
        loads = int(1.7 * t.vectors * t.rows) + t.scalars
        step = a_weight + layer.itemsize * t.rows * t.columns / 40 + 0.25 * loads
    step += max(sums, machine.fma_in_flight) / 2 + 0.25 * loads
    computing = tiles * (layer.m * layer.taps * step + layer.taps * 8 + 3 * sums + 60)
    tasks = layer.images * (planes // t.depth) * (lines // t.height) * (channels // t.channels)
    rows = layer.window(t.depth, t.height, width) // layer.window(1, 1, width) * layer.m
    a_copy = layer.m * layer.window(t.depth, t.height, width) / 5 + rows * 10
    if t.vector == "row":  # phases are taken apart, element by element
        a_copy *= 3
    weights = layer.groups * channels * layer.m * layer.taps
    if t.ahead == "weights":
        # they go through memory, and come back
        away = 3 if layer.itemsize * weights > machine.l2_bytes // 2 else 0
        moving = tasks * a_copy + weights * (2.5 + away)
    else:
        moving = layer.images * a_copy + layer.images // layer.groups * weights * 2.5
    moving += layer.images * layer.c * math.prod(layer.size) * (2.5 if layer.channels_first else 1)
    used = layer.c * math.prod(layer.size) / (channels * planes * lines * width)
    return Estimate(t, computing, moving, used)


# --- dW ---


def _weights(layer: _Layer, machine: Machine) -> Iterator[WeightTiles]:
    lanes = machine.vector_bytes // layer.itemsize
    for vector, vectors, scalars, taps in product(
        _ALONG, range(1, 7), range(1, 17), divisors(layer.kernel[2], layer.kernel[2])
    ):
        if _registers(vectors, scalars * taps) > machine.registers or scalars > layer.m:
            continue
        channels = vectors * lanes if vector == "channels" else vectors
        if channels >= layer.c + (lanes if vector == "channels" else 1):
            continue
        width = layer.size[2] if vector == "channels" else up(layer.size[2], lanes)
        whole_c, whole_m = up(layer.c, channels), up(layer.m, scalars)
        turn = largest_divisor(layer.m, _LINES // layer.taps)
        seen = set()
        for (depth, height), parts in product(_blocks(layer), (1, 2, 4, 8)):
            slices, task_c, task_m = _spread(layer, machine, depth, (channels, scalars), (whole_c, whole_m), parts)
            held = layer.itemsize * task_c * depth * height * width + task_m * layer.window(depth, height, width)
            fits = held <= machine.l2_bytes // _SHARE_OF_L2 or (depth, height) == (1, 1)
            if not fits or (depth, height, task_c, task_m) in seen:
                continue
            seen.add((depth, height, task_c, task_m))
            yield WeightTiles(vector, lanes, vectors, scalars, taps, task_c, task_m, depth, height, slices, turn)


def _blocks(layer: _Layer) -> list[tuple[int, int]]:
    """Blocks of planes and rows that waste little at the end; the smallest first."""
    planes, lines, _ = layer.size
    heights = {n for n in (1, 2, 4, 8, 16, lines) if n <= lines and up(lines, n) * 8 <= lines * 9}
    depths = {n for n in (2, 4, planes) if n <= planes and up(planes, n) * 8 <= planes * 9}
    return sorted({(1, height) for height in heights} | {(depth, lines) for depth in depths})


def _spread(
    layer: _Layer, machine: Machine, depth: int, tile: tuple[int, int], whole: tuple[int, int], parts: int
) -> tuple[int, int, int]:
    """Slices, and channels of a task: work for every core, copying as little twice as can be.

    Slices copy nothing twice, but each has sums of its own, which should be small beside what they
    sum; then output channels are split, which copies X again, the smaller of the two tensors. Input
    channels are split into ``parts`` at least, so that larger blocks of positions fit into the cache.
    """
    (tile_c, tile_m), (whole_c, whole_m) = tile, whole
    wanted = over(machine.cores, layer.groups)
    planes = over(layer.size[0], depth)
    sums, summed = whole_c * whole_m * layer.taps, layer.m * math.prod(layer.size) * math.prod(layer.stride)
    most = min(wanted, planes, summed // (16 * sums) if sums else 1)
    slices = max((n for n in range(1, most + 1) if up(planes, n) * 8 <= planes * 9), default=1)
    task_m = _part_of(whole_m, tile_m, over(wanted, slices * parts), exact=False)
    task_c = _part_of(whole_c, tile_c, max(parts, over(wanted, slices * (whole_m // task_m))), exact=False)
    return slices, task_c, task_m


def _estimate_weight(layer: _Layer, machine: Machine, t: WeightTiles) -> Estimate[WeightTiles]:
    planes, lines = up(over(layer.size[0], t.depth), t.slices), over(layer.size[1], t.height)
    width = layer.size[2] if t.vector == "channels" else up(layer.size[2], t.lanes)
    c, m, sums = up(layer.c, t.task_c), up(layer.m, t.task_m), t.vectors * t.scalars * t.taps
    parts = layer.images * planes * lines
    tiles = (c // t.width) * (m // t.scalars) * (layer.taps // t.taps)
    loads: float
    if t.vector == "channels":
        steps, loads = t.depth * t.height * width, t.vectors + t.scalars * t.taps
        a_block = layer.itemsize * t.width * steps
    else:
        # vectors of a row start anywhere: most of them straddle two cache lines
        steps, loads = t.depth * t.height * width // t.lanes, t.vectors + 1.7 * t.scalars * t.taps
        a_block = layer.itemsize * t.width * steps * t.lanes
    step = max(sums, machine.fma_in_flight) / 2 + 0.25 * loads
    step += 0 if a_block <= machine.l1_bytes // 2 else layer.itemsize * t.vectors * t.lanes / 50
    far = layer.itemsize * t.task_c * t.task_m * layer.taps > machine.l2_bytes // 2
    computing = parts * tiles * (steps * step + sums * (12 if far else 4) + t.depth * t.height * 6 + 40)
    copied = parts * (c // t.task_c) * m * layer.window(t.depth, t.height, width) / 5
    copied += parts * (m // t.task_m) * c * t.depth * t.height * width * (2 if layer.channels_first else 1)
    written = layer.groups * layer.c * layer.m * layer.taps * (4 + 2 * t.slices)
    used = layer.c * layer.m * math.prod(layer.size) / (c * m * planes * t.depth * lines * t.height * width)
    return Estimate(t, computing, copied + written, used)


# --- numbers ---


def _registers(vectors: int, scalars: int) -> int:
    """Registers of a tile: its sums, the factors of its smaller side, and one of the other at a time."""
    return vectors * scalars + min(vectors, scalars) + 1


def _part_of(whole: int, tile: int, parts: int, *, exact: bool) -> int:
    """The largest multiple of ``tile`` that divides ``whole`` into ``parts`` or more, or else into all tiles.

    ``exact`` where a part must not straddle groups: then all of it.
    """
    if exact:
        return whole
    tiles = whole // tile
    return tile * largest_divisor(tiles, tiles // parts)
