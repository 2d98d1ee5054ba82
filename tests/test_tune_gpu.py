"""Tuning for a GPU in two halves: candidates are built here, timed there, and the fastest is recorded here.

There is no GPU: a driver, a compiler and kernels stand for NVIDIA's (tests/gpu). Kernels with 32 threads a block are
right and slow, those with 64 crash, with 128 leave the last output unwritten, with 256 are right and fast.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from stub_gpu import LAYER, NVCC, forget

import opcompile
import schedules
from opcompile import _measure_gpu as timing
from opcompile import build, record
from opcompile._journal import Journal
from opcompile.cli import cli
from opcompile.cuda_driver import Gpu
from opcompile.errors import ArtifactError, CallError, EngineError, RecordError, SpecError, TargetError
from opcompile.gpus import gpu_target
from opcompile.job import Job
from opcompile.lower_gpu import choose, declaration_hash
from opcompile.measure import measure
from opcompile.record import find_record
from opcompile.spec import ConvTranspose3d
from opcompile.trials import Progress, walk
from opcompile.tune_gpu import absorb, emit
from schedules.gpu_tiles import GpuTiles, candidates

TARGET = gpu_target("cuda:sm_90")
RANKED = [e.tiles for e in candidates(LAYER, TARGET.gpu)]
TRIALS = 6


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of these tests, none of the user's."""
    monkeypatch.setenv(record.FOLDER_VARIABLE, str(tmp_path / "own"))
    return tmp_path / "own"


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Candidates of all four kinds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVCC", str(NVCC))
        return emit([LAYER], TARGET.name, TRIALS, into=tmp_path_factory.mktemp("emitted") / "job")


