"""The bound holds for every honest computation, and for nothing else."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, localcontext

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import activations, arrays, specs

from opcompile import bounds as module
from opcompile.bounds import FORMATS, SUMS, Inputs, bounds, compare
from opcompile.cases import Case, case, tagged
from opcompile.errors import CallError, VerificationError
from opcompile.reference import activate, linear, reference
from opcompile.spec import ACTIVATIONS, Activation, ConvTranspose3d

SMALL = [c for c in tagged("corner") if c.spec.flops < 1e7]
by_name = {"ids": lambda c: c.name}


def stored(spec: ConvTranspose3d, y: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return y.astype(np.dtype(spec.dtype))


# --- honest computations stay within ---


def in_float32(spec: ConvTranspose3d, x, w, b, order: str) -> np.ndarray:
    """Sum products of float32 in float32, one at a time, in some order; fused, or rounding each product."""
    rng = np.random.default_rng(0)
    channels = spec.channels_in // spec.groups
    taps = [(c, *t) for c in range(channels) for t in np.ndindex(*w.shape[2:])]
    if order == "backwards":
        taps.reverse()
    elif order != "forwards":
        rng.shuffle(taps)
    w32, x32 = w.astype(np.float32), x.astype(np.float32)
    partial = []
    for c, *tap in taps:
        alone = np.zeros_like(w32)
        of_group = (slice(c, None, channels), slice(None), *tap)
        alone[of_group] = w32[of_group]
        partial.append(linear(spec, x32, alone))  # products of float32 are exact in float64
    start = 0.0 if b is None else b.astype(np.float32)
    start = start if b is None or spec.layout == "NDHWC" else start[:, None, None, None]
    bias_first = order in ("backwards", "fused")
    total = np.zeros(partial[0].shape, np.float32) + (start if bias_first else 0)
    if order == "pairwise":
        total = np.add.reduce([p.astype(np.float32) for p in partial], axis=0, dtype=np.float32)
    else:
        for p in partial:
            total = (total + p if order == "fused" else total + p.astype(np.float32)).astype(np.float32)
    return total if bias_first else (total + start).astype(np.float32)


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled", "fused", "pairwise"])
@pytest.mark.parametrize("name", ["k3-s2", "groups", "dilated-coprime", "channels-last-groups", "float16"])
def test_every_order_of_summation_keeps_within(name: str, order: str) -> None:
    spec = case(name).spec
    x, w, b = arrays(spec)
    y = in_float32(spec, x, w, b, order)
    check = compare(spec, stored(spec, y), x, w, b)
    assert check.passed
    if spec.dtype == "float32":
        # and the bound is no more than some ten times what really happens
        assert check.worst > 0.02


@settings(max_examples=60)
@given(specs(dtypes=("float32", "float16", "bfloat16"), most_outputs=3000), st.sampled_from(["shuffled", "fused"]))
def test_any_layer_in_float32_keeps_within(spec: ConvTranspose3d, order: str) -> None:
    x, w, b = arrays(spec)
    z = in_float32(spec, x, w, b, order)
    y = stored(spec, naive(spec.activation, z))
    assert compare(spec, y, x, w, b).passed
    assert compare(spec, stored(spec, reference(spec, x, w, b)), x, w, b).passed


def naive(activation: Activation, z: np.ndarray) -> np.ndarray:
    """Activations as one writes them first, every step rounded to float32."""
    one, p = np.float32(1), [np.float32(v) for v in activation.parameters]
    erf = np.vectorize(lambda v: np.float32(__import__("math").erf(v)), otypes=[np.float32])
    with np.errstate(over="ignore"):
        half = np.float32(0.5)
        sigmoid = one / (one + np.exp(-z))
        softplus = np.log1p(np.exp(-np.abs(z))) + np.maximum(z, 0)
        tanh_of = {"mish": softplus, "gelu_tanh": np.float32(0.7978846) * (z + np.float32(0.044715) * z * z * z)}
        y = {
            "none": lambda: z,
            "relu": lambda: np.maximum(z, 0),
            "relu6": lambda: np.clip(z, 0, 6),
            "leaky_relu": lambda: np.where(z > 0, z, p[0] * z),
            "elu": lambda: np.where(z > 0, z, p[0] * (np.exp(np.minimum(z, 0)) - one)),
            "selu": lambda: p[1] * np.where(z > 0, z, p[0] * np.exp(np.minimum(z, 0)) - p[0]),
            "gelu": lambda: z * np.float32(0.5) * (one + erf(z * np.float32(0.70710677))),
            "gelu_tanh": lambda: z * np.float32(0.5) * (one + np.tanh(tanh_of["gelu_tanh"])),
            "sigmoid": lambda: sigmoid,
            "hard_sigmoid": lambda: np.clip(p[0] * z + p[1], 0, 1),
            "silu": lambda: z * sigmoid,
            "hard_silu": lambda: z * np.clip(z + np.float32(3), 0, 6) / np.float32(6),
            "mish": lambda: z * np.tanh(tanh_of["mish"]),
            "softplus": lambda: softplus,
            "softsign": lambda: z / (one + np.abs(z)),
            "tanh": lambda: one - np.float32(2) / (np.exp(z + z) + one),
            "exponential": lambda: np.exp(z),
            "hard_tanh": lambda: np.clip(z, -1, 1),
            "soft_shrink": lambda: np.where(z > 0.5, z - half, np.where(z < -0.5, z + half, 0)).astype(np.float32),
            "hard_shrink": lambda: np.where(np.abs(z) > half, z, 0).astype(np.float32),
            "tanh_shrink": lambda: z - np.tanh(z),
            "log_sigmoid": lambda: np.minimum(z, 0) - np.log1p(np.exp(-np.abs(z))),
            "squareplus": lambda: half * (z + np.sqrt(z * z + np.float32(4))),
            "sparse_plus": lambda: np.where(z < -1, 0, np.where(z < 1, half * half * (z + one) ** 2, z)),
        }[activation.name]()
    assert y.dtype == np.float32
    return y


@settings(max_examples=300)
@given(activations(), st.floats(-60, 60, width=32), st.integers(0, 2**31))
def test_naive_activations_keep_within(activation: Activation, centre: float, seed: int) -> None:
    spec = ConvTranspose3d.parse(f"in=1x1x1x1x200 co=1 k=1 bias=0 act={activation}")
    x = (centre + np.random.default_rng(seed).standard_normal(spec.x_shape)).astype(np.float32)
    w = np.ones(spec.w_shape, np.float32)
    assert compare(spec, naive(activation, x), x, w).passed


# --- what the constants claim ---


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slope_is_the_largest_derivative(name: str) -> None:
    for activation in [Activation(name), *([Activation(name, (2.5,))] if ACTIVATIONS[name] else [])]:
        if name == "exponential":
            continue
        z = np.linspace(-12, 12, 240_001)
        slopes = np.abs(np.diff(activate(activation, z)) / np.diff(z))
        steepest = slopes[slopes < 1000].max()  # a jump has none
        slope = module._carries(activation).slope
        assert steepest <= slope * (1 + 1e-9)
        assert slope <= steepest * 1.01


@settings(max_examples=200)
@given(activations(), st.floats(-40, 40), st.floats(0, 3))
def test_errors_of_the_sum_are_carried_through(activation: Activation, z: float, error: float) -> None:
    here, error_array = np.array([z]), np.array([error])
    allowed = module._through(activation, here, activate(activation, here), error_array, FORMATS["float32"])
    for moved in z + error * np.linspace(-0.999999, 0.999999, 9):  # the ends themselves would round
        assert abs(activate(activation, np.array([moved])) - activate(activation, here))[0] <= allowed[0]


def of_decimal(activation: Activation, z: Decimal) -> Decimal:
    """Activations to as many digits as the context has."""
    first, second, *_ = (*map(Decimal, activation.parameters), Decimal(0), Decimal(0))
    exponential = (-abs(z)).exp()
    return {
        "relu": lambda: max(z, Decimal(0)),
        "relu6": lambda: min(max(z, Decimal(0)), Decimal(6)),
        "leaky_relu": lambda: max(z, first * z),
        "elu": lambda: z if z > 0 else first * (exponential - 1),
        "selu": lambda: second * (z if z > 0 else first * (exponential - 1)),
        "sigmoid": lambda: (1 if z > 0 else exponential) / (1 + exponential),
        "hard_sigmoid": lambda: min(max(first * z + second, Decimal(0)), Decimal(1)),
        "softplus": lambda: max(z, Decimal(0)) + (1 + exponential).ln(),
        "softsign": lambda: z / (1 + abs(z)),
        "tanh": lambda: (1 - exponential**2) / (1 + exponential**2) * (1 if z > 0 else -1),
        "hard_tanh": lambda: min(max(z, Decimal(-1)), Decimal(1)),
    }[activation.name]()


# sums that are far from 0, near it, and as far as the error reaches; the ends are 1 and 0 of a hard_sigmoid
PLACES = [
    (40.0, 1e-3),
    (-40.0, 45.0),
    (0.3, 1e-13),
    (-3.1, 2e-15),
    (-18.7, 1e-9),
    (3.0, 1e-16),
    (-3.0, 0.5),
    (0.9, 7.0),
    (-5.0, 5.5),
]


ROUNDED = ("leaky_relu", "elu", "selu", "sigmoid", "hard_sigmoid", "softplus", "softsign", "tanh")
WITH_PARAMETERS = ("leaky_relu:0.9", "elu:7.5", "elu:-2", "selu:0.1:3.0", "hard_sigmoid:-0.7:0.2")


@pytest.mark.parametrize("act", ["relu", "relu6", "hard_tanh", *ROUNDED, *WITH_PARAMETERS])
def test_errors_of_the_sum_are_carried_through_to_the_last_digit(act: str) -> None:
    """Where double precision computes f to fewer digits than the bound has: no more may be cut off it than is true."""
    activation = Activation.parse(act)
    for z, error in PLACES:
        here = np.array([z + step * 2.0**-40 for step in range(6)])
        y = activate(activation, here)
        allowed = module._through(activation, here, y, np.full(here.shape, error), FORMATS["float64"])
        kept = module._carried(activation, module._carries(activation), here, y, np.full(here.shape, error))
        with localcontext(prec=60):
            for at, right, most, carried in zip(
                here.tolist(), y.tolist(), allowed.tolist(), kept.tolist(), strict=True
            ):
                true = of_decimal(activation, Decimal(at))
                assert abs(true - Decimal(right)) <= Decimal(most)
                for part in ("-1", "0.4", "0.9", "1"):
                    moved = of_decimal(activation, Decimal(at) + Decimal(part) * Decimal(error))
                    # the bound's own arithmetic rounds too
                    assert abs(moved - true) <= Decimal(carried) * (1 + Decimal(2) ** -51), (at, error, part)


@pytest.mark.parametrize("z", [64.0, -64.0])
@pytest.mark.parametrize(
    ("act", "wrong"),
    [
        ("tanh", (5, -5, 0, 0.99)),
        ("sigmoid", (-3, 0.5)),
        ("softsign", (1.5, -1.5, 0)),
        ("hard_tanh", (2, -2, 0)),
        ("hard_sigmoid", (7, -1, 0.5)),
        ("relu6", (6.5, -0.5, 3)),
        ("elu", (-1.5,)),
    ],
)
def test_an_activation_cuts_the_error_of_the_sum_off(act: str, wrong: tuple[float, ...], z: float) -> None:
    spec = ConvTranspose3d.parse(f"in=1x2x1x1x1 co=1 k=1 bias=0 act={act}")
    x, w = np.array([1e8 + z, -1e8], np.float32).reshape(spec.x_shape), np.ones(spec.w_shape, np.float32)
    w[0] += np.float32(2.0**-23)  # no exact sum
    right = reference(spec, x, w)
    assert compare(spec, right.astype(np.float32), x, w).passed
    for value in wrong:
        assert not compare(spec, np.full(x[:, :1].shape, value, np.float32), x, w).passed


@pytest.mark.parametrize("act", ["elu:1e30", "elu:-1e30", "selu:1e30:1", "leaky_relu:1e30", "hard_sigmoid:1e30:0.5"])
def test_no_bound_is_nan_where_the_slope_carries_beyond_the_largest_number(act: str) -> None:
    spec = ConvTranspose3d.parse(f"in=1x1x1x1x2 co=1 k=1 bias=0 act={act} dtype=float64")
    x, w = np.array([1e300, 1e295]).reshape(spec.x_shape), np.full(spec.w_shape, 1.1)
    allowed = bounds(spec, x, w)
    assert not np.isnan(allowed).any()
    assert "-" in act or np.isfinite(allowed).all()
    assert "-" in act or not compare(spec, 1.5 * reference(spec, x, w), x, w).passed


def test_a_jump_is_granted_where_the_error_reaches_it_and_nowhere_else() -> None:
    shrink, error = Activation("hard_shrink"), np.array(0.125)
    z = np.linspace(-1, 1, 129)  # multiples of 1/64: nothing rounds
    allowed = module._through(shrink, z, activate(shrink, z), error, FORMATS["float32"])
    for moved in (z + step for step in np.linspace(-0.125, 0.125, 17)):
        assert (np.abs(activate(shrink, moved) - activate(shrink, z)) <= allowed).all()
    np.testing.assert_array_equal(allowed == error, np.abs(np.abs(z) - 0.5) > error)
    np.testing.assert_array_equal(module._through(shrink, z, z, np.array(0.0), FORMATS["float32"]), 0 * z)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_formats_are_those_of_numpy(dtype: str) -> None:
    info, ours = np.finfo(dtype), FORMATS[dtype]
    assert ours.unit == info.eps / 2
    assert ours.floor == (info.smallest_normal if ours.flushes else info.smallest_subnormal / 2)
    with np.errstate(over="ignore"):
        assert dtype == "float64" or np.isinf(np.float64(ours.limit).astype(dtype))
        assert np.nextafter(ours.limit, 0).astype(dtype) == info.max or dtype == "float64"


def test_bfloat16_is_that_of_ml_dtypes() -> None:
    info, ours = ml_dtypes.finfo(ml_dtypes.bfloat16), FORMATS["bfloat16"]
    assert ours.unit == float(info.eps) / 2
    assert ours.floor == float(info.smallest_normal)
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    ties = (np.arange(0x3F80, 0x4080, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    for v in (values, ties, values * np.float32(1e-39)):
        np.testing.assert_array_equal(module.rounded("bfloat16", v), v.astype(ml_dtypes.bfloat16).astype(float))


def test_gamma_by_hand() -> None:
    # one product, no bias: one rounding; two: the sum rounds once more; the oracle's own error is 2^-29 of it
    spec = ConvTranspose3d.parse("in=1x1x1x1x1 co=1 k=1 bias=0")
    one = np.full((1, 1, 1, 1, 1), np.float32(1.1))
    u = 2.0**-24
    assert bounds(spec, one, one).item() == pytest.approx(float(one.item()) ** 2 * u, rel=1e-6)
    spec = ConvTranspose3d.parse("in=1x2x1x1x1 co=1 k=1")
    x, w = np.array([1.1, -1.1], np.float32).reshape(1, 2, 1, 1, 1), np.ones((2, 1, 1, 1, 1), np.float32)
    expected = (2 * float(x[0, 0].item()) + 0.5) * 3 * u
    assert bounds(spec, x, w, np.array([-0.5], np.float32)).item() == pytest.approx(expected, rel=1e-6)


def test_rounding_the_inputs_first_costs_two_roundings_more() -> None:
    spec = ConvTranspose3d.parse("in=1x1x1x1x1 co=1 k=1 bias=0 dtype=float64")
    one = np.full((1, 1, 1, 1, 1), 1.1)
    assert bounds(spec, one, one, computed_in="float32").item() == pytest.approx(1.21 * 3 * 2.0**-24, rel=1e-6)
    assert bounds(spec, one, one).item() == pytest.approx(1.21 * 3 * 2.0**-53, rel=1e-6)  # one, and two of the oracle


# --- and dishonest ones do not ---


@pytest.mark.parametrize("c", SMALL, **by_name)
def test_one_element_bent_by_two_bounds_is_seen(c: Case) -> None:
    spec = c.spec
    x, w, b = arrays(spec)
    y, allowed = reference(spec, x, w, b), bounds(spec, x, w, b)
    assert allowed.shape == y.shape
    assert np.isfinite(allowed).all()
    # none that an activation cut off: there the one right answer is 0
    at = tuple(np.random.default_rng(5).choice(np.argwhere(allowed > 0)))
    y[at] += 2 * allowed[at]
    check = compare(spec, y, x, w, b)
    assert not check.passed
    assert check.failures == 1
    assert check.index == tuple(at)
    # in float64 the bend itself rounds
    assert check.worst == pytest.approx(2, rel=0.02)
    assert check.largest_error == pytest.approx(2 * allowed[at], rel=0.02)
    with pytest.raises(VerificationError, match=r"FAIL \(1 of"):
        check.require()
    y[at] -= 1.5 * allowed[at]
    assert compare(spec, y, x, w, b).passed


@pytest.mark.parametrize("c", [c for c in SMALL if c.spec.dtype == "float32" and "activation" not in c.tags], **by_name)
def test_the_bound_is_small(c: Case) -> None:
    x, w, b = arrays(c.spec)
    scale = np.abs(reference(c.spec, x, w, b)).max()
    assert bounds(c.spec, x, w, b).max() < 1e-3 * scale


WRONG = {
    "a flipped kernel": lambda s, x, w, b: (s, x, w[:, :, ::-1, ::-1, ::-1], b),
    "one tap wrong": lambda s, x, w, b: (s, x, w + (np.arange(w.size).reshape(w.shape) == w.size // 2), b),
    "two taps swapped": lambda s, x, w, b: (s, x, np.concatenate([w[..., 1:2], w[..., :1], w[..., 2:]], axis=-1), b),
    "no bias": lambda s, x, w, b: (s, x, w, None),
    "bias of the next channel": lambda s, x, w, b: (s, x, w, np.roll(b, 1)),
    "channels swapped": lambda s, x, w, b: (s, x[:, ::-1], w, b),
    "crop off by one": lambda s, x, w, b: (
        replace(s, axes=(*s.axes[:2], replace(s.axes[2], pad=(s.axes[2].pad[0] - 1, s.axes[2].pad[1] + 1)))),
        x,
        w,
        b,
    ),
    "another dilation": lambda s, x, w, b: (
        replace(s, axes=(replace(s.axes[0], dilation=2, pad=(2, 2)), *s.axes[1:])),
        x,
        w,
        b,
    ),
    "no activation": lambda s, x, w, b: (replace(s, activation=Activation("leaky_relu")), x, w, b),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("exact", [True, False])
def test_a_wrong_operator_is_seen(wrong: str, exact: bool) -> None:
    spec = ConvTranspose3d.parse("in=1x4x3x4x5 co=6 k=3 s=2 p=1 op=1 act=relu")
    x, w, b = arrays(spec, integers=8 if exact else None)
    assert compare(spec, stored(spec, reference(spec, x, w, b)), x, w, b, exact=exact).passed
    other, *inputs = WRONG[wrong](spec, x, w, b)
    assert not compare(spec, reference(other, *inputs), x, w, b, exact=exact).passed


def test_exact_sees_the_last_bit() -> None:
    spec = case("k3-s2").spec
    x, w, b = arrays(spec, integers=8)
    y = stored(spec, reference(spec, x, w, b))
    assert compare(spec, y, x, w, b, exact=True).criterion == "bits"
    y[0, 3, 2, 1, 4] = np.nextafter(y[0, 3, 2, 1, 4], np.float32(np.inf))
    check = compare(spec, y, x, w, b, exact=True)
    assert (check.failures, check.index, check.worst) == (1, (0, 3, 2, 1, 4), np.inf)


def test_exact_sums_leave_the_activation_its_bound() -> None:
    spec = replace(case("k3-s2").spec, activation=Activation("sigmoid"))
    x, w, b = arrays(spec, integers=8)
    y = reference(spec, x, w, b)
    check = compare(spec, y.astype(np.float32), x, w, b, exact=True)
    assert check.passed
    assert check.criterion == "exact sums"
    # 16 units of roundoff, the constant of an elementary function, and nothing for the sums
    assert bounds(spec, x, w, b).max() < 17 * 2.0**-24
    y[0, 0, 0, 0, 0] += 20 * 2.0**-24
    assert not compare(spec, y, x, w, b, exact=True).passed


@given(specs())
def test_exact_holds_for_the_rounded_oracle_of_any_layer(spec: ConvTranspose3d) -> None:
    x, w, b = arrays(spec, integers=4)
    assert compare(spec, stored(spec, reference(spec, x, w, b)), x, w, b, exact=True).passed


# --- formats: overflow, nothing to judge, engines of another precision ---


def half(*values: float) -> tuple[ConvTranspose3d, np.ndarray, np.ndarray]:
    spec = ConvTranspose3d.parse(f"in=1x1x1x1x{len(values)} co=1 k=1 bias=0 dtype=float16")
    return spec, np.array(values, np.float16).reshape(spec.x_shape), np.full(spec.w_shape, 16, np.float16)


@pytest.mark.parametrize("exact", [True, False])
def test_overflow_is_infinity_and_nothing_else(exact: bool) -> None:
    spec, x, w = half(5000, -5000, 1, 4095)  # times 16: 80000, -80000, 16, 65520 (a tie, which rounds to infinity)
    right = np.array([np.inf, -np.inf, 16, np.inf], np.float16).reshape(x.shape)
    assert compare(spec, right, x, w, exact=exact).passed
    for at, value in [(0, 65504), (0, -np.inf), (1, np.inf), (0, np.nan), (2, np.inf), (2, np.nan), (1, -65504)]:
        bent = right.copy()
        bent[..., at] = value
        assert compare(spec, bent, x, w, exact=exact).failures == 1, value


def test_near_the_limit_both_are_right() -> None:
    spec, x, w = half(4094.0, 4094.5)  # 65504, the largest; 65512, which rounds to it
    x[..., 1] += np.float16(0.0)
    assert compare(spec, np.full(x.shape, 65504, np.float16), x, w).passed


def test_where_the_bound_reaches_beyond_both_limits_either_infinity_is_right() -> None:
    """Products of 3.7e9 that cancel: their float32 sums err by more than the largest float16."""
    spec = ConvTranspose3d.parse("in=1x2048x1x1x1 co=1 k=1 bias=0 dtype=float16")
    x = (32 * np.random.default_rng(0).integers(1500, 2047, 1024)).astype(np.float16)
    x, w = np.concatenate([x, x]).reshape(spec.x_shape), np.concatenate([x, -x]).reshape(spec.w_shape)
    assert reference(spec, x, w) == 0
    for value, passed in [(np.inf, True), (-np.inf, True), (np.nan, False)]:
        assert compare(spec, np.full((1, 1, 1, 1, 1), value, np.float16), x, w).passed == passed
    inputs = module.Inputs.of(spec, x, w, None)
    either = {name: module.Answer(np.full(spec.y_shape, v, np.float16)) for name, v in (("+", np.inf), ("-", -np.inf))}
    assert module.compare_all(inputs, either, False, [("+", "-")])["+", "-"].passed


def test_two_answers_may_fall_on_either_side_of_the_limit() -> None:
    spec, x, w = half(4094)  # times 16: 65504, the largest number; its bound reaches what rounds to infinity
    y = {name: module.Answer(np.full(x.shape, v, np.float16)) for name, v in (("low", 65504), ("high", np.inf))}
    inputs = module.Inputs.of(spec, x, w, None)
    checks = module.compare_all(inputs, y, False, [("low", "high"), ("high", "low"), ("high", "reference")])
    assert all(check.passed for check in checks.values()), checks


def test_another_engine_s_own_limit_counts_between_two_answers() -> None:
    spec = ConvTranspose3d.parse("in=1x1x1x1x1 co=1 k=1 bias=0 act=exponential dtype=float64")
    x, w = np.full(spec.x_shape, 90.0), np.ones(spec.w_shape)
    inputs = module.Inputs.of(spec, x, w, None)
    beyond = module.Answer(np.full(x.shape, np.inf), "float32")  # as an engine has it that computes in float32
    pairs = [("ours", "beyond"), ("beyond", "ours"), ("ours", "reference")]
    for exact in (False, True):
        right = {"ours": module.Answer(np.exp(x)), "beyond": beyond}
        assert all(check.passed for check in module.compare_all(inputs, right, exact, pairs).values())
        wrong = {"ours": module.Answer(np.full(x.shape, np.inf)), "beyond": beyond}
        assert not module.compare_all(inputs, wrong, exact, pairs)["ours", "reference"].passed


def test_sums_that_may_overflow_are_not_judged() -> None:
    spec = ConvTranspose3d.parse("in=1x2x1x1x2 co=1 k=1 bias=0")
    x, w = np.ones((1, 2, 1, 1, 2), np.float32), np.ones((2, 1, 1, 1, 1), np.float32)
    x[..., 0] = np.array([3e38, -3e38]).reshape(1, 2, 1, 1)
    check = compare(spec, np.array([np.nan, 2], np.float32).reshape(1, 1, 1, 1, 2), x, w)
    assert check.passed
    assert check.unjudged == 1
    alone = ConvTranspose3d.parse("in=1x2x1x1x1 co=1 k=1 bias=0")
    check = compare(alone, np.zeros((1, 1, 1, 1, 1)), x[..., :1], w)
    assert (check.passed, check.judged, check.failures) == (False, False, 0)
    with pytest.raises(VerificationError, match=r"nothing to judge by bound: every sum may overflow"):
        check.require()


@pytest.mark.parametrize(("x", "w"), [(1e300, 1e-300), (1e-300, 1e300), (2.0**200, 0.0)])
def test_a_factor_that_an_engine_rounds_to_infinity_leaves_nothing_to_judge(x: float, w: float) -> None:
    spec = ConvTranspose3d.parse("in=1x1x1x1x1 co=1 k=1 bias=0 dtype=float64")
    x, w = np.full(spec.x_shape, x), np.full(spec.w_shape, w)
    with np.errstate(all="ignore"):
        y = x.astype(np.float32) * w.astype(np.float32)
    assert not np.isfinite(y).all()
    assert not compare(spec, y, x, w, computed_in="float32").judged
    assert not compare(spec, y, x, w).passed


def test_the_product_of_a_hard_sigmoid_is_rounded_before_anything_is_added() -> None:
    spec = ConvTranspose3d.parse("in=1x1x1x1x1 co=1 k=1 bias=0 act=hard_sigmoid:1e-37:0")
    x, w = np.full(spec.x_shape, 12345677, np.float32), np.ones(spec.w_shape, np.float32)
    y = np.float32(1e-37) * x
    assert (y != reference(spec, x, w)).all()
    compare(spec, y, x, w).require()


def test_a_sum_far_below_zero_that_is_nearly_all_error_has_an_exponential_that_is_not_judged() -> None:
    """z is -1000, e^z is no number but 0; a sum from left to right in float32 is 0, and its exponential 1."""
    n = 1000
    spec = ConvTranspose3d.parse(f"in=1x{n + 2}x1x1x1 co=1 k=1 bias=0 act=exponential")
    x, w = np.ones(spec.x_shape, np.float32), np.array([2.0**34, *[-1.0] * n, -(2.0**34)], np.float32)
    assert np.add.accumulate(w)[-1] == 0
    check = compare(spec, np.ones(spec.y_shape, np.float32), x, w.reshape(spec.w_shape))
    assert (check.failures, check.unjudged) == (0, 1)


@pytest.mark.parametrize(
    ("z", "error"), [(-750.0, 700.0), (-750.0, 0.5), (-740.0, 730.0), (-3.0, 2.0), (5.0, 1e-9), (0.0, 1.0)]
)
def test_the_bound_of_an_exponential_holds_where_it_begins_at_no_number(z: float, error: float) -> None:
    formats = FORMATS["float64"]
    y = np.exp(np.array([z]))
    bound = module._through(Activation("exponential"), np.array([z]), y, np.array([error]), formats)
    with localcontext() as exact:
        exact.prec = 60
        assert Decimal(float(bound[0])) >= (Decimal(z) + Decimal(error)).exp() - Decimal(z).exp()


def test_exponential_overflows_where_the_oracle_does() -> None:
    spec = ConvTranspose3d.parse("in=1x1x1x1x3 co=1 k=1 bias=0 act=exponential")
    x, w = np.array([1.5, 88.75, 1000.5], np.float32).reshape(spec.x_shape), np.ones(spec.w_shape, np.float32)
    assert bounds(spec, x, w)[0, 0, 0, 0, 2] == 0
    right = np.array([np.exp(1.5), np.inf, np.inf]).reshape(x.shape)
    assert compare(spec, right, x, w).passed
    for at, value in [(0, np.inf), (1, 1e38), (2, 3e38), (2, np.nan)]:
        bent = right.copy()
        bent[..., at] = value
        assert compare(spec, bent, x, w).failures == 1


def test_a_double_on_either_side_of_the_limit_is_right() -> None:
    """The oracle's own sum lies beyond the last z with a finite exponential, and the exact one does not."""
    spec = ConvTranspose3d.parse("in=1x3x1x1x2 co=1 k=1 bias=0 act=exponential dtype=float64")
    x, w = np.ones(spec.x_shape), np.array([300.1, -400.3, 810.0]).reshape(spec.w_shape)
    w[2] = np.nextafter(np.log(np.finfo(np.float64).max), np.inf) - (w[0] + w[1])
    x[..., 1] = 1.01  # far beyond
    assert np.isinf(reference(spec, x, w)).all()
    edge = np.finfo(np.float64).max * (1 - 2.0**-45)
    for value, failures in [(np.inf, 0), (edge, 0), (1.7e308, 1), (-np.inf, 1), (np.nan, 1)]:
        y = np.array([value, np.inf]).reshape(1, 1, 1, 1, 2)
        assert compare(spec, y, x, w).failures == failures, value
    assert compare(spec, np.array([np.inf, edge]).reshape(1, 1, 1, 1, 2), x, w).failures == 1
    assert np.isfinite(bounds(spec, x[..., :1] * (1 - 1e-9) * np.ones(2), w)).all()


