"""The report: what it asks, what it says of a right artifact, and that every kind of wrong one is caught."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from strategies import arrays

from opcompile import verify as verify_function
from opcompile.bounds import EXACT_ACTIVATIONS, SUMS, Answer, Inputs, compare_all
from opcompile.cases import CASES, case, tagged
from opcompile.errors import CallError, EngineError, VerificationError
from opcompile.golden import Golden
from opcompile.graph import export_onnx
from opcompile.packing import Packing
from opcompile.reference import by_channels, landings, linear, reference
from opcompile.spec import Activation, ConvTranspose3d
from opcompile.tensors import stored
from opcompile.verify import Report, verify

module: Any = sys.modules["opcompile.verify"]


class Fake:
    """An artifact that asks the oracle instead of a kernel, and can be bent: ``bend(call, y) -> y``."""

    def __init__(self, spec: ConvTranspose3d, directory: Path, *, weight=None, bias=None, model=None) -> None:
        self.spec, self.directory = spec, directory
        self.packing = Packing.identity(spec.w_shape)
        self.weight, self.bias, self.calls = weight, bias, []
        known = {"W": weight, "B": bias}
        self.manifest: dict[str, Any] = {
            "weights": [name for name, array in known.items() if array is not None],
            "versions": {"opcompile": "0"},
            "target": {"name": "fake"},
            "plan": {"schedule": "fake"},
        }
        self.bend = lambda call, y: y
        if self.manifest["weights"]:
            np.savez(directory / "weights.npz", **{k: v for k, v in known.items() if v is not None})
            content = (directory / "weights.npz").read_bytes()
            entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            self.manifest["files"] = {"weights.npz": entry}
        export_onnx(model or spec, directory / "model.onnx", weight=weight, bias=bias)
        x, w, b = arrays(spec, seed=9)
        y = reference(spec, x, w if weight is None else weight, b if bias is None else bias)
        indices = np.arange(0, y.size, 7)
        self.vector = Golden(x, w if weight is None else None, b if bias is None else None, indices, y.ravel()[indices])

    def golden(self) -> Golden:
        return self.vector

    def pack(self, w):
        return ("packed", w)

    def __call__(self, x, w=None, b=None, *, threads=None):
        call = {"threads": threads, "packed": isinstance(w, tuple), "own": w is None, "batch": x.shape[0], "x": x}
        self.calls.append(call)
        w = self.weight if w is None else w[1] if isinstance(w, tuple) else w
        call |= {"w": w, "b": b}
        y = reference(self.spec, x, w, self.bias if b is None and call["own"] else b)
        with np.errstate(over="ignore"):
            return self.bend(call, y.astype(np.dtype(self.spec.dtype)))


SPEC = case("k3-s2").spec


def report_on(spec: ConvTranspose3d, directory: Path, bend=None, compiled: bool = False, **kinds) -> Report:
    known = dict(zip(("weight", "bias"), arrays(spec, seed=4)[1:], strict=True)) if compiled else {}
    fake = Fake(spec, directory, **known)
    fake.bend = bend or fake.bend
    return verify(fake, **kinds)


def off_by_one(y: np.ndarray) -> np.ndarray:
    y[tuple(n // 2 for n in y.shape)] += 1
    return y


# --- a right artifact ---


def test_a_set_of_which_nothing_can_be_judged_is_no_failure_while_another_can_be(tmp_path: Path) -> None:
    """One product with a weight next to the largest number can be judged, a sum of two cannot."""
    spec = ConvTranspose3d.parse("in=1x8x3x3x3 co=2 k=2")
    weight, bias = np.full(spec.w_shape, 3e38, np.float32), np.zeros(2, np.float32)
    with np.errstate(over="ignore"):  # the test vector
        fake = Fake(spec, tmp_path, weight=weight, bias=bias)
    report = verify(fake, engines=["reference"]).require()
    judged = {row.inputs: row.check.judged for row in report.rows if row.weights == "compiled"}
    assert judged == {"normal": False, "impulse": True, "golden.npz": False}
    console = Console(width=200, record=True)
    console.print(report.table())
    shown = console.export_text()
    assert "not judged: every sum may overflow" in shown
    assert "FAIL" not in shown
    rows = tuple(row for row in report.rows if row.inputs != "impulse")
    report = replace(report, rows=rows)
    assert not report.failures
    with pytest.raises(VerificationError, match="no answer with the compiled weights can be judged"):
        report.require()


@pytest.mark.parametrize("compiled", [False, True], ids=["caller's weights", "compiled weights"])
@pytest.mark.parametrize(
    "name", ["k3-s2", "batch-dynamic-groups", "float16-channels-last", "bfloat16", "float64", "output-pad-opinfo"]
)
def test_a_right_artifact_passes_with_onnx_runtime_beside_it(name: str, compiled: bool, tmp_path: Path) -> None:
    report = report_on(case(name).spec, tmp_path, compiled=compiled)
    assert report.passed, report.failures
    assert report.require() is report
    pairs = {(row.answer.split(",")[0], row.against) for row in report.rows}
    assert pairs >= {("opcompile", "reference"), ("onnxruntime", "reference"), ("opcompile", "onnxruntime")}
    assert {row.inputs for row in report.rows} >= {"integers", "ones", "normal", "wide", "tiny", "golden.npz"}
    assert {row.weights for row in report.rows} == ({"caller", "compiled"} if compiled else {"caller"})
    reasons = {n.what: n.reason for n in report.not_asked}
    assert list(reasons) == (["onnxruntime with the caller's weights"] if compiled else [])


@pytest.mark.parametrize("c", tagged("activation"), ids=lambda c: c.name)
def test_every_activation_agrees_with_onnx_runtime(c, tmp_path: Path) -> None:
    report = report_on(c.spec, tmp_path)
    assert report.passed, report.failures
    exact = {row.check.criterion for row in report.rows if row.inputs == "integers"}
    assert exact == {"bits" if c.spec.activation.name in EXACT_ACTIVATIONS else "exact sums"}


def test_a_layer_of_zeros_passes(tmp_path: Path) -> None:
    # along D every output lies beyond the one tap
    report = report_on(ConvTranspose3d.parse("in=1x2x2x2x2 co=2 k=1x2x2 s=4 p=5:0x0:0x0:0 op=2"), tmp_path)
    assert report.passed, report.failures
    assert {row.inputs for row in report.rows} >= {"integers", "normal", "wide", "tiny"}


def test_every_call_is_made(tmp_path: Path) -> None:
    fake = Fake(case("batch-dynamic").spec, tmp_path)
    report = verify(fake)
    assert {call["batch"] for call in fake.calls} == {1, 2, 3, 5}
    assert {call["threads"] for call in fake.calls} == {*report.threads, None}
    assert len(report.threads) == 2
    assert any(call["packed"] for call in fake.calls)
    assert {row.batch for row in report.rows if row.inputs == "integers"} == {1, 2, 3}


def test_compiled_weights_are_asked_by_leaving_them_out(tmp_path: Path) -> None:
    w, b = arrays(SPEC, seed=4)[1:]
    fake = Fake(SPEC, tmp_path, weight=w, bias=b)
    assert verify(fake).passed
    assert {call["own"] for call in fake.calls} == {True, False}


def test_weights_alone_may_be_known(tmp_path: Path) -> None:
    fake = Fake(SPEC, tmp_path, weight=arrays(SPEC, seed=4)[1])
    assert verify(fake).passed


# --- wrong ones ---


BENDS = {
    "always": lambda call, y: off_by_one(y),
    "with several threads": lambda call, y: off_by_one(y) if (call["threads"] or 1) > 1 else y,
    "with packed weights": lambda call, y: off_by_one(y) if call["packed"] else y,
    "on subnormals": lambda call, y: y * 0 + 1 if 0 < np.abs(call["x"]).max() < 1e-30 else y,
    "on an impulse": lambda call, y: np.roll(y, 1, axis=-1) if (call["x"] != 0).sum() == 1 else y,
    "one element missing": lambda call, y: np.where(np.arange(y.size).reshape(y.shape) == 5, 0, y).astype(y.dtype),
    "NaN": lambda call, y: np.where(np.arange(y.size).reshape(y.shape) == 5, np.nan, y).astype(y.dtype),
}


@pytest.mark.parametrize("bend", BENDS)
def test_a_wrong_answer_is_caught(bend: str, tmp_path: Path) -> None:
    report = report_on(SPEC, tmp_path, BENDS[bend])
    assert not report.passed
    assert all(row.answer.startswith("opcompile") for row in report.failures)
    with pytest.raises(VerificationError, match=r"opcompile.* against .* on "):
        report.require()


def test_a_wrong_answer_to_the_test_vector_alone_is_caught(tmp_path: Path) -> None:
    fake = Fake(SPEC, tmp_path)
    fake.bend = lambda call, y: y + 1 if np.array_equal(call["x"], fake.vector.x) else y
    assert [(row.inputs, row.answer) for row in verify(fake).failures] == [("golden.npz", "opcompile")]


def test_wrong_compiled_weights_are_caught(tmp_path: Path) -> None:
    report = report_on(SPEC, tmp_path, lambda call, y: off_by_one(y) if call["own"] else y, compiled=True)
    assert {row.weights for row in report.failures} == {"compiled"}


@pytest.mark.parametrize("narrow", ["x", "w", "b"])
def test_a_double_that_is_read_as_float32_is_caught(narrow: str, tmp_path: Path) -> None:
    fake = Fake(case("float64").spec, tmp_path)

    def bend(call, y):
        given = {name: call[name] for name in ("x", "w", "b")}
        return reference(fake.spec, **given | {narrow: given[narrow].astype(np.float32)})

    fake.bend = bend
    failures = {row.inputs for row in verify(fake, engines=["reference"]).failures}
    # what X or B holds there are numbers of float32
    exactly = {"x": {"impulse", "alternating"}, "b": {"scattered"}}.get(narrow, set())
    assert failures - {"golden.npz"} == {"digits", "normal", "impulse", "alternating", "wide", "scattered"} - exactly


def test_about_half_of_what_is_tiny_is_subnormal() -> None:
    for name, smallest in (("float64", 2.0**-1022), ("k3-s2", 2.0**-126), ("float16", 2.0**-14)):
        spec = case(name).spec
        draw = next(q.draw for q in module.input_sets(spec, False)[1] if q.name == "tiny")
        x = np.abs(draw(spec, np.random.default_rng(0), 1)[0])
        assert x.all()
        assert 0.5 < (x < smallest).mean() < 0.8


@pytest.mark.parametrize(("act", "dtype"), [("leaky_relu:3e38", "float32"), ("elu:1e38", "float16")])
def test_what_is_beyond_the_format_of_y_is_infinite_beside_nan_too(act: str, dtype: str, tmp_path: Path) -> None:
    assert report_on(replace(SPEC, activation=Activation.parse(act), dtype=dtype), tmp_path).passed


def nan_becomes(number: float):
    return lambda call, y: np.where(np.isnan(y), number, y).astype(y.dtype) if np.isnan(call["x"]).any() else y


@pytest.mark.parametrize("act", ["none", "relu", "hard_sigmoid", "hard_tanh", "tanh", "hard_shrink"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_nan_that_becomes_a_number_and_one_that_spreads_are_caught(act: str, dtype: str, tmp_path: Path) -> None:
    spec = replace(SPEC, activation=Activation(act), dtype=dtype)
    fake = Fake(spec, tmp_path)
    assert {row.check.criterion for row in verify(fake).rows if row.inputs == "NaN"} == {"NaN"}
    assert verify(fake).passed
    spread = lambda call, y: y + np.nan if np.isnan(call["x"]).any() else y  # noqa: E731
    one = lambda call, y: np.roll(y, 1, axis=-1) if np.isnan(call["x"]).any() else y  # noqa: E731
    for bend in (nan_becomes(0), nan_becomes(np.inf), spread, one):
        fake.bend = bend
        failures = verify(fake, engines=["reference"]).failures
        assert {row.inputs for row in failures} == {"NaN"}
        check = failures[0].check
        assert check.failures
        assert np.isnan(check.actual) != np.isnan(check.expected)


def test_nan_is_put_to_an_element_that_the_seed_draws(tmp_path: Path) -> None:
    fake = Fake(SPEC, tmp_path)
    for seed in range(4):
        verify(fake, seed=seed, engines=["reference"])
    places = [np.flatnonzero(np.isnan(call["x"])).tolist() for call in fake.calls if np.isnan(call["x"]).any()]
    assert {len(place) for place in places} == {1}
    assert len({place for (place,) in places}) == 4


def test_nan_is_not_asked_of_a_large_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its report says that three input sets are asked."""
    monkeypatch.setattr(module, "_LARGE_FLOPS", 0)
    report = report_on(SPEC, tmp_path)
    assert {row.inputs for row in report.rows} == {"integers", "digits", "normal", "golden.npz"}
    assert report.rule.startswith("three input sets, because the layer is larger than")


