"""Models that nobody would export: an `OpcompileError`, or a list whose layers ONNX Runtime agrees with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser
from onnx_engine import REFUSALS, integers, model_of, one_node, run_onnxruntime, value

from opcompile.errors import OpcompileError
from opcompile.importers.onnx import Found, find
from opcompile.reference import reference

_ENDLESS = 2**62


def find_or_refuse(source: Any) -> list[Found]:
    """Ask for the nodes; what is found must hold together."""
    try:
        found = find(source)
    except OpcompileError:
        return []
    for f in found:
        assert (f.spec is None) != (f.reason is None)
        if f.spec is None:
            assert f.weight is None
        elif f.weight is not None:
            assert (f.weight.shape, f.weight.dtype.name) == (f.spec.w_shape, f.spec.dtype)
        if f.spec is not None and f.bias is not None:
            assert (f.bias.shape, f.bias.dtype.name) == ((f.spec.channels_out,), f.spec.dtype)
    assert len({f.name for f in found}) == len(found)
    return found


# --- one node, any attributes: we and ONNX Runtime accept the same, and compute the same ---


def often(right: list[Any], wrong: Any) -> st.SearchStrategy[Any]:
    """Draw a right value; the wrong one about one time in forty."""
    return st.sampled_from([*right * (40 // len(right)), wrong])


def triples(values: st.SearchStrategy[int]) -> st.SearchStrategy[list[int]]:
    """Three values; rarely another number of them."""
    return often([3], 2).flatmap(lambda n: st.lists(values, min_size=0 if n == 2 else 3, max_size=n))


@st.composite
def single_nodes(draw: st.DrawFn) -> tuple[onnx.ModelProto, list[int], list[int]]:
    """A node with small shapes, some of them wrong, and attributes, some of them wrong."""
    sizes, kernel = (draw(triples(st.integers(1, 4))) for _ in range(2))
    c = draw(st.sampled_from([1, 2, 2, 4]))
    attributes: dict[str, onnx.AttributeProto] = {}
    few = often([0, 0, 1, 2], -1)
    optional: dict[str, st.SearchStrategy[Any]] = {
        "strides": triples(often([1, 2, 3, 4], 0)),
        "dilations": triples(often([1, 2, 3], -1)),
        "pads": st.lists(few, min_size=6, max_size=6),
        "output_padding": triples(few),
        "output_shape": triples(st.integers(1, 14)),
        "kernel_shape": often([kernel], [1, 2, 3]),
        "auto_pad": often(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"], "same"),
        "group": often([1, 2], 0),
    }
    for name in draw(st.lists(st.sampled_from(list(optional)), unique=True, max_size=5)):
        drawn = draw(optional[name])
        kind = onnx.AttributeProto.INTS if isinstance(drawn, list) else None
        attributes[name] = helper.make_attribute(name, drawn, attr_type=kind)
    if "auto_pad" in attributes and draw(st.booleans()):
        attributes.pop("pads", None)
    x = [draw(st.integers(1, 2)), draw(st.sampled_from([c, c, c, c, c, c, 3])), *sizes]
    w = [c, draw(st.integers(1, 2)), *kernel]
    model = one_node(x, w, opset=draw(st.sampled_from([1, 11, 22])))
    model.graph.node[0].attribute.extend(attributes.values())
    return model, x, w


@given(single_nodes())
@settings(max_examples=300)
def test_one_node_means_what_onnxruntime_computes(drawn: tuple[onnx.ModelProto, list[int], list[int]]) -> None:
    model, x_shape, w_shape = drawn
    found = find_or_refuse(model)
    x, w = integers(tuple(x_shape)), integers(tuple(w_shape), seed=1)
    try:
        expected = run_onnxruntime(model, {"X": x, "W": w})[0]
    except REFUSALS:
        # the one thing that we know better: output_padding from a stride on
        assert all(f.spec is None or any(a.output_pad >= a.stride for a in f.spec.axes) for f in found)
        event("refused")
        return
    if expected.ndim != 5:
        assert found == []
        return
    (only,) = found
    assert only.spec is not None, only.reason
    np.testing.assert_array_equal(reference(only.spec, x, w), expected)
    event("equal")


# --- whole models, spoiled field by field ---


def _sources() -> list[onnx.ModelProto]:
    w = numpy_helper.from_array(integers((2, 1, 2, 2, 2)), "W")
    large = numpy_helper.from_array(integers((2, 40, 2, 2, 2)), "W")
    far = onnx.TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[2, 1, 2, 2, 2])
    far.data_location = TensorProto.EXTERNAL
    far.external_data.add(key="location", value="far.bin")
    x, y = value("X", ("N", 2, 3, 3, 3)), value("Y", None)
    up = helper.make_node(
        "ConvTranspose",
        ["X", "W"],
        ["Y"],
        name="up",
        strides=[2, 1, 2],
        pads=[1, 0, 0, 0, 1, 0],
        output_padding=[1, 0, 0],
    )
    same = helper.make_node("ConvTranspose", ["X", "W"], ["a"], auto_pad="SAME_UPPER", output_padding=[1, 0, 0])
    after = helper.make_node("ConvTranspose", ["b", "V"], ["Y"], output_shape=[2, 5, 5])
    relu, constant = (
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Constant", [], ["V"], value=numpy_helper.from_array(integers((1, 2, 3, 3, 3)))),
    )
    branch = [helper.make_graph([up], name, [], [y]) for name in ("then", "else")]
    branch[1].node[0].output[0] = branch[1].output[0].name = "Z"
    either = helper.make_node("If", ["c"], ["R"], then_branch=branch[0], else_branch=branch[1])
    function = parser.parse_model(
        """<ir_version: 9, opset_import: ["": 20, "local": 1]>
        g (float[N,2,3,3,3] X, float[2,2,2,2,2] W) => (float[N,C,D,H,E] Y) {
            T = local.up <s: ints = [2, 2, 2]> (X, W)
            Y = local.up <s: ints = [1, 1, 1]> (T, W)
        }
        <domain: "local", opset_import: ["": 20]>
        up <s> (a, b) => (c) { c = ConvTranspose <strides: ints = @s> (a, b) }"""
    )
    reshaped = parser.parse_model(
        """<ir_version: 9, opset_import: ["": 20]>
        g (float[N,54] X, float[2,1,2,2,2] W) => (float[N,C,D,H,E] Y)
        <int64[4] rest = {2, 3, 3, 3}, int64[1] zero = {0}> {
            shape = Shape(X)
            n = Gather(shape, zero)
            to = Concat<axis: int = 0>(n, rest)
            V = Reshape(X, to)
            Y = ConvTranspose<strides: ints = [2, 2, 2]>(V, W)
        }"""
    )
    return [
        model_of([up], [x], [y], initializers=[w]),
        model_of([up], [x], [y], initializers=[large], opset=11),
        model_of([up], [x], [y], initializers=[far], opset=20),
        model_of([same, relu, constant, after], [x], [y], initializers=[w]),
        model_of([either], [x, value("c", (), TensorProto.BOOL)], [value("R", None)], initializers=[w]),
        function,
        reshaped,
    ]


_SOURCES = _sources()
_OPERATORS = ["Relu", "ConvTranspose", "Conv", "Reshape", "Constant", "If", "Loop", "Identity", "Shape", "Gemm", "Nope"]
_INTS = st.sampled_from([0, 1, -1, 2, 3, 7, 2**31, _ENDLESS, -(2**63)])


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _spoil_node(draw: Callable[..., Any], node: onnx.NodeProto) -> None:
    match draw(st.integers(0, 8)):
        case 0:
            node.op_type = draw(st.sampled_from(_OPERATORS))
        case 1:
            node.domain = draw(st.sampled_from(["", "ai.onnx", "ai.onnx.ml", "local", "?"]))
        case 2 if node.input:
            del node.input[draw(st.integers(0, len(node.input) - 1))]
        case 3:
            node.input.append(draw(st.sampled_from(["X", "W", "", "Y", "nowhere"])))
        case 4 if node.output:
            del node.output[0]
        case 5 if node.attribute:
            draw(st.sampled_from(list(node.attribute))).type = draw(st.integers(0, 14))
        case 6 if node.attribute:
            draw(st.sampled_from(list(node.attribute))).ints[:] = draw(st.lists(_INTS, max_size=7))
        case 7:
            name = draw(st.sampled_from(["strides", "pads", "group", "auto_pad", "value", "axis", "to", "?"]))
            given_value = draw(st.sampled_from([0, -1, _ENDLESS, 1.5, "VALID", [1, 2, 3], ["a"], [0.5]]))
            node.attribute.append(helper.make_attribute(name, given_value))
        case 8:
            node.name = draw(st.sampled_from(["", "up", "Y", "\u2603"]))


def _spoil_tensor(draw: Callable[..., Any], tensor: onnx.TensorProto) -> None:
    match draw(st.integers(0, 4)):
        case 0:
            tensor.data_type = draw(st.integers(0, 30))
        case 1:
            tensor.dims[:] = draw(st.lists(_INTS, max_size=6))
        case 2:
            tensor.ClearField("raw_data")
        case 3:
            tensor.raw_data = tensor.raw_data[: draw(st.integers(0, 70))]
        case 4:
            tensor.data_location = TensorProto.EXTERNAL
            key = draw(st.sampled_from(["location", "offset", "length"]))
            tensor.external_data.add(
                key=key, value=draw(st.sampled_from(["", "far.bin", "/etc/hosts", "..", "-1", "x"]))
            )


def _spoil_value(draw: Callable[..., Any], v: onnx.ValueInfoProto) -> None:
    dims = v.type.tensor_type.shape.dim
    match draw(st.integers(0, 5)):
        case 0:
            v.type.tensor_type.elem_type = draw(st.integers(0, 30))
        case 1 if dims:
            del dims[draw(st.integers(0, len(dims) - 1))]
        case 2 if dims:
            draw(st.sampled_from(list(dims))).dim_value = draw(_INTS)
        case 3 if dims:
            draw(st.sampled_from(list(dims))).dim_param = draw(st.sampled_from(["", "N", "d"]))
        case 4:
            v.type.tensor_type.ClearField("shape")
        case 5:
            v.ClearField("type")


@st.composite
def spoiled_models(draw: st.DrawFn) -> onnx.ModelProto:
    """A model with up to four fields changed."""
    model = onnx.ModelProto()
    model.CopyFrom(draw(st.sampled_from(_SOURCES)))
    graphs = list(_graphs(model.graph))
    for _ in range(draw(st.integers(1, 4))):
        graph = draw(st.sampled_from(graphs))
        match draw(st.integers(0, 9)):
            case 0 | 1 | 2 | 3:
                _spoil_node(draw, draw(st.sampled_from(list(graph.node))))
            case 4 | 5 if graph.initializer:
                _spoil_tensor(draw, draw(st.sampled_from(list(graph.initializer))))
            case 6 | 7:
                _spoil_value(draw, draw(st.sampled_from([*graph.input, *graph.output])))
            case 8:
                version = draw(st.sampled_from([0, -1, 1, 5, 7, 11, 13, 18, 21, 22, 99, _ENDLESS]))
                model.opset_import[0].version = version
            case 9:
                model.ir_version = draw(st.integers(0, 20))
    return model


@given(spoiled_models())
@settings(max_examples=500)
def test_a_spoiled_model_is_refused_or_read(model: onnx.ModelProto) -> None:
    found = find_or_refuse(model)
    event("nothing" if not found else "a layer" if any(f.spec for f in found) else "reasons")


@given(spoiled_models())
@settings(max_examples=200)
def test_a_spoiled_model_that_onnxruntime_runs_is_read_rightly(model: onnx.ModelProto) -> None:
    """Only models of one layer, whose output is the graph's, and only small ones."""
    if len(model.graph.node) != 1 or model.graph.node[0].op_type != "ConvTranspose":
        return
    for f in find_or_refuse(model):
        if f.spec is None or f.weight is None or f.spec.dtype != "float32":
            continue
        x_shape = (f.spec.batch or 2, *(int(n or 0) for n in f.spec.x_shape[1:]))
        if math.prod(x_shape) > 10_000 or math.prod(n or 2 for n in f.spec.y_shape) > 100_000:
            continue
        x = integers(x_shape)
        feeds = {"X": x}
        if f.spec.bias and f.bias is None:
            continue
        try:
            expected = run_onnxruntime(model, feeds)[0]
        except (*REFUSALS, ValueError):
            continue
        event("compared")
        np.testing.assert_array_equal(reference(f.spec, x, f.weight, f.bias), expected)


