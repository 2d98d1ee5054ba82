"""A model with replaced nodes is the same model: equal to stock ONNX Runtime, in both modes, whatever it holds."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

import opcompile
from opcompile.cli import cli
from opcompile.errors import ArtifactError, CallError, EngineError, ModelError
from opcompile.record import key, path_of
from opcompile.replace import calls, job, layers, library
from opcompile.replace.job import Job
from opcompile.replace.place import require_replaceable
from opcompile.replace.report import Report
from opcompile.replace.sessions import Session
from opcompile.target import target
from opcompile.verify import OWN_WEIGHTS
from tests.onnx_engine import integers, model_of, value
from tests.replaced import operators, run, saved, upsampling

pytestmark = pytest.mark.usefixtures("as_scheduled")

OURS = "ConvTranspose3d"
OPEN = "ConvTranspose3dOpen"
X = integers((1, 4, 3, 4, 5))


def replaced(model: Path | onnx.ModelProto, folder: Path, **how: Any) -> tuple[Report, Path]:
    """Replace without measuring; return the report and the directory."""
    path = model if isinstance(model, Path) else saved(model, folder)
    how = {"plan": "baseline", "measure": False, "verify": False, **how}
    return opcompile.replace(path, folder / "out", **how), folder / "out"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own folder of records, empty."""
    monkeypatch.setenv("OPCOMPILE_RECORDS", str(tmp_path / "own"))
    return tmp_path / "own"


def agree(folder: Path, x: np.ndarray = X, *, original: Path | None = None, model: str = "model.onnx") -> None:
    """On small integers every sum is exact: the replaced model must be equal to the bit."""
    right = run(original or folder / model, x)
    for threads in (1, 2):
        y = run(folder / "out" / model, x, folder / "out" / "opcompile_ops.so", threads)
        assert y.dtype == right.dtype
        assert np.array_equal(y, right)


# --- whole models ---


def test_a_dynamic_batch_has_one_kernel(tmp_path: Path) -> None:
    report, out = replaced(upsampling(("n", 4, 3, 4, 5)), tmp_path)
    assert [kernel.spec.split()[0] for kernel in report.kernels] == ["in=Nx4x3x4x5"]
    for batch in (1, 2, 5):
        agree(tmp_path, integers((batch, 4, 3, 4, 5)))
    assert run(out / "model.onnx", integers((0, 4, 3, 4, 5)), out / "opcompile_ops.so").shape == (0, 6, 6, 8, 10)


GELU = [
    helper.make_node("Add", ["up", "more"], ["s"]),
    helper.make_node("Div", ["s", "root"], ["d"]),
    helper.make_node("Erf", ["d"], ["e"]),
    helper.make_node("Add", ["e", "one"], ["o"]),
    helper.make_node("Mul", ["s", "o"], ["m"]),
    helper.make_node("Mul", ["m", "half"], ["g"]),
    helper.make_node("Abs", ["g"], ["y"]),
]
GELU_CONSTANTS = {
    "more": integers((6, 1, 1, 1), 3),
    "root": np.array(2**0.5, np.float32),
    "one": np.array(1, np.float32),
    "half": np.array(0.5, np.float32),
}


@pytest.mark.parametrize("bias", [True, False])
def test_what_follows_is_fused(bias: bool, tmp_path: Path) -> None:
    model = upsampling(bias=bias, after=GELU, constants=GELU_CONSTANTS)
    report, out = replaced(model, tmp_path, verify=True)
    assert operators(out / "model.onnx") == ["Neg", OURS, "Abs"]
    assert report.nodes[0].fused == ("Add", "Div", "Erf", "Add", "Mul", "Mul")
    assert report.passed
    assert 0 < max(check.bound / check.largest for check in report.checks) < 1e-3


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_normalization_goes_into_the_weights(bias: bool, groups: int, tmp_path: Path) -> None:
    """As exporters leave it that fold it into a Conv alone; the mean and the shift nearly cancel."""
    rng = np.random.default_rng(0)
    statistics = {name: rng.uniform(0.5, 2, 6).astype(np.float32) for name in ("scale", "shift", "mean", "variance")}
    statistics["shift"] = (100 * statistics["scale"]).astype(np.float32)
    statistics["mean"] = (100 * np.sqrt(statistics["variance"])).astype(np.float32)
    statistics["scale"][1] = 0
    after = [
        helper.make_node("BatchNormalization", ["up", *statistics], ["n"], name="norm"),
        helper.make_node("LeakyRelu", ["n"], ["y"]),
    ]
    model = upsampling(bias=bias, channels=6, after=after, constants=statistics)
    if groups == 2:
        w = next(t for t in model.graph.initializer if t.name == "w")
        w.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(w)[:, :3].copy(), "w"))
        model.graph.node[1].attribute.append(helper.make_attribute("group", 2))
    report, out = replaced(model, tmp_path, verify=True)
    assert report.nodes[0].fused == ("BatchNormalization", "LeakyRelu")
    assert operators(out / "model.onnx") == ["Neg", OURS]
    assert {t.name for t in onnx.load(out / "model.onnx").graph.initializer} == {"w_packed", "up_bias"}
    assert report.passed
    assert max(check.error for check in report.checks) > 0
    assert max(check.bound / check.largest for check in report.checks) < 1e-2
    assert {check.inputs for check in report.checks} == {"normal", "ones", "impulse", "alternating", "wide"}


def test_a_scale_that_is_forgotten_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opcompile.replace.affine import Affine

    whole = Affine.folded
    monkeypatch.setattr(
        Affine, "folded", lambda self, w, b, g: whole(changed(self, scale=self.scale * 1.0001), w, b, g)
    )
    after = [helper.make_node("Mul", ["up", "p"], ["y"])]
    model = upsampling(after=after, constants={"p": np.full((1, 6, 1, 1, 1), 3, np.float32)})
    report, _ = replaced(model, tmp_path, verify=True)
    assert not report.passed


