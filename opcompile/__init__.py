"""ConvTranspose3d, compiled ahead of time and proved equal to ONNX Runtime.

    spec = opcompile.ConvTranspose3d.parse("in=1x64x12x16x32 co=64 k=3 s=2 p=1 op=1")
    art = opcompile.compile(spec, target="llvm", into="out")
    y = art(x, w, b)

Importing the package is light: TVM, ONNX and ONNX Runtime are imported by what needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from opcompile.cases import CASES, Case
from opcompile.errors import OpcompileError
from opcompile.needed import packages_named

# A submodule of the same name would shadow these functions if they were imported only on use.
from opcompile.replace import replace
from opcompile.spec import Activation, Axis, ConvTranspose3d
from opcompile.tune import tune
from opcompile.verify import verify

if TYPE_CHECKING:
    from opcompile.build import compile
    from opcompile.graph import export_onnx
    from opcompile.importers.onnx import find
    from opcompile.runtime import Artifact, load

__version__ = "0.1.0"

__all__ = [
    "CASES",
    "Activation",
    "Artifact",
    "Axis",
    "Case",
    "ConvTranspose3d",
    "OpcompileError",
    "compile",
    "export_onnx",
    "find",
    "load",
    "replace",
    "tune",
    "verify",
]

_LAZY = {
    "Artifact": "opcompile.runtime",
    "compile": "opcompile.build",
    "export_onnx": "opcompile.graph",
    "find": "opcompile.importers.onnx",
    "load": "opcompile.runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'opcompile' has no attribute {name!r}")
    with packages_named():
        value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
