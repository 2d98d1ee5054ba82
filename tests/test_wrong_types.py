"""An argument of another type than it should be is named, with the rule: Python's own error would name neither."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import opcompile
from opcompile import arguments, source
from opcompile.bench import bench
from opcompile.bench_gpu import bench_gpu
from opcompile.bounds import compare
from opcompile.build import compile_all
from opcompile.cases import case
from opcompile.describe import contents, describe
from opcompile.diff import diff
from opcompile.errors import OpcompileError
from opcompile.importers import files, keras, torch
from opcompile.needed import missing
from opcompile.reference import reference

LAYER = opcompile.ConvTranspose3d.parse("in=1x2x2x2x2 co=2 k=2")
# all that is looked at before the words beside it
HERE = SimpleNamespace(manifest={})
X, W, B, Y = np.zeros((1, 2, 2, 2, 2)), np.zeros((2, 2, 2, 2, 2)), np.zeros(2), np.zeros((1, 2, 3, 3, 3))
UNET = Path(__file__).parent / "models" / "unet.onnx"
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "parse": (lambda: opcompile.ConvTranspose3d.parse(None), "read from a str like 'in=1x64.* of type NoneType"),
    "activation": (lambda: opcompile.Activation.parse(3), "read from a str like 'leaky_relu:0.2'.* of type int"),
    "name": (lambda: opcompile.Activation(["relu"]), r"activation \['relu'\] is unknown"),
    "parameters": (lambda: opcompile.Activation("leaky_relu", 0.1), "parameters 0.1, but they must be numbers"),
    "target": (lambda: opcompile.compile(LAYER, target=None), "target is of type NoneType, but must be a str"),
    "into": (lambda: opcompile.compile(LAYER, into=b"x"), "into is of type bytes, but must be a path"),
    "load": (lambda: opcompile.load(3), "path is of type int, but must be a path"),
    "zero": (lambda: opcompile.load("a\0b"), "no path has a zero byte in it"),
    "long into": (lambda: opcompile.compile(LAYER, into="L" * 300), "into is a path of 300 characters, .* too long"),
    "long export": (lambda: opcompile.export_onnx(LAYER, "L" * 300), "path is a path of 300 characters"),
    "long replace": (lambda: opcompile.replace(UNET, "L" * 300), "into is a path of 300 characters"),
    "deep": (lambda: opcompile.compile(LAYER, into="a/" * 3000), "into is a path of 6000 characters"),
    "export": (lambda: opcompile.export_onnx(LAYER, None), "path is of type NoneType, but must be a path"),
    "find": (lambda: opcompile.find(LAYER), "the model is of type ConvTranspose3d, but must be a path"),
    "shapes": (lambda: opcompile.find(UNET, shapes=[1]), r"shapes is \[1\], but must name each input"),
    "sizes": (lambda: opcompile.find(UNET, shapes={"x": (1, 1, 8.0, 8, 8)}), "whole number of at least 1 for each"),
    "above": (lambda: opcompile.find(UNET, shapes={"x": (1, 1, 2**63, 8, 8)}), "whole number of at least 1 for each"),
    "text": (lambda: opcompile.find(UNET, shapes={"x": "1x1x8x8x8"}), "whole number of at least 1 for each"),
    "below": (lambda: opcompile.find(UNET, shapes={"x": (1, 1, 0, 8, 8)}), "whole number of at least 1 for each"),
    "replace": (lambda: opcompile.replace(None, "out"), "model is of type NoneType, but must be a path"),
    "nodes": (lambda: opcompile.replace(UNET, "out", nodes="node"), "nodes is of type str, but must be a list"),
    "threads": (lambda: opcompile.replace(UNET, "out", threads=2), "threads is of type int, but must be a list"),
    "seconds": (lambda: opcompile.replace(UNET, "out", seconds="1"), "seconds is '1', but must be a number"),
    "unverified": (lambda: opcompile.replace(UNET, "out", verify="no"), "verify is 'no', but must be True or False"),
    "everything": (lambda: opcompile.replace(UNET, "out", everything="no"), "everything is 'no', but must be True or"),
    "measure": (lambda: opcompile.replace(UNET, "out", measure=None), "measure is None, but must be True or False"),
    "progress": (lambda: opcompile.replace(UNET, "out", progress=3), "progress is of type int, but must be a function"),
    "plan": (lambda: opcompile.replace(UNET, "out", plan="fast"), "plan 'fast' is unknown; use best"),
    "verify": (lambda: opcompile.verify(LAYER), "a ConvTranspose3d cannot be verified; opcompile.compile and load"),
    "engines": (lambda: opcompile.verify(HERE, engines=3), "engines is of type int, but must be a list"),
    "engine": (lambda: opcompile.verify(HERE, engines="reference"), "engines is of type str, but must be a list"),
    "seed": (lambda: opcompile.verify(HERE, seed="one"), "seed is 'one', but must be a whole number of at least 0"),
    "verify seed": (lambda: opcompile.verify(HERE, seed=True), "seed is True, but must be a whole number of at least"),
    "below zero": (lambda: opcompile.replace(UNET, "out", seed=-1), "seed is -1, but must be a whole number"),
    "tuned into": (lambda: opcompile.tune(LAYER, into=3), "into is of type int, but must be a path"),
    "tracker": (lambda: opcompile.tune(LAYER, tracker=3, key="k"), "tracker 3 is not of the form HOST:PORT"),
    "a text": (lambda: opcompile.compile(str(LAYER)), "the layer is a str; read a text by ConvTranspose3d.parse first"),
    "described": (lambda: describe(str(LAYER)), "the layer is a str; read a text by"),
    "compared": (lambda: diff(str(LAYER)), "the layer is a str; read a text by"),
    "in PyTorch": (lambda: torch.words(None), "the layer is a NoneType; read a text by"),
    "in Keras": (lambda: keras.words(None), "the layer is a NoneType; read a text by"),
    "verified": (lambda: opcompile.compile(LAYER, verify="yes"), "verify is 'yes', but must be True or False"),
    "all verified": (lambda: compile_all(str(LAYER), "out", verify=1), "verify is 1, but must be True or False"),
    "no source": (lambda: compile_all(None, "out"), "source is of type NoneType, but must be a str or a path; name a"),
    "one node": (lambda: compile_all(UNET, "out", nodes="node"), "nodes is of type str, but must be a list"),
    "reported": (lambda: compile_all(UNET, "out", progress=3), "progress is of type int, but must be a function"),
    "read": (lambda: source.read(None), "source is of type NoneType, but must be a str or a path; name a model"),
    "contents": (lambda: contents(None), "directory is of type NoneType, but must be a path"),
    "weights": (lambda: files.layer_arrays(None, "a"), "path is of type NoneType, but must be a path"),
    "case": (lambda: case(None), "a case is named by a str, and this is of type NoneType"),
    "cases": (lambda: case(["k2-s2"]), "a case is named by a str, and this is of type list"),
    "bench": (lambda: bench(LAYER, seconds="a"), "seconds is 'a', but must be a number of at least 0"),
    "yes": (lambda: bench(LAYER, seconds=True), "seconds is True, but must be a number of at least 0"),
    "no time": (lambda: bench(LAYER, seconds=math.nan), "seconds is nan, but must be a number of at least 0"),
    "less": (lambda: bench(LAYER, seconds=-1), "seconds is -1, but must be a number of at least 0"),
    "bench seed": (lambda: bench(LAYER, seed=None), "seed is None, but must be a whole number of at least 0"),
    "half a seed": (lambda: bench(LAYER, seed=1.0), "seed is 1.0, but must be a whole number of at least 0"),
    "true seed": (lambda: bench(LAYER, seed=True), "seed is True, but must be a whole number of at least 0"),
    "no axis": (lambda: bench(LAYER, against=np.array("torch")), "against is of type ndarray, but must be a list"),
    "against": (lambda: bench(LAYER, against="torch"), "against is of type str, but must be a list"),
    "on a GPU": (lambda: bench_gpu(LAYER, target="cuda:sm_80", seconds=-1), "seconds is -1, but must be a number"),
    "sums": (lambda: compare(LAYER, Y, X, W, B, computed_in="foo"), "computed_in is 'foo', but sums are known for"),
    "x": (lambda: reference(LAYER, np.zeros((1, 3, 2, 2, 2)), W), r"x has shape .*, but must have \(N, 2, 2, 2, 2\)"),
    "w": (lambda: reference(LAYER, X, W[:1]), r"w has shape .*, but must have \(2, 2, 2, 2, 2\)"),
    "b": (lambda: reference(LAYER, X, W, B[:1]), r"b has shape \(1,\), but must have \(2,\)"),
    "tune seed": (lambda: opcompile.tune(LAYER, seed="a"), "seed is 'a', but must be a whole number of at least 0"),
    "tune progress": (
        lambda: opcompile.tune(LAYER, progress=3),
        "progress is of type int, but must be a function, or None",
    ),
    "load threads": (
        lambda: opcompile.load("here", threads=True),
        "threads is True, but must be a whole number from 1 to",
    ),
    "work_dir": (lambda: opcompile.tune(LAYER, work_dir=3), "work_dir is of type int, but must be a path"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_of_another_type_is_named_with_the_rule(name: str) -> None:
    call, words = WRONG[name]
    with pytest.raises(OpcompileError, match=words):
        call()


@pytest.mark.parametrize(
    ("check", "plain"),
    [
        (lambda: arguments.checked_seed(np.int64(1)), 1),
        (lambda: arguments.checked_seconds(np.float32(0.5)), 0.5),
        (lambda: arguments.checked_seconds(np.int64(2)), 2.0),
        (lambda: arguments.checked_seconds(Fraction(1, 2)), 0.5),
        (lambda: arguments.checked_flag(np.bool_(True), "verify"), True),
        (lambda: arguments.checked_list({"torch"}, "against"), ("torch",)),
        (lambda: arguments.checked_list({"torch": 1}.keys(), "against"), ("torch",)),
        (lambda: arguments.checked_list(np.array([1, 2]), "threads"), (1, 2)),
        (lambda: arguments.checked_list((name for name in ["torch"]), "against"), ("torch",)),
    ],
)
def test_what_says_the_same_is_taken_as_it(check: Callable[[], object], plain: object) -> None:
    given = check()
    assert (given, type(given)) == (plain, type(plain))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            "numpy.none",
            "needs the module numpy.none, which the installed version of numpy lacks; install opcompile with",
        ),
        ("google", "needs the package protobuf, which is missing: pip install protobuf, or install opcompile with its"),
        ("google.protobuf", "needs the package protobuf, which is missing"),
        ("a_caller_s_own", None),
        ("opcompile.none", None),
    ],
)
def test_a_module_that_is_missing(module: str, words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))  # a namespace of several distributions
    named = missing(ModuleNotFoundError(name=module))
    assert named is None if words is None else words in str(named)


def test_what_a_callback_imports_is_not_of_ours(tmp_path: Path) -> None:
    def shown(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'bars'", name="bars")

    with pytest.raises(ModuleNotFoundError, match="bars"):
        opcompile.replace(UNET, tmp_path / "out", plan="baseline", progress=shown)


@pytest.mark.parametrize(
    ("package", "imported", "call"),
    [
        ("apache-tvm", "tvm", "opcompile.compile"),
        ("apache-tvm-ffi", "tvm_ffi", "opcompile.compile"),
        ("apache-tvm", "tvm", "opcompile.tune(layer, into=sys.argv[1])"),
        ("onnx", "onnx", "opcompile.find"),
        ("onnx", "onnx", "opcompile.replace('unet.onnx', sys.argv[1])"),
    ],
)
def test_a_package_that_is_missing_is_named_as_it_is_installed(
    package: str, imported: str, call: str, tmp_path: Path
) -> None:
    code = f"""
import sys
sys.modules[{imported!r}] = None  # Python's own way to say that there is none
import opcompile
layer = opcompile.ConvTranspose3d.parse("in=1x2x2x2x2 co=2 k=2")
try:
    {call}
except opcompile.OpcompileError as error:
    print(error.exit_code, error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert f"3 this needs the package {package}, which is missing: pip install {package}," in done.stdout
