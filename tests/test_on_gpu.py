"""On a GPU of NVIDIA: every case is right there, and NVIDIA's own checkers find nothing (``make test-on-gpu``)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from gpu_kernels import cut, lowered

import opcompile
from opcompile import artifact
from opcompile.bench_gpu import bench_gpu
from opcompile.cases import CASES, Case
from opcompile.cuda_driver import device
from opcompile.gpus import capability, gpu_target, suited
from opcompile.gradients.gradient import Gradient
from opcompile.gradients.lower_gpu import lower_gpu as lower_gradient
from opcompile.lower import Plan
from opcompile.lower_gpu import choose, emitted, lower_gpu
from opcompile.spec import ConvTranspose3d
from opcompile.verify import verify
from schedules.gpu import candidates

pytestmark = pytest.mark.gpu

# The oracle sums in float64, on the CPU.
_MOST_FLOPS = 2**28
_EACH_FAMILY = (
    "in=1x16x3x4x5 co=24 k=3 s=2 p=1 op=1",
    "in=2x16x3x4x5 co=16 k=4 s=2 p=1 act=relu",
    "in=1x32x3x4x8 co=32 k=2 s=2 dtype=float16",
    "in=1x16x3x4x5 co=32 k=3 s=2 p=1 layout=NDHWC dtype=bfloat16",
)


@pytest.fixture(scope="session")
def target() -> Any:
    return gpu_target(f"cuda:{suited(device().capability)}")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case_is_right(case: Case, target: Any, tmp_path: Path) -> None:
    tiles, _ = choose(case.spec, target, "best")
    small = cut(case.spec, _MOST_FLOPS)
    kernel = lower_gpu(small, target) if small == case.spec else lowered(small, target, tiles)
    layer: Any = opcompile.load(artifact.write(kernel, tmp_path / "layer"))
    report = verify(layer, engines=("reference",))
    assert report.passed, report
    assert not [n for n in report.not_asked if n.what == "opcompile"]


@pytest.mark.parametrize("text", _EACH_FAMILY)
def test_layers_in_tf32_are_right(text: str, target: Any, tmp_path: Path) -> None:
    if capability(target.archs[0]) < (8, 0):
        pytest.skip(f"{target.name} has no TF32")
    spec, flagged = replace(ConvTranspose3d.parse(text), dtype="float32"), gpu_target(f"{target.name}+tf32")
    forms = {e.tiles.apart: e.tiles for e in candidates(spec, flagged.gpu) if e.tiles.family == "matrix"}
    for tiles in forms.values():
        plan = Plan("baseline", "matrix", asdict(tiles), (), None)
        layer: Any = opcompile.load(artifact.write(emitted(spec, flagged, tiles, plan), tmp_path / f"{tiles.apart}"))
        report = verify(layer, engines=("reference",)).require()
        assert "TF32 tensor cores" in {row.check.computed_in for row in report.rows}


@pytest.mark.parametrize("wrt", ["x", "w", "b"])
@pytest.mark.parametrize("text", _EACH_FAMILY[:2])
def test_derivatives_are_right(text: str, wrt: Any, target: Any, tmp_path: Path) -> None:
    from opcompile.gradients import artifact as gradient_artifact

    lowered_gradient = lower_gradient(Gradient(ConvTranspose3d.parse(text), wrt), target)
    layer: Any = opcompile.load(gradient_artifact.write(lowered_gradient, tmp_path / "derivative"), derivative=wrt)
    assert verify(layer).passed


@pytest.fixture(scope="module")
def one_of_each(target: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A kernel of each family, with the phases together and apart."""
    home, places = tmp_path_factory.mktemp("families"), []
    for text in _EACH_FAMILY:
        spec = ConvTranspose3d.parse(text)
        found = {(e.tiles.family, e.tiles.apart): e.tiles for e in reversed(candidates(spec, target.gpu))}
        for number, tiles in enumerate(found.values()):
            place = home / f"{_EACH_FAMILY.index(text)}-{number}"
            places.append(artifact.write(lowered(spec, target, tiles), place))
    return places


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_nvidias_checkers_find_nothing(tool: str, one_of_each: list[Path]) -> None:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "golden_on_gpu"]
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(
        [*command, *map(str, one_of_each)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout[-1000:]


def test_a_layer_is_timed_beside_cudnn(target: Any) -> None:
    report = bench_gpu(
        ConvTranspose3d.parse("in=1x32x8x8x8 co=32 k=2 s=2"),
        target=target.name,
        against=("cudnn", "cudnn-channels-last"),
        seconds=0.05,
    )
    assert [t.engine for t in report.timings] == ["opcompile", "cudnn", "cudnn-channels-last"]
    assert report.memory["opcompile"] == 0
    assert report.where == "on the GPU"
