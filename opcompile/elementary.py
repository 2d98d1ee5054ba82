"""Elementary functions in float32 as arithmetic, on vectors: LLVM would call the C library for each element.

Exponential and logarithm as mathematical libraries do them: a power of two is taken out of the argument, or of the
result, and a polynomial does what remains (Muller et al., Handbook of Floating-Point Arithmetic, 2nd ed., chapter 10).
NaN stays NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import tvm
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from tvm import tirx
from tvm.ir import _ffi_api, register_op_attr
from tvm_ffi import structural_map

_MANTISSA_BITS = 23
# A number below 2^22 that this is added to is a whole one, in the low bits.
_ROUNDING = 1.5 * 2**23
# ln 2 in two parts: times a whole number below 2^9, the first is exact.
_LN2_HIGH = 355 / 512
_LN2_LOW = math.log(2) - _LN2_HIGH
# Beyond this erf is 1 in float32.
_ERF_END = 3.92
_HUGE = float(np.finfo(np.float32).max)
# What has a normal number for its exponential: rounded to the nearest float32, each would lie one too far.
_LOWEST, _HIGHEST = (
    float(np.nextafter(np.float32(math.log(end)), np.float32(0))) for end in (np.finfo(np.float32).tiny, _HUGE)
)


# TVM's own is for scalars: a row of Y with one would not be written by vectors.
_VECTOR_ERF = "opcompile.erf"
if _VECTOR_ERF not in tvm.ir.Op.list_op_names():
    _ffi_api.RegisterOp(_VECTOR_ERF, "The error function, until it is written out.")
    for attribute in ("TVectorizable", "TCallEffectKind"):
        register_op_attr(_VECTOR_ERF, attribute, tvm.ir.Op.get("tirx.exp").get_attr(attribute))
    register_op_attr(_VECTOR_ERF, "TScriptPrinterName", "erf")


def erf(x: Any) -> Any:
    """The error function, to be written out by one of the next two, unless it is in float64."""
    return tirx.erf(x) if x.ty.dtype == "float64" else tirx.call_intrin(x.ty.dtype, _VECTOR_ERF, x)


def by_polynomials(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """``function`` with every elementary function in float32 as arithmetic, after all passes that would repeat it."""

    def arithmetic(call: tvm.ir.Call) -> Any:
        formula = _ARITHMETIC.get(_named(call))
        return _let(call.args[0], formula) if formula and str(call.ty.dtype).startswith("float32") else call

    return function.with_body(structural_map(function.body, (tvm.ir.Call, arithmetic)))


def by_exponentials(expression: Any) -> Any:
    """``expression``, or a statement, with its tanh as exponentials and, in float32, its erf as arithmetic.

    For compilers that have no such functions, or slow ones.
    """

    def written(call: tvm.ir.Call) -> Any:
        if _named(call) == "tirx.tanh":
            return _tanh(call.args[0], tirx.exp(_falling(call.args[0])))
        return _erf(call.args[0]) if _named(call) == _VECTOR_ERF else call

    return structural_map(expression, (tvm.ir.Call, written))


def _named(call: tvm.ir.Call) -> str:
    return str(call.op.name) if isinstance(call.op, tvm.ir.Op) else ""


def _exp(x: Any) -> Any:
    """``2^n * exp(r)``, where ``n = round(x / ln 2)`` and ``r = x - n*ln 2``; 0 where that is below the normal numbers.

    Within 1.9 units of roundoff, 1.6 with fused multiply-adds.
    """

    def of(rounded: Any) -> Any:
        n = rounded - _like(x, _ROUNDING)
        r = x - n * _like(x, _LN2_HIGH) - n * _like(x, _LN2_LOW)
        value = _let(r, lambda r: _polynomial(r, _exp_terms()))
        # the low bits of `rounded` are those of n, and the shift drops the others
        scaled = tirx.reinterpret(x.ty.dtype, _bits(value) + (_bits(rounded) << _MANTISSA_BITS))
        # infinity, or NaN, that of x
        beyond = x * _like(x, _HUGE)
        return tirx.Select(x <= _like(x, _HIGHEST), tirx.Select(x >= _like(x, _LOWEST), scaled, _like(x, 0)), beyond)

    return _let(x * _like(x, 1 / math.log(2)) + _like(x, _ROUNDING), of)


def _log(x: Any) -> Any:
    """``e*ln 2 + log(m)``, where ``x = 2^e * m`` and m is next to 1.

    Within 2 units of roundoff, 1.4 with fused multiply-adds, for x from 2^-126 to 2^126. A softplus asks for those
    between 1 and 2.
    """

    def of(exponent: Any) -> Any:
        return _let(x * _power(x, -exponent) - _like(x, 1), lambda f: _log_near_one(f, exponent))

    return _let((_bits(x) - _bits_of(x, math.sqrt(0.5))) >> _MANTISSA_BITS, of)


def _log_near_one(f: Any, exponent: Any) -> Any:
    return exponent.astype(f.ty.dtype) * _like(f, math.log(2)) + (f + f * f * _polynomial(f, _log_terms()))


def _falling(x: Any) -> Any:
    """``-2*|x|``, whose exponential, of which `_tanh` is made, cannot overflow."""
    return _like(x, -2) * tirx.abs(x)


def _tanh(x: Any, e: Any) -> Any:
    """Of ``x`` and ``e = exp(-2*|x|)``."""
    magnitude = (_like(x, 1) - e) / (_like(x, 1) + e)
    return tirx.Select(x >= _like(x, 0), magnitude, -magnitude)


def _erf(x: Any) -> Any:
    """``x * q(t)`` with a polynomial of degree 16 in ``t = 2*(x/3.92)^2 - 1``; within 3.3 units of roundoff."""
    end = _like(x, _ERF_END)
    inside = tirx.min(end, tirx.max(_like(x, -_ERF_END), x))
    t = inside * inside * _like(x, 2 / _ERF_END**2) - _like(x, 1)
    value = inside * _polynomial(t, _erf_terms())
    return tirx.Select(x >= end, _like(x, 1), tirx.Select(x <= -end, _like(x, -1), value))


_ARITHMETIC: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": _exp,
    "tirx.log": _log,
    "tirx.tanh": lambda x: _let(_let(_falling(x), _exp), lambda e: _tanh(x, e)),
    _VECTOR_ERF: _erf,
}


# --- polynomials ---


@cache
def _exp_terms() -> tuple[float, ...]:
    """Exponential between -ln(2)/2 and ln(2)/2."""
    half = math.log(2) / 2
    return _interpolated(np.exp, -half, half, 6)


@cache
def _log_terms() -> tuple[float, ...]:
    """``(log(1 + f) - f) / f^2`` where 1 + f lies between the roots of 1/2 and 2."""
    return _interpolated(lambda f: (np.log1p(f) - f) / (f * f), math.sqrt(0.5) - 1, math.sqrt(2) - 1, 8)


@cache
def _erf_terms() -> tuple[float, ...]:
    """``erf(x)/x``, which is entire in x^2, for ``0 <= x <= 3.92``."""
    nodes = np.cos(np.pi * (np.arange(17) + 0.5) / 17)
    x = np.sqrt((nodes + 1) / 2) * _ERF_END
    values = [math.erf(i) / i for i in x]
    return tuple(float(c) for c in chebyshev.cheb2poly(chebyshev.chebfit(nodes, values, 16)))


def _interpolated(
    function: Callable[[NDArray[np.float64]], NDArray[np.float64]], low: float, high: float, degree: int
) -> tuple[float, ...]:
    """Return the polynomial through ``degree + 1`` Chebyshev nodes between ``low`` and ``high``, lowest term first."""
    fitted = chebyshev.Chebyshev.interpolate(function, degree, (low, high))
    return tuple(float(term) for term in fitted.convert(kind=np.polynomial.Polynomial).coef)


def _polynomial(x: Any, terms: tuple[float, ...]) -> Any:
    *others, value = (_like(x, term) for term in terms)
    for term in reversed(others):
        value = value * x + term
    return value


# --- pieces of expressions, on scalars and on vectors ---


def _let(value: Any, body: Callable[[Any], Any]) -> Any:
    """``body`` of a value that is computed once."""
    name = tirx.Var("v", value.ty.dtype)
    return tirx.Let(name, value, body(name))


def _like(x: Any, value: float) -> Any:
    return tirx.const(value, x.ty.dtype)


def _bits(x: Any) -> Any:
    return tirx.reinterpret(str(x.ty.dtype).replace("float", "int"), x)


def _bits_of(x: Any, value: float) -> Any:
    return tirx.const(int(np.float32(value).view(np.int32)), str(x.ty.dtype).replace("float", "int"))


def _power(x: Any, n: Any) -> Any:
    """``2^n`` in the type of ``x``."""
    return tirx.reinterpret(x.ty.dtype, (n << _MANTISSA_BITS) + _bits_of(x, 1))