def test_a_fourth_image_that_is_wrong_is_caught(tmp_path: Path) -> None:
    bend = lambda call, y: np.concatenate([y[:3], y[3:] + 1])  # noqa: E731
    assert {row.inputs for row in report_on(case("batch-dynamic").spec, tmp_path, bend).failures} == {"digits"}


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_batch_that_is_wrong_is_caught(batch: int, tmp_path: Path) -> None:
    bend = lambda call, y: off_by_one(y) if call["batch"] == batch else y  # noqa: E731
    assert {row.batch for row in report_on(case("batch-dynamic").spec, tmp_path, bend).failures} == {batch}


def test_a_wrong_test_vector_is_caught(tmp_path: Path) -> None:
    fake = Fake(SPEC, tmp_path)
    fake.vector.expected[3] += 1
    assert [(row.inputs, row.answer) for row in verify(fake).failures] == [("golden.npz", "golden.npz")]


def test_a_wrong_model_is_caught(tmp_path: Path) -> None:
    fake = Fake(SPEC, tmp_path, model=replace(SPEC, activation=Activation("leaky_relu")))
    pairs = {(row.answer.split(",")[0], row.against) for row in verify(fake).failures}
    assert pairs == {("onnxruntime", "reference"), ("opcompile", "onnxruntime")}


