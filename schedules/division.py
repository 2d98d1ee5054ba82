"""Sizes and the parts that they have."""

from __future__ import annotations

from functools import lru_cache


def over(size: int, part: int) -> int:
    """How many parts cover ``size``; the last one may reach beyond it."""
    return -(-size // part)


def up(size: int, multiple: int) -> int:
    """The smallest multiple that is at least ``size``."""
    return over(size, multiple) * multiple


def divisors(number: int, most: int) -> list[int]:
    """The divisors of ``number`` that are no more than ``most``, or 1."""
    return [n for n in range(1, max(1, min(number, most)) + 1) if number % n == 0]


@lru_cache(maxsize=1024)
def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is no more than ``most``, or 1."""
    return divisors(number, most)[-1]
