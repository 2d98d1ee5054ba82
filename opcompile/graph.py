"""The spec as an ONNX model that ONNX Runtime runs on the CPU: what we are compared with, and ship beside.

A float32, channels-first layer becomes one plain ConvTranspose and its activation. What ONNX Runtime
1.31 refuses becomes a graph of standard operators with the same meaning:

=====================  ===================================================================
refused                written as
=====================  ===================================================================
float16, bfloat16,     Cast to float32, the layer, Cast back. X, W, B and Y keep the spec's
float64                dtype. **The sums are float32 there, for float64 too.**
layout NDHWC           Transpose, the layer, Transpose
output_pad >= stride   less end pad where there is any; otherwise zeros behind X, whose
                       landing places are cropped again: only zeros are added to the sums
=====================  ===================================================================

(float16 would run, through Casts that ONNX Runtime inserts by itself; written out, no version differs.)
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from opcompile.errors import CallError, ModelError, SpecError
from opcompile.paths import checked_path, discard
from opcompile.spec import Activation, Axis, ConvTranspose3d, require_layer

DEFAULT_OPSET = 20
# 11 gave Pad and Clip their tensor inputs; 26 is the newest that ONNX Runtime 1.31 loads.
_OLDEST_OPSET, _NEWEST_OPSET = 11, 26
_BFLOAT16_OPSET = 13

_ELEMENT_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float64": onnx.TensorProto.DOUBLE,
}
_FLOAT = _ELEMENT_TYPES["float32"]

# Protocol buffers hold 2 GiB; 1 MiB of it is kept for the graph around the weights.
_LARGEST_WEIGHTS = 2**31 - 2**20


def graph(
    spec: ConvTranspose3d,
    *,
    opset: int = DEFAULT_OPSET,
    weight: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
) -> onnx.ModelProto:
    """Return a model with inputs ``X``, ``W``, ``B`` (where the spec has a bias) and output ``Y``.

    Shapes are ``spec.x_shape``, ``W (C, M/g, kD, kH, kW)``, ``B (M,)`` and ``spec.y_shape``; a dynamic
    batch is called ``N``. A ``weight`` or ``bias`` that is given becomes an initializer instead of an input.
    Raises `SpecError` for an opset that cannot say the spec, `CallError` for arrays that do not fit it,
    `ModelError` where weight and bias would not fit in the 2 GiB of a model file.
    """
    require_layer(spec)
    _require_opset(spec, opset)
    constants = _constants(spec, weight, bias)
    body = _Body(opset)
    y = _layer(body, spec)
    body.call(y, "Y")
    shapes: dict[str, tuple[int | None, ...]] = {"X": spec.x_shape, "W": spec.w_shape}
    if spec.bias:
        shapes["B"] = (spec.channels_out,)
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(
        helper.make_graph(
            body.nodes,
            "conv_transpose_3d",
            [_value(spec, name, shape) for name, shape in shapes.items() if name not in constants],
            [_value(spec, "Y", spec.y_shape)],
            initializer=[
                *(numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in constants.items()),
                *body.initializers,
            ],
            doc_string=str(spec),
        ),
        opset_imports=imports,
        # the oldest that knows the opset, so that old readers accept it
        ir_version=helper.find_min_ir_version_for(imports),
        producer_name="opcompile",
    )


def export_onnx(
    spec: ConvTranspose3d,
    path: str | os.PathLike[str],
    *,
    opset: int = DEFAULT_OPSET,
    weight: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
) -> Path:
    """Write `graph` to ``path`` and return it; the file appears whole or not at all, and a link stays one.

    What is no file, like a pipe or ``/dev/null``, is written to as it is. Raises what `graph` raises, and `ModelError`
    where the file cannot be written.
    """
    model, path = graph(spec, opset=opset, weight=weight, bias=bias), checked_path(path, "path")
    special = path.exists() and not path.is_file()
    place = Path(os.path.realpath(path))
    beside = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        (path if special else beside).write_bytes(model.SerializeToString())
        if not special:
            os.replace(beside, place)
    except OSError as error:
        discard(beside)
        raise ModelError(
            f"cannot write {path}: {error.strerror}; name a file in a folder that exists and is yours"
        ) from error
    return path


# --- what is asked ---


def _require_opset(spec: ConvTranspose3d, opset: int) -> None:
    oldest = _BFLOAT16_OPSET if spec.dtype == "bfloat16" else _OLDEST_OPSET
    newest = min(_NEWEST_OPSET, onnx.defs.onnx_opset_version())
    if type(opset) is not int or not oldest <= opset <= newest:
        raise SpecError(
            f"opset {opset!r} cannot be written for dtype {spec.dtype}: "
            f"choose one of {oldest} to {newest}, or leave it at {DEFAULT_OPSET}"
        )


def _constants(
    spec: ConvTranspose3d, weight: NDArray[Any] | None, bias: NDArray[Any] | None
) -> dict[str, NDArray[Any]]:
    if bias is not None and not spec.bias:
        raise CallError("a bias was given, but the spec has bias=0; leave it out, or ask for bias=1")
    given = {"W": (weight, spec.w_shape), "B": (bias, (spec.channels_out,))}
    found = {}
    for name, (array, shape) in given.items():
        if array is None:
            continue
        if not isinstance(array, np.ndarray):
            raise CallError(f"{name} is a {type(array).__name__}, but must be a NumPy array; convert it first")
        kind = array.dtype.name if array.dtype.isnative else f"byte-swapped {array.dtype.name}"
        if array.shape != shape or kind != spec.dtype:
            raise CallError(
                f"{name} is {kind} {array.shape}, but the spec takes {spec.dtype} {shape}; convert and permute it first"
            )
        found[name] = array
    size = sum(a.nbytes for a in found.values())
    if size > _LARGEST_WEIGHTS:
        raise ModelError(
            f"weight and bias take {size} bytes, more than the 2 GiB of an ONNX file; leave them as inputs of the model"
        )
    return found


def _value(spec: ConvTranspose3d, name: str, shape: tuple[int | None, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        name, _ELEMENT_TYPES[spec.dtype], ["N" if size is None else size for size in shape]
    )


# --- the graph, from X to Y ---


@dataclass(frozen=True, slots=True)
class _Body:
    """Nodes and constants, in the order in which they are added."""

    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        """Append a node and return the name of its output."""
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def constant(self, values: object, dtype: type[np.generic] = np.float32) -> str:
        """Append an initializer and return its name."""
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def call(self, output: str, name: str) -> None:
        """Rename the output of the last node."""
        if self.nodes[-1].output[0] != output:
            raise ValueError(f"{output} is not the output of the last node")
        self.nodes[-1].output[0] = name


def _layer(body: _Body, spec: ConvTranspose3d) -> str:
    x, inputs = "X", ["W", "B"] if spec.bias else ["W"]
    if spec.dtype != "float32":
        x, *inputs = (body.add("Cast", name, to=_FLOAT) for name in [x, *inputs])
    if spec.layout == "NDHWC":
        x = body.add("Transpose", x, perm=[0, 4, 1, 2, 3])
    axes, behind = zip(*(_runnable(axis) for axis in spec.axes), strict=True)
    if any(behind):
        x = body.add("Pad", x, body.constant([0, 0, 0, 0, 0, 0, 0, *behind], np.int64))
    y = body.add("ConvTranspose", x, *inputs, **_attributes(axes, spec.groups))
    y = _activate(body, spec.activation, y)
    if spec.layout == "NDHWC":
        y = body.add("Transpose", y, perm=[0, 2, 3, 4, 1])
    if spec.dtype != "float32":
        y = body.add("Cast", y, to=_ELEMENT_TYPES[spec.dtype])
    return y


def _runnable(axis: Axis) -> tuple[Axis, int]:
    """Return an axis with ``output_pad < stride`` that computes the same, and the zeros it needs behind X.

    A zero behind X makes the uncropped output ``stride`` longer and adds nothing but zeros to it.
    """
    if axis.output_pad < axis.stride:
        return axis, 0
    begin, end = axis.pad
    shared = min(end, axis.output_pad)
    end, output_pad = end - shared, axis.output_pad - shared
    if output_pad < axis.stride:
        return replace(axis, pad=(begin, end), output_pad=output_pad), 0
    zeros = -(-output_pad // axis.stride)
    size = axis.size + zeros
    return replace(axis, size=size, pad=(begin, zeros * axis.stride - output_pad), output_pad=0), zeros


def _attributes(axes: tuple[Axis, ...], groups: int) -> dict[str, object]:
    return {
        "kernel_shape": [a.kernel for a in axes],
        "strides": [a.stride for a in axes],
        "dilations": [a.dilation for a in axes],
        "pads": [*(a.pad[0] for a in axes), *(a.pad[1] for a in axes)],
        "output_padding": [a.output_pad for a in axes],
        "group": groups,
    }


# --- activations: the operator where the opset has it, otherwise its definition ---


def _activate(body: _Body, activation: Activation, z: str) -> str:
    return _ACTIVATIONS[activation.name](body, z, *activation.parameters)


def _relu6(body: _Body, z: str) -> str:
    return body.add("Clip", z, body.constant(0), body.constant(6))


def _gelu(body: _Body, z: str) -> str:
    if body.opset >= 20:
        return body.add("Gelu", z)
    erf = body.add("Erf", body.add("Mul", z, body.constant(math.sqrt(0.5))))
    return _half_times_one_plus(body, z, erf)


def _gelu_tanh(body: _Body, z: str) -> str:
    if body.opset >= 20:
        return body.add("Gelu", z, approximate="tanh")
    cube = body.add("Mul", z, body.add("Mul", z, z))
    inner = body.add("Add", z, body.add("Mul", cube, body.constant(0.044715)))
    return _half_times_one_plus(
        body, z, body.add("Tanh", body.add("Mul", inner, body.constant(math.sqrt(2 / math.pi))))
    )


def _half_times_one_plus(body: _Body, z: str, t: str) -> str:
    half = body.add("Mul", z, body.constant(0.5))
    return body.add("Mul", half, body.add("Add", t, body.constant(1)))


def _silu(body: _Body, z: str) -> str:
    # not Swish, which ONNX has from opset 24: ONNX Runtime takes it apart into these two
    return body.add("Mul", z, body.add("Sigmoid", z))


def _hard_silu(body: _Body, z: str) -> str:
    if body.opset >= 14:
        return body.add("HardSwish", z)
    return body.add("Mul", z, body.add("HardSigmoid", z, alpha=1 / 6, beta=0.5))


def _mish(body: _Body, z: str) -> str:
    if body.opset >= 18:
        return body.add("Mish", z)
    return body.add("Mul", z, body.add("Tanh", body.add("Softplus", z)))


def _squareplus(body: _Body, z: str) -> str:
    root = body.add("Sqrt", body.add("Add", body.add("Mul", z, z), body.constant(4)))
    quotient = body.add("Div", body.constant(2), body.add("Add", root, body.add("Abs", z)))
    return body.add("Add", body.add("Relu", z), quotient)


def _sparse_plus(body: _Body, z: str) -> str:
    inner = body.add("Add", body.add("Clip", z, body.constant(-1), body.constant(1)), body.constant(1))
    parabola = body.add("Mul", body.add("Mul", inner, inner), body.constant(0.25))
    return body.add("Add", parabola, body.add("Relu", body.add("Sub", z, body.constant(1))))


_ACTIVATIONS: dict[str, Callable[..., str]] = {
    "none": lambda _, z: z,
    "relu": lambda body, z: body.add("Relu", z),
    "relu6": _relu6,
    "leaky_relu": lambda body, z, alpha: body.add("LeakyRelu", z, alpha=alpha),
    "elu": lambda body, z, alpha: body.add("Elu", z, alpha=alpha),
    "selu": lambda body, z, alpha, gamma: body.add("Selu", z, alpha=alpha, gamma=gamma),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "sigmoid": lambda body, z: body.add("Sigmoid", z),
    "hard_sigmoid": lambda body, z, alpha, beta: body.add("HardSigmoid", z, alpha=alpha, beta=beta),
    "silu": _silu,
    "hard_silu": _hard_silu,
    "mish": _mish,
    "softplus": lambda body, z: body.add("Softplus", z),
    "softsign": lambda body, z: body.add("Softsign", z),
    "tanh": lambda body, z: body.add("Tanh", z),
    "exponential": lambda body, z: body.add("Exp", z),
    "hard_tanh": lambda body, z: body.add("Clip", z, body.constant(-1), body.constant(1)),
    "soft_shrink": lambda body, z: body.add("Shrink", z, lambd=0.5, bias=0.5),
    "hard_shrink": lambda body, z: body.add("Shrink", z, lambd=0.5, bias=0.0),
    "tanh_shrink": lambda body, z: body.add("Sub", z, body.add("Tanh", z)),
    "log_sigmoid": lambda body, z: body.add("Neg", body.add("Softplus", body.add("Neg", z))),
    "squareplus": _squareplus,
    "sparse_plus": _sparse_plus,
}
