"""Where the blocks of a declaration have their positions: axis by axis, in lines of rows, or as X lies.

Each layout says the shapes of ``pad`` and of the sums, which element of X ``pad`` holds, where a sum reads it, and
where the sum of a position is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from opcompile.spec import Axis


def round_up(size: int, grain: int) -> int:
    """The smallest multiple of ``grain`` that is at least ``size``."""
    return -(-size // grain) * grain


@dataclass(frozen=True, slots=True)
class Window:
    """The part of one input axis that the phases read: ``extent`` elements from ``start`` on."""

    start: int
    extent: int
    positions: int

    @classmethod
    def of(cls, axis: Axis, grain: int) -> Window:
        """What the phases of an output read of ``axis``, whose positions are rounded up to ``grain``."""
        positions, (first, last) = round_up(axis.positions, grain), axis.reads
        return cls(first, last - first + positions, positions)

    @classmethod
    def of_all_taps(cls, axis: Axis, grain: int) -> Window:
        """The same, of all phases that the stride has: an output may be too short for some."""
        positions, first, last = round_up(axis.positions, grain), axis.offset(axis.kernel - 1), axis.offset(0)
        return cls(first, last - first + positions, positions)


class Grid:
    """Positions axis by axis: ``pad (eD, eH, eW)``, ``phase (qD, qH, qW)``."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self._windows = windows
        self.pitch = windows[-1].extent
        self.read_from = tuple(win.extent for win in windows)
        self.positions = tuple(win.positions for win in windows)

    def element(self, at: Sequence[Any]) -> list[Any]:
        """The element of X that ``pad`` holds at ``at``."""
        return [i + win.start for i, win in zip(at, self._windows, strict=True)]

    def read(self, q: Sequence[Any], offsets: Sequence[Any]) -> list[Any]:
        """Where ``pad`` holds what position ``q`` of a phase reads at ``offsets``."""
        return [i + (offset - win.start) for i, offset, win in zip(q, offsets, self._windows, strict=True)]

    def place(self, q: Sequence[Any]) -> list[Any]:
        """Where a phase holds the sum of positions ``q``."""
        return list(q)