def test_a_double_that_a_scale_carries_over_the_limit() -> None:
    spec = ConvTranspose3d.parse("in=1x1x1x1x2 co=1 k=1 bias=0 act=leaky_relu:1e30 dtype=float64")
    most = np.finfo(np.float64).max
    x, w = np.array([np.nextafter(-most / 1e30, -np.inf), -most / 1e29]).reshape(spec.x_shape), np.ones(spec.w_shape)
    assert compare(spec, np.array([np.nextafter(-most, 0), -np.inf]).reshape(x.shape), x, w).passed
    assert compare(spec, np.array([-np.inf, -0.999 * most]).reshape(x.shape), x, w).failures == 1


def test_subnormals_may_be_flushed_where_hardware_does_so() -> None:
    spec = ConvTranspose3d.parse("in=1x1x1x1x2 co=1 k=1 bias=0")
    x, w = np.array([1e-40, 1e-10], np.float32).reshape(spec.x_shape), np.ones(spec.w_shape, np.float32)
    assert compare(spec, x, x, w).passed
    assert compare(spec, np.array([0, 1e-10], np.float32).reshape(x.shape), x, w).passed
    assert not compare(spec, np.array([0, 0], np.float32).reshape(x.shape), x, w).passed


def test_a_product_that_is_flushed_is_granted_as_large_as_the_scale_behind_it_makes_it() -> None:
    spec = ConvTranspose3d.parse("in=1x1x1x1x1 co=1 k=1 bias=0 act=selu:1e-35:1e35")
    x, w = np.full(spec.x_shape, np.float32(-1e-4)), np.ones(spec.w_shape, np.float32)  # times 1e-35: subnormal
    assert compare(spec, x, x, w).passed
    assert compare(spec, 0 * x, x, w).passed
    assert not compare(spec, np.full(x.shape, -0.1, np.float32), x, w).passed


