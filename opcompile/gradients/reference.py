"""The oracle of the derivatives: float64, NumPy only, tap by tap over the elements that meet.

It follows `opcompile.reference` backward: where that scatters an input times a tap onto outputs, dX
gathers those outputs times the tap, and dW sums their products with the input. Nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.gradients.gradient import Gradient
from opcompile.reference import landings, widened
from opcompile.spec import Activation, ConvTranspose3d

Array = NDArray[np.float64]
Tensor = NDArray[Any]


def reference(gradient: Gradient, operands: Mapping[str, Tensor]) -> Array:
    """Compute the derivative in float64. ``operands`` are those of `Gradient.operands`, by name.

    Raises `CallError` for what holds no real numbers.
    """
    given = {name: widened(name, array) for name, array in operands.items()}
    dz = given["dy"]
    if gradient.needs_output:
        dz = dz * slope(gradient.layer.activation, given["y"])
    return linear(gradient, dz, given.get("w" if gradient.wrt == "x" else "x"))


def linear(gradient: Gradient, dz: Tensor, factor: Tensor | None = None) -> Array:
    """Compute the derivative from that of the sum; also of magnitudes, for the error bound."""
    layer = gradient.layer
    dz = _grouped(layer, dz, layer.channels_out)
    if gradient.wrt == "b" or factor is None:
        total: Array = dz.sum(axis=(0, 3, 4, 5)).reshape(-1)
        return total
    if gradient.wrt == "x":
        return _of_input(layer, dz, np.asarray(factor, np.float64))
    return _of_weight(layer, dz, _grouped(layer, factor, layer.channels_in))


def _of_input(layer: ConvTranspose3d, dz: Array, w: Array) -> Array:
    batch, g = dz.shape[0], layer.groups
    c, m = layer.c_in, layer.m_out
    dx = np.zeros((batch, g, c, *(a.size for a in layer.axes)))
    # (tap, g, c, m): a matrix for each tap and group
    matrices = np.ascontiguousarray(w.reshape(g, c, m, -1).transpose(3, 0, 1, 2))
    for (reads, lands), matrix in zip(landings(layer), matrices, strict=True):
        window = dz[:, :, :, lands[0], lands[1], lands[2]]
        if window.size:
            product = np.matmul(matrix, window.reshape(batch, g, m, -1))
            dx[:, :, :, reads[0], reads[1], reads[2]] += product.reshape(batch, g, c, *window.shape[3:])
    full: Array = dx.reshape(batch, layer.channels_in, *dx.shape[3:])
    return np.ascontiguousarray(np.moveaxis(full, 1, -1)) if layer.layout == "NDHWC" else full


def _of_weight(layer: ConvTranspose3d, dz: Array, x: Array) -> Array:
    batch, g = dz.shape[0], layer.groups
    c, m = layer.c_in, layer.m_out
    dw = np.zeros((g, c, m, *(a.kernel for a in layer.axes)))
    for tap, (reads, lands) in zip(np.ndindex(*dw.shape[3:]), landings(layer), strict=True):
        inputs, outputs = x[:, :, :, reads[0], reads[1], reads[2]], dz[:, :, :, lands[0], lands[1], lands[2]]
        if outputs.size:
            rows = inputs.reshape(batch, g, c, -1), outputs.reshape(batch, g, m, -1)
            dw[(..., *tap)] = np.matmul(rows[0], rows[1].swapaxes(-1, -2)).sum(axis=0)
    return dw.reshape(layer.w_shape)


def _grouped(layer: ConvTranspose3d, tensor: Tensor, channels: int) -> Array:
    """``(N, G, channels/g, D, H, W)`` of an activation tensor in the layer's layout."""
    tensor = np.asarray(tensor, np.float64)
    tensor = np.moveaxis(tensor, -1, 1) if layer.layout == "NDHWC" else tensor
    return tensor.reshape(tensor.shape[0], layer.groups, channels // layer.groups, *tensor.shape[2:])


# --- slopes of activations, told from their output ---


def slope(activation: Activation, y: Array) -> Array:
    """The slope where the activation gave ``y``; at a kink the one of PyTorch."""
    found: Array = np.broadcast_to(_SLOPES[activation.name](y, *activation.parameters), y.shape)
    return found


_SLOPES: dict[str, Callable[..., Any]] = {
    "none": lambda _y: np.ones(()),
    "relu": lambda y: np.where(y > 0, 1.0, 0.0),
    "relu6": lambda y: np.where((y > 0) & (y < 6), 1.0, 0.0),
    "leaky_relu": lambda y, alpha: np.where(y > 0, 1.0, alpha),
    "elu": lambda y, alpha: np.where(y > 0, 1.0, y + alpha),
    "selu": lambda y, alpha, gamma: np.where(y > 0, gamma, y + alpha * gamma),
    "sigmoid": lambda y: y * (1 - y),
    "hard_sigmoid": lambda y, alpha, _beta: np.where((y > 0) & (y < 1), alpha, 0.0),
    "softplus": lambda y: -np.expm1(-y),
    "softsign": lambda y: (1 - np.abs(y)) ** 2,
    "tanh": lambda y: (1 - y) * (1 + y),
    "exponential": lambda y: y,
}
