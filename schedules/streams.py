"""Y written past the caches, where nothing will find it there: a store that brings no line first.

A store into the caches reads its line before it changes it, and drives another one out. A streamed one is for whole
lines, and for Y that begins at one: elsewhere, as the address says at run time, Y is stored as ever, and asked for
early. TVM has no such store.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

from schedules.tiles import CACHE_LINE

_TYPES = {"float64": "double", "float32": "float"}
_ALIGNED = f"""
  %at = ptrtoint ptr %y to i64
  %beside = and i64 %at, {CACHE_LINE - 1}
  %aligned = icmp eq i64 %beside, 0
"""
_ASKED = f"""
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare void @llvm.x86.sse.sfence()

define void @opcompile_asked(ptr %y, ptr %line) alwaysinline {{{_ALIGNED}
  br i1 %aligned, label %done, label %ask
ask:
  call void @llvm.prefetch.p0(ptr %line, i32 0, i32 2, i32 1)
  br label %done
done:
  ret void
}}

define void @opcompile_arrived() alwaysinline {{
  call void @llvm.x86.sse.sfence()
  ret void
}}
"""


def streamed(store: tirx.BufferStore) -> tirx.Stmt:
    """Store a vector that fills whole lines, past the caches where it begins at one; other stores as they are."""
    *others, last = store.indices
    if not isinstance(last, tirx.Ramp) or int(last.lanes) % _a_line(store.buffer):
        return store
    first = tirx.address_of(tirx.BufferLoad(store.buffer, [*others, last.base]))
    return tirx.Evaluate(tirx.call_extern("void", f"opcompile_streamed_x{int(last.lanes)}", first, store.value))


def asked(at: Any) -> tirx.Stmt:
    """Ask for the line of the element ``at`` of Y into the second cache, where Y is not streamed."""
    begin = tirx.BufferLoad(at.source, [tirx.const(0, i.ty.dtype) for i in at.indices])
    return tirx.Evaluate(tirx.call_extern("void", "opcompile_asked", *map(tirx.address_of, (begin, at))))


def arrived() -> tirx.Stmt:
    """Wait until others can read what was streamed."""
    return tirx.Evaluate(tirx.call_extern("void", "opcompile_arrived"))


def functions(y: Any, most: int) -> str:
    """What LLVM needs for vectors of ``y`` of up to ``most`` elements."""
    a_line = _a_line(y)
    return _ASKED + "".join(_streamed(str(y.dtype), lanes) for lanes in range(a_line, most + 1, a_line))


def _a_line(y: Any) -> int:
    return CACHE_LINE // (int(tvm.DataType(y.dtype).bits) // 8)


def _streamed(dtype: str, lanes: int) -> str:
    vector = f"<{lanes} x {_TYPES[dtype]}>"
    return f"""
define void @opcompile_streamed_x{lanes}(ptr %y, {vector} %value) alwaysinline {{{_ALIGNED}
  br i1 %aligned, label %past, label %into
past:
  store {vector} %value, ptr %y, align {CACHE_LINE}, !nontemporal !{{i32 1}}
  ret void
into:
  store {vector} %value, ptr %y, align {tvm.DataType(dtype).bits // 8}
  ret void
}}
"""
