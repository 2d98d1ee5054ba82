"""Time emitted candidates on this machine's GPU: NumPy, `apache-tvm-ffi` and the driver, no compiler.

``python -m opcompile.measure DIR -o results.json`` does it where nothing else is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import opcompile
from opcompile._journal import Journal
from opcompile.cuda_driver import Device, device, require_runs_on
from opcompile.errors import ArtifactError, OpcompileError, RecordError, TargetError
from opcompile.farm import Farm
from opcompile.gpus import gpu_target
from opcompile.job import JOB, Candidate, Job, LayerJob
from opcompile.manifest import parse_manifest, read_manifest
from opcompile.paths import require_unread
from opcompile.record import write_atomically
from opcompile.trials import (
    FINAL_SAMPLES,
    MEASURE_S,
    SAMPLES,
    START_S,
    CandidateFailed,
    Progress,
    ProgressCallback,
    Sample,
    apart,
    sample_of,
)

FORMAT = 1
# TVM without its compiler: quicker to load.
_RUNTIME = {"TVM_USE_RUNTIME_LIB": "1"}


def measure(
    directory: str | Path,
    output: str | Path,
    *,
    on: Machine | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Measure every candidate of the job in ``directory`` on GPU 0 and write what was found to ``output``.

    ``on`` may be `Machine.of` a farm: then it is the GPUs of its servers, one candidate each.

    Each candidate runs in a process of its own, which first holds its answer against the golden vector: one that is
    wrong, crashes or takes longer than `opcompile.trials.MEASURE_S` is recorded as failed, with its reason, and has no
    time. The fastest few are then measured in turns with the baseline. Each measurement is on the disk before the
    next one starts, so that an interrupted run continues; ``directory`` must be writable. Returns what it wrote: the
    job, the ``machine``, and of each layer its ``samples`` and ``finals``.

    Raises `ArtifactError` for a directory that is no job, `TargetError` where there is no GPU (or no server), one that
    cannot run the candidates, or what every candidate needs is missing (memory, a file as it was, `apache-tvm-ffi`, for
    bfloat16 ml_dtypes), `RecordError` where nothing can be written,
    `CallError` where ``output`` is the job's own list.
    """
    home = Path(directory).absolute()
    job = Job.read(home)
    require_unread(Path(output), [home / JOB])
    machine = on or Machine.of(None)
    require_runs_on(gpu_target(job.target).archs, machine.device, f"each candidate in {home}")
    for layer in job.layers:
        _require_unchanged(home, layer)
    try:
        layers = [_Site(home, job, layer, machine, progress).measured() for layer in job.layers]
    except OSError as error:
        raise RecordError(f"{home} cannot be written: {error.strerror}; give a copy that can") from error
    stamp = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    found = {"format": FORMAT, "job": job.to_json(), "machine": {**machine.words, **stamp}, "layers": layers}
    write_atomically(Path(output).absolute(), json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def _require_unchanged(home: Path, layer: LayerJob) -> None:
    for candidate in (c for c in layer.candidates if not c.error):
        place = _place(home, layer, candidate)
        if parse_manifest(read_manifest(place), place)["sha256"] != candidate.sha256:
            raise ArtifactError(f"{place} is not the candidate that {home} lists; emit it again")


def _place(home: Path, layer: LayerJob, candidate: Candidate) -> Path:
    return home / layer.directory / str(candidate.rank)


def machine_words(gpu: Device) -> dict[str, str]:
    """All that must be the same for two times to be comparable."""
    return {
        "device": gpu.name,
        "capability": gpu.compute,
        "driver": gpu.driver,
        "opcompile": opcompile.__version__,
        "python": platform.python_version(),
        **{name.replace("-", "_"): metadata.version(name) for name in ("apache-tvm-ffi", "numpy")},
    }


@dataclass(frozen=True, slots=True)
class Machine:
    """Where candidates are measured: on this machine, or on the servers of ``farm``; ``words`` say what it is."""

    device: Device
    words: dict[str, str]
    farm: Farm | None

    @classmethod
    def of(cls, farm: Farm | None) -> Machine:
        """Ask the driver here, or a server. Raises `TargetError` where there is no GPU, or another version."""
        if farm is None:
            return cls(device(), machine_words(device()), None)
        try:
            found = _far(farm, [], 0, 0)
        except CandidateFailed as failure:
            raise TargetError(f"a server for key {farm.key!r} cannot say what it is: {failure}") from failure
        if (there := found["machine"]["opcompile"]) != opcompile.__version__:
            raise TargetError(
                f"a server for key {farm.key!r} runs opcompile {there}, and this is {opcompile.__version__}; "
                "install the same there"
            )
        gpu = found["device"]
        return cls(Device(**{**gpu, "capability": tuple(gpu["capability"])}), found["machine"], farm)

    def times_us(self, directories: Sequence[str], samples: int) -> list[list[float]]:
        """Measure candidates in turns in one process. Raises `CandidateFailed`, `TargetError` for the machine."""
        limit_s = MEASURE_S * len(directories) + START_S
        if self.farm is None:
            job = {"directories": directories, "samples": samples, "limit_s": limit_s}
            answer = apart(job, "opcompile._measure_gpu", "candidate", {})
            if answer.get("failed") == "machine":
                raise TargetError(f"nothing can be measured here: {answer['error']}")
        else:
            answer = _far(self.farm, directories, samples, limit_s)
            self._require_alike(self.farm, answer)
        if "failed" in answer:
            raise CandidateFailed(answer["error"])
        times: list[list[float]] = answer["times_us"]
        return times

    def _require_alike(self, farm: Farm, answer: dict[str, Any]) -> None:
        for name, value in answer.get("machine", {}).items():
            if value != (known := self.words.get(name)):
                raise TargetError(
                    f"the servers for key {farm.key!r} differ in {name}, {known!r} and {value!r}, so that their times "
                    "cannot be compared; give each kind of machine a key of its own"
                )


def _far(farm: Farm, directories: Sequence[str], samples: int, limit_s: int) -> dict[str, Any]:
    """Let a server measure candidates, or only say what it is. Raises `CandidateFailed`, `TargetError`."""
    job = {
        "directories": directories,
        "samples": samples,
        "measure_s": limit_s,
        # the files have to get there, and are packed here
        "session_s": limit_s + START_S,
        "limit_s": limit_s + 2 * START_S,
    }
    answer = farm.answer(job, lambda job: apart(job, "opcompile._measure_far", "connection", _RUNTIME))
    if answer.get("failed") == "machine":
        raise TargetError(f"a server for key {farm.key!r} cannot measure: {answer['error']}")
    if "machine" in answer:
        answer["machine"]["device"] = farm.tells(answer["machine"]["device"])
    return answer


@dataclass(frozen=True, slots=True)
class _Site:
    """One layer on this machine."""

    home: Path
    job: Job
    layer: LayerJob
    machine: Machine
    progress: ProgressCallback | None

    def measured(self) -> dict[str, Any]:
        """Measure what the journal does not hold."""
        header = {"format": FORMAT, "job": self.job.digest, **self.machine.words}
        name = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
        journal = Journal.open(self.home / self.layer.directory / f"{name}.jsonl", header, self.layer.choices)
        report = partial(self._report, journal)
        known = {sample["rank"] for sample in journal.samples}
        todo, farm = [c for c in self.layer.candidates if c.rank not in known], self.machine.farm
        if todo:
            report("measure")
        for number, sample in enumerate(map(self._sample, todo) if farm is None else farm.each(self._sample, todo), 1):
            journal.add(sample)
            if number < len(todo):
                report("measure")
        finals = journal.decide(report, self._finals)
        report("done")
        return {"spec": self.layer.spec, "samples": journal.samples, "finals": finals}

    def _report(self, journal: Journal, step: str) -> None:
        if self.progress:
            self.progress(Progress.of(journal.samples, len(self.layer.candidates), step))

    def _sample(self, candidate: Candidate) -> Sample:
        if candidate.error:
            return sample_of(candidate.tiles, candidate.rank, error=candidate.error)
        try:
            (times_us,) = self._times_us([candidate], SAMPLES)
        except CandidateFailed as failure:
            return sample_of(candidate.tiles, candidate.rank, error=str(failure))
        return sample_of(candidate.tiles, candidate.rank, times_us=times_us, device=self.machine.words["device"])

    def _finals(self, ranks: Sequence[int]) -> list[Sample]:
        """Measure the fastest few in turns with the baseline."""
        by_rank = {c.rank: c for c in self.layer.candidates}
        candidates = [by_rank[rank] for rank in ranks]
        return [
            sample_of(c.tiles, c.rank, times_us=t, device=self.machine.words["device"])
            for c, t in zip(candidates, self._times_us(candidates, FINAL_SAMPLES), strict=True)
        ]

    def _times_us(self, candidates: Sequence[Candidate], samples: int) -> list[list[float]]:
        return self.machine.times_us([str(_place(self.home, self.layer, c)) for c in candidates], samples)


def main() -> int:
    """Run as a program; the exit codes are those of `opcompile`."""
    parser = argparse.ArgumentParser(prog="python -m opcompile.measure", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", metavar="DIR", help="Directory that `opcompile tune --emit` wrote.")
    parser.add_argument("-o", "--output", required=True, metavar="results.json", help="File to write.")
    given = parser.parse_args()

    def show(p: Progress) -> None:
        print(f"{p.done}/{p.total} {p.failures} failed, best {p.best_us} us, {p.step}", file=sys.stderr)

    try:
        measure(given.directory, given.output, progress=show)
    except OpcompileError as error:
        print(f"opcompile: {error}", file=sys.stderr)
        return error.exit_code
    print(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
