"""Tuning measures what it should, once, survives whatever ends it, and decides by its measurements alone."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from opcompile import interrupts
from opcompile.errors import EngineError, RecordError, SpecError, TargetError
from opcompile.lower import KERNEL, choose, declaration_hash, declared, grain, scheduled
from opcompile.record import PROVENANCE, Record, find_record
from opcompile.spec import ConvTranspose3d
from opcompile.target import target
from opcompile.trials import Progress, apart, walk
from opcompile.tune import tune
from schedules import llvm
from schedules.llvm import space

# the package's attribute of this name is the function
tuning = importlib.import_module("opcompile.tune")

SPEC = ConvTranspose3d.parse("in=Nx2x2x3x4 co=3 k=1 dtype=bfloat16")
HERE = target("llvm")
RANKED = [e.tiles for e in llvm.candidates(SPEC, HERE.machine)]
TRIALS = 3


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records and caches of these tests, none of the user's."""
    monkeypatch.setenv("OPCOMPILE_RECORDS", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    return tmp_path / "own"


# --- for real: killed after two candidates, and started again ---

KILLED = """
import os, signal, sys
import opcompile
from opcompile import ConvTranspose3d, tune
assert "tvm" not in sys.modules, "importing the package imports the compiler"

def end(progress):
    assert "tvm.s_tir.tensor_intrin" not in sys.modules, "the slow import"
    if progress.done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

tune(ConvTranspose3d.parse(sys.argv[1]), trials=int(sys.argv[2]), work_dir=sys.argv[3], progress=end)
"""


@pytest.mark.heavy
def test_a_killed_run_continues_where_it_was(tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opcompile.trials.FINALISTS", 1)
    work_dir = tmp_path / "work"
    paths = os.pathsep.join([str(Path(tuning.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", KILLED, str(SPEC), str(TRIALS), str(work_dir)]
    killed = subprocess.run(
        command, check=False, env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    journal = work_dir / "journal.jsonl"
    kept = journal.read_bytes()
    assert kept.count(b"\n") == 3  # the header and two candidates
    assert list(work_dir.glob("opcompile-build-*"))  # it had no time to tidy up
    journal.write_bytes(kept + b'{"sample": {"til')  # nor to finish a third line

    jobs: list[dict[str, Any]] = []
    run = tuning._run
    monkeypatch.setattr(tuning, "_run", lambda job: jobs.append(job) or run(job))
    steps: list[Progress] = []
    made = tune(SPEC, trials=TRIALS, work_dir=work_dir, progress=steps.append)
    assert len(jobs[0]["libraries"]) == 1  # one candidate was left, and the finals
    assert len(jobs) == 2
    assert journal.read_bytes().startswith(kept)
    assert not list(work_dir.glob("opcompile-build-*"))

    # every promised candidate, once, measured, with all its samples
    assert [s["rank"] for s in made.samples] == walk(len(RANKED), 0)[:TRIALS]
    assert [s["tiles"] for s in made.samples] == [RANKED[s["rank"]].fields() for s in made.samples]
    assert all(len(s["times_us"]) == 8 and min(s["times_us"]) <= s["run_us"] for s in made.samples)
    assert steps[0] == Progress(2, TRIALS, 0, min(s["run_us"] for s in made.samples[:2]), "build")
    assert [(p.done, p.step) for p in steps[-2:]] == [(TRIALS, "finals"), (TRIALS, "done")]

    # the finals hold the baseline and decide
    assert 0 in [s["rank"] for s in made.finals]
    assert all(len(s["times_us"]) == 16 for s in made.finals)
    assert made.tiles in [s["tiles"] for s in made.finals]
    assert made.declaration == declaration_hash(SPEC, llvm.Tiles(**made.tiles))
    assert PROVENANCE.keys() <= made.provenance.keys()
    assert made.provenance["threads"] == 1
    assert all(s["device"] == made.provenance["device"] for s in (*made.samples, *made.finals))
    assert find_record(SPEC, HERE) == made
    assert choose(SPEC, HERE, "best")[1].record == made.key

    # and once more: nothing is left to measure
    monkeypatch.setattr(tuning, "_run", None)
    again = tune(SPEC, trials=TRIALS, work_dir=work_dir)
    assert (again.tiles, again.samples, again.finals) == (made.tiles, made.samples, made.finals)


# --- the order and the space ---


def test_the_walk_visits_each_candidate_once_and_the_baseline_first() -> None:
    for count in (1, 2, 7, 100):
        for seed in (0, 1):
            assert sorted(walk(count, seed)) == list(range(count))
            assert walk(count, seed)[0] == 0
    assert walk(100, 0) == walk(100, 0) != walk(100, 1)
    assert sum(rank in walk(100, 0)[:20] for rank in range(10)) == 10  # half of it is the best by arithmetic
    assert any(rank > 50 for rank in walk(100, 0)[:20])  # and half of it is not


def test_the_baseline_is_rank_0() -> None:
    assert llvm.baseline(SPEC, HERE.machine).tiles == RANKED[0]


def test_a_candidate_of_the_space_is_what_lower_makes_of_its_tiles() -> None:
    import tvm
    import tvm_ffi
    from tvm.s_tir.meta_schedule.space_generator import ScheduleFn

    def made(decision: int | None) -> Any:
        generator = ScheduleFn(space(SPEC, alike, decision), sch_rules=[], postprocs=[], mutator_probs={})
        (sch,) = generator.generate_design_space(tvm.IRModule({KERNEL: declared(SPEC, alike[0])}))
        return sch

    def decided(sch: Any) -> llvm.Tiles:
        (decision,) = sch.trace.decisions.values()
        return alike[int(decision)]

    grains = [grain(SPEC, t) for t in RANKED]
    most = max(grains, key=grains.count)
    alike = [t for t, of_t in zip(RANKED, grains, strict=True) if of_t == most]
    assert len(alike) > 1
    for number, tiles in enumerate(alike[:2]):
        sch = made(number)
        assert decided(sch) == tiles
        assert tvm_ffi.structural_equal(llvm.finish(sch.mod, SPEC, tiles), scheduled(SPEC, tiles))
    assert decided(made(None)) in alike  # MetaSchedule may sample as well
    assert not tvm_ffi.structural_equal(scheduled(SPEC, alike[0]), scheduled(SPEC, alike[1]))


# --- decisions, on times that are made up ---

Times = Callable[[int, int], Any]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[Times], list[list[int]]]:
    """Replace building and measuring: ``times(rank, samples)`` gives the samples in us, or raises the failure."""

    def fake(times: Times) -> list[list[int]]:
        jobs: list[list[int]] = []

        def build(_: object, ranks: list[int]) -> list[Any]:
            return [tuning._Built(rank, str(rank), "") for rank in ranks]

        def run(job: dict[str, Any]) -> dict[str, Any]:
            ranks = [int(library) for library in job["libraries"]]
            jobs.append(ranks)
            try:
                return {"times_us": [times(rank, job["samples"]) for rank in ranks], "device": None}
            except RuntimeError as error:
                return {"failed": "candidate", "error": str(error)}

        monkeypatch.setattr(tuning._Bench, "build", build)
        monkeypatch.setattr(tuning, "_run", run)
        return jobs

    return fake


def test_the_finals_decide_and_not_the_first_measurement(bench: Callable[[Times], list[list[int]]]) -> None:
    first = {0: 9.0, 1: 8.0, 2: 1.0, 3: 7.0}

    def times(rank: int, samples: int) -> list[float]:
        if samples == tuning.SAMPLES:
            return [first.get(rank, 50.0)] * samples
        return [{2: 6.0, 1: 5.0}.get(rank, 10.0)] * samples

    jobs = bench(times)
    made = tune(SPEC, trials=8)
    assert jobs[-1] == [2, 3, 1, 0]  # the three best and the baseline, in one process
    assert made.tiles == RANKED[1].fields()
    assert made.run_us == 5.0
    assert made.baseline_us == 10.0
    assert made.why()[:2] == (
        "the fastest of 8 measured candidates: 5.0 us, median",
        "the baseline, measured in turns with it: 10.0 us",
    )


def test_the_median_decides_and_ties_go_to_the_better_rank(bench: Callable[[Times], list[list[int]]]) -> None:
    # one slow sample, as on a busy machine, changes nothing; 1 % is a tie
    bench(lambda rank, n: [{0: 10.05, 1: 10.0}.get(rank, 11.0)] * (n - 1) + [1e6 if rank == 1 else 1.0])
    assert tune(SPEC, trials=4).tiles == RANKED[0].fields()
    bench(lambda rank, n: [{0: 10.2, 1: 10.0}.get(rank, 11.0)] * (n - 1) + [1e6 if rank == 1 else 1.0])
    assert tune(SPEC, trials=4, seed=1).tiles == RANKED[1].fields()


def test_a_failed_candidate_is_written_down_and_stops_nothing(bench: Callable[[Times], list[list[int]]]) -> None:
    def times(rank: int, samples: int) -> list[float]:
        if rank == 1:
            raise RuntimeError("signal SIGSEGV")
        return [float(rank + 1)] * samples

    bench(times)
    steps: list[Progress] = []
    made = tune(SPEC, trials=6, progress=steps.append)
    assert {s["rank"]: s["error"] for s in made.samples if "error" in s} == {1: "signal SIGSEGV"}
    assert len(made.samples) == 6
    assert made.tiles == RANKED[0].fields()
    assert steps[-1] == Progress(6, 6, 1, 1.0, "done")


def test_nothing_measured_is_an_error_with_the_first_reason(bench: Callable[[Times], list[list[int]]]) -> None:
    def times(rank: int, samples: int) -> list[float]:
        raise RuntimeError(f"{rank} crashed")

    bench(times)
    with pytest.raises(TargetError, match=r"none of the 3 candidates could be measured; the first one: 0 crashed"):
        tune(SPEC, trials=3)
    assert find_record(SPEC, HERE) is None


def test_finals_that_fail_are_an_error_and_the_rest_is_kept(
    bench: Callable[[Times], list[list[int]]], tmp_path: Path
) -> None:
    def times(rank: int, samples: int) -> list[float]:
        if samples != tuning.SAMPLES:
            raise RuntimeError("signal SIGKILL")
        return [1.0] * samples

    jobs = bench(times)
    with pytest.raises(TargetError, match="the finals failed: signal SIGKILL; start again"):
        tune(SPEC, trials=3, work_dir=tmp_path)
    jobs = bench(lambda rank, n: [1.0] * n)
    tune(SPEC, trials=3, work_dir=tmp_path)
    assert len(jobs) == 1


def test_the_budget_is_the_number_of_candidates_and_a_larger_one_continues(
    bench: Callable[[Times], list[list[int]]], tmp_path: Path
) -> None:
    jobs = bench(lambda rank, n: [float(rank + 1)] * n)
    assert len(tune(SPEC, trials=1, work_dir=tmp_path).samples) == 1
    assert jobs == [[0], [0]]  # the baseline, and the finals
    small = tune(SPEC, trials=4, work_dir=tmp_path)
    jobs.clear()
    large = tune(SPEC, trials=10_000, work_dir=tmp_path)
    assert len(jobs) == len(RANKED) - 4 or len(jobs) == len(RANKED) - 3  # and the finals, where they are others
    assert sorted(s["rank"] for s in large.samples) == list(range(len(RANKED)))
    assert large.samples[:4] == small.samples
    # a smaller budget afterwards forgets nothing
    assert len(tune(SPEC, trials=2, work_dir=tmp_path).samples) == len(RANKED)


def test_the_record_goes_where_it_is_told(bench: Callable[[Times], list[list[int]]], tmp_path: Path) -> None:
    bench(lambda rank, n: [1.0] * n)
    made = tune(SPEC, trials=1, into=tmp_path / "here")
    assert made.path is not None
    assert made.path.is_relative_to(tmp_path / "here")
    assert Record(**json.loads(made.path.read_text())) == made
    assert find_record(SPEC, HERE) is None


def test_threads_are_one_unless_asked_for(
    bench: Callable[[Times], list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench(lambda rank, n: [1.0] * n)
    monkeypatch.setenv("TVM_NUM_THREADS", "2")
    assert tune(SPEC, trials=1).provenance["threads"] == 2
    for wrong in ("0", "-1", "many", ""):
        monkeypatch.setenv("TVM_NUM_THREADS", wrong)
        with pytest.raises(TargetError, match=f"TVM_NUM_THREADS is {wrong!r}"):
            tune(SPEC, trials=1)


# --- the processes ---


def job(library: Path, limit_s: int) -> dict[str, Any]:
    return {
        "libraries": [str(library)],
        "arguments": [[["X", "float32", [2]]]],
        "samples": 1,
        "sample_ms": 1,
        "threads": 1,
        "limit_s": limit_s,
        "tracker": None,
    }


@pytest.mark.parametrize(
    ("body", "limit_s", "words"),
    [
        ("int *p = 0; return *p;", 60, "the measuring process ended with signal SIGSEGV"),
        ("for (volatile int i = 0;; i = !i) {}", 1, "took longer than 1 s and was stopped"),
        ("return -1;", 60, "Error"),
    ],
)
def test_a_candidate_that_crashes_or_hangs_is_a_failed_one(tmp_path: Path, body: str, limit_s: int, words: str) -> None:
    source, library = tmp_path / "kernel.c", tmp_path / "kernel.so"
    source.write_text(f"int __tvm_ffi_{KERNEL}(void *a, void *b, int c, void *d) {{ {body} }}\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    answer = tuning._run(job(library, limit_s))
    assert answer["failed"] == "candidate"
    assert words in answer["error"]


def test_objects_for_a_server_to_link_can_be_measured(tmp_path: Path) -> None:
    # what another architecture's servers are sent where no linker for it is here
    library = tuning._compile(HERE.tvm(), str(tmp_path), None, scheduled(SPEC, RANKED[0]))
    assert library.endswith(".tar")
    answer = tuning._run(job(Path(library), 60) | {"arguments": [tuning._arguments(SPEC, RANKED[0])]})
    assert len(answer["times_us"][0]) == 1


def test_a_measuring_process_imports_no_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch is imported')\n")
    (tmp_path / "measuring.py").write_text(
        "import tvm_ffi\nfrom opcompile.trials import answer\n\ndef main():\n    answer(lambda job: {'took': job})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert apart({"limit_s": 60}, "measuring", "candidate", {}) == {"took": {"limit_s": 60}}


def test_what_compiles_too_long_is_a_failed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "BUILD_S", 0.001)
    monkeypatch.setattr(tuning, "cores", lambda: 1)
    with pytest.raises(TargetError, match=r"none of the 1 candidates .*: compiling took longer than 0.001 s"):
        tune(SPEC, trials=1)


# --- refused ---


@pytest.mark.parametrize("trials", [0, -1, 1.5, "4", True, None])
def test_a_budget_that_is_no_budget_is_refused(trials: Any) -> None:
    with pytest.raises(SpecError, match=r"trials is .*, but must be a whole number of at least 1"):
        tune(SPEC, trials=trials)


def test_a_machine_that_cannot_run_the_target_is_told_the_way_out() -> None:
    with pytest.raises(TargetError, match=r"cannot run code for llvm:apple-m1.* give the tracker and the key"):
        tune(SPEC, "llvm:apple-m1")


@pytest.mark.parametrize("package", ["psutil", "cloudpickle", "tornado"])
def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(EngineError, match=rf"the package {package}, which is missing: pip install 'opcompile\[tune\]'"):
        tune(SPEC, tracker="127.0.0.1:1", key="board")


def test_a_journal_of_something_else_is_refused_by_name(
    bench: Callable[[Times], list[list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench(lambda rank, n: [1.0] * n)
    tune(SPEC, trials=1, work_dir=tmp_path)
    for other, field in (({"seed": 1}, "seed 0, not 1"), ({"spec": SPEC.with_batch(2)}, "spec 'in=Nx2")):
        with pytest.raises(RecordError, match=rf"journal\.jsonl holds measurements for {field}.* another work_dir"):
            tune(**{"spec": SPEC, "trials": 1, "work_dir": tmp_path, **other})  # type: ignore[arg-type]
    monkeypatch.setattr("opcompile.lower.declaration_hash", lambda *_: "0123456789abcdef")
    with pytest.raises(RecordError, match=r"for declaration '[0-9a-f]{16}', not '0123456789abcdef'"):
        tune(SPEC, trials=1, work_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{]\n", "line 2 is not JSON"),
        ("[]\n", "line 2 holds a list"),
        ('{"sample": {}}\n', "line 2: .* is no measurement"),
        ('{"sample": {"tiles": {}, "rank": 0, "error": "of other tiles"}}\n', "line 2: .* is no measurement"),
        ('{"finals": [{}]}\n', "line 2: .* is no measurement"),
        (json.dumps({"sample": {"tiles": RANKED[0].fields(), "rank": 0}}) + "\n", "line 2: .* is no measurement"),
        ('{"finals": {}}\n', "line 2: .* is no measurement"),
        ("{}\n", "line 2: .* is no measurement"),
    ],
)
def test_a_corrupt_journal_is_refused_by_name(
    bench: Callable[[Times], list[list[int]]], tmp_path: Path, text: str, words: str
) -> None:
    bench(lambda rank, n: [1.0] * n)
    tune(SPEC, trials=1, work_dir=tmp_path)
    journal = tmp_path / "journal.jsonl"
    header, *_ = journal.read_text().splitlines(keepends=True)
    journal.write_text(header + text)
    with pytest.raises(RecordError, match=rf"{journal}, {words}.* delete this one"):
        tune(SPEC, trials=1, work_dir=tmp_path)
    assert journal.read_text() == header + text


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text("dear diary")
    with pytest.raises(RecordError, match=r"journal\.jsonl is not a journal of measurements"):
        tune(SPEC, trials=1, work_dir=tmp_path)
    assert (tmp_path / "journal.jsonl").read_text() == "dear diary"


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    with tuning._locked(tmp_path), pytest.raises(RecordError, match=r"is in use by another run; wait for it, or"):
        tune(SPEC, trials=1, work_dir=tmp_path)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RecordError,
        match=r"records .*file/records cannot be made: Not a directory; set OPCOMPILE_RECORDS.*XDG_DATA_HOME; .*into",
    ):
        tune(SPEC, trials=1, into=tmp_path / "file" / "records")
    with pytest.raises(
        RecordError, match=r"file/work cannot be written: Not a directory; .*--work-dir, or set XDG_CACHE_HOME"
    ):
        tune(SPEC, trials=1, work_dir=tmp_path / "file" / "work")


def test_an_interrupt_that_tvm_hides_is_no_failure_of_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_tvm_does(*_: object) -> None:
        interrupts.seen.append(signal.SIGTERM)
        raise ValueError

    monkeypatch.setattr(interrupts, "seen", [])
    monkeypatch.setattr(tuning._Bench, "_schedule", as_tvm_does)
    with pytest.raises(KeyboardInterrupt):
        tune(SPEC, trials=TRIALS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_at_once_end_it_as_one_does(tmp_path: Path, number: signal.Signals) -> None:
    """As `timeout` sends them, to the command and to its group."""
    command = [sys.executable, "-m", "opcompile", "tune", str(SPEC), "--trials", "8", "--work-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(tuning.__file__).parents[1])}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        until(lambda: list(tmp_path.rglob("opcompile-build-*")) or process.poll() is not None, "candidates")
        process.send_signal(number)
        process.send_signal(number)
        try:
            # by the exit code of a shell: the second may come when all is tidy
            assert process.wait(timeout=600) in (128 + number, -number)
        finally:
            process.kill()
    assert not list(tmp_path.rglob("opcompile-build-*"))


def test_what_ends_the_pool_is_not_left_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "seen", [])
    done = []

    def close() -> None:
        with interrupts.finishing():
            interrupts.note(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        close()
    assert done
    close()  # of a signal that came before, and ends the command already, nothing more
    interrupts.seen.clear()
    with pytest.raises(interrupts.Interrupted):
        interrupts.note(signal.SIGINT)