def test_a_wrong_whole_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse another activation than the model has: each kernel is right by itself, and the model is not."""
    module = __import__("opcompile.replace.fusion", fromlist=["fusion"])
    monkeypatch.setitem(module._OPERATORS, "Elu", ("relu", ()))
    report, _ = replaced(upsampling(after=[helper.make_node("Elu", ["up"], ["y"])]), tmp_path, verify=True)
    assert all(kernel.passed for kernel in report.kernels)
    assert not report.passed


def test_an_output_that_no_replaced_node_reaches(tmp_path: Path) -> None:
    """It must be equal to the bit, also where ONNX Runtime adds up in another order on two threads, as here."""
    model = upsampling((1, 32, 4, 4, 4))
    model.graph.node.append(helper.make_node("Conv", ["x", "v"], ["z"], pads=[1] * 6))
    rng = np.random.default_rng(0)
    model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((16, 32, 3, 3, 3), np.float32), "v"))
    model.graph.output.append(value("z", None))
    report, _ = replaced(model, tmp_path, verify=True)
    assert report.passed
    assert {(c.threads, c.error, c.bound) for c in report.checks if c.output == "z"} >= {(1, 0.0, 0.0)}
    assert any(c.bound for c in report.checks if c.output == "y")


def test_an_output_of_words(tmp_path: Path) -> None:
    model = upsampling(after=[helper.make_node("Less", ["up", "zero"], ["low"]),
                              helper.make_node("Where", ["low", "lesion", "none"], ["y"])])  # fmt: skip
    words = [helper.make_tensor(name, TensorProto.STRING, [], [name.encode()]) for name in ("lesion", "none")]
    model.graph.initializer.extend([*words, numpy_helper.from_array(np.float32(0.5), "zero")])
    model.graph.output[0].CopyFrom(value("y", None, TensorProto.STRING))
    report, _ = replaced(model, tmp_path, verify=True)
    assert report.passed
    assert report.checks


def test_what_any_error_makes_infinite_is_not_judged(tmp_path: Path) -> None:
    """Where X is zero Y is whole numbers, and their logarithm minus infinity or, an error further, NaN."""
    report, _ = replaced(upsampling(after=[helper.make_node("Log", ["up"], ["y"])]), tmp_path, verify=True)
    assert report.passed
    assert {check.judged for check in report.checks} == {True, False}
    lines = list(report._lines())
    assert any(re.search(r"\d+ of \d+ comparisons judge nothing: .* y are finite", line) for line in lines)
    assert not any("inf allowed" in line for line in lines)


def test_a_model_of_which_nothing_can_be_judged_does_not_pass(tmp_path: Path) -> None:
    """The sign of a sine of large numbers, in words: any error changes it."""
    after = [
        helper.make_node("Mul", ["up", "large"], ["m"]),
        helper.make_node("Sin", ["m"], ["s"]),
        helper.make_node("Less", ["s", "zero"], ["low"]),
        helper.make_node("Where", ["low", "minus", "plus"], ["y"]),
    ]
    model = upsampling(after=after, constants={"large": np.array(1e9, np.float32), "zero": np.array(0, np.float32)})
    words = [helper.make_tensor(name, TensorProto.STRING, [], [name.encode()]) for name in ("minus", "plus")]
    model.graph.initializer.extend(words)
    model.graph.output[0].CopyFrom(value("y", None, TensorProto.STRING))
    report, _ = replaced(model, tmp_path, verify=True)
    assert report.checks
    assert not any(check.judged for check in report.checks)
    assert not report.passed
    assert all("equal to stock" not in line for line in report._lines())


def test_an_output_that_is_no_tensor(tmp_path: Path) -> None:
    """It is not compared, and the report says so."""
    model = upsampling(after=[helper.make_node("SplitToSequence", ["up", "sizes"], ["y"], axis=1)])
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3]), "sizes"))
    model.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None))
    report, _ = replaced(model, tmp_path, verify=True)
    assert report.replaced == 1
    assert "output y is a list" in report.not_asked["the whole model"]
    assert "the whole model is NOT VERIFIED" in list(report._lines())
    assert (report.wrong, report.passed) == (False, False)


def test_a_model_that_is_not_deterministic_is_not_judged(tmp_path: Path) -> None:
    """What it draws would be taken for what errors within the bounds move; it is timed all the same."""
    after = [
        helper.make_node("RandomNormalLike", ["up"], ["noise"], seed=1.0),
        helper.make_node("Add", ["up", "noise"], ["y"]),
    ]
    command = ["replace", str(saved(upsampling(after=after), tmp_path)), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*command, "--plan", "baseline", "--all", "--seconds", "0.01"])
    assert result.exit_code == 3
    assert "the whole model: not judged: the model is not deterministic: every output" in result.stdout
    assert "the whole model is NOT VERIFIED" in result.stdout
    assert "whole model, 1 thread: " in result.stdout


@pytest.mark.parametrize("wrong", [False, True])
def test_the_other_outputs_of_a_model_that_draws_one_are_judged(
    wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = upsampling(after=[helper.make_node("Elu", ["up"], ["y"])])
    model.graph.node.append(helper.make_node("RandomNormalLike", ["x"], ["noise"], seed=1.0))
    model.graph.output.append(value("noise", None))
    if wrong:
        module = __import__("opcompile.replace.fusion", fromlist=["fusion"])
        monkeypatch.setitem(module._OPERATORS, "Elu", ("relu", ()))
    report, _ = replaced(model, tmp_path, verify=True)
    assert {(check.output, check.judged) for check in report.checks} == {("y", True), ("noise", False)}
    assert {check.output for check in report.checks if not check.passed} == ({"y"} if wrong else set())
    assert report.passed == (not wrong)
    assert "the whole model" not in report.not_asked
    assert any("elements of noise are finite, or their words, or they change from run" in s for s in report._lines())


def test_a_model_that_does_not_run_is_not_verified(tmp_path: Path) -> None:
    """Its open number of channels may be 1 or 6, and 2 is tried as well."""
    nodes = [helper.make_node("Add", ["up", "other"], ["y"])]
    model = upsampling(after=nodes)
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", "c", 6, 8, 10]))
    path = saved(model, tmp_path)
    result = CliRunner().invoke(cli, ["replace", str(path), "-o", str(tmp_path / "out"), "--no-bench"])
    assert result.exit_code == 3
    assert "the whole model is NOT VERIFIED" in result.stdout
    assert "if that is for its open sizes, give them by --shape" in result.stdout


@pytest.mark.parametrize("stale", [True, False])
def test_an_output_of_another_shape_than_is_declared_is_timed(stale: bool, tmp_path: Path) -> None:
    """A batch that is wrong in the file; and ONNX infers 7 of SAME_UPPER and output_padding, where 6 are computed."""
    if stale:
        model = upsampling(("n", 4, 3, 4, 5))
        model.graph.output[0].CopyFrom(value("y", (2, 6, 6, 8, 10)))
    else:
        model = upsampling(auto_pad="SAME_UPPER", output_padding=[1, 1, 1])
    report, _ = replaced(model, tmp_path, verify=True, measure=True, everything=True, threads=(1,), seconds=0)
    assert report.passed
    assert len(report.speeds) == 1


def test_a_model_that_does_not_run_is_not_timed() -> None:
    session = Session(upsampling().SerializeToString())
    with pytest.raises(EngineError, match="Got invalid dimensions for input"):
        session.writes_again({"x": integers((2, 4, 3, 4, 5))})


def test_a_table_says_which_shape_a_row_is_for(tmp_path: Path) -> None:
    shapes = [{"x": (1, 4, 3, 4, width)} for width in (5, 6)]
    report, _ = replaced(upsampling((1, 4, 3, 4, "w")), tmp_path, shapes=shapes)
    console = Console(width=160, file=io.StringIO())
    console.print(report._table())
    text = console.file.getvalue()
    assert [f"in=1x4x3x4x{width}" in text for width in (5, 6)] == [True, True]


def test_a_full_disk_is_said_with_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(job, "save", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*out: No space left on device; name a directory"):
        replaced(upsampling(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


@pytest.mark.parametrize("opset", [7, 11, 20, 22])
def test_a_whole_model_is_verified_at_every_opset(opset: int, tmp_path: Path) -> None:
    model = upsampling(after=[helper.make_node("Elu", ["up"], ["y"])], opset=opset)
    model.ir_version = max(model.ir_version, 4)  # before, initializers are inputs as well
    try:
        run(model, X)
    except opcompile.OpcompileError as error:
        pytest.skip(f"this ONNX Runtime does not know opset {opset}: {error}")
    report, _ = replaced(model, tmp_path, verify=True)
    assert report.not_asked.keys() == {"speed"}
    assert report.passed
    assert all(check.bound for check in report.checks)


# --- kinds of models ---


def test_external_data_stay_external(tmp_path: Path) -> None:
    model = upsampling(after=[helper.make_node("Mul", ["up", "more"], ["y"])], constants={"more": integers((10,))})
    how = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    path = saved(model, tmp_path, "big.onnx", **how)
    report, out = replaced(path, tmp_path, verify=True)
    assert report.passed
    assert report.checks
    assert set(report.files) == {"opcompile_ops.so", "big.onnx", "weights.bin", "opcompile.data"}
    onnx.load(path)
    onnx.load(out / "big.onnx")
    assert (out / "weights.bin").read_bytes() == (tmp_path / "weights.bin").read_bytes()
    agree(tmp_path, model="big.onnx")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (
            "missing.bin",
            r"missing\.bin, where the model keeps data, cannot be read: No such file or directory; bring it",
        ),
        ("a\0b", "where the model keeps data, cannot be read: embedded null byte; bring it there"),
        ("../weights.bin", r"keeps data in '\.\./weights\.bin', which is outside of its folder; save it anew"),
    ],
)
def test_external_data_that_are_not_there(place: str, words: str, tmp_path: Path) -> None:
    """It is said before anything is compiled."""
    model = upsampling()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    steps: list[str | None] = []
    with pytest.raises(ModelError, match=words):
        replaced(model, tmp_path, progress=lambda _done, _total, step: steps.append(step))
    assert not steps


def test_a_node_in_a_subgraph(tmp_path: Path) -> None:
    branch = upsampling().graph
    outer = upsampling()
    del outer.graph.node[:]
    del branch.input[:]
    del branch.initializer[:]
    other = helper.make_graph([helper.make_node("ConvTranspose", ["x", "w", "b"], ["y_other"], strides=[2, 2, 2])],
                              "other", [], [value("y_other", None)])  # fmt: skip
    outer.graph.node.append(helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=other))
    branch_output = outer.graph.node[0].attribute[0].g
    branch_output.output[0].name = branch_output.node[-1].output[0] = "y_then"
    outer.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    report, out = replaced(outer, tmp_path, verify=True)
    assert report.replaced == 2
    assert operators(out / "model.onnx").count(OURS) == 2
    assert report.passed
    assert any(check.bound for check in report.checks)
    agree(tmp_path)


@pytest.mark.parametrize("mode", ["rewrite", "override"])
def test_nodes_of_two_branches_that_are_called_alike_stay(mode: Any, tmp_path: Path) -> None:
    """Their weights differ, and their outputs have one name: none may be taken for the other."""

    def branch(kernel: int) -> onnx.GraphProto:
        up = helper.make_node("ConvTranspose", ["x", "w"], ["up"], strides=[2, 2, 2])
        w = numpy_helper.from_array(integers((4, 6, *[kernel] * 3)), "w")
        return helper.make_graph([up], "branch", [], [value("up", None)], [w])

    either = helper.make_node("If", ["flag"], ["y"], then_branch=branch(2), else_branch=branch(3))
    inputs = [value("x", X.shape), value("flag", (), TensorProto.BOOL)]
    report, _ = replaced(model_of([either], inputs, [value("y", None)], opset=20), tmp_path, mode=mode)
    assert [node.status for node in report.nodes] == ["refused"] * 2
    assert all("a name of its own" in str(node.reason) for node in report.nodes)


def test_a_node_in_a_function(tmp_path: Path) -> None:
    body = [helper.make_node("ConvTranspose", ["fx", "fw"], ["fy"], strides=[2, 2, 2])]
    imports = [helper.make_opsetid("", 20)]
    function = helper.make_function("local", "Up", ["fx", "fw"], ["fy"], body, imports)
    model = upsampling()
    model.graph.node[1].CopyFrom(helper.make_node("Up", ["negated", "w"], ["up"], domain="local"))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    report, _ = replaced(model, tmp_path)
    assert report.replaced == 1
    agree(tmp_path)


@pytest.mark.parametrize("name", ["w", "b"])
@pytest.mark.parametrize("x", [(1, 4, 3, 4, 5), (1, 4, "d", 4, 5)], ids=["static", "open"])
def test_weights_that_are_not_finite_stay(name: str, x: Any, tmp_path: Path) -> None:
    """There is no bound for them: what a kernel does with them depends on how it pads."""
    model = upsampling(x)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array[1] = np.inf if name == "w" else np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    report, _ = replaced(model, tmp_path, shapes=[{"x": (1, 4, 3, 4, 5)}])
    (node,) = report.nodes
    assert (node.status, node.reason) == ("refused", OWN_WEIGHTS.reason)


def test_weights_that_two_nodes_share(tmp_path: Path) -> None:
    model = upsampling(after=[helper.make_node("ConvTranspose", ["negated", "w", "b"], ["v"], strides=[2, 2, 2]),
                              helper.make_node("Add", ["up", "v"], ["y"])])  # fmt: skip
    report, out = replaced(model, tmp_path)
    assert (report.replaced, len(report.kernels)) == (2, 1)
    agree(tmp_path)
    assert "w" not in {t.name for t in onnx.load(out / "model.onnx").graph.initializer}


def test_nothing_stays_that_nobody_reads(tmp_path: Path) -> None:
    """Exporters keep equal tensors once, and let Identity copy them."""
    names = ["scale", "shift", "mean", "variance"]
    after = [
        *(helper.make_node("Identity", ["one"], [name]) for name in names),
        helper.make_node("Identity", ["mean"], ["mean_too"]),
        helper.make_node("BatchNormalization", ["up", "scale", "shift", "mean_too", "variance"], ["n"]),
        helper.make_node("Clip", ["n", "low", "high"], ["y"]),
    ]
    limits = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    _, out = replaced(upsampling(after=after, constants={"one": np.ones(6, np.float32), **limits}), tmp_path)
    assert operators(out / "model.onnx") == ["Neg", OURS]
    assert [t.name for t in onnx.load(out / "model.onnx").graph.initializer] == ["w_packed", "up_bias"]


def of_half_precision() -> onnx.ModelProto:
    """Weights kept in float16, as converters leave them, and a quantized bias: ``w`` and ``b`` are computed."""
    model = upsampling()
    kept, quantized = integers((4, 6, 2, 2, 2), 1).astype(np.float16), np.arange(6, dtype=np.int8)
    held = {"half": kept, "eighth": quantized, "scale": np.array(0.5, np.float32)}
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in held.items())
    model.graph.node.insert(0, helper.make_node("Cast", ["half"], ["w"], to=TensorProto.FLOAT))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["eighth", "scale"], ["b"]))
    return model


def test_weights_that_are_computed_from_constants(tmp_path: Path) -> None:
    _, out = replaced(of_half_precision(), tmp_path)
    assert operators(out / "model.onnx") == ["Neg", OURS, "Neg"]
    assert [t.name for t in onnx.load(out / "model.onnx").graph.initializer] == ["w_packed", "up_bias"]
    agree(tmp_path)


def test_nodes_in_any_order(tmp_path: Path) -> None:
    """ONNX Runtime takes them, and its converter to float16 appends Casts that others read."""
    model = of_half_precision()
    backwards = list(reversed([onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]))
    del model.graph.node[:]
    model.graph.node.extend(backwards)
    report, _ = replaced(model, tmp_path, verify=True)
    assert report.passed
    assert report.replaced == 1
    agree(tmp_path)


def test_weights_that_are_computed_from_a_file_of_their_own(tmp_path: Path) -> None:
    path = saved(of_half_precision(), tmp_path, save_as_external_data=True, size_threshold=64)
    _, out = replaced(path, tmp_path)
    assert {p.name for p in out.iterdir()} == {"model.onnx", "opcompile.data", "opcompile_ops.so", "report.json"}
    agree(tmp_path)


def test_a_bias_that_is_left_out_by_an_empty_name(tmp_path: Path) -> None:
    model = upsampling(bias=False)
    model.graph.node[1].input.append("")
    report, _ = replaced(model, tmp_path)
    assert report.replaced == 1
    agree(tmp_path)


def test_weights_that_somebody_else_reads(tmp_path: Path) -> None:
    after = [helper.make_node("ReduceSum", ["w"], ["s"]), helper.make_node("Mul", ["up", "s"], ["y"])]
    _, out = replaced(upsampling(after=after), tmp_path)
    assert "w" in {t.name for t in onnx.load(out / "model.onnx").graph.initializer}
    agree(tmp_path)


def test_initializers_of_old_models_are_inputs_as_well(tmp_path: Path) -> None:
    model = upsampling(opset=8)
    model.ir_version = 3
    model.graph.input.extend([value("w", (4, 6, 2, 2, 2)), value("b", (6,))])
    _, out = replaced(model, tmp_path)
    assert [i.name for i in onnx.load(out / "model.onnx").graph.input if i.name in "xwb"] == ["x"]
    assert np.array_equal(run(out / "model.onnx", X, out / "opcompile_ops.so"), run(upsampling(), X))


def test_weights_that_a_caller_may_change_are_packed_in_each_call(tmp_path: Path) -> None:
    model = upsampling()
    model.graph.input.append(value("w", (4, 6, 2, 2, 2)))
    _, out = replaced(model, tmp_path)
    assert OPEN in operators(out / "model.onnx")
    stock = Session(tmp_path / "model.onnx")
    ours = Session(out / "model.onnx", out / "opcompile_ops.so", 2)
    for seed in (7, 8):
        feeds = {"x": X, "w": integers((4, 6, 2, 2, 2), seed)}
        # ONNX Runtime lists an initializer that may be overridden apart from the inputs
        ours.inputs = stock.inputs = {"x": ours.inputs["x"], "w": ours.inputs["x"]}
        assert np.array_equal(ours(feeds)["y"], stock(feeds)["y"])
    spec = next(iter(calls(out / "opcompile_ops.so")))
    assert calls(out / "opcompile_ops.so")[spec] == 2


@pytest.mark.parametrize(
    "attributes",
    [
        {"auto_pad": "SAME_UPPER"},
        pytest.param({"auto_pad": "SAME_LOWER"}, marks=pytest.mark.heavy),
        {"output_shape": [5, 7, 10]},
        pytest.param({"pads": [1, 0, 0, 0, 1, 1], "output_padding": [1, 0, 1]}, marks=pytest.mark.heavy),
        {"group": 2, "channels": 3},
    ],
    ids=str,
)
def test_attributes(attributes: dict[str, Any], tmp_path: Path) -> None:
    attributes = dict(attributes)
    channels = attributes.pop("channels", 6)
    model = upsampling(channels=channels, bias=channels == 6, **attributes)
    for mode in ("rewrite", "override"):
        report, out = replaced(model, tmp_path, mode=mode)
        assert report.replaced == 1
        edited = out / "model.onnx" if mode == "rewrite" else tmp_path / "model.onnx"
        assert np.array_equal(run(edited, X, out / "opcompile_ops.so"), run(model, X))
        assert calls(out / "opcompile_ops.so")["onnxruntime"] == 0


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (upsampling(dtype=TensorProto.FLOAT16), "only float32 is replaced; export the model in float32"),
        (upsampling(dtype=TensorProto.DOUBLE), "only float32 is replaced$"),
        (upsampling((1, 4, "d", 4, 5)), "dynamic spatial sizes.*give the model's inputs sizes, by --shape"),
        (upsampling((1, 4, 3, 4, 5), output_shape=[90] * 3), "use output_padding for more$"),
    ],
)
def test_nodes_that_stay(model: onnx.ModelProto, words: str, tmp_path: Path) -> None:
    report, out = replaced(model, tmp_path)
    assert report.nodes[0].status == "refused"
    assert re.search(words, str(report.nodes[0].reason))
    assert report.library is None
    assert [path.name for path in sorted(out.iterdir())] == ["model.onnx", "report.json"]
    assert list(report._lines())[-1].endswith(
        "; no library: nothing was replaced, and model.onnx is a copy of the model"
    )
    assert onnx.load(out / "model.onnx") == model


# --- shapes ---


@pytest.mark.parametrize("mode", ["rewrite", "override"])
def test_shapes_that_were_named_and_others(mode: Any, tmp_path: Path) -> None:
    model = upsampling(("n", 4, "d", "h", "w"), after=[helper.make_node("Sigmoid", ["up"], ["y"])])
    shapes = [{"x": (1, 4, 3, 4, 5)}, {"x": ("n", 4, 2, 2, 6)}]
    report, out = replaced(model, tmp_path, mode=mode, shapes=shapes, verify=True)
    assert report.passed
    assert [kernel.spec.split()[0] for kernel in report.kernels] == ["in=1x4x3x4x5", "in=Nx4x2x2x6"]
    path = out / "model.onnx" if mode == "rewrite" else tmp_path / "model.onnx"
    before = list(calls(out / "opcompile_ops.so").values())
    session = Session(path, out / "opcompile_ops.so", 2)
    rng = np.random.default_rng(0)
    counted = []
    for shape in [(1, 4, 3, 4, 5), (2, 4, 3, 4, 5), (3, 4, 2, 2, 6), (1, 4, 2, 2, 6), (1, 4, 1, 1, 1), (0, 4, 2, 2, 6)]:
        x = rng.standard_normal(shape, np.float32)
        y, right = session({"x": x})["y"], run(model, x)
        after = list(calls(out / "opcompile_ops.so").values())
        counted.append([n - m for n, m in zip(after, before, strict=True)].index(1))
        before = after
        if counted[-1] == 2:
            assert np.array_equal(y, right)
        else:
            assert np.abs(y - right).max(initial=0) < 1e-6
    assert counted == [0, 2, 1, 1, 2, 2]


def test_a_shape_of_no_input(tmp_path: Path) -> None:
    model = upsampling(("n", 4, "d", "h", "w"))
    for shape, words in (({"z": (1,)}, "no input 'z'"), ({"x": (1, 4)}, "5 axes"), ({"x": (1, 5, 2, 2, 2)}, "fixed")):
        with pytest.raises(ModelError, match=words):
            replaced(model, tmp_path, shapes=[shape])


# --- override: everything that it does not compute ---


@pytest.fixture(scope="module")
def override(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("override")
    _, out = replaced(upsampling(), folder, mode="override")
    return out / "opcompile_ops.so"


def one_node(x: tuple[int, ...], w: tuple[int, ...], *, dtype: int = 1, opset: int = 17, b: int = 0, **attributes: Any):
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    rng = np.random.default_rng(0)
    held = {"w": rng.standard_normal(w).astype(numpy_type)} | (
        {"b": rng.standard_normal(b).astype(numpy_type)} if b else {}
    )
    nodes = [
        helper.make_node("ConvTranspose", ["x", *held], ["c"], **attributes),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    initializers = [numpy_helper.from_array(a, n) for n, a in held.items()]
    model = model_of(nodes, [value("x", x, dtype)], [value("y", None, dtype)], initializers=initializers, opset=opset)
    return model, rng.standard_normal(x).astype(numpy_type)


@pytest.mark.parametrize(
    "case",
    [
        one_node((1, 3, 8), (3, 4, 3), strides=[2]),
        one_node((2, 3, 8, 9), (3, 4, 3, 3), b=4, strides=[2, 2], pads=[1, 0, 1, 1], output_padding=[1, 0]),
        one_node((2, 4, 8, 9), (4, 4, 3, 3), b=8, group=2, dilations=[2, 1]),
        one_node((1, 3, 4, 5, 6), (3, 4, 3, 3, 3), b=4, strides=[2, 2, 2], auto_pad="SAME_UPPER"),
        one_node((1, 3, 4, 5, 6), (3, 4, 3, 3, 3), strides=[2, 2, 2], auto_pad="SAME_LOWER", opset=11),
        one_node((1, 3, 4, 5, 6), (3, 4, 3, 3, 3), strides=[2, 2, 2], output_shape=[8, 10, 12]),
        one_node((1, 3, 4, 5, 6), (3, 4, 3, 3, 3), strides=[2, 2, 2], opset=7),
        one_node((1, 3, 4, 5, 6), (3, 4, 3, 3, 3), b=4, dtype=TensorProto.FLOAT16, strides=[2, 2, 2]),
        one_node((1, 3, 4, 5), (3, 4, 3, 3), dtype=TensorProto.FLOAT16),
    ],
)
def test_what_was_not_compiled_is_onnxruntimes_own_to_the_bit(case: Any, override: Path) -> None:
    model, x = case
    given = model.SerializeToString()
    stock, ours = Session(given), Session(given, override)
    assert np.array_equal(ours({"x": x})["y"], stock({"x": x})["y"])


def test_a_library_of_a_model_in_float32_takes_nodes_in_float16(tmp_path: Path) -> None:
    """ONNX Runtime puts Casts around a node that it has in float32 alone, ours included."""
    report, out = replaced(upsampling(), tmp_path, mode="override")
    model, library = upsampling(dtype=TensorProto.FLOAT16), out / "opcompile_ops.so"
    x = X.astype(np.float16)
    assert np.array_equal(run(model, x, library), run(model, x))
    assert calls(library) == {report.kernels[0].spec: 1, "onnxruntime": 0}


@pytest.mark.parametrize("mode", ["rewrite", "override"])
def test_nodes_in_float16_are_refused_with_what_helps(mode: Any, tmp_path: Path) -> None:
    """In either mode the same, the library of another file: the test above does it."""
    report, _ = replaced(upsampling(dtype=TensorProto.FLOAT16), tmp_path, mode=mode)
    said = "run `opcompile replace --mode override` on that file, and register its library with this model's session"
    assert (report.nodes[0].status, said in str(report.nodes[0].reason)) == ("refused", True)


def test_a_last_input_that_is_left_out(override: Path) -> None:
    model, x = one_node((1, 3, 4, 5, 6), (3, 4, 3, 3, 3))
    model.graph.node[0].input.append("")
    assert np.array_equal(run(model, x, override), run(model, x))


def test_opset_22(override: Path) -> None:
    model, x = one_node((1, 3, 4, 5, 6), (3, 4, 3, 3, 3), opset=22)
    try:
        right = run(model, x)
    except opcompile.OpcompileError as error:
        pytest.skip(f"this ONNX Runtime does not know opset 22: {error}")
    assert np.array_equal(run(model, x, override), right)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"strides": [2.0, 2.0, 2.0]}, "strides must be a list of integers"),
        ({"strides": 2}, "strides must be a list of integers"),
        ({"strides": "222"}, "strides must be a list of integers"),
        ({"strides": [2**40, 2, 2]}, "strides has a value that does not fit into 32 bits"),
        ({"pads": [0] * 30}, "pads has more values than a tensor has axes"),
        ({"group": [1]}, "group must be an integer"),
        ({"group": 0}, "group must be at least 1"),
        ({"auto_pad": 1}, "auto_pad is .?, but must be"),
        ({"output_padding": [0, 1]}, "output_padding has 2 values, but X has 3 spatial axes"),
        ({"output_shape": [1, 6, 6, 8]}, "output_shape has 4 values"),
        ({"bias": 5}, r"B has shape \(5\), but must have one value for each channel of Y"),
    ],
    ids=str,
)
def test_a_node_that_contradicts_itself(attributes: dict[str, Any], words: str, override: Path) -> None:
    """ONNX's own checks do not see a node that was taken over, and older ONNX Runtimes read past what is missing."""
    attributes = dict(attributes)
    bias = attributes.pop("bias", 6)
    model = upsampling(**attributes)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(integers((bias,)), "b"))
    with pytest.raises(opcompile.OpcompileError, match=words):
        run(model, X, override)


