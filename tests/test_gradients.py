"""The derivatives equal their oracle, and the oracle is the derivative."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gradient_kernels import Operands, draw, gradients_of, kernel, stated_depth
from hypothesis import given, settings
from kernels import HERE, dtype_of
from strategies import specs
from tvm.ir.expr import TensorLoad

from opcompile.bounds import EXACT_ACTIVATIONS, FORMATS
from opcompile.cases import Case, case, tagged
from opcompile.compiled import compiled
from opcompile.errors import CallError, RecordError, SpecError
from opcompile.gradients import lower
from opcompile.gradients.bounds import compare
from opcompile.gradients.gradient import Gradient
from opcompile.gradients.reference import reference, slope
from opcompile.reference import activate
from opcompile.reference import reference as forward
from opcompile.spec import ACTIVATIONS, Activation, ConvTranspose3d
from schedules import gradients
from schedules.gradients import GradientTiles, InputTiles, WeightTiles
from schedules.statements import every


def told(name: str) -> bool:
    try:
        Gradient(replace(case("plain").spec, activation=Activation(name)), "x")
    except SpecError:
        return False
    return True


TAKEN_TWICE = tuple(name for name in ACTIVATIONS if not told(name))
CORNERS = [c for c in tagged("corner") if c.spec.activation.name not in TAKEN_TWICE]
FEW = [
    "prime-sizes",
    "k-below-s-mixed",
    "output-pad-beyond",
    "asymmetric-pads",
    "dilated-gcd2",
    "groups-wide",
    "depthwise-multiplier",
    "batch-dynamic-groups",
    "channels-last-groups",
    "float16-channels-last",
    "bfloat16",
    "act-softplus",
]


def require_right(gradient: Gradient, *, optimised: bool) -> None:
    run = kernel(gradient, optimised=optimised)
    operands = draw(gradient, integers=2)
    exact = gradient.layer.activation.name in EXACT_ACTIVATIONS
    compare(gradient, run(operands), operands, exact=exact).require()
    operands = draw(gradient)
    depth = stated_depth(gradient, operands["dy"].shape[0])
    compare(gradient, run(operands), operands, depth=depth).require()


# --- the kernels mean what the oracle means ---


@pytest.mark.parametrize("example", [case(name) for name in FEW], ids=lambda c: c.name)
def test_a_corner_case_is_exact_on_integers_and_within_the_bound_on_reals(example: Case) -> None:
    for gradient in gradients_of(replace(example.spec, activation=known(example.spec.activation))):
        require_right(gradient, optimised=False)


@pytest.mark.heavy
@pytest.mark.parametrize("example", CORNERS, ids=lambda c: c.name)
def test_every_corner_case_is_exact_on_integers_and_within_the_bound_on_reals(example: Case) -> None:
    for gradient in gradients_of(example.spec):
        require_right(gradient, optimised=True)


@pytest.mark.parametrize(
    "more", ["", "act=relu", "act=elu layout=NDHWC", "act=relu6 dtype=float16", "act=tanh dtype=bfloat16"]
)
def test_nan_in_dy_and_y_reaches_what_it_reaches_in_the_oracle(more: str) -> None:
    for gradient in gradients_of(ConvTranspose3d.parse(f"in=1x4x3x4x19 co=5 k=1x3x3 s=1x1x2 p=0x1x1 op=0x0x1 {more}")):
        run = kernel(gradient)
        for name in {"dy", "y"} & gradient.operands.keys():
            operands = draw(gradient)
            operands[name].ravel()[operands[name].size // 2] = np.nan
            found, right = run(operands).astype(np.float64), reference(gradient, operands)
            np.testing.assert_array_equal(np.isnan(found), np.isnan(right))


@given(spec=specs())
@settings(max_examples=8)
def test_any_legal_layer_has_derivatives_that_equal_the_oracle(spec: ConvTranspose3d) -> None:
    for gradient in gradients_of(replace(spec, activation=known(spec.activation))):
        require_right_on_integers(gradient)


def require_right_on_integers(gradient: Gradient, tiles: GradientTiles | None = None) -> None:
    operands = draw(gradient, integers=2)
    exact = gradient.layer.activation.name in EXACT_ACTIVATIONS
    compare(gradient, kernel(gradient, tiles, optimised=False)(operands), operands, exact=exact).require()


def known(activation: Activation) -> Activation:
    try:
        Gradient(replace(case("plain").spec, activation=activation), "x")
    except SpecError:
        return Activation()
    return activation


@pytest.mark.parametrize("name", ["prime-sizes", "groups-wide", "channels-last-groups"])
@pytest.mark.parametrize("vector", ["channels", "row"])
def test_tiles_that_divide_nothing_are_legal(name: str, vector: Any) -> None:
    layer = case(name).spec
    c = layer.c_in
    wide = vector == "channels"
    channels = 32 * -(-c // 32) if wide else 3 * -(-c // 3)
    x = InputTiles(vector, 16, 2, 3, 2, channels, 2, 4, 1, "weights")
    w = WeightTiles(vector, 16, 2, 3, 1, 32 if wide else 2, 6, 2, 3, 2, 1)
    require_right_on_integers(Gradient(layer, "x"), x)
    require_right_on_integers(Gradient(layer, "w"), w)


def test_candidates_of_a_layer_agree() -> None:
    layer = ConvTranspose3d.parse("in=1x20x4x5x18 co=5 k=3 s=2 p=1 op=1")
    for wrt in ("x", "w"):
        gradient = Gradient(layer, wrt)  # type: ignore[arg-type]
        found = gradients.candidates(gradient, HERE.machine)
        assert {e.tiles.vector for e in found} == {"channels", "row"}
        assert found == gradients.candidates(gradient, HERE.machine)
        for estimate in found[:: len(found) // 2]:
            require_right_on_integers(gradient, estimate.tiles)


def test_weights_are_transposed_ahead_or_by_the_tasks() -> None:
    gradient = Gradient(case("prime-k2-s2").spec, "x")
    found = gradients.candidates(gradient, HERE.machine)
    for ahead in ("weights", "dy"):
        require_right_on_integers(gradient, next(e.tiles for e in found if e.tiles.ahead == ahead))


def test_long_sums_are_cut_and_judged_by_how_deep_they_are() -> None:
    layer = ConvTranspose3d.parse("in=1x16x8x16x32 co=2 k=2 s=2")
    for wrt in ("w", "b"):
        gradient = Gradient(layer, wrt)  # type: ignore[arg-type]
        depth = stated_depth(gradient, 1)
        assert depth < gradient.terms(1) // 4
        operands = draw(gradient)
        found = compare(gradient, kernel(gradient)(operands), operands, depth=depth)
        assert found.passed
        assert found.bound < compare(gradient, found.actual * np.ones(gradient.shape), operands).bound  # type: ignore[operator]


# --- the oracle is the derivative ---


@pytest.mark.parametrize("example", [c for c in CORNERS if c.spec.activation.name == "none"], ids=lambda c: c.name)
def test_the_derivative_is_the_adjoint(example: Case) -> None:
    """For y = A(x) linear, <dy, A(v)> = <A^T(dy), v>, for every v: exactly, on integers."""
    layer = replace(example.spec, dtype="float64")
    for gradient in gradients_of(layer):
        operands = draw(gradient, integers=3)
        batch = operands["dy"].shape[0]
        shape = tuple(n or batch for n in gradient.shape)
        v = np.random.default_rng(1).integers(-3, 4, shape).astype(float)
        x = operands.get("x", np.zeros([n or batch for n in layer.x_shape]))
        at = {"x": x, "w": operands.get("w", np.zeros(layer.w_shape)), "b": np.zeros(layer.channels_out)}
        at[gradient.wrt] = v
        moved = forward(layer, at["x"], at["w"], at["b"])
        assert (operands["dy"] * moved).sum() == (reference(gradient, operands) * v).sum()


@pytest.mark.parametrize("text", ["in=2x2x2x3x2 co=4 k=2x3x1 s=2x1x3 p=1:0x1:1x0:0 op=1x0x2 d=1x2x1 g=2 dtype=float64"])
@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC"])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu:0.5", "relu6"])
def test_finite_differences_give_every_element(text: str, layout: str, activation: str) -> None:
    """A piece of a piecewise linear layer: a step of a power of two that crosses no kink gives the slope exactly."""
    layer = ConvTranspose3d.parse(f"{text} layout={layout} act={activation}")
    rng = np.random.default_rng(2)
    at = {
        "x": rng.integers(-3, 4, layer.x_shape).astype(float),  # type: ignore[arg-type]
        "w": rng.integers(-3, 4, layer.w_shape).astype(float),
        "b": rng.integers(-3, 4, (4,)) + 0.5,  # sums are odd multiples of a half: no kink is near
    }
    y = forward(layer, at["x"], at["w"], at["b"])
    dy = rng.integers(-3, 4, y.shape).astype(float)
    for gradient in gradients_of(layer):
        operands = {name: {**at, "dy": dy, "y": y}[name] for name in gradient.operands}
        found = reference(gradient, operands).ravel()
        for index in range(found.size):
            moved = {name: value.copy() for name, value in at.items()}
            moved[gradient.wrt].ravel()[index] += 2.0**-5
            difference = forward(layer, moved["x"], moved["w"], moved["b"]) - y
            assert (dy * difference).sum() / 2.0**-5 == found[index]


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n not in (*TAKEN_TWICE, "none")])
def test_slopes_are_told_from_the_output(name: str) -> None:
    """Central differences err by h^2/6 of the third derivative, below 25 here, and by rounding over h."""
    activation, step = Activation(name), 2.0**-13
    z = np.linspace(-3, 3, 602)
    z = z[(np.abs(z) > step) & (np.abs(np.abs(z) - 3) > step)]
    exact = (activate(activation, z + step) - activate(activation, z - step)) / (2 * step)
    found = slope(activation, activate(activation, z))
    assert np.abs(found - exact).max() <= step**2 / 6 * 25 + 2.0**-52 * 25 / step


# --- what cannot be said is refused ---


def require_all_digits(gradient: Gradient, run: Any) -> None:
    """Hold a slope that is told from Y alone to the roundings that it is granted, of itself and of nothing larger."""
    y = np.array([1e-30, 2e-9, 1e-3, 0.2, 0.3, 0.7, 3, 20, -0.2, -1], dtype_of(gradient.layer)).reshape(gradient.shape)
    operands = {"dy": np.ones_like(y), "w": np.ones(gradient.layer.w_shape, y.dtype), "y": y}
    right = reference(gradient, operands)
    unit = FORMATS[gradient.layer.sum_dtype].unit
    assert (np.abs(run(operands) - right) <= 20 * unit * np.abs(right)).all()


SOFTPLUS = "in=1x1x1x1x10 co=1 k=1 bias=0 act=softplus"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_slope_of_softplus_keeps_all_digits_that_y_has(dtype: str) -> None:
    gradient = Gradient(ConvTranspose3d.parse(f"{SOFTPLUS} dtype={dtype}"), "x")
    require_all_digits(gradient, kernel(gradient))


@pytest.mark.parametrize("name", TAKEN_TWICE)
def test_a_slope_that_the_output_does_not_tell_is_refused_with_the_way_out(name: str) -> None:
    layer = replace(case("plain").spec, activation=Activation(name))
    for wrt in ("x", "w", "b"):
        with pytest.raises(SpecError, match=rf"{name} cannot be told .* act=none"):
            Gradient(layer, wrt)  # type: ignore[arg-type]


def test_a_parameter_that_folds_the_activation_is_refused() -> None:
    for text in ("leaky_relu:-0.1", "elu:-1.0", "selu:-1.0:1.0"):
        with pytest.raises(SpecError, match="cannot be told"):
            Gradient(replace(case("plain").spec, activation=Activation.parse(text)), "w")


def test_what_there_is_no_derivative_of_is_refused() -> None:
    with pytest.raises(SpecError, match="no bias"):
        Gradient(case("no-bias").spec, "b")
    with pytest.raises(SpecError, match="'y' is unknown; use one of x, w, b"):
        Gradient(case("plain").spec, "y")  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="not tuned"):
        lower.choose(Gradient(case("plain").spec, "x"), HERE, "tuned")


# --- the judge ---


def bent(operands: Operands, gradient: Gradient) -> np.ndarray[Any, Any]:
    answer = reference(gradient, operands).astype(dtype_of(gradient.layer))
    answer.ravel()[answer.size // 2] += 1
    return answer


def test_one_bent_element_is_noticed() -> None:
    for gradient in gradients_of(case("k3-s2").spec):
        operands = draw(gradient, integers=2)
        assert compare(gradient, bent(operands, gradient), operands, exact=True).failures == 1
        operands = draw(gradient)
        assert compare(gradient, bent(operands, gradient), operands).failures == 1


def test_a_sum_of_too_many_elements_is_judged_by_its_depth_alone() -> None:
    gradient = Gradient(ConvTranspose3d.parse("in=Nx1x1x1x1 co=1 k=1x128x128"), "b")
    operands = {"dy": np.full((2**10, 1, 1, 128, 128), 0.5, np.float32)}
    for answer, depth, passed in ((2**23, 2**10, True), (2**23 + 2**12, 2**10, False), (0, None, False)):
        assert compare(gradient, np.array([answer], np.float32), operands, depth=depth).passed == passed


@pytest.mark.parametrize("act", ["exponential", "sigmoid", "relu", "leaky_relu:0.5", "elu", "selu", "softsign"])
def test_a_subnormal_y_may_be_flushed_and_so_may_its_slope(act: str) -> None:
    """Hardware that takes Y for zero gives the slope there."""
    for gradient in gradients_of(ConvTranspose3d.parse(f"in=1x1x1x1x2 co=1 k=1 bias=0 act={act}")):
        y = np.array([1e-39, 0.5], np.float32).reshape(1, 1, 1, 1, 2)
        operands = {name: np.full(shape, 1e15, np.float32) for name, shape in gradient.operands.items()} | {"y": y}
        for taken in (y, np.where(y > 0.1, y, 0)):
            right = reference(gradient, operands | {"y": taken})
            compare(gradient, right.astype(np.float32), operands).require()
            assert not compare(gradient, -right.astype(np.float32), operands).passed


def test_a_number_that_overflows_on_the_way_to_a_term_leaves_nothing_to_judge() -> None:
    gradient = Gradient(ConvTranspose3d.parse("in=1x1x1x1x1 co=1 k=1 bias=0 act=leaky_relu:1e30"), "x")
    dy, w, y = (np.full((1, 1, 1, 1, 1), value, np.float32) for value in (1e20, 1e-30, -1))
    check = compare(gradient, np.full_like(dy, np.inf), {"dy": dy, "w": w, "y": y})
    assert (check.failures, check.unjudged) == (0, 1)


def test_operands_that_do_not_fit_are_refused() -> None:
    gradient = Gradient(case("k3-s2").spec, "x")
    operands = draw(gradient)
    with pytest.raises(CallError, match="dx takes dy, w"):
        compare(gradient, 0, {"dy": operands["dy"]})
    with pytest.raises(CallError, match="w has shape"):
        compare(gradient, 0, {**operands, "w": operands["dy"]})
    with pytest.raises(CallError, match="infinities"):
        compare(gradient, 0, {**operands, "w": operands["w"] * np.inf})
    right = reference(gradient, operands)
    with pytest.raises(CallError, match="exact needs integers"):
        compare(gradient, right, operands, exact=True)
    with pytest.raises(CallError, match="depth is -5"):
        compare(gradient, right, operands, depth=-5)
    with pytest.raises(CallError, match="the answer is complex128, but must hold real numbers"):
        compare(gradient, right + 5j, operands)
    for asked in (reference, lambda gradient, given: compare(gradient, right, given)):
        with pytest.raises(CallError, match="dy is complex64, but must hold real numbers"):
            asked(gradient, {**operands, "dy": operands["dy"] + 1j})
    open_batch = Gradient(replace(gradient.layer, batch=None), "x")
    with pytest.raises(CallError, match="at least 1"):
        compare(open_batch, right[:0], {**operands, "dy": operands["dy"][:0]})


def test_rows_of_any_length_are_not_taken_from_the_stack() -> None:
    gradient = Gradient(ConvTranspose3d.parse("in=1x4x2x2x2048 co=1 k=3 s=2 p=1 op=1"), "x")
    tiles, _ = lower.choose(gradient, HERE, "baseline")
    code = str(compiled(lower.scheduled(gradient, tiles), HERE.tvm()).mod.inspect_source("ll"))
    arrays = re.findall(r"alloca \[(\d+) x (?:<(\d+) x )?float", code)
    assert max((4 * int(count) * int(lanes or 1) for count, lanes in arrays), default=0) <= 4096


def test_rows_of_any_length_are_summed_for_db_end_to_end() -> None:
    """LLVM would gather elements whose places are quotients and rests of their number."""
    gradient = Gradient(ConvTranspose3d.parse("in=1x4x9x9x11 co=4 k=2 s=2"), "b")
    tiles, _ = lower.choose(gradient, HERE, "baseline")
    function = lower.scheduled(gradient, tiles)[gradient.kernel]
    places = [load.indices for load in every(TensorLoad, function.body) if load.source.name == "DY"]
    assert len(places) == 2  # in vectors, and what is left over
    assert all(int(i) == 0 for _, _, *rows, _ in places for i in rows)
