"""The steps of `replace`, one after the other."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import opcompile
from opcompile.errors import CallError, EngineError, OpcompileError, TargetError
from opcompile.machine import processor, system
from opcompile.paths import require_unread
from opcompile.replace import sessions
from opcompile.replace.library import Kernel, Operator, build, compiled, in_one_domain
from opcompile.replace.model import Model
from opcompile.replace.place import LIBRARY, REPORT, require_place, written
from opcompile.replace.prove import NotDeterministicError, compare_models, prove, race, race_models
from opcompile.replace.report import WHOLE, KernelReport, NodeReport, OutputCheck, Report, Speed
from opcompile.replace.rewrite import perturbed, rewrite, save
from opcompile.replace.survey import Node, require_nodes, survey
from opcompile.target import Target, cores
from opcompile.target import target as named

if TYPE_CHECKING:
    from opcompile.lower import PlanName

Shapes = tuple[Mapping[str, Sequence[int | str]], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A node on its way: its kernels, or the reason why it stays as it is, and those that were ``tried`` in vain.

    ``failed`` where there was something to compile and it did not.
    """

    node: Node
    kernels: tuple[Kernel, ...] = ()
    reason: str | None = None
    tried: tuple[Kernel, ...] = ()
    failed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What `opcompile.replace.replace` was asked for; its docstring explains the fields."""

    model: Path
    into: Path
    mode: str
    target: str
    plan: PlanName
    shapes: Shapes
    nodes: tuple[str, ...]
    everything: bool
    verify: bool
    measure: bool
    threads: tuple[int, ...]
    seconds: float
    seed: int
    progress: Callable[[int, int, str | None], None]
    # by the operators that they hold: where every kernel is kept, the library that was tried is the one
    libraries: dict[tuple[str, ...], bytes] = field(default_factory=dict)

    def run(self) -> Report:
        """Take all steps."""
        from opcompile.lower import require_plan  # on use: it brings the compiler

        machine = named(self.target)
        require_plan(self.plan)
        require_place(self.into)
        require_unread(self.into, [self.model])
        threads = self._threads()
        not_asked = self._not_asked(machine)
        found, kernels = self._best(machine, threads, not_asked)
        kept = [f for f in found if f.kernels]
        with written(self.into) as folder:
            files = self._write(kept, machine, folder)
            library = folder / LIBRARY if kept else None
            checks, speeds = self._whole(kept, folder, threads, not_asked) if library else ((), ())
            report = Report(
                source=self.model.name,
                mode=self.mode,
                target=machine.name,
                library=library.name if library else None,
                library_bytes=library.stat().st_size if library else 0,
                model=self.model.name if self.mode == "rewrite" else None,
                files=tuple(files),
                nodes=tuple(_node_report(f) for f in found),
                kernels=tuple(kernels.values()),
                checks=checks,
                speeds=speeds,
                not_asked=not_asked,
                versions=_versions(),
                machine=f"{processor()}; {system()}",
                date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            (folder / REPORT).write_text(json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")
        self.progress(1, 1, None)
        return report

    def _threads(self) -> tuple[int, ...]:
        """Return the numbers of threads that this machine has. Raises `CallError`."""
        if not self.threads or any(type(n) is not int or n < 1 for n in self.threads):
            raise CallError(f"threads are {self.threads}, but must be whole numbers from 1 on")
        return tuple(n for n in self.threads if n <= cores()) or (1,)

    def _not_asked(self, machine: Target) -> dict[str, str]:
        reasons = {}
        for what, asked in (("verification", self.verify), ("speed", self.measure)):
            if not machine.native:
                reasons[what] = f"code for {machine.name} does not run on this machine"
            elif not asked:
                reasons[what] = "it was not asked for"
        return reasons

    # --- kernels ---

    def _best(
        self, machine: Target, threads: Sequence[int], not_asked: Mapping[str, str]
    ) -> tuple[list[Found], dict[str, KernelReport]]:
        """Compile, try and choose; a node that does not compile, or gain, with what follows it is tried without."""
        found = self._compiled(machine)
        reports = self._tried(found, machine, threads, not_asked)
        found = [self._chosen(f, reports) for f in found]
        again = {f.node.output for f in found if f.node.fusion.nodes and (f.failed or _slow(f, reports))}
        if again:
            alone = self._compiled(machine, again)
            reports |= self._tried(alone, machine, threads, not_asked)
            others = {f.node.output: self._chosen(f, reports) for f in alone}
            found = [_better(f, others.get(f.node.output, f)) for f in found]
        return found, reports

    def _compiled(self, machine: Target, unfused: Collection[str] = ()) -> list[Found]:
        """Find the nodes and compile their layers; ``unfused`` asks for those alone, without what follows them.

        Raises `ModelError` where a chosen one is not there.
        """
        _, nodes = survey(self.model, self.shapes, fused=self.mode == "rewrite", unfused=unfused)
        require_nodes(self.model, nodes, self.nodes)
        found = []
        nodes = [node for node in nodes if not unfused or node.output in unfused]
        for number, node in enumerate(nodes):
            if self.nodes and node.name not in self.nodes:
                node = replace(node, specs=(), reason="it was not chosen")
            self.progress(number, len(nodes), f"compile {node.name}")
            found.append(self._compiled_node(node, machine))
        return found

    def _compiled_node(self, node: Node, machine: Target) -> Found:
        if node.reason:
            return Found(node, reason=node.reason)
        try:
            return Found(node, tuple(compiled(spec, machine, self.plan) for spec in node.specs))
        except (EngineError, TargetError):
            raise  # of this machine, and so of every node
        except OpcompileError as error:
            return Found(node, reason=str(error), failed=True)

    def _operators(self, found: Sequence[Found]) -> dict[str, Operator]:
        """Return the operators of the library by name; in override mode there is one."""
        if self.mode == "override":
            kernels = {kernel.key: kernel for f in found for kernel in f.kernels}
            return {"ConvTranspose": Operator.override(list(kernels.values()))} if kernels else {}
        operators = [Operator.of(f.kernels, packed=f.node.packed) for f in found if f.kernels]
        return {operator.name: operator for operator in in_one_domain(operators)}

    def _operator_of(self, f: Found) -> str:
        return Operator.of(f.kernels, packed=f.node.packed).name if self.mode == "rewrite" else "ConvTranspose"

    def _library(self, found: Sequence[Found], machine: Target) -> bytes:
        operators = list(self._operators(found).values())
        key = tuple(f"{operator.name} {kernel.key}" for operator in operators for kernel in operator.kernels)
        if key not in self.libraries:
            self.libraries[key] = build(operators, machine)
        return self.libraries[key]

    # --- proof and speed of each kernel ---

    def _tried(
        self, found: Sequence[Found], machine: Target, threads: Sequence[int], not_asked: Mapping[str, str]
    ) -> dict[str, KernelReport]:
        """Let each kernel run alone inside ONNX Runtime."""
        pairs = [(operator, kernel) for operator in self._operators(found).values() for kernel in operator.kernels]
        if len(not_asked) == 2 or not pairs:
            return {kernel.key: _kernel_report(kernel) for _, kernel in pairs}
        reports = {}
        with tempfile.TemporaryDirectory(prefix="opcompile-") as folder:
            library = Path(folder) / LIBRARY
            library.write_bytes(self._library(found, machine))
            for number, (operator, kernel) in enumerate(pairs):
                if kernel.key not in reports:
                    self.progress(number, len(pairs), f"try {kernel.spec}")
                    reports[kernel.key] = self._tried_kernel(operator, kernel, library, threads, not_asked)
        return reports

    def _tried_kernel(
        self, operator: Operator, kernel: Kernel, library: Path, threads: Sequence[int], not_asked: Mapping[str, str]
    ) -> KernelReport:
        report = _kernel_report(kernel)
        try:
            if "verification" not in not_asked:
                report = replace(report, proofs=prove(operator, kernel, library, threads, self.seed))
            if "speed" not in not_asked and report.passed:
                report = replace(report, speeds=race(operator, kernel, library, threads, self.seconds))
        except EngineError as error:
            return replace(report, reason=str(error))
        return report

    def _chosen(self, f: Found, reports: Mapping[str, KernelReport]) -> Found:
        """Keep the kernels that are right, and faster; of a packed node that is all or nothing."""
        if not f.kernels:
            return f
        kept, reason = [], f.reason
        for kernel in f.kernels:
            report = reports[kernel.key]
            if not report.passed:
                reason = f"its kernel was found wrong: {next(p for p in report.proofs if not p.check.passed).check}"
            elif not self.everything and not report.gains:
                reason = "its kernel is not faster than ONNX Runtime's own; --all replaces it all the same"
            else:
                kept.append(kernel)
        return Found(f.node, tuple(kept), None, ()) if kept else Found(f.node, (), reason, f.kernels)

    # --- the directory ---

    def _write(self, kept: Sequence[Found], machine: Target, folder: Path) -> list[str]:
        """Write library and model; return the names of the files."""
        files = []
        if kept:
            (folder / LIBRARY).write_bytes(self._library(kept, machine))
            files.append(LIBRARY)
        if self.mode == "override":
            return files
        self.progress(0, 1, "write the model")
        model, nodes = survey(self.model, self.shapes, unfused=_unfused(kept))
        again = {node.output: node for node in nodes}
        edits = [
            (
                again[f.node.output],
                self._operator_of(f),
                f.kernels[0].lowered.packing(f.node.weight) if f.node.packed and f.node.weight is not None else None,
            )
            for f in kept
        ]
        domain = next((operator.domain for operator in self._operators(kept).values()), "")
        data = rewrite(model, edits, domain)
        return [*files, *save(model, folder / self.model.name, data)]

    # --- the whole model ---

    def _whole(
        self, kept: Sequence[Found], folder: Path, threads: Sequence[int], not_asked: dict[str, str]
    ) -> tuple[tuple[OutputCheck, ...], tuple[Speed, ...]]:
        """Verify and time the whole model; what cannot be asked is noted in ``not_asked``."""
        checks: tuple[OutputCheck, ...] = ()
        speeds: tuple[Speed, ...] = ()
        ours, library = (folder / self.model.name if self.mode == "rewrite" else self.model), folder / LIBRARY
        if len(not_asked) == 2:
            return checks, speeds
        sets: list[sessions.InputSet] = []
        try:
            sets = sessions.input_sets(sessions.Session(self.model), self.shapes, self.seed)
            if "verification" not in not_asked:
                self.progress(0, 2, "verify the whole model")
                try:
                    with self._spread(kept) as spread:
                        checks = compare_models(self.model, ours, library, spread, sets, threads)
                except NotDeterministicError as error:  # it can be timed all the same
                    not_asked[WHOLE] = str(error)
            if "speed" not in not_asked:
                self.progress(1, 2, "time the whole model")
                speeds = race_models(self.model, ours, library, sets[0].feeds, threads, 2 * self.seconds)
        except EngineError as error:
            way_out = "; if that is for its open sizes, give them by --shape" if any(s.open for s in sets) else ""
            not_asked[WHOLE] = f"{error}{way_out}"
        return checks, speeds

    @contextmanager
    def _spread(self, kept: Sequence[Found]) -> Iterator[Path]:
        """Write the stock model with errors as large as the bounds allow, for as long as it is needed."""
        model, nodes = survey(self.model, self.shapes, fused=self.mode == "rewrite", unfused=_unfused(kept))
        outputs = {f.node.output for f in kept}
        perturbed(model, [node for node in nodes if node.output in outputs])
        with tempfile.TemporaryDirectory(prefix="opcompile-") as folder:
            path = Path(folder) / self.model.name
            save(Model(model.proto, self.model.parent), path)
            yield path


def _slow(f: Found, reports: Mapping[str, KernelReport]) -> bool:
    return bool(f.tried) and reports[f.tried[0].key].passed


def _better(fused: Found, alone: Found) -> Found:
    """Return the node without what follows it where that is replaced, or compiles at least."""
    if not fused.failed:
        return alone if alone.kernels else fused
    if alone.failed:
        return fused
    names = ", ".join(node.op_type for node in fused.node.fusion.nodes)
    return replace(alone, reason=alone.reason or f"alone, for with {names} it did not compile: {fused.reason}")


def _unfused(found: Sequence[Found]) -> set[str]:
    return {f.node.output for f in found if not f.node.fusion.nodes}


def _node_report(f: Found) -> NodeReport:
    fused = tuple(node.op_type for node in f.node.fusion.nodes)
    if f.kernels:
        return NodeReport(f.node.name, "replaced", tuple(k.key for k in f.kernels), fused, f.reason)
    keys = tuple(k.key for k in f.tried)
    refused = f.failed or f.node.reason is not None
    return NodeReport(f.node.name, "refused" if refused else "kept", keys, fused if keys else (), f.reason)


def _kernel_report(kernel: Kernel) -> KernelReport:
    plan = kernel.lowered.plan
    return KernelReport(kernel.key, str(kernel.spec), f"{plan.name}, {plan.schedule}")


def _versions() -> dict[str, str]:
    others = {name: metadata.version(name) for name in ("apache-tvm", "numpy", "onnx", "onnxruntime")}
    return {"opcompile": opcompile.__version__, **others}
