"""ONNX's words for the operator: every 5-D ConvTranspose of a model as (spec, weight, bias).

Shapes are those that ONNX's own inference finds. Where the definition, its shape inference and the
engines dispute, **we follow what ONNX Runtime 1.31 computes**, at every opset:

* ``total = max(0, full + output_padding - out)`` is what auto_pad and output_shape crop. SAME_UPPER crops
  ``total // 2`` at the low side; SAME_LOWER and output_shape without SAME_UPPER crop the larger half there.
  (Opset 1 had it the other way round; ONNX Runtime applies the later rule to it as well.)
* SAME_* aims at ``out = size * stride``, but never pads: with a kernel below the stride the output stays
  ``full``. With output_padding it is ``size * stride``, where shape inference says one more.
* output_shape overrides pads. It may exceed ``full`` by less than a stride (zeros); beyond that ONNX Runtime
  refuses, and so do we.
* pads beside an auto_pad other than NOTSET are refused, as ONNX Runtime does at every opset.

Two things ONNX Runtime refuses are compiled, because their meaning is not disputed: ``output_padding >=
stride``, and dtypes bfloat16 and float64.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from opcompile.errors import CallError, ModelError, OpcompileError, SpecError
from opcompile.importers.folding import fold
from opcompile.importers.imported import unique
from opcompile.importers.order import order
from opcompile.importers.outline import (
    Shapes,
    check,
    forget_shapes,
    infer,
    inline,
    is_external,
    load_nested,
    loaded,
    objection,
    outlined,
    read_model,
    reading_texts,
    refine,
    reshape_inputs,
    subgraphs,
)
from opcompile.importers.scope import SPARSE, Scope, Value, conv_transposes, to_give
from opcompile.spec import AXIS_NAMES, Axis, ConvTranspose3d

_DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "float64",
}

_AUTO_PADS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
_WAY_OUT = "give the model's inputs sizes, by {}, in Python by shapes="
_ATTRIBUTE_TYPES = {"auto_pad": onnx.AttributeProto.STRING, "group": onnx.AttributeProto.INT}


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """One ConvTranspose node: either a ``spec``, or the ``reason`` why there is none.

    ``name`` is the node's name or that of its output, made unique. ``weight (C, M/g, kD, kH, kW)`` and
    ``bias (M,)`` are None where they arrive at run time only; ``spec.bias`` says whether there is a bias.
    An initializer that is also listed as a graph input counts as known: its value is the file's.
    ``output`` is the tensor that the node writes: its name in the model, unless a function holds the node.
    """

    name: str
    spec: ConvTranspose3d | None
    weight: NDArray[Any] | None = field(repr=False)
    bias: NDArray[Any] | None = field(repr=False)
    reason: str | None
    output: str

    @classmethod
    def refused(cls, node: onnx.NodeProto, reason: str) -> Found:
        """Return what is said of a node that cannot be compiled."""
        return cls(_name(node), None, None, None, reason, node.output[0])


def find(source: str | os.PathLike[str] | bytes | onnx.ModelProto, *, shapes: Shapes | None = None) -> list[Found]:
    """Return the 5-D ConvTranspose nodes of a model, in graph order.

    ``shapes`` gives inputs of the model other shapes than the file does, as ints or names of open sizes.
    Nodes in the subgraphs of If, Loop and Scan are included, and model-local functions where they are
    called. A node whose rank cannot be inferred is listed with that reason. External data are looked up
    beside the file; a source that is not a path has no such place. Raises `ModelError` for what is not a
    valid ONNX model, `CallError` for a source of another type, and shapes that are none.
    """
    with reading_texts():
        model, folder = read_model(source)
        if shapes is not None and not isinstance(shapes, Mapping):
            raise CallError(f"shapes is {shapes!r}, but must name each input, like {{'x': (1, 4, 32, 32, 32)}}")
        outline, tensors = _understood(model, folder, shapes)
        whole = Scope.of(tensors, outline.opset_import, to_give(outline.graph, tensors))
        found = [_found(node, scope, folder) for node, scope in conv_transposes(outline.graph, whole)]
        # the branch of an If that is not taken need not fit: where there are any, a node without a spec is the sign
        doubtful = any(f.spec is None for f in found) or not _branches(outline.graph)
        if shapes and doubtful and (said := objection(outline)):
            as_it_is, _ = outlined(model)
            order(as_it_is.graph)
            if objection(as_it_is) is None:  # else it is another flaw
                raise ModelError(
                    f"the model does not take the shapes that were given: {said}; give sizes that it takes"
                )
        found += _in_functions(outline)
        return [replace(f, name=name) for f, name in zip(found, unique(f.name for f in found), strict=True)]


def explicit(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> onnx.ModelProto:
    """Return a model, its weights in it, whose 5-D ConvTranspose nodes say their paddings in numbers.

    ``auto_pad`` and ``output_shape``, which some importers leave aside, become ``pads`` and ``output_padding``.
    Model-local functions are inlined, for each call of one may have paddings of its own. A node that `find` lists
    with a reason stays as it is. Raises as `find` does, and where a tensor's data lie beside the model and cannot be
    read.
    """
    with reading_texts():
        model, folder = read_model(source)
        outline, tensors = _understood(model, folder)
        for node, scope in conv_transposes(outline.graph, Scope.of(tensors, outline.opset_import)):
            with suppress(OpcompileError):
                _write_pads(node, _spec(node, scope))
    said = onnx.ModelProto()
    said.CopyFrom(model)
    for name in ("functions", "opset_import", "training_info"):
        said.ClearField(name)
    said.functions.extend(outline.functions)
    said.opset_import.extend(outline.opset_import)
    said.graph.ClearField("node")
    said.graph.node.extend(outline.graph.node)
    for tensor in filter(is_external, said.graph.initializer):
        tensor.CopyFrom(loaded(tensor, folder))
    return said


def _understood(
    model: onnx.ModelProto, folder: Path | None, shapes: Shapes | None = None
) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """Return a model's outline, in order, functions inlined and shapes inferred, and its large tensors by name."""
    outline, tensors = outlined(model)
    order(outline.graph)
    if shapes:
        reshape_inputs(outline.graph, shapes, weights={t.name for t in model.graph.initializer})
    load_nested([*outline.graph.node, *(n for f in outline.functions for n in f.node)], folder)
    for step in (check, inline, infer):
        outline = refine(outline, step)
    while _settle(outline.graph, tensors):
        outline = refine(outline, infer)
    return outline, tensors


