"""Benchmark reports as a picture: the roofline with every engine on it, and bars of the share each one reaches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opcompile.bench import BenchReport
from opcompile.engines import OURS, PEERS
from opcompile.errors import CallError, EngineError

FORMATS = ("png", "svg", "pdf")

# Colours that the colour-blind can tell apart (Okabe and Ito 2008), and markers for those who print in grey.
_LOOKS = dict(
    zip(
        (OURS, *PEERS),
        (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#56B4E9", "v"), ("#E69F00", "D")),
        strict=True,
    )
)
_WIDTH, _ROOF_HEIGHT, _BAR_HEIGHT = 11.0, 6.5, 0.13  # inches


def require(path: str | Path) -> None:
    """Raise `CallError` for a file of another format, `EngineError` where matplotlib is missing."""
    if Path(path).suffix.lstrip(".").lower() not in FORMATS:
        raise CallError(f"{path} is no picture that can be drawn; end its name in one of .{', .'.join(FORMATS)}")
    _figure()


def plot(reports: Mapping[str, BenchReport], path: str | Path) -> None:
    """Draw ``reports`` into the file ``path``. Raises as `require` does, `OSError` where it cannot be written."""
    require(path)
    bars = sum(len(report.timings) + 1.5 for report in reports.values())
    heights = (_ROOF_HEIGHT, _BAR_HEIGHT * bars + 0.6)
    figure = _figure()(figsize=(_WIDTH, sum(heights) + 1.2), layout="constrained")
    roof, shares = figure.subplots(2, 1, height_ratios=heights)
    figure.suptitle(_title(reports), fontsize=10)
    _draw_shares(shares, reports)
    _draw_roof(roof, reports)
    figure.savefig(path, dpi=130)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure  # no pyplot: no window, no state
    except ImportError as error:
        raise EngineError(f"pictures need the package matplotlib ({error}); pip install 'opcompile[plot]'") from error
    return Figure


def _title(reports: Mapping[str, BenchReport]) -> str:
    """Name the machine, what of it was used, and the dates of all reports."""
    every = list(reports.values())
    where = " / ".join(dict.fromkeys(r.ran_on for r in every))
    dates = sorted({r.date[:10] for r in every})
    machines = " / ".join(dict.fromkeys(r.machine for r in every))
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{machines}; {where}; {days}"


def _draw_roof(axes: Any, reports: Mapping[str, BenchReport]) -> None:
    """Draw rate over intensity, both by needed work, under the best limits that were measured for each dtype."""
    intensities = {name: r.needed_flop / r.bytes for name, r in reports.items()}
    # the corner of the roof is always in the picture
    shown = [*intensities.values(), *(r.roof.gflops / r.roof.gbytes for r in reports.values())]
    low, high = min(shown) / 3, max(shown) * 3
    for dtype, style in zip(dict.fromkeys(r.roof.dtype for r in reports.values()), ("-", "--"), strict=False):
        roofs = [r.roof for r in reports.values() if r.roof.dtype == dtype]
        peak, bandwidth = max(r.gflops for r in roofs), max(r.gbytes for r in roofs)
        ends = (low, peak / bandwidth, high)
        label = f"limits, {dtype}: {peak:.0f} GFLOP/s, {bandwidth:.1f} GB/s"
        axes.plot(ends, [min(peak, x * bandwidth) for x in ends], style, color="black", linewidth=1.2, label=label)
    for engine, (colour, marker) in _LOOKS.items():
        timed = [(name, r, t) for name, r in reports.items() for t in r.timings if t.engine == engine]
        points = [(intensities[name], r.needed_gflops(t)) for name, r, t in timed]
        if points:
            size, layer = (40, 4) if engine == OURS else (16, 3)
            axes.scatter(*zip(*points, strict=True), s=size, c=colour, marker=marker, zorder=layer, label=engine)
    rates = [r.needed_gflops(t) for r in reports.values() for t in r.timings]
    top = max(*rates, *(r.roof.gflops for r in reports.values()))
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(rates) / 3, top * 2.5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("needed FLOP for each byte of X, W, B and Y")
    axes.set_ylabel("needed GFLOP/s at the median time")
    axes.grid(which="both", linewidth=0.3, alpha=0.5)
    axes.legend(loc="lower right", fontsize=8)
    axes.set_title("Roofline; the numbers are those of the layers below", fontsize=10)
    _number(axes, [[(intensities[name], r.needed_gflops(t)) for t in r.timings] for name, r in reports.items()])


def _number(axes: Any, layers: list[list[tuple[float, float]]]) -> None:
    """Write the number of each layer near our point, the first one, where there is no other number or point."""
    axes.figure.draw_without_rendering()  # fixes the scales
    taken = [tuple(place) for points in layers for place in axes.transData.transform(points)]
    for number, (point, *_) in enumerate(layers, 1):
        place = axes.transData.transform(point)
        dx, dy = next((step for step in _steps() if all(_apart(place, step, other) for other in taken)), (14.0, 14.0))
        taken.append((place[0] + dx, place[1] + dy))
        axes.annotate(
            str(number),
            point,
            (dx * 72 / axes.figure.dpi, dy * 72 / axes.figure.dpi),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=_LOOKS[OURS][0],
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "grey", "shrinkA": 4, "shrinkB": 2},
        )


def _steps() -> Iterator[tuple[float, float]]:
    """Yield offsets in pixels, the nearest first, above before below."""
    for radius in (18, 28, 40, 54, 70, 90):
        for turn in (1, 3, 0, 4, 2, 7, 5, 6):
            yield radius * math.cos(turn * math.pi / 4), radius * math.sin(turn * math.pi / 4)


def _apart(place: tuple[float, ...], step: tuple[float, float], other: tuple[float, ...]) -> bool:
    return abs(place[0] + step[0] - other[0]) > 16 or abs(place[1] + step[1] - other[1]) > 13


def _draw_shares(axes: Any, reports: Mapping[str, BenchReport]) -> None:
    """Draw a bar for each engine of each layer: the roofline's time over its own, so that longer is faster."""
    ticks, labels, at, seen = [], [], 0.0, set()
    for number, (name, report) in enumerate(reports.items(), 1):
        ticks.append(at + (len(report.timings) - 1) / 2)
        labels.append(f"{number}  {name}" + (" (too noisy)" if report.noisy else ""))
        for timing in report.timings:
            share = 100 * report.share(timing)
            label = None if timing.engine in seen else timing.engine
            axes.barh(at, share, height=0.9, color=_LOOKS[timing.engine][0], label=label)
            axes.text(share, at, f" {share:.0f}", va="center", fontsize=6)
            seen.add(timing.engine)
            at += 1
        at += 1.5
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_ylim(at - 1.5, -1)
    axes.axvline(100, color="black", linewidth=1.2)
    axes.margins(x=0.06)
    axes.set_xlabel("share of the roofline at the median time, %; longer is faster")
    axes.grid(axis="x", linewidth=0.3, alpha=0.5)
    axes.set_axisbelow(True)
