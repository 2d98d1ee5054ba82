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


def _vectors_too(name: str, what: str) -> str:
    """Register an operator that rows of Y which are written by vectors may have, until it is written out."""
    if name not in tvm.ir.Op.list_op_names():
        _ffi_api.RegisterOp(name, what)
        for attribute in ("TVectorizable", "TCallEffectKind"):
            register_op_attr(name, attribute, tvm.ir.Op.get("tirx.exp").get_attr(attribute))
        register_op_attr(name, "TScriptPrinterName", name.rpartition(".")[-1])
    return name


# TVM's own erf is for scalars, and it has no other that keeps what 1 + x rounds away.
_ERF = _vectors_too("opcompile.erf", "The error function.")
_LOG1P = _vectors_too("opcompile.log1p", "The logarithm of 1 + x, for x from 0 to 1.")
_EXPM1 = _vectors_too("opcompile.expm1", "exp(x) - 1, for x up to 80.")


def erf(x: Any) -> Any:
    """The error function, to be written out by one of the next two, unless it is in float64; as the other three are."""
    return tirx.erf(x) if _is_double(x) else tirx.call_intrin(x.ty.dtype, _ERF, x)


def log1p(x: Any) -> Any:
    """``log(1 + x)``, for x from 0 to 1."""
    return _of_library("log1p", x) if _is_double(x) else tirx.call_intrin(x.ty.dtype, _LOG1P, x)


def expm1(x: Any) -> Any:
    """``exp(x) - 1``, for x up to 80."""
    return _of_library("expm1", x) if _is_double(x) else tirx.call_intrin(x.ty.dtype, _EXPM1, x)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent: TVM's own of float64 has the error of one, however small it is."""
    return _of_library("tanh", x) if _is_double(x) else tirx.tanh(x)


def _is_double(x: Any) -> bool:
    return bool(x.ty.dtype == "float64")


def _of_library(name: str, x: Any) -> Any:
    return tirx.call_pure_extern(x.ty.dtype, name, x)


