"""ONNX files read: which nodes, which layers, which weights; and as ONNX Runtime means them."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser
from onnx_engine import REFUSALS, integers, model_of, one_node, run_onnxruntime, value
from strategies import arrays

from opcompile.cases import Case, tagged
from opcompile.errors import CallError, ModelError
from opcompile.graph import export_onnx, graph
from opcompile.importers.onnx import Found, explicit, find
from opcompile.reference import reference
from opcompile.replace.survey import survey
from opcompile.spec import Activation, ConvTranspose3d
from opcompile.verify import compare

MODELS = Path(__file__).parent / "models"


def only(source: Any) -> Found:
    (found,) = find(source)
    return found


def spec_of(source: Any) -> ConvTranspose3d:
    found = only(source)
    assert found.spec is not None, found.reason
    return found.spec


def reason_of(source: Any) -> str:
    found = only(source)
    assert found.spec is None
    assert found.weight is None
    assert found.bias is None
    assert found.reason is not None
    return found.reason


# --- our own graphs come back ---


@pytest.mark.parametrize("corner", [pytest.param(c, id=c.name) for c in tagged("corner")])
def test_what_graph_wrote_is_read_back(corner: Case) -> None:
    spec = corner.spec
    found = only(graph(spec))
    assert found.spec is not None
    assert found.weight is None
    # the node alone: activation, casts and transposes are other nodes
    bare = replace(spec, activation=Activation(), dtype="float32", layout="NCDHW")
    if all(a.output_pad < a.stride for a in spec.axes):
        assert found.spec == bare
    assert found.spec.y_shape == bare.y_shape


@pytest.mark.parametrize("opset", [11, 14, 21, 22, 26])
def test_at_every_opset(opset: int) -> None:
    spec = ConvTranspose3d.parse("in=Nx4x3x4x5 co=6 k=3 s=2 p=1:0 op=1 d=2 g=2")
    assert spec_of(graph(spec, opset=opset)) == spec


@pytest.mark.parametrize("opset", [1, 6, 9, 10])
def test_at_the_first_version_of_the_operator(opset: int) -> None:
    model = one_node((1, 2, 3, 3, 3), (2, 1, 3, 3, 3), opset=opset, strides=[2, 2, 2], pads=[1] * 6)
    assert str(spec_of(model)).startswith("in=1x2x3x3x3 co=1 k=3 s=2 p=1 op=0")


def test_weights_come_back_to_the_last_bit(tmp_path: Path) -> None:
    spec = ConvTranspose3d.parse("in=1x8x3x4x5 co=8 k=3 s=2")
    _, w, b = arrays(spec)
    path = export_onnx(spec, tmp_path / "layer.onnx", weight=w, bias=b)
    for source in (path, str(path), path.read_bytes(), onnx.load(path)):
        found = only(source)
        assert found.spec == spec
        assert found.weight is not None
        assert found.bias is not None
        assert found.weight.tobytes() == w.tobytes()
        assert found.bias.tobytes() == b.tobytes()  # type: ignore[union-attr]


def test_the_model_that_was_given_is_left_as_it_was() -> None:
    model = one_node((1, 1, 3, 3, 3), (1, 1, 3, 3, 3), auto_pad="SAME_UPPER", strides=[2] * 3, output_padding=[1] * 3)
    before = model.SerializeToString()
    find(model)
    assert model.SerializeToString() == before


# --- real models ---

_REAL = {
    "dynunet": [
        "in=1x32x4x4x4 co=24 k=1x2x2 s=1x2x2 bias=0",
        "in=1x24x4x8x8 co=16 k=2 s=2 bias=0",
        "in=1x16x8x16x16 co=8 k=2 s=2 bias=0",
    ],
    "dynunet_dynamic_batch": [
        "in=Nx32x4x4x4 co=24 k=1x2x2 s=1x2x2 bias=0",
        "in=Nx24x4x8x8 co=16 k=2 s=2 bias=0",
        "in=Nx16x8x16x16 co=8 k=2 s=2 bias=0",
    ],
    "unet": [
        "in=1x48x6x6x6 co=8 k=3 s=2 p=1 op=1",
        "in=1x16x12x12x12 co=2 k=3 s=2 p=1 op=1",
    ],
    "vqvae": [
        "in=1x16x6x6x6 co=16 k=4 s=2 p=1",
        "in=1x16x12x12x12 co=1 k=4 s=2 p=1",
    ],
}


@pytest.mark.parametrize("name", _REAL)
def test_real_models_hold_these_layers(name: str) -> None:
    found = find(MODELS / f"{name}.onnx")
    assert [f.spec for f in found] == [ConvTranspose3d.parse(text) for text in _REAL[name]]
    for f in found:
        assert f.spec is not None
        assert f.weight is not None
        assert f.weight.shape == f.spec.w_shape
        assert (f.bias is not None) == f.spec.bias


@pytest.mark.parametrize("name", _REAL)
def test_layers_of_real_models_compute_what_the_model_computes(name: str) -> None:
    model = onnx.load(MODELS / f"{name}.onnx")
    nodes = [n for n in model.graph.node if n.op_type == "ConvTranspose"]
    found = find(model)
    for node in nodes:
        model.graph.output.extend([value(node.input[0], None), value(node.output[0], None)])
    x = model.graph.input[0]
    shape = [d.dim_value or 2 for d in x.type.tensor_type.shape.dim]
    ends = len(model.graph.output) - 2 * len(nodes)
    seen = run_onnxruntime(model, {x.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)})[ends:]
    for f, before, after in zip(found, seen[::2], seen[1::2], strict=True):
        assert f.spec is not None
        compare(f.spec, after, before, f.weight, f.bias).require()


# --- where weights may be ---

WEIGHT = integers((2, 3, 2, 2, 2))
BIAS = integers((3,))


def layer(
    *more: onnx.NodeProto, w: str = "W", b: str = "B", initializers: Any = (), opset: int = 22
) -> onnx.ModelProto:
    node = helper.make_node("ConvTranspose", ["X", w, b], ["Y"], name="up")
    x, y = value("X", (1, 2, 3, 3, 3)), value("Y", None)
    return model_of([*more, node], [x], [y], initializers=list(initializers), opset=opset)


def tensor(name: str, array: NDArray[Any]) -> onnx.TensorProto:
    return numpy_helper.from_array(array, name)


def test_weights_in_constant_nodes() -> None:
    found = only(
        layer(
            helper.make_node("Constant", [], ["W"], value=tensor("", WEIGHT)),
            helper.make_node("Constant", [], ["B"], value_floats=BIAS.tolist()),
        )
    )
    np.testing.assert_array_equal(found.weight, WEIGHT)
    np.testing.assert_array_equal(found.bias, BIAS)


def test_weights_behind_identity_nodes() -> None:
    found = only(
        layer(
            helper.make_node("Identity", ["shared"], ["W"]),
            initializers=[tensor("shared", WEIGHT), tensor("B", BIAS)],
        )
    )
    np.testing.assert_array_equal(found.weight, WEIGHT)


_EIGHTHS = (8 * WEIGHT).astype(np.int8)
_COMPUTED: dict[str, tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]] = {
    "a cast": ([helper.make_node("Cast", ["a"], ["W"], to=TensorProto.FLOAT)], {"a": (WEIGHT / 3).astype(np.float16)}),
    "a transposition": (
        [helper.make_node("Transpose", ["a"], ["W"], perm=[1, 0, 2, 3, 4])],
        {"a": np.ascontiguousarray(WEIGHT.swapaxes(0, 1))},
    ),
    "a scale": (
        [helper.make_node("DequantizeLinear", ["a", "s"], ["W"])],
        {"a": _EIGHTHS, "s": np.array(0.1, np.float32)},
    ),
    "a scale for each channel": (
        [helper.make_node("DequantizeLinear", ["a", "s", "z"], ["W"], axis=0)],
        {"a": _EIGHTHS, "s": np.array([0.1, 0.3], np.float32), "z": np.array([3, -4], np.int8)},
    ),
    "a chain": (
        [
            helper.make_node("Constant", [], ["shape"], value_ints=WEIGHT.shape),
            helper.make_node("Identity", ["a"], ["copied"]),
            helper.make_node("Reshape", ["copied", "shape"], ["shaped"]),
            helper.make_node("Cast", ["shaped"], ["W"], to=TensorProto.FLOAT),
        ],
        {"a": WEIGHT.reshape(-1).astype(np.float64)},
    ),
}


@pytest.mark.parametrize("opset", [13, 22])
@pytest.mark.parametrize("name", _COMPUTED)
def test_weights_computed_from_constants_are_what_onnxruntime_makes_of_them(name: str, opset: int) -> None:
    nodes, held = _COMPUTED[name]
    constants = [tensor(n, array) for n, array in held.items()]
    alone = model_of(nodes, [], [value("W", WEIGHT.shape)], initializers=constants, opset=opset)
    model = layer(*nodes, initializers=[*constants, tensor("B", BIAS)], opset=opset)
    (right,) = run_onnxruntime(alone, {})
    found = only(model)
    assert found.weight is not None
    assert found.weight.dtype == right.dtype
    assert found.weight.tobytes() == right.tobytes()
    assert spec_of(model) == spec_of(layer(initializers=[tensor("W", right), tensor("B", BIAS)]))


def test_weights_that_cannot_be_computed_are_a_reason() -> None:
    """Four zero points for three channels; ONNX's checker does not see it."""
    node = helper.make_node("DequantizeLinear", ["a", "s", "z"], ["W"])
    held = {"a": _EIGHTHS, "s": np.array(0.1, np.float32), "z": np.array([1, 2, 3, 4], np.int8)}
    model = layer(node, initializers=[*(tensor(n, a) for n, a in held.items()), tensor("B", BIAS)])
    assert "W, what DequantizeLinear makes of constants, cannot be computed" in reason_of(model)


