"""The ONNX model that is rewritten: its graphs, who reads what, and which values are constants."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import numpy_helper

from opcompile.errors import ModelError
from opcompile.importers.folding import DOMAINS, MOST_FOLDED, fold, folds, stored
from opcompile.importers.order import reads

# Before this version every initializer is an input of the graph as well, and still a constant.
_IR_WITH_OVERRIDABLE = 4


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """One graph of a model, and the graphs around it, the outermost first."""

    proto: onnx.GraphProto
    outer: tuple[onnx.GraphProto, ...]

    def readers(self, value: str) -> list[onnx.NodeProto]:
        """Return the nodes of this graph that read ``value``, those with it inside of a subgraph included."""
        return [node for node in self.proto.node if value in reads(node)]

    def leaves(self, value: str) -> bool:
        """Whether ``value`` is an output of the graph."""
        return any(output.name == value for output in self.proto.output)


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """Where a node stands."""

    graph: Graph
    node: onnx.NodeProto


@dataclass(slots=True, eq=False)
class Model:
    """A model as it was read, without the data that lie beside it in ``folder``; edited in place."""

    proto: onnx.ModelProto
    folder: Path
    overridable: frozenset[str] = field(default=frozenset())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Model:
        """Read a model file that `opcompile.find` has accepted; functions of its own are inlined."""
        place = Path(path)
        proto = onnx.load_model_from_string(place.read_bytes())
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
        inputs = {value.name for value in proto.graph.input}
        constants = {t.name for t in proto.graph.initializer} if proto.ir_version >= _IR_WITH_OVERRIDABLE else set()
        return cls(proto, place.parent, frozenset(inputs & constants))

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return next((int(i.version) for i in self.proto.opset_import if i.domain in DOMAINS), 1)

    def graphs(self) -> Iterator[Graph]:
        """Yield the graph, and those inside of its nodes."""
        yield from _graphs(self.proto.graph, ())

    def sites(self) -> dict[str, Site]:
        """Return every ConvTranspose by the name of its output, but those that branches call alike."""
        found = [
            (node.output[0], Site(graph, node))
            for graph in self.graphs()
            for node in graph.proto.node
            if node.op_type == "ConvTranspose" and node.domain in DOMAINS
        ]
        written = Counter(output for output, _ in found)
        return {output: site for output, site in found if written[output] == 1}

    def constant(self, name: str, graph: Graph) -> NDArray[Any] | None:
        """Return the data of a value that no caller can change, None for any other. Raises `ModelError`."""
        return self._constant(name, (*graph.outer, graph.proto), iter(range(MOST_FOLDED)))

    def _constant(self, name: str, graphs: Sequence[onnx.GraphProto], left: Iterator[int]) -> NDArray[Any] | None:
        if name in self.overridable:
            return None
        for graph in reversed(graphs):
            for tensor in graph.initializer:
                if tensor.name == name:
                    return self._array(name, tensor)
            if any(value.name == name for value in graph.input):
                return None
            for node in graph.node:
                if name in node.output:
                    return self._of_node(node, graphs, left)
        return None

    def _of_node(
        self, node: onnx.NodeProto, graphs: Sequence[onnx.GraphProto], left: Iterator[int]
    ) -> NDArray[Any] | None:
        if folds(node):
            if next(left, None) is None:
                return None
            inputs = [self._constant(name, graphs, left) for name in node.input if name]
            known = [array for array in inputs if array is not None]
            return fold(node, known, self.opset) if len(known) == len(inputs) else None
        tensor = stored(node)
        return None if tensor is None else self._array(node.output[0], tensor)

    def _array(self, name: str, tensor: onnx.TensorProto) -> NDArray[Any]:
        try:
            return np.asarray(numpy_helper.to_array(tensor, str(self.folder)))
        except (ValueError, OSError, onnx.checker.ValidationError) as error:
            raise ModelError(f"{name} cannot be read: {error}; export the model again") from error

    def is_external(self, name: str) -> bool:
        """Whether the data of a constant, or of one that it is computed from, lie in a file of their own."""
        for graph in self.graphs():
            if any(_is_external(tensor) for tensor in graph.proto.initializer if tensor.name == name):
                return True
            for node in graph.proto.node:
                if name in node.output and folds(node):
                    return any(self.is_external(value) for value in node.input)
        return False

    def external_files(self) -> set[str]:
        """Return the files beside the model that its tensors refer to, relative to it."""
        tensors = (t for graph in self.graphs() for t in _tensors(graph.proto))
        return {e.value for t in tensors if _is_external(t) for e in t.external_data if e.key == "location"}

    def require_files(self) -> None:
        """Raise `ModelError` where one of these is missing, or reaches out of the model's folder."""
        for name in sorted(self.external_files()):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ModelError(f"the model keeps data in {name!r}, which is outside of its folder; save it anew")
            file = self.folder / name
            try:
                file.open("rb").close()
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise ModelError(
                    f"{file}, where the model keeps data, cannot be read: {reason}; bring it there"
                ) from error

    def names(self) -> set[str]:
        """Return every name that a value or a node has."""
        taken = set()
        for graph in self.graphs():
            taken |= {v.name for v in (*graph.proto.input, *graph.proto.output, *graph.proto.initializer)}
            taken |= {name for node in graph.proto.node for name in (node.name, *node.input, *node.output)}
        return taken

    def drop_unread(self, names: set[str]) -> None:
        """Remove those constants of ``names`` that nothing reads any more, and what they are computed from."""
        while names:
            read = {value for graph in self.graphs() for node in graph.proto.node for value in node.input}
            read |= {output.name for graph in self.graphs() for output in graph.proto.output}
            gone, names = names - read, set()
            for graph in self.graphs():
                for values in (graph.proto.initializer, graph.proto.input, graph.proto.value_info):
                    remove(values, gone)
                idle = [n for n in graph.proto.node if (n.op_type == "Constant" or folds(n)) and set(n.output) <= gone]
                for node in idle:
                    names |= set(node.input)
                    graph.proto.node.remove(node)


def _graphs(graph: onnx.GraphProto, outer: tuple[onnx.GraphProto, ...]) -> Iterator[Graph]:
    yield Graph(graph, outer)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner, (*outer, graph))


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def remove(values: Any, names: set[str]) -> None:
    """Remove those ``values`` of a graph that have one of ``names``."""
    for index in reversed(range(len(values))):
        if values[index].name in names:
            del values[index]
