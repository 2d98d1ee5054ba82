"""Functions in LLVM's own words, for what TVM cannot say; LLVM puts them where a kernel calls them."""

from __future__ import annotations

import tvm
from tvm import tirx


def importing(body: tirx.Stmt, functions: str) -> tirx.Stmt:
    """``body``, which calls ``functions``, with their text."""
    return tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(functions), body)
