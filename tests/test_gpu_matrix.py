"""Matrix instructions: chosen where they pay, right to the last bit on integers, simulated as warps execute them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gpu_kernels import CUDA, METAL, SIMDGROUP, TF32, cut, lowered, simulated
from kernels import integers, reals
from test_gpu_table import assert_limits

from opcompile import artifact
from opcompile.bounds import Answer, Inputs, bounds, compare, compare_at
from opcompile.cases import case
from opcompile.describe import describe
from opcompile.errors import CallError, VerificationError
from opcompile.gpus import Language, gpu_names, gpu_target
from opcompile.gradients.gradient import Gradient
from opcompile.gradients.lower_gpu import choose as choose_derivative
from opcompile.launch import Launch
from opcompile.lower import Plan
from opcompile.lower_gpu import LoweredGpu, choose, emitted
from opcompile.reference import reference
from opcompile.simulate import Simulated, Simulator
from opcompile.spec import ConvTranspose3d
from opcompile.verify import verify
from schedules import matrix
from schedules.gpu import GpuEstimate, baseline, candidates

pytestmark = pytest.mark.usefixtures("headers_at_hand")

# Ragged channels and positions in all of them; two phases where one pair of blocks a phase would take long.
LAYERS = {
    "k2 s2, one product for all phases": "in=1x32x3x3x5 co=24 k=2 s=2 dtype=float16",
    "k3 s2, bfloat16": "in=1x32x2x3x6 co=20 k=1x1x3 s=1x1x2 p=0x0x1 op=0x0x1 dtype=bfloat16",
    "k4 s2, groups, open batch, channels last": (
        "in=Nx64x2x3x5 co=40 k=1x1x4 s=1x1x2 p=0x0x1 g=2 act=relu dtype=float16 layout=NDHWC"
    ),
    "k3, no bias, gelu": "in=2x16x3x4x5 co=16 k=3x1x3 p=1x0x1 bias=0 act=gelu dtype=bfloat16",
}
WHOLE = {
    "k3 s2": "in=1x48x3x4x5 co=40 k=3 s=2 p=1 op=1 dtype=float16",
    "k4 s2, groups": "in=Nx64x2x3x5 co=48 k=4 s=2 p=1 g=2 act=relu dtype=bfloat16 layout=NDHWC",
    "every axis another": "in=1x32x2x4x6 co=20 k=3x2x4 s=2x2x3 d=1x1x2 dtype=float16 layout=NDHWC",
    "large enough for every warp": "in=1x64x4x8x9 co=80 k=2 s=2 dtype=bfloat16",
}


# Where the name of the target asks for them: the instruction, and what a report calls it.
ASKED_FOR = {
    "TF32": (TF32, "float32", "nvcuda::wmma::mma_sync", "TF32 tensor cores"),
    "simdgroup, float16": (SIMDGROUP, "float16", "simdgroup_multiply_accumulate", "simdgroup matrices"),
    "simdgroup, float32": (SIMDGROUP, "float32", "simdgroup_multiply_accumulate", "simdgroup matrices"),
}


def of_matrix(spec: ConvTranspose3d, target: Any = CUDA) -> list[GpuEstimate]:
    return [e for e in candidates(spec, target.gpu) if e.tiles.family == "matrix"]


def forms(spec: ConvTranspose3d, target: Any = CUDA) -> list[GpuEstimate]:
    found = of_matrix(spec, target)
    of_each = {
        (t.threads_m > 1, t.threads_q > 1, t.tile_m > 16, t.tile_q > 16, t.apart): e for e in found for t in [e.tiles]
    }
    assert len({e.tiles.tile_q for e in of_each.values()}) > 1
    return list(of_each.values())


def check(
    spec: ConvTranspose3d,
    estimate: GpuEstimate,
    target: Any = CUDA,
    instruction: str = "mma.sync.aligned.m16n8k16",
    computed_in: str = "tensor cores",
) -> None:
    kernel = lowered(spec, target, estimate.tiles)
    assert_limits(kernel)
    assert instruction in kernel.source
    assert kernel.launch.shared_bytes == estimate.shared
    run = simulated(kernel)
    x, w, b = integers(spec)
    compare(spec, run(x, w, b), x, w, b, exact=True, computed_in=computed_in).require()
    x, w, b = reals(spec)
    compare(spec, run(x, w, b), x, w, b, computed_in=computed_in).require()


def asked_for(unit: str, text: str) -> tuple[ConvTranspose3d, Any, str, str]:
    """The layer in the type of ``unit``, its target, the instruction, and its name in reports."""
    target, dtype, instruction, name = ASKED_FOR[unit]
    return replace(ConvTranspose3d.parse(text), dtype=dtype), target, instruction, name


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_exact_on_integers_and_within_the_bound_on_reals(kind: str) -> None:
    spec = ConvTranspose3d.parse(LAYERS[kind])
    check(spec, of_matrix(spec)[0])


@pytest.mark.parametrize("kind", [*LAYERS][:3])
@pytest.mark.parametrize("unit", ASKED_FOR)
def test_so_they_are_where_a_target_asks_for_it(unit: str, kind: str) -> None:
    spec, target, *words = asked_for(unit, LAYERS[kind])
    check(spec, of_matrix(spec, target)[0], target, *words)


@pytest.mark.gpu_table
@pytest.mark.parametrize("kind", WHOLE)
def test_larger_layers_are_too(kind: str) -> None:
    spec = ConvTranspose3d.parse(WHOLE[kind])
    check(spec, of_matrix(spec)[0])


@pytest.mark.gpu_table
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("unit", ASKED_FOR)
def test_larger_layers_are_where_a_target_asks_for_it(unit: str, kind: str) -> None:
    spec, target, *words = asked_for(unit, WHOLE[kind])
    check(spec, of_matrix(spec, target)[0], target, *words)


@pytest.mark.gpu_table
@pytest.mark.parametrize(
    ("target", "name"),
    [(TF32, "L05-nnunet-up5"), (TF32, "L11-basicunet-last"), (TF32, "L24-psmnet-conv5")]
    + [(SIMDGROUP, name) for name in ("L03-nnunet-up3", "L16-segresnet-up4", "L24-psmnet-conv5")],
    ids=lambda value: getattr(value, "name", value),
)
def test_real_layers_are_right_in_what_a_flag_chooses(target: Any, name: str) -> None:
    spec = case(name).spec
    estimate = baseline(spec, target.gpu)
    assert estimate.tiles.family == "matrix"
    words = next(words for other, _, *words in ASKED_FOR.values() if other is target)
    check(cut(spec, 2**23), estimate, target, *words)


FORMS = ["in=1x32x3x5x7 co=72 k=2 s=2 dtype=float16", LAYERS["k3 s2, bfloat16"]]


@pytest.mark.gpu_table
@pytest.mark.parametrize("text", FORMS)
def test_every_form_of_tiles_is_right(text: str) -> None:
    spec = ConvTranspose3d.parse(text)
    for estimate in forms(spec):
        check(spec, estimate)


@pytest.mark.gpu_table
@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("unit", ASKED_FOR)
def test_every_form_of_tiles_is_right_where_a_target_asks_for_it(unit: str, text: str) -> None:
    spec, target, *words = asked_for(unit, text)
    for estimate in forms(spec, target):
        check(spec, estimate, target, *words)


# --- how factors come to shared memory ---


def with_long_rows(spec: ConvTranspose3d, target: Any) -> LoweredGpu:
    """A kernel whose threads copy eight channels each."""
    tiles = next(e.tiles for e in of_matrix(spec, target) if (e.tiles.chunk, e.tiles.threads_m) == (32, 2))
    return lowered(spec, target, tiles)


@pytest.mark.parametrize(
    ("target", "dtype", "vector"),
    [
        (CUDA, "float16", "uint4"),
        (CUDA, "bfloat16", "uint4"),
        (TF32, "float32", "float4"),
        (SIMDGROUP, "float16", "half4"),
        (SIMDGROUP, "float32", "float4"),
    ],
)
@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC"])
def test_factors_come_to_shared_memory_in_vectors(target: Any, dtype: str, vector: str, layout: Any) -> None:
    text = "in=1x64x4x8x8 co=64 k=1x3x3 s=1x2x2 p=0x1x1 op=0x1x1"
    spec = replace(ConvTranspose3d.parse(text), dtype=dtype, layout=layout)
    source = with_long_rows(spec, target).source
    stored = re.findall(r"^ *(.*(?:columns|W)_shared(?:_ptr)?\b.*) = .*;$", source, re.M)
    assert {name for name in ("columns", "W") for line in stored if f"{name}_shared" in line} == {"columns", "W"}
    assert all(f"{vector}*)(" in line for line in stored)
    # side by side in memory too, where channels are last
    assert (re.search(rf"{vector}\*\)\(X(?:_ptr)?\b", source) is not None) == (layout == "NDHWC")


@pytest.mark.parametrize(("target", "dtype"), [(CUDA, "float16"), (CUDA, "bfloat16"), (TF32, "float32")])
def test_rows_in_shared_memory_begin_in_different_banks(target: Any, dtype: str) -> None:
    """A warp reads 16 bytes of eight rows at a time, or an element each of eight positions and four channels."""
    spec = replace(ConvTranspose3d.parse("in=1x64x4x8x8 co=64 k=1x3x3 s=1x2x2 p=0x1x1 op=0x1x1"), dtype=dtype)
    source = with_long_rows(spec, target).source
    rows = {name: int(row) for name, row in re.findall(r"\(&\((\w+)_shared_ptr\[.*\]\)\)\)?, (\d+)", source)}
    x, w = rows["columns"], rows["W"]
    if dtype == "float32":
        places = [{(x * position + channel) % 32 for position in range(8) for channel in range(4)}]
        places += [{(w * channel + row) % 32 for row in range(8) for channel in range(4)}]
        assert [len(banks) for banks in places] == [32, 32]
    else:
        assert all(len({row * 2 * i % 128 // 16 for i in range(8)}) == 8 for row in (x, w))


@pytest.mark.parametrize("text", ["in=1x64x2x3x8 co=32 k=1x1x4 s=1x1x2 d=1x1x2", "in=1x32x2x2x3 co=24 k=3 s=2 d=2"])
def test_where_phases_have_no_taps_what_is_declared_is_counted(text: str) -> None:
    spec = ConvTranspose3d.parse(f"{text} dtype=float16")
    estimates = [*of_matrix(spec)[:2], baseline(spec, CUDA.gpu)]
    for estimate in estimates:
        assert lowered(spec, CUDA, estimate.tiles).launch.shared_bytes == estimate.shared


def test_an_open_batch_of_simdgroups_can_be_simulated() -> None:
    spec = ConvTranspose3d.parse("in=Nx32x1x4x8 co=16 k=1x1x2 s=1x1x2 dtype=float16")
    words = next(words for other, _, *words in ASKED_FOR.values() if other is SIMDGROUP)
    check(spec, of_matrix(spec, SIMDGROUP)[0], SIMDGROUP, *words)


# --- where they are chosen ---


@pytest.mark.parametrize("name", ["L15-segresnet-up1", "L21-videogpt-convt1", "L31-monoscene-nyu"])
def test_long_sums_take_more_channels_at_a_time_or_more_positions_a_warp(name: str) -> None:
    """As the tables of decision 46 have it: a block waits for each chunk, and loads of matrices take longest."""
    tiles = baseline(replace(case(name).spec, dtype="float16"), CUDA.gpu).tiles
    assert tiles.chunk > 32 or tiles.tile_q > 16


@pytest.mark.parametrize("name", ["L04-nnunet-up4", "L24-psmnet-conv5", "L21-videogpt-convt1"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_real_layers_of_16_bits_use_them(name: str, dtype: str) -> None:
    spec = replace(case(name).spec, dtype=dtype)
    assert baseline(spec, CUDA.gpu).tiles.family == "matrix"
    assert baseline(spec, METAL.gpu).tiles.family != "matrix"
    assert baseline(replace(spec, dtype="float32"), CUDA.gpu).tiles.family != "matrix"


def test_one_text_for_several_devices_uses_what_all_of_them_have() -> None:
    spec = ConvTranspose3d.parse("in=1x64x16x16x16 co=64 k=2 s=2 dtype=bfloat16")
    assert not of_matrix(spec, gpu_target("cuda:sm_75"))
    assert not of_matrix(spec, gpu_target("cuda:sm_80+sm_75"))
    assert of_matrix(spec, gpu_target("cuda:sm_80+sm_90"))
    assert of_matrix(replace(spec, dtype="float16"), gpu_target("cuda:sm_80+sm_75"))


@pytest.mark.parametrize(
    "change",
    ["in=1x24x8x8x8 co=32 k=2 s=2", "in=1x32x8x8x8 co=8 k=2 s=2", "in=1x64x8x8x8 co=64 k=2 s=2 g=8"],
)
def test_what_does_not_fill_a_fragment_is_no_candidate(change: str) -> None:
    assert not of_matrix(ConvTranspose3d.parse(f"{change} dtype=float16"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((n, "float16") for n in gpu_names() if n.startswith("cuda")),
        *((f"{n}+tf32", "float32") for n in gpu_names() if n.startswith("cuda") and n != "cuda:sm_75"),
        *((f"{n}+simdgroup", t) for n in gpu_names() if n.startswith("metal") for t in ("float16", "float32")),
    ],
)
def test_all_candidates_keep_to_the_limits_of_the_device(name: str, dtype: str) -> None:
    gpu = gpu_target(name).gpu
    for layer in ("L08-monai-unet-up3", "L24-psmnet-conv5"):
        spec = replace(case(layer).spec, dtype=dtype)
        found = of_matrix(spec, gpu_target(name))
        assert found
        for e in found:
            assert e.tiles.threads <= gpu.threads
            assert e.shared <= gpu.shared
            assert e.registers * e.tiles.threads <= gpu.register_file


# --- flags ---


@pytest.mark.parametrize("name", ["L04-nnunet-up4", "L24-psmnet-conv5", "L21-videogpt-convt1"])
def test_real_layers_use_what_a_flag_allows_and_only_then(name: str) -> None:
    spec = case(name).spec
    assert spec.dtype == "float32"
    for target in (TF32, SIMDGROUP):
        without = gpu_target(target.name.rpartition("+")[0])
        assert not of_matrix(spec, without)
        assert of_matrix(spec, target)
    assert choose(spec, TF32, "baseline")[1].schedule == "matrix"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_tf32_changes_nothing_for_other_types_and_that_is_said(dtype: str) -> None:
    spec = ConvTranspose3d.parse(f"in=1x64x8x8x8 co=64 k=2 s=2 dtype={dtype}")
    without = gpu_target("cuda:sm_80")
    tiles, plan = choose(spec, TF32, "baseline")
    assert (tiles.family == "matrix") == (dtype != "float64")
    assert tiles == choose(spec, without, "baseline")[0]
    assert lowered(spec, TF32, tiles).source == lowered(spec, without, tiles).source
    assert plan.why[-1] == f"+tf32 changes nothing: it is for float32, and this layer has {dtype}"


@pytest.mark.parametrize(
    ("text", "target", "reason"),
    [
        ("in=1x24x8x8x8 co=32 k=2 s=2", TF32, "matrices need a multiple of 16 input channels"),
        ("in=1x32x8x8x8 co=8 k=2 s=2", SIMDGROUP, "and 16 or more output channels"),
        ("in=1x16x4x4x4 co=16 k=3", SIMDGROUP, "other tiles come out faster"),
    ],
)
def test_where_a_flag_changes_nothing_the_reason_is_said(text: str, target: Any, reason: str) -> None:
    spec = ConvTranspose3d.parse(text)
    tiles, plan = choose(spec, target, "baseline")
    assert tiles == choose(spec, gpu_target(target.name.rpartition("+")[0]), "baseline")[0]
    assert f"+{target.flags[0]} changes nothing, and all products are float32: " in plan.why[-1]
    assert reason in plan.why[-1]
    assert describe(spec, target.name, "baseline").summed_in == "float32"


def test_derivatives_have_no_matrices_and_say_so() -> None:
    _, plan = choose_derivative(Gradient(case("k3-s2").spec, "x"), TF32, "baseline")
    assert plan.why[-1] == "+tf32 changes nothing: derivatives use no matrix instructions"


def test_a_description_says_what_products_are_summed_in() -> None:
    found = describe(case("L24-psmnet-conv5").spec, "cuda:sm_80+tf32", "baseline")
    assert found.to_json()["summed_in"] == "TF32 tensor cores"
    assert found.target == "cuda:sm_80+tf32"
    assert any("rounded to TF32 (11 significant bits)" in line for line in found.plan.why)


def test_an_artifact_says_what_was_asked_for_and_is_judged_by_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("opcompile.artifact_gpu.importlib.util.find_spec", lambda _: None)  # the text alone
    spec = ConvTranspose3d.parse("in=1x64x2x4x4 co=32 k=2 s=2")
    tiles = of_matrix(spec, SIMDGROUP)[0].tiles
    plan = Plan("baseline", tiles.family, asdict(tiles), (), None)
    place = artifact.write(emitted(spec, SIMDGROUP, tiles, plan), tmp_path / "a")
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["target"]["name"] == "metal:apple-m2+simdgroup"
    assert manifest["target"]["features"] == ["simdgroup"]
    report = verify(Simulated(place), engines=("reference",)).require()
    ours = {row.check.computed_in for row in report.rows if row.answer.startswith("opcompile")}
    assert ours == {"simdgroup matrices"}


# --- how they sum ---


def test_the_bound_holds_for_sums_that_are_cut_off() -> None:
    """The largest product first, then many that a sum of 24 bits loses one by one, where rounding would keep half."""
    spec = ConvTranspose3d.parse("in=1x2048x1x1x1 co=1 k=1 bias=0")
    x, w = np.ones(spec.x_shape, "float32"), np.ones(spec.w_shape, "float32")
    x.reshape(-1)[1:] = 2.0**-23 * (1 - 2.0**-24)
    y, exact = np.ones(spec.y_shape, "float32"), reference(spec, x, w, None)
    assert not compare(spec, y, x, w).passed
    compare(spec, y, x, w, computed_in="tensor cores").require()
    allowed = [bounds(spec, x, w, computed_in=sums).item() for sums in ("float32", "tensor cores")]
    assert allowed[0] < abs(exact - 1).item() < allowed[1] < 3.01 * allowed[0]


# --- TF32 ---


def rounded_to_tf32(values: Any) -> Any:
    """To eleven significant bits, ties away from zero."""
    fraction, exponent = np.frexp(values.astype("float64"))
    away = np.trunc(np.abs(fraction) * 2**11 + 0.5)
    return np.ldexp(np.copysign(away, fraction), exponent - 11).astype("float32")


def test_tf32_rounds_the_factors_and_nothing_else() -> None:
    """Beyond the bound of float32; that of rounded factors holds it, and knows them rounded beforehand."""
    spec, target, *_, name = asked_for("TF32", LAYERS["k2 s2, one product for all phases"])
    run = simulated(lowered(spec, target, of_matrix(spec, target)[0].tiles))
    x, w, b = reals(spec)
    y = run(x, w, b)
    for sums in ("float32", "tensor cores"):
        assert not compare(spec, y, x, w, b, computed_in=sums).passed
    compare(spec, y, x, w, b, computed_in=name).require()
    near = [rounded_to_tf32(values) for values in (x, w)]
    assert not np.array_equal(near[0], x)
    compare(spec, y, *near, b, computed_in="tensor cores").require()
    np.testing.assert_array_equal(run(*near, b), y)


def test_the_bound_of_tf32_is_reached() -> None:
    """Both factors half way between two numbers, one after the other: each product is off by almost two units."""
    spec = ConvTranspose3d.parse("in=1x64x1x1x1 co=16 k=1 bias=0")
    x, w = (np.full(shape, 1 + 2.0**-11, "float32") for shape in (spec.x_shape, spec.w_shape))
    y = np.full(spec.y_shape, 64 * (1 + 2.0**-10) ** 2, "float32")
    check = compare(spec, y, x, w, computed_in="TF32 tensor cores").require()
    assert check.worst > 0.95
    assert not compare(spec, 1.0001 * y, x, w, computed_in="TF32 tensor cores").passed


def test_integers_are_exact_in_tf32_up_to_eleven_bits() -> None:
    spec = ConvTranspose3d.parse("in=1x16x1x1x1 co=16 k=1 bias=0")
    w = np.ones(spec.w_shape, "float32")
    for value, exact in ((2048.0, True), (2049.0, False)):
        x = np.full(spec.x_shape, value, "float32")
        allowed = bounds(spec, x, w, computed_in="TF32 tensor cores")
        assert (allowed == 0).all() == exact
        assert (bounds(spec, x, w, computed_in="tensor cores") == 0).all()
        if not exact:
            with pytest.raises(CallError, match=r"2\^11"):
                compare(spec, np.zeros(spec.y_shape), x, w, computed_in="TF32 tensor cores", exact=True)


def test_a_factor_that_tf32_rounds_to_infinity_has_no_bound() -> None:
    spec = ConvTranspose3d.parse("in=1x16x1x1x1 co=16 k=1 bias=0")
    x, w = np.full(spec.x_shape, np.finfo("float32").max, "float32"), np.full(spec.w_shape, 2.0**-30, "float32")
    assert np.isinf(bounds(spec, x, w, computed_in="TF32 tensor cores")).all()
    assert np.isfinite(bounds(spec, x, w, computed_in="tensor cores")).all()


def test_answers_at_some_elements_are_judged_each_by_what_it_summed_in() -> None:
    """Integers that are exact in float32 and not in TF32."""
    spec = ConvTranspose3d.parse("in=1x16x1x1x1 co=16 k=1 bias=0")
    x, w = np.full(spec.x_shape, 2049.0, "float32"), np.ones(spec.w_shape, "float32")
    exact = reference(spec, x, w, None).reshape(-1)
    off = exact + 16.0
    answers = [Answer(y, sums) for y in (exact, off) for sums in ("float32", "TF32 tensor cores")]
    found = compare_at(Inputs.of(spec, x, w, None), np.arange(16), answers)
    assert [check.passed for check in found] == [True, True, False, True]


@pytest.mark.gpu_table
@pytest.mark.parametrize("line", ["held[at].x[half * f.num_elements + i]", "a.x[i]"])
def test_a_factor_that_was_not_rounded_is_noticed(line: str) -> None:
    spec, target, *_ = asked_for("TF32", LAYERS["k2 s2, one product for all phases"])
    kernel = lowered(spec, target, of_matrix(spec, target)[0].tiles)
    bent = re.sub(rf"({re.escape(line)} = )nvcuda::wmma::__float_to_tf32\((\w\.x\[i\])\);", r"\1\2;", kernel.source)
    assert bent != kernel.source
    with pytest.raises(VerificationError, match="not rounded to TF32"):
        simulated(replace(kernel, source=bent))(*reals(spec))


def test_the_conversion_rounds_to_nearest_and_ties_away_from_zero() -> None:
    given = [1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-11 - 2.0**-23, 1 + 3 * 2.0**-11, np.finfo("float32").max, 2.0**-140]
    expected = [1 + 2.0**-10, -1 - 2.0**-10, 1, 1 + 2.0**-9, np.inf, 0]
    given, expected = ([*values, np.inf, 0.0] for values in (given, expected))
    source = (
        'extern "C" __global__ void __launch_bounds__(8) k(float* __restrict__ X_ptr, float* __restrict__ output_ptr) '
        "{\n  int i = threadIdx.x;\n  output_ptr[i] = nvcuda::wmma::__float_to_tf32(X_ptr[i]);\n}\n"
    )
    y = np.zeros((1, 8), "float32")
    Simulator(source, "cuda", Launch.of(source, "cuda", 1, (8,))).run({"x": np.array(given, "float32")}, y, 1)
    np.testing.assert_array_equal(y[0], np.array(expected, "float32"))


# --- the simulation ---

HEAD = """
  __shared__ alignas(64) half a[1024];
  __shared__ alignas(64) float c[256];
  int i = threadIdx.x + threadIdx.y * 32;
  for (int j = i; j < 1024; j += 64) a[j] = X_ptr[j % 512];
  __syncthreads();
  nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, half, nvcuda::wmma::col_major> left[1];
  nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, half, nvcuda::wmma::row_major> right[1];
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum[1];
"""
LOAD = """
  nvcuda::wmma::fill_fragment(sum[0], 0.000000e+00f);
  nvcuda::wmma::load_matrix_sync(left[0], (&(a[0])), 16);
  nvcuda::wmma::load_matrix_sync(right[0], (&(a[256])), 16);