def test_a_2d_node_whose_output_ends_behind_the_last_tap(override: Path) -> None:
    """Up to 1.27 ONNX Runtime's own kernel reads past its column buffer there."""
    model, x = one_node((1, 3, 4, 5), (3, 4, 3, 3), strides=[2, 2], dilations=[3, 3], output_padding=[2, 0])
    with pytest.raises(opcompile.OpcompileError, match="ends a whole stride or more after the last tap"):
        run(model, x, override)


@pytest.mark.parametrize("shape", [("n", 3, "d", 5, 6), ("n", 3, 4, 5, 6), (1, 3, 4, 5, 6)])
def test_output_shapes_are_inferred_as_ever(shape: tuple[int | str, ...], override: Path) -> None:
    """An unknown size has a name that no other has: ONNX Runtime takes equal names for equal sizes."""
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 31):
        pytest.skip("before 1.31 ONNX Runtime may crash while it infers shapes of ours")
    model, _ = one_node((1, 3, 4, 5, 6), (3, 4, 3, 3, 3), strides=[2, 2, 2])
    model.graph.input[0].CopyFrom(value("x", shape))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(override))
    found = onnxruntime.InferenceSession(model.SerializeToString(), options).get_outputs()[0].shape
    expected = [shape[0], 4, 9 if shape[2] == 4 else None, 11, 13]
    assert [None if str(size).startswith("opcompile_unknown") else size for size in found] == expected


