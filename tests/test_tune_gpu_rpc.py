"""Tuning for a GPU that serves under an RPC tracker: over a session that is made up, and over a real one on loopback.

There is no GPU: a driver, a compiler and kernels stand for NVIDIA's (tests/gpu), as in test_tune_gpu.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from stub_gpu import LAYER, NVCC, forget
from waiting import until

import opcompile
from opcompile import _measure_far, record, serve, trials
from opcompile.cli import cli
from opcompile.errors import EngineError, TargetError, UnknownTargetError
from opcompile.farm import Farm
from opcompile.gpus import gpu_target
from opcompile.measure import Machine, measure
from opcompile.record import find_record
from opcompile.trials import Progress
from opcompile.tune_gpu import emit
from schedules.gpu_tiles import GpuTiles

TARGET = gpu_target("cuda:sm_90")
KEY = "rack"
# right and slow, with a last output that stays unwritten, and crashing
TRIALS = 3


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of these tests, none of the user's."""
    monkeypatch.setenv(record.FOLDER_VARIABLE, str(tmp_path / "own"))
    monkeypatch.setenv("NVCC", str(NVCC))
    return tmp_path / "own"


# --- over a session that is made up: all but the network is real ---


class Session:
    """A server's side of a session, in a directory of this machine."""

    def __init__(self, place: Path, functions: dict[str, Callable[..., Any]]) -> None:
        self.place, self.functions = place, functions

    def upload(self, path: str, name: str) -> None:
        shutil.copy(path, self.place / name)

    def get_function(self, name: str) -> Callable[..., Any]:
        try:
            return self.functions[name]
        except KeyError:
            raise AttributeError(f"Cannot find function {name}") from None


@dataclass
class Line:
    """What stands for the network: requests in the order they came, and what is done instead of answering them."""

    place: Path
    functions: dict[str, Callable[..., Any]] = field(default_factory=lambda: {serve.MEASURE: serve.measured})
    requests: list[dict[str, Any]] = field(default_factory=list)
    instead: list[dict[str, Any] | None] = field(default_factory=list)
    change: Callable[[dict[str, Any]], None] = lambda answer: None

    def apart(self, job: dict[str, Any], module: str, *_: object) -> dict[str, Any]:
        assert module == "opcompile._measure_far"
        self.requests.append(job)
        if self.instead and (answer := self.instead.pop(0)):
            return answer
        here = Path(tempfile.mkdtemp(dir=self.place))
        before = Path.cwd()
        os.chdir(here)
        try:
            answer = _measure_far._measured(job, Session(here, self.functions))
        finally:
            os.chdir(before)
        self.change(answer)
        return answer


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FARM = Farm("127.0.0.1", 1, KEY, "opcompile.serve")


@pytest.fixture
def line(tmp_path: Path, gpu: pytest.MonkeyPatch) -> Line:
    """A server with a GPU at the other end; one is listed."""
    (tmp_path / "there").mkdir()
    found = Line(tmp_path / "there")
    gpu.setattr("opcompile.measure.apart", found.apart)
    gpu.setattr("opcompile.farm.listed", lambda host, port: [KEY])
    return found


@pytest.fixture
def quick(gpu: pytest.MonkeyPatch) -> None:
    """The server's GPU takes 2000 us for everything, and no process."""
    gpu.setattr(
        "opcompile.serve.apart",
        lambda job, *_: {"times_us": [[2000.0] * job["samples"]] * len(job["directories"])},
    )


def tuned(work: Path, number: int = TRIALS, **more: Any) -> record.Record:
    return opcompile.tune(LAYER, TARGET.name, number, tracker="127.0.0.1:1", key=KEY, work_dir=work, **more)


