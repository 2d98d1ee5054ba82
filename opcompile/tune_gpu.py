"""Tuning for GPUs, in two halves that can be apart: `emit` builds candidates, `absorb` records the fastest.

Between them `opcompile.measure` times the candidates, on a machine that has the GPU and no compiler. `tune_gpu` does
all three where the GPU is at hand, or serves under a tracker. Nothing heavy is imported with this module.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opcompile import interrupts
from opcompile.arguments import require_trials
from opcompile.cuda_driver import require_runs_on
from opcompile.errors import ArtifactError, EngineError, RecordError, TargetError
from opcompile.farm import Farm
from opcompile.gpus import GpuTarget, gpu_target, is_gpu
from opcompile.index import LEFT_BY_BROWSERS
from opcompile.job import JOB, Candidate, Job, LayerJob
from opcompile.manifest import parse_manifest, read_manifest
from opcompile.measure import FORMAT, Machine, measure
from opcompile.paths import checked_path
from opcompile.record import FORMAT as RECORD_FORMAT
from opcompile.record import (
    Record,
    checked,
    key,
    machine_name,
    own_folder,
    read_object,
    unsound,
    write_atomically,
    write_record,
)
from opcompile.spec import ConvTranspose3d
from opcompile.target import cores
from opcompile.trials import (
    Progress,
    ProgressCallback,
    Sample,
    finalists,
    last_line,
    nothing_measured,
    walk,
    winner,
)

if TYPE_CHECKING:
    from opcompile.lower_gpu import LoweredGpu
    from schedules.gpu_tiles import GpuEstimate


def tune_gpu(
    spec: ConvTranspose3d,
    target: str,
    trials: int,
    *,
    seed: int,
    tracker: str | None,
    key: str | None,
    work_dir: str | Path | None,
    into: str | Path | None,
    progress: ProgressCallback | None,
) -> Record:
    """Do `emit`, `opcompile.measure.measure` and `absorb` in turn, in ``work_dir`` or a temporary directory.

    Candidates are built here, and measured on this machine's GPU or, with ``tracker`` and ``key``, on those that
    `opcompile.serve` serves under them. In a ``work_dir`` an interrupted run continues. Raises what they raise, and
    `TargetError` at once where there is no GPU for ``target``.
    """
    machine = _cuda(target)
    farm = Farm.named(tracker, key, "opcompile.serve")
    try:
        where = Machine.of(farm)
    except TargetError as error:
        if farm is not None:
            raise
        raise TargetError(
            f"{target} cannot be timed here: {error}. Or build the candidates here with `opcompile tune --emit DIR`, "
            "time them there with `opcompile measure DIR -o results.json`, and record the fastest here with "
            "`opcompile tune --absorb results.json`"
        ) from error
    require_runs_on(machine.archs, where.device, f"each candidate for {target}")
    with nullcontext(work_dir) if work_dir is not None else tempfile.TemporaryDirectory(prefix="opcompile-") as name:
        home = Path(str(name))
        emit([spec], target, trials, into=home, seed=seed, progress=progress)
        measure(home, home / "results.json", on=where, progress=progress)
        (record,) = absorb(home / "results.json", into)
    return record


# --- the first half ---


def emit(
    specs: Sequence[ConvTranspose3d],
    target: str,
    trials: int = 64,
    *,
    into: str | Path,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Path:
    """Build ``trials`` candidates of each layer as artifacts in ``into``, with a list of them; no GPU is needed.

    Which ones depends on layer, target and ``seed`` alone, as in `opcompile.tune`. One that does not compile is
    listed with the error. Where ``into`` holds this very job already, it stays as it is. Returns ``into``.

    Raises `SpecError` (a budget below one), `TargetError` (no CUDA target), `EngineError` (nvcc is missing, or
    compiles none of them), `ArtifactError` (``into`` holds something else, or cannot be written).
    """
    machine, place = _cuda(target), checked_path(into, "into").absolute()
    require_trials(trials)
    _require_a_job_at_most(place)
    made = _made(specs, machine, trials)
    if _holds(place, machine, seed, made):
        return place
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / JOB).unlink(missing_ok=True)
        layers = [_emitted(spec, machine, trials, seed, place, progress) for spec in specs]
    except OSError as error:
        raise ArtifactError(f"cannot write {place}: {error.strerror or error}; name another directory") from error
    write_atomically(place / JOB, json.dumps(Job(machine.name, seed, made, tuple(layers)).to_json(), indent=1) + "\n")
    return place


# What emitting, measuring beside it, and being interrupted leave there: layers have directories by their keys.
_OF_A_JOB = re.compile(rf"{re.escape(JOB)}|results\.json|[0-9a-f]{{16}}")


def _require_a_job_at_most(place: Path) -> None:
    """Raise `ArtifactError` where ``place`` holds something, and nothing of a job."""
    there = {path.name for path in place.iterdir()} - LEFT_BY_BROWSERS if place.is_dir() else set()
    strange = sorted(name for name in there if not _OF_A_JOB.fullmatch(name))
    if strange and len(strange) == len(there):
        raise ArtifactError(f"{place} holds {strange[0]}, and no job; empty it, or name another directory")


def _cuda(target: str) -> GpuTarget:
    if not is_gpu(target):
        raise TargetError(
            f"target {target!r} is no GPU; candidates are emitted for GPUs of CUDA, and a CPU is tuned where it is, or "
            "over a tracker"
        )
    machine = gpu_target(target)
    if machine.language != "cuda":
        raise TargetError(
            f"kernels for {target} cannot be timed by this version, which drives GPUs of CUDA alone; compile with plan "
            "baseline, whose tiles come from arithmetic"
        )
    return machine


def _made(specs: Sequence[ConvTranspose3d], machine: GpuTarget, trials: int) -> dict[str, str]:
    """All that the candidates depend on besides layers, target and seed. Raises `EngineError` without nvcc."""
    from opcompile.lower import hashed
    from opcompile.lower_gpu import choose, scheduled
    from opcompile.nvcc import nvcc_version
    from opcompile.tune import versions

    schedules = [hashed(scheduled(spec, choose(spec, machine, "baseline")[0], machine)) for spec in specs]
    return {
        "layers": ",".join(key(str(spec)) for spec in specs),
        "trials": str(trials),
        "schedules": ",".join(schedules),
        "nvcc": nvcc_version(),
        **versions(),
    }


def _holds(place: Path, machine: GpuTarget, seed: int, made: dict[str, str]) -> bool:
    try:
        there = Job.read(place)
    except ArtifactError:
        return False
    return (there.target, there.seed, there.made) == (machine.name, seed, made)


def _emitted(
    spec: ConvTranspose3d,
    machine: GpuTarget,
    trials: int,
    seed: int,
    place: Path,
    progress: ProgressCallback | None,
) -> LayerJob:
    """Schedule the candidates one after the other, while nvcc compiles those before on all cores."""
    from schedules.gpu_tiles import candidates

    ranked = candidates(spec, machine.gpu)
    ranks = walk(len(ranked), seed)[:trials]
    home, found = place / key(str(spec)), []
    pool = ThreadPoolExecutor(cores())
    try:
        building = [_building(pool, spec, machine, ranked[rank], home / str(rank)) for rank in ranks]
        for rank, future in zip(ranks, building, strict=True):
            error = _error(future)
            declaration, sha256 = ("", "") if error else future.result()
            found.append(Candidate(rank, ranked[rank].tiles.fields(), declaration, sha256, error))
            if progress:
                progress(Progress(len(found), len(ranks), sum(bool(c.error) for c in found), None, "build"))
    finally:
        pool.shutdown(cancel_futures=True)
    if all(c.error for c in found):
        raise EngineError(f"none of the {len(found)} candidates could be built; the first one: {found[0].error}")
    return LayerJob(str(spec), tuple(found))


_Built = Future[tuple[str, str]]


def _building(
    pool: ThreadPoolExecutor, spec: ConvTranspose3d, machine: GpuTarget, estimate: GpuEstimate, place: Path
) -> _Built:
    """Return what will be the hashes of the candidate's declaration and of its artifact's manifest."""
    from opcompile import artifact
    from opcompile.lower import Plan
    from opcompile.lower_gpu import declaration_hash, emitted

    def write(lowered: LoweredGpu, declaration: str) -> tuple[str, str]:
        written = artifact.write(lowered, place)
        return declaration, str(parse_manifest(read_manifest(written), written)["sha256"])

    tiles = estimate.tiles
    plan = Plan("candidate", tiles.family, tiles.fields(), estimate.why(machine.unit(spec.dtype)), None)
    try:
        return pool.submit(write, emitted(spec, machine, tiles, plan), declaration_hash(spec, tiles))
    except Exception as error:  # noqa: BLE001 (an illegal move is this candidate's result)
        interrupts.require_none()
        failed: _Built = Future()
        failed.set_exception(error)
        return failed


def _error(future: _Built) -> str:
    """Return what kept a candidate from being built. Raises what would keep every other one, too."""
    error = future.exception()
    if isinstance(error, (OSError, ArtifactError)):
        raise error
    return last_line(str(error)) or type(error).__name__ if error else ""


# --- the second half ---


def absorb(results: str | Path, into: str | Path | None = None) -> list[Record]:
    """Record the fastest candidate of each layer in ``results``, which `opcompile.measure.measure` wrote.

    Records go to ``into``, by default `opcompile.record.own_folder`. Raises `RecordError` for a file that is no such
    result (one whose samples and finals are not those of its job, among others), or that was measured on what this
    version declares in another way or does not schedule, and then none is written; `TargetError` where no candidate
    of a layer could be measured, when the other layers are recorded.
    """
    path = checked_path(results, "results").absolute()
    content = read_object(path, "result", "give the file that `opcompile measure` wrote")
    if content.get("format") != FORMAT:
        raise RecordError(f"{path} is of format {content.get('format')!r}, and this version reads {FORMAT}; {_AGAIN}")
    try:
        job = Job.from_json(content["job"], path)
        machine = gpu_target(job.target)
        if not job.layers:
            raise ValueError("its job has no layer")
        layers = zip(job.layers, content["layers"], strict=True)
        found = [_content(job, machine, layer, of_layer, content["machine"]) for layer, of_layer in layers]
        specs = [ConvTranspose3d.parse(layer.spec) for layer in job.layers]
    except (KeyError, TypeError, ValueError, TargetError) as error:
        raise RecordError(f"{path} is no result of `opcompile measure`: {error}; {_AGAIN}") from error
    timed = [(spec, checked(path, c, spec, machine)) for spec, c in zip(specs, found, strict=True) if c["finals"]]
    for spec, record in timed:
        record.require_declaration(_declaration(spec, record))
    folder = checked_path(into, "into") if into is not None else own_folder()
    records = [replace(record, path=write_record(record, folder, spec, machine)) for spec, record in timed]
    for layer, c in zip(job.layers, found, strict=True):
        if not c["finals"]:
            raise TargetError(f"{layer.spec} has no record: {nothing_measured(c['samples'])}")
    return records


_AGAIN = "measure again, and give the file that this writes"
_MADE_BY = ("opcompile", "tvm", "tvm_ffi", "llvm", "numpy", "nvcc")
_MEASURED_BY = ("opcompile", "python", "apache_tvm_ffi", "numpy")


def _content(
    job: Job, target: GpuTarget, layer: LayerJob, found: dict[str, Any], machine: dict[str, str]
) -> dict[str, Any]:
    """Return the fields of the layer's record, the finals being empty where nothing was measured."""
    if found["spec"] != layer.spec:
        raise ValueError(f"it holds {found['spec']!r} where its job has {layer.spec!r}")
    if wrong := [name for name in _MEASURED_BY if not isinstance(machine[name], str)]:
        raise TypeError(f"its machine has {machine[wrong[0]]!r} for {wrong[0]}")
    _require_of(layer, found["samples"], found["finals"])
    if not found["finals"]:
        return {"samples": found["samples"], "finals": []}
    won = winner(found["finals"])
    (candidate,) = (c for c in layer.candidates if c.rank == won["rank"] and c.tiles == won["tiles"])
    return {
        "format": RECORD_FORMAT,
        "spec": layer.spec,
        "target": machine_name(target),
        "declaration": candidate.declaration,
        "tiles": won["tiles"],
        "run_us": won["run_us"],
        "samples": found["samples"],
        "finals": found["finals"],
        "provenance": {
            **{name: job.made[name] for name in _MADE_BY},
            **{name: machine[name] for name in ("device", "capability", "driver", "date")},
            "measured_with": {name: machine[name] for name in _MEASURED_BY},
            "seed": job.seed,
            "batch": ConvTranspose3d.parse(layer.spec).batch or 1,
        },
    }