def test_weights_computed_by_other_nodes_are_runtime_inputs() -> None:
    found = only(
        layer(
            helper.make_node("Neg", ["minus"], ["W"]),
            initializers=[tensor("minus", -WEIGHT), tensor("B", BIAS)],
        )
    )
    assert found.weight is None
    assert found.spec is not None
    np.testing.assert_array_equal(found.bias, BIAS)


def test_a_conversion_that_engines_make_in_their_own_ways_is_theirs() -> None:
    """ONNX Runtime rounds to 4 bits, where ONNX's own evaluator cuts off."""
    nodes = [
        helper.make_node("Cast", ["a"], ["narrow"], to=TensorProto.INT4),
        helper.make_node("Cast", ["narrow"], ["W"], to=TensorProto.FLOAT),
    ]
    found = only(layer(*nodes, initializers=[tensor("a", WEIGHT / 3), tensor("B", BIAS)]))
    assert found.weight is None
    assert found.spec is not None


def doubling(steps: int) -> list[onnx.NodeProto]:
    """Return nodes that compute W, each second one from two values that the one before computes."""
    nodes = []
    for i in range(steps):
        nodes.append(helper.make_node("Cast", [f"s{i}"], [f"q{i}"], to=TensorProto.INT32))
        nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}"], [f"s{i + 1}"]))
    return [*nodes, helper.make_node("DequantizeLinear", ["a", f"s{steps}"], ["W"])]


def copying(steps: int) -> list[onnx.NodeProto]:
    names = ["copied", *(f"copy{i}" for i in range(steps - 1)), "W"]
    return [helper.make_node("Identity", [a], [b]) for a, b in pairwise(names)]