def _branches(graph: onnx.GraphProto) -> bool:
    return any(subgraphs(attribute) for node in graph.node for attribute in node.attribute)


# --- one node ---


def _found(node: onnx.NodeProto, scope: Scope, folder: Path | None) -> Found:
    try:
        spec = _spec(node, scope)
        weight, bias = (_array(value, folder) for value in _weights(node, scope))
    except OpcompileError as error:
        return Found.refused(node, str(error))
    return Found(_name(node), spec, weight, bias, None, node.output[0])


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])


def _weights(node: onnx.NodeProto, scope: Scope) -> tuple[Value, Value | None]:
    has_bias = len(node.input) > 2 and node.input[2] != ""
    return scope.value(node.input[1]), scope.value(node.input[2]) if has_bias else None


def _spec(node: onnx.NodeProto, scope: Scope) -> ConvTranspose3d:
    """Read one node. Raises `ModelError` or `SpecError` with the reason why it cannot be compiled."""
    x, (w, b) = scope.value(node.input[0]), _weights(node, scope)
    batch, channels_in, sizes = _x_sizes(x, _WAY_OUT.format(scope.to_give))
    channels, per_group, *kernel = _w_sizes(w)
    attributes = _attributes(node)
    groups = int(attributes.get("group", 1))
    if groups < 1:
        raise ModelError(f"group is {groups}, but must be at least 1")
    # what a name stands for is known by W
    if isinstance(channels_in, int) and channels_in != channels:
        raise ModelError(f"X has {channels_in} channels, but W {w.shape} takes {channels}; they must be equal")
    if b is not None and b.shape is not None and not _may_be(b.shape, (per_group * groups,)):
        raise ModelError(f"B has shape {b.shape}, but must have one element for each output channel of W")
    return ConvTranspose3d(
        batch=batch,
        channels_in=channels,
        channels_out=per_group * groups,
        axes=_axes(attributes, sizes, kernel),
        groups=groups,
        bias=b is not None,
        dtype=_dtype([x, w] if b is None else [x, w, b]),
    )


