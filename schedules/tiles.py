"""Which numbers a CPU schedule uses, decided by arithmetic over the layer and the machine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from schedules.counted import counted
from schedules.division import largest_divisor, over, up

if TYPE_CHECKING:
    from opcompile.spec import Axis, ConvTranspose3d
    from opcompile.target import Machine

CACHE_LINE = 64
# So many taps of a plane may be unrolled, by a tile of one row, and by one of several: code grows with them.
_MOST_UNROLLED = (9, 49)
# So many taps of a row, or of a plane, may each take columns, or rows, of their own: code grows with them.
_MOST_TRIMMED = 9
# A turn of a loop over channels has so many multiply-adds at most: more gain nothing, and code grows with them.
_MOST_OF_TURN = 64
# Of more sums by one vector of weights, two channels in a turn leave LLVM too few registers to multiply in place: it
# moves most of them from one to the next, and two lie on the stack.
_FEW_SUMS = 8
# For so few output channels of a group may each tap have sums of its own; of so many taps, where these are summed at
# lines of padded rows, and at planes of X as they lie. Where channels come last, those of a row are added up at once,
# so many taps of all together.
_FEW_OUTPUTS = 8
_MOST_TAPS = {"taps": 64, "plane": 343}
_MOST_TAPS_LAST = 512
# With more than 27 phases, of so many taps: 216 took nine seconds to compile.
_MOST_TAPS_OF_MANY_PHASES = 125
# So many places of Y may be written in turn without losing the prefetcher and the pages.
_STREAMS = 8
# Rows of more phases than these are left to LLVM; where channels come last, of more phases of all channels, and those
# of which more vectors would be unrolled, over the phases of planes and rows: with an activation that is more than a
# few selections, and with one that is not.
MOST_WOVEN = 4
_MOST_WOVEN_LAST = 8
_MOST_OF_ROWS_LAST = (32, 64)
# There vectors of fewer sums are shuffled more slowly than their elements are written one by one.
LEAST_WOVEN_LAST = 8
# Workspaces of a task are so many times smaller than X and Y, or than the second cache; than that, sums by taps of an X
# that is copied before.
_SMALL = 10
_PART_OF_SECOND = 8
_PART_FOR_TAPS = 2
# Of fewer channels at a time, putting sums down and taking them up again costs more than a cache gives back.
_LEAST_CHUNK = 8
# So few channels do not go by chunks through lines of padded rows: that gains nothing.
_FEW_CHANNELS = 63
# With fewer, a register tile of several phases has too few sums: 12 with AVX2, with several input channels up to a half
# slower than bands.
_MANY_REGISTERS = 32
# For so few elements of X, weights come from memory, and multiplying is no matter.
_FEW_ELEMENTS = 16
# Where each phase has one tap, bands are up to 15 % faster than tiles that write Y of fewer output channels and more
# input channels; and where an activation is more than a few selections.
_FEW_BY_TILES = 4
_SELECTIONS = ("none", "relu", "relu6", "leaky_relu")
# Into how many lines a plane may be cut.
_PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128)

# What vectors run along where they are of output channels.
_OF_CHANNELS = ("channels", "groups")

Vector = Literal["channels", "groups", "row", "line", "taps", "plane"]
Copy = Literal["task", "chunk", "whole", "none"]
Store = Literal["cached", "streamed"]


@dataclass(frozen=True, slots=True, order=True)
class Tiles:
    """The numbers of one schedule.

    ``vector`` says what vectors run along; ``lanes`` is the number of elements in a vector register, ``vectors`` and
    ``scalars`` the register tile, ``rows`` how many rows of qH it spans (one line, where they are laid end to end). A
    band covers ``task`` channels of ``height`` rows of qH in ``depth`` planes of qD; a task goes through
    ``bands_d`` by ``bands_h`` by ``bands_m`` of them, along planes, rows and channels. The sums take
    ``chunk`` input channels at a time through the taps of a plane of X. ``copy`` says who copies X: each task the
    rows that it reads, or those of a chunk at a time, which then goes through all taps and bands before the next;
    or all tasks together before the first; or none, where tiles can read X where it lies. ``products`` of neighbouring
    input channels are added to a sum by one instruction: 1 of the type of the sums, 2 of bfloat16. ``store`` says how Y
    is written: into the caches, or past them, where it begins at a cache line or tiles put rows together. ``woven``
    says by what Y is written: from the buffers of a band, or by each register tile, of the phases of a row, or the
    channels, that it sums.
    """

    vector: Vector
    lanes: int
    vectors: int
    scalars: int
    rows: int
    task: int
    depth: int
    height: int
    chunk: int
    copy: Copy
    bands_d: int = 1
    bands_h: int = 1
    bands_m: int = 1
    products: int = 1
    store: Store = "cached"
    woven: Literal["band", "tile"] = "band"

    def fields(self) -> dict[str, int | str]:
        """Return the numbers by name; of `LATER` only those that differ, as in records from before they were."""
        return {name: n for name, n in asdict(self).items() if n != LATER.get(name)}

    @property
    def by_taps(self) -> bool:
        """Whether each tap has sums of its own."""
        return self.vector in ("taps", "plane")

    @property
    def channels(self) -> int:
        """Channels in the register tile."""
        if self.by_taps:
            return self.task
        return self.vectors * self.lanes if self.of_channels else self.scalars

    @property
    def of_channels(self) -> bool:
        """Whether vectors run along output channels, of a group or of groups that have one each."""
        return self.vector in _OF_CHANNELS

    @property
    def columns(self) -> int:
        """Columns of the row, or positions of the line, in the register tile."""
        return self.scalars if self.of_channels else self.vectors * self.lanes

    @property
    def block(self) -> int:
        """Channels that lie side by side in the packed weight."""
        return self.lanes if self.of_channels else self.scalars

    def channels_of_turn(self, taps: int, phases: int = 1) -> int:
        """How many channels, with ``taps`` of each of ``phases``, a turn of a loop takes.

        Several, for each turn costs instructions.
        Where two threads share a core, each fetches instructions every other cycle, and 12 multiply-adds, their 8 loads
        and what goes on to the next channel would take longer to fetch than to compute; several channels a turn were
        measured to gain most in such minutes. And their weights are one line, to be asked for once.
        """
        sums = self.vectors * self.scalars * self.rows * phases
        if self.vector == "channels" and self.vectors == 1 and sums > _FEW_SUMS:
            return 1
        return largest_divisor(self.chunk // self.products, _MOST_OF_TURN // (sums * taps))

    def unrolls(self, taps: int) -> bool:
        """Whether a register tile takes ``taps`` of a plane at once: where loading X costs more than its products."""
        return not self.of_channels and self.scalars == 1 and taps <= _MOST_UNROLLED[self.shares_rows]

    @property
    def shares_rows(self) -> bool:
        """Whether products of one vector of X follow each other, where taps are unrolled: for all rows that read it."""
        return self.vector == "row" and self.scalars == 1 and self.rows > 1

    def skips_rows(self, taps: tuple[int, int, int]) -> bool:
        """Whether a tap can be left out where the row that it reads lies beside X: one row at a time, tap by tap."""
        return self.vector != "line" and self.rows == 1 and (taps[1] == 1 or not self.unrolls(taps[1] * taps[2]))

    def trims(self, width: int, taps: int) -> bool:
        """Whether each of the ``taps`` of a row takes only columns that read X: where a tile is a row of ``width``."""
        return self.of_channels and self.scalars >= width and taps <= _MOST_TRIMMED

    def trims_rows(self, height: int, taps: int) -> bool:
        """Whether each of the ``taps`` of a plane takes only rows that read X: where a tile has all ``height`` rows."""
        return self.of_channels and 1 < height <= self.rows and taps <= _MOST_TRIMMED

    @property
    def line(self) -> int:
        """How many rows of qH, or of X as it lies, are laid end to end; 0 where each is by itself."""
        return self.height if self.vector in ("line", "taps", "plane") else 0

    @property
    def of_task(self) -> tuple[int, int, int]:
        """Channels, planes of qD and rows of qH that a task covers, with all its bands."""
        return self.task * self.bands_m, self.depth * self.bands_d, self.height * self.bands_h

    def taking(self, copy: Copy, chunk: int, bands: tuple[int, int, int]) -> Tiles:
        """The same tiles in tasks of so many bands: `dataclasses.replace`, in half its time."""
        tile = (self.vector, self.lanes, self.vectors, self.scalars, self.rows, self.task, self.depth, self.height)
        return Tiles(*tile, chunk, copy, *bands, self.products, self.store, self.woven)

    @property
    def positions(self) -> tuple[int, int, int]:
        """Multiples to which qD, qH, qW are rounded up; the last is the line's where rows form lines."""
        return (self.depth, self.height, self.columns)