@pytest.mark.parametrize("nodes", [copying(3000), doubling(40)], ids=["a long way", "many ways"])
def test_weights_a_long_way_from_constants_are_runtime_inputs(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    held = {"a": _EIGHTHS, "copied": WEIGHT, "s0": np.array(1, np.float32)}
    model = layer(*nodes, initializers=[*(tensor(n, array) for n, array in held.items()), tensor("B", BIAS)])
    found = only(model)
    assert found.weight is None
    assert found.spec is not None
    onnx.save(model, tmp_path / "model.onnx")
    _, (node,) = survey(tmp_path / "model.onnx")
    assert (node.packed, node.weight) == (False, None)


def test_an_input_of_a_body_is_not_the_constant_of_that_name(tmp_path: Path) -> None:
    """ONNX Runtime takes what the Scan hands over."""
    body = helper.make_graph(
        [helper.make_node("ConvTranspose", ["X", "W"], ["Y"], name="up")],
        "body",
        [value("W", WEIGHT.shape)],
        [value("Y", None)],
    )
    node = helper.make_node("Scan", ["all"], ["stacked"], body=body, num_scan_inputs=1)
    held = [tensor("W", WEIGHT), tensor("all", np.stack([2 * WEIGHT, 3 * WEIGHT]))]
    model = model_of([node], [value("X", (1, 2, 3, 3, 3))], [value("stacked", None)], initializers=held)
    x = integers((1, 2, 3, 3, 3))
    doubled, tripled = (reference(spec_of(model), x, factor * WEIGHT) for factor in (2, 3))
    np.testing.assert_array_equal(run_onnxruntime(model, {"X": x})[0], np.stack([doubled, tripled]))
    assert only(model).weight is None
    onnx.save(model, tmp_path / "model.onnx")
    _, (found,) = survey(tmp_path / "model.onnx")
    assert found.weight is None


def test_weights_that_arrive_at_run_time() -> None:
    found = only(one_node((1, 2, 3, 3, 3), (2, 3, 2, 2, 2), bias=3))
    assert found.spec == ConvTranspose3d.parse("in=1x2x3x3x3 co=3 k=2")
    assert found.weight is None
    assert found.bias is None


def test_an_empty_third_input_is_no_bias() -> None:
    assert not spec_of(layer(b="", initializers=[tensor("W", WEIGHT)])).bias


def test_an_initializer_that_is_also_an_input_is_known() -> None:
    model = layer(initializers=[tensor("W", WEIGHT), tensor("B", BIAS)])
    model.graph.input.append(value("W", WEIGHT.shape))
    np.testing.assert_array_equal(only(model).weight, WEIGHT)


@pytest.mark.parametrize(
    ("dtype", "element_type"),
    [
        ("float32", TensorProto.FLOAT),
        ("float16", TensorProto.FLOAT16),
        ("bfloat16", TensorProto.BFLOAT16),
        ("float64", TensorProto.DOUBLE),
    ],
)
def test_every_dtype_in_every_place_of_a_tensor(dtype: str, element_type: int) -> None:
    node = helper.make_node("ConvTranspose", ["X", "W"], ["Y"])
    x, y = value("X", (1, 2, 3, 3, 3), element_type), value("Y", None, element_type)
    for raw in (True, False):
        array = WEIGHT.astype(helper.tensor_dtype_to_np_dtype(element_type))
        w = helper.make_tensor("W", element_type, WEIGHT.shape, array.tobytes() if raw else WEIGHT.ravel(), raw=raw)
        found = only(model_of([node], [x], [y], initializers=[w]))
        assert found.spec is not None
        assert found.weight is not None
        assert found.spec.dtype == found.weight.dtype.name == dtype
        np.testing.assert_array_equal(found.weight.astype(np.float32), WEIGHT)


def test_a_tensor_with_too_little_data_is_a_reason() -> None:
    w = tensor("W", integers((2, 40, 3, 3, 3)))
    w.raw_data = w.raw_data[:-4]
    assert "W holds no [2, 40, 3, 3, 3] tensor" in reason_of(layer(b="", initializers=[w]))


def test_sparse_weights_are_a_reason() -> None:
    values, indices = tensor("W", np.ones(1, np.float32)), tensor("", np.zeros(1, np.int64))
    model = one_node((1, 2, 3, 3, 3), None)
    del model.graph.input[1]
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2, 1, 2, 2, 2]))
    assert reason_of(model).startswith("W (W) is a sparse initializer, and such weights are not read; store it as")


def test_a_tensor_without_a_type_is_a_reason() -> None:
    w = tensor("W", integers((2, 40, 3, 3, 3)))
    w.data_type = TensorProto.UNDEFINED
    assert "the dtypes float32, undefined, but must have one" in reason_of(layer(b="", initializers=[w]))


# --- external data ---


@pytest.fixture
def external(tmp_path: Path) -> Path:
    model = onnx.load(MODELS / "unet.onnx")
    onnx.save(model, tmp_path / "unet.onnx", save_as_external_data=True, location="unet.weights", size_threshold=64)
    return tmp_path / "unet.onnx"


def test_external_data_are_read_beside_the_model(external: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    for f, inside in zip(find(external), find(MODELS / "unet.onnx"), strict=True):
        assert f.spec == inside.spec
        np.testing.assert_array_equal(f.weight, inside.weight)


def test_missing_external_data_are_a_reason_that_names_the_file(external: Path) -> None:
    (external.parent / "unet.weights").unlink()
    found = find(external)
    assert len(found) == 2
    assert all(
        f.reason is not None and "'unet.weights'" in f.reason and str(external.parent) in f.reason for f in found
    )
    assert not any("export it again" in (f.reason or "") for f in found)


def test_an_explicit_model_has_its_external_data_in_it(external: Path) -> None:
    said = explicit(external)
    assert not any(onnx.external_data_helper.uses_external_data(t) for t in said.graph.initializer)
    inside = {t.name: numpy_helper.to_array(t) for t in onnx.load(MODELS / "unet.onnx").graph.initializer}
    assert {t.name for t in said.graph.initializer} == set(inside)
    assert all(np.array_equal(numpy_helper.to_array(t), inside[t.name]) for t in said.graph.initializer)
    with pytest.raises(ModelError, match="pass the path of the model"):
        explicit(external.read_bytes())
    (external.parent / "unet.weights").unlink()
    with pytest.raises(ModelError, match=r"cannot be read beside the model: No such file or directory; put that file"):
        explicit(external)


def test_short_external_data_are_a_reason(external: Path) -> None:
    weights = external.parent / "unet.weights"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert all("unet.weights" in (f.reason or "") for f in find(external))


def test_external_data_have_no_place_beside_bytes(external: Path) -> None:
    assert all("pass the path of the model" in (f.reason or "") for f in find(external.read_bytes()))


def test_external_data_outside_the_folder_are_refused(external: Path) -> None:
    model = onnx.load(external, load_external_data=False)
    inner = external.parent / "inner"
    inner.mkdir()
    for t in model.graph.initializer:
        for entry in t.external_data:
            if entry.key == "location":
                entry.value = "../unet.weights"
    (inner / "unet.onnx").write_bytes(model.SerializeToString())
    assert all("../unet.weights" in (f.reason or "") for f in find(inner / "unet.onnx"))


def test_external_data_of_a_constant_node(tmp_path: Path) -> None:
    model = layer(helper.make_node("Constant", [], ["W"], value=tensor("far", WEIGHT)), b="")
    far = model.graph.node[0].attribute[0].t
    onnx.external_data_helper.set_external_data(far, "far.bin")
    far.ClearField("raw_data")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"far is stored in 'far.bin', which cannot be read"):
        find(path)
    (tmp_path / "far.bin").write_bytes(WEIGHT.tobytes())
    np.testing.assert_array_equal(only(path).weight, WEIGHT)


# --- where nodes may be ---


