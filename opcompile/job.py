"""Candidates that are to be timed on another machine: one directory, an artifact for each, and a file that lists them.

=======================  ===============================================================================
``job.json``             target, seed, versions, and of each layer its candidates (`Candidate`)
``<key>/<rank>``         the artifact of one candidate; the layer's key is that of its record
=======================  ===============================================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opcompile.errors import ArtifactError, RecordError
from opcompile.record import key, read_object

FORMAT = 1
JOB = "job.json"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One choice of tiles: its ``rank`` by arithmetic, and the structural hash of its ``declaration``.

    ``sha256`` is that of its artifact's manifest, which holds those of all its files; where there is no artifact,
    ``error`` says why.
    """

    rank: int
    tiles: dict[str, Any]
    declaration: str
    sha256: str
    error: str


@dataclass(frozen=True, slots=True)
class LayerJob:
    """The candidates of one layer, in the order in which they are measured; the baseline, rank 0, is the first."""

    spec: str
    candidates: tuple[Candidate, ...]

    @property
    def directory(self) -> str:
        """Where its artifacts are, inside of the job's directory."""
        return key(self.spec)

    @property
    def choices(self) -> dict[int, dict[str, Any]]:
        """The tiles of each rank."""
        return {c.rank: c.tiles for c in self.candidates}

    @property
    def unbuilt(self) -> dict[int, str]:
        """The ranks without an artifact, and why."""
        return {c.rank: c.error for c in self.candidates if c.error}


@dataclass(frozen=True, slots=True)
class Job:
    """All of it: ``made`` is what the candidates depend on besides the layers, versions among it."""

    target: str
    seed: int
    made: dict[str, str]
    layers: tuple[LayerJob, ...]
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    @property
    def digest(self) -> str:
        """SHA-256 of all that it says."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_json(cls, content: Any, where: Path) -> Job:
        """Read what `to_json` wrote. Raises `ArtifactError`."""
        try:
            if content["format"] != FORMAT:
                raise ArtifactError(
                    f"{where} is of format {content['format']!r}, and this version reads format {FORMAT}; emit it again"
                )
            layers = tuple(
                LayerJob(_is(layer["spec"], str), tuple(_candidate(c) for c in layer["candidates"]))
                for layer in content["layers"]
            )
            made = {str(name): _is(value, str) for name, value in content["made"].items()}
            return cls(_is(content["target"], str), _is(content["seed"], int), made, layers)
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{where} is no list of candidates: {error!r}; emit it again") from None

    @classmethod
    def read(cls, directory: Path) -> Job:
        """Read ``job.json`` of a directory. Raises `ArtifactError`."""
        where = directory / JOB
        if not where.is_file():
            raise ArtifactError(f"{directory} has no {JOB}; name a directory that `opcompile tune --emit` finished")
        try:
            return cls.from_json(read_object(where, "list of candidates", "emit it again"), where)
        except RecordError as error:
            raise ArtifactError(str(error)) from None


def _candidate(content: Mapping[str, Any]) -> Candidate:
    words = (_is(content[name], str) for name in ("declaration", "sha256", "error"))
    if _is(content["rank"], int) < 0:
        raise TypeError(f"{content['rank']} is no rank")
    return Candidate(content["rank"], _is(content["tiles"], dict), *words)


def _is(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
