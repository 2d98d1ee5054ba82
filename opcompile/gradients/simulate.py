"""A derivative for a GPU or an arm64, run on this CPU: `opcompile.simulate` for the layer, with other arguments."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.errors import CallError
from opcompile.gradients.gradient import Gradient
from opcompile.gradients.runtime import Derivative
from opcompile.simulate import opened_simulator
from opcompile.spec import ConvTranspose3d, at_batch


class SimulatedGradient(Derivative):
    """An artifact for a GPU or an arm64, run on this CPU: called as `GradientArtifact` is, on NumPy arrays alone."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the artifact in directory ``path``. Raises as `opened_simulator` does."""
        self.directory, self.manifest, self.simulator = opened_simulator(path, derivative=True)
        self.gradient = Gradient(ConvTranspose3d.parse(self.manifest["spec"]), self.manifest["derivative"])

    def __call__(self, *given: Any, dy: Any = None, w: Any = None, x: Any = None, y: Any = None) -> NDArray[Any]:
        """Return the derivative.

        Raises `CallError` for arrays that do not fit, `VerificationError` for what is wrong with the kernel.
        """
        operands, gradient = self.bound(given, dy=dy, w=w, x=x, y=y), self.gradient
        batch, dtype = operands["dy"].shape[0], gradient.layer.dtype
        for name, array in operands.items():
            shape = at_batch(gradient.operands[name], batch)
            if array.shape != shape or array.dtype.name != dtype:
                raise CallError(f"{name} is {array.dtype} {array.shape}, but {gradient.name} takes {dtype} {shape}")
        result = np.empty(at_batch(gradient.shape, batch), operands["dy"].dtype)
        self.simulator.run(operands, result, batch)
        return result