def test_other_ranks_are_left_out() -> None:
    assert find(one_node((1, 2, 3, 3), (2, 3, 2, 2))) == []
    assert find(one_node((1, 2, 3), (2, 3, 2))) == []
    assert find(one_node(None, None, kernel_shape=[2, 2])) == []


def test_a_rank_that_nobody_knows_is_listed() -> None:
    assert "the shape of X (X) cannot be inferred" in reason_of(one_node(None, None))


def test_names_are_unique() -> None:
    model = parser.parse_model(
        """<ir_version: 9, opset_import: ["": 20]>
        g (float[1,1,2,2,2] X, float[1,1,2,2,2] W) => (float[N,C,D,H,E] Y, float[N,C,D,H,E] Z, float[N,C,D,H,E] V) {
            Y = ConvTranspose(X, W)
            Z = ConvTranspose(Y, W)
            V = ConvTranspose(Z, W)
        }"""
    )
    model.graph.node[0].name = model.graph.node[1].name = "up"
    assert [f.name for f in find(model)] == ["up", "up_2", "V"]
    model.graph.node[2].name = "up"
    assert [f.name for f in find(model)] == ["up", "up_2", "up_3"]
    model.graph.node[2].name = "up_2"
    assert [f.name for f in find(model)] == ["up", "up_2", "up_2_2"]


def test_a_node_that_cannot_be_compiled_does_not_stop_the_others() -> None:
    model = parser.parse_model(
        """<ir_version: 9, opset_import: ["": 20]>
        g (float[1,1,d,2,2] X, float[1,1,2,2,2] W, float[1,1,2,2,2] K) => (float[N,C,D,H,E] Y, float[N,C,D,H,E] Z) {
            Y = ConvTranspose(X, W)
            Z = ConvTranspose(K, W)
        }"""
    )
    first, second = find(model)
    assert first.reason is not None
    assert "dynamic spatial sizes (D=d)" in first.reason
    assert "by --shape X=1x1x?x2x2, in Python" in first.reason
    assert second.spec == ConvTranspose3d.parse("in=1x1x2x2x2 co=1 k=2 bias=0")


def test_the_way_out_of_dynamic_sizes() -> None:
    """The argument that the reason names does what it says."""
    model = parser.parse_model(
        """<ir_version: 9, opset_import: ["": 20]>
        g (float[N,1,d,h,2] X) => (float[N,C,D,H,E] Z)
        <float[1,1,2,2,2] W = {1,2,3,4,5,6,7,8}>
        {
            Y = Relu(X)
            Z = ConvTranspose(Y, W)
        }"""
    )
    assert "give the model's inputs sizes, by --shape X=Nx1x?x?x2, in Python by shapes=" in reason_of(model)
    (found,) = find(model, shapes={"X": ("N", 1, 3, 4, 2)})
    assert found.spec == ConvTranspose3d.parse("in=Nx1x3x4x2 co=1 k=2 bias=0")


def test_sizes_that_a_model_does_not_take_are_the_reason() -> None:
    """5 rows are halved and doubled, and do not meet the 5 that were set aside."""
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,1,D,8,8] X) => (float[1,1,a,b,c] Y)
        <float[1,1,2,2,2] W = {1,1,1,1,1,1,1,1}, float[2,1,2,2,2] V = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}> {
            down = MaxPool <kernel_shape = [2,2,2], strides = [2,2,2]> (X)
            up = ConvTranspose <strides = [2,2,2]> (down, W)
            both = Concat <axis = 1> (X, up)
            Y = ConvTranspose <strides = [2,2,2]> (both, V)
        }"""
    )
    with pytest.raises(ModelError, match=r"does not take the shapes that were given: .*Concat.*; give sizes that it"):
        find(model, shapes={"X": (1, 1, 5, 8, 8)})
    assert all(found.spec is not None for found in find(model, shapes={"X": (1, 1, 6, 8, 8)}))


ABOVE = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[1,1,D,8,8] X) => (float[1,a,b,c,d] Y)
    <float[1,1,2,2,2] W = {1,1,1,1,1,1,1,1}> {
        down = MaxPool <kernel_shape = [2,2,2], strides = [2,2,2]> (X)
        up = ConvTranspose <strides = [2,2,2]> (down, W)
"""


def test_sizes_that_a_model_does_not_take_behind_its_layers_are_the_reason_too() -> None:
    model = parser.parse_model(f"{ABOVE} Y = Concat <axis = 1> (X, up) }}")
    with pytest.raises(ModelError, match=r"does not take the shapes that were given: .*Concat.*; give sizes that it"):
        find(model, shapes={"X": (1, 1, 5, 8, 8)})
    (found,) = find(model, shapes={"X": (1, 1, 6, 8, 8)})
    assert found.spec is not None


def test_a_branch_that_is_not_taken_need_not_fit() -> None:
    model = parser.parse_model(
        f"""{ABOVE}
            shape = Shape <start = 2, end = 3> (X)
            six = Constant <value = int64[1] {{6}}> ()
            is = Equal (shape, six)
            Y = If (is) <
                then_branch = then () => (float[1,2,e,8,8] y) {{ y = Concat <axis = 1> (X, up) }},
                else_branch = other () => (float[1,1,f,8,8] z) {{ z = Identity (up) }}
            >
        }}"""
    )
    (found,) = find(model, shapes={"X": (1, 1, 5, 8, 8)})
    assert found.spec is not None


def test_the_operator_that_hides_a_shape_is_named() -> None:
    nodes = [
        helper.make_node("QLinearLeakyRelu", ["X"], ["hidden"], domain="com.microsoft"),
        helper.make_node("Relu", ["hidden"], ["behind"]),
        helper.make_node("ConvTranspose", ["behind", "W"], ["Y"]),
    ]
    model = model_of(nodes, [value("X", (1, 2, 3, 3, 3))], [value("Y", None)], initializers=[tensor("W", WEIGHT)])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert "cannot be inferred, for nothing tells what com.microsoft.QLinearLeakyRelu writes" in reason_of(model)


def test_an_input_that_is_no_tensor_has_no_shape() -> None:
    model = one_node((1, 2, "D", "H", "W"), (2, 3, 2, 2, 2))
    model.graph.input.append(helper.make_tensor_sequence_value_info("several", TensorProto.FLOAT, None))
    with pytest.raises(ModelError, match="input several is no tensor"):
        find(model, shapes={"several": (1, 2, 3, 3, 3)})


