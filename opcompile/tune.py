"""(spec, target, budget) -> record: measure schedules, keep the fastest, say how it was found.

TVM's MetaSchedule is the engine. A candidate comes out of one of its spaces (`schedules.llvm.space`: a `ScheduleFn`
that samples one decision, which tiles), TVM's process pool compiles it, and TVM's time evaluator
measures it, on this machine or on the servers of a TVM RPC tracker. What MetaSchedule could do as
well and is done here instead, and why:

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
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opcompile import interrupts
from opcompile._journal import Journal
from opcompile.arguments import checked_seed, require_progress, require_trials
from opcompile.errors import EngineError, RecordError, TargetError
from opcompile.farm import Farm
from opcompile.gpus import is_gpu
from opcompile.machine import processor
from opcompile.needed import packages_named
from opcompile.paths import checked_path
from opcompile.record import FOLDER_VARIABLE, Record, own_folder, write_record
from opcompile.spec import ConvTranspose3d, require_layer
from opcompile.target import Target, cores, host
from opcompile.target import target as named
from opcompile.trials import (
    FINAL_SAMPLES,
    MEASURE_S,
    SAMPLE_MS,
    SAMPLES,
    START_S,
    CandidateFailed,
    Progress,
    ProgressCallback,
    Sample,
    apart,
    finalists,
    last_line,
    nothing_measured,
    sample_of,
    walk,
    winner,
)
from schedules.counted import counted

if TYPE_CHECKING:
    from tvm.s_tir import Schedule

    from schedules.llvm import Tiles

# A compiling process is replaced after so many candidates: TVM keeps some memory of each.
_BUILDS_A_PROCESS = 32
# Seconds after which a candidate counts as failed in compiling.
BUILD_S = 120


@packages_named()
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
    longer than `BUILD_S` to compile or `MEASURE_S` to measure (starting up comes on top), is recorded
    as failed. The few best are then measured again in turns with the baseline, and their medians
    decide. A dynamic batch is measured with one element. A GPU of CUDA is tuned for by
    `opcompile.tune_gpu.tune_gpu`.

    ``tracker`` (``HOST:PORT``) and ``key`` measure on the servers which a TVM RPC tracker has for that
    key instead of here; those of a GPU are started by `opcompile.serve`. ``work_dir`` holds the
    journal: an interrupted run that is started again continues where it was, and a larger budget adds
    to it. By default it is a directory in the user's cache, one for everything that makes times
    comparable; for a GPU one that is removed at the end. The record goes to ``into``, by default
    `opcompile.record.own_folder`, where the plans ``best`` and ``tuned`` find it.

    Raises `CallError` (an argument of another type), `UnknownTargetError` (words that name no target or
    no tracker), `SpecError` (a budget below one), `EngineError` (a package of the extra ``tune`` is missing,
    or a C compiler), `TargetError` (this machine cannot run the target; the tracker does not answer or
    has no server; nothing could be measured) and `RecordError` (``work_dir`` holds measurements of
    something else or is in use; a directory cannot be written).
    """
    require_layer(spec)
    seed = checked_seed(seed)
    require_progress(progress)
    if is_gpu(target):
        from opcompile.tune_gpu import tune_gpu

        return tune_gpu(
            spec,
            target,
            trials,
            seed=seed,
            tracker=tracker,
            key=key,
            work_dir=work_dir,
            into=into,
            progress=progress,
        )
    machine = named(target)
    require_trials(trials)
    _require_extra(remote=tracker is not None)
    site = _site(machine, tracker, key)
    folder = _writable(checked_path(into, "into") if into is not None else own_folder())
    from opcompile.lower import declaration_hash
    from schedules import llvm

    choices = [estimate.tiles for estimate in llvm.candidates(spec, machine.machine)]
    header = _header(spec, machine, site, seed, choices)
    with _locked(
        checked_path(work_dir, "work_dir") if work_dir is not None else _default_work_dir(machine, header)
    ) as home:
        journal = Journal.open(
            home / "journal.jsonl", header, {rank: tiles.fields() for rank, tiles in enumerate(choices)}
        )
        report = partial(_report, progress, journal, min(trials, len(choices)))
        libraries = Path(tempfile.mkdtemp(dir=home, prefix=_BUILDS))
        with closing(_Bench(spec, machine, site, choices, libraries)) as bench:
            measured = {sample["rank"] for sample in journal.samples}
            todo = [rank for rank in walk(len(choices), seed)[:trials] if rank not in measured]
            for batch in _batches(todo, 8 * cores()):
                report("build")
                built = bench.build(batch)
                report("measure")
                for sample in bench.measure(built):
                    journal.add(sample)
                    report("measure")
            finals = _finals(bench, journal, report)
    won = winner(finals)
    record = Record(
        spec=str(spec),
        target=machine.name,
        declaration=declaration_hash(spec, llvm.Tiles(**won["tiles"])),
        tiles=won["tiles"],
        run_us=won["run_us"],
        samples=journal.samples,
        finals=finals,
        provenance=_provenance(spec, site, seed, finals),
    )
    written = write_record(record, folder, spec, machine)
    report("done")
    return replace(record, path=written)


