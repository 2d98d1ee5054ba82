"""Which tiles a layer may have on a machine: what candidates keep to, and what records are held against."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from schedules.division import up
from schedules.tiles import CACHE_LINE, OF_CHANNELS

if TYPE_CHECKING:
    from opcompile.spec import ConvTranspose3d
    from opcompile.target import Machine
    from schedules.tiles import Tiles

# For so few output channels of a group may each tap have sums of its own; of so many taps, where these are summed at
# lines of padded rows, and at planes of X as they lie. Where channels come last, those of a row are added up at once,
# so many taps of all together.
_FEW_OUTPUTS = 8
MOST_TAPS = {"taps": 64, "plane": 343}
_MOST_TAPS_LAST = 512
# With more than 27 phases, of so many taps: 216 took nine seconds to compile.
_MOST_TAPS_OF_MANY_PHASES = 125
# Rows of more phases than these are left to LLVM; where channels come last, of more phases of all channels, and those
# of which more vectors would be unrolled, over the phases of planes and rows: with an activation that is more than a
# few selections, and with one that is not.
MOST_WOVEN = 4
_MOST_WOVEN_LAST = 8
_MOST_OF_ROWS_LAST = (32, 64)
# There vectors of fewer sums are shuffled more slowly than their elements are written one by one.
LEAST_WOVEN_LAST = 8
# Activations that are a few selections.
SELECTIONS = ("none", "relu", "relu6", "leaky_relu")


def takes_pairs(spec: ConvTranspose3d, machine: Machine) -> bool:
    """Whether channels of ``spec`` can be multiplied as pairs of bfloat16."""
    return machine.pairs and spec.dtype == "bfloat16" and spec.c_in % 2 == 0


def takes_groups(spec: ConvTranspose3d) -> bool:
    """Whether vectors may run along groups: each has one channel, and they are side by side in X and in Y."""
    return spec.layout == "NDHWC" and 1 < spec.groups == spec.channels_in == spec.channels_out


def sums_of_a_vector(spec: ConvTranspose3d, machine: Machine) -> int:
    """How many sums of ``spec`` a vector of ``machine`` holds."""
    return machine.vector_bytes // spec.sum_itemsize


def halved(spec: ConvTranspose3d, machine: Machine) -> Machine | None:
    """The machine with vectors of half the width, where those of the channels of ``spec`` waste less so."""
    half, lanes = machine.halved, sums_of_a_vector(spec, machine)
    wasted = -spec.m_out % lanes
    return half if half is not None and wasted >= lanes // 2 else None


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


def weights_by_taps(spec: ConvTranspose3d, vector: str) -> list[int]:
    """How many weights a register tile may take where each tap has sums of its own; none where none may.

    Rows of taps of one channel, or all that a plane of the kernel has for some channels.
    """
    m, (_, kh, kw) = spec.m_out, (axis.kernel for axis in spec.axes)
    taps = math.prod(axis.kernel for axis in spec.axes)
    most = min(MOST_TAPS[vector], _MOST_TAPS_OF_MANY_PHASES) if spec.phases_as_axes else MOST_TAPS[vector]
    many = m > _FEW_OUTPUTS or taps > most or spec.many_phases
    if spec.layout == "NDHWC":
        many |= not weaves(spec) or taps * spec.channels_out > _MOST_TAPS_LAST
    if many or not all(axis.landing for axis in spec.axes):
        return []
    return [kw * n for n in range(1, kh) if kh % n == 0] + [kw * kh * n for n in range(1, m + 1) if m % n == 0]


# --- how Y is written ---


def weaves(spec: ConvTranspose3d) -> bool:
    """Whether rows of Y are written in vectors of one element of each phase, and last channel, in turn."""
    axis = spec.axes[2]
    few = axis.stride <= MOST_WOVEN
    if spec.layout == "NDHWC":
        vectors = math.prod(a.stride for a in spec.axes) * spec.channels_out
        few = axis.stride * spec.channels_out <= _MOST_WOVEN_LAST
        few &= vectors <= _MOST_OF_ROWS_LAST[spec.activation.name in SELECTIONS]
    return few and axis.out >= 2 * axis.stride


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


def streams(spec: ConvTranspose3d, vector: str, machine: Machine) -> bool:
    """Whether Y is written past the caches: a large one, in whole lines."""
    channels_first = spec.layout == "NCDHW"
    channels = spec.channels_out if vector == "groups" else spec.m_out
    side_by_side = spec.axes[2].out if channels_first else channels
    # what is written at once, woven of all phases of a row, must be whole lines too
    of_lines = machine.vector_bytes * (spec.axes[2].stride if channels_first else 1) % CACHE_LINE == 0
    return (
        spec.dtype == "float32"  # LLVM has no such store for vectors of 16-bit floats; float64 was not measured
        and (vector in OF_CHANNELS) != channels_first
        and of_lines
        and (weaves(spec) or not channels_first)
        and side_by_side * spec.itemsize % CACHE_LINE == 0
        and _far(spec, machine)
    )


def streams_stretches(spec: ConvTranspose3d, machine: Machine) -> bool:
    """Whether tiles may put rows together that share cache lines, to write them past the caches."""
    shared = shares_lines(spec) and _far(spec, machine)
    return machine.stretch > 0 and shared and woven_by_tiles(spec, of_channels=False)


def puts_together(spec: ConvTranspose3d, t: Tiles) -> bool:
    """Whether these tiles stream rows that share cache lines."""
    return t.woven == "tile" and t.store == "streamed" and not t.of_channels and shares_lines(spec)


def shares_lines(spec: ConvTranspose3d) -> bool:
    """Whether rows of Y are of float32 and no whole cache lines."""
    of_float = spec.layout == "NCDHW" and spec.dtype == "float32"
    return of_float and spec.axes[2].out * spec.itemsize % CACHE_LINE > 0


def _far(spec: ConvTranspose3d, machine: Machine) -> bool:
    """Whether Y is so large that this machine writes it past the caches."""
    return so_large(spec.bytes_of(spec.y_shape), machine)


def so_large(y_bytes: int, machine: Machine) -> bool:
    """Whether a Y of so many bytes is written past the caches."""
    return 0 < machine.streams <= y_bytes
