"""What a layer is and how it would be compiled, or what an artifact holds: facts to read, nothing is run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opcompile.bounds import matrices_sum_in, pairs_sum_in, sums_of
from opcompile.gpus import GpuTarget
from opcompile.manifest import REPORT, parse_manifest, read_manifest
from opcompile.paths import checked_path, read_file
from opcompile.source import brief
from opcompile.spec import AXIS_NAMES, Axis, ConvTranspose3d, require_layer
from opcompile.target import any_target
from opcompile.tensors import sizes_text
from opcompile.units import binary, scaled

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from opcompile.lower import Plan, PlanName

# An axis has as many phases as its stride: this many are shown, all of them are in the JSON.
_MOST_PHASES = 8


@dataclass(frozen=True, slots=True)
class Description:
    """A layer, the tiles that ``plan`` chose for ``target`` and the workspace they need, in bytes: on a GPU none."""

    spec: ConvTranspose3d
    target: str
    plan: Plan
    workspace_bytes: int

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte that must move."""
        return self.spec.flops / self.spec.bytes()

    @property
    def summed_in(self) -> str:
        """What products are summed in: a type, or what instructions do, of `opcompile.bounds.SUMS`."""
        if self.plan.schedule == "matrix":
            return matrices_sum_in(self.target.partition(":")[0], self.spec.dtype)
        return pairs_sum_in(self.plan.tiles) or self.spec.sum_dtype

    def to_json(self) -> dict[str, Any]:
        """Return plain values, every phase included."""
        spec = self.spec
        return {
            "spec": str(spec),
            "x": spec.x_shape,
            "w": spec.w_shape,
            "y": spec.y_shape,
            "axes": {name: _axis_json(axis) for name, axis in zip(AXIS_NAMES, spec.axes, strict=True)},
            "flop": spec.flops,
            "bytes": spec.bytes(),
            "flop_per_byte": round(self.intensity, 3),
            "workspace_bytes": self.workspace_bytes,
            "summed_in": self.summed_in,
            "target": self.target,
            "plan": asdict(self.plan),
        }

    def renderables(self) -> Iterator[RenderableType]:
        """Yield what a terminal shows."""
        spec = self.spec
        by = "" if self.summed_in == spec.sum_dtype else f", by {self.summed_in}"
        yield f"[bold]{brief(spec)}[/]"
        yield _axes_table(spec)
        yield facts(
            {
                "X, W -> Y": f"{sizes_text(spec.x_shape)}, {sizes_text(spec.w_shape)} -> {sizes_text(spec.y_shape)}",
                "work": f"{scaled(spec.flops, 'FLOP')}, {binary(spec.bytes())} of X, W, B and Y: "
                f"{self.intensity:.3g} FLOP/byte",
                "sums": f"up to {spec.terms} products each, in {spec.sum_dtype}{by}",
                "workspace": binary(self.workspace_bytes) + ("" if spec.batch else " for one batch element"),
                "target": self.target,
                "plan": plan_text(asdict(self.plan)),
            }
        )


def describe(spec: ConvTranspose3d, target: str = "llvm", plan: PlanName = "best") -> Description:
    """Choose tiles for ``spec`` as `opcompile.compile` would, and say why. Raises what that raises."""
    from opcompile.lower import choose, workspace_bytes  # on use: it brings the compiler

    require_layer(spec)
    machine = any_target(target)
    if isinstance(machine, GpuTarget):
        from opcompile.lower_gpu import choose as choose_gpu

        _, chosen = choose_gpu(spec, machine, plan)
        return Description(spec, machine.name, chosen, 0)
    tiles, chosen = choose(spec, machine, plan)
    return Description(spec, machine.name, chosen, workspace_bytes(spec, tiles))


def _axis_json(axis: Axis) -> dict[str, Any]:
    phases = [
        {
            "phase": phase.index,
            "taps": [phase.first_tap + i * phase.tap_step for i in range(phase.taps)],
            "reads": list(phase.offsets()),
        }
        for phase in axis.phases
    ]
    return {**asdict(axis), "full": axis.full, "out": axis.out, "phases": phases}


def _axes_table(spec: ConvTranspose3d) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("axis", "in", "out", "k", "s", "d", "pad", "op"):
        table.add_column(heading, no_wrap=True)
    table.add_column("phase: taps @ input offsets", overflow="fold")
    for name, axis in zip(AXIS_NAMES, spec.axes, strict=True):
        sizes = (axis.size, axis.out, axis.kernel, axis.stride, axis.dilation, f"{axis.pad[0]}:{axis.pad[1]}")
        table.add_row(name, *map(str, sizes), str(axis.output_pad), "\n".join(_phase_lines(axis)))
    return table