def computing_its_shape(opset: int) -> onnx.ModelProto:
    """A model that folds X for a while, as exporters write a GroupNorm."""
    return parser.parse_model(
        f"""<ir_version: 7, opset_import: ["": {opset}]>
        g (float[1,2,2,2,2] X) => (float[N,C,D,H,E] Z)
        <float[2,1,1,1,1] W = {{1,2}}, int64[3] folded = {{0,2,-1}}>
        {{
            flat = Reshape(X, folded)
            shape = Shape(X)
            Y = Reshape(flat, shape)
            Z = ConvTranspose(Y, W)
        }}"""
    )


def test_shapes_that_a_model_computes() -> None:
    assert "from opset 14 on" in reason_of(computing_its_shape(13))
    assert spec_of(computing_its_shape(14)).x_shape == (1, 2, 2, 2, 2)


def test_both_branches_of_an_if() -> None:
    down = helper.make_graph(
        [helper.make_node("Relu", ["X"], ["r"]), helper.make_node("ConvTranspose", ["r", "V"], ["z"])],
        "then",
        [],
        [value("z", None)],
        initializer=[tensor("V", WEIGHT)],
    )
    up = helper.make_graph([helper.make_node("ConvTranspose", ["X", "W"], ["y"])], "else", [], [value("y", None)])
    model = model_of(
        [helper.make_node("If", ["c"], ["Y"], then_branch=down, else_branch=up)],
        [value("X", (1, 2, 3, 3, 3)), value("c", (), TensorProto.BOOL)],
        [value("Y", None)],
        initializers=[tensor("W", WEIGHT[:, :1])],
    )
    found = {f.name: f for f in find(model)}
    np.testing.assert_array_equal(found["z"].weight, WEIGHT)
    np.testing.assert_array_equal(found["y"].weight, WEIGHT[:, :1])
    assert {f.spec.channels_out for f in found.values() if f.spec} == {1, 3}


def test_the_body_of_a_loop() -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("ConvTranspose", ["state", "W"], ["next"])],
        "body",
        [value("i", (), TensorProto.INT64), value("go", (), TensorProto.BOOL), value("state", (1, 1, 3, 3, 3))],
        [value("on", (), TensorProto.BOOL), value("next", None)],
    )
    model = model_of(
        [helper.make_node("Loop", ["trips", "", "X"], ["Y"], body=body)],
        [value("X", (1, 1, 3, 3, 3))],
        [value("Y", None)],
        initializers=[tensor("W", WEIGHT[:1, :1]), tensor("trips", np.array(2))],
    )
    assert spec_of(model) == ConvTranspose3d.parse("in=1x1x3x3x3 co=1 k=2 bias=0")


_FUNCTION = """<ir_version: 9, opset_import: ["": 20, "local": 1]>
    g (float[1,1,3,3,3] X) => (float[N,C,D,H,E] Y) <float[1,1,2,2,2] W = {1,2,3,4,5,6,7,8}> {
        T = local.up <s: ints = [2, 2, 2]> (X, W)
        Y = local.up <s: ints = [1, 1, 1]> (T, W)
    }
    <domain: "local", opset_import: ["": OPSET]>
    up <s> (a, b) => (c) { c = ConvTranspose <strides: ints = @s> (a, b) }"""


def test_functions_are_read_where_they_are_called() -> None:
    first, second = find(parser.parse_model(_FUNCTION.replace("OPSET", "20")))
    assert first.spec == ConvTranspose3d.parse("in=1x1x3x3x3 co=1 k=2 s=2 bias=0")
    assert second.spec == ConvTranspose3d.parse("in=1x1x6x6x6 co=1 k=2 s=1 bias=0")
    np.testing.assert_array_equal(second.weight, np.arange(1, 9, dtype=np.float32).reshape(1, 1, 2, 2, 2))


def test_an_attribute_that_inlining_gave_the_wrong_type_is_a_reason() -> None:
    model = parser.parse_model(_FUNCTION.replace("OPSET", "20"))
    model.graph.node[1].attribute[0].CopyFrom(helper.make_attribute("s", tensor("", WEIGHT)))
    first, second = find(model)
    assert first.reason is None
    assert second.reason is not None
    assert "attribute strides is of type TENSOR, but must be INTS" in second.reason


def test_functions_of_another_opset_are_listed() -> None:
    assert "function local.up, whose opset" in reason_of(parser.parse_model(_FUNCTION.replace("OPSET", "18")))


# --- paddings in numbers ---


def padding_twice() -> onnx.ModelProto:
    """An If whose branches write one name, with paddings of their own, and a 2-D node that writes it in a third."""
    up = {"strides": [2, 2, 2]}
    sides = ("SAME_UPPER", "SAME_LOWER")
    nodes = [helper.make_node("ConvTranspose", ["X", "W"], ["y"], auto_pad=side, **up) for side in sides]
    flat = helper.make_node("ConvTranspose", ["F", "V"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])
    then, other, third = (helper.make_graph([n], "branch", [], [value("y", None)]) for n in (*nodes, flat))
    return model_of(
        [
            helper.make_node("If", ["c"], ["Y"], then_branch=then, else_branch=other),
            helper.make_node("If", ["c"], ["Z"], then_branch=third, else_branch=third),
        ],
        [value("X", (1, 2, 3, 3, 3)), value("F", (1, 1, 3, 3)), value("c", (), TensorProto.BOOL)],
        [value("Y", None), value("Z", None)],
        initializers=[tensor("W", integers((2, 1, 3, 3, 3), seed=1)), tensor("V", integers((1, 1, 3, 3), seed=2))],
    )


