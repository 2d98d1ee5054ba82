"""Several benchmark reports at a glance: a line a layer, for a terminal or as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from opcompile.bench import NOT_CROPPED, BenchReport
from opcompile.engines import OURS
from opcompile.units import binary, duration

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = ("layer", "time", "GFLOP/s", "of roofline", "bound by", "peak memory", "fastest peer", "its time", "ratio")
_WORDS = ("layer", "bound by", "fastest peer")


def table(reports: Mapping[str, BenchReport]) -> Table:
    """Return the lines as a table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=Text("\n".join(notes(reports))), caption_justify="left")
    for heading in _HEADINGS:
        shown.add_column(heading, justify="left" if heading in _WORDS else "right", overflow="fold")
    for name, report in reports.items():
        shown.add_row(*map(Text, _row(name, report)))
    return shown


def markdown(reports: Mapping[str, BenchReport]) -> str:
    """Return the lines as a table in Markdown, with the notes as a list below it."""
    rule = [":--" if heading in _WORDS else "--:" for heading in _HEADINGS]
    rows = [_HEADINGS, rule, *(_row(name, report) for name, report in reports.items())]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(reports))])


def notes(reports: Mapping[str, BenchReport]) -> list[str]:
    """Say what holds for all lines: the mean, the verdicts, whom nobody could ask, the limits, the circumstances."""
    every = list(reports.values())
    cropped = [NOT_CROPPED] if any(r.flop != r.needed_flop for r in every) else []
    return [*_verdicts(every), *_not_timed(reports), *_limits(every), *cropped, *_circumstances(every)]


def _row(name: str, report: BenchReport) -> tuple[str, ...]:
    ours, best = report.timings[0], report.best
    bound = report.roof.bound(report.needed_flop, report.bytes)
    weight = binary(report.memory[OURS]) if OURS in report.memory else "-"
    share = f"{report.share(ours):.0%}" + (" (too noisy)" if report.noisy else "")
    known = (name, duration(ours.median_us), f"{report.needed_gflops(ours):.1f}", share, bound, weight)
    if best is None:
        return (*known, "-", "-", "-")
    (theirs,) = [t for t in report.timings if t.engine == best.peer]
    verdict = "" if best.verdict in ("faster", "slower") else f" ({best.verdict})"
    return (*known, best.peer, duration(theirs.median_us), f"{best.ratio:.2f}{verdict}")


def _verdicts(reports: list[BenchReport]) -> list[str]:
    ratios = [report.best for report in reports if report.best is not None]
    if not ratios:
        return []
    mean = math.exp(sum(math.log(r.ratio) for r in ratios) / len(ratios))
    counts = {word: sum(r.verdict == word for r in ratios) for word in dict.fromkeys(r.verdict for r in ratios)}
    said = ", ".join(f"{word} {count}" for word, count in counts.items())
    of = f"geometric mean of {len(ratios)}; {said}"
    return [f"against the fastest peer of each layer: {mean:.2f} times as fast ({of})"]


def _not_timed(reports: Mapping[str, BenchReport]) -> list[str]:
    said: dict[str, list[str]] = {}
    for name, report in reports.items():
        for peer, reason in report.not_timed.items():
            said.setdefault(f"{peer}: {reason}", []).append(name)
    return [
        f"not timed: {words}" + ("" if len(names) == len(reports) else f" ({', '.join(names)})")
        for words, names in said.items()
    ]


def _limits(reports: list[BenchReport]) -> list[str]:
    kinds = dict.fromkeys(report.roof.dtype for report in reports)
    return [
        f"limits of the machine, {dtype}: {_range([r.roof.gflops for r in reports if r.roof.dtype == dtype])} GFLOP/s, "
        f"{_range([r.roof.gbytes for r in reports if r.roof.dtype == dtype])} GB/s"
        for dtype in kinds
    ]


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _circumstances(reports: list[BenchReport]) -> list[str]:
    versions = {t.engine: t.version for report in reports for t in report.timings}
    where = dict.fromkeys(f"{r.machine}; {r.ran_on}; {r.target}; {r.date[:10]}" for r in reports)
    return [", ".join(f"{engine} {version}" for engine, version in versions.items()), *where]