# --- bytes ---

_BYTES = [source.SerializeToString() for source in _SOURCES]
_BYTES.append((Path(__file__).parent / "models" / "unet.onnx").read_bytes())


@st.composite
def spoiled_bytes(draw: st.DrawFn) -> bytes:
    """A file with some bytes changed, cut off, or there twice."""
    data = bytearray(draw(st.sampled_from(_BYTES)))
    # the front and the end of a file hold its structure; what is between may be weights
    place = st.integers(0, len(data) - 1) | st.integers(0, min(400, len(data) - 1))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(place)
        match draw(st.integers(0, 9)):
            case 0:
                data = data[: at + 1]
            case 1:
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
            case _:
                data[min(at, len(data) - 1)] = draw(st.integers(0, 255))
        place = st.integers(0, len(data) - 1)
    return bytes(data)


@given(spoiled_bytes())
@settings(max_examples=500)
@example(b"")
@example(b"\x00")
@example(b"\x3a\x00")
@example(_BYTES[0] * 2)
def test_spoiled_bytes_are_refused_or_read(data: bytes) -> None:
    found = find_or_refuse(data)
    event("nothing" if not found else "a layer" if any(f.spec for f in found) else "reasons")


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_noise_is_refused(data: bytes) -> None:
    assert find_or_refuse(data) == []
