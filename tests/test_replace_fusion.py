"""What follows a node is recognised however an exporter wrote it, and left alone where somebody else reads it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from opcompile.replace.fusion import Fusion, fuse
from opcompile.replace.model import Model
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
    "relu": [node("Max", "up", "zero", "y")],
    "hard_silu": [node("HardSigmoid", "up", "s", alpha=1 / 6, beta=0.5), node("Mul", "up", "s", "y")],
}  # fmt: skip
CONSTANTS = {
    "half": HALF,
    "one": ONE,
    "root": ROOT,
    "three": scalar(3),
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


def test_what_comes_after_an_activation_stays() -> None:
    fusion = found([node("Relu", "up", "r"), node("Mul", "r", "half", "y")], CONSTANTS)
    assert (fusion.result, [n.op_type for n in fusion.nodes]) == ("r", ["Relu"])


@pytest.mark.parametrize("shape", [(1, CHANNELS, 1, 1, 1), (CHANNELS, 1, 1, 1), (1,), ()])
def test_additions_to_each_channel(shape: tuple[int, ...]) -> None:
    first, second = integers(shape, 3), integers((CHANNELS, 1, 1, 1), 4)
    after = [node("Add", "up", "p", "s"), node("Add", "q", "s", "t"), node("Relu", "t", "y")]
    fusion = found(after, {"p": first, "q": second})
    expected = np.broadcast_to(first.reshape(-1), CHANNELS) + second.reshape(-1)
    assert np.array_equal(fusion.bias, expected)
    assert [n.op_type for n in fusion.nodes] == ["Add", "Add", "Relu"]


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
