"""TVM's schedule as it is called here: without its look at the type of each argument of each move.

That took a quarter of the time of scheduling, and what is wrong with a move is said by the move itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir.schedule import _ffi_api


class Schedule(s_tir.Schedule):  # type: ignore[misc]
    """`tvm.s_tir.Schedule`, its moves taken out of what checks them."""


for _name, _move in vars(s_tir.Schedule).items():
    if isinstance(_move, FunctionType) and hasattr(_move, "__wrapped__"):
        setattr(Schedule, _name, _move.__wrapped__)


def claim(sch: s_tir.Schedule, block: Any, read: int, spans: Sequence[tuple[Any, Any]]) -> None:
    """Say that ``block`` reads ``spans`` (first and end of each axis) of its operand number ``read``."""
    claimed = tirx.IndexMap(
        initial_indices=[v.var for v in sch.get(block).iter_vars],
        final_indices=[end for span in spans for end in span],
        inverse_index_map=None,
    )
    # the Python method demands as many ranges as the block has iterators; the function below it does not
    _ffi_api.ScheduleAnnotateBufferAccess(sch, block, read, 0, claimed)
