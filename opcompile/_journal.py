"""What tuning has measured so far, on the disk: one line of JSON a measurement.

The first line says what makes the times comparable; a journal of something else is refused. A line
is on the disk before the next measurement starts. Whoever is killed while writing one leaves half a
line at the end, which the next run drops: that measurement was not finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opcompile.errors import RecordError, TargetError
from opcompile.record import unsound
from opcompile.trials import CandidateFailed, Sample, finalists

_FIRST = b'{"header": '
_WAY_OUT = "give another work_dir (--work-dir), or delete this one to start afresh"


@dataclass(slots=True)
class Journal:
    """The measurements of one run, in the order they were finished.

    ``choices`` are the tiles of each rank. ``samples`` are candidates, failed ones included, as in
    `opcompile.record.Record`; ``finals`` is the last round of finals, if there was one.
    """

    path: Path
    choices: Mapping[int, dict[str, Any]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    finals: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any], choices: Mapping[int, dict[str, Any]]) -> Journal:
        """Read ``path``, or begin it. Raises `RecordError` for a journal of something else, or a corrupt one."""
        whole = path.read_bytes() if path.exists() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        lines = [_object(path, number, line) for number, line in enumerate(kept.splitlines(), 1)]
        if lines or not whole.startswith(_FIRST[: len(whole)]):
            _require_same(path, lines[0].get("header") if lines else None, header)
        journal = cls(path, choices)
        for number, line in enumerate(lines[1:], 2):
            journal._take(number, line)
        if kept != whole:
            os.truncate(path, len(kept))
        if not lines:
            journal._append({"header": dict(header)})
        return journal

    def _take(self, number: int, line: dict[str, Any]) -> None:
        taken = line.get("finals", [line.get("sample")])
        if len(line) != 1 or not isinstance(taken, list) or not all(self._is_sample(sample) for sample in taken):
            raise RecordError(f"{self.path}, line {number}: {str(line)[:80]!r} is no measurement; {_WAY_OUT}")
        if "finals" in line:
            self.finals = taken
        else:
            self.samples += taken

    def _is_sample(self, sample: Any) -> bool:
        if unsound(sample) is not None or type(sample.get("rank")) is not int:
            return False
        return bool(self.choices.get(sample["rank"]) == sample["tiles"])

    def add(self, sample: dict[str, Any]) -> None:
        """Write down a candidate's measurement."""
        self.samples.append(sample)
        self._append({"sample": sample})

    def decide(self, report: Callable[[str], None], measured: Callable[[list[int]], list[Sample]]) -> list[Sample]:
        """Return the finals of the fastest few: those that it holds, or what ``measured`` gives for these ranks.

        Raises `TargetError` where they failed.
        """
        ranks = finalists(self.samples)
        if [s["rank"] for s in self.finals] == ranks:
            return self.finals
        report("finals")
        try:
            self.finals = measured(ranks)
        except CandidateFailed as failure:
            raise TargetError(
                f"the finals failed: {failure}; start again to repeat them, the other measurements are kept"
            ) from failure
        self._append({"finals": self.finals})
        return self.finals

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}, line {number} is not JSON: {error}; {_WAY_OUT}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{path}, line {number} holds a {type(value).__name__}, not an object; {_WAY_OUT}")
    return value


def _require_same(path: Path, given: object, wanted: Mapping[str, Any]) -> None:
    if not isinstance(given, dict):
        raise RecordError(f"{path} is not a journal of measurements: its first line has no header; {_WAY_OUT}")
    for name, value in wanted.items():
        if given.get(name) != value:
            raise RecordError(f"{path} holds measurements for {name} {given.get(name)!r}, not {value!r}; {_WAY_OUT}")
