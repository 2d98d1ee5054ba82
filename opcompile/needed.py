"""Packages of others that are not installed, by the names under which they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opcompile.errors import EngineError

# What this project needs, and what that needs, by the names that are imported: a caller's own imports are no matter of
# ours.
_SAME_NAME = (
    *("numpy", "onnx", "onnxruntime", "click", "rich", "psutil", "cloudpickle", "tornado", "ml_dtypes"),
    *("typing_extensions", "flatbuffers", "packaging", "pygments", "mdurl", "torch", "jax", "keras", "mlx"),
)
_DISTRIBUTIONS = {
    **{name: name for name in _SAME_NAME},
    "tvm": "apache-tvm",
    "tvm_ffi": "apache-tvm-ffi",
    "google": "protobuf",
    "markdown_it": "markdown-it-py",
}


def missing(error: BaseException) -> EngineError | None:
    """Say which package of others was to be imported and is not there; None for any other error."""
    module = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    name = _DISTRIBUTIONS.get(module.partition(".")[0])
    if name is None:
        return None
    # several distributions share a namespace like google, which has no file
    if getattr(sys.modules.get(module.rpartition(".")[0]), "__file__", None):
        return EngineError(
            f"this needs the module {module}, which the installed version of {name} lacks; install opcompile with its "
            "dependencies, which brings a version that has it"
        )
    return EngineError(
        f"this needs the package {name}, which is missing: pip install {name}, or install opcompile with its "
        "dependencies"
    )


def bfloat16() -> Any:
    """Return NumPy's type of it, which `ml_dtypes` brings. Raises `EngineError` without that."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise EngineError(f"bfloat16 arrays need the package ml_dtypes ({error}); pip install ml_dtypes") from error
    return ml_dtypes.bfloat16


@contextmanager
def packages_named() -> Iterator[None]:
    """Raise `EngineError`, which names the package, where one is imported that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if named := missing(error):
            raise named from error
        raise
