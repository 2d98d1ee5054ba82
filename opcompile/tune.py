"""(spec, target, budget) -> record: measure schedules, keep the fastest, say how it was found.

TVM's MetaSchedule is the engine. A candidate comes out of one of its spaces (`space`: a `ScheduleFn`
that samples one decision, which tiles), its `LocalBuilder` compiles it in a process of its own, TVM's
time evaluator measures it, on this machine or on the servers of a TVM RPC tracker. What is done here
instead of there, and why:

* *The order.* The space of one layer is a few hundred tiles, enumerated, and each is another
  declaration (`opcompile.lower.grain`). So they are walked without repetition (`walk`), where
  MetaSchedule's strategies draw with repetition, or mutate a trace whose moves depend on the decision.
* *The measuring process.* `LocalRunner` measures the next candidate in the process of the last one,
  and `RPCRunner` waits for a server without limit; neither can take turns between candidates, which
  is the only fair comparison on a machine that others use. Here a process measures one candidate, or
  the finalists in turns, and is killed at its time limit.
* *The journal.* Each measurement is on the disk before the next one starts, failures and their errors
  included; MetaSchedule's database keeps no errors, and a killed process can leave it unreadable.

No `TuneContext` is made: a `ScheduleFn` does without, and making one imports every tensor intrinsic
of every target, which takes 15 to 25 s and serves none of the schedules here.

Nothing heavy is imported with this module.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from opcompile.errors import EngineError, RecordError, SpecError, TargetError
from opcompile.record import Record, own_folder, write_atomically, write_record
from opcompile.spec import ConvTranspose3d
from opcompile.target import Target, cores
from opcompile.target import target as named

if TYPE_CHECKING:
    from schedules.llvm import Estimate, Tiles

# A candidate that takes longer to compile, or to measure, counts as failed. Seconds.
BUILD_S = 120
MEASURE_S = 120
# Starting Python and TVM comes on top of a measurement.
_START_S = 30
# A sample is the mean over as many calls as fill this time, so that the clock's grain is nothing.
_SAMPLE_MS = 20
_SAMPLES = 8
# The finals: this many candidates and the baseline, each measured this many times, in turns.
_FINALISTS = 3
_FINAL_SAMPLES = 16
# Medians this close are a tie, which the better rank wins.
_TIE = 0.01
# A measurement whose connection broke is tried on up to this many servers.
_ATTEMPTS = 3
# How long a tracker may take to answer; how long to wait for one of its servers to become free. Seconds.
_ANSWER_S = 10
_FREE_S = 600
# How long one request may stand in the tracker's queue before it is asked whether any server is left.
_QUEUE_S = 20

_JOURNAL = "journal.jsonl"
_JOURNAL_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far tuning is: ``done`` of ``total`` candidates, ``failures`` of them without a time.

    ``best_us`` is the best median so far in microseconds, None before there is one. ``step`` says
    what is going on: ``build``, ``measure`` or ``finals``.
    """

    done: int
    total: int
    failures: int
    best_us: float | None
    step: str


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class _Site:
    """Where candidates are measured: on this machine, or on the servers that ``tracker`` has for ``key``."""

    tracker: tuple[str, int] | None
    key: str | None
    threads: int

    @property
    def name(self) -> str:
        return f"RPC servers of key {self.key}" if self.tracker else _this_device()


@dataclass(frozen=True, slots=True)
class _Built:
    """A candidate and the library made of it, or the error that kept it from being made."""

    estimate: Estimate
    rank: int
    library: str | None
    error: str | None = None


def tune(
    spec: ConvTranspose3d,
    target: str = "llvm",
    trials: int = 64,
    *,
    seed: int = 0,
    tracker: str | None = None,
    key: str | None = None,
    work_dir: str | Path | None = None,
    into: str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> Record:
    """Measure ``trials`` schedules of ``spec`` on ``target`` and write down the fastest.

    The baseline is always among them; there are fewer when the space is smaller. Which ones, and in
    which order, depends on ``spec``, ``target`` and ``seed`` alone. Each is measured with one thread
    (``TVM_NUM_THREADS`` sets another number) in a process of its own; one that crashes, or takes
    longer than `BUILD_S` to compile or `MEASURE_S` to measure, is recorded as failed. The few best
    are then measured again in turns with the baseline, and the median decides.

    ``tracker`` (``HOST:PORT``) and ``key`` measure on the servers which a TVM RPC tracker has for that
    key instead of here. ``work_dir`` holds the journal: an interrupted run that is started again
    continues where it was, and a larger budget adds to it. By default it is a directory in the user's
    cache, one for everything that makes times comparable. The record goes to ``into``, by default
    `opcompile.record.own_folder`, where ``plan="best"`` finds it.

    Raises `EngineError` (a package of the extra ``tune`` is missing), `TargetError` (this machine
    cannot run the target, the tracker does not answer, has no server, or nothing could be measured),
    `RecordError` (``work_dir`` holds measurements of something else, or is in use).
    """
    machine = named(target)
    if type(trials) is not int or trials < 1:
        raise SpecError(f"trials is {trials!r}, but must be a whole number of at least 1: candidates to measure")
    site = _site(machine, tracker, key)
    folder = Path(into) if into is not None else own_folder()
    from opcompile.lower import declaration_hash
    from schedules import llvm

    estimates = llvm.candidates(spec, machine.machine)
    header = _header(spec, machine, site, seed, estimates[0].tiles)
    home = Path(work_dir) if work_dir is not None else _default_work_dir(machine, header)
    with _locked(home), tempfile.TemporaryDirectory(dir=home, prefix="build-") as builds:
        journal = _Journal.open(home / _JOURNAL, header)
        report = partial(_report, progress, journal, min(trials, len(estimates)))
        bench = _Bench(spec, machine, site, estimates, Path(builds))
        chosen = [rank for rank in walk(len(estimates), seed)][:trials]
        todo = [rank for rank in chosen if estimates[rank].tiles not in journal.measured()]
        report("build")
        for sample in bench.measure(todo, report):
            journal.add(sample)
            report("measure")
        finals = _finals(bench, journal, report)
    winner = _winner(finals)
    record = Record(
        spec=str(spec),
        target=machine.name,
        declaration=declaration_hash(spec, llvm.Tiles(**winner["tiles"])),
        tiles=winner["tiles"],
        run_us=winner["run_us"],
        samples=journal.samples,
        finals=finals,
        provenance=_provenance(site, seed, finals),
    )
    return replace(record, path=write_record(record, folder, spec, machine))
