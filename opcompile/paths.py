"""Paths that a caller gives: Python's own errors would name neither the argument nor the way out."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from opcompile.errors import CallError


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
    return path


def discard(unfinished: Path) -> None:
    """Remove a file that was not finished; where that cannot be, the error that came before it says why."""
    with suppress(OSError):
        unfinished.unlink(missing_ok=True)
