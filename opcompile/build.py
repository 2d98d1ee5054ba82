"""One call from a spec to an artifact on disk, or from a model to one for each of its nodes."""

from __future__ import annotations

import atexit
import hashlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from numpy.typing import NDArray

from opcompile import artifact
from opcompile.arguments import checked_flag, require_progress
from opcompile.atomic import require_outside, require_replaceable, require_room
from opcompile.cuda_driver import device, require_runs_on
from opcompile.emulate import require_emulated
from opcompile.errors import (
    ArtifactError,
    CallError,
    EngineError,
    KernelError,
    ModelError,
    OpcompileError,
    TargetError,
    VerificationError,
)
from opcompile.gpus import GpuTarget
from opcompile.gradients import artifact as gradient_artifact
from opcompile.gradients.gradient import Gradient, Wrt
from opcompile.gradients.lower import LoweredGradient
from opcompile.gradients.lower import lower as lower_gradient
from opcompile.gradients.lower_gpu import LoweredGpuGradient
from opcompile.gradients.lower_gpu import lower_gpu as lower_gpu_gradient
from opcompile.gradients.runtime import GradientArtifact
from opcompile.index import INDEX, begin_index, directory_names, require_place, write_index
from opcompile.lower import Lowered, PlanName, lower
from opcompile.lower_gpu import LoweredGpu, lower_gpu
from opcompile.manifest import MANIFEST, fingerprint, parse_manifest
from opcompile.paths import checked_path, require_unread, scratch
from opcompile.runtime import Artifact, load_any
from opcompile.simulate import simulated
from opcompile.source import Layer, Source, read
from opcompile.spec import ConvTranspose3d, require_layer
from opcompile.target import Target, any_target
from opcompile.verify import Report
from opcompile.verify import verify as check

if TYPE_CHECKING:
    from opcompile.importers.outline import Shapes

AnyLowered = Lowered | LoweredGpu | LoweredGradient | LoweredGpuGradient

# Above this a simulation takes minutes.
_MOST_SIMULATED_FLOPS = 2**27


@overload
def compile(
    spec: ConvTranspose3d,
    target: str = "llvm",
    plan: PlanName = "best",
    into: str | Path | None = None,
    *,
    derivative: None = None,
    weight: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    verify: bool = False,
) -> Artifact: ...


@overload
def compile(
    spec: ConvTranspose3d,
    target: str = "llvm",
    plan: PlanName = "best",
    into: str | Path | None = None,
    *,
    derivative: Wrt,
    verify: bool = False,
) -> GradientArtifact: ...


def compile(
    spec: ConvTranspose3d,
    target: str = "llvm",
    plan: PlanName = "best",
    into: str | Path | None = None,
    *,
    derivative: Wrt | None = None,
    weight: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    verify: bool = False,
) -> Artifact | GradientArtifact:
    """Compile ``spec`` for ``target``, write the artifact directory ``into`` and load it.

    With ``derivative`` it is the layer's derivative that is compiled, with respect to ``x``, ``w`` or
    ``b``; its calls take dY and what else it needs (`GradientArtifact`). ``weight`` (canonical,
    ``(C, M/g, kD, kH, kW)``) and ``bias`` (``(M,)``), when known, are packed into the artifact of a
    layer. Without ``into`` the directory is a temporary one that lives as long as the process. With
    ``verify`` the outputs are checked first: `VerificationError` when they are wrong, and then the
    directory is left for inspection, and when nothing could be verified. Raises `SpecError`,
    `TargetError` (also for a target whose code does not run here: `write` makes its directory),
    `EngineError`, `ArtifactError` where ``into`` cannot be written or must not be.
    """
    require_layer(spec)
    verify = checked_flag(verify, "verify")
    _require_runs_here(any_target(target))
    place = checked_path(into, "into") if into is not None else _scratch()
    written = write(spec, target, plan, place, derivative=derivative, weight=weight, bias=bias)
    loaded = load_any(written)
    if verify:
        report = check(loaded)
        try:
            artifact.store(written, report)
        except ArtifactError:
            report.require()  # what is wrong is worse than what is not stored
            raise
        if report.failures:
            raise VerificationError(f"{written}: outputs lie beyond the error bound; report.json has the details")
        report.require()
    return loaded


def _require_runs_here(machine: Target | GpuTarget) -> None:
    reason = "" if isinstance(machine, Target) and machine.native else " (it is for another)"
    if isinstance(machine, GpuTarget) and machine.language == "cuda":
        try:
            require_runs_on(machine.archs, device(), f"code for {machine.name}")
            return
        except TargetError as error:
            reason = f" ({error})"
    if reason:
        raise TargetError(
            f"code for {machine.name} does not run on this machine{reason}, so that its artifact cannot be loaded "
            "here; opcompile.build.write, or opcompile compile, writes the directory alone"
        )