@pytest.fixture(scope="module")
def measured(emitted: Path, driver: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same candidates on a machine with a GPU: their directory there, and what was measured."""
    there = tmp_path_factory.mktemp("there")
    shutil.copytree(emitted, there / "job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUB_CAPABILITY", "9.0")
        patch.setenv("LD_LIBRARY_PATH", str(driver))
        patch.setattr("opcompile.cuda_driver._LIBRARY", str(driver / "libcuda.so.1"))
        forget()
        measure(there / "job", there / "results.json")
        forget()
    return there / "job", there / "results.json"


@pytest.fixture
def results(measured: tuple[Path, Path]) -> dict[str, Any]:
    """What was measured, to be changed."""
    content: dict[str, Any] = json.loads(measured[1].read_text())
    return content


def written(content: object, folder: Path) -> Path:
    path = folder / "changed.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- emit ---


def test_the_job_lists_layer_tiles_files_and_hashes(emitted: Path) -> None:
    job = Job.read(emitted)
    (layer,) = job.layers
    assert (layer.spec, job.target, job.seed) == (str(LAYER), TARGET.name, 0)
    assert job.made["nvcc"] == "13.1.0"
    assert [c.rank for c in layer.candidates] == walk(len(RANKED), 0)[:TRIALS]
    assert {RANKED[c.rank].threads for c in layer.candidates} == {32, 64, 128, 256}
    for candidate in layer.candidates:
        assert candidate.tiles == RANKED[candidate.rank].fields()
        assert candidate.declaration == declaration_hash(LAYER, RANKED[candidate.rank])
        manifest = opcompile.load(emitted / layer.directory / str(candidate.rank)).manifest  # checks every file
        assert manifest["sha256"] == candidate.sha256
        assert manifest["plan"]["tiles"] == candidate.tiles


def test_the_same_job_is_left_as_it_is_and_another_is_built(tmp_path: Path, gpu: pytest.MonkeyPatch) -> None:
    steps: list[Progress] = []
    place = emit([LAYER], TARGET.name, 1, into=tmp_path / "job", progress=steps.append)
    assert steps == [Progress(1, 1, 0, None, "build")]
    before = (place / "job.json").stat().st_mtime_ns
    emit([LAYER], TARGET.name, 1, into=place)
    assert (place / "job.json").stat().st_mtime_ns == before
    gpu.setenv("STUB_REFUSES", "128")
    emit([LAYER], TARGET.name, 2, into=place)
    baseline, refused = Job.read(place).layers[0].candidates
    assert (baseline.error, refused.sha256) == ("", "")
    assert refused.error == "kernel.cu: 128 threads are refused"
    gpu.setenv("STUB_REFUSES", "32")
    with pytest.raises(EngineError, match=r"none of the 1 candidates could be built; the first one: .* are refused"):
        emit([LAYER], TARGET.name, 1, into=place)
    with pytest.raises(ArtifactError, match=r"has no job\.json; name a directory that `opcompile tune --emit`"):
        measure(place, tmp_path / "results.json")


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, gpu: pytest.MonkeyPatch) -> None:
    place = emit([LAYER], TARGET.name, 1, into=tmp_path / "job")
    artifact = place / Job.read(place).layers[0].directory / "0"
    before = sorted(artifact.iterdir())
    with pytest.raises(ArtifactError, match=r"/0 holds .*, and no job; empty it, or name another directory"):
        emit([LAYER], TARGET.name, 1, into=artifact)
    assert sorted(artifact.iterdir()) == before
    (place / "job.json").unlink()  # as one that was interrupted leaves it
    assert Job.read(emit([LAYER], TARGET.name, 1, into=place)).layers


def test_a_job_for_a_flagged_target_has_its_name_and_records_of_its_own(
    tmp_path: Path, gpu: pytest.MonkeyPatch
) -> None:
    place = emit([LAYER], "cuda:tf32+sm_90", 1, into=tmp_path / "job")
    assert Job.read(place).target == "cuda:sm_90+tf32"
    before = (place / "job.json").stat().st_mtime_ns
    emit([LAYER], "cuda:sm_90+tf32", 1, into=place)
    assert (place / "job.json").stat().st_mtime_ns == before
    flagged = record.path_of(tmp_path, LAYER, gpu_target("cuda:sm_90+sm_100+tf32"))
    assert flagged.parent.name == "cuda-sm_90+tf32"


@pytest.mark.parametrize(
    ("target", "trials", "error", "words"),
    [
        ("llvm", 1, TargetError, "target 'llvm' is no GPU; candidates are emitted for GPUs of CUDA"),
        (
            "metal:apple-m1",
            1,
            TargetError,
            "kernels for metal:apple-m1 cannot be timed .* plan baseline",
        ),
        ("cuda:sm_1", 1, TargetError, "target 'cuda:sm_1' is unknown"),
        ("cuda:sm_90", 0, SpecError, "trials is 0, but must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_emitted_is_refused(
    tmp_path: Path, target: str, trials: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        emit([LAYER], target, trials, into=tmp_path / "job")


def test_emitting_without_nvcc_or_a_place_names_the_way_out(tmp_path: Path, gpu: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write .*file/job: .*; name another directory"):
        emit([LAYER], TARGET.name, 1, into=tmp_path / "file" / "job")
    gpu.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(EngineError, match=r"/nowhere/nvcc cannot be started: .*; set NVCC"):
        emit([LAYER], TARGET.name, 1, into=tmp_path / "job")


# --- measure ---


def test_right_candidates_are_timed_and_the_others_fail_with_their_reason(results: dict[str, Any]) -> None:
    (layer,) = results["layers"]
    assert [s["rank"] for s in layer["samples"]] == walk(len(RANKED), 0)[:TRIALS]
    for sample in layer["samples"]:
        threads = RANKED[sample["rank"]].threads
        assert sample["tiles"] == RANKED[sample["rank"]].fields()
        if threads == 64:
            assert "the measuring process ended with signal SIGSEGV" in sample["error"]
        elif threads == 128:
            assert sample["error"].startswith("VerificationError: ")
        else:
            assert len(sample["times_us"]) == 8
            assert min(sample["times_us"]) >= (2000 if threads == 32 else 200)  # what such a kernel waits
            assert sample["device"] == "Stub 0"
        assert ("error" in sample) == ("run_us" not in sample) == (threads in (64, 128))


def test_the_finals_hold_the_baseline_and_the_file_its_origin(results: dict[str, Any]) -> None:
    finals = results["layers"][0]["finals"]
    assert RANKED[finals[0]["rank"]].threads == 256
    assert {s["rank"] for s in finals} == {0, 3}
    assert all(len(s["times_us"]) == 16 for s in finals)
    assert {**results["machine"], "date": ""} == {
        **results["machine"],
        "device": "Stub 0",
        "capability": "9.0",
        "opcompile": opcompile.__version__,
        "date": "",
    }
    assert results["machine"]["driver"].endswith("CUDA 13.1")


def test_an_interrupted_run_continues(
    measured: tuple[Path, Path], tmp_path: Path, gpu: pytest.MonkeyPatch, results: dict[str, Any]
) -> None:
    jobs: list[dict[str, Any]] = []

    def apart(job: dict[str, Any], *_: object) -> dict[str, Any]:
        jobs.append(job)
        return {"times_us": [[77.0] * job["samples"]] * len(job["directories"])}

    gpu.setattr("opcompile.measure.apart", apart)
    shutil.copytree(measured[0], tmp_path / "job")
    again = measure(tmp_path / "job", tmp_path / "results.json")
    assert (again["layers"], jobs) == (results["layers"], [])

    (journal,) = (tmp_path / "job").glob("*/*.jsonl")
    kept = journal.read_bytes().splitlines(keepends=True)[:5]
    journal.write_bytes(b"".join(kept) + b'{"sample"')
    again = measure(tmp_path / "job", tmp_path / "results.json")
    assert again["layers"][0]["samples"][:4] == results["layers"][0]["samples"][:4]
    assert [s["run_us"] for s in again["layers"][0]["samples"][4:]] == [77.0, 77.0]
    assert [len(job["directories"]) for job in jobs] == [1, 1, 3]  # and the finals
    # on another GPU nothing is known
    gpu.setenv("STUB_CAPABILITY", "10.0")
    forget()
    jobs.clear()
    measure(tmp_path / "job", tmp_path / "results.json")
    assert len(jobs) == TRIALS + 1


def test_a_gpu_that_faults_and_one_without_memory_are_told_apart(
    emitted: Path, tmp_path: Path, gpu: pytest.MonkeyPatch
) -> None:
    one = tmp_path / "job"
    shutil.copytree(emitted, one)
    content = json.loads((one / "job.json").read_text())
    content["layers"][0]["candidates"] = content["layers"][0]["candidates"][:1]
    (one / "job.json").write_text(json.dumps(content))
    gpu.setenv("STUB_FULL", "1")
    with pytest.raises(TargetError, match=r"nothing can be measured here: .*out of memory; end what else uses the GPU"):
        measure(one, tmp_path / "results.json")
    gpu.delenv("STUB_FULL")
    gpu.setenv("STUB_FAULT", "1")
    found = measure(one, tmp_path / "results.json")
    (sample,) = found["layers"][0]["samples"]
    assert sample["error"] == "TargetError: the GPU's driver answered cuMemcpyDtoH_v2 with error 700: as told"
    with pytest.raises(TargetError, match=r"in=1x1x8x8x8 .* has no record: none of the 1 candidates could be measured"):
        absorb(tmp_path / "results.json")


def refuse(*_: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_where_nothing_can_be_measured_the_error_says_why(
    emitted: Path, tmp_path: Path, gpu: pytest.MonkeyPatch
) -> None:
    shutil.copytree(emitted, tmp_path / "job")
    output = tmp_path / "results.json"
    gpu.setenv("STUB_CAPABILITY", "8.9")
    with pytest.raises(TargetError, match=r"8\.9, but each candidate in .* holds machine code for sm_90.*cuda:sm_89"):
        measure(tmp_path / "job", output)
    gpu.delenv("STUB_CAPABILITY")
    forget()
    with pytest.raises(TargetError, match="sees none on this machine"):
        measure(tmp_path / "job", output)
    gpu.setenv("STUB_CAPABILITY", "9.0")
    with pytest.raises(ArtifactError, match=r"has no job\.json"):
        measure(tmp_path, output)
    with pytest.raises(CallError, match=r"job\.json is read, and would be lost"):
        measure(tmp_path / "job", tmp_path / "job" / "job.json")
    (first, second) = sorted(tmp_path.glob("job/*/*"))[:2]
    shutil.rmtree(first)
    shutil.copytree(second, first)
    with pytest.raises(ArtifactError, match=r"is not the candidate that .* lists; emit it again"):
        measure(tmp_path / "job", output)
    shutil.copytree(emitted, tmp_path / "again")
    gpu.setattr(Journal, "open", refuse)
    with pytest.raises(RecordError, match=r"again cannot be written: Read-only file system; give a copy that can"):
        measure(tmp_path / "again", output)
    (tmp_path / "job" / "job.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"is no list of candidates: KeyError\('format'\); emit it again"):
        measure(tmp_path / "job", output)
    (tmp_path / "job" / "job.json").write_text('{"format": 2}')
    with pytest.raises(ArtifactError, match=r"is of format 2, and this version reads format 1; emit it again"):
        measure(tmp_path / "job", output)
    assert not output.exists()


def test_tensors_rotate_past_the_second_cache(emitted: Path, gpu: pytest.MonkeyPatch) -> None:
    here = Gpu()
    layer: Any = opcompile.load(emitted / record.key(str(LAYER)) / "0")
    golden = layer.golden()
    held = golden.x.nbytes * 2 + golden.w.nbytes
    for l2_bytes, count in ((0, 1), (held // 2, 2), (held * 3 // 2, 4), (held * 100, 16)):
        here.device = replace(here.device, l2_bytes=l2_bytes)
        (started,) = timing._prepared(here, [layer], golden)
        assert len(started) == count
        for tensor in range(4):
            assert len({call.args[tensor].data_ptr() for call in started}) == count
    called: list[int] = []

    def take(number: int, us: int) -> None:
        called.append(number)
        gpu.setenv("STUB_CLOCK_US", str(int(os.environ.get("STUB_CLOCK_US", "0")) + us))

    gpu.setattr(timing, "_WARM_S", 0)
    calls = [partial(take, number, 7) for number in range(3)]
    ((sample,),) = timing._in_turns(here, [calls], 1)
    assert called == [0, *(number % 3 for number in range(16))]
    assert sample == 7
    slow = [partial(take, 3, 11_000)]
    called.clear()
    timing._in_turns(here, [slow], 2)
    assert called == [3] * 3  # one call fills a sample
    assert here.timed_us([partial(take, 4, 4000), partial(take, 4, 6000)]) == 5000  # the mean


def test_a_changed_candidate_is_not_timed(emitted: Path, tmp_path: Path, gpu: pytest.MonkeyPatch) -> None:
    shutil.copytree(emitted, tmp_path / "job")
    (library,) = tmp_path.glob("job/*/0/*.so")
    library.write_bytes(library.read_bytes() + b"!")
    with pytest.raises(TargetError, match=r"nothing can be measured here: .* was changed after it was written"):
        measure(tmp_path / "job", tmp_path / "results.json")


# --- absorb ---


def test_the_fastest_becomes_the_record_that_plans_use(
    measured: tuple[Path, Path], results: dict[str, Any], own: Path, tmp_path: Path, gpu: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecordError, match=r"no tuned record for .* on cuda:sm_90; make one with `opcompile tune`"):
        choose(LAYER, TARGET, "tuned")
    assert choose(LAYER, TARGET, "best")[1].name == "baseline"
    (made,) = absorb(measured[1])
    assert made.path == own / "cuda-sm_90" / f"{made.key}.json"
    assert find_record(LAYER, TARGET) == made
    assert GpuTiles(**made.tiles).threads == 256
    assert made.samples == results["layers"][0]["samples"]
    assert made.baseline_us is not None
    assert made.baseline_us > made.run_us
    assert made.provenance["device"] == "Stub 0"
    assert made.provenance["nvcc"] == "13.1.0"
    assert made.provenance["measured_with"]["opcompile"] == opcompile.__version__
    for plan in ("tuned", "best"):
        tiles, chosen = choose(LAYER, TARGET, plan)  # type: ignore[arg-type]
        assert tiles.fields() == made.tiles
        assert (chosen.name, chosen.record) == ("tuned", made.key)
    assert choose(LAYER, TARGET, "baseline")[1].record is None
    # of several architectures the first chooses the tiles
    assert choose(LAYER, gpu_target("cuda:sm_90+sm_100"), "tuned")[1].record == made.key
    for other in ("cuda:sm_80+sm_90", "metal:apple-m1", "cuda:sm_90+tf32"):
        assert find_record(LAYER, gpu_target(other)) is None
    place = build.write(LAYER, TARGET.name, "tuned", tmp_path / "layer")
    assert opcompile.load(place).manifest["plan"]["tiles"] == made.tiles


def test_a_stale_or_foreign_record_is_refused(measured: tuple[Path, Path], own: Path) -> None:
    (made,) = absorb(measured[1])
    assert made.path is not None
    for change, words in (
        ({"declaration": "0123456789abcdef"}, "was tuned on declaration 0123456789abcdef, but this version declares"),
        ({"target": "cuda:sm_80"}, "it is for target 'cuda:sm_80', not 'cuda:sm_90'"),
        ({"target": "cuda:sm_90+tf32"}, r"it is for target 'cuda:sm_90\+tf32', not 'cuda:sm_90'"),
        ({"provenance": {**made.provenance, "nvcc": 13}}, r"field provenance\.nvcc is of type int"),
        ({"tiles": {**made.tiles, "threads_q": 257}}, "its tiles are not among its finals"),
    ):
        record.write_atomically(made.path, replace(made, **change).to_json())  # type: ignore[arg-type]
        with pytest.raises(RecordError, match=words):
            choose(LAYER, TARGET, "best")


@pytest.mark.parametrize(
    "path", sorted(Path(schedules.__file__).parent.glob("records/cuda-*/*.json")), ids=lambda p: p.stem
)
def test_the_records_that_are_shipped_are_used(path: Path) -> None:
    """Also those from before tiles had all their fields."""
    spec, target = ConvTranspose3d.parse(json.loads(path.read_text())["spec"]), gpu_target("cuda:sm_90")
    tiles, plan = choose(spec, target, "best")
    assert plan.name == "tuned"
    assert tiles.fields() == json.loads(path.read_text())["tiles"]
    # a field of a later version may be there, and then as every other
    assert record.illegal({**tiles.fields(), "ahead": False}, spec, target) is None
    assert "none of the" in str(record.illegal({**tiles.fields(), "ahead": 0}, spec, target))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threads_q": 257}, r"they are none of the 13 choices that keep to the limits of cuda:sm_90"),
        ({"apart": 0}, "they are none of the 13 choices"),
        ({"family": "mystic"}, "they are none of the 13 choices"),
        ({"colour": 1}, "their fields are apart, chunk, colour, family"),
    ],
)
def test_tiles_that_are_no_candidate_are_illegal(change: dict[str, Any], words: str) -> None:
    assert record.illegal(RANKED[0].fields(), LAYER, TARGET) is None
    assert words in str(record.illegal({**RANKED[0].fields(), **change}, LAYER, TARGET))


def changed(where: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Return what sets one field, named like ``job.layers.0.spec``."""

    def change(content: dict[str, Any]) -> None:
        *path, last = [int(word) if word.isdigit() else word for word in where.split(".")]
        inner: Any = content
        for word in path:
            inner = inner[word]
        inner[last] = value

    return change


def without_device(results: dict[str, Any]) -> None:
    del results["layers"][0]["samples"][0]["device"]


def failed_final(results: dict[str, Any]) -> None:
    """Put a failed one behind the finals."""
    finals = results["layers"][0]["finals"]
    finals.append({"rank": finals[0]["rank"], "tiles": finals[0]["tiles"], "error": "lost"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("format", 2), "is of format 2, and this version reads 1; measure again"),
        (changed("job", 3), "is no result of `opcompile measure`: .*; measure again"),
        (changed("job.target", "cuda:sm_1"), "target 'cuda:sm_1' is unknown"),
        (changed("layers", []), "is no result of `opcompile measure`"),
        (changed("layers.0.spec", "in=1x1x1x1x1 co=1 k=1"), "it holds 'in=1x1x1x1x1 co=1 k=1' where its job has"),
        (changed("layers.0.finals.0.rank", 77), "is no result of `opcompile measure`"),
        (changed("layers.0.finals.0.run_us", "3"), "is no result of `opcompile measure`"),
        (changed("layers.0.samples", [{}]), r"samples\[0\] is not an object with tiles"),
        (changed("layers.0.samples", []), r"its samples have ranks \[\], and the candidates of its job \[0, "),
        (changed("layers.0.samples", None), "its samples are None, but must be a list"),
        (changed("layers.0.samples.1.rank", -1), r"samples\[1\] is of rank -1 and tiles that its job does not have"),
        (changed("layers.0.samples.1.tiles", None), r"samples\[1\] is not an object with tiles"),
        (changed("layers.0.samples.1.tiles", {}), r"samples\[1\] is of rank \d+ and tiles that its job does not have"),
        (changed("layers.0.samples.0.times_us", [1e-3]), r"samples\[0\] has run_us .*, which is not the median"),
        (changed("layers.0.samples.0.device", None), r"samples\[0\] has None for device, but must name the one"),
        (changed("layers.0.finals.0.device", 7), r"finals\[0\] has 7 for device, but must name the one"),
        (without_device, r"samples\[0\] has None for device, but must name the one"),
        (
            changed("job.layers.0.candidates.0.error", "nvcc failed"),
            r"samples\[0\] has a time for rank 0, which its job could not build: nvcc failed",
        ),
        (changed("layers.0.samples.0.error", "none"), r"samples\[0\] has both an error and a time"),
        (changed("layers.0.finals", []), r"its finals have times for ranks \[\], but must have them for \[\d+, "),
        (failed_final, r"its finals have times for ranks \[\d+, (\d+, )*None\], but must have them for"),
        (changed("layers.0.finals", None), "its finals are None, but must be a list"),
        (changed("layers.0.finals", {}), "its finals are {}, but must be a list"),
        (changed("layers.0.finals.0.run_us", 1e-3), r"finals\[0\] has run_us 0\.001, which is not the median"),
        (changed("job.layers.0.candidates.1.rank", -1), "-1 is no rank"),
        (changed("job.layers.0.candidates", []), r"samples\[0\] is of rank 0 and tiles that its job does not have"),
        (changed("job.layers", []), "its job has no layer"),
        (changed("machine.python", None), "its machine has None for python"),
        (changed("machine.date", 7), r"field provenance\.date is of type int"),
        (changed("job.layers.0.candidates.5.declaration", "0" * 16), "tuned on declaration 0000000000000000, but this"),
    ],
)
def test_results_that_are_none_are_refused(
    results: dict[str, Any], own: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    change(results)
    with pytest.raises(RecordError, match=words):
        absorb(written(results, tmp_path))
    assert not own.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecordError, match=r"changed\.json.*; (measure again, and )?give the file that"):
        absorb(written(text, tmp_path))


