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
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from opcompile.errors import CallError, ModelError, OpcompileError, SpecError, first_words
from opcompile.importers.folding import DOMAINS, MOST_FOLDED, fold, folds, stored
from opcompile.importers.imported import unique
from opcompile.importers.order import order
from opcompile.paths import checked_path
from opcompile.spec import AXIS_NAMES, Axis, ConvTranspose3d

_DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "float64",
}

_AUTO_PADS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
_ATTRIBUTE_TYPES = {"auto_pad": onnx.AttributeProto.STRING, "group": onnx.AttributeProto.INT}

# Tensors above this many bytes tell shape inference nothing but their shape, and are kept away from it.
_LARGEST_SHAPE_TENSOR = 1024


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
    weight: NDArray[Any] | None
    bias: NDArray[Any] | None
    reason: str | None
    output: str


Shapes = Mapping[str, Sequence[int | str]]


def find(source: str | os.PathLike[str] | bytes | onnx.ModelProto, *, shapes: Shapes | None = None) -> list[Found]:
    """Return the 5-D ConvTranspose nodes of a model, in graph order.

    ``shapes`` gives inputs of the model other shapes than the file does, as ints or names of open sizes.
    Nodes in the subgraphs of If, Loop and Scan are included, and model-local functions where they are
    called. A node whose rank cannot be inferred is listed with that reason. External data are looked up
    beside the file; a source that is not a path has no such place. Raises `ModelError` for what is not a
    valid ONNX model, `CallError` for a source of another type, and shapes that are none.
    """
    with _texts():
        model, folder = _read(source)
        if shapes is not None and not isinstance(shapes, Mapping):
            raise CallError(f"shapes is {shapes!r}, but must name each input, like {{'x': (1, 4, 32, 32, 32)}}")
        outline, tensors = _understood(model, folder, shapes)
        whole = _Scope.of(tensors, outline.opset_import, _to_give(outline.graph, tensors))
        found = [_found(node, scope, folder) for node, scope in _nodes(outline.graph, whole)]
        # the branch of an If that is not taken need not fit: where there are any, a node without a spec is the sign
        doubtful = any(f.spec is None for f in found) or not _branches(outline.graph)
        if shapes and doubtful and (said := _objection(outline)):
            as_it_is, _ = _outline(model)
            order(as_it_is.graph)
            if _objection(as_it_is) is None:  # else it is another flaw
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
    with _texts():
        model, folder = _read(source)
        outline, tensors = _understood(model, folder)
        for node, scope in _nodes(outline.graph, _Scope.of(tensors, outline.opset_import)):
            with suppress(OpcompileError):
                _write_pads(node, _spec(node, scope))
    said = onnx.ModelProto()
    said.CopyFrom(model)
    for field in ("functions", "opset_import", "training_info"):
        said.ClearField(field)
    said.functions.extend(outline.functions)
    said.opset_import.extend(outline.opset_import)
    said.graph.ClearField("node")
    said.graph.node.extend(outline.graph.node)
    for tensor in filter(_is_external, said.graph.initializer):
        tensor.CopyFrom(_loaded(tensor, folder))
    return said


# --- reading: from a source to an outline that shape inference understands ---


@contextmanager
def _texts() -> Iterator[None]:
    """Raise `ModelError` where a text in the model cannot be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ModelError(f"a text in the model is not UTF-8 ({error}): the file is damaged; fetch it again") from error


def _understood(
    model: onnx.ModelProto, folder: Path | None, shapes: Shapes | None = None
) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """Return a model's outline, in order, functions inlined and shapes inferred, and its large tensors by name."""
    outline, tensors = _outline(model)
    order(outline.graph)
    if shapes:
        _reshape_inputs(outline.graph, shapes, weights={t.name for t in model.graph.initializer})
    _load_nested([*outline.graph.node, *(n for f in outline.functions for n in f.node)], folder)
    for step in (_check, _inline, _infer):
        outline = _refine(outline, step)
    while _settle(outline.graph, tensors):
        outline = _refine(outline, _infer)
    return outline, tensors


def _read(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> tuple[onnx.ModelProto, Path | None]:
    if isinstance(source, onnx.ModelProto):
        return source, None
    if isinstance(source, bytes):
        return _parse(source, "these bytes"), None
    path = checked_path(source, "the model")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}; name an ONNX file") from error
    return _parse(data, str(path)), path.parent