class Lines:
    """Lines of ``rows`` rows of qH end to end: ``pad (eD, blocks, rows read * eW)``, ``phase (qD, blocks, line)``.

    A line may go through several ``planes``, where it has all their rows and no tap reads another plane or row than
    its position's: eD and qD are then so many times fewer. With ``taps``, sums stand where X does, and a line has all
    that is read.
    """

    def __init__(self, windows: Sequence[Window], rows: int, planes: int, columns: int, taps: bool) -> None:
        self._windows, self._rows, self._planes = windows, rows, planes
        plane, row, column = windows
        self.pitch = column.extent
        blocks = -(-row.positions // rows)
        line = (planes * rows - 1) * self.pitch + column.positions
        beyond = (row.extent - row.positions) * self.pitch + column.extent - column.positions
        if taps:
            line, beyond = line + beyond, 0
        line = round_up(line, columns)
        self.read_from = (plane.extent // planes, blocks, round_up(line + beyond, self.pitch))
        self.positions = (plane.positions // planes, blocks, line)

    def element(self, at: Sequence[Any]) -> list[Any]:
        """The element of X that ``pad`` holds at ``at``: a plane, a block of rows, and a place in its line."""
        d, block, i = at
        h, w = tirx.floordiv(i, self.pitch), tirx.floormod(i, self.pitch)
        if self._planes > 1:
            d, h = d * self._planes + tirx.floordiv(h, self._rows), tirx.floormod(h, self._rows)
        return [i + win.start for i, win in zip((d, block * self._rows + h, w), self._windows, strict=True)]

    def read(self, q: Sequence[Any], offsets: Sequence[Any]) -> list[Any]:
        """Where ``pad`` holds what a place in a line reads at ``offsets``: at a distance along it."""
        of_d, of_h, of_w = (offset - win.start for offset, win in zip(offsets, self._windows, strict=True))
        d, block, i = q
        return [d + of_d, block, i + (of_h * self.pitch + of_w)]

    def place(self, q: Sequence[Any]) -> list[Any]:
        """Where a phase holds the sum of positions ``q``: in the line of their row."""
        d, h, w = q
        row = tirx.floormod(d, self._planes) * self._rows + tirx.floormod(h, self._rows)
        return [tirx.floordiv(d, self._planes), tirx.floordiv(h, self._rows), row * self.pitch + w]

    def sums(self, q: Sequence[Any], offsets: Sequence[int]) -> tuple[list[Any], list[Any]]:
        """Where a tap holds what it adds at ``q``, and no tests: beside X there are zeros."""
        (*line, i), (_, row, column) = self.place(q), self._windows
        return [*line, i + ((offsets[1] - row.start) * self.pitch + offsets[2] - column.start)], []


class Planes:
    """Each plane of X as it lies, with no zeros beside its rows: ``pad (eD, 1, H*W)``, sums of a tap ``(qD, 1, H*W)``.

    Sums stand where X does, but for their plane, which is that of qD.
    """

    def __init__(self, axes: Sequence[Axis], depth: int, columns: int) -> None:
        self._of_row, self._window = axes[1:], Window.of(axes[0], depth)
        rows, self.pitch = (axis.size for axis in self._of_row)
        line = round_up(rows * self.pitch, columns)
        self.read_from = (self._window.extent, 1, line)
        self.positions = (self._window.positions, 1, line)

    def element(self, at: Sequence[Any]) -> list[Any]:
        """The element of X that ``pad`` holds at ``at``: a plane, and a place there."""
        d, _, i = at
        return [d + self._window.start, tirx.floordiv(i, self.pitch), tirx.floormod(i, self.pitch)]

    def read(self, q: Sequence[Any], offsets: Sequence[Any]) -> list[Any]:
        """Where ``pad`` holds what a place reads at ``offsets``: at the same place, of another plane."""
        d, line, i = q
        return [d + (offsets[0] - self._window.start), line, i]

    def sums(self, q: Sequence[Any], offsets: Sequence[int]) -> tuple[list[Any], list[Any]]:
        """Where a tap holds what it adds at ``q``, and the tests for whether X has the row and the column."""
        d, h, w = q
        tests = _beside(self._of_row, q[1:], offsets[1:])
        return [d, 0, (h + offsets[1]) * self.pitch + w + offsets[2]], tests


class Volume:
    """All planes of X as they lie, end to end: ``pad (1, 1, D*H*W)``, and sums of a tap, which stand where X does."""

    def __init__(self, axes: Sequence[Axis], columns: int) -> None:
        self._axes, (planes, self._rows, self.pitch) = axes, (axis.size for axis in axes)
        self.read_from = self.positions = (1, 1, round_up(planes * self._rows * self.pitch, columns))

    def element(self, at: Sequence[Any]) -> list[Any]:
        """The element of X that ``pad`` holds at ``at``: a place in all of it."""
        row, w = tirx.floordiv(at[-1], self.pitch), tirx.floormod(at[-1], self.pitch)
        return [tirx.floordiv(row, self._rows), tirx.floormod(row, self._rows), w]

    def read(self, q: Sequence[Any], _offsets: Sequence[Any]) -> list[Any]:
        """Where ``pad`` holds what a place reads: there."""
        return list(q)

    def sums(self, q: Sequence[Any], offsets: Sequence[int]) -> tuple[list[Any], list[Any]]:
        """Where a tap holds what it adds at ``q``, and the tests for whether X has it."""
        d, h, w = (i + offset for i, offset in zip(q, offsets, strict=True))
        return [0, 0, (d * self._rows + h) * self.pitch + w], _beside(self._axes, q, offsets)


Where = Grid | Lines | Planes | Volume


def _beside(axes: Sequence[Axis], q: Sequence[Any], offsets: Sequence[int]) -> list[Any]:
    """Tests for whether X has what position ``q`` reads at ``offsets``, where it may have not."""
    tests = []
    for axis, i, offset in zip(axes, q, offsets, strict=True):
        if offset < 0:
            tests.append(i + offset >= 0)
        if offset + axis.positions > axis.size:
            tests.append(i + offset < axis.size)
    return tests