# --- choosing, writing, saying ---


def test_a_node_that_does_not_gain_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opcompile.bench import Ratio
    from opcompile.replace.report import Speed

    def slow(*_: Any) -> tuple[Speed, ...]:
        return (Speed(1, 1.0, 2.0, Ratio("onnxruntime", 0.5, 0.4, 0.6)),)

    monkeypatch.setattr(job, "race", slow)
    monkeypatch.setattr(job, "race_models", slow)
    report, _ = replaced(upsampling(), tmp_path, measure=True)
    assert (report.nodes[0].status, report.library) == ("kept", None)
    assert report.nodes[0].kernels == (report.kernels[0].key,)
    assert "not faster" in str(report.nodes[0].reason)
    report, out = replaced(upsampling(), tmp_path, measure=True, everything=True)
    assert (report.nodes[0].status, report.slower) == ("replaced", True)
    assert json.loads((out / "report.json").read_text())["slower"] is True


def test_what_gains_only_without_what_follows_is_not_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opcompile.bench import Ratio
    from opcompile.replace.report import Speed

    def by_fusion(_: Any, kernel: library.Kernel, *__: Any) -> tuple[Speed, ...]:
        ratio = 2.0 if kernel.spec.activation.name == "none" else 0.5
        return (Speed(1, 1.0, 1 / ratio, Ratio("onnxruntime", ratio, ratio, ratio)),)

    monkeypatch.setattr(job, "race", by_fusion)
    monkeypatch.setattr(job, "race_models", lambda *_: ())
    model = upsampling(after=GELU, constants=GELU_CONSTANTS)
    report, out = replaced(model, tmp_path, measure=True, verify=True)
    assert report.passed
    assert ["act=gelu" in kernel.spec for kernel in report.kernels] == [True, False]
    assert (report.nodes[0].status, report.nodes[0].fused) == ("replaced", ())
    assert operators(out / "model.onnx") == ["Neg", OURS, *(node.op_type for node in GELU)]
    agree(tmp_path)


