"""The derivatives as GPU kernels: one launch each, within the device's limits, simulated against the oracle."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gpu_kernels import CUDA, METAL, assert_within_limits
from gradient_kernels import Operands, draw, gradients_of
from hypothesis import given, settings
from strategies import specs
from test_gradients import SOFTPLUS, known, require_all_digits

import opcompile as oc
from opcompile.bounds import EXACT_ACTIVATIONS
from opcompile.build import write
from opcompile.cases import case
from opcompile.cli import cli
from opcompile.errors import ArtifactError, CallError, EngineError, RecordError, TargetError, VerificationError
from opcompile.gpus import GpuTarget, gpu_names, gpu_target
from opcompile.gradients.bounds import compare
from opcompile.gradients.gradient import Gradient
from opcompile.gradients.lower_gpu import LoweredGpuGradient, choose, emitted, lower_gpu
from opcompile.gradients.runtime_cuda import CudaGradient
from opcompile.gradients.simulate import SimulatedGradient
from opcompile.lower import Plan
from opcompile.simulate import Simulated, Simulator, simulated
from opcompile.spec import ConvTranspose3d, at_batch
from schedules.gradient_gpu_tiles import gpu_candidates

pytestmark = pytest.mark.usefixtures("headers_at_hand")

# What every test run simulates: both languages and layouts, groups, cropping, an open batch, a slope, float16.
QUICK = {
    "in=Nx6x2x3x5 co=4 k=3 s=2 p=1 op=1 g=2 act=relu": CUDA,
    "in=2x5x3x3x2 co=6 k=4 s=2 p=1 layout=NDHWC dtype=float16": METAL,
}
# Every other kind of layer; its derivatives take turns between the two languages, where Metal has the type.
KINDS = {
    name: case(name).spec
    for name in (
        "k2-s2",
        "groups-wide",
        "depthwise",
        "dilated-coprime",
        "output-pad-beyond",
        "channels-last-groups",
        "batch-dynamic-groups",
        "k-below-s-mixed",
        "bfloat16",
        "float64",
    )
}
KINDS["activation"] = ConvTranspose3d.parse("in=2x3x3x4x5 co=4 k=3 s=2 p=1 op=1 act=tanh")
KINDS["float16"] = ConvTranspose3d.parse("in=1x20x3x4x5 co=18 k=2 s=2 act=leaky_relu:0.5 dtype=float16")
# dB knows nothing of kernels: a few kinds are all that there are.
OF_BIAS = ("channels-last-groups", "bfloat16", "activation")
SMALL = "in=1x6x2x3x5 co=4 k=2 s=2"


def run(kernel: LoweredGpuGradient, operands: Operands) -> np.ndarray[Any, Any]:
    batch = operands["dy"].shape[0]
    result = np.empty(at_batch(kernel.gradient.shape, batch), operands["dy"].dtype)
    Simulator(kernel.source, kernel.target.language, kernel.launch).run(operands, result, batch)
    return result


def require_right(gradient: Gradient, target: GpuTarget, *, reals: bool = True) -> None:
    kernel = lower_gpu(gradient, target)
    require_limits(kernel)
    exact = gradient.layer.activation.name in EXACT_ACTIVATIONS
    operands = draw(gradient, integers=2)
    compare(gradient, run(kernel, operands), operands, exact=exact).require()
    if reals:
        operands = draw(gradient)
        depth = kernel.depth.of(operands["dy"].shape[0])
        compare(gradient, run(kernel, operands), operands, depth=depth).require()


def require_limits(kernel: LoweredGpuGradient) -> None:
    """One kernel, no memory of its own beside registers and shared memory, and all sizes that the device has."""
    gpu, launch, gradient = kernel.target.gpu, kernel.launch, kernel.gradient
    (estimate, *_) = gpu_candidates(gradient, gpu)
    assert set(launch.arguments) <= {*gradient.operands, gradient.name, "batch"}
    assert launch.result in launch.arguments
    assert launch.threads == estimate.tiles.threads <= gpu.threads
    assert launch.shared_bytes <= estimate.shared <= gpu.shared
    assert launch.grid(gradient.layer.batch or 1) == estimate.blocks < 2**31
    assert launch.per_image == (gradient.wrt == "x")
    assert kernel.workspace_bytes == 0
    if kernel.host_source:
        assert "AllocWorkspace" not in kernel.host_source


QUICK_GRADIENTS = [(g, target) for text, target in QUICK.items() for g in gradients_of(ConvTranspose3d.parse(text))]


@pytest.mark.parametrize(("gradient", "target"), QUICK_GRADIENTS, ids=lambda v: getattr(v, "name", None))
def test_a_derivative_is_exact_on_integers_and_within_the_bound_on_reals(gradient: Gradient, target: Any) -> None:
    require_right(gradient, target)


@pytest.mark.parametrize("target", [CUDA, METAL], ids=lambda t: t.name)
def test_the_slope_of_softplus_keeps_all_digits_that_y_has(target: GpuTarget) -> None:
    gradient = Gradient(ConvTranspose3d.parse(SOFTPLUS), "x")
    require_all_digits(gradient, partial(run, lower_gpu(gradient, target)))


EVERY = [
    (f"{kind}-{g.name}", g) for kind, s in KINDS.items() for g in gradients_of(s) if g.wrt != "b" or kind in OF_BIAS
]


@pytest.mark.gpu_table
@pytest.mark.parametrize("number", range(len(EVERY)), ids=[name for name, _ in EVERY])
def test_every_kind_of_layer_has_derivatives_on_gpus(number: int) -> None:
    gradient = EVERY[number][1]
    target = METAL if number % 2 and gradient.layer.dtype in METAL.dtypes else CUDA
    inexact = gradient.layer.activation.name not in EXACT_ACTIVATIONS
    require_right(gradient, target, reals=inexact or gradient.layer.dtype != "float32")


@pytest.mark.gpu_table
@given(spec=specs(dtypes=("float32", "float16"), most_outputs=2000))
@settings(max_examples=2)
def test_any_legal_layer_has_derivatives_on_gpus(spec: ConvTranspose3d) -> None:
    for gradient in gradients_of(replace(spec, activation=known(spec.activation))):
        require_right(gradient, METAL, reals=False)


@pytest.mark.gpu_table
def test_a_barrier_taken_out_is_missed() -> None:
    gradient = Gradient(case("groups-wide").spec, "w")
    kernel, operands = lower_gpu(gradient, CUDA), draw(gradient, integers=2)
    bent = replace(kernel, source=kernel.source.replace("__syncthreads();", ""))
    assert bent.source != kernel.source
    with pytest.raises(VerificationError, match=r"race|beyond|FAIL"):
        compare(gradient, run(bent, operands), operands, exact=True).require()


# --- tiles ---


@pytest.mark.parametrize("name", gpu_names())
@pytest.mark.parametrize("wrt", ["x", "w", "b"])
def test_all_candidates_keep_to_the_limits_of_the_device(name: str, wrt: Any) -> None:
    gpu = gpu_target(name).gpu
    for layer in ("k2-s2", "channels-last-groups"):
        found = gpu_candidates(Gradient(case(layer).spec, wrt), gpu)
        assert found
        for e in found:
            assert_within_limits(e, gpu)


@pytest.mark.gpu_table
@pytest.mark.parametrize("family", ["split", "staged"])
@pytest.mark.parametrize(
    "text", ["in=2x18x3x5x7 co=10 k=3x2x3 s=2 p=1", "in=Nx20x3x5x6 co=12 k=2 s=2 g=2 layout=NDHWC"]
)
def test_candidates_of_dw_agree(text: str, family: str) -> None:
    gradient = Gradient(ConvTranspose3d.parse(text), "w")
    # tiles that are moved in whole vectors
    wide = [e for e in gpu_candidates(gradient, METAL.gpu) if e.tiles.tile_m * e.tiles.tile_q >= 16]
    tiles = next(e.tiles for e in wide if e.tiles.family == family)
    kernel, operands = emitted(gradient, METAL, tiles, Plan("baseline", "", {}, (), None)), draw(gradient, integers=2)
    assert "float4*" in kernel.source
    compare(gradient, run(kernel, operands), operands, exact=True).require()


def test_long_sums_are_shared_by_groups_of_threads() -> None:
    layer = ConvTranspose3d.parse("in=2x16x16x32x32 co=8 k=2 s=2")
    for wrt in ("w", "b"):
        gradient = Gradient(layer, wrt)  # type: ignore[arg-type]
        kernel = lower_gpu(gradient, CUDA)
        split = kernel.plan.tiles["split"]
        assert split >= 8
        assert kernel.depth.of(2) <= gradient.terms(2) / split + split + 1


def test_what_cannot_be_compiled_is_refused() -> None:
    gradient = Gradient(case("bfloat16").spec, "w")
    with pytest.raises(TargetError, match="metal:apple-m1 has no bfloat16; compile the layer in float32, float16"):
        choose(gradient, METAL, "best")
    with pytest.raises(RecordError, match="derivatives are not tuned"):
        choose(gradient, CUDA, "tuned")


# --- artifacts ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A derivative for Metal, which needs no compiler of its own to be written; compiled and verified."""
    out = tmp_path_factory.mktemp("gpu") / "dw"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opcompile.artifact_gpu.importlib.util.find_spec", lambda _: None)
        words = ["compile", SMALL, "-o", str(out), "--target", "metal:apple-m1", "--derivative", "w"]
        done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    return out


