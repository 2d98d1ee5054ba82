"""Signals that end a command, for those whom TVM hides them from: it makes exceptions without a name of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Their numbers, as they came.
seen: list[int] = []


class Interrupted(KeyboardInterrupt):
    """A signal came. Of the class itself Python may take notice, and end by SIGINT whatever the signal was."""


def require_none() -> None:
    """Raise `Interrupted` where a signal has come: what looks like a failure is none."""
    if seen:
        raise Interrupted


# How many are at what must not be left half done.
_finishing: list[object] = []


def note(number: int) -> None:
    """Raise `Interrupted` for the first signal: one that comes while that one ends the command changes nothing.

    TVM's pool of processes holds a lock while it ends, and would wait for it forever if it were kept from that.
    """
    seen.append(number)
    if len(seen) == 1 and not _finishing:
        raise Interrupted


@contextmanager
def finishing() -> Iterator[None]:
    """Do what is inside whole; where a first signal came meanwhile, `Interrupted` is raised at the end of it."""
    before = len(seen)
    _finishing.append(None)
    try:
        yield
    finally:
        _finishing.pop()
    if not before:
        require_none()
