"""The activations as expressions, in the type of the sums; `opcompile.reference` has the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx

from opcompile.elementary import erf, expm1, log1p, tanh
from opcompile.spec import Activation


def activate(activation: Activation, z: Any) -> Any:
    """The activation as an expression in the type of ``z``; `opcompile.reference` has the formulas.

    It calls elementary functions by name; `opcompile.elementary` writes them out.
    """
    return _FORMULAS[activation.name](z, *(tirx.const(p, z.ty.dtype) for p in activation.parameters))


def _const(z: Any, value: float) -> Any:
    return tirx.const(value, z.ty.dtype)


def _at_least(z: Any, low: float) -> Any:
    # in this order: LLVM takes the first of two where it is the larger, otherwise, and for NaN, the second
    return tirx.max(_const(z, low), z)


def _clip(z: Any, low: float, high: float) -> Any:
    return tirx.min(_const(z, high), _at_least(z, low))


def _sigmoid(z: Any) -> Any:
    # exp of a large positive number is inf, and 1/inf the right limit
    return _const(z, 1) / (_const(z, 1) + tirx.exp(-z))


def _leaky_relu(z: Any, alpha: Any) -> Any:
    # TVM makes 0 of a product with 0, and of z - z: of infinity and NaN, both are NaN
    return tirx.Select(z >= _const(z, 0), z, alpha * z if alpha.value else tirx.abs(z) + z)


def _hard_sigmoid(z: Any, alpha: Any, beta: Any) -> Any:
    return _clip(alpha * z + beta, 0, 1)


def _elu(z: Any, alpha: Any) -> Any:
    return tirx.Select(z < _const(z, 0), alpha * expm1(tirx.min(z, _const(z, 0))), z)


def _softplus(z: Any) -> Any:
    return tirx.max(z, _const(z, 0)) + log1p(tirx.exp(-tirx.abs(z)))


def _mish(z: Any) -> Any:
    # tanh(log(1 + e)) = e*(e + 2) / (e*(e + 2) + 2), with e = exp(z) kept from overflowing: beyond 20 it is 1
    e = tirx.exp(tirx.min(z, _const(z, 20)))
    ratio = e * (e + _const(z, 2)) / (e * (e + _const(z, 2)) + _const(z, 2))
    return tirx.Select(z > _const(z, 20), z, z * ratio)


def _gelu(z: Any) -> Any:
    return _const(z, 0.5) * z * (_const(z, 1) + erf(z * _const(z, math.sqrt(0.5))))


def _gelu_tanh(z: Any) -> Any:
    inner = _const(z, math.sqrt(2 / math.pi)) * (z + _const(z, 0.044715) * z * z * z)
    return _const(z, 0.5) * z * (_const(z, 1) + tirx.tanh(inner))


def _squareplus(z: Any) -> Any:
    # (z + sqrt(z^2 + 4)) / 2 without its cancellation; where z^2 overflows, the quotient is 0 as it should be
    root = tirx.sqrt(z * z + _const(z, 4))
    return tirx.max(z, _const(z, 0)) + _const(z, 2) / (root + tirx.abs(z))


def _sparse_plus(z: Any) -> Any:
    # 0, then a parabola between -1 and 1, then z
    inner = _clip(z, -1, 1) + _const(z, 1)
    return tirx.Select(z < _const(z, 1), _const(z, 0.25) * inner * inner, z)


_FORMULAS: dict[str, Callable[..., Any]] = {
    "none": lambda z: z,
    "relu": lambda z: _at_least(z, 0),
    "relu6": lambda z: _clip(z, 0, 6),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "selu": lambda z, alpha, gamma: gamma * _elu(z, alpha),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "sigmoid": _sigmoid,
    "hard_sigmoid": _hard_sigmoid,
    "silu": lambda z: z * _sigmoid(z),
    "hard_silu": lambda z: z * _hard_sigmoid(z, _const(z, 1 / 6), _const(z, 0.5)),
    "mish": _mish,
    "softplus": _softplus,
    "softsign": lambda z: z / (_const(z, 1) + tirx.abs(z)),
    "tanh": tanh,
    "exponential": tirx.exp,
    "hard_tanh": lambda z: _clip(z, -1, 1),
    "soft_shrink": lambda z: z - _clip(z, -0.5, 0.5),
    "hard_shrink": lambda z: tirx.Select(tirx.abs(z) <= _const(z, 0.5), _const(z, 0), z),
    "tanh_shrink": lambda z: z - tanh(z),
    "log_sigmoid": lambda z: -_softplus(-z),
    "squareplus": _squareplus,
    "sparse_plus": _sparse_plus,
}
