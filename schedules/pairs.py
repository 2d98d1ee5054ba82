"""Two products of bfloat16 for each of 16 sums in one instruction, AVX512-BF16's ``vdpbf16ps``.

The sums are float32, and each takes its two products one after the other; ``docs/numerics.md`` says how they round.
A pair is two neighbouring bfloat16 in 32 bits. TVM has no type for bfloat16 in what it gives to LLVM, which wants one
here: the kernel calls a function in LLVM's own words, on whole numbers, and LLVM puts it where it is called.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

# How many sums one instruction adds to, and how many products to each.
LANES, PRODUCTS = 16, 2

_NAME = "opcompile_pairs"
_FUNCTION = f"""
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


def importing(body: tirx.Stmt) -> tirx.Stmt:
    """``body``, which holds calls of `added`, with what LLVM needs for them."""
    return tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(_FUNCTION), body)
