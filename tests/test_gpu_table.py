"""Every case of the table as one kernel for CUDA and one for Metal, within the device's limits, simulated."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from gpu_kernels import CUDA, METAL, cut, lowered, simulated
from kernels import integers, reals

from opcompile.bounds import compare
from opcompile.cases import CASES, Case
from opcompile.gpus import GpuTarget, gpu_target
from opcompile.lower_gpu import LoweredGpu, choose
from opcompile.reference import reference
from opcompile.spec import ConvTranspose3d
from schedules.gpu import longest_first

pytestmark = pytest.mark.usefixtures("headers_at_hand")

# The layers that every test run simulates: a family of schedules, a form of the declaration or a type each.
QUICK = (
    "k2-s2",
    "k3-s2",
    "dilated-gcd2-of-4",
    "batch-dynamic-groups",
    "float16-channels-last",
    "act-gelu",
)
_SIMULATED_FLOPS = 2**25


def check(case: Case, target: GpuTarget) -> None:
    spec = case.spec
    if spec.dtype not in target.dtypes:
        pytest.skip(f"{target.name} has no {spec.dtype}")
    tiles, _ = choose(spec, target, "baseline")
    kernel = lowered(spec, target, tiles)
    assert_limits(kernel)
    small = cut(spec, _SIMULATED_FLOPS)
    run = simulated(kernel if small == spec else lowered(small, target, tiles))
    x, w, b = integers(small)
    compare(small, run(x, w, b), x, w, b, exact=True).require()
    x, w, b = reals(small)
    compare(small, run(x, w, b), x, w, b).require()


def assert_limits(kernel: LoweredGpu) -> None:
    """One kernel, no memory of its own beside registers and shared memory, and all sizes that the device has."""
    gpu, launch = kernel.target.gpu, kernel.launch
    assert len(re.findall(r"__global__ void __launch_bounds__\(\d+\) \w+\([^)]*\) \{|kernel void ", kernel.source)) == 1
    assert set(launch.arguments) <= {"x", "w", "b", "y", "batch"}
    assert "y" in launch.arguments
    assert launch.threads <= gpu.threads
    assert launch.shared_bytes <= gpu.shared
    assert launch.grid(kernel.spec.batch or 1) < 2**31
    # what a thread has to itself is in registers
    own = re.findall(r"^ +alignas\(\d+\) (?:thread )?\w+ \w+\[(\d+)\];", kernel.source, re.M)
    assert own
    assert max(map(int, own)) <= gpu.registers
    if kernel.host_source:
        assert "AllocWorkspace" not in kernel.host_source
        assert f"__launch_bounds__({launch.threads})" in kernel.source
        if kernel.spec.batch:
            assert f"cuda_arg_{len(launch.arguments)} = {launch.grid(kernel.spec.batch)};" in kernel.host_source


@pytest.mark.parametrize("target", [CUDA, METAL], ids=lambda t: t.name)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in QUICK], ids=lambda c: c.name)
def test_a_kernel_is_exact_on_integers_and_within_the_bound_on_reals(case: Case, target: Any) -> None:
    check(case, target)


@pytest.mark.gpu_table
@pytest.mark.parametrize("target", [CUDA, METAL], ids=lambda t: t.name)
@pytest.mark.parametrize("case", [c for c in CASES if c.name not in QUICK], ids=lambda c: c.name)
def test_every_other_case_is_too(case: Case, target: Any) -> None:
    check(case, target)


@pytest.mark.parametrize("target", [CUDA, METAL], ids=lambda t: t.name)
def test_an_open_batch_comes_to_the_kernel_as_it_is(target: GpuTarget) -> None:
    """As many thread blocks as X has elements: TVM gives their number a name, and would pass that instead."""
    kernel = lowered(ConvTranspose3d.parse("in=Nx1x2x2x2 co=1 k=4x2x4 s=2"), target)
    spec, launch = kernel.spec, kernel.launch
    assert launch.blocks == math.prod(n for n in spec.x_shape if n)
    assert launch.arguments == ("b", "w", "x", "y", "batch")
    assert re.search(r"\b(int64_t|long) batch\b", kernel.source)
    x, w, b = integers(spec, batch=3)
    compare(spec, simulated(kernel)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize("target", [CUDA, METAL], ids=lambda t: t.name)
@pytest.mark.parametrize("batch", ["N", "2"])
def test_a_block_knows_its_phase_whatever_the_batch(batch: str, target: GpuTarget) -> None:
    """It divides by no number that comes at run time."""
    spec = ConvTranspose3d.parse(f"in={batch}x64x4x4x4 co=24 k=3 s=2 p=1 op=1")
    kernel = lowered(spec, target)
    assert longest_first(spec)
    assert kernel.source.count("batch") <= 4
    x, w, b = integers(spec)
    compare(spec, simulated(kernel)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize("text", ["in=1x32x3x3x4 co=32 k=2 s=2", "in=Nx16x3x3x4 co=8 k=3 s=2 act=gelu layout=NDHWC"])
def test_bfloat16_where_a_device_has_no_type_for_it(text: str) -> None:
    spec = ConvTranspose3d.parse(f"{text} dtype=bfloat16")
    kernel = lowered(spec, gpu_target("cuda:sm_75"))
    assert "ushort" in kernel.source
    x, w, b = reals(spec)
    compare(spec, simulated(kernel)(x, w, b), x, w, b).require()


@pytest.mark.parametrize("text", ["in=Nx4x2x1x1 co=4 k=2x1x1 s=3x1x1 d=2x1x1", "in=Nx4x3x3x3 co=4 k=2 s=2 d=3"])
def test_an_axis_as_long_as_its_dilation_and_an_open_batch(text: str) -> None:
    spec = ConvTranspose3d.parse(text)
    x, w, b = integers(spec)
    compare(spec, simulated(lowered(spec, CUDA))(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize("target", [CUDA, METAL], ids=lambda t: t.name)
def test_an_axis_whose_phases_have_one_tap_or_none(target: GpuTarget) -> None:
    """The others have more: weights are read as vectors, in loops of which one has no second turn."""
    spec = ConvTranspose3d.parse("in=1x32x2x6x1 co=7 k=2x4x2 s=3x2x1")
    x, w, b = integers(spec)
    compare(spec, simulated(lowered(spec, target))(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize("target", [CUDA, METAL], ids=lambda t: t.name)
@pytest.mark.parametrize(
    "activation", ["relu", "relu6", "leaky_relu:0", "elu", "hard_sigmoid", "hard_tanh", "hard_shrink", "sparse_plus"]
)
def test_no_activation_makes_a_number_of_nan(activation: str, target: GpuTarget) -> None:
    """Where the `max` of a device would."""
    spec = ConvTranspose3d.parse(f"in=1x3x2x3x5 co=5 k=2 s=2 act={activation}")
    x, w, b = reals(spec)
    x.ravel()[::7] = np.nan
    np.testing.assert_array_equal(
        np.isnan(simulated(lowered(spec, target))(x, w, b)), np.isnan(reference(spec, x, w, b))
    )
