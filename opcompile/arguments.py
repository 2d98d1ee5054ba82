"""Arguments that a caller gives: Python's own errors would name neither the argument, nor the rule, nor the way out."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable
from numbers import Real
from typing import TypeVar

import numpy as np

from opcompile.errors import CallError, SpecError

T = TypeVar("T")


def checked_list(given: Iterable[T], name: str) -> tuple[T, ...]:
    """Return what the argument ``name`` yields. Raises `CallError` for what yields nothing, and for one text."""
    # an array without axes is an Iterable that cannot be iterated
    if isinstance(given, str | bytes) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
        raise CallError(f"{name} is of type {type(given).__name__}, but must be a list; put it into one")
    return tuple(given)


def checked_engines(given: Iterable[str], name: str, known: Collection[str]) -> tuple[str, ...]:
    """Return the engines that the argument ``name`` yields. Raises `CallError` for one not ``known``."""
    engines = checked_list(given, name)
    for engine in engines:
        if engine not in known:
            raise CallError(f"engine {str(engine)!r} is unknown here; choose among {', '.join(known)}")
    return engines


def checked_flag(given: object, name: str) -> bool:
    """Return the argument ``name``. Raises `CallError` for what is neither True nor False."""
    if not isinstance(given, bool | np.bool_):
        raise CallError(f"{name} is {given!r}, but must be True or False")
    return bool(given)


def checked_seed(given: object) -> int:
    """Return the seed. Raises `CallError` for what is no whole number of at least 0."""
    try:
        seed = -1 if isinstance(given, bool) else operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        seed = -1
    if seed < 0:
        raise CallError(f"seed is {given!r}, but must be a whole number of at least 0")
    return seed


def checked_seconds(given: object) -> float:
    """Return the time to take. Raises `CallError` for what is no finite number of at least 0."""
    if isinstance(given, bool) or not isinstance(given, Real) or not 0 <= float(given) < math.inf:
        raise CallError(f"seconds is {given!r}, but must be a number of at least 0")
    return float(given)


def require_trials(given: object) -> None:
    """Raise `SpecError` for a budget that is no whole number of at least 1."""
    if type(given) is not int or given < 1:
        raise SpecError(f"trials is {given!r}, but must be a whole number of at least 1")


def require_progress(given: object) -> None:
    """Raise `CallError` where ``progress`` is given and cannot be called."""
    if given is not None and not callable(given):
        raise CallError(f"progress is of type {type(given).__name__}, but must be a function, or None")
