"""What follows a node is recognised however an exporter wrote it, and left alone where somebody else reads it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from opcompile.reference import reference
from opcompile.replace.affine import Affine
from opcompile.replace.fusion import Fusion, fuse
from opcompile.replace.model import Model
from opcompile.spec import ConvTranspose3d
from tests.onnx_engine import integers
from tests.replaced import upsampling

CHANNELS = 6


def scalar(number: float) -> np.ndarray:
    return np.array(number, np.float32)


def found(after: list[onnx.NodeProto], constants: dict[str, np.ndarray] | None = None) -> Fusion:
    model = Model(upsampling(after=after, constants=constants), Path())
    return fuse(model, next(model.graphs()), "up", CHANNELS)


def node(op: str, *names: str, **attributes: Any) -> onnx.NodeProto:
    """Return a node whose last name is its output."""
    return helper.make_node(op, names[:-1], names[-1:], **attributes)


@pytest.mark.parametrize(
    ("single", "constants", "activation"),
    [
        (node("Relu", "up", "y"), {}, "relu"),
        (node("LeakyRelu", "up", "y"), {}, "leaky_relu"),
        (node("LeakyRelu", "up", "y", alpha=0.25), {}, "leaky_relu:0.25"),
        (node("PRelu", "up", "slope", "y"), {"slope": np.full((1, 1, 1, 1), 0.25, np.float32)}, "leaky_relu:0.25"),
        (node("Elu", "up", "y", alpha=0.5), {}, "elu:0.5"),
        (node("Selu", "up", "y"), {}, "selu:1.6732631921768188:1.0507010221481323"),
        (node("Sigmoid", "up", "y"), {}, "sigmoid"),
        (node("HardSigmoid", "up", "y"), {}, "hard_sigmoid:0.2:0.5"),
        (node("HardSwish", "up", "y"), {}, "hard_silu"),
        (node("Tanh", "up", "y"), {}, "tanh"),
        (node("Mish", "up", "y"), {}, "mish"),
        (node("Softplus", "up", "y"), {}, "softplus"),
        (node("Softsign", "up", "y"), {}, "softsign"),
        (node("Exp", "up", "y"), {}, "exponential"),
        (node("Gelu", "up", "y"), {}, "gelu"),
        (node("Gelu", "up", "y", approximate="tanh"), {}, "gelu_tanh"),
        (node("Gelu", "up", "y", domain="com.microsoft"), {}, "gelu"),
        (node("FastGelu", "up", "y", domain="com.microsoft"), {}, "gelu_tanh"),
        (node("QuickGelu", "up", "y", domain="com.microsoft", alpha=1.0), {}, "silu"),
        (node("Clip", "up", "low", "high", "y"), {"low": scalar(0), "high": scalar(6)}, "relu6"),
        (node("Clip", "up", "low", "y"), {"low": scalar(0)}, "relu"),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else None,
)
def test_one_operator(single: onnx.NodeProto, constants: dict[str, np.ndarray], activation: str) -> None:
    fusion = found([single], constants)
    assert (str(fusion.activation), fusion.result, len(fusion.nodes)) == (activation, "y", 1)


HALF, ONE, ROOT = scalar(0.5), scalar(1), scalar(math.sqrt(2))
AS_WRITTEN = {
    # torch.onnx, both exporters
    "gelu": [node("Div", "up", "root", "a"), node("Erf", "a", "e"), node("Add", "e", "one", "c"),
             node("Mul", "up", "c", "d"), node("Mul", "d", "half", "y")],
    "gelu, half first": [node("Mul", "half", "up", "h"), node("Div", "up", "root", "a"), node("Erf", "a", "e"),
                         node("Add", "one", "e", "c"), node("Mul", "h", "c", "y")],
    "gelu_tanh": [node("Pow", "up", "three", "p"), node("Mul", "p", "k", "q"), node("Add", "up", "q", "r"),
                  node("Mul", "r", "c2pi", "s"), node("Tanh", "s", "t"), node("Add", "t", "one", "u"),
                  node("Mul", "half", "up", "h"), node("Mul", "h", "u", "y")],
    "silu": [node("Sigmoid", "up", "s"), node("Mul", "up", "s", "y")],
    "mish": [node("Softplus", "up", "s"), node("Tanh", "s", "t"), node("Mul", "t", "up", "y")],
    "silu, by an exponential": [node("Neg", "up", "n"), node("Exp", "n", "e"), node("Add", "e", "one", "d"),
                                node("Div", "up", "d", "y")],
    "gelu, seven digits": [node("Div", "up", "root7", "a"), node("Erf", "a", "e"), node("Add", "e", "one", "c"),
                           node("Mul", "up", "c", "d"), node("Mul", "d", "half", "y")],
    "hard_silu, seven digits": [node("Add", "up", "three", "p"), node("Max", "p", "zero", "q"),
                                node("Min", "q", "six", "r"), node("Mul", "r", "sixth", "s"),
                                node("Mul", "up", "s", "y")],
    "relu": [node("Max", "up", "zero", "y")],
    "hard_silu": [node("HardSigmoid", "up", "s", alpha=1 / 6, beta=0.5), node("Mul", "up", "s", "y")],
    "hard_silu, by clamps": [node("Add", "up", "three", "p"), node("Max", "p", "zero", "q"),
                             node("Min", "q", "six", "r"), node("Mul", "up", "r", "s"), node("Div", "s", "six", "y")],
    "leaky_relu": [node("Mul", "up", "slope", "p"), node("Max", "up", "p", "y")],
    "tanh": [node("Tanh", "up", "p"), node("Min", "p", "one", "y")],
}  # fmt: skip
CONSTANTS = {
    "half": HALF,
    "one": ONE,
    "root": ROOT,
    "three": scalar(3),
    "six": scalar(6),
    "slope": scalar(0.01),
    "sixth": scalar(0.1666667),
    "root7": scalar(1.414214),
    "zero": scalar(0),
    "k": scalar(0.044715),
    "c2pi": scalar(math.sqrt(2 / math.pi)),
}


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_several_operators(name: str) -> None:
    fusion = found(AS_WRITTEN[name], CONSTANTS)
    assert (fusion.activation.name, fusion.result) == (name.split(",")[0], "y")
    assert len(fusion.nodes) == len(AS_WRITTEN[name])


def test_a_gelu_with_another_constant_is_none() -> None:
    assert not found(AS_WRITTEN["gelu"], {**CONSTANTS, "root": scalar(1.5)}).nodes


@pytest.mark.parametrize("first", ["Relu", "Exp", "Gelu", "Softplus", "Mish", "Elu"])
@pytest.mark.parametrize("most", [20, 127, 65504, 1e9, 1e30])
def test_a_clamp_behind_an_activation_stays(first: str, most: float) -> None:
    fusion = found([node(first, "up", "a"), node("Min", "a", "most", "y")], {"most": scalar(most)})
    assert [n.op_type for n in fusion.nodes] == [first]


@pytest.mark.parametrize("first", ["Exp", "Gelu", "Softplus", "Sigmoid", "Mish", "Elu", "Tanh"])
@pytest.mark.parametrize("then", ["Add", "Sub", "Max"])
@pytest.mark.parametrize("little", [1e-6, 1e-7, 1e-12, 1e-30])
def test_a_small_number_behind_an_activation_stays(first: str, then: str, little: float) -> None:
    fusion = found([node(first, "up", "a"), node(then, "a", "little", "y")], {"little": scalar(little)})
    assert [n.op_type for n in fusion.nodes] == [first]


@pytest.mark.parametrize(
    ("first", "then", "number"),
    [
        ("Sigmoid", "Mul", 1 + 2.0**-22),
        ("Sigmoid", "Min", 1 - 1e-7),
        ("Tanh", "Min", 1 - 1e-7),
        ("Relu", "Min", 3e38),
        ("LeakyRelu", "Max", -1e9),
        ("HardSwish", "Max", -0.37),
        ("Gelu", "Max", -0.1696),
        ("Exp", "Max", 1e-39),
    ],
)
def test_what_changes_an_activation_at_any_size_stays(first: str, then: str, number: float) -> None:
    fusion = found([node(first, "up", "a"), node(then, "a", "n", "y")], {"n": scalar(number)})
    assert [n.op_type for n in fusion.nodes] == [first]


def test_an_epsilon_in_a_denominator_stays() -> None:
    after = [
        node("Relu", "up", "r"),
        node("Mul", "r", "r", "p"),
        node("Add", "r", "n", "q"),
        node("Div", "p", "q", "y"),
    ]
    assert [n.op_type for n in found(after, {"n": scalar(1e-12)}).nodes] == ["Relu"]


@pytest.mark.parametrize("far", [12582912.0, 1e8])
def test_what_float32_makes_anything_of_is_no_activation(far: float) -> None:
    """Rounding to whole numbers, by a number of which float32 has no fractions."""
    after = [node("Add", "up", "n", "s"), node("Sub", "s", "n", "y")]
    assert found(after, {"n": scalar(far)}).activation.name == "none"
    fusion = found(
        [node("Sigmoid", "up", "a"), node("Add", "a", "n", "s"), node("Sub", "s", "n", "y")], {"n": scalar(far)}
    )
    assert [n.op_type for n in fusion.nodes] == ["Sigmoid"]


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("LeakyRelu", {"alpha": 3.4028234e38}),
        ("Elu", {"alpha": 1.1754944e-38}),
        ("HardSigmoid", {"alpha": 1.1754944e-38}),
    ],
)
def test_a_parameter_at_the_edge_of_float32(op: str, attributes: dict[str, float]) -> None:
    assert [n.op_type for n in found([node(op, "up", "y", **attributes)]).nodes] == [op]


def test_a_clamp_before_an_activation_is_no_part_of_it() -> None:
    after = [node("Min", "up", "most", "a"), node("Max", "a", "zero", "y")]
    assert not found(after, {**CONSTANTS, "most": scalar(127)}).nodes


def test_what_comes_after_an_activation_stays() -> None:
    fusion = found([node("Relu", "up", "r"), node("Mul", "r", "half", "y")], CONSTANTS)
    assert (fusion.result, [n.op_type for n in fusion.nodes]) == ("r", ["Relu"])


@pytest.mark.parametrize("shape", [(1, CHANNELS, 1, 1, 1), (CHANNELS, 1, 1, 1), (1,), ()])
def test_additions_to_each_channel(shape: tuple[int, ...]) -> None:
    first, second = integers(shape, 3), integers((CHANNELS, 1, 1, 1), 4)
    after = [node("Add", "up", "p", "s"), node("Add", "q", "s", "t"), node("Relu", "t", "y")]
    fusion = found(after, {"p": first, "q": second})
    expected = np.broadcast_to(first.reshape(-1), CHANNELS) + second.reshape(-1)
    assert fusion.affine is not None
    assert np.array_equal(fusion.affine.shift, expected)
    assert np.array_equal(fusion.affine.scale, np.ones(CHANNELS))
    assert [n.op_type for n in fusion.nodes] == ["Add", "Add", "Relu"]


STATISTICS = {
    "scale": integers((CHANNELS,), 5),
    "shift": integers((CHANNELS,), 6),
    "mean": integers((CHANNELS,), 7),
    "variance": np.arange(1, CHANNELS + 1, dtype=np.float32),
}


def normalized(*outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("BatchNormalization", ["up", *STATISTICS], outputs, **attributes)


def test_what_multiplies_and_adds_is_one() -> None:
    rows = {name: integers((1, CHANNELS, 1, 1, 1), seed) for name, seed in (("p", 1), ("q", 2), ("r", 3))}
    rows["r"][rows["r"] == 0] = 2
    after = [
        node("Sub", "up", "p", "s"),
        node("Mul", "q", "s", "t"),
        node("Div", "t", "r", "u"),
        node("Tanh", "u", "y"),
    ]
    fusion = found(after, rows)
    p, q, r = (row.reshape(-1).astype(float) for row in rows.values())
    assert fusion.affine is not None
    np.testing.assert_allclose(fusion.affine.scale, q / r)
    np.testing.assert_allclose(fusion.affine.shift, -p * q / r)
    np.testing.assert_allclose(fusion.affine.reach, np.abs(p * q / r))
    assert fusion.affine.roundings == 3
    assert (fusion.activation.name, len(fusion.nodes)) == ("tanh", 4)


def test_what_is_taken_from_a_constant() -> None:
    p = integers((1, CHANNELS, 1, 1, 1), 1)
    fusion = found([node("Sub", "p", "up", "s"), node("Relu", "s", "y")], {"p": p})
    assert fusion.affine is not None
    assert np.array_equal(fusion.affine.scale, -np.ones(CHANNELS))
    assert np.array_equal(fusion.affine.shift, p.reshape(-1))
    assert np.array_equal(fusion.affine.reach, np.abs(p.reshape(-1)))
    assert [n.op_type for n in fusion.nodes] == ["Sub", "Relu"]


def test_a_batch_normalization() -> None:
    fusion = found([normalized("n", epsilon=0.5), node("Relu", "n", "y")], STATISTICS)
    scale, shift, mean, variance = (array.astype(float) for array in STATISTICS.values())
    factor = scale / np.sqrt(variance + 0.5)
    assert fusion.affine is not None
    np.testing.assert_allclose(fusion.affine.scale, factor)
    np.testing.assert_allclose(fusion.affine.shift, shift - mean * factor)
    assert [n.op_type for n in fusion.nodes] == ["BatchNormalization", "Relu"]


@pytest.mark.parametrize(
    ("after", "constants"),
    [
        ([normalized("y", "m", "v", training_mode=1)], STATISTICS),
        ([normalized("y")], {**STATISTICS, "variance": np.full(CHANNELS, -1, np.float32)}),
        ([normalized("y")], {name: array for name, array in STATISTICS.items() if name != "mean"}),
        ([node("Div", "p", "up", "y")], {"p": scalar(1)}),
        ([node("Div", "up", "p", "y")], {"p": scalar(0)}),
        ([node("Mul", "up", "up", "y")], {}),
    ],
    ids=["trains", "no root", "a mean of the caller", "divides", "by zero", "a square"],
)
def test_what_looks_alike_stays(after: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> None:
    assert not found(after, constants).nodes


def test_a_pattern_that_begins_with_a_product_is_that_pattern() -> None:
    after = [
        node("Mul", "up", "half", "h"),
        node("Tanh", "h", "t"),
        node("Mul", "t", "half", "u"),
        node("Add", "u", "half", "y"),
    ]
    fusion = found(after, CONSTANTS)
    assert (fusion.affine, fusion.activation.name, len(fusion.nodes)) == (None, "sigmoid", 4)


@pytest.mark.parametrize(
    ("numbers", "kept"),
    [
        ([1e38, 1e-30], 0),
        ([1e-38, 1e38], 0),
        ([1e20, 1e20, 1e-30], 1),
        ([1e-20, 1e-20, 1e30], 1),
        ([1e20, 1e-30, 1e20], 3),
        ([0.0, 1e20], 2),
        ([2.0**120, 2.0**-120], 0),
    ],
)
@pytest.mark.parametrize("then", [[], ["Relu"]])
def test_scales_between_which_numbers_overflow_or_vanish_stay(numbers: list[float], kept: int, then: list[str]) -> None:
    operators = ["Mul"] * len(numbers) + then
    names = ["up", *(f"v{i}" for i in range(1, len(operators))), "y"]
    after = [node(op, names[i], *([f"n{i}"] if op == "Mul" else []), names[i + 1]) for i, op in enumerate(operators)]
    fusion = found(after, {f"n{i}": scalar(number) for i, number in enumerate(numbers)})
    fused = operators if kept == len(numbers) else operators[:kept]
    assert [n.op_type for n in fusion.nodes] == fused


def test_numbers_added_that_overflow_together_stay() -> None:
    after = [node("Add", "up", "p", "s"), node("Add", "s", "p", "t"), node("Mul", "t", "q", "y")]
    assert not found(after, {"p": scalar(3e38), "q": scalar(1e-30)}).nodes


def test_a_product_behind_an_activation_in_which_numbers_overflow_stays() -> None:
    after = [node("Relu", "up", "r"), node("Mul", "r", "large", "s"), node("Mul", "s", "little", "y")]
    fusion = found(after, {"large": scalar(2.0**120), "little": scalar(2.0**-120)})
    assert [n.op_type for n in fusion.nodes] == ["Relu"]


@pytest.mark.parametrize("groups", [1, 3])
def test_weights_that_multiply_too(groups: int) -> None:
    scale, shift = np.array([2.0, 3, 0, -1, 1, 4]), np.arange(6.0)
    w, b = integers((3, 6 // groups, 1, 2, 2), 1), integers((6,), 2)
    folded = Affine(scale, shift, shift, 1).folded(w, b, groups)
    assert folded is not None
    spec = ConvTranspose3d.parse(f"in=2x3x2x2x2 co=6 k=1x2x2 g={groups}")
    x = integers(spec.x_shape, 3)
    by_channel = (1, 6, 1, 1, 1)
    expected = reference(spec, x, w, b) * scale.reshape(by_channel) + shift.reshape(by_channel)
    assert np.array_equal(reference(spec, x, *folded), expected)


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_weights_that_would_lose_what_they_are_stay(scale: float) -> None:
    one = Affine(np.full(1, scale), np.zeros(1), np.zeros(1), 1)
    assert one.folded(np.full((1, 1, 1, 1, 1), 0.5 if scale < 1 else 5, np.float32), None, 1) is None
    assert one.folded(np.zeros((1, 1, 1, 1, 1), np.float32), None, 1) is not None


@pytest.mark.parametrize("shape", [(5,), (1, 1, 1, 1, 2), (2, 1, 1, 1, 1), (CHANNELS, 1, 1)])
def test_other_additions_stay(shape: tuple[int, ...]) -> None:
    assert not found([node("Add", "up", "p", "y")], {"p": np.zeros(shape, np.float32)}).nodes


@pytest.mark.parametrize("op", ["Relu", "Add"])
def test_a_value_with_another_reader_stays(op: str) -> None:
    first = node("Relu", "up", "a") if op == "Relu" else node("Add", "up", "p", "a")
    after = [first, node("Abs", "up", "b"), node("Add", "a", "b", "y")]
    assert not found(after, {"p": np.zeros((CHANNELS, 1, 1, 1), np.float32)}).nodes


def test_a_value_inside_of_a_pattern_with_another_reader_stays() -> None:
    after = [*AS_WRITTEN["silu"][:1], node("Mul", "up", "s", "m"), node("Add", "m", "s", "y")]
    assert not found(after, CONSTANTS).nodes


def test_an_output_of_the_graph_stays() -> None:
    model = Model(upsampling(after=[node("Relu", "up", "y")]), Path())
    model.proto.graph.output.append(helper.make_tensor_value_info("up", TensorProto.FLOAT, None))
    (graph,) = model.graphs()
    assert fuse(model, graph, "up", CHANNELS).result == "up"


def test_a_reader_in_a_subgraph_is_a_reader() -> None:
    branch = helper.make_graph([node("Abs", "up", "inner")], "b", [], [helper.make_tensor_value_info("inner", 1, None)])
    choice = helper.make_node("If", ["flag"], ["chosen"], then_branch=branch, else_branch=branch)
    after = [node("Relu", "up", "r"), choice, node("Add", "r", "chosen", "y")]
    assert found(after, {"flag": np.array(True)}).result == "up"
