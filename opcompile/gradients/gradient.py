"""A derivative of one layer: what goes in, what comes out, and nothing about how it runs.

With ``dZ = dY * f'(Z)``, the gradient of the sum before the activation f, along one axis::

    dX[i]  =  sum over taps t       of  dZ[i*s + t*d - begin] * W[t]       a strided convolution
    dW[t]  =  sum over positions i  of  X[i] * dZ[i*s + t*d - begin]       a correlation
    dB     =  sum over outputs o    of  dZ[o]

where an index outside of Y contributes nothing. Shapes are those of the layer: ``dX (N, C, D, H, W)``,
``dW (C, M/g, kD, kH, kW)``, ``dB (M,)``, and ``dY (N, M, oD, oH, oW)``, X and Y in the layer's layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from opcompile.errors import SpecError
from opcompile.spec import ConvTranspose3d, at_batch

Wrt = Literal["x", "w", "b"]
WRT: tuple[Wrt, ...] = ("x", "w", "b")

Shape = tuple[int | None, ...]

# Activations whose slope is a function of their own output, where the condition on their parameters holds.
# Others take one value at two places, with two slopes, or have no formula here yet.
_TOLD_BY_OUTPUT: dict[str, Callable[..., bool]] = {
    "none": lambda: True,
    "relu": lambda: True,
    "relu6": lambda: True,
    "leaky_relu": lambda alpha: alpha >= 0,
    "elu": lambda alpha: alpha >= 0,
    "selu": lambda alpha, gamma: alpha >= 0 and gamma > 0,
    "sigmoid": lambda: True,
    "hard_sigmoid": lambda _alpha, _beta: True,
    "softplus": lambda: True,
    "softsign": lambda: True,
    "tanh": lambda: True,
    "exponential": lambda: True,
}


@dataclass(frozen=True, slots=True)
class Gradient:
    """The derivative of ``layer`` with respect to ``wrt``: its input, its weight or its bias."""

    layer: ConvTranspose3d
    wrt: Wrt

    def __post_init__(self) -> None:
        """Raise `SpecError` where there is no such derivative, or what goes in would not tell it."""
        if self.wrt not in WRT:
            raise SpecError(f"derivative {self.wrt!r} is unknown; use one of {', '.join(WRT)}")
        if self.wrt == "b" and not self.layer.bias:
            raise SpecError("the layer has no bias (bias=0), so there is no derivative with respect to b; use x or w")
        activation = self.layer.activation
        told = _TOLD_BY_OUTPUT.get(activation.name)
        if told is None or not told(*activation.parameters):
            raise SpecError(
                f"the slope of activation {activation} cannot be told from the layer's output by any formula "
                "that is known here; compile the layer with act=none, and apply the activation outside, "
                "where its own derivative is at hand"
            )

    # --- what goes in, and what comes out ---

    @property
    def needs_output(self) -> bool:
        """Whether the layer's output Y is an operand: where it fuses an activation."""
        return self.layer.activation.name != "none"

    @property
    def operands(self) -> dict[str, Shape]:
        """Names and shapes of the arguments in the order of a call; None stands for a dynamic batch."""
        layer = self.layer
        shapes = {"dy": layer.y_shape, "w": layer.w_shape, "x": layer.x_shape, "y": layer.y_shape}
        return {name: shapes[name] for name in self.pointers if name}

    @property
    def pointers(self) -> tuple[str, str | None, str | None]:
        """Names of the arguments where a call from C has them; None where the pointer is null."""
        factor: dict[Wrt, str | None] = {"x": "w", "w": "x", "b": None}
        return "dy", factor[self.wrt], "y" if self.needs_output else None

    @property
    def name(self) -> str:
        """Name of the result: ``dx``, ``dw`` or ``db``."""
        return f"d{self.wrt}"

    @property
    def kernel(self) -> str:
        """The function's name: a derivative must not be found under the name of the layer."""
        return f"conv_transpose3d_{self.name}"

    @property
    def shape(self) -> Shape:
        """Shape of the result."""
        shapes: dict[Wrt, Shape] = {"x": self.layer.x_shape, "w": self.layer.w_shape, "b": (self.layer.channels_out,)}
        return shapes[self.wrt]

    # --- derived facts ---

    def terms(self, batch: int) -> int:
        """Return the largest number of products, or of elements, that are summed into one element of the result."""
        layer = self.layer
        if self.wrt == "x":
            return layer.m_out * math.prod(a.kernel for a in layer.axes)
        if self.wrt == "w":
            return batch * math.prod(a.size for a in layer.axes)
        return batch * math.prod(a.out for a in layer.axes)

    @property
    def flops(self) -> int:
        """Floating-point operations that end in the result, for one batch element where that is dynamic."""
        if self.wrt == "b":
            return math.prod(at_batch(self.layer.y_shape, 1))
        return self.layer.needed_flops

    def bytes(self) -> int:
        """Bytes of the arguments and the result, each counted once; a dynamic batch counts as 1."""
        return sum(map(self.layer.bytes_of, [*self.operands.values(), self.shape]))

    def with_batch(self, batch: int | None) -> Gradient:
        """The same derivative for another batch."""
        return Gradient(self.layer.with_batch(batch), self.wrt)

    def __str__(self) -> str:
        """The layer's text form after the derivative's name: ``dx of in=...``."""
        return f"{self.name} of {self.layer}"
