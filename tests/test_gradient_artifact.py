"""A derivative as an artifact: written, loaded, called, verified, and never taken for something else."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gradient_kernels import draw

import opcompile as oc
from opcompile.build import write
from opcompile.cli import cli
from opcompile.describe import contents
from opcompile.digest import digest
from opcompile.errors import ArtifactError, CallError, SpecError, VerificationError
from opcompile.gradients import verify as module
from opcompile.gradients.artifact import header
from opcompile.gradients.bounds import compare
from opcompile.gradients.gradient import Gradient, Wrt
from opcompile.gradients.reference import reference
from opcompile.gradients.runtime import GradientArtifact
from opcompile.runtime import load_any

TEXT = "in=Nx4x2x3x4 co=6 k=3 s=2 p=1 op=1 g=2 act=relu"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    for wrt in ("x", "w", "b"):
        write(oc.ConvTranspose3d.parse(TEXT), "llvm", "best", folder / wrt, derivative=wrt)
    return folder


@pytest.mark.parametrize("wrt", ["x", "w", "b"])
def test_calls_by_place_and_by_name_are_the_derivative(place: Path, wrt: str) -> None:
    artifact = oc.load(place / wrt, derivative=wrt)  # type: ignore[call-overload]
    for batch in (1, 3):
        operands = draw(artifact.gradient, integers=3, batch=batch)
        result = artifact(*operands.values())
        compare(artifact.gradient, result, operands, exact=True).require()
        out = np.empty_like(result)
        assert artifact(**operands, out=out, threads=2) is out
        np.testing.assert_array_equal(out, result)


def test_arguments_that_do_not_fit_say_so(place: Path) -> None:
    artifact = oc.load(place / "w", derivative="w")
    operands = draw(artifact.gradient)
    dy, x, y = operands.values()
    with pytest.raises(CallError, match="y is missing: dw takes dy, x, y"):
        artifact(dy, x)
    with pytest.raises(CallError, match="w was given, but dw takes dy, x, y"):
        artifact(dy, x, y, w=x)
    with pytest.raises(CallError, match="x was given twice"):
        artifact(dy, x, y, x=x)
    with pytest.raises(CallError, match="dw takes dy, x, y, and was given 4 tensors"):
        artifact(dy, x, y, y)
    with pytest.raises(CallError, match="x has batch 1, but dy has 2"):
        artifact(dy, x[:1], y)
    with pytest.raises(CallError, match="dy has shape"):
        artifact(x, x, y)
    dx = oc.load(place / "x", derivative="x")
    dy, w, y = draw(dx.gradient).values()
    with pytest.raises(CallError, match="out shares memory with dy"):
        artifact(dy, x, y, out=dy.reshape(-1)[: 4 * 3 * 27].reshape(4, 3, 3, 3, 3))
    with pytest.raises(CallError, match="out has batch 1, but dy has 2"):
        dx(dy, w, y, out=np.empty((1, 4, 2, 3, 4), "float32"))


def test_a_derivative_is_not_taken_for_the_layer_or_another(place: Path) -> None:
    with pytest.raises(ArtifactError, match="holds the derivative dx; load it with derivative='x'"):
        oc.load(place / "x")
    with pytest.raises(ArtifactError, match="holds the derivative dx"):
        oc.load(place / "x", derivative="w")
    layer = oc.compile(oc.ConvTranspose3d.parse("in=1x1x1x1x1 co=1 k=1"))
    with pytest.raises(ArtifactError, match="holds the layer itself, no derivative"):
        oc.load(layer.directory, derivative="x")
    names = {json.loads((place / wrt / "manifest.json").read_text())["library"][:20] for wrt in ("x", "w", "b")}
    assert names == {"conv_transpose3d_dx-", "conv_transpose3d_dw-", "conv_transpose3d_db-"}


def test_a_manifest_without_the_word_is_refused(place: Path, tmp_path: Path) -> None:
    for wrong in ("y", 1, ...):
        manifest = json.loads((place / "b" / "manifest.json").read_text())
        manifest["derivative"] = wrong
        if wrong is ...:
            del manifest["derivative"]
        manifest["sha256"] = digest(manifest)
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError, match="must say which derivative it is"):
            load_any(tmp_path)


def test_a_manifest_without_a_depth_and_another_test_vector_are_refused(place: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(place / "x", tmp_path / "copy")
    whole = json.loads((copy / "manifest.json").read_text())
    np.savez(copy / "golden.npz", batch=np.int64(2), indices=np.array([0.5]), expected=np.zeros(1))
    vector = (copy / "golden.npz").read_bytes()
    whole["files"]["golden.npz"] = {"sha256": hashlib.sha256(vector).hexdigest(), "bytes": len(vector)}
    for changed, words in (({"depth": {}}, "lacks fixed"), ({}, "is no test vector of this layer: its arrays are of")):
        manifest = {**whole, **changed}
        manifest["sha256"] = digest(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError, match=words):
            oc.verify(load_any(copy))


def test_the_test_vector_is_the_oracle_s(place: Path) -> None:
    for wrt in ("x", "w", "b"):
        artifact = load_any(place / wrt)
        assert isinstance(artifact, GradientArtifact)
        golden = artifact.golden()
        whole = reference(artifact.gradient, golden.operands).reshape(-1)
        np.testing.assert_array_equal(whole[golden.indices], golden.expected)


def test_verification_asks_and_notices(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = load_any(place / "w")
    report = oc.verify(artifact)
    assert report.passed
    assert {row.inputs for row in report.rows} >= {"integers", "normal", "impulse", "golden.npz"}
    assert {row.batch for row in report.rows} == {1, 2, 3}
    whole = GradientArtifact.__call__

    def bend(self, *args, **named):
        result = whole(self, *args, **named)
        result[0, 0, 0, 0, 0] += 1
        return result

    monkeypatch.setattr(GradientArtifact, "__call__", bend)
    with pytest.raises(VerificationError, match="dw of in=Nx4"):
        oc.verify(artifact).require()


@pytest.mark.parametrize("act", ["relu6", "hard_sigmoid"])
@pytest.mark.parametrize("text", ["dw of in=1x1x8x8x8 co=1 k=1", "db of in=1x1x128x128x128 co=1 k=1"])
def test_integers_reach_both_ends_of_an_activation_however_long_the_sum(text: str, act: str) -> None:
    wrt, _, layer = text.partition(" of ")
    gradient = Gradient(oc.ConvTranspose3d.parse(f"{layer} act={act}"), wrt[1:])  # type: ignore[arg-type]
    draw = next(q.draw for q in module._questions(gradient)[1] if q.name == "integers")
    operands = draw(gradient, np.random.default_rng(0), 1)
    assert {operands["y"].min(), operands["y"].max()} == {0, 6 if act == "relu6" else 1}


def test_a_double_that_is_read_as_float32_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = oc.ConvTranspose3d.parse("in=1x2x2x3x4 co=3 k=2 s=2 act=tanh dtype=float64")
    artifact = oc.compile(spec, derivative="x", into=tmp_path)
    oc.verify(artifact).require()
    whole = GradientArtifact.__call__
    for narrow in ("dy", "w", "y"):

        def bend(self, *args, narrow=narrow, **named):
            return whole(self, *args, **named | {narrow: named[narrow].astype(np.float32).astype(np.float64)})

        monkeypatch.setattr(GradientArtifact, "__call__", bend)
        assert {row.inputs for row in oc.verify(artifact).failures} >= {"normal", "wide"}


def test_where_y_is_beyond_the_type_its_largest_number_is_asked(tmp_path: Path) -> None:
    spec = oc.ConvTranspose3d.parse("in=1x2x2x3x4 co=3 k=2 s=2 act=elu:1e20 dtype=float16")
    for wrt in ("x", "w", "b"):
        oc.verify(oc.compile(spec, derivative=wrt, into=tmp_path / wrt)).require()  # type: ignore[call-overload]


def test_it_is_described(place: Path) -> None:
    held = contents(place / "x")
    assert held.whole
    assert held.manifest["derivative"] == "x"
    assert held.manifest["depth"]["per_image"] == 0
    assert "OPCOMPILE_KERNEL __tvm_ffi_conv_transpose3d_dx" in (place / "x" / "conv_transpose3d_dx.h").read_text()


# Of each derivative with an activation and without: the names of the four pointers of a call.
POINTERS = {
    ("x", "relu"): ("dy", "w", "y", "dx"),
    ("w", "relu"): ("dy", "x", "y", "dw"),
    ("b", "relu"): ("dy", None, "y", "db"),
    ("x", "none"): ("dy", "w", None, "dx"),
    ("w", "none"): ("dy", "x", None, "dw"),
    ("b", "none"): ("dy", None, None, "db"),
}


@pytest.mark.parametrize(("wrt", "activation"), POINTERS)
def test_a_header_says_each_shape_by_the_name_of_its_tensor(wrt: Wrt, activation: str) -> None:
    gradient = Gradient(oc.ConvTranspose3d.parse(TEXT.replace("relu", activation)), wrt)
    text = header(gradient)
    macros = dict(re.findall(r"^#define OPCOMPILE_(\w+) (.*)$", text, re.MULTILINE))
    named = {**gradient.operands, gradient.name: gradient.shape}
    shapes = {f"{name.upper()}_SHAPE": "{" + ", ".join(str(n or 0) for n in named[name]) + "}" for name in named}
    places = dict(zip(("FIRST", "SECOND", "THIRD", "RESULT"), POINTERS[wrt, activation], strict=True))
    for place, name in places.items():
        shapes[f"{place}_SHAPE"] = f"OPCOMPILE_{name.upper()}_SHAPE" if name else "{0}"
    assert {name: value for name, value in macros.items() if name.endswith("_SHAPE")} == shapes
    assert [macros["HAS_SECOND"], macros["HAS_THIRD"]] == [str(int(bool(places[p]))) for p in ("SECOND", "THIRD")]
    called = ", ".join(name or "NULL" for name in places.values())
    assert f"if (run(0, batch, {called})) fprintf" in text


@pytest.mark.parametrize(
    ("wrt", "activation", "rule"),
    [
        ("x", "none", "dy, w and dx must not be null, and the third pointer must be"),
        ("w", "relu", "dy, x, y and dw must not be null"),
        ("b", "none", "dy and db must not be null, and the second and the third pointer must be"),
    ],
)
def test_a_call_from_c_says_which_pointer_must_be_null(tmp_path: Path, wrt: Wrt, activation: str, rule: str) -> None:
    spec = oc.ConvTranspose3d.parse(f"in=Nx1x1x1x1 co=1 k=1 act={activation}")
    place = write(spec, "llvm", "best", tmp_path / "it", derivative=wrt)
    library = ctypes.CDLL(str(place / json.loads((place / "manifest.json").read_text())["library"]))
    library.opcompile_error.restype = ctypes.c_char_p
    memory = [ctypes.byref((ctypes.c_float * 16)()) for _ in range(4)]
    wanted = [name is not None for name in POINTERS[wrt, activation]]

    def said(given: list[bool]) -> str | None:
        pointers = [m if is_given else None for m, is_given in zip(memory, given, strict=True)]
        status = library.opcompile_run(1, ctypes.c_int64(1), *pointers)
        return library.opcompile_error().decode() if status else None

    assert said(wanted) is None
    for i in range(4):
        assert said([is_given != (i == j) for j, is_given in enumerate(wanted)]) == rule


def test_a_batch_that_makes_x_too_large_is_an_error_of_dw(tmp_path: Path) -> None:
    """Where X has more channels than Y, it is the largest tensor of a call."""
    place = write(oc.ConvTranspose3d.parse("in=Nx8x1x1x1 co=1 k=1"), "llvm", "best", tmp_path / "it", derivative="w")
    library = ctypes.CDLL(str(place / json.loads((place / "manifest.json").read_text())["library"]))
    library.opcompile_error.restype = ctypes.c_char_p
    assert library.opcompile_run(1, ctypes.c_int64(2**59), None, None, None, None)
    assert library.opcompile_error() == b"batch is so large that a tensor would have more than 2^63 bytes"


def test_compile_takes_no_weights_of_a_derivative() -> None:
    spec = oc.ConvTranspose3d.parse("in=1x1x1x1x1 co=1 k=1")
    with pytest.raises(CallError, match="give w in each call"):
        oc.compile(spec, derivative="x", weight=np.ones((1, 1, 1, 1, 1), "float32"))  # type: ignore[call-overload]
    with pytest.raises(SpecError, match="derivative 'y' is unknown"):
        oc.compile(spec, derivative="y")  # type: ignore[call-overload]


def test_the_command_line_compiles_verifies_and_runs_one(tmp_path: Path) -> None:
    run, spec = CliRunner(), "in=1x3x2x3x4 co=2 k=2 s=2"
    out = str(tmp_path / "dx")
    done = run.invoke(cli, ["compile", spec, "-o", out, "--derivative", "x", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "dx" / "report.json").read_text())["passed"]
    assert run.invoke(cli, ["verify", out]).exit_code == 0
    assert "its derivative dx" in run.invoke(cli, ["inspect", out]).output
    artifact = oc.load(out, derivative="x")
    operands = draw(artifact.gradient, integers=2)
    words = ["run", out, "-o", str(tmp_path / "dx.npy")]
    for name, array in operands.items():
        np.save(tmp_path / f"{name}.npy", array)
        words += [f"--{name}", str(tmp_path / f"{name}.npy")]
    assert run.invoke(cli, words).exit_code == 0
    compare(artifact.gradient, np.load(tmp_path / "dx.npy"), operands, exact=True).require()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_output_beyond_the_type_can_be_verified(dtype: str) -> None:
    spec = oc.ConvTranspose3d.parse(f"in=1x2x3x3x3 co=2 k=2 s=2 act=leaky_relu:1e38 dtype={dtype}")
    oc.verify(oc.compile(spec, derivative="x")).require()