def test_what_gains_neither_way_is_kept_and_both_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opcompile.bench import Ratio
    from opcompile.replace.report import Speed

    monkeypatch.setattr(job, "race", lambda *_: (Speed(1, 1.0, 2.0, Ratio("onnxruntime", 0.5, 0.4, 0.6)),))
    report, _ = replaced(upsampling(after=LEAKY), tmp_path, measure=True)
    assert [kernel.spec for kernel in report.kernels] == [str(FUSED), str(changed(FUSED, activation=NONE))]
    (node,) = report.nodes
    assert (node.status, node.fused, node.kernels) == ("kept", ("LeakyRelu",), (report.kernels[0].key,))


def test_a_record_is_looked_for_each_time(own: Path, tmp_path: Path) -> None:
    report, _ = replaced(upsampling(), tmp_path, plan="best")
    assert report.kernels[0].plan.startswith("baseline")
    bad = path_of(own, opcompile.ConvTranspose3d.parse(report.kernels[0].spec), target("llvm"))
    bad.parent.mkdir(parents=True)
    bad.write_text("{")
    report, _ = replaced(upsampling(), tmp_path, plan="best")
    assert (report.nodes[0].status, report.kernels) == ("refused", ())


LEAKY = [helper.make_node("LeakyRelu", ["up"], ["y"])]
FUSED = opcompile.ConvTranspose3d.parse("in=1x4x3x4x5 co=6 k=2 s=2 act=leaky_relu")
NONE = opcompile.Activation()