def test_an_engine_of_another_precision_is_judged_by_its_own() -> None:
    spec = case("float64").spec
    x, w, b = arrays(spec)
    narrow = (a.astype(np.float32) for a in (x, w, b))
    y = reference(spec, *narrow).astype(np.float32).astype(np.float64)
    assert compare(spec, y, x, w, b, computed_in="float32").passed
    assert not compare(spec, y, x, w, b).passed
    with pytest.raises(ValueError, match="float16"):
        compare(spec, y, x, w, b, computed_in="float16")


@pytest.mark.parametrize("channels", [2**22, 2**23])
def test_sums_of_too_many_products_are_not_judged(channels: int) -> None:
    """From 2^24 roundings on nothing follows for float32, and nothing passes."""
    spec = ConvTranspose3d.parse(f"in=1x{channels}x1x2x2 co=1 k=1x2x2 p=0x1x1 bias=0")
    assert spec.terms == 4 * channels
    x, w = (np.full(shape, 0.5, np.float32) for shape in (spec.x_shape, spec.w_shape))
    check = compare(spec, np.full((1, 1, 1, 1, 1), -1e6, np.float32), x, w)
    assert (check.passed, check.unjudged) == (False, 1)


# --- the questions themselves are checked ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, w, b: (x[:, :1], w, b), "x has shape"),
        (lambda x, w, b: (x, w[:1], b), "w has shape"),
        (lambda x, w, b: (x, w, b[:1]), "b has shape"),
        (lambda x, w, b: (x.astype(np.float64) + 1e-12, w, b), "x is float64 and holds values that float32 cannot"),
        (lambda x, w, b: (x, w * np.float32(np.inf), b), "w holds infinities or NaN"),
        (lambda x, w, b: (x + 1j, w, b), "x is complex64, but must hold real numbers"),
        (lambda x, w, b: (x, w, b.astype(str)), r"b is str.*, but must hold real numbers"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, words: str) -> None:
    spec = case("k3-s2").spec
    x, w, b = arrays(spec)
    with pytest.raises(CallError, match=words):
        bounds(spec, *change(x, w, b))