def test_a_server_times_what_is_built_here_and_the_fastest_is_recorded(line: Line, own: Path, tmp_path: Path) -> None:
    steps: list[Progress] = []
    made = tuned(tmp_path / "work", progress=steps.append)
    assert find_record(LAYER, TARGET) == made
    assert GpuTiles(**made.tiles).threads == 32
    right, unwritten, crashing = made.samples
    assert right["times_us"] == [2000.0] * 8
    assert unwritten["error"].startswith("VerificationError: ")
    assert "ended with signal SIGSEGV" in crashing["error"]
    assert {s["device"] for s in (right, *made.finals)} == {made.provenance["device"]} == {"Stub 0, by RPC, key rack"}
    assert [p.step for p in steps] == [*["build"] * TRIALS, *["measure"] * TRIALS, "finals", "done"]
    # one session to ask what the server is, one for each candidate, and one for the finals
    assert [len(job["directories"]) for job in line.requests] == [0, 1, 1, 1, 1]
    for job in line.requests:
        assert job["tracker"] == ["127.0.0.1", 1, KEY]
        assert job["measure_s"] < job["session_s"] < job["limit_s"]  # each is told by the one within
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    assert results["machine"]["capability"] == "9.0"


@pytest.mark.usefixtures("quick")
def test_an_interrupted_run_continues(line: Line, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if (progress.done, progress.step) == (2, "measure"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "work", progress=interrupt)
    (journal,) = (tmp_path / "work").glob("*/*.jsonl")
    kept = journal.read_bytes()
    assert kept.count(b"\n") == 3  # the header and two candidates
    line.requests.clear()
    made = tuned(tmp_path / "work")
    assert journal.read_bytes().startswith(kept)
    ranks = [Path(job["directories"][0]).name for job in line.requests[1:]]
    assert ranks == [str(made.samples[2]["rank"]), "0"]  # and the finals
    line.requests.clear()
    assert tuned(tmp_path / "work").finals == made.finals
    assert [job["directories"] for job in line.requests] == [[]]


@pytest.mark.usefixtures("quick")
def test_a_connection_that_breaks_is_tried_again_and_a_server_that_is_gone_ends_the_run(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"failed": "connection", "error": "gone"}
    line.instead = [None, broken, broken]
    assert tuned(tmp_path / "one", 1).run_us == 2000
    # three times are not the network's fault
    line.instead = [None, None, broken, broken, broken]
    made = tuned(tmp_path / "two", 2)
    assert made.samples[1]["error"] == "the connection broke 3 times: gone"
    line.instead = [broken] * 3
    with pytest.raises(TargetError, match=r"a server for key 'rack' cannot say what it is: the connection broke 3"):
        tuned(tmp_path / "three", 1)

    def leave(answer: dict[str, Any]) -> None:
        if "times_us" in answer:
            monkeypatch.setattr("opcompile.farm.listed", lambda host, port: ["board"])
            line.instead = [broken, {"failed": "queue", "error": "timed out"}]

    line.change = leave
    work = tmp_path / "four"
    with pytest.raises(TargetError, match=r"no server for key 'rack'; .*for: board; start one with `python -m opcom"):
        measure_job(work)
    (journal,) = work.glob("*/*.jsonl")
    assert journal.read_bytes().count(b"\n") == 2  # the header, and the candidate before


def measure_job(work: Path) -> None:
    emit([LAYER], TARGET.name, 2, into=work)
    measure(work, work / "results.json", on=Machine.of(FARM))


@pytest.mark.usefixtures("quick")
def test_servers_of_one_key_must_be_alike(line: Line, tmp_path: Path) -> None:
    def another_driver(answer: dict[str, Any]) -> None:
        if "times_us" in answer:
            answer["machine"]["driver"] = "CUDA 12.0"

    line.change = another_driver
    with pytest.raises(TargetError, match=r"key 'rack' differ in driver, 'CUDA 13.1' and 'CUDA 12.0', so that their"):
        measure_job(tmp_path / "work")


def test_a_server_of_another_version_is_refused(line: Line, tmp_path: Path) -> None:
    def older(answer: dict[str, Any]) -> None:
        answer["machine"] = {"opcompile": "0.0.9", "device": "Stub 0"}

    line.change = older
    with pytest.raises(
        TargetError, match=r"a server for key 'rack' runs opcompile 0\.0\.9, and this is .*; install the"
    ):
        tuned(tmp_path / "work")


def test_what_goes_wrong_in_a_session_is_not_the_candidates_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvm import rpc

    job = {"tracker": ["127.0.0.1", 1, KEY], "queue_s": 1, "session_s": 1}
    alive = Session(Path(), {"runtime.NumThreads": lambda: 1})
    monkeypatch.setattr("opcompile.farm._ask_tracker", lambda *_: ("127.0.0.1", 1, "rack:1"))
    monkeypatch.setattr(rpc, "connect", lambda *_, session_timeout: alive)
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(_measure_far, "answer", lambda measured: given.append(measured(job)))
    monkeypatch.setattr(_measure_far, "_measured", refuse)
    _measure_far.main()
    alive.functions.clear()
    _measure_far.main()
    assert [answer["failed"] for answer in given] == ["machine", "connection"]
    assert given[0]["error"] == "OSError: [Errno 28] No space left on device"


def test_a_server_that_cannot_measure_says_why_before_anything_is_built(
    line: Line, tmp_path: Path, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr("opcompile.artifact.write", None)
    gpu.setenv("STUB_CAPABILITY", "8.9")
    with pytest.raises(TargetError, match=r"compute capability 8\.9, but each candidate for cuda:sm_90 holds machine"):
        tuned(tmp_path / "work")
    gpu.delenv("STUB_CAPABILITY")
    forget()
    with pytest.raises(TargetError, match=r"a server for key 'rack' cannot measure: .*sees none on this machine"):
        tuned(tmp_path / "work")
    line.functions.clear()
    with pytest.raises(TargetError, match=r"'rack' cannot measure: the server was not started by opcompile, .*serve`"):
        tuned(tmp_path / "work")
    gpu.setattr("opcompile.farm.listed", lambda host, port: [])
    with pytest.raises(TargetError, match=r"has no server for key 'rack'; it has no server at all; .*opcompile\.serve"):
        tuned(tmp_path / "work")
    with pytest.raises(TargetError, match="a tracker and a key go together"):
        opcompile.tune(LAYER, TARGET.name, key=KEY)
    assert not (tmp_path / "work").exists()


def test_a_full_disk_of_a_server_is_not_the_candidates_fault(
    line: Line, tmp_path: Path, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr("shutil.unpack_archive", refuse)
    with pytest.raises(
        TargetError, match=r"a server for key 'rack' cannot measure: OSError: .*No space left on device"
    ):
        tuned(tmp_path / "work", 1)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["/elsewhere/0.zip", "../0.zip", "0.tar"])
def test_what_was_not_uploaded_as_a_zip_file_is_not_unpacked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files outside of the session's directory would stay when it ends."""
    name = name.replace("/elsewhere", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "of").mkdir()
    (tmp_path / "of" / "file").touch()
    kind = Path(name).suffix[1:]
    shutil.make_archive(str(Path(name).absolute().with_suffix("")), kind, tmp_path / "of")
    answer = json.loads(serve.measured(json.dumps({"archives": [name], "samples": 1, "measure_s": 1})))
    assert answer["failed"] == "machine"
    assert not list(tmp_path.glob("**/0"))


@pytest.mark.heavy
@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 9090), ("127.0.0.1", 2**16)])
def test_an_address_that_is_not_of_this_machine_is_named(host: str, port: int, gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr("opcompile.serve.listed", lambda host, port: [])
    with pytest.raises(TargetError, match=rf"cannot listen at {host}, on a port from {port} on: .*Error: .*--host"):
        serve.serve("127.0.0.1:1", KEY, host, port)


def test_without_a_gpu_or_a_tracker_nobody_serves(gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match=r"tracker 'here' is not of the form HOST:PORT"):
        serve.serve("here", KEY)
    gpu.setattr("opcompile.farm._ANSWER_S", 1)
    with pytest.raises(TargetError, match=r"the RPC tracker 127\.0\.0\.1:1 does not answer .*rpc_tracker"):
        serve.serve("127.0.0.1:1", KEY)
    for key in ("", "two words"):
        with pytest.raises(UnknownTargetError, match=rf"key '{key}' must be one word"):
            serve.serve("127.0.0.1:1", key)
    for package in ("tvm", "psutil"):
        gpu.setitem(sys.modules, package, None)
        words = rf"serving needs a package that is missing: .*{package}.*'opcompile\[tune\]'"
        with pytest.raises(EngineError, match=words):
            serve.serve("127.0.0.1:1", KEY)
    gpu.delenv("STUB_CAPABILITY")
    forget()
    with pytest.raises(TargetError, match="sees none on this machine"):
        serve.serve("127.0.0.1:1", KEY)


# --- over a real one ---


@dataclass
class Rack:
    """A tracker, and servers that tests start under it."""

    tracker: Any
    driver: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.tracker.port}"

    def serve(self, key: str, module: str = "opcompile.serve") -> subprocess.Popen[bytes]:
        """Start a server and wait until the tracker has it."""
        command = [sys.executable, "-m", module, "--tracker", self.address, "--key", key, "--host", "127.0.0.1"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path),
            "LD_LIBRARY_PATH": str(self.driver),
            "STUB_CAPABILITY": "9.0",
        }
        server = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
        self.started.append(server)
        until(lambda: self.has(key), "a server")
        return server

    def has(self, key: str) -> bool:
        try:
            return bool(Farm("127.0.0.1", self.tracker.port, key).servers())
        except TargetError:
            return False


