"""A model's outline: all of it but its large tensors, as ONNX's checker, inliner and shape inference take it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import index
from pathlib import Path

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx import helper

from opcompile.errors import CallError, ModelError, first_words
from opcompile.paths import checked_path, read_file

Shapes = Mapping[str, Sequence[int | str]]

# Tensors above this many bytes tell shape inference nothing but their shape, and are kept away from it.
_LARGEST_SHAPE_TENSOR = 1024


# --- a source ---


@contextmanager
def reading_texts() -> Iterator[None]:
    """Raise `ModelError` where a text in the model cannot be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ModelError(f"a text in the model is not UTF-8 ({error}): the file is damaged; fetch it again") from error


def read_model(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> tuple[onnx.ModelProto, Path | None]:
    """Return a model, and the folder of its file, which a source that is no path has not. Raises `ModelError`."""
    if isinstance(source, onnx.ModelProto):
        return source, None
    if isinstance(source, bytes):
        return _parse(source, "these bytes"), None
    path = checked_path(source, "the model")
    try:
        data = read_file(path)
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


# --- what stands for it ---


def outlined(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
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


def reshape_inputs(graph: onnx.GraphProto, shapes: Shapes, weights: set[str]) -> None:
    """Give inputs other shapes, and forget those that followed from the old ones. Raises `ModelError`."""
    inputs = {value.name: value for value in graph.input if value.name not in weights}
    forget_shapes(graph)
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


def forget_shapes(graph: onnx.GraphProto) -> None:
    """Forget what shapes a graph, and those inside of it, say that values have; inputs keep theirs."""
    del graph.value_info[:]
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in subgraphs(attribute):
                forget_shapes(subgraph)


def subgraphs(attribute: onnx.AttributeProto) -> tuple[onnx.GraphProto, ...]:
    """Return the graphs that an attribute holds."""
    # to touch a graph that is not there would set it
    return (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs)


def _is_large(tensor: onnx.TensorProto) -> bool:
    return is_external(tensor) or tensor.ByteSize() > _LARGEST_SHAPE_TENSOR


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's data lie in a file beside the model."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def load_nested(nodes: Sequence[onnx.NodeProto], folder: Path | None) -> None:
    """Load external data that sits in attributes and subgraphs, where no graph input can stand for it."""
    for node in nodes:
        for attribute in node.attribute:
            initializers = [t for subgraph in subgraphs(attribute) for t in subgraph.initializer]
            for tensor in (attribute.t, *attribute.tensors, *initializers):
                if is_external(tensor):
                    tensor.CopyFrom(loaded(tensor, folder))
            for subgraph in subgraphs(attribute):
                load_nested(subgraph.node, folder)


def loaded(tensor: onnx.TensorProto, folder: Path | None) -> onnx.TensorProto:
    """Return the tensor, or a copy with its external data in it. Raises `ModelError` where these are missing."""
    if not is_external(tensor):
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


# --- steps of ONNX's own ---


def refine(outline: onnx.ModelProto, step: Callable[[onnx.ModelProto], onnx.ModelProto]) -> onnx.ModelProto:
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


def check(outline: onnx.ModelProto) -> onnx.ModelProto:
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


def inline(outline: onnx.ModelProto) -> onnx.ModelProto:
    """Put model-local functions where they are called."""
    return onnx.inliner.inline_local_functions(outline) if outline.functions else outline


def infer(outline: onnx.ModelProto) -> onnx.ModelProto:
    """Add the shapes that ONNX infers, of values that follow from sizes as well."""
    return onnx.shape_inference.infer_shapes(outline, data_prop=True)


def objection(outline: onnx.ModelProto) -> str | None:
    """Return what inference finds wrong, where it is content to leave shapes unknown otherwise."""
    try:
        onnx.shape_inference.infer_shapes(outline, data_prop=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        return first_words(error)
    return None
