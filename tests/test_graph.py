"""The ONNX twin of a layer: ONNX Runtime runs it, and it means the same as the oracle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx_engine import run_onnxruntime
from strategies import arrays, specs

from opcompile.cases import Case, case, tagged
from opcompile.errors import CallError, ModelError, SpecError
from opcompile.graph import DEFAULT_OPSET, export_onnx, graph
from opcompile.spec import ACTIVATIONS, ConvTranspose3d
from opcompile.verify import compare

CORNERS = [pytest.param(c, id=c.name) for c in tagged("corner")]
K3S2 = ConvTranspose3d.parse("in=1x4x3x4x5 co=6 k=3 s=2 p=1 op=1")


def ask(model: onnx.ModelProto, *xwb: Any) -> Any:
    feeds = {name: array for name, array in zip("XWB", xwb, strict=True) if array is not None}
    return run_onnxruntime(model, feeds)[0]


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


# --- meaning ---


@pytest.mark.parametrize("corner", CORNERS)
def test_onnxruntime_computes_the_oracle_to_the_last_bit(corner: Case) -> None:
    x, w, b = arrays(corner.spec, integers=3)
    y = ask(graph(corner.spec), x, w, b)
    compare(corner.spec, y, x, w, b, computed_in="float32", exact=True).require()


@pytest.mark.parametrize("corner", CORNERS)
def test_onnxruntime_computes_the_oracle_within_the_bound(corner: Case) -> None:
    x, w, b = arrays(corner.spec)
    y = ask(graph(corner.spec), x, w, b)
    compare(corner.spec, y, x, w, b, computed_in="float32").require()


@pytest.mark.parametrize("opset", [11, 13, 14, 18, 20, 22, 24, 26])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_at_every_form_it_has_had(activation: str, opset: int) -> None:
    spec = ConvTranspose3d.parse(f"in=1x2x2x2x3 co=2 k=3 s=2 p=1 act={activation}")
    x, w, b = arrays(spec, seed=opset)
    y = ask(graph(spec, opset=opset), x, w, b)
    compare(spec, y, x, w, b, computed_in="float32").require()


@given(specs())
@settings(max_examples=60)
def test_any_layer_has_a_graph_that_onnxruntime_runs(spec: ConvTranspose3d) -> None:
    x, w, b = arrays(spec, integers=3)
    model = graph(spec)
    onnx.checker.check_model(model, full_check=True)
    compare(spec, ask(model, x, w, b), x, w, b, computed_in="float32").require()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_dynamic_batch_takes_any(batch: int) -> None:
    spec = K3S2.with_batch(None)
    x, w, b = arrays(spec, batch=batch, integers=3)
    compare(spec, ask(graph(spec), x, w, b), x, w, b, exact=True).require()


def test_outputs_that_lie_wholly_beyond_the_uncropped_ones_are_the_bias() -> None:
    spec = ConvTranspose3d.parse("in=1x1x1x1x1 co=2 k=1 p=3:0 op=4")
    x, w, b = arrays(spec, integers=3)
    y = ask(graph(spec), x, w, b)
    assert b is not None
    assert (y == b[:, None, None, None]).all()


# --- form ---


@pytest.mark.parametrize("corner", CORNERS)
def test_the_checker_accepts_it_and_inference_finds_the_shape(corner: Case) -> None:
    model = graph(corner.spec)
    onnx.checker.check_model(model, full_check=True)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0].type.tensor_type
    shape = tuple(None if d.dim_param == "N" else d.dim_value for d in inferred.shape.dim)
    assert shape == corner.spec.y_shape
    assert onnx.helper.tensor_dtype_to_np_dtype(inferred.elem_type).name == corner.spec.dtype


def test_what_onnxruntime_accepts_stays_one_plain_node() -> None:
    plain = [c.spec for c in tagged("corner") if str(c.spec).endswith("act=none dtype=float32 layout=NCDHW")]
    kept = [s for s in plain if all(a.output_pad < a.stride for a in s.axes)]
    assert len(kept) > 30
    assert all(operators(graph(spec)) == ["ConvTranspose"] for spec in kept)
    assert operators(graph(case("act-relu").spec)) == ["ConvTranspose", "Relu"]
    assert operators(graph(case("act-mish").spec)) == ["ConvTranspose", "Mish"]


@pytest.mark.parametrize(
    ("text", "operators_expected", "pads", "output_padding"),
    [
        ("p=0:2x0x0 op=1x0x0", ["ConvTranspose"], [0, 0, 0, 1, 0, 0], [0, 0, 0]),  # less end pad
        ("s=2 p=0:2x0x0 op=3x0x0", ["ConvTranspose"], [0, 0, 0, 0, 0, 0], [1, 0, 0]),  # the rest below a stride
        ("s=2 p=0:1x0x0 op=4x0x0", ["Pad", "ConvTranspose"], [0, 0, 0, 1, 0, 0], [0, 0, 0]),  # 2 zeros, 3 of 4 kept
        ("s=2 p=1:2x0x0 op=1x0x0", ["ConvTranspose"], [1, 0, 0, 2, 0, 0], [1, 0, 0]),  # accepted: left alone
    ],
)
def test_large_output_pads_are_written_otherwise(
    text: str, operators_expected: list[str], pads: list[int], output_padding: list[int]
) -> None:
    model = graph(ConvTranspose3d.parse(f"in=1x2x4x4x4 co=2 k=3 {text}"))
    attributes = {a.name: list(a.ints) for a in model.graph.node[-1].attribute}
    assert operators(model) == operators_expected
    assert (attributes["pads"], attributes["output_padding"]) == (pads, output_padding)


def test_other_types_and_layouts_are_cast_and_transposed() -> None:
    assert operators(graph(case("float64").spec)) == ["Cast", "Cast", "Cast", "ConvTranspose", "Cast"]
    assert operators(graph(case("channels-last").spec)) == ["Transpose", "ConvTranspose", "Transpose"]
    assert operators(graph(case("output-pad-in-dilation").spec)) == ["Pad", "ConvTranspose"]


def test_default_opset_is_readable_by_old_runtimes() -> None:
    model = graph(K3S2)
    assert model.opset_import[0].version == DEFAULT_OPSET == 20
    assert model.ir_version == 9


def test_given_weights_become_initializers() -> None:
    x, w, b = arrays(K3S2, integers=3)
    model = graph(K3S2, weight=w, bias=b)
    assert [v.name for v in model.graph.input] == ["X"]
    compare(K3S2, run_onnxruntime(model, {"X": x})[0], x, w, b, exact=True).require()
    partly = graph(K3S2, weight=np.asfortranarray(w))
    assert [v.name for v in partly.graph.input] == ["X", "B"]
    compare(K3S2, run_onnxruntime(partly, {"X": x, "B": b})[0], x, w, b, exact=True).require()  # type: ignore[dict-item]


# --- refusals ---


@pytest.mark.parametrize("opset", [0, 10, 27, 99, True, "20", 20.0])
def test_an_opset_that_cannot_be_written_is_refused(opset: Any) -> None:
    with pytest.raises(SpecError, match=r"opset .* choose one of 11 to 26, or leave it at 20"):
        graph(K3S2, opset=opset)


def test_bfloat16_needs_opset_13() -> None:
    with pytest.raises(SpecError, match=r"opset 12 cannot be written for dtype bfloat16: choose one of 13 to"):
        graph(case("bfloat16").spec, opset=12)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": np.zeros((6, 4, 3, 3, 3), np.float32)}, r"W is float32 \(6, 4, 3, 3, 3\).*\(4, 6, 3, 3, 3\)"),
        ({"weight": np.zeros((4, 6, 3, 3, 3))}, "W is float64"),
        ({"bias": np.zeros(5, np.float32)}, r"B is float32 \(5,\)"),
        ({"bias": np.zeros(6, np.dtype(np.float32).newbyteorder())}, r"B is byte-swapped float32 \(6,\)"),
        ({"bias": [0.0] * 6}, "B is a list"),
    ],
)
def test_weights_that_do_not_fit_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(CallError, match=words):
        graph(K3S2, **given)


def test_a_bias_for_a_layer_without_is_refused() -> None:
    with pytest.raises(CallError, match="bias=0"):
        graph(case("no-bias").spec, bias=np.zeros(6, np.float32))


def test_weights_beyond_two_gib_are_refused() -> None:
    spec = ConvTranspose3d.parse("in=1x8192x1x1x1 co=8192 k=2x2x2")
    without_memory = np.broadcast_to(np.float32(0), spec.w_shape)
    with pytest.raises(ModelError, match=r"2147483648 bytes, more than the 2 GiB.*leave them as inputs"):
        graph(spec, weight=without_memory)


# --- files ---


def test_export_writes_the_graph(tmp_path: Path) -> None:
    path = export_onnx(K3S2, str(tmp_path / "layer.onnx"), opset=18)
    assert path == tmp_path / "layer.onnx"
    assert onnx.load(path) == graph(K3S2, opset=18)
    assert os.listdir(tmp_path) == ["layer.onnx"]


def test_export_follows_a_link_and_replaces_no_device(tmp_path: Path) -> None:
    link, pipe = tmp_path / "link.onnx", tmp_path / "pipe"
    link.symlink_to("layer.onnx")
    export_onnx(K3S2, link)
    assert link.is_symlink()
    assert onnx.load(tmp_path / "layer.onnx") == graph(K3S2)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    export_onnx(K3S2, pipe)
    assert pipe.is_fifo()
    assert onnx.load_model_from_string(os.read(reader, 1 << 16)) == graph(K3S2)
    os.close(reader)
    link.unlink()
    link.symlink_to(tmp_path)
    with pytest.raises(ModelError, match="Is a directory"):
        export_onnx(K3S2, link)
    assert link.is_symlink()


def test_export_into_nowhere_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot write .*layer.onnx: No such file.*folder that exists"):
        export_onnx(K3S2, tmp_path / "missing" / "layer.onnx")


def test_a_failed_export_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export_onnx(K3S2, tmp_path / "layer.onnx")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ModelError, match="No space left"):
        export_onnx(case("k4-s2").spec, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["layer.onnx"]