def end(server: subprocess.Popen[bytes]) -> None:
    """End a server as a power cut would: with all that it started, without a word."""
    for process in [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]:
        process.kill()
    server.wait()


@pytest.fixture(scope="module")
def rack(driver: Path) -> Iterator[Rack]:
    from tvm.rpc.tracker import Tracker

    found = Rack(Tracker("127.0.0.1", port=22190, port_end=22990, silent=True), driver)
    yield found
    for server in found.started:
        if server.poll() is None:
            end(server)
    found.tracker.terminate()


def kill_at_work(rack: Rack, server: subprocess.Popen[bytes]) -> None:
    """End the server while it measures a candidate, and start another one."""

    def measuring() -> bool:
        children = psutil.Process(server.pid).children(recursive=True)
        return any("_measure_gpu" in " ".join(child.cmdline()) for child in children)

    until(measuring, "a candidate")
    end(server)
    rack.serve(KEY)


@pytest.fixture
def no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("opcompile.cuda_driver._LIBRARY", "libno-such-driver.so.1")
    forget()
    yield
    forget()


@pytest.mark.heavy
@pytest.mark.usefixtures("no_gpu_here")
def test_a_server_that_dies_while_it_measures_loses_nothing(
    rack: Rack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = threading.Thread(target=kill_at_work, args=[rack, rack.serve(KEY)])
    answers, apart = [], trials.apart

    def watched(*job: Any) -> dict[str, Any]:
        answers.append(apart(*job))
        return answers[-1]

    monkeypatch.setattr("opcompile.measure.apart", watched)

    def kill_half_way(progress: Progress) -> None:
        if (progress.step, progress.done) == ("measure", 1):
            killer.start()

    made = opcompile.tune(
        LAYER,
        TARGET.name,
        TRIALS,
        tracker=rack.address,
        key=KEY,
        work_dir=tmp_path / "work",
        progress=kill_half_way,
    )
    killer.join()
    assert [a.get("failed") for a in answers] == [None, None, "connection", "candidate", "candidate", None]
    assert ["error" in s for s in made.samples] == [False, True, True]
    assert made.provenance["device"] == "Stub 0, by RPC, key rack"
    assert find_record(LAYER, TARGET) == made


@pytest.mark.heavy
@pytest.mark.usefixtures("no_gpu_here")
def test_by_command_and_refused_by_a_server_of_another_kind(
    rack: Rack, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(key: str) -> tuple[int, str, str]:
        words = ["tune", str(LAYER), "--target", TARGET.name, "--trials", "1", "--tracker", rack.address, "--key", key]
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--work-dir", str(tmp_path / "work"), "--json"])
        return int(str(ended.value.code)), *capsys.readouterr()

    rack.serve("by-command")
    code, out, _ = run("by-command")
    assert (code, json.loads(out)["records"][0]["target"]) == (0, TARGET.name)
    assert list(own.glob("cuda-sm_90/*.json"))
    rack.serve("plain", "tvm.exec.rpc_server")
    code, _, said = run("plain")
    assert code == 3
    assert "a server for key 'plain' cannot measure: the server was not started by opcompile" in said


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_told_to_end_ends(rack: Rack, number: signal.Signals) -> None:
    server = rack.serve(f"told-{number}")
    (process,) = psutil.Process(server.pid).children()
    server.send_signal(number)
    assert server.wait() == 130
    psutil.wait_procs([process], timeout=60)
    assert not process.is_running()
