"""Numbers as people read them: three digits and a prefix."""

from __future__ import annotations


def scaled(value: float, unit: str) -> str:
    """Write ``value`` with a decimal prefix: ``2.72 GFLOP``."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{_three(value / size)} {prefix}{unit}"
    return f"{_three(value)} {unit}"


def binary(size: float) -> str:
    """Write bytes with a binary prefix: ``1.91 MiB``."""
    for prefix, unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= unit:
            return f"{_three(size / unit)} {prefix}"
    return f"{size:.0f} B"


def duration(us: float) -> str:
    """Write a time that is given in microseconds: ``57.1 us``, ``1.35 ms``, ``2.40 s``."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{_three(us / size)} {unit}"
    return f"{_three(us)} us"


def _three(value: float) -> str:
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
