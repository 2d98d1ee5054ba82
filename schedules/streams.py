"""Y written past the caches, where nothing will find it there: a store that brings no line first.

A store into the caches reads its line before it changes it, and drives another one out. A streamed one is for whole
lines, and for Y that begins at one: elsewhere, as the address says at run time, Y is stored as ever, and asked for
early. TVM has no such store.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from schedules.rules import MOST_WOVEN
from schedules.tiles import CACHE_LINE

# float32 elements of a cache line.
_A_LINE = CACHE_LINE // 4
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
    """Store a float32 vector that fills whole lines, past the caches where it begins at one; others as they are."""
    *others, last = store.indices
    if not isinstance(last, tirx.Ramp) or int(last.lanes) % _A_LINE:
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


def _streamed(lanes: int) -> str:
    return f"""
define void @opcompile_streamed_x{lanes}(ptr %y, <{lanes} x float> %value) alwaysinline {{{_ALIGNED}
  br i1 %aligned, label %past, label %into
past:
  store <{lanes} x float> %value, ptr %y, align {CACHE_LINE}, !nontemporal !{{i32 1}}
  ret void
into:
  store <{lanes} x float> %value, ptr %y, align 4
  ret void
}}
"""


# What LLVM needs for calls of `streamed`, `asked` and `arrived`.
FUNCTIONS = _ASKED + "".join(map(_streamed, range(_A_LINE, _A_LINE * MOST_WOVEN + 1, _A_LINE)))
