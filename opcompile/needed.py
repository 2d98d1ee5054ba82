"""Packages of others that are not installed, by the names under which they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opcompile.errors import EngineError

# Those that are imported by another name than they are installed by.
_DISTRIBUTIONS = {"tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}


def missing(error: BaseException) -> EngineError | None:
    """Say which package of others was to be imported and is not there; None for any other error."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in ("", "opcompile", "schedules"):
        return None
    name = _DISTRIBUTIONS.get(package, package)
    return EngineError(f"this needs the package {name}, which is missing: pip install {name}, or opcompile with all")


@contextmanager
def packages_named() -> Iterator[None]:
    """Raise `EngineError`, which names the package, where one is imported that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if named := missing(error):
            raise named from error
        raise
