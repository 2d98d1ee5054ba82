"""The directory that `replace` writes: whole, or not at all, and never over files of others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from opcompile.atomic import new_beside, put, require_elsewhere, require_room
from opcompile.errors import ArtifactError
from opcompile.paths import read_file
from opcompile.replace.report import FORMAT

REPORT = "report.json"
LIBRARY = "opcompile_ops.so"


def require_place(place: Path) -> None:
    """Raise `ArtifactError` where ``place`` cannot be written, or must not be: before long work, not after it."""
    place = place.resolve()
    require_replaceable(place)
    with _said(place):
        require_room(place)


@contextmanager
def _said(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"cannot write {place}: {error.strerror or error}; name a directory of yours, on a disk with space"
        ) from error


@contextmanager
def written(place: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``place`` when the block ends well. Raises `ArtifactError`."""
    place = place.resolve()
    require_replaceable(place)
    with _said(place):
        beside = new_beside(place)
        try:
            yield beside
            put(beside, place, require_replaceable)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def require_replaceable(place: Path) -> None:
    """Raise `ArtifactError` if replacing ``place`` would lose a file that `replace` has not written."""
    require_elsewhere(place)
    if not place.exists():
        return
    if not place.is_dir():
        raise ArtifactError(f"{place} is a file, and a model is replaced into a directory; name another place")
    try:
        report = json.loads(read_file(place / REPORT))
        ours = {REPORT, *report["files"]} if report["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if foreign := sorted(islice((name for name in _held(place) if name not in ours), 3)):
        raise ArtifactError(
            f"{place} holds {', '.join(foreign)}, which replace has not written; empty it, or name another place"
        )


def _held(place: Path) -> Iterator[str]:
    """Yield what is in ``place``, one by one: it may be somebody's whole disk. A folder counts where it is closed."""
    closed: list[OSError] = []
    for folder, inner, files in os.walk(place, onerror=closed.append):
        links = [name for name in inner if os.path.islink(os.path.join(folder, name))]
        yield from (os.path.relpath(os.path.join(folder, name), place) for name in (*files, *links))
    yield from (os.path.relpath(error.filename, place) for error in closed)