def test_a_wrong_shape_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="shape"):
        report_on(SPEC, tmp_path, lambda call, y: y[..., :-1])


# --- sums of many products, and magnitudes far apart ---


def of_digits(values: np.ndarray, digits: int) -> np.ndarray:
    """Round float32 to fewer significant binary digits."""
    lost = 24 - digits
    bits = values.astype(np.float32).view(np.uint32) + np.uint32(1 << (lost - 1))
    return (bits & np.uint32(2**32 - 2**lost)).view(np.float32)


DEEP = "in=1x512x2x2x3 co=2 k=4 s=2 p=1"  # 4096 products


@pytest.mark.parametrize("act", ["none", "relu6", "tanh"])
@pytest.mark.parametrize("narrow", ["x", "w"])
def test_factors_of_tf32_are_caught_in_a_deep_layer(narrow: str, act: str, tmp_path: Path) -> None:
    fake = Fake(ConvTranspose3d.parse(f"{DEEP} act={act}"), tmp_path)

    def bend(call, y):
        given = {name: call[name] for name in ("x", "w", "b")}
        return reference(fake.spec, **given | {narrow: of_digits(given[narrow], 11)}).astype(np.float32)

    fake.bend = bend
    failures = {row.inputs for row in verify(fake, engines=["reference"]).failures}
    assert failures - {"scattered", "wide", "impulse"} == {"digits"}


