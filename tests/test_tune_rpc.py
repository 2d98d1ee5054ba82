"""Tuning over a real RPC tracker with two real servers on loopback, one of which dies half-way."""

from __future__ import annotations

import importlib
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import until

from opcompile import farm as farming
from opcompile.errors import TargetError
from opcompile.farm import Farm
from opcompile.record import find_record
from opcompile.spec import ConvTranspose3d
from opcompile.target import target
from opcompile.trials import Progress
from opcompile.tune import tune
from schedules import llvm

# the package's attribute of this name is the function
tuning = importlib.import_module("opcompile.tune")

SPEC = ConvTranspose3d.parse("in=1x2x2x3x4 co=3 k=1")
KEY = "board"

pytestmark = pytest.mark.heavy
TRIALS = 4


@dataclass
class Rack:
    """A tracker and its servers, as processes of their own."""

    tracker: Any
    servers: list[Any]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.tracker.port}"


@pytest.fixture(scope="module")
def farm() -> Iterator[Rack]:
    from tvm.rpc import Server
    from tvm.rpc.tracker import Tracker

    # where no server of another run looks for the tracker that it lost
    tracker = Tracker("127.0.0.1", port=19190 + os.getpid() % 700, port_end=19990, silent=True)
    at = ("127.0.0.1", tracker.port)
    with ThreadPoolExecutor() as both:
        starting = [
            both.submit(Server, "127.0.0.1", port, port + 800, tracker_addr=at, key=KEY, silent=True)
            for port in (20190, 21190)
        ]
    servers = [server.result() for server in starting]
    yield Rack(tracker, servers)
    for process in (*servers, tracker):
        process.terminate()


def kill_one_at_work(farm: Rack) -> None:
    """End the server that begins the next measurement as a power cut would: in the middle, without a word."""
    sessions = {server: psutil.Process(server.proc._proc.pid) for server in farm.servers}
    old = {child for process in sessions.values() for child in process.children()}
    busy: list[Any] = []

    def found() -> bool:
        busy.extend(server for server, process in sessions.items() if set(process.children()) - old)
        return bool(busy)

    until(found, "another measurement")
    main = sessions[busy[0]]
    for process in [*main.children(recursive=True), main]:
        process.kill()
    farm.servers.remove(busy[0])


def servers_listed(farm: Rack) -> int:
    try:
        return Farm("127.0.0.1", farm.tracker.port, KEY).servers()
    except TargetError:
        return 0


