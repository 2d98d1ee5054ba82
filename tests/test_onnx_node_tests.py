"""ONNX's own node tests of ConvTranspose, all eleven; those in one and two dimensions lifted by unit axes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import onnx
import pytest
from kernels import kernel
from onnx import helper
from onnx.backend.test.case import node
from onnx_engine import run_onnxruntime

from opcompile.importers.onnx import find

_NAMES = [
    "test_convtranspose",
    "test_convtranspose_1d",
    "test_convtranspose_3d",
    "test_convtranspose_autopad_same",
    "test_convtranspose_dilations",
    "test_convtranspose_group_2",
    "test_convtranspose_group_2_image_3",
    "test_convtranspose_kernel_shape",
    "test_convtranspose_output_shape",
    "test_convtranspose_pad",
    "test_convtranspose_pads",
]

# What an axis of size 1 with a kernel of 1 says, put before the others; pads in both halves.
_UNIT = {"kernel_shape": 1, "strides": 1, "dilations": 1, "output_padding": 0, "output_shape": 1}


@pytest.fixture(scope="module")
def node_tests() -> dict[str, Any]:
    """Collect ONNX's test cases; of this operator alone, for making those of all others takes twelve seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "import_recursive", lambda package: import_module(f"{package.__name__}.convtranspose"))
        return {t.name: t for t in node.collect_testcases("ConvTranspose")}


def lifted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same node in three dimensions."""
    deep = onnx.ModelProto()
    deep.CopyFrom(model)
    rank = len(model.graph.input[0].type.tensor_type.shape.dim)
    for value in (*deep.graph.input, *deep.graph.output):
        old = [d.dim_value for d in value.type.tensor_type.shape.dim]
        value.CopyFrom(helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, _lift(old)))
    for attribute in deep.graph.node[0].attribute:
        values, missing = list(attribute.ints), 5 - rank
        if attribute.name == "pads":
            half = len(values) // 2
            attribute.ints[:] = [*[0] * missing, *values[:half], *[0] * missing, *values[half:]]
        elif attribute.name in _UNIT:
            attribute.ints[:] = [*[_UNIT[attribute.name]] * missing, *values]
    return deep


def _lift(shape: Any) -> list[int]:
    return [*shape[:2], *[1] * (5 - len(shape)), *shape[2:]]


def test_there_are_eleven(node_tests: dict[str, Any]) -> None:
    assert sorted(node_tests) == _NAMES


@pytest.mark.parametrize("name", _NAMES)
def test_node(name: str, node_tests: dict[str, Any]) -> None:
    test = node_tests[name]
    model = lifted(test.model)
    (found,) = find(model)
    assert found.spec is not None, found.reason
    for (x, w), (expected,) in test.data_sets:
        x, w = x.reshape(_lift(x.shape)), w.reshape(_lift(w.shape))
        y = kernel(found.spec)(x, w)
        # small integers: to the last bit
        np.testing.assert_array_equal(y, expected.reshape(_lift(expected.shape)))
        np.testing.assert_array_equal(y, run_onnxruntime(model, {"X": x, "W": w})[0])