def asked(spec: ConvTranspose3d, name: str, sums: str | None = None, seed: int = 0) -> tuple[Any, Inputs]:
    question = next(q for q in module.input_sets(spec, False, sums)[1] if q.name == name)
    drawn = question.draw(spec, np.random.default_rng([seed, 1]), question.batch)
    return question, Inputs.of(spec, *(stored(spec.dtype, values) for values in drawn), grains=question.grains)


def test_a_sum_of_14_digits_is_caught_in_a_deep_layer() -> None:
    spec = ConvTranspose3d.parse(DEEP)

    def passes(name: str) -> bool:
        question, inputs = asked(spec, name)
        y = np.zeros(spec.y_shape, np.float32)
        for (reads, lands), tap in zip(landings(spec), np.ndindex(4, 4, 4), strict=True):
            for c in range(512):
                products = inputs.x[0, c][reads] * inputs.w[(c, slice(None), *tap)].reshape(-1, 1, 1, 1)
                at = (0, slice(None), *lands)
                y[at] = of_digits(y[at] + products, 14)
        y += by_channels(spec, inputs.b)
        pair = ("actual", "reference")
        return compare_all(inputs, {"actual": Answer(y)}, question.exact, [pair])[pair].passed

    assert passes("normal")
    assert not passes("digits")