@pytest.fixture
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same directory for all tests of this file."""
    return tmp_path_factory.getbasetemp() / "farmed-out"


def test_a_server_that_dies_half_way_loses_nothing(
    farm: Rack, work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPCOMPILE_RECORDS", str(tmp_path))
    monkeypatch.setattr(tuning, "SAMPLE_MS", 50)  # so that a measurement lasts until its server is killed
    until(lambda: servers_listed(farm) == 2, "two servers")
    answers, run = [], tuning._run

    def watched(job: dict[str, Any]) -> Any:
        answer = run(job)
        answers.append(answer.get("failed", "measured"))
        return answer

    monkeypatch.setattr(tuning, "_run", watched)
    steps: list[Progress] = []
    killer = threading.Thread(target=kill_one_at_work, args=[farm])

    def kill_half_way(progress: Progress) -> None:
        steps.append(progress)
        if progress.done == 1:
            killer.start()

    made = tune(SPEC, trials=TRIALS, tracker=farm.address, key=KEY, work_dir=work_dir, progress=kill_half_way, seed=3)
    killer.join()
    assert servers_listed(farm) == 1
    assert answers.count("connection") == 1  # the one in flight
    assert answers.count("measured") == TRIALS + 1  # every trial, and the finals
    assert all(s["run_us"] > 0 and "error" not in s for s in made.samples)
    assert len({s["rank"] for s in made.samples}) == len(made.samples) == TRIALS
    assert steps[-1] == Progress(TRIALS, TRIALS, 0, min(s["run_us"] for s in made.samples), "done")
    assert find_record(SPEC, target("llvm")) == made
    assert "by RPC, key board" in made.provenance["device"]
    assert {s["device"] for s in (*made.samples, *made.finals)} == {made.provenance["device"]}


def test_no_server_left_is_said_and_what_was_measured_is_kept(
    farm: Rack, work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPCOMPILE_RECORDS", str(tmp_path))
    monkeypatch.setattr(tuning, "SAMPLE_MS", 50)
    monkeypatch.setattr("opcompile.farm._QUEUE_S", 2)
    before = (work_dir / "journal.jsonl").read_text()

    def kill_the_other(progress: Progress) -> None:
        if progress.step == "measure" and progress.done == TRIALS:
            farm.servers[0].terminate()

    with pytest.raises(TargetError, match=r"has no server for key 'board'; it has no server at all; start one"):
        tune(
            SPEC, "llvm", TRIALS + 1, tracker=farm.address, key=KEY, work_dir=work_dir, progress=kill_the_other, seed=3
        )
    assert (work_dir / "journal.jsonl").read_text() == before


# --- how often, and how long: on answers that are made up ---


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    tiles = [e.tiles for e in llvm.candidates(SPEC, target("llvm").machine)]
    return tuning._Bench(SPEC, target("llvm"), tuning._Site(Farm("127.0.0.1", 1, KEY), 1), tiles, tmp_path)


def answering(monkeypatch: pytest.MonkeyPatch, *answers: dict[str, Any]) -> list[dict[str, Any]]:
    """Let measurements answer so, in this order; what is left of them at the end."""
    left = list(answers)
    monkeypatch.setattr(tuning, "_run", lambda job: left.pop(0))
    return left


BROKEN = {"failed": "connection", "error": "gone"}
BUSY = {"failed": "queue", "error": "timed out"}
MEASURED = {"times_us": [[1.0]], "device": "a board"}


def test_a_connection_may_break_twice_but_not_three_times(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built = [tuning._Built(0, "kernel.so", "")]
    left = answering(monkeypatch, BROKEN, BROKEN, MEASURED)
    assert bench.in_turns(built, 1) == ([[1.0]], "a board, by RPC, key board")
    assert not left
    left = answering(monkeypatch, BROKEN, BROKEN, BROKEN, MEASURED)
    sample = bench._measure_one(*built)
    assert sample["error"] == "the connection broke 3 times: gone"
    assert left == [MEASURED]


def test_waiting_for_a_free_server_ends(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built = [tuning._Built(0, "kernel.so", "")]
    monkeypatch.setattr(Farm, "servers", lambda _: 2)
    monkeypatch.setattr("opcompile.farm._FREE_S", 3 * farming._QUEUE_S)
    answering(monkeypatch, BUSY, BUSY, MEASURED)
    assert bench.in_turns(built, 1)[0] == [[1.0]]
    answering(monkeypatch, BUSY, BUSY, BUSY, MEASURED)
    with pytest.raises(TargetError, match="none of the 2 servers for key 'board' was free in 60 s"):
        bench.in_turns(built, 1)


def test_waiting_where_no_server_is_left_ends_at_once(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, BUSY, MEASURED)
    with pytest.raises(TargetError, match="does not answer"):
        bench.in_turns([tuning._Built(0, "kernel.so", "")], 1)


@pytest.mark.parametrize(
    ("said", "whose"),
    [("RPCSessionTimeoutError: Your 1s session has expired", "candidate"), ("connection reset by peer", "connection")],
)
def test_a_session_that_its_server_ended_at_its_limit_did_not_break(
    said: str, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either way the server answers no more; the first would take as long again."""
    from tvm import rpc

    def end(*_: object) -> dict[str, Any]:
        raise RuntimeError(said)

    monkeypatch.setattr(farming, "_ask_tracker", lambda *_: ("127.0.0.1", 1, "key"))
    monkeypatch.setattr(rpc, "connect", lambda *_, session_timeout: object())
    found = farming.in_session({"tracker": ["127.0.0.1", 1, KEY], "queue_s": 1, "session_s": 1}, end)
    assert found == {"failed": whose, "error": f"RuntimeError: {said}"}


# --- what is wrong with the farm is said at once ---


def test_a_key_without_servers_is_refused(farm: Rack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_Bench", None)  # before anything is built
    with pytest.raises(TargetError, match=r"has no server for key 'other'; .*--key other"):
        tune(SPEC, "llvm", 1, tracker=farm.address, key="other")


def test_a_tracker_that_is_not_there_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(TargetError, match=rf"the RPC tracker {address} does not answer \(.*refused\); start one"):
            tune(SPEC, "llvm", 1, tracker=address, key=KEY)


def test_a_tracker_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opcompile.farm._ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TargetError, match=rf"the RPC tracker {address} does not answer \(timed out\)"):
            tune(SPEC, "llvm", 1, tracker=address, key=KEY)


@pytest.mark.parametrize("address", ["", "host", ":9190", "host:", "host:x", "host:0", "host:65536"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(TargetError, match=r"is not of the form HOST:PORT"):
        tune(SPEC, "llvm", 1, tracker=address, key=KEY)


def test_tracker_and_key_go_together() -> None:
    with pytest.raises(TargetError, match="a tracker and a key go together"):
        tune(SPEC, "llvm", 1, tracker="127.0.0.1:9190")
    with pytest.raises(TargetError, match="a tracker and a key go together"):
        tune(SPEC, "llvm", 1, key=KEY)
