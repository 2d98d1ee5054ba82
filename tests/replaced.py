"""Small models to replace nodes in, and ONNX Runtime with a library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from opcompile.replace.sessions import Session
from tests.onnx_engine import integers, model_of, value

MODELS = Path(__file__).parent / "models"
Array = NDArray[Any]


def upsampling(
    x: tuple[int | str, ...] = (1, 4, 3, 4, 5),
    *,
    channels: int = 6,
    bias: bool = True,
    after: list[onnx.NodeProto] | None = None,
    constants: dict[str, Array] | None = None,
    dtype: int = onnx.TensorProto.FLOAT,
    opset: int = 20,
    **attributes: object,
) -> onnx.ModelProto:
    """Return a model ``x -> Neg -> up -> after -> y``: ``up`` is a ConvTranspose k2 s2 with constant weights.

    ``after`` reads ``up`` and ends in ``y``; without it ``up`` is negated again.
    """
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    held = {"w": integers((int(x[1]), channels, 2, 2, 2), 1)} | ({"b": integers((channels,), 2)} if bias else {})
    held = {name: array.astype(numpy_type) for name, array in held.items()}
    attributes = {"strides": [2, 2, 2], **attributes}
    nodes = [
        helper.make_node("Neg", ["x"], ["negated"]),
        helper.make_node("ConvTranspose", ["negated", *held], ["up"], name="up", **attributes),
        *(after or [helper.make_node("Neg", ["up"], ["y"])]),
    ]
    initializers = [numpy_helper.from_array(a, name) for name, a in {**held, **(constants or {})}.items()]
    return model_of(nodes, [value("x", x, dtype)], [value("y", None, dtype)], initializers=initializers, opset=opset)


def saved(model: onnx.ModelProto, folder: Path, name: str = "model.onnx", **how: Any) -> Path:
    """Write a model and return its path."""
    onnx.save(model, folder / name, **how)
    return folder / name


def run(model: Path | onnx.ModelProto, x: Array, library: Path | None = None, threads: int = 1) -> Array:
    """Return the only output for ``x``."""
    given = model if isinstance(model, Path) else model.SerializeToString()
    session = Session(given, library, threads)
    (name,) = session.inputs
    (y,) = session({name: x}).values()
    return y


def operators(path: Path) -> list[str]:
    """Return the operators of a model's nodes, those of subgraphs included; ours without their keys."""
    found = []

    def walk(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            found.append(node.op_type.split("_")[0])
            for attribute in node.attribute:
                walk(attribute.g)

    walk(onnx.load(path, load_external_data=False).graph)
    return found
