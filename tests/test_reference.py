"""The oracle against definitions that share no line with it."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import arrays, specs

from opcompile.bounds import compare
from opcompile.reference import activate, linear, reference
from opcompile.spec import ACTIVATIONS, Activation, Axis, ConvTranspose3d


def agrees(spec: ConvTranspose3d, other: np.ndarray, x, w, b=None) -> bool:
    """Whether another float64 computation keeps within the bound of two float64 computations."""
    return compare(
        replace(spec, dtype="float64"), other, *(a if a is None else np.asarray(a, float) for a in (x, w, b))
    ).passed


def meeting(axis: Axis) -> np.ndarray:
    """1 at (o, i, t) where input i and tap t meet in output o, by the definition and by loops alone."""
    table = np.zeros((axis.out, axis.size, axis.kernel))
    for i in range(axis.size):
        for t in range(axis.kernel):
            o = i * axis.stride + t * axis.dilation - axis.pad[0]
            if 0 <= o < axis.out:
                table[o, i, t] = 1
    return table


def by_definition(spec: ConvTranspose3d, x, w, b) -> np.ndarray:
    """The operator as one contraction with three tables, a group at a time."""
    x, w = np.asarray(x, float), np.asarray(w, float)
    x = np.moveaxis(x, -1, 1) if spec.layout == "NDHWC" else x
    c = spec.channels_in // spec.groups
    groups = []
    for g in range(spec.groups):
        own = slice(g * c, (g + 1) * c)
        tables = [meeting(axis) for axis in spec.axes]
        groups.append(np.einsum("nfijk,fmabc,uia,vjb,wkc->nmuvw", x[:, own], w[own], *tables, optimize=True))
    y = np.concatenate(groups, axis=1)
    y = y if b is None else y + np.asarray(b, float)[None, :, None, None, None]
    return np.moveaxis(y, 1, -1) if spec.layout == "NDHWC" else y


@given(specs())
def test_any_layer_is_its_definition(spec: ConvTranspose3d) -> None:
    x, w, b = arrays(spec)
    expected = activate(spec.activation, by_definition(spec, x, w, b))
    y = reference(spec, x, w, b)
    assert y.dtype == np.float64
    assert y.shape == tuple(n or 2 for n in spec.y_shape)
    assert agrees(spec, expected, x, w, b)


@given(specs(dtypes=("float32",)))
def test_integers_are_exact(spec: ConvTranspose3d) -> None:
    x, w, _ = arrays(spec, integers=8)
    np.testing.assert_array_equal(linear(spec, x, w), by_definition(spec, x, w, None))


@settings(max_examples=40)
@given(specs(dtypes=("float32",)), st.integers(0, 2**31))
def test_it_is_the_adjoint_of_a_convolution(spec: ConvTranspose3d, seed: int) -> None:
    # <convT(x), y> = <x, conv(y)>, where the convolution gathers: what backpropagation through Conv3d is.
    # With one element of x and integers, both sides are small integers, and exact.
    x, w, _ = arrays(spec, integers=8)
    rng = np.random.default_rng(seed)
    one, at = np.zeros_like(x), np.unravel_index(rng.integers(x.size), x.shape)
    one[at] = 1
    landed = linear(spec, one, w)
    y = rng.integers(-8, 9, landed.shape)
    assert (landed * y).sum() == correlated(spec, y, w, at)


def correlated(spec: ConvTranspose3d, y, w, at) -> float:
    if spec.layout == "NDHWC":
        y, at = np.moveaxis(y, -1, 1), (at[0], at[4], *at[1:4])
    n, c, *i = (int(p) for p in at)
    m_of_group = spec.channels_out // spec.groups
    first = c // (spec.channels_in // spec.groups) * m_of_group
    total = 0.0
    for tap in np.ndindex(*w.shape[2:]):
        o = [p * a.stride + t * a.dilation - a.pad[0] for p, t, a in zip(i, tap, spec.axes, strict=True)]
        if all(0 <= p < a.out for p, a in zip(o, spec.axes, strict=True)):
            read = y[(n, slice(first, first + m_of_group), *o)]
            total += float((read * w[(c, slice(None), *tap)]).sum())
    return total


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 3), (4, 2)])
def test_in_one_dimension_it_is_numpy_convolve(stride: int, dilation: int) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(6), rng.standard_normal(4)
    stuffed, dilated = np.zeros((6 - 1) * stride + 1), np.zeros((4 - 1) * dilation + 1)
    stuffed[::stride], dilated[::dilation] = x, w
    spec = ConvTranspose3d.parse(f"in=1x1x1x1x6 co=1 k=1x1x4 s=1x1x{stride} d=1x1x{dilation} bias=0")
    y = np.convolve(stuffed, dilated).reshape(1, 1, 1, 1, -1)
    assert agrees(spec, y, x.reshape(1, 1, 1, 1, 6), w.reshape(1, 1, 1, 1, 4))


@pytest.mark.parametrize("p", [0, 1])
@pytest.mark.parametrize("op", [0, 1])
def test_sizes_are_those_of_pytorch(p: int, op: int) -> None:
    for size, k, s, d in np.ndindex(4, 3, 3, 2):
        size, k, s, d = size + 2, k + 2, s + 1, d + 1
        axis = Axis(size, k, s, d, (p, p), op)
        assert axis.out == (size - 1) * s - 2 * p + d * (k - 1) + op + 1


def test_by_hand() -> None:
    # k3 s2 p1 op1 on [1, 10]: taps land on 2i + t - 1
    spec = ConvTranspose3d.parse("in=1x1x1x1x2 co=1 k=1x1x3 s=1x1x2 p=0x0x1 op=0x0x1")
    x, w = np.array([1.0, 10]).reshape(1, 1, 1, 1, 2), np.array([1.0, 2, 3]).reshape(1, 1, 1, 1, 3)
    assert reference(spec, x, w, np.array([100.0])).ravel().tolist() == [102, 113, 120, 130]


def test_groups_do_not_mix() -> None:
    spec = ConvTranspose3d.parse("in=1x4x1x1x1 co=2 k=1 g=2 bias=0")
    x, w = np.array([1.0, 2, 4, 8]).reshape(1, 4, 1, 1, 1), np.array([1.0, 10, 100, 1000]).reshape(4, 1, 1, 1, 1)
    assert reference(spec, x, w).ravel().tolist() == [21, 8400]


def test_outputs_beyond_the_taps_are_the_bias() -> None:
    spec = ConvTranspose3d.parse("in=1x1x1x1x2 co=1 k=1 s=1x1x3 op=0x0x2")
    y = reference(spec, np.ones((1, 1, 1, 1, 2)), np.full((1, 1, 1, 1, 1), 5.0), np.array([0.5]))
    assert y.ravel().tolist() == [5.5, 0.5, 0.5, 5.5, 0.5, 0.5]


# --- the activations, in fifty decimal digits ---


def _erf(z: Decimal) -> Decimal:
    """The Taylor series; it cancels, which is why there are so many digits."""
    term, total, k = z, z, 0
    while abs(term) > Decimal(10) ** -60:
        k += 1
        term *= -z * z / k
        total += term / (2 * k + 1)
    return total * 2 / _PI.sqrt()


_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534")


def _tanh(z: Decimal) -> Decimal:
    return ((2 * z).exp() - 1) / ((2 * z).exp() + 1)


def _softplus(z: Decimal) -> Decimal:
    return (1 + z.exp()).ln()


def _clip(z: Decimal, low: int, high: int) -> Decimal:
    return min(max(z, Decimal(low)), Decimal(high))


# as PyTorch, ONNX and Keras document them
CLOSED_FORMS = {
    "none": lambda z: z,
    "relu": lambda z: max(z, Decimal(0)),
    "relu6": lambda z: _clip(z, 0, 6),
    "leaky_relu": lambda z, alpha: z if z > 0 else alpha * z,
    "elu": lambda z, alpha: z if z > 0 else alpha * (z.exp() - 1),
    "selu": lambda z, alpha, gamma: gamma * z if z > 0 else gamma * (alpha * z.exp() - alpha),
    "gelu": lambda z: z / 2 * (1 + _erf(z / Decimal(2).sqrt())),
    "gelu_tanh": lambda z: z / 2 * (1 + _tanh((2 / _PI).sqrt() * (z + Decimal("0.044715") * z**3))),
    "sigmoid": lambda z: 1 / (1 + (-z).exp()),
    "hard_sigmoid": lambda z, alpha, beta: _clip(alpha * z + beta, 0, 1),
    "silu": lambda z: z / (1 + (-z).exp()),
    "hard_silu": lambda z: z * _clip(z + 3, 0, 6) / 6,
    "mish": lambda z: z * _tanh(_softplus(z)),
    "softplus": _softplus,
    "softsign": lambda z: z / (1 + abs(z)),
    "tanh": _tanh,
    "exponential": lambda z: z.exp(),
    "hard_tanh": lambda z: _clip(z, -1, 1),
    "soft_shrink": lambda z: z - max(min(z, Decimal("0.5")), Decimal("-0.5")),
    "hard_shrink": lambda z: z if abs(z) > Decimal("0.5") else Decimal(0),
    "tanh_shrink": lambda z: z - _tanh(z),
    "log_sigmoid": lambda z: -_softplus(-z),
    "squareplus": lambda z: (z + (z * z + 4).sqrt()) / 2,
    "sparse_plus": lambda z: (max(z, Decimal(-1)) + 1) ** 2 / 4 if z < 1 else z,
}
POINTS = [*np.linspace(-9, 9, 73), -30.0, -3.0000001, -1e-3, -1e-9, 1e-9, 1e-3, 2.9999999, 5.9999999, 30.0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_its_closed_form(name: str) -> None:
    variants = [Activation(name)] + ([Activation(name, (0.3,))] if ACTIVATIONS[name] else [])
    for activation in variants:
        with localcontext() as context:
            context.prec = 500 if name == "gelu" else 90
            parameters = [Decimal(p) for p in activation.parameters]
            expected = [float(CLOSED_FORMS[name](Decimal(z), *parameters)) for z in POINTS]
        pointwise = ConvTranspose3d.parse(f"in=1x1x1x1x{len(POINTS)} co=1 k=1 bias=0 act={activation}")
        z = np.array(POINTS).reshape(1, 1, 1, 1, -1)
        assert agrees(pointwise, np.array(expected).reshape(z.shape), z, np.ones((1, 1, 1, 1, 1)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_has_no_accident_far_out(name: str) -> None:
    z = np.array([-1e300, -1e30, -800.0, 0.0, 800.0])
    with np.errstate(all="raise", over="ignore", under="ignore"):
        y = activate(Activation(name), z)
    assert not np.isnan(y).any()
    if name != "exponential":
        assert np.isfinite(y).all()
