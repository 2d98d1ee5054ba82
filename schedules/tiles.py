"""The numbers of a CPU schedule, and what they make of a layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from schedules.division import largest_divisor

if TYPE_CHECKING:
    from opcompile.spec import ConvTranspose3d

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

# What vectors run along where they are of output channels.
OF_CHANNELS = ("channels", "groups")

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
        return self.vector in OF_CHANNELS

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

    def skips_rows(self, taps: tuple[int, ...]) -> bool:
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

    @property
    def positions(self) -> tuple[int, int, int]:
        """Multiples to which qD, qH, qW are rounded up; the last is the line's where rows form lines."""
        return (self.depth, self.height, self.columns)


# What records from before it was stand for.
LATER = {"products": 1, "store": "cached", "woven": "band"}


def factors(vector: str, vectors: int, scalars: int, rows: int) -> tuple[int, int]:
    """How many weights and how many elements of X a register tile multiplies, in registers."""
    return (vectors, scalars * rows) if vector in OF_CHANNELS else (scalars, vectors * rows)


# --- with a layer ---


def divided(spec: ConvTranspose3d, t: Tiles) -> tuple[int, int]:
    """Groups, and how many output channels each has; what vectors run along is channels of a single one."""
    groups = 1 if t.vector == "groups" else spec.groups
    return groups, spec.channels_out // groups


def by_rows(spec: ConvTranspose3d, t: Tiles) -> bool:
    """Whether weights of a row of taps lie together in each channel: where they are taken at once, and one phase's."""
    axis = spec.axes[2]
    return t.vector in ("row", "line") and axis.kernel % axis.tap_step == 0


def left_over(spec: ConvTranspose3d, t: Tiles) -> tuple[bool, bool, bool]:
    """Whether tasks go beyond the channels of a group, the planes and the rows of Y."""
    _, m = divided(spec, t)
    depth, height, _ = spec.axes
    return m % t.task > 0, depth.out % (depth.stride * t.depth) > 0, height.out % (height.stride * t.height) > 0


def elements_of_stretch(spec: ConvTranspose3d, t: Tiles) -> int:
    """How many elements of a plane of Y lie side by side in a band of rows."""
    _, axis_h, axis_w = spec.axes
    return min(t.height * axis_h.stride, axis_h.out) * axis_w.out