def test_a_batch_is_at_least_1_for_the_oracle_and_for_its_bounds() -> None:
    spec = replace(case("k3-s2").spec, batch=None)
    x, w, b = arrays(spec)
    for asked in (reference, bounds, lambda *given: compare(given[0], 0, *given[1:])):
        with pytest.raises(CallError, match="at least 1"):
            asked(spec, x[:0], w, b)


def test_what_holds_no_real_numbers_is_neither_judged_nor_computed_from() -> None:
    spec = case("k3-s2").spec
    x, w, b = arrays(spec)
    y = reference(spec, x, w, b).astype(np.float32)
    for bent in (y + 100j, y.astype(str), y.astype(object)):
        with pytest.raises(CallError, match=r"actual is .*, but must hold real numbers"):
            compare(spec, bent, x, w, b)
    for bad in ((x + 1j, w, b), (x, w + 1j, b), (x, w, b + 1j)):
        with pytest.raises(CallError, match="must hold real numbers"):
            reference(spec, *bad)


def test_the_least_int8_is_of_magnitude_128() -> None:
    """Its negative is itself: sums of it were taken for exact that are not."""
    spec = ConvTranspose3d.parse("in=1x131072x1x1x1 co=1 k=1 bias=0")
    x, w = np.full(spec.x_shape, -128, np.int8), np.ones(spec.w_shape, np.int8)
    assert bounds(spec, x, w).min() > 0