# What records from before it was stand for.
LATER = {"products": 1, "store": "cached", "woven": "band"}


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


def candidates(spec: ConvTranspose3d, machine: Machine) -> list[Estimate]:
    """Every sensible choice of tiles, best first by estimated cycles; never empty.

    Deterministic: the order depends on ``spec`` and ``machine`` alone.
    """
    whole, *pairs = [_Layer.of(spec, products) for products in ((1, 2) if takes_pairs(spec, machine) else (1,))]
    stores = {vector: _store(spec, vector, machine) for vector in get_args(Vector)}
    choices = [(layer, machine, tiles) for layer in (whole, *pairs) for tiles in _sensible(layer, machine, stores)]
    if takes_groups(spec) and spec.groups >= sums_of_a_vector(spec, machine):  # in pieces, vectors are slower than rows
        own = _Layer.of(spec, 1, own=True)
        choices += [(own, machine, tiles) for tiles in _sensible(own, machine, stores)]
    choices += [(whole, machine, tiles) for tiles in _by_taps(spec, whole, machine, stores)]
    choices += [(whole, machine, tiles) for tiles in _by_tiles(spec, whole, machine, stores)]
    if woven_by_tiles(spec, of_channels=True):
        choices += [
            (layer, on, replace(t, woven="tile"))
            for layer, on, t in choices
            if t.of_channels and t.products == 1 and not left_over(spec, t)[0] and _returns_soon(spec, t)
        ]
    if (half := halved(spec, machine)) is not None:
        choices += [(whole, half, tiles) for tiles in _sensible(whole, half, stores) if tiles.vector == "channels"]
    estimates = [_estimate(layer, on, tiles) for layer, on, tiles in choices]
    return sorted(estimates, key=lambda e: (e.cycles, -e.tiles.depth, -e.tiles.height, e.tiles))


@lru_cache(maxsize=256)
def baseline(spec: ConvTranspose3d, machine: Machine) -> Estimate:
    """The tiles to use where nothing was measured."""
    return candidates(spec, machine)[0]