# Whose tensors are small.
SMALL = [c for c in CASES if c.spec.flops <= 2**26]


@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("c", SMALL, ids=lambda c: c.name)
def test_digits_are_exact_in_small_cases_for_all_sums(c, sums: str) -> None:
    if sums in ("float64", "float32"):
        sums = c.spec.sum_dtype
    question, inputs = asked(c.spec, "digits", sums)
    assert inputs.sums_exactly(SUMS[sums])
    assert question.alone == (c.spec.dtype == "float64")


def test_no_output_reads_two_elements_that_are_apart() -> None:
    for c in SMALL:
        chosen, _ = module._apart(c.spec, np.random.default_rng(0), c.spec.batch or 2)
        assert linear(c.spec, chosen, np.ones(c.spec.w_shape)).max() <= 1, c.name


MAGNITUDES = {
    "large": ("float32", "none", lambda y: np.where(np.abs(y) > 1e9, y * 1.1, y)),
    "large, of float16": ("float16", "none", lambda y: np.where(np.abs(y) > 600, y * np.float16(1.1), y)),
    "infinities": ("float32", "none", lambda y: np.clip(y, -3.4028234e38, 3.4028234e38)),
    "infinities of float16": ("float16", "none", lambda y: np.clip(y, -65504, 65504)),
    "small": ("float32", "tanh", lambda y: np.where(np.abs(y) < 1e-4, 0, y)),
}


@pytest.mark.parametrize("name", MAGNITUDES)
def test_a_magnitude_that_is_wrong_is_caught(name: str, tmp_path: Path) -> None:
    dtype, act, wrong = MAGNITUDES[name]
    spec = ConvTranspose3d.parse(f"in=1x4x3x4x5 co=4 k=3 s=2 dtype={dtype} act={act}")
    fake = Fake(spec, tmp_path)
    assert verify(fake).passed
    fake.bend = lambda call, y: wrong(y).astype(y.dtype)
    assert not verify(fake, engines=["reference"]).passed


def test_hard_shrink_that_keeps_one_half_is_caught(tmp_path: Path) -> None:
    spec = replace(SPEC, activation=Activation("hard_shrink"))

    def bend(call, y):
        z = reference(replace(spec, activation=Activation("none")), call["x"], call["w"], call["b"])
        return np.where(np.abs(z) < 0.5, 0, z).astype(y.dtype)

    assert {row.inputs for row in report_on(spec, tmp_path, bend, engines=["reference"]).failures} == {"integers"}


# --- those who cannot be asked ---