def _parse(data: bytes, what: str) -> onnx.ModelProto:
    other = next((way_out for ending, way_out in _NOT_ONNX.items() if what.endswith(ending)), None)
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        if other:
            raise ModelError(f"{what} is no ONNX model, which is what is read here; {other}") from error
        raise ModelError(f"{what} cannot be read as an ONNX model: {error}; export or fetch the file again") from error
    if not model.HasField("graph"):
        if other:
            raise ModelError(f"{what} is no ONNX model, which is what is read here; {other}")
        raise ModelError(f"{what} cannot be read as an ONNX model: there is no graph in it; export it again")
    return model


_READ_BY = "opcompile.importers.{} reads {}, and `opcompile compile` takes it"
_WEIGHTS = "opcompile.importers.files.layer_arrays reads weights from it"
_NOT_ONNX = {
    ".pt2": _READ_BY.format("torch.find", "a torch.export program"),
    ".keras": _READ_BY.format("keras.find", "a Keras model"),
    ".weights.h5": _WEIGHTS,
    ".h5": "save a Keras model as .keras, which `opcompile compile` takes",
    ".pt": f"save a torch.export program as .pt2, which `opcompile compile` takes; {_WEIGHTS}",
    ".pth": _WEIGHTS,
    ".safetensors": _WEIGHTS,
    ".npz": _WEIGHTS,
}


def _outline(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """Return what shape inference needs to see of a model, and its large tensors by name.

    Each of these is a graph input in the outline. So a model of any size stays below the 2 GiB that ONNX's
    C++ side can be handed, and a missing file of weights hides no shape. What the file notes of an initializer
    is left out: that says it itself.
    """
    graph = model.graph
    tensors = {t.name: t for t in graph.initializer if _is_large(t)}
    inputs = {value.name for value in graph.input}
    held = {t.name for t in graph.initializer}
    outline = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    outline.graph.CopyFrom(
        onnx.GraphProto(
            name=graph.name,
            node=graph.node,
            initializer=[t for t in graph.initializer if t.name not in tensors],
            sparse_initializer=graph.sparse_initializer,
            input=graph.input,
            output=graph.output,
            value_info=[value for value in graph.value_info if value.name not in held],
        )
    )
    outline.graph.input.extend(
        helper.make_tensor_value_info(name, t.data_type, t.dims) for name, t in tensors.items() if name not in inputs
    )
    return outline, tensors


def _reshape_inputs(graph: onnx.GraphProto, shapes: Shapes, weights: set[str]) -> None:
    """Give inputs other shapes, and forget those that followed from the old ones. Raises `ModelError`."""
    inputs = {value.name: value for value in graph.input if value.name not in weights}
    _forget_shapes(graph)
    for name, sizes in shapes.items():
        shape = _sizes(name, sizes)
        if name not in inputs:
            raise ModelError(f"the model has no input {name!r}; it has: {', '.join(inputs)}")
        if not inputs[name].type.HasField("tensor_type"):
            raise ModelError(f"input {name} is no tensor, and has no shape; leave it out")
        dimensions = inputs[name].type.tensor_type.shape.dim
        if inputs[name].type.tensor_type.HasField("shape") and len(dimensions) != len(shape):
            raise ModelError(f"input {name} has {len(dimensions)} axes, but {len(shape)} sizes were given for it")
        for given, dimension in zip(shape, dimensions, strict=False):
            if dimension.HasField("dim_value") and dimension.dim_value != given:
                raise ModelError(
                    f"input {name} is {_sizes_text(d.dim_value or d.dim_param or '?' for d in dimensions)}, and "
                    f"{_sizes_text(shape)} differs from its fixed sizes; only open sizes can be given"
                )
        element_type = inputs[name].type.tensor_type.elem_type
        inputs[name].CopyFrom(helper.make_tensor_value_info(name, element_type, shape))


def _sizes_text(sizes: Iterable[int | str]) -> str:
    return " x ".join(map(str, sizes))


def _sizes(name: str, given: Sequence[int | str]) -> list[int | str]:
    """Return the sizes that a caller gives an input. Raises `CallError`."""
    try:
        sizes = [size if isinstance(size, str) else index(size) for size in given]
    except TypeError:
        sizes = []
    if isinstance(given, str) or not sizes or not all(isinstance(size, str) or 1 <= size < 2**63 for size in sizes):
        raise CallError(
            f"shapes has {given!r} for input {name}, but must have a whole number of at least 1 for each size, below "
            "2**63, or the name of an open one, like (1, 4, 32, 32, 32)"
        )
    return sizes


def _is_large(tensor: onnx.TensorProto) -> bool:
    return _is_external(tensor) or tensor.ByteSize() > _LARGEST_SHAPE_TENSOR


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _load_nested(nodes: Sequence[onnx.NodeProto], folder: Path | None) -> None:
    """Load external data that sits in attributes and subgraphs, where no graph input can stand for it."""
    for node in nodes:
        for attribute in node.attribute:
            initializers = [t for subgraph in _subgraphs(attribute) for t in subgraph.initializer]
            for tensor in (attribute.t, *attribute.tensors, *initializers):
                if _is_external(tensor):
                    tensor.CopyFrom(_loaded(tensor, folder))
            for subgraph in _subgraphs(attribute):
                _load_nested(subgraph.node, folder)


def _refine(outline: onnx.ModelProto, step: Callable[[onnx.ModelProto], onnx.ModelProto]) -> onnx.ModelProto:
    """Take one step on ONNX's C++ side, whose exceptions say that the model is invalid."""
    try:
        return step(outline)
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        EncodeError,
        # the inliner's failed assertions; a model above 2 GiB; shapes that no memory could hold
        RuntimeError,
        ValueError,
        MemoryError,
    ) as error:
        raise ModelError(
            f"the model is not valid ONNX: {first_words(error)}; onnx {onnx.__version__} must accept it: "
            "export it again, or install a newer onnx"
        ) from error


