"""The tiles of GPU schedules: within every device's limits, and of the family that the situation asks for."""

from __future__ import annotations

import pytest
from gpu_kernels import CUDA, METAL, assert_within_limits, lowered, simulated
from hypothesis import given, settings
from kernels import integers
from strategies import specs

from opcompile.bounds import compare
from opcompile.cases import case
from opcompile.gpus import gpu_names, gpu_target
from opcompile.spec import ConvTranspose3d
from schedules.gpu import baseline, candidates

SITUATIONS = {
    "k2 s2, a matrix product": ("L04-nnunet-up4", "staged"),
    "k3 s2": ("L24-psmnet-conv5", "staged"),
    "k4 s2": ("L21-videogpt-convt1", "staged"),
    "depthwise": ("L34-mednext-up0", "direct"),
    "one output channel": ("L27-gcnet-last", "direct"),
    "small sizes, many channels": ("L13-swinunetr-dec5", "split"),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_each_situation_has_its_family(situation: str) -> None:
    name, family = SITUATIONS[situation]
    assert baseline(case(name).spec, CUDA.gpu).tiles.family == family


@pytest.mark.parametrize("name", gpu_names())
def test_all_candidates_keep_to_the_limits_of_the_device(name: str) -> None:
    gpu = gpu_target(name).gpu
    for layer in ("L08-monai-unet-up3", "k2-s2"):
        found = candidates(case(layer).spec, gpu)
        assert found
        for e in found:
            assert_within_limits(e, gpu)
        assert found == candidates(case(layer).spec, gpu)


def test_the_estimate_of_shared_memory_is_what_the_text_declares() -> None:
    spec = ConvTranspose3d.parse("in=1x16x2x4x8 co=16 k=3 s=2 p=1 op=1")
    found = candidates(spec, METAL.gpu)
    for family in ("direct", "staged", "split"):
        best = next(e for e in found if e.tiles.family == family)
        assert lowered(spec, METAL, best.tiles).launch.shared_bytes == best.shared, best


@pytest.mark.gpu_table
@given(spec=specs(dtypes=("float32", "float16"), most_outputs=4000))
@settings(max_examples=25)
def test_any_legal_layer_is_right(spec: ConvTranspose3d) -> None:
    x, w, b = integers(spec)
    compare(spec, simulated(lowered(spec, METAL))(x, w, b), x, w, b, exact=True).require()


@pytest.mark.gpu_table
@pytest.mark.parametrize(
    ("text", "target"),
    [("in=1x16x3x5x7 co=10 k=3 s=2 p=1", METAL), ("in=1x8x3x5x6 co=12 k=2 s=2 g=2 layout=NDHWC", CUDA)],
    ids=["metal", "cuda"],
)
def test_candidates_of_every_family_agree(text: str, target: object) -> None:
    spec = ConvTranspose3d.parse(text)
    found = candidates(spec, CUDA.gpu)
    x, w, b = integers(spec)
    for family in ("direct", "staged", "split"):
        of_family = [e.tiles for e in found if e.tiles.family == family]
        for tiles in of_family[:: max(1, len(of_family) // 3)]:
            compare(spec, simulated(lowered(spec, target, tiles))(x, w, b), x, w, b, exact=True).require()