def takes_pairs(spec: ConvTranspose3d, machine: Machine) -> bool:
    """Whether channels of ``spec`` can be multiplied as pairs of bfloat16."""
    return machine.pairs and spec.dtype == "bfloat16" and spec.c_in % 2 == 0


def takes_groups(spec: ConvTranspose3d) -> bool:
    """Whether vectors may run along groups: each has one channel, and they are side by side in X and in Y."""
    return spec.layout == "NDHWC" and 1 < spec.groups == spec.channels_in == spec.channels_out


def divided(spec: ConvTranspose3d, t: Tiles) -> tuple[int, int]:
    """Groups, and how many output channels each has; what vectors run along is channels of a single one."""
    groups = 1 if t.vector == "groups" else spec.groups
    return groups, spec.channels_out // groups


def sums_of_a_vector(spec: ConvTranspose3d, machine: Machine) -> int:
    """How many sums of ``spec`` a vector of ``machine`` holds."""
    return machine.vector_bytes // spec.sum_itemsize


def halved(spec: ConvTranspose3d, machine: Machine) -> Machine | None:
    """The machine with vectors of half the width, where those of the channels of ``spec`` waste less so."""
    half, lanes = machine.halved, sums_of_a_vector(spec, machine)
    wasted = -spec.m_out % lanes
    return half if half is not None and wasted >= lanes // 2 else None