def test_a_missing_onnx_runtime_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(SPEC, tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = verify(fake)
    assert report.passed
    assert [n.what for n in report.not_asked] == ["onnxruntime"]
    assert "not installed" in report.not_asked[0].reason
    assert {row.against for row in report.rows} == {"reference"}


def test_a_refusal_is_listed_in_the_engine_s_words(tmp_path: Path) -> None:
    fake = Fake(SPEC, tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    report = verify(fake)
    assert report.passed
    assert report.not_asked[0].what == "onnxruntime"
    assert "InvalidProtobuf" in report.not_asked[0].reason
    (tmp_path / "model.onnx").unlink()
    assert "no model.onnx" in verify(fake).not_asked[0].reason


def test_a_model_of_another_shape_refuses_when_run(tmp_path: Path) -> None:
    report = verify(Fake(SPEC, tmp_path, model=case("k2-s2").spec))
    assert report.not_asked[0].what == "onnxruntime"
    assert "invalid dimensions for input: W" in report.not_asked[0].reason
    assert {row.against for row in report.rows} == {"reference"}


def test_an_artifact_that_cannot_run_here_is_not_verified(tmp_path: Path) -> None:
    def bend(call, y):
        raise EngineError("there is no such device here")

    report = report_on(SPEC, tmp_path, bend)
    assert not report.passed
    assert report.not_asked[-1].reason == "there is no such device here"
    with pytest.raises(VerificationError, match=r"nothing was verified.*no such device"):
        report.require()


def test_engines_are_chosen_by_name(tmp_path: Path) -> None:
    fake = Fake(SPEC, tmp_path)
    assert {row.against for row in verify(fake, engines=("reference",)).rows} == {"reference"}
    assert {row.against for row in verify(fake, engines=("onnxruntime",)).rows} == {"onnxruntime"}
    with pytest.raises(CallError, match=r"torch.*reference, onnxruntime"):
        verify(fake, engines=("torch",))


def test_more_products_than_integers_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_largest_integer", lambda spec: 0)
    report = report_on(SPEC, tmp_path)
    assert report.passed
    assert [n.what for n in report.not_asked] == ["integers"]
    assert "integers" not in {row.inputs for row in report.rows}


# --- which questions are asked ---


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_integers_are_exact_in_every_case(c) -> None:
    most = module._largest_integer(c.spec)
    assert most >= 1
    assert c.spec.terms * most**2 + most < 2**24


def test_large_layers_are_asked_three_sets() -> None:
    for c in CASES:
        rule, questions = module.input_sets(c.spec, False)
        large = rule.startswith("three input sets")
        assert large == (len({q.name for q in questions}) == 3), c.name
        assert large or "large" not in c.tags
        assert {q.exact for q in questions} == {True, False}


def test_the_seed_decides(tmp_path: Path) -> None:
    fake = Fake(SPEC, tmp_path)
    first, again, other = verify(fake), verify(fake), verify(fake, seed=1)
    assert first.rows == again.rows
    assert first.rows != other.rows


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2**31))
def test_unpacking_undoes_packing(c: int, m: int, k: int, lanes: int, seed: int) -> None:
    padded = (c, -(-m // lanes) * lanes, k, 1, k)
    packing = Packing(padded, (c, padded[1] // lanes, lanes, *padded[2:]), (1, 3, 4, 5, 0, 2))
    w = np.random.default_rng(seed).standard_normal((c, m, k, 1, k))
    np.testing.assert_array_equal(module._unpacked(packing, packing(w), w.shape), w)


# --- the report itself ---


def test_the_report_is_plain_data_with_its_origin(tmp_path: Path) -> None:
    report = report_on(SPEC, tmp_path, BENDS["NaN"])
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["passed"] is False
    assert found["spec"] == str(SPEC)
    assert found["seed"] == 0
    assert found["versions"].keys() >= {"numpy", "onnxruntime", "opcompile"}
    assert found["date"].endswith("+00:00")
    assert len(found["rows"]) == len(report.rows)
    assert found["rows"][0]["check"].keys() >= {"criterion", "worst", "bound", "index", "computed_in", "passed"}


def test_the_table_tells_all(tmp_path: Path) -> None:
    report = report_on(SPEC, tmp_path, BENDS["with packed weights"], compiled=True)
    text = io.StringIO()
    Console(file=text, width=200).print(report.table())
    for words in (
        "FAIL (1 of 2880)",
        "pass",
        "packed weights",
        "1 thread",
        "not asked",
        "seed 0",
        "bits",
        str(SPEC)[:30],
    ):
        assert words in text.getvalue()


def test_the_package_offers_it() -> None:
    assert verify_function is verify
