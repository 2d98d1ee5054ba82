"""Arguments that a caller gives: Python's own errors would name neither the argument, nor the rule, nor the way out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opcompile.errors import CallError


def checked_list(given: object, name: str) -> Sequence[object]:
    """Return the argument ``name`` as it is. Raises `CallError` for what is no list, like one text."""
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise CallError(f"{name} is of type {type(given).__name__}, but must be a list; put it into one")
    return given


def checked_flag(given: object, name: str) -> bool:
    """Return the argument ``name``. Raises `CallError` for what is neither True nor False."""
    if not isinstance(given, bool):
        raise CallError(f"{name} is {given!r}, but must be True or False")
    return given


def checked_seed(given: object) -> int:
    """Return the seed. Raises `CallError` for what is no whole number of at least 0."""
    if type(given) is not int or given < 0:
        raise CallError(f"seed is {given!r}, but must be a whole number of at least 0")
    return given


def checked_seconds(given: object) -> float:
    """Return the time to take. Raises `CallError` for what is no finite number of at least 0."""
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < math.inf:
        raise CallError(f"seconds is {given!r}, but must be a number of at least 0")
    return given


def checked_callback(given: object, name: str) -> None:
    """Raise `CallError` where the argument ``name`` is given and cannot be called."""
    if given is not None and not callable(given):
        raise CallError(f"{name} is of type {type(given).__name__}, but must be a function, or None")
