"""Put the very text of a call to the system that it is for, where that is installed.

The text is `say`'s own, and is evaluated with the system's modules and arrays under the names it uses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from opcompile.errors import EngineError, first_words
from opcompile.importers.imported import Imported, Tensor
from opcompile.say import openvino_weight

# The module of each system, and the distributions that bring it; R's packages are not reached from Python.
_PACKAGES = {
    "PyTorch": ("torch", "torch"),
    "MLX": ("mlx.core", "mlx"),
    "Lucid 2": ("lucid", "lucid-dl"),
    "Lucid 3": ("lucid", "lucid-dl"),
    "Keras": ("keras", "keras"),
    "TensorFlow": ("tensorflow", "tensorflow", "tensorflow-cpu", "tensorflow-macos", "tf-nightly"),
    "JAX": ("jax", "jax"),
    "ONNX Runtime": ("onnxruntime", "onnxruntime", "onnxruntime-gpu"),
    "OpenVINO": ("openvino", "openvino"),
}


def ask(system: str, call: str, layer: Imported, x: Tensor, w: Tensor, b: Tensor | None) -> tuple[str, Tensor]:
    """Return the system's version, and its Y (N, M, oD, oH, oW) for X, canonical W and B.

    ``layer`` says how the system lays them out. Raises `EngineError` where it is not installed, or fails.
    """
    name = "ONNX Runtime" if "ONNX Runtime" in system else system
    if name not in _PACKAGES:
        is_definition = name.startswith("ONNX")
        raise EngineError("a definition computes nothing" if is_definition else "it is not asked from Python")
    module, found = _package(name)
    own = order(x, "NCDHW", layer.x_layout)
    weight = layer.order.own(w, layer.spec.groups)
    if name == "OpenVINO":
        weight = _evaluated(openvino_weight(layer.spec), w=weight)
    try:
        y = np.asarray(_RUNNERS[name](module, call, own, weight, b), np.float64)
    except Exception as error:  # they share no base, and each means that it cannot
        raise EngineError(f"{system} {found} fails: {first_words(error)}") from error
    return found, order(y, layer.y_layout, "NCDHW")


def order(a: Tensor, have: str, want: str) -> Tensor:
    """Return an array with its axes, named by letter, in another order."""
    return np.ascontiguousarray(a.transpose([have.index(letter) for letter in want]))


def _package(name: str) -> tuple[Any, str]:
    """Import a system. Raises `EngineError` where it is not there, is another version, or cannot be imported."""
    module, distribution, *others = _PACKAGES[name]
    found = next(filter(None, map(_version, (distribution, *others))), None)
    if found is None:
        raise EngineError(f"the package {distribution} is not installed")
    if name.startswith("Lucid") and name != f"Lucid {found.split('.')[0]}":
        raise EngineError(f"the package {distribution} is version {found}")
    if name == "OpenVINO":
        # its import reports itself over the network, by a process that it forks beside JAX's threads
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return import_module(module), found
    except Exception as error:  # whatever a package does at its import, like Keras without its backend
        way_out = "; set KERAS_BACKEND to one that is installed, torch or jax" if name == "Keras" else ""
        raise EngineError(f"the package {distribution} cannot be imported: {first_words(error)}{way_out}") from error


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _evaluated(text: str, **names: Any) -> Any:
    return eval(text, {"__builtins__": {}}, names)  # noqa: S307 (a text of `say`)


def _torch(torch: Any, call: str, x: Tensor, w: Tensor, b: Tensor | None) -> Any:
    tensors = {name: torch.from_numpy(a) for name, a in {"x": x, "w": w, "b": b}.items() if a is not None}
    return _evaluated(call, F=torch.nn.functional, **tensors).numpy()


def _mlx(mx: Any, call: str, x: Tensor, w: Tensor, b: Tensor | None) -> Any:
    y = np.array(_evaluated(call, mx=mx, x=mx.array(x), w=mx.array(w)))
    return y if b is None else y + b


def _lucid(lucid: Any, call: str, x: Tensor, w: Tensor, b: Tensor | None) -> Any:
    tensors = {name: lucid.tensor(a) for name, a in {"x": x, "w": w, "b": b}.items() if a is not None}
    return _evaluated(call, F=import_module("lucid.nn.functional"), **tensors).numpy()


def _keras(keras: Any, call: str, x: Tensor, w: Tensor, b: Tensor | None) -> Any:
    """Make the layer of the call, give it the weights, and call it."""
    layer = _evaluated(call.removesuffix("(x)"), keras=keras)
    layer.build(x.shape)
    layer.set_weights([w] if b is None else [w, b])
    return keras.ops.convert_to_numpy(layer(x))


def _tensorflow(tf: Any, call: str, x: Tensor, w: Tensor, b: Tensor | None) -> Any:
    return _with_bias(_evaluated(call, tf=tf, x=x, w=w).numpy(), call, b)


def _jax(jax: Any, call: str, x: Tensor, w: Tensor, b: Tensor | None) -> Any:
    with jax.default_matmul_precision("highest"):
        return _with_bias(np.asarray(_evaluated(call, lax=jax.lax, x=x, w=w)), call, b)


def _with_bias(y: Tensor, call: str, b: Tensor | None) -> Tensor:
    if b is None:
        return y
    return y + (b[:, None, None, None] if "NCDHW" in call else b)


def _onnxruntime(onnxruntime: Any, call: str, x: Tensor, w: Tensor, b: Tensor | None) -> Any:
    """Wrap the node of the call into a model."""
    onnx: Any = import_module("onnx")
    node = _evaluated(call, helper=onnx.helper)
    arrays = {name: a for name, a in {"x": x, "w": w, "b": b}.items() if a is not None}
    inputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, a.shape) for name, a in arrays.items()]
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([node], "layer", inputs, [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, arrays)[0]


def _openvino(openvino: Any, call: str, x: Tensor, w: Tensor, b: Tensor | None) -> Any:
    """Run the operation of the call as a model of its own."""
    opset: Any = import_module("openvino.opset13")
    parameter = opset.parameter(x.shape, np.float32)
    made = _evaluated(call, opset=opset, x=parameter, w=opset.constant(w))
    model = openvino.Model([made], [parameter], "layer")
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    y = next(iter(openvino.compile_model(model, "CPU", settings)([x]).values()))
    return y if b is None else y + b[:, None, None, None]


_RUNNERS: dict[str, Callable[[Any, str, Tensor, Tensor, Tensor | None], Any]] = {
    "PyTorch": _torch,
    "MLX": _mlx,
    "Lucid 2": _lucid,
    "Lucid 3": _lucid,
    "Keras": _keras,
    "TensorFlow": _tensorflow,
    "JAX": _jax,
    "ONNX Runtime": _onnxruntime,
    "OpenVINO": _openvino,
}
