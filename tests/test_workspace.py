"""What a call allocates: never a column buffer, and no second copy of X but for its padding."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import opcompile
from opcompile.cases import Case, case, tagged
from opcompile.gradients import lower as gradients
from opcompile.gradients.gradient import Gradient
from opcompile.lower import allocated_by, choose, lower, workspace_bytes
from opcompile.spec import Axis, ConvTranspose3d
from opcompile.target import target


def reach(axis: Axis) -> int:
    """Elements that the axis reads, zeros around X included."""
    reads = [q + offset for q in range(axis.positions) for phase in axis.phases for offset in phase.offsets()]
    return max(reads) - min(reads) + 1


def allowed(spec: ConvTranspose3d, copies: bool) -> float:
    """A tenth of X and Y, and the padded X where it is copied at once, in bytes.

    The line of a channel is rounded up to whole vectors, and rows, and begins at a cache line.
    """
    assert spec.dtype == "float32"
    assert spec.batch is not None
    padded = spec.batch * spec.channels_in * (math.prod(map(reach, spec.axes)) + 32) if copies else 0
    return 4 * padded + (spec.bytes_of(spec.x_shape) + spec.bytes_of(spec.y_shape)) / 10


@pytest.mark.parametrize("layer", tagged("real"), ids=lambda layer: layer.name)
@pytest.mark.parametrize("machine", ["llvm:x86-64-v4", pytest.param("llvm:apple-m1", marks=pytest.mark.heavy)])
def test_the_workspace_of_real_layers_is_a_tenth_of_the_tensors(layer: Case, machine: str) -> None:
    spec = layer.spec
    tiles, _ = choose(spec, target(machine), "baseline")
    used = workspace_bytes(spec, tiles)
    # columns and positions are rounded up to whole tiles
    assert used <= 1.1 * allowed(spec, tiles.copy == "whole")


@pytest.mark.parametrize(
    "text",
    [
        "in=1x512x2x4x4 co=2 k=5 s=2 p=2 op=1",
        "in=1x256x2x8x2 co=2 k=4 s=2 p=1",
        "in=1x192x2x8x8 co=2 k=7 s=2 p=3 op=1",
    ],
)
@pytest.mark.parametrize("machine", ["llvm:x86-64-v4", "llvm:znver5"])
def test_the_sums_of_few_positions_are_half_of_the_second_cache(text: str, machine: str) -> None:
    """Sums of all taps of few positions are more than a tenth of X and Y."""
    spec, on = ConvTranspose3d.parse(text), target(machine)
    tiles, _ = choose(spec, on, "baseline")
    assert (tiles.vector, tiles.copy) == ("plane", "whole")
    planes, rows, columns = (axis.size for axis in spec.axes)
    copied = 4 * spec.channels_in * planes * -(-rows * columns // tiles.columns) * tiles.columns
    assert allowed(spec, copies=False) < workspace_bytes(spec, tiles) - copied <= on.machine.l2_bytes / 2


def test_the_manifest_says_what_is_used(tmp_path: Path) -> None:
    spec = case("L29-v2v-up1").spec
    artifact = opcompile.compile(spec, plan="baseline", into=tmp_path / "it")
    assert 0 < artifact.manifest["workspace_bytes"] <= allowed(spec, copies=False)


@pytest.mark.parametrize("text", ["in=1x4x3x4x5 co=6 k=2x1x1 s=2x1x1", "in=Nx4x3x4x5 co=6 k=1 dtype=float16"])
def test_compiling_a_layer_finds_what_describing_it_says(text: str) -> None:
    spec, machine = ConvTranspose3d.parse(text), target("llvm:x86-64-v4")
    found = lower(spec, machine, "baseline").workspace_bytes
    assert found == workspace_bytes(spec, choose(spec, machine, "baseline")[0]) > 0


@pytest.mark.parametrize("batch", ["1", "N"])
def test_compiling_a_derivative_finds_what_its_passes_say(batch: str) -> None:
    gradient, machine = Gradient(ConvTranspose3d.parse(f"in={batch}x4x3x4x5 co=6 k=1"), "x"), target("llvm:x86-64-v4")
    tiles, _ = gradients.choose(gradient, machine, "baseline")
    found = gradients.lower(gradient, machine, "baseline").workspace_bytes
    assert found == allocated_by(gradients.scheduled(gradient.with_batch(1), tiles)) > 0