@pytest.mark.parametrize("flag", [True, False])
def test_paddings_in_numbers_are_each_nodes_own(flag: bool) -> None:
    model = padding_twice()
    before = model.SerializeToString()
    said = explicit(model)
    assert model.SerializeToString() == before
    feeds = {"X": integers((1, 2, 3, 3, 3)), "F": integers((1, 1, 3, 3)), "c": np.array(flag)}
    for ours, theirs in zip(run_onnxruntime(said, feeds), run_onnxruntime(model, feeds), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    branches = [attribute.g.node[0] for attribute in said.graph.node[0].attribute]
    assert all("auto_pad" not in {a.name for a in node.attribute} for node in branches)


def test_paddings_in_numbers_of_a_function_are_each_calls_own() -> None:
    model = parser.parse_model(
        _FUNCTION.replace("OPSET", "20").replace("strides:", 'auto_pad = "SAME_UPPER", strides:')
    )
    said = explicit(model)
    assert not said.functions
    assert [n.op_type for n in said.graph.node] == ["ConvTranspose", "ConvTranspose"]
    assert [helper.get_node_attr_value(n, "pads") for n in said.graph.node] == [[0] * 6, [0, 0, 0, 1, 1, 1]]
    feeds = {"X": integers((1, 1, 3, 3, 3))}
    np.testing.assert_array_equal(run_onnxruntime(said, feeds)[0], run_onnxruntime(model, feeds)[0])


# --- order ---


def out_of_order() -> onnx.ModelProto:
    """The last node first, one of whose inputs only a graph inside of a node reads."""
    inner = helper.make_graph([helper.make_node("Relu", ["b"], ["c"])], "then", [], [value("c", None)])
    nodes = [
        helper.make_node("ConvTranspose", ["X", "W"], ["Y"], name="up"),
        helper.make_node("If", ["flag"], ["X"], then_branch=inner, else_branch=inner),
        helper.make_node("Neg", ["x"], ["b"]),
    ]
    inputs = [value("x", (1, 2, 3, 3, 3)), value("flag", (), TensorProto.BOOL)]
    return model_of(nodes, inputs, [value("Y", None)], initializers=[tensor("W", WEIGHT)])


def test_nodes_in_any_order_as_onnxruntime_takes_them() -> None:
    model = out_of_order()
    x = integers((1, 2, 3, 3, 3))
    (y,) = run_onnxruntime(model, {"x": x, "flag": np.array(True)})
    assert spec_of(model).y_shape == y.shape
    assert [node.op_type for node in model.graph.node] == ["ConvTranspose", "If", "Neg"]


def test_what_a_file_notes_of_an_initializer_is_its_own_to_say() -> None:
    """ONNX Runtime's converter to float16 notes that type of weights that it leaves in float32."""
    model = layer(initializers=[tensor("W", WEIGHT), tensor("B", BIAS)])
    model.graph.value_info.append(value("W", WEIGHT.shape, TensorProto.FLOAT16))
    run_onnxruntime(model, {"X": integers((1, 2, 3, 3, 3))})
    assert spec_of(model).dtype == "float32"


def test_nodes_that_read_from_each_other() -> None:
    nodes = [helper.make_node("Relu", ["b"], ["a"]), helper.make_node("ConvTranspose", ["a", "W"], ["b"])]
    model = model_of(nodes, [], [value("b", None)], initializers=[tensor("W", WEIGHT)])
    with pytest.raises(ModelError, match="topologically sorted"):
        find(model)


# --- shapes ---


def test_a_dynamic_batch_has_many_spellings() -> None:
    for batch in ("N", "batch_size", None):
        assert spec_of(one_node((batch, 2, 3, 3, 3), (2, 1, 2, 2, 2))).batch is None
    assert spec_of(one_node((4, 2, 3, 3, 3), (2, 1, 2, 2, 2))).batch == 4


def test_shapes_are_found_through_computed_ones() -> None:
    model = parser.parse_model(
        """<ir_version: 9, opset_import: ["": 20]>
        g (float[2,54] X, float[2,1,2,2,2] W) => (float[N,C,D,H,E] Y) <int64[4] rest = {2, 3, 3, 3}, int64 zero = {0}> {
            shape = Shape(X)
            n = Gather(shape, zero)
            axis = Constant<value_ints: ints = [0]>()
            batch = Unsqueeze(n, axis)
            to = Concat<axis: int = 0>(batch, rest)
            V = Reshape(X, to)
            Y = ConvTranspose(V, W)
        }"""
    )
    assert spec_of(model) == ConvTranspose3d.parse("in=2x2x3x3x3 co=1 k=2 bias=0")


def test_channels_may_be_known_from_the_weight_alone() -> None:
    model = one_node(("N", "C", 3, 3, 3), (2, 1, 2, 2, 2), bias="M")
    assert spec_of(model) == ConvTranspose3d.parse("in=Nx2x3x3x3 co=1 k=2 bias=1")
    x, w, b = integers((1, 2, 3, 3, 3)), integers((2, 1, 2, 2, 2), seed=1), integers((1,), seed=2)
    (expected,) = run_onnxruntime(model, {"X": x, "W": w, "B": b})
    assert np.array_equal(reference(spec_of(model), x, w, b), expected)


# inference says 7, ONNX Runtime computes 6
_UP = {"auto_pad": "SAME_UPPER", "strides": [2] * 3, "output_padding": [1] * 3}
# inference says nothing of the spatial sizes where an output is smaller than its input
_CROP = {"output_shape": [2] * 3}


def chain(*layers: dict[str, Any], opset: int) -> onnx.ModelProto:
    """Layers of kernel 3 with one weight, a Relu between each two."""
    nodes = []
    for i, attributes in enumerate(layers):
        nodes.append(helper.make_node("ConvTranspose", [f"x{i}", "W"], [f"y{i}"], **attributes))
        nodes.append(helper.make_node("Relu", [f"y{i}"], [f"x{i + 1}"]))
    inputs = [value("x0", (1, 1, 3, 3, 3)), value("W", (1, 1, 3, 3, 3))]
    return model_of(nodes, inputs, [value(f"x{len(layers)}", None)], opset=opset)


@pytest.mark.parametrize("opset", [6, 11, 22])
def test_shapes_behind_a_disputed_layer_are_those_onnxruntime_computes(opset: int) -> None:
    model = chain(_UP, _UP, {"strides": [2] * 3}, opset=opset)
    # as an exporter would have stored it, wrong shapes included
    specs = [f.spec for f in find(onnx.shape_inference.infer_shapes(model))]
    x, w = integers((1, 1, 3, 3, 3)), integers((1, 1, 3, 3, 3), seed=1)
    y: Any = x
    for spec in specs:
        assert spec is not None
        y = np.maximum(reference(spec, y, w), 0)
    assert y.shape == (1, 1, 25, 25, 25)
    np.testing.assert_array_equal(run_onnxruntime(model, {"x0": x, "W": w})[0], y)


def test_a_dispute_is_settled_before_what_follows_from_it() -> None:
    # output_shape crops 6 to 2; from the 7 that inference finds first, it would have cropped one more
    specs = [f.spec for f in find(chain(_UP, _CROP, _UP, opset=22))]
    assert [s.axes[0].size if s else None for s in specs] == [3, 6, 2]
    assert [s.axes[0].pad if s else None for s in specs] == [(1, 1), (3, 3), (1, 1)]


# --- disputes: case by case as ONNX Runtime 1.31 computes it, with the size and the low-side crop ---

_DISPUTES: dict[str, tuple[dict[str, Any], int, int]] = {
    "A-same-upper": ({"k": 3, "s": 2, "auto_pad": "SAME_UPPER"}, 6, 0),
    "A-same-upper-opset-1": ({"k": 3, "s": 2, "auto_pad": "SAME_UPPER", "opset": 1}, 6, 0),
    "B-same-lower": ({"k": 3, "s": 2, "auto_pad": "SAME_LOWER"}, 6, 1),
    "C-same-upper-output-padding": ({"k": 3, "s": 2, "auto_pad": "SAME_UPPER", "op": 1}, 6, 1),
    "D-same-upper-k1-s2": ({"k": 1, "s": 2, "auto_pad": "SAME_UPPER"}, 5, 0),
    "D2-same-upper-k2-s3": ({"k": 2, "s": 3, "auto_pad": "SAME_UPPER"}, 8, 0),
    "E-output-shape": ({"k": 3, "s": 2, "output_shape": 6}, 6, 1),
    "E2-output-shape-even": ({"k": 3, "s": 3, "output_shape": 7}, 7, 1),
    "F-output-shape-same-upper": ({"k": 3, "s": 2, "output_shape": 6, "auto_pad": "SAME_UPPER"}, 6, 0),
    "G-output-shape-beyond-full": ({"k": 3, "s": 2, "output_shape": 8}, 8, 0),
    "H-output-shape-output-padding": ({"k": 3, "s": 3, "output_shape": 9, "op": 2}, 9, 1),
    "I-output-shape-and-pads": ({"k": 3, "s": 2, "output_shape": 6, "pads": [0, 0, 0, 1, 1, 1]}, 6, 1),
    "I2-output-shape-below-the-input": ({"k": 3, "s": 1, "output_shape": 2}, 2, 2),
    "L-group-2": ({"k": 3, "s": 2, "group": 2, "c": 4, "m": 2, "bias": True}, 7, 0),
    "M-group-2-of-6": ({"k": 3, "s": 2, "group": 2, "c": 4, "m": 3}, 7, 0),
    "N-depthwise-bias": ({"k": 3, "s": 2, "group": 4, "c": 4, "m": 1, "bias": True}, 7, 0),
    "R-pads-beyond-the-kernel": ({"k": 3, "s": 2, "pads": [4, 4, 4, 0, 0, 0]}, 3, 4),
}


def disputed(
    *, k: int, s: int, op: int = 0, output_shape: int = 0, c: int = 1, m: int = 1, bias: bool = False, **more: Any
) -> onnx.ModelProto:
    attributes = {"strides": [s] * 3} | more
    if op:
        attributes["output_padding"] = [op] * 3
    if output_shape:
        attributes["output_shape"] = [output_shape] * 3
    groups = more.get("group", 1)
    return one_node((1, c, 3, 3, 3), (c, m, k, k, k), bias=m * groups if bias else None, **attributes)


@pytest.mark.parametrize("name", _DISPUTES)
def test_dispute(name: str) -> None:
    words, out, begin = _DISPUTES[name]
    model = disputed(**words)
    spec = spec_of(model)
    assert [(a.out, a.begin) for a in spec.axes] == [(out, begin)] * 3
    x, w, b = arrays(spec, integers=3)
    feeds = {"X": x, "W": w} | ({} if b is None else {"B": b})
    np.testing.assert_array_equal(reference(spec, x, w, b), run_onnxruntime(model, feeds)[0])


@pytest.mark.parametrize(
    ("name", "words", "reason"),
    [
        ("G2", {"k": 3, "s": 2, "output_shape": 9}, "axis D: output_shape is 9, but .* = 7, .* less than stride 2"),
        ("I3", {"k": 3, "s": 2, "output_shape": None}, "output_shape has 5 values, but a 5-D ConvTranspose takes 3"),
    ],
)
def test_dispute_that_onnxruntime_refuses(name: str, words: dict[str, Any], reason: str) -> None:
    if words["output_shape"] is None:
        model = one_node((1, 1, 3, 3, 3), (1, 1, 3, 3, 3), strides=[2] * 3, output_shape=[1, 1, 7, 7, 7])
    else:
        model = disputed(**words)
    with pytest.raises(REFUSALS):
        run_onnxruntime(model, {"X": integers((1, 1, 3, 3, 3)), "W": integers((1, 1, 3, 3, 3))})
    assert re.search(reason, reason_of(model))


def test_dispute_p_output_padding_from_stride_on_is_compiled_though_onnxruntime_refuses() -> None:
    model = disputed(k=3, s=1, op=1, dilations=[2] * 3)
    x, w = integers((1, 1, 3, 3, 3)), integers((1, 1, 3, 3, 3), seed=1)
    with pytest.raises(REFUSALS, match="output_padding"):
        run_onnxruntime(model, {"X": x, "W": w})
    spec = spec_of(model)
    assert spec == ConvTranspose3d.parse("in=1x1x3x3x3 co=1 k=3 d=2 op=1 bias=0")
    np.testing.assert_array_equal(run_onnxruntime(graph(spec), {"X": x, "W": w})[0], reference(spec, x, w))


def test_dispute_spatial_zero_is_refused() -> None:
    assert "axis D: size is 0" in reason_of(one_node((1, 1, 0, 3, 3), (1, 1, 3, 3, 3)))


@pytest.mark.parametrize("dtype", [TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_dtypes_that_onnxruntime_refuses_are_compiled(dtype: int) -> None:
    model = one_node((1, 1, 3, 3, 3), (1, 1, 3, 3, 3), dtype=dtype)
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    with pytest.raises(REFUSALS):
        run_onnxruntime(model, {"X": np.ones((1, 1, 3, 3, 3), numpy_type), "W": np.ones((1, 1, 3, 3, 3), numpy_type)})
    assert spec_of(model).dtype == numpy_type.name


def test_an_empty_auto_pad_says_nothing() -> None:
    words = {"auto_pad": "", "pads": [1] * 6}
    assert spec_of(one_node((1, 1, 3, 3, 3), (1, 1, 3, 3, 3), **words)).axes[0].pad == (1, 1)


# --- reasons: attribute, rule, way out ---


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"strides": [2, 2]}, "strides has 2 values, but a 5-D ConvTranspose takes 3"),
        ({"strides": [0, 1, 1]}, "axis D: stride is 0, but must be at least 1"),
        ({"dilations": [1, 1, -1]}, "axis W: dilation is -1"),
        ({"pads": [0, 0, 0]}, "pads has 3 values, but a 5-D ConvTranspose takes 6"),
        ({"pads": [0, -1, 0, 0, 0, 0]}, "pads are [0, -1, 0, 0, 0, 0], but none may be negative"),
        ({"pads": [0, -1, 0, 0, 0, 0], "output_shape": [4, 4, 4]}, "even where output_shape overrides them"),
        ({"pads": [9, 0, 0, 0, 0, 0]}, "axis D: the output size is -5"),
        ({"output_padding": [0, -1, 0]}, "axis H: output_pad is -1"),
        ({"output_shape": [4, 0, 4]}, "axis H: output_shape is 0, but must be at least 1"),
        ({"output_shape": [4, -4, 4]}, "axis H: output_shape is -4"),
        ({"kernel_shape": [2, 2, 3]}, "kernel_shape is [2, 2, 3], but W has [2, 2, 2]"),
        ({"group": 0}, "group is 0"),
        ({"group": 3}, "groups g=3 does not divide"),
        ({"auto_pad": "SAME"}, "auto_pad is 'SAME', but must be one of NOTSET, VALID"),
        ({"auto_pad": "VALID", "pads": [0] * 6}, "pads are given beside auto_pad=VALID"),
        ({"auto_pad": "SAME_LOWER", "pads": [0] * 6}, "pads are given beside auto_pad=SAME_LOWER"),
        ({"strides": [2**62, 1, 1]}, "larger than"),
    ],
)
@pytest.mark.parametrize("opset", [1, 11, 22])
def test_what_no_layer_can_be_is_a_reason(attributes: dict[str, Any], words: str, opset: int) -> None:
    model = one_node((1, 2, 3, 3, 3), (2, 1, 2, 2, 2), opset=opset, **attributes)
    assert words in reason_of(model)
    with pytest.raises(REFUSALS):
        run_onnxruntime(model, {"X": integers((1, 2, 3, 3, 3)), "W": integers((2, 1, 2, 2, 2))})


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (one_node((1, 3, 3, 3, 3), (2, 1, 2, 2, 2)), "X has 3 channels, but W (2, 1, 2, 2, 2) takes 2"),
        (one_node((1, 2, 3, 3), (2, 1, 2, 2, 2)), "X (X) has 4 axes, but W has 5"),
        (one_node((1, 2, 3, 3, 3), (2, 1, 2, 2)), "W (W) has 4 axes, but X has 5"),
        (one_node(None, (2, 1, 2, 2, 2)), "the shape of X (X) cannot be inferred"),
        (one_node((1, 2, 3, 3, 3), None), "W (W) has the shape unknown"),
        (one_node((1, 2, 3, 3, 3), (2, 1, "k", 2, 2)), "it must be known"),
        (one_node((1, 2, 3, "h", None), (2, 1, 2, 2, 2)), "dynamic spatial sizes (H=h, W=?)"),
        (one_node((1, 2, 3, 3, 3), (2, 1, 2, 2, 2), bias=2), "B has shape (2,)"),
        (one_node((1, 2, 3, 3, 3), (2, 1, 0, 2, 2)), "axis D: kernel is 0"),
        (one_node((0, 2, 3, 3, 3), (2, 1, 2, 2, 2)), "batch is 0"),
        (one_node((1, 0, 3, 3, 3), (0, 1, 2, 2, 2)), "channels in (C) is 0"),
        (one_node((1, 2, 3, 3, 3), (2, 1, 2, 2, 2), dtype=TensorProto.INT64), "dtype 'int64' is not supported"),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_a_reason(model: onnx.ModelProto, words: str) -> None:
    assert words in reason_of(model)


