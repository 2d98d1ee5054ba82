"""Constants that a model computes from others: weights behind a Cast from float16, or behind a DequantizeLinear.

Only operators that cannot err are folded: those that move or convert elements, and the one product of a
DequantizeLinear, which every engine rounds alike, as it does conversions to wider integers and to floats. To narrow
integers and to texts each converts in its own way. None makes many elements out of few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from opcompile.errors import ModelError

# How models call the domain of ONNX's own operators.
DOMAINS = ("", "ai.onnx")
# ONNX evaluates none of its earlier versions, which mean the same
_EVALUATED_SINCE = {"DequantizeLinear": 19}
_STORED = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
_FOLDED = frozenset({"Cast", "DequantizeLinear", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_CONVERTED_ALIKE = frozenset(
    getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT32", "INT64")
)

# So many nodes make one constant at most: no exporter writes more, and what is read twice is computed twice.
MOST_FOLDED = 64


def folds(node: onnx.NodeProto) -> bool:
    """Whether what a node writes is a constant if all that it reads are."""
    if node.op_type not in _FOLDED or node.domain not in DOMAINS or len(node.output) != 1:
        return False
    return node.op_type != "Cast" or any(a.name == "to" and a.i in _CONVERTED_ALIKE for a in node.attribute)


def stored(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return the numbers that a Constant node holds, None of any other node."""
    for attribute in node.attribute if node.op_type == "Constant" and node.domain in DOMAINS else ():
        if attribute.name == "value":
            return attribute.t
        if attribute.name in _STORED:
            values = helper.get_attribute_value(attribute)
            return numpy_helper.from_array(np.array(values, _STORED[attribute.name]))
    return None


def fold(node: onnx.NodeProto, inputs: Sequence[NDArray[Any]], opset: int) -> NDArray[Any]:
    """Return what such a node makes of its inputs, those left out aside. Raises `ModelError` where ONNX cannot tell."""
    from onnx.reference import ReferenceEvaluator  # on use: it brings every operator

    feeds = dict(zip((name for name in node.input if name), inputs, strict=True))
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()
    ]
    graph = helper.make_graph([node], "constant", given, [onnx.ValueInfoProto(name=node.output[0])])
    since = max(opset, _EVALUATED_SINCE.get(node.op_type, 1))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", since)])
    try:
        (value,) = ReferenceEvaluator(model).run(None, feeds)
    except Exception as error:  # they share no base, and each says that this node is not to be computed
        raise ModelError(
            f"{node.output[0]}, what {node.op_type} makes of constants, cannot be computed: {error}; "
            "store it as a constant, or export the model again"
        ) from error
    return np.asarray(value, order="C")