"""
MULTIPLY = "nvcuda::wmma::mma_sync(sum[0], left[0], right[0], sum[0]);\n"
STORE = """
  if (threadIdx.y == 0) nvcuda::wmma::store_matrix_sync((&(c[0])), sum[0], 16, nvcuda::wmma::mem_row_major);
  __syncthreads();
  for (int j = i; j < 256; j += 64) output_ptr[j] = c[j];
"""


def run(body: str) -> Any:
    """Run ``body`` with two warps on X, two 16x16 matrices of small integers; return X and the 16x16 sums."""
    source = (
        'extern "C" __global__ void __launch_bounds__(64) k(half* __restrict__ X_ptr, float* __restrict__ output_ptr) '
        f"{{{HEAD}{body}}}\n"
    )
    return launched(source, "cuda", 16)


def launched(source: str, language: Language, side: int) -> Any:
    """Run a kernel with two warps on X, two matrices of small integers with so many rows; return X and the sums."""
    x = np.random.default_rng(0).integers(-4, 5, (2, side, side)).astype("float16")
    y = np.zeros((1, side**2), "float32")
    Simulator(source, language, Launch.of(source, language, 1, (32, 2))).run({"x": x}, y, 1)
    return x.astype("float32"), y.reshape(side, side)


def test_a_warp_multiplies_matrices() -> None:
    (a, b), y = run(LOAD + MULTIPLY + MULTIPLY + STORE)
    np.testing.assert_array_equal(y, 2 * a.T @ b)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (LOAD + "if (threadIdx.x < 16) " + MULTIPLY + STORE, "divergent"),
        (LOAD.replace("a[0]", "a[threadIdx.x & 16]") + MULTIPLY + STORE, "another matrix"),
        (LOAD.replace("a[0]", "a[8]") + MULTIPLY + STORE, "not aligned"),
        (LOAD.replace("a[256]", "a[1008]") + MULTIPLY + STORE, "shared memory a"),
    ],
)
def test_what_a_warp_must_not_do_is_said(body: str, words: str) -> None:
    with pytest.raises(VerificationError, match=re.escape(words)):
        run(body)


def test_warps_that_do_not_wait_for_each_other_are_a_race() -> None:
    """Each runs as far as it comes alone: a matrix instruction keeps a warp together, and no two warps."""
    late = "if (threadIdx.y == 1) nvcuda::wmma::store_matrix_sync((float*)a, sum[0], 16, nvcuda::wmma::mem_row_major);"
    with pytest.raises(VerificationError, match="race"):
        run(LOAD + MULTIPLY + late + STORE)


def test_a_fragment_that_was_not_filled_shows() -> None:
    without = LOAD.replace("nvcuda::wmma::fill_fragment(sum[0], 0.000000e+00f);", "")
    assert np.isnan(run(without + MULTIPLY + STORE)[1]).all()


def test_shared_memory_that_was_not_written_shows_through_a_product() -> None:
    spec = ConvTranspose3d.parse(LAYERS["k2 s2, one product for all phases"])
    kernel = lowered(spec, CUDA, of_matrix(spec)[0].tiles)
    bent = re.sub(r"(?m)^.*\(uint4\*\).*W_shared.*W_ptr.*$", "", kernel.source, count=1)
    assert bent != kernel.source
    x, w, b = integers(spec)
    assert np.isnan(simulated(replace(kernel, source=bent))(x, w, b).astype(ml_dtypes.bfloat16)).any()


# --- PTX's, simulated: which thread has what is in its manual, and here ---


def warp(body: str, x: Any, count: int) -> Any:
    """Run ``body`` in one warp on two matrices in shared memory ``a``, row by row; return what it writes to ``y``."""
    source = (
        'extern "C" __global__ void __launch_bounds__(32) k(half* __restrict__ X_ptr, float* __restrict__ output_ptr) '
        "{\n"
        "  __shared__ alignas(64) half a[512];\n  int lane = threadIdx.x, group = lane >> 2, place = lane % 4;\n"
        "  for (int j = lane; j < 512; j += 32) a[j] = X_ptr[j];\n  __syncthreads();\n"
        f"  float *y = output_ptr;\n{body}}}\n"
    )
    y = np.zeros((1, count), "float32")
    Simulator(source, "cuda", Launch.of(source, "cuda", 1, (32,))).run({"x": x.astype("float16")}, y, 1)
    return y[0]


# Rows of the four matrices of 8x8 of a 16x16 one, that of thread 8 i + r being row r of matrix i.
ROWS = "a + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8"


@pytest.mark.parametrize("turned", [False, True])
def test_a_thread_gets_neighbours_in_rows_or_in_columns(turned: bool) -> None:
    x = np.arange(512).reshape(1, 2, 16, 16)
    load = "opcompile_ldmatrix_trans" if turned else "opcompile_ldmatrix"
    show = "for (int i = 0; i < 8; i++) y[lane * 8 + i] = ((const half *)r)[i];"
    got = warp(f"unsigned r[4]; {load}(r, {ROWS}); {show}", x, 256).reshape(32, 4, 2)
    for lane in range(32):
        for i in range(4):
            block = x[0, 0, i // 2 * 8 : i // 2 * 8 + 8, i % 2 * 8 : i % 2 * 8 + 8]
            block = block.T if turned else block
            assert (got[lane, i] == block[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]).all()


def test_threads_multiply_as_the_manual_deals_elements_out() -> None:
    """A of 16x16 and B of 16x8; ``group`` and ``place`` are the manual's groupID and threadID_in_group."""
    x = np.random.default_rng(0).integers(-4, 5, (1, 2, 16, 16))
    body = """
  unsigned short h[12];
  const unsigned short *words = (const unsigned short *)a;
  for (int i = 0; i < 8; i++) {
    int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8, column = place * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    h[i] = words[row * 16 + column];
  }
  for (int i = 0; i < 4; i++) {
    int row = place * 2 + (i & 1) + (i >= 2 ? 8 : 0), column = group;
    h[8 + i] = words[256 + row * 16 + column];
  }
  unsigned r[6];
  for (int i = 0; i < 6; i++) r[i] = h[2 * i] | (unsigned)h[2 * i + 1] << 16;
  float sums[4] = {1, 1, 1, 1};
  opcompile_mma_f16(sums, r, r + 4);
  for (int i = 0; i < 4; i++) y[(i < 2 ? group : group + 8) * 8 + place * 2 + (i & 1)] = sums[i];
"""
    np.testing.assert_array_equal(warp(body, x, 128).reshape(16, 8), 1 + x[0, 0] @ x[0, 1, :, :8])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("unsigned r[4]; opcompile_ldmatrix(r, a + lane);", "not aligned"),
        ("unsigned r[4]; opcompile_ldmatrix(r, a + 4 * lane);", "not aligned"),
        ("unsigned r[4]; opcompile_ldmatrix(r, a + 64 * lane);", "shared memory a"),
        ("unsigned r[4]; if (lane < 16) opcompile_ldmatrix(r, a + 8 * lane);", "divergent"),
        ("unsigned r[4] = {}; float s[4] = {}; if (lane) opcompile_mma_bf16(s, r, r);", "divergent"),
    ],
)
def test_what_a_warp_must_not_do_with_ptx_is_said(body: str, words: str) -> None:
    with pytest.raises(VerificationError, match=re.escape(words)):
        warp(body + "\n", np.zeros((1, 2, 16, 16)), 1)


