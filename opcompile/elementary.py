"""Exponential and logarithm in float32 as polynomials, on vectors: LLVM would call the C library for each element.

Both as mathematical libraries do it: a power of two is taken out of the argument, or of the result, and a polynomial
does what remains (Muller et al., Handbook of Floating-Point Arithmetic, 2nd ed., chapter 10). NaN stays NaN.
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
from tvm_ffi import structural_map

_MANTISSA_BITS = 23
# A number below 2^22 that this is added to is a whole one, in the low bits.
_ROUNDING = 1.5 * 2**23
# ln 2 in two parts: times a whole number below 2^9, the first is exact.
_LN2_HIGH = 355 / 512
_LN2_LOW = math.log(2) - _LN2_HIGH
_HUGE = float(np.finfo(np.float32).max)
# What has a normal number for its exponential: rounded to the nearest float32, each would lie one too far.
_LOWEST, _HIGHEST = (
    float(np.nextafter(np.float32(math.log(end)), np.float32(0))) for end in (np.finfo(np.float32).tiny, _HUGE)
)


def by_polynomials(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """``function`` with every exponential and logarithm in float32 written out."""

    def written(call: tvm.ir.Call) -> Any:
        formula = _FORMULAS.get(call.op.name) if isinstance(call.op, tvm.ir.Op) else None
        return formula(call.args[0]) if formula and str(call.ty.dtype).startswith("float32") else call

    return function.with_body(structural_map(function.body, (tvm.ir.Call, written)))


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


_FORMULAS: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": lambda x: _let(x, _exp),
    "tirx.log": lambda x: _let(x, _log),
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
