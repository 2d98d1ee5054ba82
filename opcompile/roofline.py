"""The least time a layer can take on a machine: by its arithmetic, or by the memory it touches.

No layer takes less than its multiply-adds at the peak rate, nor less than its bytes at the bandwidth of
the memory; the larger of the two is the *roofline* (Williams, Waterman, Patterson 2009). `opcompile.probes`
measures both limits. Data that stay in a cache are not bound by the second: a small layer can pass it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

# Samples whose middle lies below the best by more than this share: the machine did not hold still.
_NOISY = 0.2


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of both limits: 10^9 operations a second, 10^9 bytes a second."""

    gflops: float
    gbytes: float


@dataclass(frozen=True, slots=True)
class Roof:
    """All samples of the limits for sums in ``dtype``, taken before and after the layer was timed."""

    dtype: str
    before: tuple[Sample, ...]
    after: tuple[Sample, ...]

    @property
    def gflops(self) -> float:
        """The peak rate: of all samples the best, a multiply-add counted as two operations."""
        return max(s.gflops for s in (*self.before, *self.after))

    @property
    def gbytes(self) -> float:
        """The bandwidth: of all samples the best, reads and writes counted."""
        return max(s.gbytes for s in (*self.before, *self.after))

    @property
    def noisy(self) -> bool:
        """Whether the samples taken before, or those after, lie so far below the best that shares of it say little."""
        return any(
            statistics.median(getattr(s, limit) for s in part) < (1 - _NOISY) * getattr(self, limit)
            for part in (self.before, self.after)
            for limit in ("gflops", "gbytes")
        )

    def time_us(self, flop: int, size: int) -> float:
        """Return the least time for ``flop`` operations on ``size`` bytes."""
        return max(flop / self.gflops, size / self.gbytes) / 1e3

    def bound(self, flop: int, size: int) -> str:
        """Name the limit that is met first: ``compute`` or ``memory``."""
        return "compute" if flop / self.gflops >= size / self.gbytes else "memory"

    def to_json(self) -> dict[str, Any]:
        """Return plain values, all samples included."""
        parts = {name: [[s.gflops, s.gbytes] for s in getattr(self, name)] for name in ("before", "after")}
        return {"dtype": self.dtype, "gflops": self.gflops, "gbytes": self.gbytes, "noisy": self.noisy, **parts}
