"""What `replace` did, found and measured: for people a table, for machines JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from opcompile.bench import OWN_CPU, Ratio
from opcompile.bounds import Check
from opcompile.index import REPLACED
from opcompile.units import binary, duration
from schedules.counted import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMAT = REPLACED
VERSION = 1
# What was not asked, where that is the model as a whole.
WHOLE = "the whole model"


@dataclass(frozen=True, slots=True)
class Speed:
    """Median times in microseconds of ONNX Runtime's own and of ours, in turns, on so many threads.

    ``others`` is the share of the processors' time that other work had meanwhile.
    """

    threads: int
    before_us: float
    after_us: float
    ratio: Ratio
    others: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether other work had so much of the processors that a loss proves nothing."""
        return self.others > 1 - OWN_CPU

    @property
    def verdict(self) -> str:
        """That of the ratio; but what is slower on a busy machine is ``too noisy``."""
        return "too noisy" if self.busy and self.ratio.verdict == "slower" else self.ratio.verdict

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the verdict."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True, slots=True)
class Proof:
    """One comparison of a kernel that runs inside ONNX Runtime, on one input set."""

    inputs: str
    answer: str
    against: str
    check: Check


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One layer that was compiled, and what was found when it ran alone inside ONNX Runtime.

    ``reason`` says why nothing was asked, where ``proofs`` are empty.
    """

    key: str
    spec: str
    plan: str
    proofs: tuple[Proof, ...] = ()
    speeds: tuple[Speed, ...] = ()
    reason: str | None = None

    @property
    def passed(self) -> bool:
        """No comparison failed."""
        return all(proof.check.passed for proof in self.proofs)

    @property
    def worst(self) -> float | None:
        """The largest error as a share of its bound; None where nothing was asked."""
        return max((p.check.worst for p in self.proofs if p.answer.startswith("opcompile")), default=None)

    @property
    def gains(self) -> bool:
        """Faster on some number of threads and slower on none, as far as was measured."""
        verdicts = [speed.verdict for speed in self.speeds]
        return not verdicts or ("faster" in verdicts and "slower" not in verdicts)


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node: ``status`` is ``replaced``, ``kept`` (with ONNX Runtime) or ``refused``; ``reason`` says why.

    A node that is replaced has a reason where it did not compile with what follows it, and so is replaced alone.
    ``kernels`` are keys, one for each shape that was compiled, and of a node that was kept those that were tried;
    ``fused`` are the operators that went into them.
    """

    name: str
    status: str
    kernels: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """One output of the whole model on one input set: the largest error against stock ONNX Runtime, and its bound.

    Where the two differ in shape, dtype or in which elements are not finite, the error is infinite. An infinite bound,
    where errors within the nodes' own bounds make just such a difference, or the output changes from run to run, judges
    nothing.
    """

    inputs: str
    output: str
    threads: int
    error: float
    bound: float
    largest: float

    @property
    def judged(self) -> bool:
        """Whether any error is beyond the bound."""
        return self.bound < math.inf

    @property
    def passed(self) -> bool:
        """The error keeps within the bound."""
        return self.error <= self.bound


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about one model; ``library`` and ``model`` are names in the directory (``model`` None: untouched).

    ``checks`` hold the whole model against stock ONNX Runtime, ``speeds`` time the two in turns; what was not
    done stands in ``not_asked``, with its reason.
    """

    source: str
    mode: str
    target: str
    library: str | None
    library_bytes: int
    model: str | None
    files: tuple[str, ...]
    nodes: tuple[NodeReport, ...]
    kernels: tuple[KernelReport, ...]
    checks: tuple[OutputCheck, ...]
    speeds: tuple[Speed, ...]
    not_asked: dict[str, str]
    versions: dict[str, str]
    machine: str
    date: str

    @property
    def unanswered(self) -> str | None:
        """Why the whole model could not be asked or judged, which was to be verified or timed; None where it could."""
        return self.not_asked.get(WHOLE)

    @property
    def wrong(self) -> bool:
        """Whether a kernel or the whole model was found wrong, or of its outputs none could be judged."""
        unjudged = bool(self.checks) and not any(check.judged for check in self.checks)
        kernels, checks = (all(each.passed for each in found) for found in (self.kernels, self.checks))
        return unjudged or not (kernels and checks)

    @property
    def passed(self) -> bool:
        """Neither a kernel nor the whole model was found wrong, and what was to be asked could be."""
        return not self.wrong and self.unanswered is None

    @property
    def slower(self) -> bool:
        """Whether the whole model is slower than with stock ONNX Runtime, on some number of threads."""
        return any(speed.verdict == "slower" for speed in self.speeds)

    @property
    def replaced(self) -> int:
        """How many nodes our kernels compute."""
        return sum(node.status == "replaced" for node in self.nodes)

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, strings and finite numbers."""
        kernels = [
            {
                **asdict(kernel),
                "passed": kernel.passed,
                "proofs": [{**asdict(p), "check": p.check.to_json()} for p in kernel.proofs],
                "speeds": [speed.to_json() for speed in kernel.speeds],
            }
            for kernel in self.kernels
        ]
        fields = {
            **asdict(self),
            "kernels": kernels,
            "checks": [{**asdict(check), "judged": check.judged, "passed": check.passed} for check in self.checks],
            "speeds": [speed.to_json() for speed in self.speeds],
        }
        verdicts = {"passed": self.passed, "slower": self.slower, "replaced": self.replaced}
        plain: dict[str, Any] = _plain({"format": FORMAT, "version": VERSION, **verdicts, **fields})
        return plain

    def renderables(self) -> Iterator[RenderableType]:
        """Yield the table of nodes, and what is to be said of the whole model."""
        from rich.text import Text

        yield self._table()
        yield from (Text(line) for line in self._lines())

    def _table(self) -> RenderableType:
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for heading, justify in (("node", "left"), ("plan", "left"), ("of bound", "right"), ("before", "right")):
            table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for heading in ("after", "ratio"):
            table.add_column(heading, justify="right")
        table.add_column("")
        by_key = {kernel.key: kernel for kernel in self.kernels}
        for node in self.nodes:
            fused = f"\n[dim]with {escape(', '.join(node.fused))}[/]" if node.fused else ""
            verdict = f"[{_COLOURS[node.status]}]{node.status}[/]"
            if not node.kernels:
                table.add_row(escape(node.name), *["-"] * 5, verdict)
            for number, kernel in enumerate(by_key[key] for key in node.kernels):
                name = f"{escape(node.name)}{fused}" if number == 0 else ""
                if len(node.kernels) > 1:  # one for each shape of X
                    name += f"{name and chr(10)}[dim]{escape(kernel.spec.split()[0])}[/]"
                cells = [_cells(speed) for speed in kernel.speeds] or [["-"] * 3]
                columns = ["\n".join(column) for column in zip(*cells, strict=True)]
                table.add_row(name, kernel.plan, _share(kernel.worst), *columns, verdict if number == 0 else "")
        return table

    def _lines(self) -> Iterator[str]:
        yield from (f"{node.name}: {node.status}: {node.reason}" for node in self.nodes if node.reason)
        unasked = {kernel.reason: kernel.spec for kernel in self.kernels if kernel.reason}
        yield from (f"not asked alone inside ONNX Runtime: {spec}: {reason}" for reason, spec in unasked.items())
        judged = [check for check in self.checks if check.judged]
        worst = max(judged, key=lambda c: c.error / c.bound if c.bound else math.inf * c.error, default=None)
        if worst is not None:
            verdict = "WRONG" if self.wrong else "equal to stock ONNX Runtime within the bound"
            yield (
                f"whole model: {verdict}; largest error {worst.error:.2e} of {worst.bound:.2e} allowed "
                f"({worst.output} on {worst.inputs}), {len(judged)} comparisons"
            )
        if unjudged := sorted({check.output for check in self.checks if not check.judged}):
            yield (
                f"whole model: {len(self.checks) - len(judged)} of {len(self.checks)} comparisons judge nothing: "
                f"errors within the bounds change which elements of {', '.join(unjudged)} are finite, or their words, "
                "or they change from run to run"
            )
        for speed in self.speeds:
            r, busy = speed.ratio, f"; other work had {speed.others:.0%} of the processors" if speed.busy else ""
            times = f"{duration(speed.before_us)} -> {duration(speed.after_us)}"
            yield (
                f"whole model, {counted(speed.threads, 'thread')}: {times}, "
                f"{r.ratio:.2f} times as fast ({r.low:.2f} to {r.high:.2f}): {speed.verdict}{busy}"
            )
        for what, reason in self.not_asked.items():
            yield f"{what}: {reason}" if what == WHOLE else f"not asked: {what}: {reason}"
        if self.unanswered and not self.checks:
            yield f"{WHOLE} is NOT VERIFIED"
        copied = f", and {self.model} is a copy of the model" if self.model else ""
        made = f"no library: nothing was replaced{copied}"
        if self.library:
            made = f"{self.library}, {binary(self.library_bytes)}"
        yield f"{self.replaced} of {len(self.nodes)} nodes replaced, mode {self.mode}, for {self.target}; {made}"
        if any(kernel.proofs or kernel.speeds for kernel in self.kernels):
            yield "Times are those of one node alone inside ONNX Runtime. Errors are shares of the derived bound."


_COLOURS = {"replaced": "green", "kept": "yellow", "refused": "yellow"}


def _cells(speed: Speed) -> list[str]:
    ratio = f"{speed.ratio.ratio:.2f}x on {counted(speed.threads, 'thread')}"
    return [duration(speed.before_us), duration(speed.after_us), ratio]


def _share(worst: float | None) -> str:
    return "-" if worst is None else "equal" if worst == 0 else f"{worst:.1%}" if worst <= 1 else "beyond"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