def test_what_compiles_only_without_what_follows_is_not_fused(own: Path, tmp_path: Path) -> None:
    bad = path_of(own, FUSED, target("llvm"))
    bad.parent.mkdir(parents=True)
    bad.write_text("{")
    report, out = replaced(upsampling(after=LEAKY), tmp_path, plan="best", verify=True)
    assert report.passed
    assert (report.nodes[0].status, report.nodes[0].fused) == ("replaced", ())
    assert str(report.nodes[0].reason).startswith(f"alone, for with LeakyRelu it did not compile: record {bad}")
    assert operators(out / "model.onnx") == ["Neg", OURS, "LeakyRelu"]
    agree(tmp_path)


def test_what_does_not_compile_and_gains_nothing_without_what_follows_is_kept(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opcompile.bench import Ratio
    from opcompile.replace.report import Speed

    bad = path_of(own, FUSED, target("llvm"))
    bad.parent.mkdir(parents=True)
    bad.write_text("{")
    monkeypatch.setattr(job, "race", lambda *_: (Speed(1, 1.0, 2.0, Ratio("onnxruntime", 0.5, 0.4, 0.6)),))
    report, _ = replaced(upsampling(after=LEAKY), tmp_path, plan="best", measure=True)
    assert (report.nodes[0].status, report.nodes[0].kernels) == ("kept", (report.kernels[0].key,))
    assert "not faster" in str(report.nodes[0].reason)
    bad.with_name(f"{key(str(changed(FUSED, activation=opcompile.Activation())))}.json").write_text("{")
    report, _ = replaced(upsampling(after=LEAKY), tmp_path, plan="best", measure=True)
    assert (report.nodes[0].status, report.kernels) == ("refused", ())
    assert str(bad) in str(report.nodes[0].reason)


def test_the_layers_to_tune_are_those_that_are_compiled(own: Path, tmp_path: Path) -> None:
    after = [
        helper.make_node("LeakyRelu", ["up"], ["leaky"]),
        helper.make_node("ConvTranspose", ["leaky", "v"], ["y"], name="second", strides=[2, 2, 2]),
    ]
    path = saved(upsampling(after=after, constants={"v": integers((6, 2, 2, 2, 2))}), tmp_path)
    alone, second = changed(FUSED, activation=opcompile.Activation()), "in=1x6x6x8x10 co=2 k=2 s=2 bias=0"
    found = [FUSED, opcompile.ConvTranspose3d.parse(second), alone]
    assert layers(path) == found
    assert layers(path, nodes=["second"]) == found[1:2]
    with pytest.raises(ModelError, match="no 5-D ConvTranspose node 'third'; it has: up, second"):
        layers(path, nodes=["third"])
    report, _ = replaced(path, tmp_path)
    assert [kernel.spec for kernel in report.kernels] == list(map(str, found[:2]))


def test_of_open_sizes_the_layers_are_those_that_were_named(tmp_path: Path) -> None:
    path = saved(upsampling((1, 4, "d", 4, 5), after=LEAKY), tmp_path)
    assert layers(path) == []
    given = [{"x": (1, 4, size, 4, 5)} for size in (3, 2)]
    assert [str(spec).split()[0] for spec in layers(path, shapes=given)] == ["in=1x4x3x4x5", "in=1x4x2x4x5"]
    with pytest.raises(CallError, match="shapes is a list"):
        layers(path, shapes=given[0])  # type: ignore[arg-type]


def test_a_wrong_kernel_stays_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = library.compiled

    def bent(*given: Any) -> library.Kernel:
        """Compile a layer with another padding under the name of this one."""
        kernel = compiled(*given)
        axes = tuple(changed(axis, pad=(1, 0), output_pad=1) for axis in kernel.spec.axes)
        wrong = compiled(changed(kernel.spec, axes=axes), *given[1:])
        return library.Kernel(wrong.key, changed(wrong.lowered, spec=kernel.spec))

    monkeypatch.setattr(job, "compiled", bent)
    report, _ = replaced(upsampling(), tmp_path, verify=True)
    assert not report.passed
    assert (report.nodes[0].status, report.library) == ("kept", None)
    assert "found wrong" in str(report.nodes[0].reason)
    # nor is another tried in its place
    report, _ = replaced(upsampling(after=LEAKY), tmp_path, verify=True)
    assert [kernel.spec for kernel in report.kernels] == [str(FUSED)]
    assert (report.passed, report.nodes[0].fused) == (False, ("LeakyRelu",))


def test_chosen_nodes(tmp_path: Path) -> None:
    after = [helper.make_node("ConvTranspose", ["up", "v"], ["y"], name="second", strides=[2, 2, 2])]
    model = upsampling(after=after, constants={"v": integers((6, 2, 2, 2, 2))})
    report, _ = replaced(model, tmp_path, nodes=["second"])
    assert [node.status for node in report.nodes] == ["refused", "replaced"]
    agree(tmp_path)
    with pytest.raises(ModelError, match=r"no 5-D ConvTranspose node 'third'; it has: up, second"):
        replaced(model, tmp_path, nodes=["third"])


@pytest.mark.parametrize("batch", [1, "n"])
@pytest.mark.parametrize("inferred", [True, False])
def test_what_reads_a_replaced_node_still_has_a_shape(batch: int | str, inferred: bool, tmp_path: Path) -> None:
    """Other tools do not know our operators; this package is one of them."""
    after = [
        helper.make_node("Relu", ["up"], ["r"]),
        helper.make_node("ConvTranspose", ["r", "v"], ["y"], name="second", strides=[2, 2, 2]),
    ]
    model = upsampling((batch, 4, 3, 4, 5), after=after, constants={"v": integers((6, 2, 2, 2, 2))})
    if inferred:
        model = onnx.shape_inference.infer_shapes(model)
    (_, second) = opcompile.find(model)
    _, out = replaced(model, tmp_path, nodes=["up"])
    (left,) = opcompile.find(out / "model.onnx")
    assert left.spec is not None, left.reason
    assert left.spec == second.spec
    values = [value.name for value in onnx.load(out / "model.onnx").graph.value_info]
    assert values.count("r") == 1
    replaced(model, tmp_path, nodes=["second"])
    assert "y" not in [value.name for value in onnx.load(out / "model.onnx").graph.value_info]


def test_the_directory(tmp_path: Path) -> None:
    report, out = replaced(upsampling(), tmp_path)
    stored = json.loads((out / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_json()))
    assert stored["library_bytes"] == (out / "opcompile_ops.so").stat().st_size < 200_000
    replaced(upsampling(), tmp_path)  # an older one of ours may go
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt"):
        replaced(upsampling(), tmp_path)
    assert (out / "notes.txt").exists()


def test_the_library_needs_the_c_library_alone_and_shows_two_functions(override: Path) -> None:
    import shutil
    import subprocess

    if not shutil.which("nm") or not shutil.which("readelf"):
        pytest.skip("no nm, no readelf")
    shown = subprocess.run(["nm", "-D", "--defined-only", override], capture_output=True, text=True, check=True).stdout
    assert sorted(line.split()[-1] for line in shown.splitlines()) == ["RegisterCustomOps", "opcompile_calls"]
    needed = subprocess.run(["readelf", "-d", override], capture_output=True, text=True, check=True).stdout
    libraries = {line.split("[")[1].split(".so")[0] for line in needed.splitlines() if "(NEEDED)" in line}
    assert libraries <= {"libc", "libm", "libpthread", "libdl", "ld-linux-x86-64"}


def test_another_machine(tmp_path: Path) -> None:
    """A library for a processor with more than this one has says so when it is loaded."""
    here = target("llvm")
    lacking = changed(here, name="llvm:better", features=(*here.features, "telepathy"))
    spec = opcompile.ConvTranspose3d.parse("in=1x4x3x4x5 co=6 k=2 s=2")
    operator = library.Operator.of([library.compiled(spec, here, "baseline")], packed=True)
    place = tmp_path / "ops.so"
    place.write_bytes(library.build([operator], lacking))
    with pytest.raises(opcompile.OpcompileError, match="compiled for llvm:better, and this processor has no telepathy"):
        run(upsampling(), X, place)


def test_bad_words(tmp_path: Path) -> None:
    path = saved(upsampling(), tmp_path)
    with pytest.raises(CallError, match="mode is 'other'"):
        opcompile.replace(path, tmp_path / "out", mode="other")  # type: ignore[arg-type]
    with pytest.raises(CallError, match="shapes is a list with a mapping"):
        opcompile.replace(path, tmp_path / "out", shapes={"x": (1, 4, 3, 4, 5)})  # type: ignore[arg-type]
    with pytest.raises(CallError, match="threads"):
        opcompile.replace(path, tmp_path / "out", threads=(0,))
    with pytest.raises(ModelError, match="no ConvTranspose node on 5-D tensors"):
        opcompile.replace(saved(one_node((1, 3, 8), (3, 4, 3))[0], tmp_path), tmp_path / "out")
    with pytest.raises(CallError, match="no library that replace has written"):
        calls(path)
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_replaced_where_it_lies(tmp_path: Path) -> None:
    """Of a node that was not chosen, say: the library of those replaced before would be gone."""
    model = model_of(
        [helper.make_node("ConvTranspose", [x, "w"], [y], name=y, strides=[2, 2, 2]) for x, y in ("xt", "ty")],
        [value("x", (1, 2, 3, 3, 3))],
        [value("y", None)],
        initializers=[numpy_helper.from_array(integers((2, 2, 2, 2, 2), 1), "w")],
    )
    report = opcompile.replace(saved(model, tmp_path), tmp_path / "out", nodes=["t"], verify=False, measure=False)
    assert [node.status for node in report.nodes] == ["replaced", "refused"]
    before = (tmp_path / "out" / "model.onnx").read_bytes()
    with pytest.raises(CallError, match=r"cannot write .*out: .*model\.onnx is read, and would be lost; name another"):
        opcompile.replace(tmp_path / "out" / "model.onnx", tmp_path / "out", verify=False, measure=False)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == before


def test_what_cannot_be_looked_into_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "locked").mkdir(parents=True)
    look = os.scandir

    def permitted(path: str) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", permitted)
    with pytest.raises(ArtifactError, match="holds locked, which replace has not written"):
        require_replaceable(tmp_path / "out")


