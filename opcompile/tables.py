"""The tables of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from opcompile.terminal import new_table, plain

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from opcompile.build import Built
    from opcompile.cases import Case
    from opcompile.record import Record
    from opcompile.verify import Report


_COLOURS = {"verified": "green", "wrong": "red", "not verified": "yellow", "not compiled": "yellow"}


def built_table(built: Sequence[Built], into: str) -> Iterator[RenderableType]:
    """Show what came of each node, and below it why; of what holds for several, once."""
    from rich.markup import escape

    from opcompile.source import brief
    from opcompile.units import binary

    table = new_table("layer", "plan", "size", "oracle", "ONNX RT", "verdict", right=("size", "oracle", "ONNX RT"))
    for b in built:
        name = escape(b.name) + (f"\n[dim]{brief(b.spec)}[/]" if b.spec else "")
        verdict = f"[{_COLOURS[b.status]}]{b.status}[/]"
        if b.manifest is None:
            table.add_row(name, "-", "-", "-", "-", verdict)
            continue
        plan = f"{b.manifest['plan']['name']}\n{b.manifest['plan']['schedule']}"
        table.add_row(name, plan, binary(b.size), _share(b.worst("reference")), _share(b.worst("onnxruntime")), verdict)
    yield table
    for words, names in _grouped(built).items():
        yield plain(f"{', '.join(names)}: {words}")
    shares = (
        " Errors are shares of the derived bound, the largest of each node." if any(b.report for b in built) else ""
    )
    yield plain(
        f"{into}: {sum(b.directory is not None for b in built)} of {len(built)} compiled, "
        f"{sum(b.status == 'verified' for b in built)} verified.{shares}"
    )


def _grouped(built: Sequence[Built]) -> dict[str, list[str]]:
    """Say once what holds for several nodes: the reason of a verdict, and whom nobody could ask."""
    said: dict[str, list[str]] = {}
    for b in built:
        words = [f"{b.status}: {b.reason}"] if b.reason else []
        if b.report:
            asked = {row.against for row in b.report.rows}
            # an engine that answered other questions is no news here; the report tells
            asked |= {"opcompile"} if b.reason else set()
            words += [f"not asked: {n.what}: {n.reason}" for n in b.report.not_asked if n.what.split()[0] not in asked]
        for word in words:
            said.setdefault(word, []).append(b.name)
    return said


def report_tables(reports: dict[str, Report], unread: dict[str, str]) -> Iterator[RenderableType]:
    """Show every comparison of one artifact; of several, one line each and the tables of those that failed."""
    several = len(reports) + len(unread) > 1
    for name, report in reports.items():
        if not several or not report.passed:
            yield report.table()
        if report.unverified is not None and not report.failures:
            yield plain(
                f"{name}: not verified: {report.unverified}" if several else f"not verified: {report.unverified}"
            )
    if several:
        table = new_table("artifact", "comparisons", "largest share of the bound", "verdict", right=("comparisons",))
        for name, report in reports.items():
            worst = max((row.check.worst for row in report.rows), default=None)
            status = "verified" if report.passed else "wrong" if report.failures else "not verified"
            verdict = f"[{_COLOURS[status]}]{status}[/]"
            table.add_row(plain(name), str(len(report.rows)), _share(worst), verdict)
        for name in unread:
            table.add_row(plain(name), "-", "-", f"[{_COLOURS['not verified']}]not verified[/]")
        yield table
    yield from (plain(f"{name}: not verified: {reason}") for name, reason in unread.items())


def records_table(records: Sequence[Record]) -> Iterator[RenderableType]:
    """Show what tuning gained for each layer, and where the records are."""
    from opcompile.source import brief
    from opcompile.spec import ConvTranspose3d
    from opcompile.units import duration

    numbers = ("measured", "baseline", "tuned", "gain")
    table = new_table("layer", *numbers, right=numbers)
    for r in records:
        layer, gain = brief(ConvTranspose3d.parse(r.spec)), "-"
        if r.baseline_us:
            gain = f"{r.baseline_us / r.run_us:.2f}x"
        baseline = duration(r.baseline_us) if r.baseline_us else "failed"
        table.add_row(layer, str(len(r.samples)), baseline, duration(r.run_us), gain)
    yield table
    yield from (plain(str(r.path)) for r in records)


def measured_table(found: dict[str, Any], output: str) -> Iterator[RenderableType]:
    """Show what `opcompile measure` found of each layer, why candidates failed, and what to do then."""
    from opcompile.source import brief
    from opcompile.spec import ConvTranspose3d
    from opcompile.units import duration

    numbers = ("measured", "failed", "fastest")
    table = new_table("layer", *numbers, right=numbers)
    for layer in found["layers"]:
        times = [s["run_us"] for s in layer["samples"] if "run_us" in s]
        finals = [s["run_us"] for s in layer["finals"]]
        counts = str(len(times)), str(len(layer["samples"]) - len(times))
        table.add_row(brief(ConvTranspose3d.parse(layer["spec"])), *counts, duration(min(finals)) if finals else "-")
    yield table
    said = {s["error"] for layer in found["layers"] for s in layer["samples"] if "error" in s}
    yield from (plain(f"failed: {error}") for error in sorted(said))
    yield plain(f"{output}: on {found['machine']['device']}; then: opcompile tune --absorb {output}")


def cases_table(found: Sequence[Case]) -> Table:
    """Show the named layers."""
    from opcompile.source import brief

    table = new_table("case", "layer, origin, tags")
    for c in found:
        table.add_row(c.name, f"{brief(c.spec)}\n[dim]{c.origin} ({', '.join(sorted(c.tags))})[/]")
    return table


def _share(worst: float | None) -> str:
    return "-" if worst is None else "equal" if worst == 0 else f"{worst:.1%}" if worst < 10 else "beyond"
