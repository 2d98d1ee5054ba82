"""A tuned result with its provenance: JSON, one file a layer and target.

A record says which tiles won, and everything needed to doubt it: all samples, versions, device,
seed, date, and the structural hash of the declaration it was measured on. A record that is corrupt,
or that was made for another layer, target or declaration, is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from opcompile.errors import RecordError
from opcompile.spec import ConvTranspose3d
from opcompile.target import Target

FORMAT = 1
FOLDER_VARIABLE = "OPCOMPILE_RECORDS"


@dataclass(frozen=True, slots=True)
class Record:
    """The winning tiles for one layer on one target, and how they won.

    ``samples`` holds every measured candidate: its tiles and its times in microseconds, or the
    error that kept it from being measured. ``run_us`` is the median of the winner.
    """

    spec: str
    target: str
    declaration: str
    tiles: dict[str, Any]
    run_us: float
    samples: list[dict[str, Any]]
    provenance: dict[str, Any]
    format: int = FORMAT

    @property
    def key(self) -> str:
        """The file name without its ending."""
        return key(self.spec)

    def why(self) -> tuple[str, ...]:
        """The argument in words, one line a fact."""
        measured = [s for s in self.samples if s.get("run_us")]
        return (
            f"the fastest of {len(measured)} measured candidates: {self.run_us:.1f} us, median",
            f"tuned on {self.provenance.get('device', 'an unnamed device')} on {self.provenance.get('date', '?')}",
        )

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def key(spec_text: str) -> str:
    """The name a layer's record goes by: the start of the SHA-256 of its text form."""
    return hashlib.sha256(spec_text.encode()).hexdigest()[:16]


def folders() -> list[Path]:
    """Where records are looked for: the directory in ``OPCOMPILE_RECORDS`` first, then the shipped ones."""
    shipped = Path(str(resources.files("schedules"))) / "records"
    own = os.environ.get(FOLDER_VARIABLE)
    return [Path(own), shipped] if own else [shipped]


def path_of(folder: Path, spec: ConvTranspose3d, target: Target) -> Path:
    """Where the record of ``spec`` on ``target`` stands in ``folder``."""
    return folder / target.name.replace(":", "-") / f"{key(str(spec))}.json"


def find_record(spec: ConvTranspose3d, target: Target) -> Record | None:
    """The record of ``spec`` on ``target``, or None where there is none. Raises `RecordError` for a bad one."""
    for folder in folders():
        path = path_of(folder, spec, target)
        if path.is_file():
            return read_record(path, spec, target)
    return None


def read_record(path: Path, spec: ConvTranspose3d, target: Target) -> Record:
    """Read one file and hold it against what it should be for. Raises `RecordError`."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        record = Record(**fields)
        sound = record.tiles["vector"] in ("channels", "row") and all(
            type(record.tiles[name]) is int and record.tiles[name] > 0
            for name in ("lanes", "vectors", "scalars", "rows", "task")
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise RecordError(f"record {path} cannot be read: {error}; delete it, or tune again") from error
    if not sound or len(record.tiles) != 6 or record.format != FORMAT:
        raise RecordError(f"record {path} has tiles {record.tiles} of format {record.format}; delete it, or tune again")
    for what, given, wanted in (("layer", record.spec, str(spec)), ("target", record.target, target.name)):
        if given != wanted:
            raise RecordError(f"record {path} is for {what} {given!r}, not {wanted!r}; delete it, or tune again")
    return record