def test_the_current_directory_is_not_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="is the current directory"):
        opcompile.replace(saved(upsampling(), tmp_path), ".")


def test_a_link_to_a_folder_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="holds link, which replace has not written"):
        require_replaceable(tmp_path / "out")


@pytest.mark.parametrize("place", ["/proc/nowhere/out", "file/out"])
def test_a_place_that_cannot_be_written_is_found_first(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(job, "survey", work)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"cannot write .*; name a directory of yours"):
        opcompile.replace(saved(upsampling(), tmp_path), tmp_path / place)


def test_the_job_holds_what_was_asked() -> None:
    """Every argument of `replace` is a field of the job."""
    import inspect

    asked = set(inspect.signature(opcompile.replace).parameters)
    assert asked == set(Job.__dataclass_fields__) - {"libraries"}


# --- the command line ---


def command(*words: str | Path) -> Any:
    return CliRunner().invoke(cli, ["replace", *map(str, words)], standalone_mode=False)


def test_the_command_prints_the_report(tmp_path: Path) -> None:
    path = saved(upsampling(("n", 4, "d", 4, 5)), tmp_path)
    given = ("--plan", "baseline", "--shape", "x=nx4x3x4x5", "--shape", "x=1x4x2x4x5", "--no-bench")
    told = command(path, "-o", tmp_path / "out", *given, "--json")
    assert told.return_value == 0
    content = json.loads(told.stdout)
    assert content == json.loads((tmp_path / "out" / "report.json").read_text())
    assert [kernel["spec"].split()[0] for kernel in content["kernels"]] == ["in=Nx4x3x4x5", "in=1x4x2x4x5"]
    told = command(path, "-o", tmp_path / "out", *given, "--no-verify")
    assert "1 of 1 nodes replaced" in told.stdout
    assert "not asked: verification: it was not asked for" in told.stdout


