"""Matrix instructions: chosen where they pay, right to the last bit on integers, simulated as warps execute them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gpu_kernels import CUDA, METAL, lowered, simulated
from kernels import integers, reals
from test_gpu_table import assert_limits

from opcompile.bounds import bounds, compare
from opcompile.cases import case
from opcompile.errors import VerificationError
from opcompile.gpus import gpu_names, gpu_target
from opcompile.launch import Launch
from opcompile.reference import reference
from opcompile.simulate import Simulator
from opcompile.spec import ConvTranspose3d
from schedules.gpu import GpuEstimate, baseline, candidates

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


def of_matrix(spec: ConvTranspose3d, target: Any = CUDA) -> list[GpuEstimate]:
    return [e for e in candidates(spec, target.gpu) if e.tiles.family == "matrix"]


def check(spec: ConvTranspose3d, estimate: GpuEstimate) -> None:
    kernel = lowered(spec, CUDA, estimate.tiles)
    assert_limits(kernel)
    assert "nvcuda::wmma::mma_sync" in kernel.source
    assert kernel.launch.shared_bytes == estimate.shared
    run = simulated(kernel)
    x, w, b = integers(spec)
    compare(spec, run(x, w, b), x, w, b, exact=True, computed_in="tensor cores").require()
    x, w, b = reals(spec)
    compare(spec, run(x, w, b), x, w, b, computed_in="tensor cores").require()


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_exact_on_integers_and_within_the_bound_on_reals(kind: str) -> None:
    spec = ConvTranspose3d.parse(LAYERS[kind])
    check(spec, of_matrix(spec)[0])


@pytest.mark.gpu_table
@pytest.mark.parametrize("kind", WHOLE)
def test_larger_layers_are_too(kind: str) -> None:
    spec = ConvTranspose3d.parse(WHOLE[kind])
    check(spec, of_matrix(spec)[0])


@pytest.mark.gpu_table
@pytest.mark.parametrize("text", ["in=1x32x3x5x7 co=72 k=2 s=2 dtype=float16", LAYERS["k3 s2, bfloat16"]])
def test_every_form_of_tiles_is_right(text: str) -> None:
    spec = ConvTranspose3d.parse(text)
    found = of_matrix(spec)
    forms = {(e.tiles.threads_m > 1, e.tiles.threads_q > 1, e.tiles.tile_m > 16, e.tiles.apart): e for e in found}
    assert len(forms) >= 3
    for estimate in forms.values():
        check(spec, estimate)


# --- where they are chosen ---


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


@pytest.mark.parametrize("name", [n for n in gpu_names() if n.startswith("cuda")])
def test_all_candidates_keep_to_the_limits_of_the_device(name: str) -> None:
    gpu = gpu_target(name).gpu
    for layer in ("L08-monai-unet-up3", "k2-s2"):
        spec = replace(case(layer).spec, dtype="float16")
        for e in of_matrix(spec, gpu_target(name)):
            assert e.tiles.threads <= gpu.threads
            assert e.shared <= gpu.shared
            assert e.registers * e.tiles.threads <= gpu.register_file


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
    x, y = np.random.default_rng(0).integers(-4, 5, (2, 16, 16)).astype("float16"), np.zeros((1, 256), "float32")
    Simulator(source, "cuda", Launch.of(source, "cuda", 1, (32, 2))).run({"x": x}, y, 1)
    return x.astype("float32"), y.reshape(16, 16)


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
    bent = re.sub(r"(?m)^.*\(half4\*\).*W_shared.*W_ptr.*$", "", kernel.source, count=1)
    assert bent != kernel.source
    x, w, b = integers(spec)
    assert np.isnan(simulated(replace(kernel, source=bent))(x, w, b).astype(ml_dtypes.bfloat16)).any()
