"""The directory that `replace` writes: whole, or not at all, and never over files of others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opcompile.artifact import new_beside, put
from opcompile.errors import ArtifactError
from opcompile.replace.report import FORMAT

REPORT = "report.json"
LIBRARY = "opcompile_ops.so"


def require_place(place: Path) -> None:
    """Raise `ArtifactError` where ``place`` cannot be written, or must not be: before long work, not after it."""
    _beside(place.resolve()).rmdir()


def _beside(place: Path) -> Path:
    require_replaceable(place)
    try:
        return new_beside(place)
    except OSError as error:
        raise ArtifactError(f"cannot write {place}: {error.strerror or error}; name a directory of yours") from error


@contextmanager
def written(place: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``place`` when the block ends well. Raises `ArtifactError`."""
    place = place.resolve()
    beside = _beside(place)
    try:
        yield beside
        put(beside, place, require_replaceable)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def require_replaceable(place: Path) -> None:
    """Raise `ArtifactError` if replacing ``place`` would lose a file that `replace` has not written."""
    if not place.exists():
        return
    if not place.is_dir():
        raise ArtifactError(f"{place} is a file, and a model is replaced into a directory; name another place")
    present = {str(path.relative_to(place)) for path in place.rglob("*") if not path.is_dir()}
    if not present:
        return
    try:
        report = json.loads((place / REPORT).read_bytes())
        ours = {REPORT, *report["files"]} if report["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    foreign = sorted(present - ours)
    if foreign:
        raise ArtifactError(
            f"{place} holds {', '.join(foreign[:3])}, which replace has not written; empty it, or name another place"
        )