def test_nothing_compiled_is_bad_input(tmp_path: Path) -> None:
    told = command(saved(upsampling(dtype=TensorProto.FLOAT16), tmp_path), "-o", tmp_path / "out")
    assert told.return_value == 2
    assert "0 of 1 nodes replaced" in told.stdout
    assert "Times are" not in told.stdout


@pytest.mark.parametrize("mode", ["rewrite", "override"])
def test_no_record_for_any_node_is_bad_input(mode: str, own: Path, tmp_path: Path) -> None:
    path = saved(upsampling(), tmp_path)
    told = command(path, "-o", tmp_path / "out", "--plan", "tuned", "--mode", mode, "--json")
    assert told.return_value == 2
    (node,) = json.loads(told.stdout)["nodes"]
    assert node["status"] == "refused"
    assert node["reason"].startswith("no tuned record for in=1x4x3x4x5 co=6 k=2")


@pytest.mark.parametrize("shape", ["x", "x=", "x=0x1", "x=1x-2", "=1x2", "x=1xx2"])
def test_a_shape_that_is_none(shape: str, tmp_path: Path) -> None:
    told = command(saved(upsampling(), tmp_path), "-o", tmp_path / "out", "--shape", shape)
    assert "is not of the form NAME=NxCxDxHxW" in str(told.exception)


def test_shapes_that_do_not_go_together(tmp_path: Path) -> None:
    shapes = ("--shape", "x=1x2", "--shape", "x=1x3", "--shape", "x=1x4", "--shape", "y=1", "--shape", "y=2")
    told = command(saved(upsampling(), tmp_path), "-o", tmp_path / "out", *shapes)
    assert "2 times for y; give it once, or 3 times" in str(told.exception)