def _check(outline: onnx.ModelProto) -> onnx.ModelProto:
    """Let ONNX's checker see the model first: shape inference on what it refuses can exhaust the memory.

    A tensor of unknown rank is legal, but not to the checker: it is shown a scalar instead.
    """
    values = (*outline.graph.input, *outline.graph.output)
    unknown = [v.type.tensor_type for v in values if v.type.HasField("tensor_type")]
    unknown = [t for t in unknown if not t.HasField("shape")]
    for tensor_type in unknown:
        tensor_type.shape.SetInParent()
    onnx.checker.check_model(outline)
    for tensor_type in unknown:
        tensor_type.ClearField("shape")
    return outline


def _inline(outline: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.inliner.inline_local_functions(outline) if outline.functions else outline


def _infer(outline: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(outline, data_prop=True)


def _objection(outline: onnx.ModelProto) -> str | None:
    """Return what inference finds wrong, where it is content to leave shapes unknown otherwise."""
    try:
        onnx.shape_inference.infer_shapes(outline, data_prop=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        return first_words(error)
    return None


# --- walking: names in scope, nodes in order ---


@dataclass(frozen=True, slots=True)
class _Value:
    """What is known of a tensor: its data (a constant), its dtype, its dimensions (a name where unknown).

    A constant that the model computes from others has the node that does, and what that reads; a tensor without a shape
    the operator where it was ``lost``.
    """

    name: str
    tensor: onnx.TensorProto | None
    element_type: int
    shape: tuple[int | str, ...] | None
    computed: _Computed | None = None
    lost: str | None = None


@dataclass(frozen=True, slots=True)
class _Computed:
    node: onnx.NodeProto
    inputs: tuple[_Value, ...]
    opset: int
    nodes: int  # this one, and those that compute what it reads


_SPARSE = "a sparse initializer"
_WAY_OUT = "give the model's inputs sizes, by {}, in Python by shapes="
_ANY_INPUT = "--shape NAME=NxCxDxHxW"


@dataclass(frozen=True, slots=True)
class _Scope:
    """The constants and the inferred types that a node sees, those of enclosing graphs included."""

    opset: int
    constants: ChainMap[str, onnx.TensorProto | _Computed | None]
    types: ChainMap[str, onnx.TypeProto.Tensor]
    lost: ChainMap[str, str]
    to_give: str  # the options that give open sizes

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, onnx.TensorProto],
        imports: Sequence[onnx.OperatorSetIdProto] = (),
        to_give: str = _ANY_INPUT,
    ) -> _Scope:
        opset = next((int(i.version) for i in imports if i.domain in DOMAINS), 1)
        return cls(opset, ChainMap(dict(tensors)), ChainMap(), ChainMap(), to_give)

    def inside(self, graph: onnx.GraphProto) -> _Scope:
        """Return the scope of a graph's nodes before the first of them has run."""
        values = (*graph.input, *graph.value_info, *graph.output)
        types = {v.name: v.type.tensor_type for v in values if v.type.HasField("tensor_type")}
        constants = {t.name: t for t in graph.initializer}
        return replace(
            self,
            constants=self.constants.new_child(constants),
            types=self.types.new_child(types),
            lost=self.lost.new_child({t.values.name: _SPARSE for t in graph.sparse_initializer}),
        )

    def hiding(self, inputs: Sequence[onnx.ValueInfoProto]) -> _Scope:
        """Return this scope for a graph inside whose inputs may have names that constants around it have, too."""
        return replace(self, constants=self.constants.new_child({value.name: None for value in inputs}))

    def learn(self, node: onnx.NodeProto) -> None:
        """Remember the output of a node that is a constant, and the first operator whose outputs have no shape."""
        for name in filter(None, node.output):
            if self.value(name).shape is None:
                first = next((self.lost[n] for n in node.input if n in self.lost), None)
                self.lost[name] = first or f"{node.domain}.{node.op_type}".lstrip(".")
        if (tensor := stored(node)) is not None:
            self.constants[node.output[0]] = tensor
        elif folds(node) and all(self.constants.get(name) is not None for name in node.input if name):
            inputs = tuple(self.value(name) for name in node.input if name)
            nodes = 1 + sum(v.computed.nodes for v in inputs if v.computed is not None)
            if nodes <= MOST_FOLDED:
                self.constants[node.output[0]] = _Computed(node, inputs, self.opset, nodes)

    def value(self, name: str) -> _Value:
        constant = self.constants.get(name)
        if isinstance(constant, onnx.TensorProto):
            return _Value(name, constant, constant.data_type, tuple(constant.dims))
        found = self.types.get(name)
        if found is None:
            return _Value(name, None, onnx.TensorProto.UNDEFINED, None, constant, self.lost.get(name))
        if not found.HasField("shape"):
            return _Value(name, None, found.elem_type, None, constant, self.lost.get(name))
        return _Value(name, None, found.elem_type, tuple(_dimension(d) for d in found.shape.dim), constant)


def _to_give(graph: onnx.GraphProto, tensors: Mapping[str, onnx.TensorProto]) -> str:
    """Return the options that give sizes to a model's inputs, ready to edit: what is known of them stands there."""
    held = {tensor.name for tensor in graph.initializer} | tensors.keys()
    inputs = [v for v in graph.input if v.name not in held and v.type.HasField("tensor_type")]
    options = (f"--shape {v.name}={sizes}" for v in inputs if (sizes := _to_edit(v.type.tensor_type)))
    return " ".join(options) or _ANY_INPUT


def _to_edit(found: onnx.TypeProto.Tensor) -> str:
    """Write the sizes of an input, with a question mark for each that is open; none where at most the batch is."""
    if not found.HasField("shape"):
        return "NxCxDxHxW"
    batch, *others = [_dimension(d) for d in found.shape.dim] or [1]
    if all(isinstance(size, int) for size in others):
        return ""
    texts = [str(size) if isinstance(size, int) else "?" for size in others]
    return "x".join([str(batch) if isinstance(batch, int) else "N", *texts])


def _dimension(d: onnx.TensorShapeProto.Dimension) -> int | str:
    return int(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?"


def _nodes(graph: onnx.GraphProto, outer: _Scope) -> Iterator[tuple[onnx.NodeProto, _Scope]]:
    """Yield every 5-D ConvTranspose with its scope, in graph order, subgraphs included."""
    scope = outer.inside(graph)
    for node in graph.node:
        if _is_conv_transpose(node) and _is_5d(node, scope):
            yield node, scope
        for attribute in node.attribute:
            for subgraph in _subgraphs(attribute):
                yield from _nodes(subgraph, scope.hiding(subgraph.input))
        scope.learn(node)


def _subgraphs(attribute: onnx.AttributeProto) -> tuple[onnx.GraphProto, ...]:
    # to touch a graph that is not there would set it
    return (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs)


def _branches(graph: onnx.GraphProto) -> bool:
    return any(_subgraphs(attribute) for node in graph.node for attribute in node.attribute)


def _is_conv_transpose(node: onnx.NodeProto) -> bool:
    return node.op_type == "ConvTranspose" and node.domain in DOMAINS


def _is_5d(node: onnx.NodeProto, scope: _Scope) -> bool:
    """Go by the ranks of X and W, else by the attributes; where nothing tells, it may be: list it."""
    shapes = [scope.value(name).shape for name in node.input[:2]]
    ranks = {len(shape) for shape in shapes if shape is not None} or _attribute_ranks(node)
    return 5 in ranks or not ranks


def _attribute_ranks(node: onnx.NodeProto) -> set[int]:
    sizes = {a.name: len(a.ints) for a in node.attribute if a.ints}
    return {2 + (size // 2 if name == "pads" else size) for name, size in sizes.items()}


# --- one node ---


def _found(node: onnx.NodeProto, scope: _Scope, folder: Path | None) -> Found:
    name = node.name or node.output[0]
    try:
        spec = _spec(node, scope)
        weight, bias = (_array(value, folder) for value in _weights(node, scope))
    except OpcompileError as error:
        return Found(name, None, None, None, str(error), node.output[0])
    return Found(name, spec, weight, bias, None, node.output[0])


def _weights(node: onnx.NodeProto, scope: _Scope) -> tuple[_Value, _Value | None]:
    has_bias = len(node.input) > 2 and node.input[2] != ""
    return scope.value(node.input[1]), scope.value(node.input[2]) if has_bias else None


def _spec(node: onnx.NodeProto, scope: _Scope) -> ConvTranspose3d:
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


def _x_sizes(x: _Value, way_out: str) -> tuple[int | None, int | str, list[int]]:
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


def _w_sizes(w: _Value) -> list[int]:
    if w.lost == _SPARSE:
        raise ModelError(
            f"W ({w.name}) is a sparse initializer, and such weights are not read; store it as a dense one"
        )
    if w.shape is None or any(isinstance(size, str) for size in w.shape):
        raise ModelError(f"W ({w.name}) has the shape {w.shape or 'unknown'}; it must be known, so fix its dimensions")
    if len(w.shape) != 5:
        raise ModelError(f"W ({w.name}) has {len(w.shape)} axes, but X has 5; they must agree")
    return [int(size) for size in w.shape]


def _dtype(values: Sequence[_Value]) -> str:
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
    for node, scope in _nodes(graph, _Scope.of(tensors)):
        spec = _disputed(node, scope)
        if spec is not None:
            _write_pads(node, spec)
            _forget_shapes(graph)
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


def _disputed(node: onnx.NodeProto, scope: _Scope) -> ConvTranspose3d | None:
    """Return the spec of a node whose inferred output differs from it."""
    if not {"auto_pad", "output_shape"} & {a.name for a in node.attribute}:
        return None
    try:
        spec = _spec(node, scope)
    except OpcompileError:
        return None  # `_found` lists it with its reason
    inferred = scope.value(node.output[0]).shape
    return spec if inferred is None or inferred[2:] != spec.y_shape[2:] else None


def _forget_shapes(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in _subgraphs(attribute):
                _forget_shapes(subgraph)


# --- weights ---


def _array(value: _Value | None, folder: Path | None) -> NDArray[Any] | None:
    """Return the data of a constant, None for what is known at run time only."""
    if value is None:
        return None
    if value.computed is not None:
        inputs = [array for array in (_array(v, folder) for v in value.computed.inputs) if array is not None]
        return fold(value.computed.node, inputs, value.computed.opset)
    if value.tensor is None:
        return None
    tensor = _loaded(value.tensor, folder)
    try:
        return np.ascontiguousarray(numpy_helper.to_array(tensor))
    except ValueError as error:
        raise ModelError(f"{value.name} holds no {list(value.tensor.dims)} tensor: {error}; export it again") from error


def _loaded(tensor: onnx.TensorProto, folder: Path | None) -> onnx.TensorProto:
    """Return the tensor, or a copy with its external data in it. Raises `ModelError` where these are missing."""
    if not _is_external(tensor):
        return tensor
    where = next((entry.value for entry in tensor.external_data if entry.key == "location"), "an unnamed file")
    if folder is None:
        raise ModelError(f"{tensor.name} is stored beside the model, in {where!r}; pass the path of the model file")
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    try:
        os.stat(folder / where)  # of a file that is not there, onnx would say that it is no regular one
        onnx.external_data_helper.load_external_data_for_tensor(copy, str(folder))
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_words(error)
        raise ModelError(
            f"{tensor.name} is stored in {where!r}, which cannot be read beside the model: {reason}; "
            f"put that file, whole, into {folder}"
        ) from error
    copy.data_location = onnx.TensorProto.DEFAULT
    copy.ClearField("external_data")
    return copy


# --- the list ---


def _in_functions(outline: onnx.ModelProto) -> list[Found]:
    """List what could not be inlined: functions written for another opset than the model's."""
    nowhere = _Scope.of({})
    return [
        Found(
            node.name or node.output[0],
            None,
            None,
            None,
            f"it is in function {function.domain}.{function.name}, whose opset is not the model's; "
            "convert one of them with onnx.version_converter",
            node.output[0],
        )
        for function in outline.functions
        for node, _ in _nodes(onnx.GraphProto(node=function.node), nowhere)
    ]