def test_exact_needs_integers() -> None:
    spec = case("k3-s2").spec
    x, w, b = arrays(spec)
    with pytest.raises(CallError, match="integers"):
        compare(spec, reference(spec, x, w, b), x, w, b, exact=True)


def test_an_output_of_another_shape_is_no_output() -> None:
    spec = case("k3-s2").spec
    x, w, b = arrays(spec)
    with pytest.raises(VerificationError, match="shape"):
        compare(spec, reference(spec, x, w, b)[..., :-1], x, w, b)


# --- large layers are judged in blocks ---


@settings(max_examples=60)
@given(specs(most_outputs=2000), st.integers(10, 300))
def test_blocks_cover_the_output_once_and_compute_the_same(spec: ConvTranspose3d, elements: int) -> None:
    x, w, _ = arrays(spec, integers=4)
    whole = linear(spec, x, w)
    seen = np.zeros(whole.shape, int)
    for part in module._parts(spec, x.shape[0], elements):
        np.testing.assert_array_equal(linear(part.spec, x[part.x], w), whole[part.y])
        seen[part.y] += 1
    assert (seen == 1).all()


def test_blocks_find_the_same_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART_ELEMENTS", 100)
    monkeypatch.setattr(module._parts, "__defaults__", (100,))
    for name in ("k3-s2", "channels-last-groups", "batch-dynamic"):
        spec = case(name).spec
        x, w, b = arrays(spec)
        y = reference(spec, x, w, b)
        assert len(list(module._parts(spec, x.shape[0]))) > 3
        assert compare(spec, y, x, w, b).elements == y.size
        at = tuple(n - 1 for n in y.shape)
        y[at] += 1
        check = compare(spec, y, x, w, b)
        assert (check.failures, check.index) == (1, at)


