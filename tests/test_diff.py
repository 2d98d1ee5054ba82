"""One layer in every system's words: what the table says is what the calls compute."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from strategies import arrays, specs

from opcompile import diff as module
from opcompile.cli import cli
from opcompile.diff import CROPPED, EXACT, OTHER, REFUSED, SHIFTED, diff
from opcompile.importers.imported import cropped
from opcompile.reference import reference
from opcompile.say import SYSTEMS
from opcompile.spec import Activation, ConvTranspose3d

QUESTION = ConvTranspose3d.parse("in=1x64x12x16x32 co=64 k=3 s=2 p=1 op=1")


def rows(spec: ConvTranspose3d, system: str) -> list[module.Row]:
    return [row for row in diff(spec, measure=False).rows if row.system == system]


def test_pytorch_and_keras_same_are_one_voxel_apart() -> None:
    (torch,) = rows(QUESTION, "PyTorch")
    same, then_cropped = rows(QUESTION, "Keras")
    assert torch.verdict == EXACT
    assert same.call == "keras.layers.Conv3DTranspose(64, 3, strides=2, padding='same')(x)"
    assert same.out == torch.out == (24, 32, 64)
    assert (same.verdict, same.shift) == (SHIFTED, (-1, -1, -1))
    assert "one voxel" in same.why
    assert then_cropped.verdict == CROPPED
    assert then_cropped.call is not None
    assert "Cropping3D(((1, 0), (1, 0), (1, 0)))" in then_cropped.call
    _, sliced = rows(QUESTION, "TensorFlow")
    assert sliced.call == "tf.nn.conv3d_transpose(x, w, (1, 25, 33, 65, 64), 2, 'VALID')[:, 1:, 1:, 1:, :] + b"


def test_the_opsets_of_onnx_stand_apart_where_they_differ() -> None:
    by_name = {row.system: row.verdict for row in diff(QUESTION, measure=False).rows}
    assert by_name["ONNX 1 SAME_UPPER"] == EXACT
    assert by_name["ONNX 11+, ONNX Runtime SAME_UPPER"] == SHIFTED
    narrow = diff(ConvTranspose3d.parse("in=1x2x3x3x3 co=2 k=1 s=2 op=1"), measure=False)
    by_name = {row.system: row.verdict for row in narrow.rows}
    assert by_name["ONNX 1, ONNX 11+ SAME_UPPER"] == EXACT
    assert by_name["ONNX Runtime SAME_UPPER"] == OTHER
    even = {row.system for row in diff(ConvTranspose3d.parse("in=1x2x3x3x3 co=2 k=4 s=2 p=1"), measure=False).rows}
    assert "ONNX 1, ONNX 11+, ONNX Runtime SAME_UPPER" in even


def test_a_layer_that_some_cannot_say() -> None:
    spec = ConvTranspose3d.parse("in=1x4x3x3x3 co=4 k=3 s=2 op=2 g=2")
    refused = {row.system: row.why for row in diff(spec, measure=False).rows if row.verdict == REFUSED}
    assert set(refused) == {row.name for row in SYSTEMS} | {"ONNX Runtime"}
    assert "groups" in refused["Keras"]
    assert "stride" in refused["ONNX Runtime"]


@settings(max_examples=60)
@given(specs(dtypes=("float64",), largest=3))
def test_what_a_row_says_is_what_the_importer_computes(spec: ConvTranspose3d) -> None:
    spec = replace(spec, activation=Activation(), batch=1, layout="NCDHW", bias=False)
    x, w, _ = arrays(spec, integers=4)
    expected = reference(spec, x, w)
    for system in SYSTEMS:
        for way in module._ways(system, spec):
            if way.layer is None:
                assert way.reason
                continue
            layer = way.layer.with_weights(way.layer.order.own(w, spec.groups))
            assert layer.weight is not None
            own = np.moveaxis(x, 1, -1) if layer.x_layout == "NDHWC" else x
            y = reference(replace(layer.spec, dtype="float64"), own, layer.weight)
            y = module._sliced(np.moveaxis(y, -1, 1) if layer.y_layout == "NDHWC" else y, way.crop)
            row = module._row(way, spec)
            assert row.verdict == EXACT or system.name != "JAX", "JAX says any layer without groups"
            assert (row.verdict in (EXACT, CROPPED)) == (y.shape == expected.shape and row.begin == begins(spec))
            if row.verdict in (EXACT, CROPPED):
                np.testing.assert_array_equal(y, expected, err_msg=f"{system.name}: {row.call}")
            else:
                axes, zeros = cropped(*module._geometry(spec), *way.place)
                wide = np.pad(w, [(0, 0), (0, 0), *((n, 0) for n in zeros)])
                np.testing.assert_array_equal(y, reference(replace(spec, axes=axes), x, wide))


def begins(spec: ConvTranspose3d) -> tuple[int, ...]:
    return tuple(a.begin for a in spec.axes)


def test_the_command_prints_a_table_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = CliRunner().invoke(cli, ["diff", str(QUESTION), "--no-measure"], catch_exceptions=False).stdout
    assert "shifted by one voxel" in text
    assert "measured" not in text
    assert "F.conv_transpose3d(x, w, b, stride=2, padding=1, output_padding=1)" in text
    done = CliRunner().invoke(cli, ["diff", str(QUESTION), "--no-measure", "--json"], catch_exceptions=False)
    content = json.loads(done.stdout)
    assert content["begin"] == [1, 1, 1]
    assert {row["system"] for row in content["systems"]} >= {system.name for system in SYSTEMS}


def test_what_the_calls_leave_out_is_left_aside_aloud() -> None:
    text = "in=Nx4x3x3x3 co=4 k=3 g=2 act=relu dtype=float16"
    said = (
        "the activation relu, the dtype float16 (differences are float32's), "
        "the dynamic batch (where a call says N, it is 1)"
    )
    shown = CliRunner().invoke(cli, ["diff", text, "--no-measure"], catch_exceptions=False).stdout
    assert f"Left aside, for the table is about the sum: {said}.\n" in shown
    done = CliRunner().invoke(cli, ["diff", text, "--no-measure", "--json"], catch_exceptions=False)
    assert ", ".join(json.loads(done.stdout)["left_aside"]) == said
    assert diff(QUESTION, measure=False).left_aside == ()


def test_openvino_takes_groups_in_front_of_w() -> None:
    (row,) = rows(ConvTranspose3d.parse("in=1x4x3x3x3 co=4 k=3 g=2"), "OpenVINO")
    assert row.weight == "w.reshape(2, -1, *w.shape[1:])"
    assert {row.weight for row in rows(QUESTION, "OpenVINO")} == {"w"}


def test_onnx_runtime_is_asked_for_the_very_node() -> None:
    found = {row.system: row for row in diff(QUESTION).rows}
    exact, shifted = found["ONNX Runtime"], found["ONNX 11+, ONNX Runtime SAME_UPPER"]
    assert exact.version
    assert exact.difference is not None
    assert exact.difference < 1e-5 < 1 < (shifted.difference or 0)
    assert shifted.own_difference is not None
    assert shifted.own_difference < 1e-5
    assert "definition" in found["ONNX 1 SAME_UPPER"].not_measured


def test_a_geometry_that_is_large_even_on_a_small_layer_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opcompile.ask.ask", lambda *_: pytest.fail("a system was asked"))
    large = ["in=1x4x3x3x3 co=4 k=2 s=200", "in=1x4x3x3x3 co=4 k=2 s=200 p=200", "in=1x4x3x3x3 co=4 k=2 op=0x2000x2000"]
    for text in large:
        said = {row.not_measured for row in diff(ConvTranspose3d.parse(text)).rows if row.call}
        (why,) = said - {""}
        assert re.search("would take .*, and at most 16 MiB are measured", why)


def test_the_small_layer_is_found_at_once_where_most_is_cropped() -> None:
    spec = ConvTranspose3d.parse("in=1x4x3x3x2000000000 co=4 k=2 p=0x0x999999990")
    assert module._small(spec).axes[2].size == 2 * 999999990


def test_the_small_layer_has_an_output_where_the_stride_does_not_divide_what_is_cropped() -> None:
    """With four elements two outputs are left, with three none."""
    spec = ConvTranspose3d.parse("in=1x4x3x3x9 co=4 k=2 s=2 p=0x0x3")
    assert (module._small(spec).axes[2].size, module._small(spec).axes[2].out) == (4, 2)


@pytest.mark.parametrize("distribution", ["tensorflow", "tensorflow-cpu"])
def test_a_system_is_found_by_whichever_distribution_brings_it(
    distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name != distribution:
            raise PackageNotFoundError(name)
        return "2.21.0"

    monkeypatch.setattr("opcompile.ask.version", version)
    monkeypatch.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    (row, *_) = [row for row in diff(QUESTION).rows if row.system == "TensorFlow"]
    assert "TensorFlow 2.21.0 fails" in row.not_measured


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "text",
    [
        str(QUESTION),
        "in=1x2x4x4x4 co=3 k=4 s=2 p=1",
        "in=1x4x4x5x3 co=6 k=3x2x1 s=2x3x1 p=1:0x0:1x0:0 op=0x2x0 g=2",
        "in=1x2x4x5x3 co=2 k=2 s=3 op=2 bias=0",
        "in=1x2x4x5x3 co=2 k=3 d=2 p=2 layout=NDHWC",
    ],
)
def test_every_installed_system_computes_what_its_row_says(text: str) -> None:
    from opcompile.bounds import bounds

    found = diff(ConvTranspose3d.parse(text))
    x, w, b = module._inputs(found.measured_on)
    bound = bounds(replace(found.measured_on, layout="NCDHW"), x, w, b).max()
    measured = [row for row in found.rows if row.own_difference is not None]
    assert {"PyTorch", "ONNX Runtime", "OpenVINO"} & {row.system for row in measured}
    for row in measured:
        assert (row.own_difference or 0) <= bound, row
        assert row.difference is None or (row.difference <= bound) == (row.verdict in (EXACT, CROPPED)), row