def test_ptx_is_given_what_the_manual_names() -> None:
    """The simulator has functions of its own in place of these."""
    text = re.sub(r'"\s*"', "", matrix._MMA["load"] + matrix._MMA["multiply"])
    bodies = dict(re.findall(r"\b(opcompile_(?:ldmatrix\w*|mma_SHORT))\([^)]*\) \{\n(.*?)^\}", text, re.M | re.S))
    assert ".m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" in bodies["opcompile_ldmatrix"]
    assert ".m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" in bodies["opcompile_ldmatrix_trans"]
    of_ampere, of_turing = bodies["opcompile_mma_SHORT"].split("#else")
    assert of_ampere.startswith("#if __CUDA_ARCH__ >= 800\n")
    assert "m16n8k16.row.col.f32.SHORT.SHORT.f32" in of_ampere
    assert "m16n8k8.row.col.f32.SHORT.SHORT.f32" in of_turing
    assert re.findall(r'"r"\(([^)]*)\)', of_ampere) == ["a[0]", "a[1]", "a[2]", "a[3]", "b[0]", "b[1]"]
    assert re.findall(r'"r"\(([^)]*)\)', of_turing) == ["a[2 * i]", "a[2 * i + 1]", "b[i]"]


# --- Apple's, simulated ---

SIMD_HEAD = """
  threadgroup half a[256];
  threadgroup float c[64];
  int i = threadIdx.x + threadIdx.y * 32;
  for (int j = i; j < 256; j += 64) a[j] = X_ptr[j % 128];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_half8x8 left;
  simdgroup_half8x8 right;
  simdgroup_float8x8 sum;
"""
SIMD_LOAD = """
  sum = make_filled_simdgroup_matrix<float, 8, 8>(0.000000e+00f);
  simdgroup_load(left, (&(a[0])), 8, 0, (bool)1);
  simdgroup_load(right, (&(a[64])), 8, 0, (bool)0);
"""
SIMD_MULTIPLY = "simdgroup_multiply_accumulate(sum, left, right, sum);\n"
SIMD_STORE = """
  if (threadIdx.y == 0) simdgroup_store(sum, (&(c[0])), 8, 0, (bool)0);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int j = i; j < 64; j += 64) output_ptr[j] = c[j];
"""


