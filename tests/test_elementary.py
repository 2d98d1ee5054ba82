"""Elementary functions in float32: how near they come, where they end, and that no library is called."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm
from gpu_kernels import CUDA, METAL, lowered, simulated
from kernels import kernel
from numpy.typing import NDArray
from tvm import s_tir, te, tirx

from opcompile import elementary
from opcompile.compiled import compiled
from opcompile.lower import lower
from opcompile.reference import reference
from opcompile.spec import ConvTranspose3d
from opcompile.target import target

Array = NDArray[np.float32]
HERE = target("llvm")
UNIT = 2.0**-24
LARGEST, SMALLEST = np.finfo(np.float32).max, np.finfo(np.float32).tiny
SIZE = 1 << 16


def every_float32(step: int) -> Array:
    """One in ``step`` of all bit patterns: both signs, all exponents, numbers that are not normal, NaN, infinities."""
    return np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32).view(np.float32)


@cache
def function(name: str, lanes: int) -> Callable[[Array], Array]:
    x = te.placeholder((SIZE,), "float32", name="X")
    y = te.compute((SIZE,), lambda i: getattr(elementary if hasattr(elementary, name) else tirx, name)(x(i)), name="Y")
    schedule = s_tir.Schedule(te.create_prim_func([x, y]).with_attr("global_symbol", "main"))
    if lanes > 1:
        (i,) = schedule.get_loops(schedule.get_sblock("Y"))
        schedule.vectorize(schedule.split(i, [None, lanes])[1])
    kernel = compiled(schedule.mod, HERE.tvm())["main"]

    def call(values: Array) -> Array:
        whole = np.resize(values, (-(-values.size // SIZE), SIZE))
        given, found = tvm.runtime.empty((SIZE,), "float32"), tvm.runtime.empty((SIZE,), "float32")
        rows = []
        for row in whole:
            given.copyfrom(row)
            kernel(given, found)
            rows.append(found.numpy())
        return np.concatenate(rows)[: values.size]

    return call


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_exponential(lanes: int) -> None:
    x = every_float32(4093)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.exp(x.astype(np.float64))
        y = function("exp", lanes)(x)
    normal = (exact >= SMALLEST) & (exact <= LARGEST)
    assert np.all(np.abs(y[normal] - exact[normal]) <= 1.9 * UNIT * exact[normal])
    assert np.all(y[exact < SMALLEST] == 0)
    assert np.all(np.isinf(y[exact > LARGEST]))
    assert np.array_equal(np.isnan(y), np.isnan(x))


def test_exponential_near_its_ends() -> None:
    for end, beyond in ((SMALLEST, 0), (LARGEST, np.inf)):
        x = (np.float32(np.log(end)).view(np.int32) + np.arange(-300, 300, dtype=np.int32)).view(np.float32)
        exact = np.exp(x.astype(np.float64))
        y = function("exp", 8)(x)
        near = np.abs(y - exact) <= 1.9 * UNIT * exact
        outside = (exact < end * (1 + 2 * UNIT)) if beyond == 0 else (exact > end * (1 - 2 * UNIT))
        assert np.all(near | (outside & (y == beyond)))
        assert np.any(near)
        assert np.any(y == beyond)
    assert function("exp", 8)(np.array([0, -0.0, -np.inf, np.inf], np.float32)).tolist() == [1, 1, 0, np.inf]


@pytest.mark.parametrize("lanes", [1, 8])
def test_logarithm(lanes: int) -> None:
    x = every_float32(4093)
    x = np.concatenate([x[(x >= SMALLEST) & (x <= 2.0**126)], np.linspace(1, 2, 1 << 16, dtype=np.float32)])
    exact = np.log(x.astype(np.float64))
    assert np.all(np.abs(function("log", lanes)(x) - exact) <= 2 * UNIT * np.abs(exact))
    assert np.isnan(function("log", lanes)(np.array([np.nan], np.float32))).all()


@pytest.mark.parametrize("lanes", [1, 8])
def test_hyperbolic_tangent_and_error_function(lanes: int) -> None:
    x = np.concatenate([every_float32(65521), np.linspace(-10, 10, 1 << 16, dtype=np.float32)])
    x = x[~np.isnan(x)]
    exact = np.array([math.erf(value) for value in x])
    # of a range of one; what the bound grants is 8
    assert np.all(np.abs(function("tanh", lanes)(x) - np.tanh(x.astype(np.float64))) <= 4 * UNIT)
    assert np.all(np.abs(function("erf", lanes)(x) - exact) <= 4 * UNIT)
    for name in ("tanh", "erf", "expm1", "log1p"):
        assert np.isnan(function(name, lanes)(np.array([np.nan], np.float32))).all()


@pytest.mark.parametrize("lanes", [1, 8])
def test_what_is_near_zero_keeps_its_digits(lanes: int) -> None:
    x = every_float32(4093)
    x = np.concatenate([x[np.abs(x) >= SMALLEST], np.linspace(0, 1, 1 << 16, dtype=np.float32)[1:]])
    for name, exact, some in (
        ("tanh", np.tanh, x),
        ("expm1", np.expm1, np.concatenate([-np.abs(x), -32 * np.abs(x[np.abs(x) < 1])])),
        ("log1p", np.log1p, x[(x > 0) & (x <= 1)]),
    ):
        right = exact(some.astype(np.float64))
        assert np.all(np.abs(function(name, lanes)(some) - right) <= 4 * UNIT * np.abs(right)), name
        assert not function(name, lanes)(np.zeros(1, np.float32)).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("on", ["llvm", CUDA, METAL], ids=["llvm", "cuda", "metal"])
def test_no_activation_loses_what_is_near_zero(dtype: str, on: Any) -> None:
    """Softplus of -20 is 2e-9, whose logarithm is a number."""
    if on == METAL and dtype == "float64":
        return
    z = np.concatenate([np.logspace(-9, 1.3, 40), -np.logspace(-9, 1.3, 40)]).astype(dtype)
    unit = UNIT if dtype == "float32" else 2.0**-53
    for name in ("softplus", "log_sigmoid", "tanh", "elu", "selu"):
        spec = ConvTranspose3d.parse(f"in=1x1x1x1x{z.size} co=1 k=1 bias=0 act={name} dtype={dtype}")
        x, w = z.reshape(spec.x_shape), np.ones(spec.w_shape, dtype)
        exact = reference(spec, x.astype(np.float64), w.astype(np.float64))
        run = kernel(spec) if on == "llvm" else simulated(lowered(spec, on))
        assert np.all(np.abs(run(x, w) - exact) <= 64 * unit * np.abs(exact)), name


@pytest.mark.parametrize("on", [CUDA, METAL], ids=["cuda", "metal"])
def test_power_series_of_gpus_meet_what_they_replace(on: Any) -> None:
    """Within what the bound grants the formula alone, softplus and log_sigmoid relative to the result."""
    z = np.linspace(-4, 0, 4001, dtype=np.float32)[:-1]
    for name, granted in (("softplus", 16), ("elu", 8)):
        spec = ConvTranspose3d.parse(f"in=1x1x1x1x{z.size} co=1 k=1 bias=0 act={name}")
        x, w = z.reshape(spec.x_shape), np.ones(spec.w_shape, np.float32)
        exact = reference(spec, x.astype(np.float64), w.astype(np.float64))
        assert np.all(np.abs(simulated(lowered(spec, on))(x, w) - exact) <= granted * UNIT * np.abs(exact)), name


@pytest.mark.parametrize(
    "activation", ["sigmoid", "silu", "tanh", "elu", "selu", "mish", "softplus", "log_sigmoid", "gelu_tanh", "gelu"]
)
def test_no_activation_calls_a_library_in_float32(activation: str) -> None:
    code = lower(ConvTranspose3d.parse(f"in=1x1x1x1x9 co=1 k=1 act={activation}"), HERE).object_code
    assert not re.search(rb"\0(exp|exp2|expm1|log|log1p|erf|tanh)f\0", code)


def test_float64_keeps_the_library() -> None:
    code = lower(ConvTranspose3d.parse("in=1x1x1x1x9 co=1 k=1 act=sigmoid dtype=float64"), HERE).object_code
    assert b"\0exp\0" in code
