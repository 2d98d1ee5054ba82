"""Which candidates are measured, in which order, each in a process of its own, and which one wins.

What tuning for CPUs and for GPUs share. It needs neither TVM nor NumPy.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Seconds after which a candidate counts as failed in being measured.
MEASURE_S = 120
# Starting Python, loading libraries and filling tensors comes on top of a measurement.
START_S = 60
# A sample is the mean over as many calls as fill this time, so that the clock's grain is nothing.
SAMPLE_MS = 20
SAMPLES = 8
# The finals: this many candidates and the baseline, each measured this many times, in turns.
FINALISTS = 3
FINAL_SAMPLES = 16
# Medians this close are a tie, which the better rank wins.
_TIE = 0.01

Sample = dict[str, Any]


class CandidateFailed(Exception):
    """Why a candidate has no time."""


def sample_of(tiles: Mapping[str, Any], rank: int, **outcome: Any) -> Sample:
    """Write down what became of a candidate: ``times_us`` and ``device``, or an ``error``."""
    if "times_us" in outcome:
        outcome["run_us"] = statistics.median(outcome["times_us"])
    return {"tiles": dict(tiles), "rank": rank, **outcome}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far tuning is: ``done`` of ``total`` candidates, ``failures`` of them without a time.

    ``best_us`` is the best median so far in microseconds, None before there is one. ``step`` is what
    comes next: ``build``, ``measure``, ``finals`` or ``done``.
    """

    done: int
    total: int
    failures: int
    best_us: float | None
    step: str

    @classmethod
    def of(cls, samples: Sequence[Sample], total: int, step: str) -> Progress:
        """Count ``samples``, of which there will be ``total`` or more."""
        times = [s["run_us"] for s in samples if "run_us" in s]
        done = len(samples)
        return cls(done, max(done, total), done - len(times), min(times, default=None), step)


ProgressCallback = Callable[[Progress], None]


def walk(count: int, seed: int) -> list[int]:
    """Return the order in which ``count`` ranked candidates are measured, each exactly once.

    In turns the next best by arithmetic and the next of a seeded shuffle: arithmetic is mostly right,
    and where it is wrong it is wrong for a whole family. The baseline, rank 0, comes first. The order
    does not depend on the budget, so that a larger one continues a smaller one.
    """
    shuffled = random.Random(seed).sample(range(count), count)  # noqa: S311 (an order, not a secret)
    in_turns = [rank for pair in zip(range(count), shuffled, strict=True) for rank in pair]
    return list(dict.fromkeys(in_turns))


def finalists(samples: Sequence[Sample]) -> list[int]:
    """Return the ranks of the fastest few, and the baseline's where it has a time; none where nothing has one."""
    timed = sorted((s for s in samples if "run_us" in s), key=lambda s: (s["run_us"], s["rank"]))
    ranks = [s["rank"] for s in timed[:FINALISTS]]
    return ranks if 0 in ranks or not any(s["rank"] == 0 for s in timed) else [*ranks, 0]


def nothing_measured(samples: Sequence[Sample]) -> str:
    """Say that no candidate has a time, and why the first one has none."""
    return f"none of the {len(samples)} candidates could be measured; the first one: {samples[0]['error']}"


def winner(finals: Sequence[Sample]) -> Sample:
    """Return the best-ranked one among the fastest and those that tie with it."""
    fastest: float = min(s["run_us"] for s in finals)
    return min((s for s in finals if s["run_us"] <= fastest * (1 + _TIE)), key=lambda s: int(s["rank"]))


# --- a process of its own ---


def apart(job: Mapping[str, Any], module: str, blame: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Let ``module``'s ``main`` answer ``job`` in a process of its own, within ``job["limit_s"]`` seconds.

    A process that ends badly is a failed answer as well, which ``blame`` caused.
    """
    paths = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    # tvm_ffi imports PyTorch wherever it is installed: seconds for each candidate, and none takes its tensors
    start = f"import sys; sys.modules['torch'] = None; from {module} import main; main()"
    command = [sys.executable, "-c", start]
    limit_s = job["limit_s"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(job),
            env={**os.environ, "PYTHONPATH": paths, **environment},
            timeout=limit_s,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": blame, "error": f"the measurement took longer than {limit_s} s and was stopped"}
    if done.returncode:
        how = f"signal {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"status {done.returncode}"
        return {"failed": blame, "error": f"the measuring process ended with {how}. {last_line(done.stderr)}".strip()}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def answer(measured: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Be that process: answer the job on standard input by ``measured``, and end at its time limit in any case."""
    # what a runtime or a candidate prints must not get into the answer
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    signal.alarm(job["limit_s"])
    with stream:
        json.dump(measured(job), stream)


def failed(blame: str, error: BaseException) -> dict[str, Any]:
    """Answer that it failed, and who is to ``blame``."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return {"failed": blame, "error": f"{type(error).__name__}: {' '.join(lines)[:300]}"}


def last_line(text: str) -> str:
    """Return the line of a traceback that says what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