def run_simdgroups(body: str) -> Any:
    """Run ``body`` with two simdgroups on X, two 8x8 matrices of small integers; return X and the 8x8 sums."""
    source = (
        "using namespace metal;\n"
        "kernel void k(  device half* X_ptr [[ buffer(0) ]],\n  device float* output_ptr [[ buffer(1) ]],\n"
        "  uint2 blockIdx [[threadgroup_position_in_grid]],\n  uint2 threadIdx [[thread_position_in_threadgroup]]\n"
        f") {{{SIMD_HEAD}{body}}}\n"
    )
    return launched(source, "metal", 8)


def test_a_simdgroup_multiplies_matrices() -> None:
    (a, b), y = run_simdgroups(SIMD_LOAD + SIMD_MULTIPLY + SIMD_MULTIPLY + SIMD_STORE)
    np.testing.assert_array_equal(y, 2 * a.T @ b)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (SIMD_LOAD + "if (threadIdx.x < 16) " + SIMD_MULTIPLY + SIMD_STORE, "divergent"),
        (SIMD_LOAD.replace("a[0]", "a[threadIdx.x & 16]") + SIMD_MULTIPLY + SIMD_STORE, "another matrix"),
        (SIMD_LOAD.replace("a[64]", "a[248]") + SIMD_MULTIPLY + SIMD_STORE, "shared memory a"),
        (
            SIMD_LOAD + SIMD_MULTIPLY + "if (threadIdx.y) simdgroup_store(sum, (float*)a, 8, 0, false);" + SIMD_STORE,
            "race",
        ),
    ],
)
def test_what_a_simdgroup_must_not_do_is_said(body: str, words: str) -> None:
    with pytest.raises(VerificationError, match=re.escape(words)):
        run_simdgroups(body)


