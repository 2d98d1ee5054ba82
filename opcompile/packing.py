"""How a kernel wants its weights laid out: a map that needs NumPy alone, so that it can be stored and replayed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.errors import ArtifactError, CallError


@dataclass(frozen=True, slots=True)
class Packing:
    """Canonical ``W (C, M/g, kD, kH, kW)`` to the kernel's own layout, in three moves.

    Every axis is filled up with zeros to ``padded``, the whole is seen as ``view`` (same number of
    elements), and the axes of the view are put into ``order``::

        padded (8, 16, 3, 3, 3)   view (8, 1, 16, 3, 3, 3)   order (1, 3, 4, 5, 0, 2)
        W (8, 12, 3, 3, 3)  ->  (1, 3, 3, 3, 8, 16): 16 output channels are one vector
    """

    padded: tuple[int, ...]
    view: tuple[int, ...]
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise `ArtifactError` for three moves that do not fit together."""
        for name in ("padded", "view", "order"):
            sizes = tuple(int(n) for n in getattr(self, name))
            object.__setattr__(self, name, sizes)
        if min(self.padded, default=0) < 1 or min(self.view, default=0) < 1:
            raise ArtifactError(f"packing: padded {self.padded} and view {self.view} must hold sizes of at least 1")
        if math.prod(self.view) != math.prod(self.padded):
            raise ArtifactError(
                f"packing: view {self.view} and padded {self.padded} hold different numbers of elements"
            )
        if sorted(self.order) != list(range(len(self.view))):
            raise ArtifactError(f"packing: order {self.order} is not a permutation of the {len(self.view)} view axes")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the packed weight."""
        return tuple(self.view[axis] for axis in self.order)

    def __call__(self, w: NDArray[Any]) -> NDArray[Any]:
        """Return the packed copy of a canonical ``w``, contiguous, in the same dtype. Raises `CallError`."""
        return np.array(self.arranged(w), order="C")

    def arranged(self, w: NDArray[Any]) -> NDArray[Any]:
        """Return the same elements, not yet contiguous, a view of ``w`` if nothing is filled up. Raises `CallError`."""
        if w.ndim != len(self.padded) or any(n > most for n, most in zip(w.shape, self.padded, strict=True)):
            raise CallError(f"w has shape {w.shape}, which does not fit into the packing's {self.padded}")
        whole = w
        if w.shape != self.padded:
            whole = np.zeros(self.padded, w.dtype)
            whole[tuple(slice(n) for n in w.shape)] = w
        return whole.reshape(self.view).transpose(self.order)

    @classmethod
    def identity(cls, w_shape: Sequence[int]) -> Packing:
        """Return the packing of a kernel that takes the canonical weight."""
        return cls(tuple(w_shape), tuple(w_shape), tuple(range(len(w_shape))))

    def to_json(self) -> dict[str, list[int]]:
        """Return the three tuples as lists; `from_json` reads them back."""
        return {"padded": list(self.padded), "view": list(self.view), "order": list(self.order)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Sequence[int]]) -> Packing:
        """Read what `to_json` wrote. Raises `ArtifactError`."""
        try:
            return cls(tuple(fields["padded"]), tuple(fields["view"]), tuple(fields["order"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"packing {fields!r} is not three lists of whole numbers: {error}") from None
