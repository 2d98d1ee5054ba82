"""The oracle: scatter, float64, NumPy only, so that a mistake in `declare` (which gathers) is not repeated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.errors import CallError
from opcompile.spec import Activation, Axis, ConvTranspose3d

Array = NDArray[np.float64]
Tensor = NDArray[Any]


def reference(spec: ConvTranspose3d, x: Tensor, w: Tensor, b: Tensor | None = None) -> Array:
    """Compute ``Y`` in float64. ``x`` and the result have the spec's layout, ``w`` is canonical.

    Raises `CallError` for inputs of other shapes, and for what holds no real numbers.
    """
    y = linear(spec, x, w)
    if spec.bias and b is not None:
        _require_shape("b", b, (spec.channels_out,))
        y += by_channels(spec, widened("b", b))
    return activate(spec.activation, y)


def linear(spec: ConvTranspose3d, x: Tensor, w: Tensor) -> Array:
    """Compute the sum alone, without bias and activation; also of magnitudes, for the error bound."""
    x, w = widened("x", x), widened("w", w)
    _require_shape("x", x, (None, *spec.x_shape[1:]))
    _require_shape("w", w, spec.w_shape)
    if spec.layout == "NDHWC":
        x = np.moveaxis(x, -1, 1)
    batch, g = x.shape[0], spec.groups
    c, m = spec.c_in, spec.m_out
    grouped_x = np.ascontiguousarray(x).reshape(batch, g, c, *(a.size for a in spec.axes))
    # (tap, g, m, c): a matrix for each tap and group
    rows = np.ascontiguousarray(w.reshape(g, c, m, -1).transpose(3, 0, 2, 1))
    y = np.zeros((batch, g, m, *(a.out for a in spec.axes)))
    for (reads, lands), matrix in zip(landings(spec), rows, strict=True):
        if any(r.start >= r.stop for r in reads):
            continue
        window = grouped_x[:, :, :, reads[0], reads[1], reads[2]]
        with np.errstate(invalid="ignore"):  # infinities of both signs have the sum NaN
            product = np.matmul(matrix, window.reshape(batch, g, c, -1)).reshape(batch, g, m, *window.shape[3:])
            y[:, :, :, lands[0], lands[1], lands[2]] += product
    full: Array = y.reshape(batch, spec.channels_out, *y.shape[3:])
    return np.ascontiguousarray(np.moveaxis(full, 1, -1)) if spec.layout == "NDHWC" else full


def widened(name: str, array: Any) -> Array:
    """Return ``array`` in float64. Raises `CallError` where it holds anything but real numbers."""
    given = np.asarray(array)
    if given.dtype.kind not in "biuf" and given.dtype.name != "bfloat16":
        raise CallError(f"{name} is {given.dtype.name}, but must hold real numbers")
    return given.astype(np.float64, copy=False)


def _require_shape(name: str, a: Tensor, wanted: tuple[int | None, ...]) -> None:
    given = np.shape(a)
    if len(given) != len(wanted) or not all(m > 0 if n is None else m == n for n, m in zip(wanted, given, strict=True)):
        sizes = ", ".join("N" if n is None else str(n) for n in wanted)
        least = ", N at least 1" if None in wanted else ""
        raise CallError(f"{name} has shape {given}, but must have ({sizes}{',' if len(wanted) == 1 else ''}){least}")


def landings(spec: ConvTranspose3d) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yield for each tap the inputs that it brings onto an output that exists, and those outputs, along D, H and W."""
    for along in itertools.product(*([_landing(axis, t) for t in range(axis.kernel)] for axis in spec.axes)):
        reads, lands = zip(*along, strict=True)
        yield reads, lands


def _landing(axis: Axis, tap: int) -> tuple[slice, slice]:
    # input i lands on output i*stride + tap*dilation - begin: keep the i whose output exists
    shift = tap * axis.dilation - axis.begin
    first = max(0, -(shift // axis.stride))
    end = max(first, min(axis.size, -((shift - axis.out) // axis.stride)))
    return slice(first, end), slice(first * axis.stride + shift, end * axis.stride + shift, axis.stride)


def by_channels(spec: ConvTranspose3d, b: Array) -> Array:
    """View a number for each output channel so that it can be added to Y."""
    return b if spec.layout == "NDHWC" else b.reshape(-1, 1, 1, 1)


def activate(activation: Activation, z: Array) -> Array:
    """Apply the activation in float64; NaN stays NaN."""
    return activated(activation.name, z, *activation.parameters)


def activated(name: str, z: Array, *parameters: Array | float) -> Array:
    """Apply the activation of this name with any ``parameters``, also such as `Activation` refuses."""
    with np.errstate(over="ignore", invalid="ignore"):
        y: Array = _FORMULAS[name](z, *parameters)
    return y


def _sigmoid(z: Array) -> Array:
    # never the exponential of a positive number: it would overflow
    e = np.exp(-np.abs(z))
    y: Array = np.where(z >= 0, 1, e) / (1 + e)
    return y


def _hard_sigmoid(z: Array, alpha: float, beta: float) -> Array:
    return np.clip(alpha * z + beta, 0, 1)


_erf: Callable[[Array], Array] = np.vectorize(math.erf, otypes=[np.float64])

_FORMULAS: dict[str, Callable[..., Array]] = {
    "none": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "relu6": lambda z: np.clip(z, 0, 6),
    "leaky_relu": lambda z, alpha: np.where(z >= 0, z, alpha * z),
    "elu": lambda z, alpha: np.where(z >= 0, z, alpha * np.expm1(np.minimum(z, 0))),
    "selu": lambda z, alpha, gamma: gamma * np.where(z >= 0, z, alpha * np.expm1(np.minimum(z, 0))),
    "gelu": lambda z: 0.5 * z * (1 + _erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "sigmoid": _sigmoid,
    "hard_sigmoid": _hard_sigmoid,
    "silu": lambda z: z * _sigmoid(z),
    "hard_silu": lambda z: z * _hard_sigmoid(z, 1 / 6, 0.5),
    "mish": lambda z: z * np.tanh(np.logaddexp(0, z)),
    "softplus": lambda z: np.logaddexp(0, z),
    "softsign": lambda z: z / (1 + np.abs(z)),
    "tanh": np.tanh,
    "exponential": np.exp,
    "hard_tanh": lambda z: np.clip(z, -1, 1),
    "soft_shrink": lambda z: np.sign(z) * np.maximum(np.abs(z) - 0.5, 0),
    "hard_shrink": lambda z: np.where(np.abs(z) <= 0.5, 0, z),
    "tanh_shrink": lambda z: z - np.tanh(z),
    "log_sigmoid": lambda z: -np.logaddexp(0, -z),
    # (z + sqrt(z^2 + 4)) / 2, without the cancellation
    "squareplus": lambda z: np.maximum(z, 0) + 2 / (np.hypot(z, 2) + np.abs(z)),
    "sparse_plus": lambda z: np.where(z <= -1, 0, np.where(z < 1, (z + 1) ** 2 / 4, z)),
}