def test_a_simdgroup_matrix_that_was_not_filled_shows() -> None:
    body = SIMD_LOAD.replace("sum = make_filled_simdgroup_matrix<float, 8, 8>(0.000000e+00f);", "")
    assert np.isnan(run_simdgroups(body + SIMD_MULTIPLY + SIMD_STORE)[1]).all()


@pytest.mark.gpu_table
@pytest.mark.parametrize(
    ("target", "dtype"), [(CUDA, "float16"), *((target, dtype) for target, dtype, *_ in ASKED_FOR.values())]
)
def test_a_barrier_taken_out_of_a_kernel_with_matrices_is_missed(target: Any, dtype: str) -> None:
    spec = replace(ConvTranspose3d.parse("in=1x64x2x4x6 co=32 k=2 s=2"), dtype=dtype)
    found = [e.tiles for e in of_matrix(spec, target) if not e.tiles.ahead]
    kernel = lowered(spec, target, next(tiles for tiles in found if tiles.chunk < 64))
    # before a warp stores its sums, for the first time, there is nothing to wait for
    store = r"(?:nvcuda::wmma::store_matrix_sync|opcompile_mma_store)"
    needed = rf"(__syncthreads\(\);|threadgroup_barrier\([^)]*\);)(?!\s+{store})"
    barriers = list(re.finditer(needed, kernel.source))
    assert len(barriers) == 3
    x, w, b = integers(spec)
    for barrier in barriers:
        bent = replace(kernel, source=kernel.source[: barrier.start()] + kernel.source[barrier.end() :])
        with pytest.raises(VerificationError, match=r"race|beyond|FAIL"):
            compare(spec, simulated(bent)(x, w, b), x, w, b, exact=True).require()