def test_different_dtypes_are_a_reason() -> None:
    model = one_node((1, 2, 3, 3, 3), (2, 1, 2, 2, 2))
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.FLOAT16
    assert "the dtypes float16, float32, but must have one" in reason_of(model)


# --- what is no model ---


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read .*none.onnx: No such file"):
        find(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="Is a directory"):
        find(tmp_path)
    with pytest.raises(CallError, match="zero byte"):
        find("a\0b.onnx")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a model", b"\x08\x09", b"\x00" * 64, b"<html></html>"])
def test_bytes_that_are_no_model(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"bad.onnx cannot be read as an ONNX model"):
        find(path)
    with pytest.raises(ModelError, match="these bytes cannot be read"):
        find(data)


@pytest.mark.parametrize("name", ["m.pt2", "m.keras", "m.h5", "m.weights.h5", "m.pt", "m.npz"])
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a model"])
def test_a_file_of_another_system_names_its_reader(name: str, data: bytes, tmp_path: Path) -> None:
    readers = {"m.pt2": "importers.torch.find", "m.keras": "importers.keras.find", "m.h5": "as .keras"}
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError, match=rf"{name} is no ONNX model.*{readers.get(name, 'files.layer_arrays')}"):
        find(tmp_path / name)


def test_a_truncated_model() -> None:
    with pytest.raises(ModelError, match="cannot be read as an ONNX model"):
        find((MODELS / "unet.onnx").read_bytes()[:-1000])