def test_a_result_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"result .*No such file.*; give the file that `opcompile measure`"):
        absorb(tmp_path / "results.json")


# --- all at once, and by command ---


def test_all_at_once_where_a_gpu_is_at_hand(tmp_path: Path, gpu: pytest.MonkeyPatch) -> None:
    dynamic = LAYER.with_batch(None)
    steps: list[Progress] = []
    made = opcompile.tune(dynamic, TARGET.name, 1, work_dir=tmp_path / "work", progress=steps.append)
    assert [p.step for p in steps] == ["build", "measure", "finals", "done"]
    assert find_record(dynamic, TARGET) == made
    assert made.provenance["batch"] == 1
    # nothing is left to build or to measure
    gpu.setattr("opcompile.measure.apart", None)
    gpu.setattr("opcompile.artifact.write", None)
    assert opcompile.tune(dynamic, TARGET.name, 1, work_dir=tmp_path / "work").finals == made.finals


def test_without_a_gpu_the_way_out_is_named(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr("opcompile.cuda_driver._LIBRARY", "libno-such-driver.so.1")
    words = r"cuda:sm_90 cannot be timed here: there is no driver.*`opcompile tune --emit DIR`.*--absorb results\.json`"
    with pytest.raises(TargetError, match=words):
        opcompile.tune(LAYER, TARGET.name)


def test_the_three_commands(
    tmp_path: Path, own: Path, gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> tuple[int, dict[str, Any]]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        return int(str(end.value.code)), json.loads(capsys.readouterr().out or "{}")

    job, output = tmp_path / "job", tmp_path / "results.json"
    code, said = run("tune", str(LAYER), "--target", TARGET.name, "--trials", 1, "--emit", job, "--json")
    assert (code, len(said["job"]["layers"][0]["candidates"])) == (0, 1)
    code, said = run("measure", job, "-o", output, "--json")
    assert (code, said) == (0, json.loads(output.read_text()))
    code, said = run("tune", "--absorb", output, "--json")
    assert (code, said["records"][0]["target"]) == (0, TARGET.name)
    assert list(own.glob("cuda-sm_90/*.json"))


@pytest.mark.gpu_table
def test_emitted_by_nvcc_itself_and_refused_where_there_is_no_gpu(tmp_path: Path, driver: Path) -> None:
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH")
    spec = ConvTranspose3d.parse("in=1x4x2x2x4 co=8 k=2 s=2")
    place = emit([spec], "cuda:sm_90", 2, into=tmp_path / "job")
    assert not any(c.error for c in Job.read(place).layers[0].candidates)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LD_LIBRARY_PATH": str(driver)}
    command = [sys.executable, "-m", "opcompile.measure", str(place), "-o", str(tmp_path / "results.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "the driver of NVIDIA's GPUs sees none on this machine" in done.stderr
    assert "Traceback" not in done.stderr
