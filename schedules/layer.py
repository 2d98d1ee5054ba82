"""A layer as the arithmetic of tiles sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from schedules.division import over, up
from schedules.rules import copies_chunks, shares_lines, square, weaves

if TYPE_CHECKING:
    from opcompile.spec import Axis, ConvTranspose3d
    from schedules.tiles import Tiles

# So many places of Y may be written in turn without losing the prefetcher and the pages.
_STREAMS = 8


@dataclass(frozen=True, slots=True)
class Layer:
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
    reach: tuple[int, ...]
    sizes: tuple[int, ...]
    kernel: int
    taps: int
    most_taps: tuple[int, ...]
    beside: tuple[float, ...]
    shared: float
    taps_of_row: int
    apart: bool
    phases_of_row: int
    phases: int
    outputs: int
    row: int
    strides: tuple[int, ...]
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
    def of(cls, spec: ConvTranspose3d, products: int, own: bool = False) -> Layer:
        """Describe a layer whose channels are multiplied one by one, or in pairs; ``own``: vectors run along groups."""
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
            reach=tuple(map(reach, spec.axes)),
            sizes=tuple(axis.size for axis in spec.axes),
            kernel=math.prod(a.kernel for a in spec.axes),
            taps=math.prod(len(axis.offsets) for axis in spec.axes),
            most_taps=tuple(axis.most_taps for axis in spec.axes),
            beside=tuple(map(_beside, spec.axes)),
            shared=_shared(spec.axes[2]),
            taps_of_row=len(spec.axes[2].offsets),
            apart=not spec.phases_as_axes,
            phases_of_row=len(spec.axes[2].phases),
            phases=max(1, spec.phases[0]),
            outputs=spec.bytes_of(spec.y_shape) // spec.itemsize,
            row=spec.axes[2].out,
            strides=tuple(a.stride for a in spec.axes),
            tensors=spec.bytes_of(spec.x_shape) + spec.bytes_of(spec.y_shape),
            channels_first=spec.layout == "NCDHW",
            together=1 if spec.layout == "NCDHW" else groups,
            widened=spec.dtype != spec.sum_dtype and products == 1,
            grouped=spec.groups > 1,
            in_chunks=copies_chunks(spec),
            in_squares=products == 1 and square(spec, spec.axes[2].size) > 0,
            own=own,
            woven=weaves(spec),
            shares_lines=shares_lines(spec),
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


# --- what a schedule asks of it ---


def _layer(spec: ConvTranspose3d, t: Tiles) -> Layer:
    """The layer as these tiles see it."""
    return Layer.of(spec, t.products, t.vector == "groups")


def joined(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many planes of positions a line of ``spec`` goes through."""
    return _layer(spec, t).joined(t)


def length_of_row(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many elements a row of the copy of X has; planes as they lie are one row each, or all together."""
    return _layer(spec, t).as_they_lie(t) if t.vector == "plane" else reach(spec.axes[2])


def phases_at_once(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many phases a register tile sums in one loop: those of a row, where it weaves them."""
    return _layer(spec, t).at_once(t)


def tiles_of_band(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many register tiles of a band multiply the same weights."""
    return _layer(spec, t).band(t) // (t.columns * t.rows)