def by_polynomials(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """``function`` with every elementary function in float32 as arithmetic, after all passes that would repeat it."""

    def arithmetic(call: tvm.ir.Call) -> Any:
        formula = _ARITHMETIC.get(_named(call))
        return _let(call.args[0], formula) if formula and str(call.ty.dtype).startswith("float32") else call

    return function.with_body(structural_map(function.body, (tvm.ir.Call, arithmetic)))


def by_exponentials(expression: Any) -> Any:
    """``expression``, or a statement, with tanh, expm1 and log1p as exponentials and logarithms, and erf as arithmetic.

    For compilers that have no such functions, or slow ones. In float32.
    """

    def written(call: tvm.ir.Call) -> Any:
        formula = _BY_EXPONENTIALS.get(_named(call))
        return formula(call.args[0]) if formula else call

    return structural_map(expression, (tvm.ir.Call, written))


def _named(call: tvm.ir.Call) -> str:
    return str(call.op.name) if isinstance(call.op, tvm.ir.Op) else ""


def _exp(x: Any) -> Any:
    """``2^n * exp(r)``, where ``n = round(x / ln 2)`` and ``r = x - n*ln 2``; 0 where that is below the normal numbers.

    Within 1.9 units of roundoff, 1.6 with fused multiply-adds.
    """

    def of(rounded: Any) -> Any:
        value = _let(_reduced(x, rounded), lambda r: _polynomial(r, _exp_terms()))
        # the low bits of `rounded` are those of n, and the shift drops the others
        scaled = tirx.reinterpret(x.ty.dtype, _bits(value) + (_bits(rounded) << _MANTISSA_BITS))
        # infinity, or NaN, that of x
        beyond = x * _like(x, _HUGE)
        return tirx.Select(x <= _like(x, _HIGHEST), tirx.Select(x >= _like(x, _LOWEST), scaled, _like(x, 0)), beyond)

    return _let(_in_powers(x), of)


def _in_powers(x: Any) -> Any:
    """``x / ln 2`` as a whole number, in the low bits."""
    return x * _like(x, 1 / math.log(2)) + _like(x, _ROUNDING)


def _reduced(x: Any, rounded: Any) -> Any:
    """What remains of ``x``, between -ln(2)/2 and ln(2)/2."""
    n = rounded - _like(x, _ROUNDING)
    return x - n * _like(x, _LN2_HIGH) - n * _like(x, _LN2_LOW)


def _expm1(x: Any) -> Any:
    """``2^n * (exp(r) - 1) + (2^n - 1)``, for x up to 80; -1 from -17 on.

    Within 3 units of roundoff, for x that are not positive.
    """
    low = tirx.max(_like(x, -17), x)  # in this order, NaN comes through

    def of(rounded: Any) -> Any:
        scale = tirx.reinterpret(x.ty.dtype, (_bits(rounded) << _MANTISSA_BITS) + _bits_of(x, 1))
        value = _let(_reduced(low, rounded), lambda r: r + r * r * _polynomial(r, _expm1_terms()))
        return _let(scale, lambda scale: scale * value + (scale - _like(x, 1)))

    return _let(_in_powers(low), of)


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


def _log1p(x: Any) -> Any:
    """``x * p(x)`` with a polynomial of degree 11, for x from 0 to 1. Within 3 units of roundoff."""
    return x * _polynomial(x, _log1p_terms())


def _falling(x: Any) -> Any:
    """``-2*|x|``, of whose exponential, less one, `_tanh` is made."""
    return _like(x, -2) * tirx.abs(x)


def _tanh(x: Any, less_one: Any) -> Any:
    """Of ``x`` and ``exp(-2*|x|) - 1``."""
    magnitude = -less_one / (_like(x, 2) + less_one)
    return tirx.Select(x > _like(x, 0), magnitude, -magnitude)


def _expm1_by_exp(x: Any) -> Any:
    """The difference, but near 0, where it cancels, the power series."""
    series = x * _polynomial(x, tuple(1 / math.factorial(n) for n in range(1, 7)))
    return tirx.Select(tirx.abs(x) < _like(x, 0.25), series, tirx.exp(x) - _like(x, 1))


def _log1p_by_log(x: Any) -> Any:
    """The same for a logarithm, for x that are not negative. Within 10 units of roundoff."""
    series = x * _polynomial(x, tuple((-1) ** (n + 1) / n for n in range(1, 10)))
    return tirx.Select(x < _like(x, 1 / 8), series, tirx.log(_like(x, 1) + x))


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
    "tirx.tanh": lambda x: _let(_let(_falling(x), _expm1), lambda less_one: _tanh(x, less_one)),
    _ERF: _erf,
    _EXPM1: _expm1,
    _LOG1P: lambda x: _let(x, _log1p),
}
_BY_EXPONENTIALS: dict[str, Callable[[Any], Any]] = {
    "tirx.tanh": lambda x: _tanh(x, _expm1_by_exp(_falling(x))),
    _ERF: _erf,
    _EXPM1: _expm1_by_exp,
    _LOG1P: _log1p_by_log,
}


# --- polynomials ---


@cache
def _exp_terms() -> tuple[float, ...]:
    """Exponential between -ln(2)/2 and ln(2)/2."""
    half = math.log(2) / 2
    return _interpolated(np.exp, -half, half, 6)


@cache
def _expm1_terms() -> tuple[float, ...]:
    """``(exp(r) - 1 - r) / r^2`` there."""
    half = math.log(2) / 2
    return _interpolated(lambda r: (np.expm1(r) - r) / (r * r), -half, half, 5)


@cache
def _log1p_terms() -> tuple[float, ...]:
    """``log(1 + x)/x`` between 0 and 1."""
    return _interpolated(lambda x: np.log1p(x) / x, 0, 1, 11)


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
