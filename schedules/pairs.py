"""Two products of bfloat16 for each of 16 sums in one instruction, AVX512-BF16's ``vdpbf16ps``.

The sums are float32, and each takes its two products one after the other; ``docs/numerics.md`` says how they round.
A pair is two neighbouring bfloat16 in 32 bits. TVM has no type for bfloat16 in what it gives to LLVM, which wants one
here: the kernel calls a function in LLVM's own words, on whole numbers, and LLVM puts it where it is called.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

# How many sums one instruction adds to, and how many products to each.
LANES, PRODUCTS = 16, 2

_NAME = "opcompile_pairs"
_PAIRS = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define <16 x float> @{_NAME}(<16 x float> %sums, <16 x i32> %x, <16 x i32> %y) alwaysinline {{
  %a = bitcast <16 x i32> %x to <32 x bfloat>
  %b = bitcast <16 x i32> %y to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sums, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %r
}}
"""


def added(sums: Any, x: Any, y: Any) -> Any:
    """``sums`` with the products of two vectors of pairs; it is ``y`` that LLVM reads from memory or broadcasts."""
    return tirx.call_pure_extern(f"float32x{LANES}", _NAME, sums, x, y)


def narrowed(value: Any) -> Any:
    """A float32, or a vector of them, as bfloat16: TVM would round it by whole numbers, in seven instructions."""
    lanes = str(value.ty.dtype).removeprefix("float32")
    bits = tirx.call_pure_extern(f"uint16{lanes}", f"opcompile_narrow{lanes}", value)
    return tirx.reinterpret(f"bfloat16{lanes}", bits)


def _narrow(lanes: int) -> str:
    floats, halves, bits = (f"<{lanes} x {kind}>" if lanes > 1 else kind for kind in ("float", "bfloat", "i16"))
    return f"""
define {bits} @opcompile_narrow{f"x{lanes}" if lanes > 1 else ""}({floats} %value) alwaysinline {{
  %narrow = fptrunc {floats} %value to {halves}
  %bits = bitcast {halves} %narrow to {bits}
  ret {bits} %bits
}}
"""


# What LLVM needs for calls of `added` and `narrowed`.
FUNCTIONS = "".join([_PAIRS, *map(_narrow, range(1, LANES + 1))])