# --- building and measuring ---


def _batches(ranks: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(ranks), size):
        yield ranks[start : start + size]


@dataclass(frozen=True, slots=True)
class _Site:
    """Where candidates are measured: on this machine, or on the servers of ``farm``."""

    farm: Farm | None
    threads: int

    @property
    def name(self) -> str:
        return f"RPC servers of key {self.farm.key}" if self.farm else _this_device()


def _site(machine: Target, tracker: str | None, key: str | None) -> _Site:
    threads = os.environ.get("TVM_NUM_THREADS", "1")
    if not threads.isdecimal() or int(threads) < 1:
        raise TargetError(f"TVM_NUM_THREADS is {threads!r}, but must be a number of threads; unset it for one")
    farm = Farm.named(tracker, key)
    if farm is None and not machine.native:
        raise TargetError(
            f"this machine cannot run code for {machine.name}, so it cannot measure it; "
            "give the tracker and the key of machines that can"
        )
    return _Site(farm, int(threads))


@dataclass(frozen=True, slots=True)
class _Built:
    """A candidate, and the library made of it or the error that kept it from being made."""

    rank: int
    library: str
    error: str


class _Bench:
    """Builds and measures candidates, which are ranks into ``choices``; libraries go to ``folder``."""

    def __init__(
        self, spec: ConvTranspose3d, machine: Target, site: _Site, choices: Sequence[Tiles], folder: Path
    ) -> None:
        self.spec, self.machine, self.site, self.choices, self.folder = spec, machine, site, choices, folder
        self._built: dict[int, _Built] = {}

    def build(self, ranks: Sequence[int]) -> list[_Built]:
        """Schedule the candidates and compile them, on every core in a process of its own; each one once."""
        from schedules import llvm

        modules: dict[int, Any] = {}
        for rank in (r for r in ranks if r not in self._built):
            try:
                modules[rank] = llvm.finish(self._schedule(rank).mod, self.spec, self.choices[rank])
            except Exception as error:  # noqa: BLE001 (an illegal move is this candidate's result)
                interrupts.require_none()
                self._built[rank] = _Built(rank, "", last_line(str(error)))
        compile_one = partial(_compile, self.machine.tvm(), str(self.folder), _linker(self.machine))
        compiling = {rank: self._pool.submit(compile_one, module) for rank, module in modules.items()}
        try:
            for rank, future in compiling.items():
                try:
                    self._built[rank] = _Built(rank, future.result(), "")
                except TimeoutError:
                    self._built[rank] = _Built(rank, "", f"compiling took longer than {BUILD_S} s")
                except Exception as error:  # noqa: BLE001 (whatever it is, it is this candidate's result)
                    interrupts.require_none()
                    self._built[rank] = _Built(rank, "", last_line(str(error)))
        finally:
            for future in compiling.values():
                future.cancel()
        return [self._built[rank] for rank in ranks]

    @cached_property
    def _pool(self) -> Any:
        """TVM's process pool. MetaSchedule's `LocalBuilder` starts another one for each batch."""
        from tvm.support.popen_pool import PopenPoolExecutor

        return PopenPoolExecutor(
            max_workers=cores(), timeout=BUILD_S, initializer=_importable(), maximum_process_uses=_BUILDS_A_PROCESS
        )

    def close(self) -> None:
        """End the pool's processes and remove the libraries."""
        with interrupts.finishing():
            if "_pool" in self.__dict__:
                self._pool.shutdown()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _schedule(self, rank: int) -> Schedule:
        """Let MetaSchedule make the candidate: one decision in the space of its declaration."""
        import tvm
        from tvm.s_tir.meta_schedule.space_generator import ScheduleFn

        from opcompile.lower import KERNEL, declared, grain
        from schedules import llvm

        tiles = self.choices[rank]
        alike = [t for t in self.choices if grain(self.spec, t) == grain(self.spec, tiles)]
        function = llvm.space(self.spec, alike, alike.index(tiles))
        generator = ScheduleFn(function, sch_rules=[], postprocs=[], mutator_probs={})
        (sch,) = generator.generate_design_space(tvm.IRModule({KERNEL: declared(self.spec, tiles)}))
        return sch

    def measure(self, built: Sequence[_Built]) -> Iterator[Sample]:
        """Yield each candidate's sample as soon as it is there: one at a time here, on all servers remotely."""
        for failed in (b for b in built if b.error):
            yield self.sample(failed.rank, error=failed.error)
        whole = [b for b in built if not b.error]
        if self.site.farm is None:
            yield from map(self._measure_one, whole)
        elif whole:
            yield from self.site.farm.each(self._measure_one, whole)

    def _measure_one(self, built: _Built) -> Sample:
        try:
            (times_us,), device = self.in_turns([built], SAMPLES)
        except CandidateFailed as failure:
            return self.sample(built.rank, error=str(failure))
        return self.sample(built.rank, times_us=times_us, device=device)

    def in_turns(self, built: Sequence[_Built], samples: int) -> tuple[list[list[float]], str]:
        """Measure candidates in turns in one process on one device; return their times in us and its name.

        Raises `CandidateFailed`, and `TargetError` when there is no server left to measure on.
        """
        job = {
            "libraries": [b.library for b in built],
            "arguments": [_arguments(self.spec, self.choices[b.rank]) for b in built],
            "samples": samples,
            "sample_ms": SAMPLE_MS,
            "threads": self.site.threads,
            "session_s": MEASURE_S * len(built),
            "limit_s": MEASURE_S * len(built) + START_S,
            "tracker": None,
        }
        farm = self.site.farm
        answer = _run(job) if farm is None else farm.answer(job, _run)
        if "failed" in answer:
            raise CandidateFailed(answer["error"])
        return answer["times_us"], _this_device() if farm is None else farm.tells(answer["device"])

    def sample(self, rank: int, **outcome: Any) -> Sample:
        return sample_of(self.choices[rank].fields(), rank, **outcome)


