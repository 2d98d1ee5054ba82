"""(spec, target, budget) -> record, by MetaSchedule, locally or over TVM's RPC tracker."""

from __future__ import annotations


def tune() -> None:
    """Not written yet."""
    raise NotImplementedError