def test_a_model_that_onnx_does_not_accept() -> None:
    model = one_node((1, 2, 3, 3, 3), (2, 1, 2, 2, 2))
    model.graph.node[0].input[0] = "nowhere"
    with pytest.raises(ModelError, match=r"not valid ONNX: .*nowhere"):
        find(model)


def test_a_function_that_calls_itself() -> None:
    text = _FUNCTION.replace("OPSET", "20").replace(
        "c = ConvTranspose <strides: ints = @s>", "c = local.up <s: ints = @s>"
    )
    text = text.replace(
        '<domain: "local", opset_import: ["": 20]>', '<domain: "local", opset_import: ["": 20, "local": 1]>'
    )
    with pytest.raises(ModelError, match="not valid ONNX"):
        find(parser.parse_model(text))


def test_another_flaw_of_a_model_is_not_taken_for_the_shapes_that_were_given() -> None:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,1,D,8,8] X, float[1,1,E,8,8] Z, float[3,4] A, float[5,6] B)
        => (float[1,1,a,b,c] Y, float V, float[m,n] C)
        <float[1,1,2,2,2] W = {1,1,1,1,1,1,1,1}> {
            Y = ConvTranspose <strides = [2,2,2]> (X, W)
            V = ConvTranspose <strides = [2,2,2]> (Z, W)
            C = MatMul(A, B)
        }"""
    )
    given, open_still = find(model, shapes={"X": (1, 1, 6, 8, 8)})
    assert given.spec is not None
    assert open_still.spec is None
