"""What `replace` concludes, from times that are made up: slower is what is seen so each time, on quiet processors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from opcompile import machine
from opcompile.bench import Timing
from opcompile.replace import prove
from opcompile.replace.report import Speed

EQUAL, SLOWER, FASTER = (1.0,) * 20, (0.9,) * 20, (1.1,) * 20
# half of the rounds far above, half far below
NOISY = (0.5, 1.5) * 10


def raced(monkeypatch: pytest.MonkeyPatch, series: Sequence[Sequence[float]], others: float = 0.0) -> tuple[Speed, int]:
    """Time one model whose timings have these ratios, one after the other; return how many were taken, too."""
    left = list(series)

    def take_turns(engines: dict[str, Any], seconds: float) -> tuple[Timing, Timing]:
        ratios = left.pop(0)
        return Timing("opcompile", "1", 1, (1.0,) * len(ratios)), Timing("onnxruntime", "1", 1, tuple(ratios))

    class Session:
        def __init__(self, *_: object) -> None: ...

        def writes_again(self, feeds: object) -> bool:
            return True

        def runner(self, feeds: object, again: bool) -> None: ...

    monkeypatch.setattr(prove, "Session", Session)
    monkeypatch.setattr(prove, "take_turns", take_turns)
    monkeypatch.setattr(prove, "beside_others", lambda processors, work: (work(), others))
    speeds = prove.race_models(Path("stock.onnx"), Path("ours.onnx"), Path("ops.so"), {}, [1], 0.0)
    return speeds[0], len(series) - len(left)


@pytest.mark.parametrize(
    ("series", "others", "verdict", "taken"),
    [
        ([SLOWER, SLOWER, SLOWER, EQUAL], 0.0, "slower", 3),
        ([SLOWER, EQUAL, SLOWER], 0.0, "no difference seen", 2),
        ([SLOWER, SLOWER, NOISY], 0.0, "too noisy", 3),
        ([SLOWER, FASTER], 0.0, "faster", 2),
        ([FASTER, SLOWER], 0.0, "faster", 1),
        ([NOISY, SLOWER], 0.0, "too noisy", 1),
        ([SLOWER, SLOWER], 0.3, "too noisy", 1),
        ([FASTER, SLOWER], 0.3, "faster", 1),
        ([SLOWER, SLOWER, SLOWER], 0.05, "slower", 3),
    ],
)
def test_slower_is_what_is_seen_so_each_time(
    series: Sequence[Sequence[float]], others: float, verdict: str, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed, count = raced(monkeypatch, series, others)
    assert (speed.verdict, speed.to_json()["verdict"], speed.others, count) == (verdict, verdict, others, taken)


def test_what_others_had_of_the_processors_is_what_we_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # user, nice, system, idle, iowait, irq, softirq, steal, and the guests, which user has already
    before = "cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 100 0 0 1000 7 0 0 0 0 0\ncpu1 100 0 0 1000 7 0 0 0 0 0\nintr 1 2\n"
    after = "cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 180 5 5 1100 9 5 3 2 9 0\ncpu1 900 0 0 1000 7 0 0 0 0 0\nintr 1 2\n"
    stat, clocks = tmp_path / "stat", iter([10.0, 12.0])
    own = iter([5.0, 5.6])
    stat.write_text(before)
    monkeypatch.setattr(machine, "_STAT", stat)
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clocks))
    monkeypatch.setattr(time, "process_time", lambda: next(own))
    # processor 0 worked for a second of two, 0.6 s of it for us
    result, others = machine.beside_others([0], lambda: stat.write_text(after) and "done")
    assert (result, round(others, 6)) == ("done", 0.2)


def test_where_the_system_does_not_tell_nobody_else_had_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_STAT", tmp_path / "none")
    assert machine.beside_others([0, 1], lambda: 7) == (7, 0.0)
    assert machine.beside_others([], lambda: 7) == (7, 0.0)