def test_a_few_elements_can_be_judged_alone() -> None:
    spec = case("channels-last-groups").spec
    x, w, b = arrays(spec)
    y = reference(spec, x, w, b)
    indices = np.random.default_rng(0).choice(y.size, 50, replace=False)
    inputs = module.Inputs.of(spec, x, w, b)
    bent = y.ravel()[indices]
    bent[17] += 1
    right, wrong = module.compare_at(inputs, indices, [module.Answer(y.ravel()[indices]), module.Answer(bent)])
    assert right.passed
    assert right.elements == 50
    assert (wrong.failures, wrong.index) == (1, tuple(np.unravel_index(indices[17], y.shape)))


def test_a_check_is_plain_data() -> None:
    spec = case("k3-s2").spec
    x, w, b = arrays(spec, integers=2)
    y = reference(spec, x, w, b)
    y[0, 0, 0, 0, 0] += 1
    found = compare(spec, y, x, w, b, exact=True).to_json()
    assert found["passed"] is False
    assert found["worst"] == "inf"
    assert found["index"] == [0, 0, 0, 0, 0]
    assert found["elements"] == y.size


def test_multiples_of_powers_of_two_are_exact_where_what_any_output_reads_is() -> None:
    spec = ConvTranspose3d.parse("in=1x4x3x3x3 co=2 k=3 s=2 g=2")
    x, w, b = np.zeros(spec.x_shape, np.float32), np.full(spec.w_shape, (2**12 - 1) / 2**11, np.float32), np.zeros(2)
    x[0, 1, 1, 1, 1] = (2**12 - 1) / 2**9  # a single product of 24 digits in any output
    of = {"grains": (2.0**-9, 2.0**-11)}
    assert Inputs.of(spec, x, w, b, **of).sums_exactly(SUMS["float32"])
    assert not Inputs.of(spec, x, w, b).sums_exactly(SUMS["float32"])
    assert not Inputs.of(spec, x, w, b, **of).sums_exactly(SUMS["TF32 tensor cores"])
    assert not Inputs.of(spec, x, w, b, grains=(2.0**-8, 2.0**-11)).sums_exactly(SUMS["float32"])
    x[0, 0, 1, 1, 1] = 1  # of the same group: an output reads both
    assert not Inputs.of(spec, x, w, b, **of).sums_exactly(SUMS["float32"])
    x[0, 0, 1, 1, 1], x[0, 3, 1, 1, 1] = 0, 1
    assert Inputs.of(spec, x, w, b, **of).sums_exactly(SUMS["float32"])