def write(
    spec: ConvTranspose3d,
    target: str,
    plan: PlanName,
    into: str | Path,
    *,
    derivative: Wrt | None = None,
    weight: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
) -> Path:
    """Compile ``spec`` and write its artifact, for a machine that need not be at hand. Raises as `compile` does."""
    if derivative is not None and not (weight is None and bias is None):
        raise CallError("a derivative has no weight or bias compiled in; leave them out, and give w in each call")
    machine, place = any_target(target), checked_path(into, "into")
    require_replaceable(place)
    _require_writable(place)
    return _written(_lowered(spec, machine, plan, derivative), place, weight, bias)


def _lowered(spec: ConvTranspose3d, machine: Target | GpuTarget, plan: PlanName, derivative: Wrt | None) -> AnyLowered:
    if derivative is None:
        return lower_gpu(spec, machine, plan) if isinstance(machine, GpuTarget) else lower(spec, machine, plan)
    gradient = Gradient(spec, derivative)
    if isinstance(machine, GpuTarget):
        return lower_gpu_gradient(gradient, machine, plan)
    return lower_gradient(gradient, machine, plan)


def _written(
    lowered: AnyLowered,
    into: Path,
    weight: NDArray[Any] | None,
    bias: NDArray[Any] | None,
    replacing: Callable[[], None] | None = None,
) -> Path:
    try:
        if isinstance(lowered, LoweredGradient | LoweredGpuGradient):
            return gradient_artifact.write(lowered, into, replacing=replacing)
        return artifact.write(lowered, into, weight=weight, bias=bias, replacing=replacing)
    except OSError as error:
        raise _unwritable(into, error) from error


def _require_writable(place: Path, *, inside: bool = False) -> None:
    """Raise `ArtifactError` where no directory can be made at ``place``, or in it: before the work, not after it."""
    try:
        require_room(place.resolve() / INDEX if inside else place.resolve())
    except OSError as error:
        raise _unwritable(place, error) from error


def _unwritable(place: Path, error: OSError) -> ArtifactError:
    reason = error.strerror or error
    return ArtifactError(f"cannot write {place}: {reason}; name a directory that is yours, on a disk with space")


def _scratch() -> Path:
    """Return a place for an artifact that was given none; it is removed when the process ends."""
    folder = ExitStack()
    place = folder.enter_context(scratch()) / "artifact"
    # The last one registered is called first: before the folder's own way out, which warns.
    atexit.register(folder.close)
    return place


# --- a whole source ---