def test_the_artifact_of_a_derivative_holds_text_launch_and_report(place: Path) -> None:
    assert "kernel void conv_transpose3d_dw_kernel" in (place / "kernel.metal").read_text()
    launch = json.loads((place / "launch.json").read_text())
    assert launch["arguments"] == ["dy", "x", "dw"]
    assert launch["result"] == "dw"
    assert launch["blocks_per_image"] is None
    manifest = json.loads((place / "manifest.json").read_text())
    assert (manifest["derivative"], manifest["workspace_bytes"], manifest["library"]) == ("w", 0, "")
    report = json.loads((place / "report.json").read_text())
    assert report["passed"]
    assert {row["answer"] for row in report["rows"]} == {"opcompile, simulated", "opcompile", "golden.npz"}
    assert "ran on the CPU" in report["not_asked"][0]["reason"]


def test_a_simulated_derivative_is_called_like_any_other_and_its_alarm_works(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = simulated(place)
    assert isinstance(artifact, SimulatedGradient)
    operands = draw(artifact.gradient, integers=3)
    compare(artifact.gradient, artifact(*operands.values()), operands, exact=True).require()
    with pytest.raises(CallError, match="dw takes dy, x, and was given 3 tensors"):
        artifact(*operands.values(), operands["dy"])
    with pytest.raises(CallError, match="x is float64"):
        artifact(operands["dy"], operands["x"].astype("float64"))
    whole = SimulatedGradient.__call__

    def bend(self: Any, *given: Any, **named: Any) -> Any:
        result = whole(self, *given, **named)
        result[-1, 0, 0, 0, 0] += 1
        return result

    monkeypatch.setattr(SimulatedGradient, "__call__", bend)
    with pytest.raises(VerificationError, match="dw of in=1x6"):
        oc.verify(artifact).require()


def test_a_mac_s_derivative_is_not_loaded_here_nor_taken_for_the_layer(place: Path) -> None:
    with pytest.raises(TargetError, match=r"a Mac runs its kernel\.metal .* --simulate"):
        oc.load(place, derivative="w")
    with pytest.raises(ArtifactError, match="holds the derivative dw"):
        Simulated(place)
    with pytest.raises(TargetError, match="does not run on this machine"):
        oc.compile(ConvTranspose3d.parse(SMALL), target="metal:apple-m1", derivative="w")


@pytest.mark.gpu_table
def test_a_derivative_for_cuda_loads_and_refuses_what_is_on_no_gpu(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    place = write(ConvTranspose3d.parse(SMALL), "cuda:sm_90", "best", tmp_path / "dx", derivative="x")
    assert re.match(r"conv_transpose3d_dx-\w+\.so", next(place.glob("*.so")).name)
    artifact: Any = oc.load(place, derivative="x")
    assert isinstance(artifact, CudaGradient)
    operands = artifact.golden().operands
    with pytest.raises(CallError, match="dy is on DLPack device type 1, not on a CUDA GPU"):
        artifact(*operands.values())
    with pytest.raises(CallError, match="w is missing: dx takes dy, w"):
        artifact(operands["dy"])
    with pytest.raises(EngineError, match="--simulate"):
        oc.verify(artifact)