def joined(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many planes of positions a line of ``spec`` goes through."""
    return _layer(spec, t).joined(t)


def by_rows(spec: ConvTranspose3d, t: Tiles) -> bool:
    """Whether weights of a row of taps lie together in each channel: where they are taken at once, and one phase's."""
    axis = spec.axes[2]
    return t.vector in ("row", "line") and axis.kernel % axis.tap_step == 0


def length_of_row(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many elements a row of the copy of X has; planes as they lie are one row each, or all together."""
    return _layer(spec, t).as_they_lie(t) if t.vector == "plane" else reach(spec.axes[2])


def woven_by_tiles(spec: ConvTranspose3d, of_channels: bool) -> bool:
    """Whether register tiles may write Y: where each phase has taps.

    Vectors of channels may where these come last, vectors of positions where the phases of a row are few enough to be
    woven. Functions of float64 are the library's, for one element at a time.
    """
    if spec.sum_dtype == "float64" or of_channels != (spec.layout == "NDHWC") or spec.phases_as_axes:
        return False
    if any(axis.summed != axis.phases for axis in spec.axes):
        return False
    return of_channels or len(spec.axes[2].phases) == spec.axes[2].stride <= MOST_WOVEN


def reads_in_place(spec: ConvTranspose3d, t: Tiles) -> bool:
    """Whether tiles that write rows of Y can read X where it lies: all that they read is there, and as wide as sums.

    With more output channels in a group each element would be read many times, from lines that lie far apart.
    """
    if t.woven == "band" or t.of_channels or spec.dtype != spec.sum_dtype:
        return False
    few = spec.m_out <= _FEW_OUTPUTS
    spans = zip(spec.axes, t.positions, strict=True)
    return few and all(a.reads == (0, 0) and up(a.positions, multiple) <= a.size for a, multiple in spans)


def left_over(spec: ConvTranspose3d, t: Tiles) -> tuple[bool, bool, bool]:
    """Whether tasks go beyond the channels of a group, the planes and the rows of Y."""
    _, m = divided(spec, t)
    depth, height, _ = spec.axes
    return m % t.task > 0, depth.out % (depth.stride * t.depth) > 0, height.out % (height.stride * t.height) > 0


def phases_at_once(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many phases a register tile sums in one loop: those of a row, where it weaves them."""
    return _layer(spec, t).at_once(t)


def tiles_of_band(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many register tiles of a band multiply the same weights."""
    return _layer(spec, t).band(t) // (t.columns * t.rows)


def weaves(spec: ConvTranspose3d) -> bool:
    """Whether rows of Y are written in vectors of one element of each phase, and last channel, in turn."""
    axis = spec.axes[2]
    few = axis.stride <= MOST_WOVEN
    if spec.layout == "NDHWC":
        vectors = math.prod(a.stride for a in spec.axes) * spec.channels_out
        few = axis.stride * spec.channels_out <= _MOST_WOVEN_LAST
        few &= vectors <= _MOST_OF_ROWS_LAST[spec.activation.name in _SELECTIONS]
    return few and axis.out >= 2 * axis.stride


def copies_chunks(spec: ConvTranspose3d) -> bool:
    """Whether a task may copy X of ``spec`` by chunks of its channels: each phase has sums, and channels lie apart."""
    return spec.layout == "NCDHW" and spec.terms > 0 and not spec.phases_as_axes


def square(spec: ConvTranspose3d, columns: int) -> int:
    """Of so many channels, and of ``columns``, squares are transposed as X is copied; 0 where none are."""
    # where a variable is bound, TVM forgets that the integers that it keeps bfloat16 as are none
    if spec.layout == "NCDHW" or spec.dtype == "bfloat16":
        return 0
    channels = spec.c_in
    return next((n for n in (8, 4) if n <= columns and channels % n == 0), 0)


def streams(spec: ConvTranspose3d, vector: str, machine: Machine) -> bool:
    """Whether Y is written past the caches: a large one, in whole lines."""
    channels_first = spec.layout == "NCDHW"
    channels = spec.channels_out if vector == "groups" else spec.m_out
    side_by_side = spec.axes[2].out if channels_first else channels
    # what is written at once, woven of all phases of a row, must be whole lines too
    of_lines = machine.vector_bytes * (spec.axes[2].stride if channels_first else 1) % CACHE_LINE == 0
    return (
        spec.dtype == "float32"  # LLVM has no such store for vectors of 16-bit floats; float64 was not measured
        and (vector in _OF_CHANNELS) != channels_first
        and of_lines
        and (weaves(spec) or not channels_first)
        and side_by_side * spec.itemsize % CACHE_LINE == 0
        and _far(spec, machine)
    )


def streams_stretches(spec: ConvTranspose3d, machine: Machine) -> bool:
    """Whether tiles may put rows together that share cache lines, to write them past the caches."""
    shared = _shares_lines(spec) and _far(spec, machine)
    return machine.stretch > 0 and shared and woven_by_tiles(spec, of_channels=False)


def puts_together(spec: ConvTranspose3d, t: Tiles) -> bool:
    """Whether these tiles stream rows that share cache lines."""
    return t.woven == "tile" and t.store == "streamed" and not t.of_channels and _shares_lines(spec)


def _shares_lines(spec: ConvTranspose3d) -> bool:
    """Whether rows of Y are of float32 and no whole cache lines."""
    of_float = spec.layout == "NCDHW" and spec.dtype == "float32"
    return of_float and spec.axes[2].out * spec.itemsize % CACHE_LINE > 0


def _far(spec: ConvTranspose3d, machine: Machine) -> bool:
    """Whether Y is so large that this machine writes it past the caches."""
    return _so_large(spec.bytes_of(spec.y_shape), machine)


def _so_large(y_bytes: int, machine: Machine) -> bool:
    return 0 < machine.streams <= y_bytes


def elements_of_stretch(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many elements of a plane of Y lie side by side in a band of rows."""
    _, axis_h, axis_w = spec.axes
    return min(t.height * axis_h.stride, axis_h.out) * axis_w.out


def factors(vector: str, vectors: int, scalars: int, rows: int) -> tuple[int, int]:
    """How many weights and how many elements of X a register tile multiplies, in registers."""
    return (vectors, scalars * rows) if vector in _OF_CHANNELS else (scalars, vectors * rows)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What the arithmetic needs of a spec.

    ``m`` and ``c`` are channels of a group, ``images`` the groups of all batch elements, ``depth``, ``height`` and
    ``width`` positions; ``reach`` is what all phases together read of each axis, zeros around X included. ``kernel``
    counts the weights of a pair of channels, ``taps`` those that meet an output, ``most_taps`` the most of one phase
    along each axis, ``beside`` which part of their products is with zeros beside X. ``phases_of_row`` phases have
    ``taps_of_row`` taps along a row, which load ``shared`` vectors of X for each tap of one phase. ``tensors`` is the
    bytes of X and Y, ``together`` how many groups a task computes, ``in_chunks`` whether it may copy X by chunks of
    channels, ``in_squares`` whether squares of channels and columns. ``woven`` says whether vectors of positions are
    woven to rows of Y, ``shares_lines`` whether these are of float32 and no whole cache lines. With ``own``, vectors
    run along groups, as if all were one: each channel has an X of its own, and ``c`` is 1.
    Where ``products`` are 2, a pair of channels is one of ``c``: X and W are as wide as a sum, then.
    """

    products: int
    itemsize: int
    m: int
    c: int
    images: int
    depth: int
    height: int
    width: int
    reach: tuple[int, int, int]
    sizes: tuple[int, int, int]
    kernel: int
    taps: int
    most_taps: tuple[int, int, int]
    beside: tuple[float, float, float]
    shared: float
    taps_of_row: int
    apart: bool
    phases_of_row: int
    phases: int
    outputs: int
    row: int
    strides: tuple[int, int, int]
    tensors: int
    channels_first: bool
    together: int
    widened: bool
    grouped: bool
    in_chunks: bool
    in_squares: bool
    own: bool
    woven: bool
    shares_lines: bool

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, spec: ConvTranspose3d, products: int, own: bool = False) -> _Layer:
        groups = 1 if own else spec.groups
        depth, height, width = (axis.positions for axis in spec.axes)
        return cls(
            products=products,
            itemsize=spec.sum_itemsize,
            m=spec.channels_out // groups,
            c=spec.c_in // products,
            images=groups * (spec.batch or 1),
            depth=depth,
            height=height,
            width=width,
            reach=tuple(map(reach, spec.axes)),  # type: ignore[arg-type]
            sizes=tuple(axis.size for axis in spec.axes),  # type: ignore[arg-type]
            kernel=math.prod(a.kernel for a in spec.axes),
            taps=math.prod(len(axis.offsets) for axis in spec.axes),
            most_taps=tuple(axis.most_taps for axis in spec.axes),  # type: ignore[arg-type]
            beside=tuple(map(_beside, spec.axes)),  # type: ignore[arg-type]
            shared=_shared(spec.axes[2]),
            taps_of_row=len(spec.axes[2].offsets),
            apart=not spec.phases_as_axes,
            phases_of_row=len(spec.axes[2].phases),
            phases=max(1, spec.phases[0]),
            outputs=spec.bytes_of(spec.y_shape) // spec.itemsize,
            row=spec.axes[2].out,
            strides=tuple(a.stride for a in spec.axes),  # type: ignore[arg-type]
            tensors=spec.bytes_of(spec.x_shape) + spec.bytes_of(spec.y_shape),
            channels_first=spec.layout == "NCDHW",
            together=1 if spec.layout == "NCDHW" else groups,
            widened=spec.dtype != spec.sum_dtype and products == 1,
            grouped=spec.groups > 1,
            in_chunks=copies_chunks(spec),
            in_squares=products == 1 and square(spec, spec.axes[2].size) > 0,
            own=own,
            woven=weaves(spec),
            shares_lines=_shares_lines(spec),
        )

    def at_once(self, t: Tiles) -> int:
        """How many phases a register tile sums in one loop: those of a row, where it weaves them."""
        return self.phases_of_row if t.woven == "tile" and not t.of_channels else 1

    def tasks(self, t: Tiles) -> int:
        """How many tasks there are."""
        channels, planes, rows = t.of_task
        return self.spans(planes, rows) * over(self.m, channels)

    def whole_groups(self, t: Tiles) -> bool:
        """Whether a task must cover all channels of a group: no tile may straddle two, nor lie beside another group."""
        return self.together > 1 or (self.grouped and self.m % t.channels > 0)

    def spans(self, depth: int, height: int) -> int:
        """How many pieces of ``depth`` planes and ``height`` rows there are."""
        return self.images // self.together * over(self.depth, depth) * over(self.height, height)

    def window(self, t: Tiles) -> int:
        """Bytes of X that a task reads."""
        return self.read(t, t.bands_d, t.bands_h)

    def read(self, t: Tiles, bands_d: int, bands_h: int) -> int:
        """Bytes of X that so many bands of ``t`` read together."""
        more_h = self.reach[1] - self.height
        rows = (t.height + more_h) * bands_h if t.line else t.height * bands_h + more_h
        planes = self.planes(t.depth * bands_d)
        if t.vector == "plane":
            positions = (1 if self.joined(t) > 1 else planes) * self.as_they_lie(t)
        else:
            positions = planes * rows * self.reach[2]
        return self.itemsize * self.together * self.channels_read(t) * positions

    def channels_read(self, t: Tiles) -> int:
        """Channels of X that a task reads at a time, of each group that it computes."""
        if self.own:
            return t.task * t.bands_m
        return t.chunk // t.products if t.copy == "chunk" else self.c

    def weights(self, channels: int) -> int:
        """Bytes of the weights of so many output channels."""
        return self.itemsize * channels * self.c * self.kernel

    def planes(self, depth: int) -> int:
        """Planes of X that ``depth`` planes of positions read."""
        return depth + self.reach[0] - self.depth

    @property
    def flat(self) -> bool:
        """Whether no tap reads another plane or row of X than that of its position."""
        return self.reach[:2] == (self.depth, self.height)

    def joined(self, t: Tiles) -> int:
        """How many planes a line goes through: all that a band has, where nothing is read between them."""
        if t.vector == "plane":
            return t.depth if t.depth >= self.depth else 1
        return t.depth if t.vector == "line" and t.height >= self.height and self.flat else 1

    def as_they_lie(self, t: Tiles) -> int:
        """Elements of a plane of X, or of all where those lie end to end."""
        return math.prod(self.sizes[0 if self.joined(t) > 1 else 1 :])

    def band(self, t: Tiles) -> int:
        """Positions that a band computes, those that it throws away included."""
        if t.vector == "plane":
            return t.depth // self.joined(t) * up(self.as_they_lie(t), t.columns)
        if t.vector == "taps":
            return t.depth * up((t.height + self.reach[1] - self.height) * self.reach[2], t.columns)
        if t.line:
            planes = self.joined(t)
            return t.depth // planes * up((planes * t.height - 1) * self.reach[2] + self.width, t.columns)
        return t.depth * t.height * up(self.width, t.columns)

    def stretch(self, t: Tiles) -> int:
        """Elements of Y that a task writes side by side; bands of a few channels go on where the one before ended."""
        if not self.channels_first and t.task * (t.bands_m if self.own else 1) < self.m:
            return t.task
        going_on = t.bands_h if t.task * t.depth * self.strides[0] <= _STREAMS else 1
        rows = min(t.height * going_on, self.height) * self.strides[1]
        planes = min(t.depth, self.depth) * self.strides[0] if t.height >= self.height else 1
        return rows * planes * self.row * (1 if self.channels_first else self.together * self.m)

    def held(self, t: Tiles) -> int:
        """Bytes of the phases of a band, or the sums of its taps; of all bands, where each chunk goes through them."""
        if t.woven == "tile":  # rows put together, where they are
            together = self.shares_lines and t.store == "streamed"
            return together * self.itemsize * t.task * min(t.height, self.height) * self.strides[1] * self.row
        each = self.kernel if t.by_taps else self.phases
        bands = t.bands_d * t.bands_h * t.bands_m if t.copy == "chunk" else 1
        return self.together * self.itemsize * each * t.task * self.band(t) * bands

    def copied(self, t: Tiles) -> int:
        """Bytes of X that a task copies."""
        return 0 if t.copy in ("whole", "none") else self.window(t)

    def widening(self, t: Tiles) -> int:
        """Bytes of the weights that a task widens before its sums, in the type of the sums."""
        if not self.widened or t.of_channels:
            return 0
        return self.weights(t.task * t.bands_m)


def _layer(spec: ConvTranspose3d, t: Tiles) -> _Layer:
    """The layer as these tiles see it."""
    return _Layer.of(spec, t.products, t.vector == "groups")


def reach(axis: Axis) -> int:
    """How many elements of an axis all phases together read, zeros beside X included."""
    first, last = axis.reads
    return last - first + axis.positions


def _beside(axis: Axis) -> float:
    """Which part of the products of positions with taps reads beside X."""
    inside = sum(max(0, min(axis.positions, axis.size - o) - max(0, -o)) for o in axis.offsets)
    reads = len(axis.offsets) * axis.positions
    return (reads - inside) / max(1, reads)


def _shared(axis: Axis) -> float:
    """How many vectors of X the phases of a row load together, for each tap of one."""
    return len(axis.phases) * len(set(axis.offsets)) / max(1, len(axis.offsets))


def _store(spec: ConvTranspose3d, vector: str, machine: Machine) -> Store:
    return "streamed" if streams(spec, vector, machine) else "cached"


def _sensible(layer: _Layer, machine: Machine, stores: Mapping[str, Store]) -> Iterator[Tiles]:
    lanes = machine.vector_bytes // layer.itemsize
    of_rows = (range(1, 7), range(1, machine.registers), range(1, min(4, layer.height) + 1))
    shapes = [
        *product(("channels", "row"), *of_rows),
        *product(("row",), range(1, 7), (1,), range(5, min(8, layer.height) + 1)),
        *product(("line",), range(1, 9), range(1, 17), (1,)),
    ]
    if layer.own:
        shapes = [*product(("groups",), *of_rows)]
    for vector, vectors, scalars, rows in shapes:
        # beside the sums: the factors of one side, and one of the other at a time
        if vectors * scalars * rows + min(factors(vector, vectors, scalars, rows)) + 1 > machine.registers:
            continue
        of_channels = vector in _OF_CHANNELS
        channels, columns = (vectors * lanes, scalars) if of_channels else (scalars, vectors * lanes)
        if channels >= layer.m + (lanes if of_channels else 1):
            continue
        if vector != "line" and columns >= layer.width + (1 if of_channels else lanes):
            continue
        chunk = layer.products * _chunk(layer, machine, vector, rows, columns)
        registers = (vector, lanes, vectors, scalars, rows)
        for (depth, height), copy in product(_spans(layer, vector, rows), ("task", "whole")):
            span = (depth, height, chunk, copy, 1, 1, 1, layer.products, stores[vector])
            tiles = Tiles(*registers, channels, *span)  # type: ignore[arg-type]
            if vector == "line" and columns >= layer.joined(tiles) * height * layer.reach[2] + lanes:
                continue
            task = _task(layer, machine, tiles)
            whole = Tiles(*registers, task, *span) if task > channels else tiles  # type: ignore[arg-type]
            if (depth, height) == (1, rows) or _worthwhile(layer, machine, whole):
                yield whole
            yield from (t for t in _in_bands(layer, machine, tiles) if _worthwhile(layer, machine, t))


def weights_by_taps(spec: ConvTranspose3d, vector: str) -> list[int]:
    """How many weights a register tile may take where each tap has sums of its own; none where none may.

    Rows of taps of one channel, or all that a plane of the kernel has for some channels.
    """
    m, (_, kh, kw) = spec.m_out, (axis.kernel for axis in spec.axes)
    taps = math.prod(axis.kernel for axis in spec.axes)
    most = min(_MOST_TAPS[vector], _MOST_TAPS_OF_MANY_PHASES) if spec.phases_as_axes else _MOST_TAPS[vector]
    many = m > _FEW_OUTPUTS or taps > most or spec.many_phases
    if spec.layout == "NDHWC":
        many |= not weaves(spec) or taps * spec.channels_out > _MOST_TAPS_LAST
    if many or not all(axis.landing for axis in spec.axes):
        return []
    return [kw * n for n in range(1, kh) if kh % n == 0] + [kw * kh * n for n in range(1, m + 1) if m % n == 0]


def _by_taps(spec: ConvTranspose3d, layer: _Layer, machine: Machine, stores: Mapping[str, Store]) -> Iterator[Tiles]:
    """Each tap summed by itself, so that a vector of X is loaded once for many: where output channels are few."""
    lanes = machine.vector_bytes // layer.itemsize
    weights = {vector: weights_by_taps(spec, vector) for vector in _MOST_TAPS}
    if not any(weights.values()) or (spec.layout == "NDHWC" and lanes < LEAST_WOVEN_LAST):
        return
    spans = [("taps", *span) for span in _spans(layer, "line", 1)]
    spans += [("plane", depth, layer.height) for depth in sorted({over(layer.depth, n) for n in _PARTS})]
    for vectors in range(1, 7):
        fits = machine.l1_bytes // 3 // (vectors * machine.vector_bytes + CACHE_LINE)
        ways = [("task", layer.c), ("whole", layer.c), *(("chunk", chunk) for chunk in _chunks_of_taps(layer, fits))]
        for (vector, depth, height), (copy, chunk) in product(spans, ways):
            if (copy, vector) == ("chunk", "taps") and layer.c <= max(fits, _FEW_CHANNELS):
                continue
            several = (1, 2, 4) if copy != "whole" and (vector == "plane" or depth == 1) else (1,)
            for scalars, bands in product(weights[vector], several):
                if vectors * scalars + min(vectors, scalars) + 1 > machine.registers:
                    continue
                span = (depth, height, chunk, copy, bands, 1, 1, 1, stores[vector])
                tiles = Tiles(vector, lanes, vectors, scalars, 1, layer.m, *span)  # type: ignore[arg-type]
                # no task is smaller than a plane, nor than a vector
                least = vector == "plane" and (depth * bands == 1 or math.prod(layer.sizes[1:]) < lanes)
                worthwhile = _fits if least else _worthwhile
                if over(layer.depth, depth) % bands == 0 and worthwhile(layer, machine, tiles):
                    yield tiles


def _by_tiles(spec: ConvTranspose3d, layer: _Layer, machine: Machine, stores: Mapping[str, Store]) -> Iterator[Tiles]:
    """Register tiles that write rows of Y, each channel in a band of its own or all in one."""
    one_tap = layer.most_taps == (1, 1, 1)
    few_registers = machine.registers < _MANY_REGISTERS and (one_tap or layer.c > 1)
    if few_registers or not woven_by_tiles(spec, of_channels=False):
        return
    copying_is_slower = one_tap and (layer.m < _FEW_BY_TILES < layer.c or spec.activation.name not in _SELECTIONS)
    lanes, put_together = machine.vector_bytes // layer.itemsize, streams_stretches(spec, machine)
    planes = (1, 2, 4) if layer.most_taps[0] > 1 else (1,)
    of_rows = (range(1, 7), range(1, machine.registers // 2), range(1, min(8, layer.height) + 1))
    for vectors, scalars, rows in product(*of_rows):
        weights = layer.phases_of_row * scalars
        many = weights * vectors * rows + min(weights, vectors * rows) >= machine.registers
        if many or layer.m % scalars or vectors * lanes >= layer.width + lanes:
            continue
        plane, chunk = up(layer.height, rows), _chunk(layer, machine, "row", rows, vectors * lanes)
        parts = (1, 2, 4, 8, 16) if put_together else (1, 2, 4)
        for height in sorted({min(rows * n, plane) for n in parts} | {plane}):
            of_plane = over(layer.height, height)
            tasks = sorted({scalars, layer.m})
            copying = product(("task",), planes, sorted({1, 2, 4, 8, 16, of_plane}), tasks)
            ways = [] if copying_is_slower else [("whole", 1, 1, scalars), *copying]
            for copy, bands_d, bands_h, task in [*ways, *(("none", 1, 1, task) for task in tasks)]:
                if layer.depth % bands_d or of_plane % bands_h:
                    continue
                span = (1, height, chunk, copy, bands_d, bands_h, layer.m // task)
                tiles = Tiles("row", lanes, vectors, scalars, rows, task, *span, 1, stores["row"], "tile")  # type: ignore[arg-type]
                if copy == "none" and not reads_in_place(spec, tiles):
                    continue
                stretch = elements_of_stretch(spec, tiles) * layer.itemsize
                if put_together and machine.stretch <= stretch <= machine.l1_bytes // 2 // task:
                    tiles = replace(tiles, store="streamed")
                if _worthwhile(layer, machine, tiles):
                    yield tiles


def _returns_soon(spec: ConvTranspose3d, t: Tiles) -> bool:
    """Whether tiles that write some channels of a row soon write the others.

    Of groups, which have few products for each element of Y, they are else up to twice as slow as bands.
    """
    return t.vector == "channels" or t.channels >= spec.channels_out or (t.depth, t.height) == (1, 1)


def _chunks_of_taps(layer: _Layer, fits: int) -> list[int]:
    """Channels that a task may copy at a time, where the first cache holds what a tile reads of ``fits`` of them."""
    chunks = sorted({largest_divisor(layer.c, fits // parts) for parts in (1, 2, 4)})
    return [chunk for chunk in chunks if layer.in_chunks and _LEAST_CHUNK <= chunk < layer.c]


def _in_bands(layer: _Layer, machine: Machine, t: Tiles) -> Iterator[Tiles]:
    """Tasks of several bands, each a tile of channels wide, whose phases stay in the first cache."""
    tiles = over(layer.m, t.channels)
    if t.copy == "whole" or t.depth > layer.joined(t) or layer.held(t) > machine.l1_bytes:
        return
    if tiles > 1 and layer.whole_groups(t):
        return
    of_plane, planes = over(layer.height, t.height), (1, 2, 4) if layer.most_taps[0] > 1 else (1,)
    for bands_d, bands_h in product(planes, sorted({1, 2, 4, 8, of_plane})):
        if bands_d * bands_h * tiles > 1 and of_plane % bands_h == 0 and layer.depth % bands_d == 0:
            bands = (bands_d, bands_h, tiles)
            banded = t.taking(t.copy, t.chunk, bands)
            yield banded
            yield from (t.taking("chunk", chunk, bands) for chunk in _chunks(layer, machine, banded))


def _chunks(layer: _Layer, machine: Machine, t: Tiles) -> Iterator[int]:
    """Channels that a task may copy at a time, a chunk or half of one, where the second cache does not hold all."""
    if t.chunk == layer.c or layer.products > 1 or not layer.in_chunks:
        return
    if t.scalars == 1 or 2 * layer.window(t) <= machine.l2_bytes:  # with a single weight a chunk has few products
        return
    for chunk in (t.chunk, largest_divisor(t.chunk, t.chunk // 2)):
        if chunk >= _LEAST_CHUNK:
            yield chunk


def _worthwhile(layer: _Layer, machine: Machine, t: Tiles) -> bool:
    """Whether tasks of more than a row are enough for all cores, in cache, and small."""
    return layer.tasks(t) >= machine.cores and _fits(layer, machine, t)


def _fits(layer: _Layer, machine: Machine, t: Tiles) -> bool:
    """Whether what a task holds fits into the second cache, and is small."""
    held = layer.held(t)
    part = _PART_FOR_TAPS if t.by_taps and t.copy == "whole" else _PART_OF_SECOND
    return held <= machine.l2_bytes and held + layer.widening(t) + layer.copied(t) <= _small(layer, machine, part)


def _small(layer: _Layer, machine: Machine, part: int = _PART_OF_SECOND) -> int:
    """Bytes that a task may take: few beside X and Y, or beside what a core has near."""
    return max(layer.tensors // _SMALL, machine.l2_bytes // part)


def _spans(layer: _Layer, vector: str, rows: int) -> list[tuple[int, int]]:
    """Planes and rows that a task may cover: a register tile's rows, twice as many, all; of lines, any even part."""
    if vector == "line":
        heights = {over(layer.height, parts) for parts in _PARTS if parts < layer.height or parts == 1}
    else:
        plane = up(layer.height, rows)
        heights = {rows, min(2 * rows, plane), plane}
    spans = set(product((1, min(2, layer.depth), layer.depth), heights))
    if vector == "line" and layer.flat:
        spans |= {(over(layer.depth, parts), layer.height) for parts in _PARTS if parts < layer.depth}
    return sorted(spans)


def _task(layer: _Layer, machine: Machine, t: Tiles) -> int:
    """Channels a task covers: as many tiles as leave its phases and weights in the second cache, and work for all.

    Whole tasks only, where the tiles divide the channels: a ragged last task costs a test for each
    output element, and in a grouped layer it would straddle two groups, for which the packed
    weight has no place. ``t.task`` is the channels of one tile.
    """
    tiles = over(layer.m, t.channels)
    if tiles == 1 or layer.whole_groups(t):
        return t.channels * tiles
    held = layer.held(t)
    fits = machine.l2_bytes // 2 // (held + layer.together * layer.weights(t.channels))
    small = (_small(layer, machine) - layer.copied(t)) // (held + layer.widening(t))
    spread = layer.spans(t.depth, t.height) * tiles // machine.cores
    most = max(1, min(fits, small, spread))
    return t.channels * largest_divisor(tiles, most)


def _chunk(layer: _Layer, machine: Machine, vector: str, rows: int, columns: int) -> int:
    """Input channels that go through the taps of a plane together: what all taps read of them fits the first cache.

    So many for all planes, though a plane at a time is read: twice as many gained nothing on most layers measured.
    """
    taps_d, taps_h, taps_w = layer.most_taps
    if vector in _OF_CHANNELS or taps_d * taps_h * taps_w == 1:
        return layer.c
    fits = max(1, machine.l1_bytes // (taps_d * (rows + taps_h - 1) * (columns * layer.itemsize + CACHE_LINE)))
    return largest_divisor(layer.c, fits)


# --- what they cost ---
#
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


class _Sizes(NamedTuple):
    """What several sums need of tiles: `_Layer.band`, `_Layer.held`, `_Layer.window`, and how many bands there are."""

    band: int
    held: int
    window: int
    bands: int


def _estimate(layer: _Layer, machine: Machine, t: Tiles) -> Estimate:
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


def _summing_by_phase(layer: _Layer, machine: Machine, t: Tiles, sums: int, sizes: _Sizes) -> tuple[float, float]:
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


def _summing_by_tap(layer: _Layer, machine: Machine, t: Tiles, sums: int, sizes: _Sizes) -> tuple[float, float]:
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


def _weaving(layer: _Layer, machine: Machine, t: Tiles, sizes: _Sizes) -> float:
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
    far = _so_large(layer.outputs * layer.itemsize, machine)
    if machine.stretch and far and layer.shares_lines and t.store == "cached":  # a line is read before it is written
        weaving += 1.5
    return weaving + 300 / (layer.stretch(t) * layer.itemsize)


def _reading(layer: _Layer, machine: Machine, t: Tiles, sizes: _Sizes) -> float:
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


def _copying(layer: _Layer, machine: Machine, t: Tiles, sizes: _Sizes) -> float:
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


def _step(layer: _Layer, machine: Machine, t: Tiles, band: int) -> float:
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


def _a_weight(layer: _Layer, machine: Machine, t: Tiles, band: int) -> float:
    """Cycles of a weight that a neighbouring tile has just used, or that a whole task passed by since.

    What a tile has of them may be too many for the second cache; the third then has some.
    """
    near, far = 1 / 200, 1 / (50 if layer.weights(t.task * t.bands_m) <= machine.l2_bytes // 2 else 11)
    third = min(far, 1 / 20)
    again = 1 - t.columns * t.rows / band
    lost = min(1, max(0, layer.weights(t.channels) // layer.phases / machine.l2_bytes - 0.7))
    return layer.itemsize * (again * (near + lost * (third - near)) + (1 - again) * far)


def _on_the_stack(layer: _Layer, machine: Machine, t: Tiles, sums: int, unrolled: bool) -> float:
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
