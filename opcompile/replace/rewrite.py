"""Edits of a model: nodes that name our operators, and the models that prove them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from opcompile.errors import ModelError
from opcompile.replace.model import Graph, Model, Site, remove
from opcompile.replace.survey import Node
from opcompile.spec import ConvTranspose3d

# Where packed weights lie when the originals lay in a file of their own; a page, so that they can be mapped.
_DATA = "opcompile.data"
_PAGE = 4096


def rewrite(model: Model, replaced: Sequence[tuple[Node, str, NDArray[Any] | None]], domain: str) -> dict[str, bytes]:
    """Let nodes call operators of ``domain`` instead, in place: each with the operator's name and its packed weight.

    Returns a file with the packed weights, by its name, where originals lay in a file beside the model;
    else nothing.
    """
    taken, unread, data = model.names(), set[str](), bytearray()
    file = _new_name(_DATA, model.external_files())
    for node, operator, packed in replaced:
        if node.site is None:
            raise ModelError(f"{node.name} cannot be edited")
        inputs = list(node.site.node.input)
        if not inputs[-1]:  # a bias that is left out by an empty name
            inputs.pop()
        if packed is not None:
            unread |= {name for name in inputs[1:] if name}
            unread |= {name for fused in node.fusion.nodes for name in fused.input if name}
            name = _new_name(f"{inputs[1]}_packed", taken)
            tensor = numpy_helper.from_array(packed, name)
            if model.is_external(inputs[1]):
                _move_out(tensor, file, data)
            model.proto.graph.initializer.append(tensor)
            inputs[1:2] = [name]
            if node.bias is not None:
                name = _new_name(f"{node.output}_bias", taken)
                model.proto.graph.initializer.append(numpy_helper.from_array(node.bias, name))
                inputs[2:] = [name]
        _replace(node, node.site, operator, domain, inputs)
    model.drop_unread(unread)
    if replaced:
        model.proto.opset_import.append(helper.make_opsetid(domain, 1))
    return {file: bytes(data)} if data else {}


def _replace(node: Node, site: Site, operator: str, domain: str, inputs: Sequence[str]) -> None:
    graph, old = site.graph.proto, site.node
    new = helper.make_node(operator, inputs, [node.fusion.result], name=old.name, domain=domain)
    new.doc_string = " | ".join(str(spec) for spec in node.specs)
    new.metadata_props.extend(old.metadata_props)
    if node.packed:
        new.attribute.extend(_geometry(node.specs[0]))
    else:  # every attribute: the operator's fallback is ONNX Runtime's own kernel
        new.attribute.extend(old.attribute)
    gone = [fused.output[0] for fused in node.fusion.nodes]
    for fused in node.fusion.nodes:
        graph.node.remove(fused)
    old.CopyFrom(new)
    vanished = {node.output, *gone} - {node.fusion.result}
    remove(graph.value_info, vanished)
    if node.packed and all(value.name != node.fusion.result for value in (*graph.value_info, *graph.output)):
        # nobody else can infer what our operator writes; an open batch has no name here: any may be taken
        shape = list(node.specs[0].y_shape)
        graph.value_info.append(helper.make_tensor_value_info(node.fusion.result, onnx.TensorProto.FLOAT, shape))


def _geometry(spec: ConvTranspose3d) -> list[onnx.AttributeProto]:
    """Return what the kernel computes, for people and for tools that read the model."""
    attributes = {
        "kernel_shape": [a.kernel for a in spec.axes],
        "strides": [a.stride for a in spec.axes],
        "dilations": [a.dilation for a in spec.axes],
        "pads": [*(a.pad[0] for a in spec.axes), *(a.pad[1] for a in spec.axes)],
        "output_padding": [a.output_pad for a in spec.axes],
        "group": spec.groups,
        "activation": str(spec.activation),
    }
    return [helper.make_attribute(name, value) for name, value in attributes.items()]


def _new_name(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def _move_out(tensor: onnx.TensorProto, file: str, data: bytearray) -> None:
    """Move the data of a tensor to the end of ``data``, and let the tensor refer to them as part of ``file``."""
    data.extend(bytes(-len(data) % _PAGE))
    where = {"location": file, "offset": len(data), "length": len(tensor.raw_data)}
    data.extend(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=str(v)) for key, v in where.items())


def save(model: Model, path: Path, data: Mapping[str, bytes] = MappingProxyType({})) -> list[str]:
    """Write a model, the files that its tensors refer to and ``data``; return the names of all, the model's first.

    Raises `ModelError` where such a file has the model's own name.
    """
    files = sorted(model.external_files() - set(data))
    for name in files:
        source, place = model.folder / name, path.parent / name
        if place == path:
            raise ModelError(f"the model keeps data in {name!r}, which is its own name; save it anew")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)  # no hard link: onnx refuses data that have several names, in both models
    for name, content in data.items():
        (path.parent / name).write_bytes(content)
    path.write_bytes(model.proto.SerializeToString())
    return [path.name, *files, *data]


# --- models that prove ---


def alone(
    spec: ConvTranspose3d, operator: str, domain: str, w_shape: Sequence[int], **constants: NDArray[Any] | None
) -> onnx.ModelProto:
    """Return a model of one node that calls an operator: X, W (of ``w_shape``) and B in, Y out.

    Those of ``constants`` that are given are held by the model instead.
    """
    shapes = {"X": spec.x_shape, "W": tuple(w_shape)} | ({"B": (spec.channels_out,)} if spec.bias else {})
    known = {name: array for name, array in constants.items() if array is not None and name in shapes}
    inputs = [_value(name, shape) for name, shape in shapes.items() if name not in known]
    node = helper.make_node(operator, list(shapes), ["Y"], domain=domain)
    node.attribute.extend(a for a in _geometry(spec) if a.name != "activation")
    imports = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    held = [numpy_helper.from_array(array, name) for name, array in known.items()]
    graph = helper.make_graph([node], "alone", inputs, [_value("Y", spec.y_shape)], held)
    return helper.make_model(graph, opset_imports=imports, ir_version=helper.find_min_ir_version_for(imports[:1]))


def _value(name: str, shape: Sequence[int | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N" if n is None else n for n in shape])


# Half a unit in the last place of float32, and what an activation may err in such units (see `bounds`), with room.
_UNIT = 2.0**-24
_OF_ACTIVATION = 32.0

# From this opset on ONNX Runtime has no RandomUniformLike; before it, Dropout need not draw, nor Where be there.
_WITHOUT_RANDOM = 22


def perturbed(model: Model, nodes: Sequence[Node]) -> None:
    """Let every node that was replaced err as far as its bound allows, with signs drawn anew in each run; in place.

    ONNX Runtime's kernel and ours may each be ``gamma_t * (sum of magnitudes)`` away from the exact sum of t
    products (`bounds`), and then an activation's error: so much is added to what stock nodes compute. How far
    the outputs move says how far two right answers may be apart.
    """
    graphs = list(model.graphs())
    behind: dict[str, list[onnx.NodeProto]] = {}
    for number, node in enumerate(nodes):
        if node.site is not None:
            _perturb_sum(node, node.site, model.opset, number, behind)
            if node.fusion.activation.name != "none":
                _perturb_activation(node, node.site.graph, model.opset, number, behind)
    for graph in reversed(graphs):  # a copy of a node holds copies of the graphs inside of it
        rows = [[node, *behind.get(node.output[0], ())] for node in graph.proto.node]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for row in rows for node in row]
        del graph.proto.node[:]
        graph.proto.node.extend(copies)


def _perturb_sum(node: Node, site: Site, opset: int, number: int, behind: dict[str, list[onnx.NodeProto]]) -> None:
    """Let the sum err, with what multiplies and adds to it where that is fused."""
    last = next(reversed(node.fusion.affine_nodes), site.node)
    made = _Made(site.graph.proto, last.output[0], opset)
    magnitude = made.node("ConvTranspose", *(made.node("Abs", name) if name else "" for name in site.node.input))
    made.nodes[-1].attribute.extend(site.node.attribute)
    terms = max(spec.terms for spec in node.specs) + 2
    if (affine := node.fusion.affine) is not None:
        magnitude = made.node("Mul", magnitude, made.for_each_channel(np.abs(affine.scale)))
        magnitude = made.node("Add", magnitude, made.for_each_channel(affine.reach))
        terms += affine.roundings
    spread = made.node("Mul", magnitude, made.constant(2 * terms * _UNIT))
    behind[made.vary(last, spread, 2 * number)] = made.nodes


def _perturb_activation(
    node: Node, graph: Graph, opset: int, number: int, behind: dict[str, list[onnx.NodeProto]]
) -> None:
    last, result = node.fusion.nodes[-1], node.fusion.result
    summed = node.fusion.affine_nodes[-1].output[0] if node.fusion.affine_nodes else node.output
    made = _Made(graph.proto, result, opset)
    # the node itself writes under another name from now on
    size = made.node("Add", made.node("Abs", f"{result}_exact"), made.node("Abs", summed))
    size = made.node("Add", size, made.constant(1))
    factor = _OF_ACTIVATION * max(1.0, *(abs(p) for p in node.fusion.activation.parameters), 0.0)
    spread = made.node("Mul", size, made.constant(2 * factor * _UNIT))
    behind[made.vary(last, spread, 2 * number + 1)] = made.nodes


class _Made:
    """Nodes that are put behind the one that writes ``value``."""

    def __init__(self, graph: onnx.GraphProto, value: str, opset: int) -> None:
        self.graph, self.value, self.opset = graph, value, opset
        self.nodes: list[onnx.NodeProto] = []

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        """Append a node and return the name of its output."""
        output = f"{self.value}_perturbed_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """Add an initializer and return its name."""
        name = f"{self.value}_perturbed_constant_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def for_each_channel(self, values: NDArray[Any]) -> str:
        """Add an initializer with one element for each channel, and return its name."""
        return self.constant(values.reshape(1, -1, 1, 1, 1))

    def vary(self, node: onnx.NodeProto, spread: str, seed: int) -> str:
        """Add plus or minus ``spread`` to what ``node`` writes, which is renamed; return the new name."""
        exact = f"{self.value}_exact"
        node.output[0] = exact
        self.nodes.append(helper.make_node("Add", [exact, self.signed(spread, seed)], [self.value]))
        return exact

    def signed(self, spread: str, seed: int) -> str:
        """Give each element of ``spread`` a sign, drawn anew in each run."""
        if self.opset < _WITHOUT_RANDOM:
            drawn = self.node("Ceil", self.node("RandomUniformLike", spread, low=-1.0, high=1.0, seed=float(seed)))
            return self.node("Sub", self.node("Mul", self.node("Add", drawn, drawn), spread), spread)
        mask = f"{self.value}_perturbed_mask"
        given = [spread, self.constant(0.5), self.constant(True, bool)]
        self.nodes.append(helper.make_node("Dropout", given, [f"{self.value}_dropped", mask], seed=seed))
        return self.node("Where", mask, spread, self.node("Neg", spread))
