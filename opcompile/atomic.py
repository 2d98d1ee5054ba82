"""A directory that takes its place as a whole: nobody finds half of one there, and no file is lost that is not ours."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from opcompile.errors import ArtifactError
from opcompile.index import INDEX, LEFT_BY_BROWSERS
from opcompile.manifest import FORMAT, MANIFEST, identity
from opcompile.paths import read_file


def new_beside(place: Path) -> Path:
    """Make a directory on the same file system, with the permissions that the user's are made with."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    beside.mkdir()
    return beside


def require_room(place: Path) -> None:
    """Raise `OSError` where no directory can be made beside ``place``, whose parents need not be there yet.

    Nothing stays behind: not those parents either.
    """
    there = next((folder for folder in place.parents if folder.exists()), place)
    probe = there / f".{place.name}.{uuid.uuid4().hex}"
    probe.mkdir()
    probe.rmdir()


def require_replaceable(place: Path) -> None:
    """Raise `ArtifactError` if replacing ``place`` would lose a file that is not an artifact's, or where one works."""
    require_elsewhere(place)
    before, objection = identity(place), _objection(place)
    # another writer may put its own there while we look: then look again
    while objection and identity(place) != before:
        before, objection = identity(place), _objection(place)
    if objection:
        way_out = "empty it" if place.is_dir() else "remove that file"
        raise ArtifactError(f"{place} {objection}; {way_out}, or name another directory")


def require_elsewhere(place: Path) -> None:
    """Raise `ArtifactError` if ``place`` is the current directory: replaced, it would be gone for the shell in it."""
    require_outside(place)
    if place.exists() and place.samefile(os.curdir):
        raise ArtifactError(
            f"{place} is the current directory, and another takes its place as a whole; "
            "change to another one (cd ..), and name it from there"
        )


def require_outside(place: Path) -> None:
    """Raise `ArtifactError` if ``place`` is inside of an artifact, which holds its own files and no others."""
    for folder in place.resolve().parents:
        if _listed(folder):
            raise ArtifactError(f"{place} is inside of the artifact {folder}; name a place beside it")


def _listed(place: Path) -> set[str]:
    """Return the files that the manifest of an artifact lists; none where there is no such manifest."""
    try:
        manifest = json.loads(read_file(place / MANIFEST))
        return set(manifest["files"]) if manifest["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _objection(place: Path) -> str | None:
    """Say why ``place`` must not be replaced; None when it is missing, empty or an artifact."""
    try:
        present = {path.name for path in place.iterdir()}
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return f"{'is' if place.exists() else 'lies in'} a file, and an artifact is a directory"
    present -= LEFT_BY_BROWSERS
    if not present:
        return None
    if INDEX in present:
        return "holds the artifacts of a model"
    listed = _listed(place)
    if not listed:
        return "is not an artifact"
    foreign = sorted(present - listed - {MANIFEST})
    return f"holds {', '.join(foreign[:3])}, which no artifact wrote" if foreign else None


def put(beside: Path, place: Path, require: Callable[[Path], None] | None = None) -> None:
    """Make ``beside`` the directory at ``place``; what was there lies at ``beside`` then.

    ``require`` raises where what is there must not be replaced; by default, what is no artifact.

    Directories are exchanged in one step where the system can: nobody ever finds the place empty.
    Elsewhere the old one is moved away first; then the place is empty for an instant, which
    `runtime.load` waits out, and a writer that dies in it leaves the old one beside, whole.
    """
    while True:
        try:
            os.rename(beside, place)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        (require or require_replaceable)(place)
        try:
            if not _exchange(beside, place):
                _exchange_in_steps(beside, place, require)
            return
        except FileNotFoundError:
            if not beside.exists():
                raise
            # another writer was between its own two steps


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False where system or file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
    if hasattr(library, "renameat2"):
        status = library.renameat2(here, paths[0], here, paths[1], swap)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        status = library.renamex_np(*paths, swap)
    else:
        return False
    if status == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _exchange_in_steps(beside: Path, place: Path, require: Callable[[Path], None] | None) -> None:
    aside = place.with_name(f"{beside.name}.old")
    os.rename(place, aside)
    try:
        os.rename(beside, place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            os.rename(aside, place)
            raise
        # another writer filled the empty place: replace that one instead
        shutil.rmtree(aside, ignore_errors=True)
        put(beside, place, require)
        return
    os.rename(aside, beside)