def _may_be(shape: tuple[int | str, ...], sizes: tuple[int, ...]) -> bool:
    return len(shape) == len(sizes) and all(isinstance(s, str) or s == n for s, n in zip(shape, sizes, strict=True))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return the attributes by name, of the types that ONNX gives them (inlining a function can break that)."""
    for a in node.attribute:
        expected = _ATTRIBUTE_TYPES.get(a.name, onnx.AttributeProto.INTS)
        if a.type != expected:
            given, right = (onnx.AttributeProto.AttributeType.Name(t) for t in (a.type, expected))
            raise ModelError(f"attribute {a.name} is of type {given}, but must be {right}; export the model again")
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _x_sizes(x: Value, way_out: str) -> tuple[int | None, int | str, list[int]]:
    if x.shape is None:
        told = f", for nothing tells what {x.lost} writes" if x.lost else ""
        raise ModelError(
            f"the shape of X ({x.name}) cannot be inferred{told}; {way_out}, and the outputs of operators that "
            "ONNX does not define their shapes; those that the model computes are followed from opset 14 on, or once "
            "python -m onnxruntime.tools.symbolic_shape_infer has written them down"
        )
    if len(x.shape) != 5:
        raise ModelError(f"X ({x.name}) has {len(x.shape)} axes, but W has 5; they must agree")
    unknown = {name: size for name, size in zip(AXIS_NAMES, x.shape[2:], strict=True) if isinstance(size, str)}
    if unknown:
        sizes = ", ".join(f"{name}={size}" for name, size in unknown.items())
        raise ModelError(f"X ({x.name}) has dynamic spatial sizes ({sizes}), and only the batch may be; {way_out}")
    batch, channels, *spatial = x.shape
    return batch if isinstance(batch, int) else None, channels, [int(size) for size in spatial]


def _w_sizes(w: Value) -> list[int]:
    if w.lost == SPARSE:
        raise ModelError(
            f"W ({w.name}) is a sparse initializer, and such weights are not read; store it as a dense one"
        )
    if w.shape is None or any(isinstance(size, str) for size in w.shape):
        raise ModelError(f"W ({w.name}) has the shape {w.shape or 'unknown'}; it must be known, so fix its dimensions")
    if len(w.shape) != 5:
        raise ModelError(f"W ({w.name}) has {len(w.shape)} axes, but X has 5; they must agree")
    return [int(size) for size in w.shape]


def _dtype(values: Sequence[Value]) -> str:
    types = {v.element_type for v in values if v.tensor is not None or v.element_type != onnx.TensorProto.UNDEFINED}
    names = sorted(_DTYPES.get(t, _type_name(t)) for t in types)
    if len(names) != 1:
        raise ModelError(
            f"X, W and B have the dtypes {', '.join(names) or 'unknown'}, but must have one; insert a Cast"
        )
    return names[0]


def _type_name(element_type: int) -> str:
    names: dict[int, str] = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    return names.get(element_type, f"type {element_type}")


# --- attributes -> axes: the disputes of the module's docstring ---


def _axes(attributes: Mapping[str, Any], sizes: Sequence[int], kernel: Sequence[int]) -> tuple[Axis, Axis, Axis]:
    auto_pad = attributes.get("auto_pad", b"").decode(errors="replace") or "NOTSET"
    if auto_pad not in _AUTO_PADS:
        raise ModelError(f"auto_pad is {auto_pad!r}, but must be one of {', '.join(_AUTO_PADS)}")
    if auto_pad != "NOTSET" and "pads" in attributes:
        raise ModelError(f"pads are given beside auto_pad={auto_pad}, which ONNX forbids; keep one of them")
    if _integers(attributes, "kernel_shape", kernel) != list(kernel):
        raise ModelError(f"kernel_shape is {attributes['kernel_shape']}, but W has {list(kernel)}; they must be equal")
    strides, dilations = (_integers(attributes, name, [1] * 3) for name in ("strides", "dilations"))
    pads, output_pads = _integers(attributes, "pads", [0] * 6), _integers(attributes, "output_padding", [0] * 3)
    if min(pads) < 0:
        raise ModelError(f"pads are {pads}, but none may be negative, even where output_shape overrides them")
    outs = _integers(attributes, "output_shape", [0] * 3) if "output_shape" in attributes else [None] * 3
    axes = []
    for i, name in enumerate(AXIS_NAMES):
        pad = (pads[i], pads[i + 3]) if outs[i] is None else (0, 0)
        try:
            axis = Axis(sizes[i], kernel[i], strides[i], dilations[i], pad, output_pads[i])
            axes.append(_fitted(axis, auto_pad, outs[i]))
        except SpecError as error:
            raise SpecError(f"axis {name}: {error}") from None
    return axes[0], axes[1], axes[2]


def _integers(attributes: Mapping[str, Any], name: str, default: Sequence[int]) -> list[int]:
    values = list(attributes.get(name, default))
    if len(values) != len(default):
        raise ModelError(f"{name} has {len(values)} values, but a 5-D ConvTranspose takes {len(default)}")
    return values


def _fitted(axis: Axis, auto_pad: str, out: int | None) -> Axis:
    """Return the axis with the padding that auto_pad or output_shape ask for."""
    if out is None:
        if not auto_pad.startswith("SAME"):
            return axis
        out = min(axis.size * axis.stride, axis.out)
    if out < 1:
        raise SpecError(f"output_shape is {out}, but must be at least 1")
    total = axis.out - out
    if total < 0:
        if out - axis.full >= axis.stride:
            raise SpecError(
                f"output_shape is {out}, but (size-1)*stride + dilation*(kernel-1) + 1 = {axis.full}, and the "
                f"difference must be less than stride {axis.stride}; use output_padding for more"
            )
        return replace(axis, output_pad=out - axis.full)
    low = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
    return replace(axis, pad=(low, total - low))


# --- where inference and ONNX Runtime differ ---


def _settle(graph: onnx.GraphProto, tensors: Mapping[str, onnx.TensorProto]) -> bool:
    """Spell out the paddings of the first node whose output shape inference got wrong; False without one.

    Then all inferred shapes are forgotten, for those that follow from the wrong one are wrong too: that is
    why only the first node is judged. None is judged twice, for inference agrees about explicit paddings.
    """
    for node, scope in conv_transposes(graph, Scope.of(tensors)):
        spec = _disputed(node, scope)
        if spec is not None:
            _write_pads(node, spec)
            forget_shapes(graph)
            return True
    return False


def _write_pads(node: onnx.NodeProto, spec: ConvTranspose3d) -> None:
    """Say the paddings of ``spec`` in numbers."""
    kept = [a for a in node.attribute if a.name not in ("auto_pad", "output_shape", "pads", "output_padding")]
    pads = [*(a.pad[0] for a in spec.axes), *(a.pad[1] for a in spec.axes)]
    kept.append(helper.make_attribute("pads", pads))
    kept.append(helper.make_attribute("output_padding", [a.output_pad for a in spec.axes]))
    del node.attribute[:]
    node.attribute.extend(kept)


def _disputed(node: onnx.NodeProto, scope: Scope) -> ConvTranspose3d | None:
    """Return the spec of a node whose inferred output differs from it."""
    if not {"auto_pad", "output_shape"} & {a.name for a in node.attribute}:
        return None
    try:
        spec = _spec(node, scope)
    except OpcompileError:
        return None  # `_found` lists it with its reason
    inferred = scope.value(node.output[0]).shape
    return spec if inferred is None or inferred[2:] != spec.y_shape[2:] else None


# --- weights ---


def _array(value: Value | None, folder: Path | None) -> NDArray[Any] | None:
    """Return the data of a constant, None for what is known at run time only."""
    if value is None:
        return None
    if value.computed is not None:
        inputs = [array for array in (_array(v, folder) for v in value.computed.inputs) if array is not None]
        return fold(value.computed.node, inputs, value.computed.opset)
    if value.tensor is None:
        return None
    tensor = loaded(value.tensor, folder)
    try:
        return np.ascontiguousarray(numpy_helper.to_array(tensor))
    except ValueError as error:
        raise ModelError(f"{value.name} holds no {list(value.tensor.dims)} tensor: {error}; export it again") from error


# --- the list ---


def _in_functions(outline: onnx.ModelProto) -> list[Found]:
    """List what could not be inlined: functions written for another opset than the model's."""
    nowhere = Scope.of({})
    return [
        Found.refused(
            node,
            f"it is in function {function.domain}.{function.name}, whose opset is not the model's; "
            "convert one of them with onnx.version_converter",
        )
        for function in outline.functions
        for node, _ in conv_transposes(onnx.GraphProto(node=function.node), nowhere)
    ]
