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
from opcompile.gpus import gpu_target
from opcompile.job import Candidate, Job, LayerJob
from opcompile.record import write_atomically
from opcompile.runtime import parse_manifest, read_manifest
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
    finalists,
    sample_of,
)

FORMAT = 1


def measure(directory: str | Path, output: str | Path, *, progress: ProgressCallback | None = None) -> dict[str, Any]:
    """Measure every candidate of the job in ``directory`` on GPU 0 and write what was found to ``output``.

    Each candidate runs in a process of its own, which first holds its answer against the golden vector: one that is
    wrong, crashes or takes longer than `opcompile.trials.MEASURE_S` is recorded as failed, with its reason, and has no
    time. The fastest few are then measured in turns with the baseline. Each measurement is on the disk before the
    next one starts, so that an interrupted run continues; ``directory`` must be writable. Returns what it wrote: the
    job, the ``machine``, and of each layer its ``samples`` and ``finals``.

    Raises `ArtifactError` for a directory that is no job, `TargetError` where there is no GPU, one that cannot run the
    candidates, or what every candidate needs is missing (memory, a file as it was, `apache-tvm-ffi`, for bfloat16
    ml_dtypes), `RecordError` where nothing can be written.
    """
    home = Path(directory).absolute()
    job = Job.read(home)
    gpu = device()
    require_runs_on(gpu_target(job.target).archs, gpu, f"each candidate in {home}")
    for layer in job.layers:
        _require_unchanged(home, layer)
    machine = _machine(gpu)
    try:
        layers = [_Site(home, job, layer, machine, progress).measured() for layer in job.layers]
    except OSError as error:
        raise RecordError(f"{home} cannot be written: {error.strerror}; give a copy that can") from error
    stamp = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    found = {"format": FORMAT, "job": job.to_json(), "machine": {**machine, **stamp}, "layers": layers}
    write_atomically(Path(output).absolute(), json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def _require_unchanged(home: Path, layer: LayerJob) -> None:
    for candidate in (c for c in layer.candidates if not c.error):
        place = _place(home, layer, candidate)
        if parse_manifest(read_manifest(place), place)["sha256"] != candidate.sha256:
            raise ArtifactError(f"{place} is not the candidate that {home} lists; emit it again")


def _place(home: Path, layer: LayerJob, candidate: Candidate) -> Path:
    return home / layer.directory / str(candidate.rank)


def _machine(gpu: Device) -> dict[str, str]:
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
class _Site:
    """One layer on this machine."""

    home: Path
    job: Job
    layer: LayerJob
    machine: dict[str, str]
    progress: ProgressCallback | None

    def measured(self) -> dict[str, Any]:
        """Measure what the journal does not hold."""
        header = {"format": FORMAT, "job": self.job.digest, **self.machine}
        name = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
        journal = Journal.open(self.home / self.layer.directory / f"{name}.jsonl", header, self.layer.choices)
        report = partial(self._report, journal)
        known = {sample["rank"] for sample in journal.samples}
        for candidate in (c for c in self.layer.candidates if c.rank not in known):
            report("measure")
            journal.add(self._sample(candidate))
        finals = self._finals(journal, report)
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
        return sample_of(candidate.tiles, candidate.rank, times_us=times_us, device=self.machine["device"])

    def _finals(self, journal: Journal, report: Any) -> list[Sample]:
        """Measure the fastest few in turns with the baseline; none where nothing could be measured."""
        ranks = finalists(journal.samples)
        if [s["rank"] for s in journal.finals] == ranks:
            return journal.finals
        report("finals")
        by_rank = {c.rank: c for c in self.layer.candidates}
        candidates = [by_rank[rank] for rank in ranks]
        try:
            times = self._times_us(candidates, FINAL_SAMPLES)
        except CandidateFailed as failure:
            raise TargetError(
                f"the finals failed: {failure}; start again to repeat them, the other measurements are kept"
            ) from failure
        finals = [
            sample_of(c.tiles, c.rank, times_us=t, device=self.machine["device"])
            for c, t in zip(candidates, times, strict=True)
        ]
        journal.add_finals(finals)
        return finals

    def _times_us(self, candidates: Sequence[Candidate], samples: int) -> list[list[float]]:
        """Measure candidates in turns in one process. Raises `CandidateFailed`, `TargetError` for the machine."""
        job = {
            "directories": [str(_place(self.home, self.layer, c)) for c in candidates],
            "samples": samples,
            "limit_s": MEASURE_S * len(candidates) + START_S,
        }
        answer = apart(job, "opcompile._measure_gpu", "candidate", {})
        if answer.get("failed") == "machine":
            raise TargetError(f"nothing can be measured here: {answer['error']}")
        if "failed" in answer:
            raise CandidateFailed(answer["error"])
        times: list[list[float]] = answer["times_us"]
        return times


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
