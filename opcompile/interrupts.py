"""Signals that end a command, for those whom TVM hides them from: it makes exceptions without a name of them."""

from __future__ import annotations

# Their numbers, as they came.
seen: list[int] = []


def require_none() -> None:
    """Raise `KeyboardInterrupt` where a signal has come: what looks like a failure is none."""
    if seen:
        raise KeyboardInterrupt