def _phase_lines(axis: Axis) -> Iterator[str]:
    for phase in axis.phases[:_MOST_PHASES]:
        if phase.taps:
            taps = ",".join(str(phase.first_tap + i * phase.tap_step) for i in range(phase.taps))
            reads = ",".join(f"{offset:+d}" if offset else "0" for offset in phase.offsets())
            yield f"{phase.index}: {taps} @ {reads}"
    empty = [str(phase.index) for phase in axis.phases[:_MOST_PHASES] if not phase.taps]
    if empty:
        yield f"{','.join(empty)}: no taps, the bias alone"
    if len(axis.phases) > _MOST_PHASES:
        yield f"... {len(axis.phases)} phases in all (--json has them)"


def facts(named: dict[str, str]) -> Table:
    """Return a table of two columns: what each fact is called, and the fact."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in named.items():
        table.add_row(name, value)
    return table


def plan_text(plan: dict[str, Any]) -> str:
    """Return a plan of a manifest as lines: its name and its tiles, why they were chosen, the record."""
    tiles = " ".join(f"{k}={v}" for k, v in plan["tiles"].items())
    record = [f"record {plan['record']}"] if plan.get("record") else []
    return "\n".join([f"{plan['name']}, {plan['schedule']}: {tiles}", *(f"- {line}" for line in plan["why"]), *record])


# --- an artifact ---


@dataclass(frozen=True, slots=True)
class Contents:
    """An artifact as it lies there: manifest, the state of each file (``ok``, ``changed``, ``missing``), report."""

    directory: Path
    manifest: dict[str, Any]
    states: dict[str, str]
    report: dict[str, Any] | None

    @property
    def whole(self) -> bool:
        """Whether every file is what the manifest says."""
        return all(state == "ok" for state in self.states.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "directory": str(self.directory),
            "whole": self.whole,
            "states": self.states,
            "manifest": self.manifest,
            "report": self.report,
        }

    def renderables(self) -> Iterator[RenderableType]:
        """Yield what a terminal shows."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        m = self.manifest
        yield f"[bold]{escape(str(self.directory))}[/]"
        yield facts(
            {
                "layer": brief(ConvTranspose3d.parse(m["spec"])),
                "computes": f"its derivative d{m['derivative']}" if m["derivative"] else "Y",
                "target": f"{m['target']['name']} ({m['target']['architecture']} {m['target']['system']})",
                "plan": plan_text(m["plan"]),
                **({"sums": f"by {sums}"} if (sums := sums_of(m)) else {}),
                "weights": " and ".join(m["weights"]) + " compiled in" if m["weights"] else "given in each call",
                "workspace": binary(m["workspace_bytes"]),
                "made with": ", ".join(f"{name} {version}" for name, version in m["versions"].items()),
                "verified": _verdict(self.report),
            }
        )
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("file")
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("")
        for name, entry in m["files"].items():
            state = self.states[name]
            table.add_row(escape(name), binary(entry["bytes"]), state if state == "ok" else f"[red]{state}[/]")
        yield table


def contents(directory: str | os.PathLike[str]) -> Contents:
    """Read the artifact in ``directory``, for whatever machine it was made. Raises `ArtifactError`."""
    place = checked_path(directory, "directory")
    manifest = parse_manifest(read_manifest(place), place)
    states = {name: _state(place / name, entry["sha256"]) for name, entry in manifest["files"].items()}
    report = json.loads(read_file(place / REPORT)) if states.get(REPORT) == "ok" else None
    return Contents(place, manifest, states, report)


def _state(path: Path, digest: str) -> str:
    try:
        content = read_file(path)
    except OSError:
        return "missing"
    return "ok" if hashlib.sha256(content).hexdigest() == digest else "changed"


def _verdict(report: dict[str, Any] | None) -> str:
    if report is None:
        return "not yet: `opcompile verify` does it"
    word = "passed" if report["passed"] else "FAILED"
    if (unverified := report.get("unverified")) and all(row["check"]["passed"] for row in report["rows"]):
        word = f"not verified: {unverified}; with other weights passed"
    against = sorted({row["against"] for row in report["rows"]})
    return f"{word}, {len(report['rows'])} comparisons against {', '.join(against)}, {report['date']}"