@dataclass(frozen=True, slots=True)
class Step:
    """How far `compile_all` is: ``step`` is ``compile``, ``verify`` or ``done``, of layer ``name``."""

    done: int
    total: int
    name: str
    step: str


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """What became of one layer: an artifact in ``directory``, its verification, or the ``reason`` why not."""

    name: str
    spec: ConvTranspose3d | None
    directory: Path | None = None
    manifest: dict[str, Any] | None = None
    report: Report | None = None
    reason: str | None = None

    @property
    def status(self) -> str:
        """``verified``, ``wrong``, ``not verified`` (``reason`` says why) or ``not compiled``."""
        if self.directory is None:
            return "not compiled"
        if self.report is None:
            return "not verified"
        return "verified" if self.report.passed else "wrong" if self.report.failures else "not verified"

    @property
    def size(self) -> int:
        """Bytes of the artifact, the manifest aside."""
        return sum(int(f["bytes"]) for f in self.manifest["files"].values()) if self.manifest else 0

    def worst(self, against: str) -> float | None:
        """Return our largest error, as a share of its bound, against an engine; None where nothing is known of it."""
        rows = self.report.rows if self.report and self.report.unverified is None else ()
        shares = [r.check.worst for r in rows if r.answer.startswith("opcompile") and r.against == against]
        return max(shares, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; ``directory`` is the name inside the index's own."""
        plan = self.manifest["plan"] if self.manifest else {}
        shares = {name: self.worst(name) for name in ("reference", "onnxruntime")}
        return {
            "name": self.name,
            "spec": str(self.spec) if self.spec else None,
            "status": self.status,
            "reason": self.reason,
            "directory": self.directory.name if self.directory else None,
            "bytes": self.size,
            "plan": plan.get("name"),
            "schedule": plan.get("schedule"),
            "worst_share_of_bound": {k: v if v is None or v < float("inf") else "inf" for k, v in shares.items()},
            "verified": self.report.date if self.report else None,
        }

    def to_index(self) -> dict[str, Any]:
        """Return what the index says: which artifact is where, or why there is none, and not how it was verified."""
        plan = self.manifest["plan"] if self.manifest else {}
        return {
            "name": self.name,
            "spec": str(self.spec) if self.spec else None,
            "directory": self.directory.name if self.directory else None,
            "reason": None if self.directory else self.reason,
            "fingerprint": fingerprint(self.manifest) if self.manifest else None,
            "plan": plan.get("name"),
            "schedule": plan.get("schedule"),
        }


def compile_all(
    source: str | Path,
    into: str | Path,
    target: str = "llvm",
    plan: PlanName = "best",
    *,
    derivative: Wrt | None = None,
    nodes: Iterable[str] = (),
    shapes: Shapes | None = None,
    verify: bool = True,
    progress: Callable[[Step], None] | None = None,
) -> list[Built]:
    """Compile everything that ``source`` stands for (see `opcompile.source`), or its ``derivative``, and verify it.

    A model's nodes go into subdirectories of ``into``, one each, with an ``index.json`` beside them, even
    where there is only one; weights that the file holds are packed into the artifacts. A node that
    cannot be compiled comes back with its reason and the others go on. ``nodes`` chooses some by name, and
    ``shapes`` gives inputs of an ONNX model the sizes that it leaves open, by their names.
    A text or a case is one layer, whose artifact is ``into`` itself; what is wrong with it is raised.
    Outputs beyond the bound are no exception here: see `Built.status`.
    """
    verify = checked_flag(verify, "verify")
    require_progress(progress)
    given, machine, place = read(source, nodes, shapes), any_target(target), checked_path(into, "into")
    alone = given.kind != "model"
    names = directory_names(layer.name for layer in given.layers)
    if alone:
        require_replaceable(place)
    else:
        require_outside(place)
        require_place(place, names)
        for name in names:
            require_unread(place / name, [given.text])
    _require_writable(place, inside=not alone)
    lowered: dict[ConvTranspose3d, AnyLowered] = {}
    built: list[Built] = []
    for number, (layer, name) in enumerate(zip(given.layers, names, strict=True)):

        def report(step: str, number: int = number, layer: Layer = layer) -> None:
            if progress:
                progress(Step(number + (step == "done"), len(given.layers), layer.name, step))

        one = _Job(layer, place if alone else place / name, machine, plan, derivative, verify, report)
        try:
            built.append(one.run(lowered, None if alone else place))
        except OpcompileError as error:
            of_every_node = isinstance(error, EngineError | TargetError) and not isinstance(error, KernelError)
            if alone or of_every_node:
                raise
            built.append(Built(layer.name, layer.spec, reason=str(error)))
        report("done")
    if not alone:
        built = [_beside_older(b, place / name) for b, name in zip(built, names, strict=True)]
        fields = {**_origin(given, machine, plan), "derivative": derivative}
        fields["shapes"] = {name: list(shape) for name, shape in (shapes or {}).items()}
        write_index(place, fields, [b.to_index() for b in built])
    return built


def _beside_older(built: Built, place: Path) -> Built:
    """Say of a node that was not compiled that an artifact of an older model is where its own would be."""
    if built.directory is not None or not place.exists():
        return built
    return replace(built, reason=f"{built.reason}; {place} is from an earlier time")


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One layer on its way."""

    layer: Layer
    place: Path
    machine: Target | GpuTarget
    plan: PlanName
    derivative: Wrt | None
    verify: bool
    report: Callable[[str], None]

    def run(self, lowered: dict[ConvTranspose3d, AnyLowered], model: Path | None) -> Built:
        """Compile, write and verify; ``lowered`` remembers what was compiled for an equal layer before.

        The index of ``model``, a directory of several, says from the first new artifact on that they are replaced.
        """
        layer, spec = self.layer, self.layer.spec
        if spec is None:
            return Built(layer.name, None, reason=layer.reason)
        self.report("compile")
        if spec not in lowered:
            lowered[spec] = _lowered(spec, self.machine, self.plan, self.derivative)
        replacing = partial(begin_index, model) if model else None
        place = _written(lowered[spec], self.place, layer.weight, layer.bias, replacing)
        found, reason = self._verified(place, spec) if self.verify else (None, "it was not asked for")
        manifest = parse_manifest((place / MANIFEST).read_bytes(), place)
        return Built(layer.name, spec, place, manifest, found, reason or None)

    def _verified(self, place: Path, spec: ConvTranspose3d) -> tuple[Report | None, str]:
        """Verify where the code runs here, or can be simulated. Returns the report, or the reason why there is none."""
        flops = Gradient(spec, self.derivative).flops if self.derivative else spec.flops
        native = isinstance(self.machine, Target) and self.machine.native
        if not native and isinstance(self.machine, Target):
            try:
                require_emulated(self.machine.architecture)
            except (EngineError, TargetError) as error:
                return None, f"code for {self.machine.name} does not run on this machine, and {error}"
        if not native and flops > _MOST_SIMULATED_FLOPS:
            return None, f"simulating {flops / 1e9:.1f} GFLOP takes long; `opcompile verify --simulate` does it"
        self.report("verify")
        found = check(load_any(place) if native else simulated(place))
        try:
            artifact.store(place, found)
        except ArtifactError as error:  # it is there, and was verified
            return found, str(error)
        return found, found.unverified or ""


def _origin(given: Source, machine: Target | GpuTarget, plan: str) -> dict[str, Any]:
    """Name the model by its file name and content: the directory may travel without it."""
    path = Path(given.text)
    try:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"{path} cannot be read again: {error.strerror}") from error
    return {"source": path.name, "source_sha256": content, "target": machine.name, "plan": plan}
