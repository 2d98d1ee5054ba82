"""ONNX Runtime as the tests ask it, and one-node models to ask it about."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as state

# What ONNX Runtime raises for a model or a node that it does not run.
REFUSALS = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException)


def run_onnxruntime(model: onnx.ModelProto, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Run a model on one thread and return its outputs. Raises one of `REFUSALS`."""
    for name, array in feeds.items():
        if array.ndim == 5 and 0 in array.shape[2:]:
            raise ValueError(f"{name} has shape {array.shape}: ONNX Runtime crashes on 3-D inputs without elements")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    shown, bfloat16s = _readable(model)
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run_with_ort_values(None, {name: _value(array) for name, array in feeds.items()})
    arrays = [value.numpy() for value in values]
    return [a.astype(ml_dtypes.bfloat16) if narrow else a for a, narrow in zip(arrays, bfloat16s, strict=True)]


def _value(array: NDArray[Any]) -> onnxruntime.OrtValue:
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _readable(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[bool]]:
    """Let bfloat16 outputs leave as float32, which is exact: ONNX Runtime's NumPy side does not know bfloat16."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    narrow = [output.type.tensor_type.elem_type == TensorProto.BFLOAT16 for output in shown.graph.output]
    for output, is_narrow in zip(shown.graph.output, narrow, strict=True):
        if is_narrow:
            name = f"{output.name}_float32"
            shown.graph.node.append(helper.make_node("Cast", [output.name], [name], to=TensorProto.FLOAT))
            output.name = name
            output.type.tensor_type.elem_type = TensorProto.FLOAT
    return shown, narrow


def one_node(
    x: tuple[int | str | None, ...] | None,
    w: tuple[int | str | None, ...] | None,
    *,
    bias: int | str | None = None,
    opset: int = 22,
    dtype: int = TensorProto.FLOAT,
    name: str = "",
    **attributes: object,
) -> onnx.ModelProto:
    """Return ``Y = ConvTranspose(X, W[, B])`` with everything as inputs and a Y of unknown shape."""
    shapes = {"X": x, "W": w} | ({} if bias is None else {"B": (bias,)})
    node = helper.make_node("ConvTranspose", list(shapes), ["Y"], name=name, **attributes)
    return model_of([node], [value(n, s, dtype) for n, s in shapes.items()], [value("Y", None, dtype)], opset=opset)


def value(name: str, shape: Any, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """Return a named tensor; a shape of None is one of unknown rank."""
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    *,
    initializers: list[onnx.TensorProto] | None = None,
    opset: int = 22,
) -> onnx.ModelProto:
    """Return a model of these nodes."""
    imports = [helper.make_opsetid("", opset)]
    graph = helper.make_graph(nodes, "tested", inputs, outputs, initializer=initializers or [])
    return helper.make_model(graph, opset_imports=imports, ir_version=helper.find_min_ir_version_for(imports))


def integers(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    """Return small integers in float32: every sum of their products is exact."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)
