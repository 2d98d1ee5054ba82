"""What is known of a model's tensors where a node reads them, and which nodes are 5-D ConvTransposes."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from opcompile.importers.folding import DOMAINS, MOST_FOLDED, folds, stored
from opcompile.importers.outline import subgraphs

SPARSE = "a sparse initializer"
_ANY_INPUT = "--shape NAME=NxCxDxHxW"


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of a tensor: its data (a constant), its dtype, its dimensions (a name where unknown).

    A constant that the model computes from others has the node that does, and what that reads; a tensor without a shape
    the operator where it was ``lost``.
    """

    name: str
    tensor: onnx.TensorProto | None
    element_type: int
    shape: tuple[int | str, ...] | None
    computed: Computed | None = None
    lost: str | None = None


@dataclass(frozen=True, slots=True)
class Computed:
    """A constant that a node of the model computes."""

    node: onnx.NodeProto
    inputs: tuple[Value, ...]
    opset: int
    nodes: int  # this one, and those that compute what it reads


@dataclass(frozen=True, slots=True)
class Scope:
    """The constants and the inferred types that a node sees, those of enclosing graphs included."""

    opset: int
    constants: ChainMap[str, onnx.TensorProto | Computed | None]
    types: ChainMap[str, onnx.TypeProto.Tensor]
    lost: ChainMap[str, str]
    to_give: str  # the options that give open sizes

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, onnx.TensorProto],
        imports: Sequence[onnx.OperatorSetIdProto] = (),
        to_give: str = _ANY_INPUT,
    ) -> Scope:
        """Return the scope around a model's graph, whose large ``tensors`` are constants."""
        opset = next((int(i.version) for i in imports if i.domain in DOMAINS), 1)
        return cls(opset, ChainMap(dict(tensors)), ChainMap(), ChainMap(), to_give)

    def inside(self, graph: onnx.GraphProto) -> Scope:
        """Return the scope of a graph's nodes before the first of them has run."""
        values = (*graph.input, *graph.value_info, *graph.output)
        types = {v.name: v.type.tensor_type for v in values if v.type.HasField("tensor_type")}
        constants = {t.name: t for t in graph.initializer}
        return replace(
            self,
            constants=self.constants.new_child(constants),
            types=self.types.new_child(types),
            lost=self.lost.new_child({t.values.name: SPARSE for t in graph.sparse_initializer}),
        )

    def hiding(self, inputs: Sequence[onnx.ValueInfoProto]) -> Scope:
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
                self.constants[node.output[0]] = Computed(node, inputs, self.opset, nodes)

    def value(self, name: str) -> Value:
        """Return what is known of the tensor that has this name here."""
        constant = self.constants.get(name)
        if isinstance(constant, onnx.TensorProto):
            return Value(name, constant, constant.data_type, tuple(constant.dims))
        found = self.types.get(name)
        if found is None:
            return Value(name, None, onnx.TensorProto.UNDEFINED, None, constant, self.lost.get(name))
        if not found.HasField("shape"):
            return Value(name, None, found.elem_type, None, constant, self.lost.get(name))
        return Value(name, None, found.elem_type, tuple(_dimension(d) for d in found.shape.dim), constant)


def to_give(graph: onnx.GraphProto, tensors: Mapping[str, onnx.TensorProto]) -> str:
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


def conv_transposes(graph: onnx.GraphProto, outer: Scope) -> Iterator[tuple[onnx.NodeProto, Scope]]:
    """Yield every 5-D ConvTranspose with its scope, in graph order, subgraphs included."""
    scope = outer.inside(graph)
    for node in graph.node:
        if _is_conv_transpose(node) and _is_5d(node, scope):
            yield node, scope
        for attribute in node.attribute:
            for subgraph in subgraphs(attribute):
                yield from conv_transposes(subgraph, scope.hiding(subgraph.input))
        scope.learn(node)


def _is_conv_transpose(node: onnx.NodeProto) -> bool:
    return node.op_type == "ConvTranspose" and node.domain in DOMAINS


def _is_5d(node: onnx.NodeProto, scope: Scope) -> bool:
    """Go by the ranks of X and W, else by the attributes; where nothing tells, it may be: list it."""
    shapes = [scope.value(name).shape for name in node.input[:2]]
    ranks = {len(shape) for shape in shapes if shape is not None} or _attribute_ranks(node)
    return 5 in ranks or not ranks


def _attribute_ranks(node: onnx.NodeProto) -> set[int]:
    sizes = {a.name: len(a.ints) for a in node.attribute if a.ints}
    return {2 + (size // 2 if name == "pads" else size) for name, size in sizes.items()}
