"""What LLVM is told of a kernel: functions in its own words, for what TVM cannot say, and which pass to leave out."""

from __future__ import annotations

import tvm
from tvm import tirx

# An attribute of a function whose addresses LLVM computes where they are needed, without the pass that would give each
# a register of its own (loop strength reduction).
WITHOUT_LSR = "opcompile.without_lsr"


def importing(body: tirx.Stmt, functions: str) -> tirx.Stmt:
    """``body``, which calls ``functions``, with their text; LLVM puts them where they are called."""
    return tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(functions), body)
