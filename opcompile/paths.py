"""Paths that a caller gives: Python's own errors would name neither the argument nor the way out."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from opcompile.errors import CallError, EngineError

# Several times what one layer's object takes.
_ROOM = 4 << 20


def checked_path(given: object, name: str) -> Path:
    """Return the argument ``name`` as a path. Raises `CallError` for what is none."""
    text = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(text, str):
        raise CallError(f"{name} is of type {type(given).__name__}, but must be a path: a str or a pathlib.Path")
    if not text:
        raise CallError(f"{name} is empty, but must name a path; the current directory is '.'")
    if "\0" in text:
        raise CallError(f"{name} is {text!r}, but no path has a zero byte in it; leave it out")
    path = Path(text)
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CallError(f"{name} is {text!r}, links that lead back to themselves; name another path") from error
        if error.errno == errno.ENAMETOOLONG:
            raise CallError(
                f"{name} is a path of {len(text)} characters, which is too long here, or a part of it is; "
                "name a shorter one"
            ) from error
    return path


def require_unread(place: Path, read: Iterable[str | os.PathLike[str]]) -> None:
    """Raise `CallError` where what takes ``place``, a file or a directory, would take the place of what is ``read``."""
    if not place.exists():
        return
    for given in map(Path, read):
        if given.exists() and any(place.samefile(path) for path in (given, *given.resolve().parents)):
            raise CallError(f"cannot write {place}: {given} is read, and would be lost; name another place")


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading. Raises `OSError`, for what is no regular file too: a pipe would wait for a writer."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_file(path: Path) -> bytes:
    """Return what is in a file. Raises `OSError` as `open_file` does."""
    with open_file(path) as file:
        return file.read()


@contextmanager
def scratch() -> Iterator[Path]:
    """Lend a folder for files that are removed again, with room for what a compiler writes.

    LLVM would end the process where it has none. Raises `EngineError`.
    """
    try:
        lent = tempfile.TemporaryDirectory(prefix="opcompile-")
    except OSError as error:
        raise EngineError(f"{error.strerror or error}; make room, or set TMPDIR to another folder") from error
    with lent as name:
        room = Path(name) / "room"
        try:
            room.write_bytes(bytes(_ROOM))
        except OSError as error:
            raise EngineError(
                f"a temporary file could not be written: {error.strerror}; make room in {Path(name).parent}, or set "
                "TMPDIR to another folder"
            ) from error
        room.unlink()
        yield Path(name)


def discard(unfinished: Path) -> None:
    """Remove a file that was not finished; where that cannot be, the error that came before it says why."""
    with suppress(OSError):
        unfinished.unlink(missing_ok=True)