def _require_of(layer: LayerJob, samples: Any, finals: Any) -> None:
    """Raise `ValueError` unless ``samples`` are one of each candidate, and ``finals`` those that follow from them."""
    for name, given in (("samples", samples), ("finals", finals)):
        if not isinstance(given, list):
            raise ValueError(f"its {name} are {given!r}, but must be a list")
        for number, sample in enumerate(given):
            if complaint := unsound(sample) or _strange(layer, sample):
                raise ValueError(f"{name}[{number}] {complaint}")
    measured, candidates = sorted(s["rank"] for s in samples), sorted(layer.choices)
    if not candidates or measured != candidates:
        raise ValueError(f"its samples have ranks {measured}, and the candidates of its job {candidates}")
    last, wanted = [None if "error" in s else s["rank"] for s in finals], finalists(samples)
    if last != wanted:
        raise ValueError(f"its finals have times for ranks {last}, but must have them for {wanted}")


def _strange(layer: LayerJob, sample: Sample) -> str | None:
    """Say what keeps a sound sample from being one of a candidate of ``layer``; None where nothing does."""
    rank = sample.get("rank")
    if type(rank) is not int or layer.choices.get(rank) != sample["tiles"]:
        return f"is of rank {rank!r} and tiles that its job does not have"
    if "error" not in sample and rank in layer.unbuilt:
        return f"has a time for rank {rank}, which its job could not build: {layer.unbuilt[rank]}"
    if "error" in sample and not sample.keys().isdisjoint({"run_us", "times_us"}):
        return "has both an error and a time"
    if "error" not in sample and not (isinstance(sample.get("device"), str) and sample["device"]):
        return f"has {sample.get('device')!r} for device, but must name the one that it was measured on"
    if "error" not in sample and sample["run_us"] != statistics.median(sample["times_us"]):
        return f"has run_us {sample['run_us']!r}, which is not the median of its times_us"
    return None


def _declaration(spec: ConvTranspose3d, record: Record) -> str:
    from opcompile.lower_gpu import declaration_hash
    from schedules.gpu_tiles import GpuTiles

    return declaration_hash(spec, GpuTiles(**record.tiles))