def _compile(target: dict[str, Any], folder: str, linker: list[str] | None, module: Any) -> str:
    """Compile in a process of the pool; return the path of a shared library, or of objects for the server to link."""
    from tvm.support.tar import tar

    from opcompile.compiled import compiled

    executable = compiled(module, target)
    own = Path(tempfile.mkdtemp(dir=folder))
    if linker is None:
        executable.export_library(str(own / "kernel.tar"), fcompile=tar)
        return str(own / "kernel.tar")
    executable.mod.write_to_file(str(own / "kernel.o"), "o")
    command = [*linker, "-shared", "-o", str(own / "kernel.so"), str(own / "kernel.o"), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the linker ended with status {done.returncode}: {done.stderr.strip()}")
    return str(own / "kernel.so")


def _linker(machine: Target) -> list[str] | None:
    """Return the command that links for ``machine``; None where only its own kind can. Raises `EngineError`."""
    from opcompile.link import linker_for

    foreign = (machine.architecture, machine.system) != host()
    return None if foreign and importlib.util.find_spec("ziglang") is None else linker_for(machine)


def _importable() -> Callable[[], None]:
    """Return the pool's initializer: a worker finds what this process finds, wherever it was started."""
    paths = list(sys.path)

    def initialise() -> None:
        import sys

        sys.path[:] = paths

    return initialise


def _arguments(spec: ConvTranspose3d, tiles: Tiles) -> list[list[Any]]:
    """Names, dtypes and shapes of what the kernel takes, a dynamic batch being one."""
    from opcompile.lower import packing

    one = spec.with_batch(spec.batch or 1)
    shapes: dict[str, Sequence[int | None]] = {"X": one.x_shape, "W": packing(spec, tiles).shape}
    if spec.bias:
        shapes["B"] = (spec.channels_out,)
    shapes["Y"] = one.y_shape
    return [[name, spec.dtype, list(shape)] for name, shape in shapes.items()]


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one job in a process of its own; see `opcompile._measure`. A process that ends badly failed."""
    blame = "connection" if job["tracker"] else "candidate"
    environment = {"TVM_NUM_THREADS": str(job["threads"]), "TVM_USE_RUNTIME_LIB": "1"}
    return apart(job, "opcompile._measure", blame, environment)


# --- who wins ---


def _finals(bench: _Bench, journal: Journal, report: Callable[[str], None]) -> list[Sample]:
    """Measure the few best again, in turns with the baseline; what the journal holds is not repeated."""
    if not finalists(journal.samples):
        raise TargetError(nothing_measured(journal.samples))

    def measured(ranks: list[int]) -> list[Sample]:
        built = bench.build(ranks)
        if failed := next((b for b in built if b.error), None):
            raise CandidateFailed(failed.error)
        times_us, device = bench.in_turns(built, FINAL_SAMPLES)
        return [bench.sample(rank, times_us=t, device=device) for rank, t in zip(ranks, times_us, strict=True)]

    return journal.decide(report, measured)


def _report(callback: ProgressCallback | None, journal: Journal, total: int, step: str) -> None:
    if callback is not None:
        callback(Progress.of(journal.samples, total, step))


# --- where from, and with what ---


def _header(spec: ConvTranspose3d, machine: Target, site: _Site, seed: int, choices: Sequence[Tiles]) -> dict[str, Any]:
    """All that must be the same for two times to be comparable, and for a rank to mean the same tiles."""
    from opcompile.lower import declaration_hash, hashed, scheduled

    listed = json.dumps([tiles.fields() for tiles in choices])
    return {
        "format": 1,
        "spec": str(spec),
        "target": machine.name,
        "declaration": declaration_hash(spec, choices[0]),
        "schedule": hashed(scheduled(spec, choices[0])),
        "space": hashlib.sha256(listed.encode()).hexdigest()[:16],
        "site": site.name,
        "threads": site.threads,
        "seed": seed,
        **versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions that candidates depend on."""
    import numpy as np
    import tvm

    import opcompile

    return {
        "opcompile": opcompile.__version__,
        "tvm": tvm.__version__,
        "tvm_ffi": version("apache-tvm-ffi"),
        "llvm": str(tvm.get_global_func("target.llvm_version_major")()),
        "numpy": np.__version__,
    }


def _provenance(spec: ConvTranspose3d, site: _Site, seed: int, finals: Sequence[Sample]) -> dict[str, Any]:
    return {
        **versions(),
        "device": finals[0]["device"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "threads": site.threads,
        "batch": spec.batch or 1,
        "sample_ms": SAMPLE_MS,
    }


def _this_device() -> str:
    """Name this machine: processor, instruction set, cores."""
    return f"{processor()}, {named('llvm').name.removeprefix('llvm:')}, {counted(cores(), 'core')}"


_EXTRA = ("psutil", "cloudpickle")


def _require_extra(*, remote: bool) -> None:
    for package in (*_EXTRA, "tornado") if remote else _EXTRA:
        if importlib.util.find_spec(package) is None:
            raise EngineError(f"tuning needs the package {package}, which is missing: pip install 'opcompile[tune]'")


_BUILDS = "opcompile-build-"


_ELSEWHERE = f"set {FOLDER_VARIABLE} to another directory, or XDG_DATA_HOME; in Python give another into"
_OTHER_WORK = "give another directory by --work-dir, or set XDG_CACHE_HOME to one; in Python give another work_dir"


def _writable(folder: Path) -> Path:
    """Make ``folder``, so that a long run does not end without a place for its record. Raises `RecordError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(
            f"the directory of records {folder} cannot be made: {error.strerror}; {_ELSEWHERE}"
        ) from error
    if not os.access(folder, os.W_OK):
        raise RecordError(f"the directory of records {folder} cannot be written; {_ELSEWHERE}")
    return folder


def _default_work_dir(machine: Target, header: dict[str, Any]) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache) / "opcompile" / "tuning" / machine.name.replace(":", "-") / name


@contextmanager
def _locked(home: Path) -> Iterator[Path]:
    """Make ``home`` and hold it against other runs; the lock goes with the process, whatever ends it."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / "lock").open("w")
    except OSError as error:
        raise RecordError(f"the directory of work {home} cannot be written: {error.strerror}; {_OTHER_WORK}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RecordError(
                f"the directory of work {home} is in use by another run; wait for it, or {_OTHER_WORK}"
            ) from error
        for left_over in home.glob(f"{_BUILDS}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        yield home
