"""The tiles of GPU schedules: within every device's limits, and of the family that the situation asks for."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from gpu_kernels import CUDA, METAL, assert_within_limits, lowered, simulated
from hypothesis import given, settings
from kernels import integers
from strategies import specs

from opcompile.bounds import compare
from opcompile.cases import case
from opcompile.errors import KernelError, SpecError
from opcompile.gpus import GpuTarget, gpu_names, gpu_target
from opcompile.gradients import lower_gpu as gradients
from opcompile.gradients.gradient import Gradient, Wrt
from opcompile.launch import MOST_BLOCKS
from opcompile.lower import Plan
from opcompile.lower_gpu import require_startable
from opcompile.spec import ConvTranspose3d
from schedules.gpu import baseline, candidates
from schedules.gradient_gpu_tiles import gpu_candidates

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


@pytest.mark.parametrize(
    ("text", "target"),
    [
        # threads do not copy it in whole turns: a multiple of 24, and of 20 channels
        ("in=1x48x3x3x3 co=384 k=2 s=2 dtype=bfloat16 layout=NDHWC", "cuda:sm_80"),
        ("in=1x60x5x3x7 co=30 k=4 s=2 p=1 layout=NDHWC", "cuda:sm_90"),
        ("in=1x48x5x3x7 co=20 k=3 s=1 p=1 dtype=float16", "metal:apple-m1"),
        # held as float32, where the device has no bfloat16
        ("in=1x256x16x16x16 co=128 k=2 s=2 dtype=bfloat16", "cuda:sm_75"),
        ("in=1x32x3x4x5 co=24 k=3 s=2 dtype=bfloat16", "cuda:sm_75+sm_90"),
    ],
)
def test_no_text_declares_more_shared_memory_than_was_counted(text: str, target: str) -> None:
    spec, machine = ConvTranspose3d.parse(text), gpu_target(target)
    found = [e for e in candidates(spec, machine.gpu) if e.tiles.family in ("staged", "split")]
    for e in found[:: len(found) // 12]:
        assert lowered(spec, machine, e.tiles).launch.shared_bytes <= e.shared, e


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_first_choice_fits_where_a_type_is_widened(dtype: str) -> None:
    machine = gpu_target("cuda:sm_75")
    for name in ("L05-nnunet-up5", "L11-basicunet-last", "L39-burn-5792"):
        spec = replace(case(name).spec, dtype=dtype)
        assert lowered(spec, machine).launch.shared_bytes <= machine.gpu.shared


@pytest.mark.parametrize("derivative", [None, "x"])
def test_more_shared_memory_than_a_block_may_have_is_refused(derivative: Wrt | None) -> None:
    spec = ConvTranspose3d.parse("in=1x16x2x4x8 co=16 k=3 s=2 p=1 op=1")
    small = replace(CUDA, gpu=replace(CUDA.gpu, shared=64))
    words = r"kernel declares \d+ bytes of shared memory, and a block of cuda:sm_90 has at most 64; .* plan baseline"
    if derivative is None:
        staged = next(e.tiles for e in candidates(spec, CUDA.gpu) if e.tiles.family == "staged")
        with pytest.raises(KernelError, match=words):
            lowered(spec, small, staged)
        return
    gradient = Gradient(spec, derivative)
    tiles = next(e.tiles for e in gpu_candidates(gradient, CUDA.gpu) if e.tiles.family == "staged")
    with pytest.raises(KernelError, match=words):
        gradients.emitted(gradient, small, tiles, Plan("baseline", "", {}, (), None))


@pytest.mark.parametrize("target", [CUDA, METAL], ids=lambda t: t.name)
def test_more_blocks_than_one_launch_has_are_refused(target: GpuTarget) -> None:
    spec = ConvTranspose3d.parse("in=2000000000x1x1x1x8000 co=1 k=1")
    words = r"batch is 2000000000, but .* \d+ thread blocks for each image, .* 2147483647; .* batch of at most \d+"
    with pytest.raises(SpecError, match=words):
        lowered(spec, target)
    with pytest.raises(SpecError, match=words):
        gradients.lower_gpu(Gradient(spec, "x"), target)
    kernel = lowered(replace(spec, batch=None), target)
    most = kernel.launch.most_images or 0
    assert most * kernel.launch.blocks <= MOST_BLOCKS < (most + 1) * kernel.launch.blocks
    require_startable(kernel.launch, target, most)
    with pytest.raises(SpecError, match=f"batch is {most + 1}, .* batch of at most {most}"):
        require_startable(kernel.launch, target, most + 1)
    # one whose sums are over all images has no more blocks with more of them
    assert gradients.lower_gpu(Gradient(spec, "b"), target).launch.most_images is None


@pytest.mark.parametrize("target", [CUDA, METAL], ids=lambda t: t.name)
def test_the_longest_axis_is_indexed_whole(target: GpuTarget) -> None:
    """TVM makes its indices 32 bits wide, and kept a shift by 63."""
    for size in (2**31 - 648, 2**31 - 1):
        kernel = lowered(ConvTranspose3d.parse(f"in=1x1x1x1x{size} co=1 k=1 bias=0"), target)
        assert kernel.launch.blocks * 256 >= size
        assert re.search(rf"- {size - 224}\) >> 31", kernel.source)


def test_what_lies_beyond_x_by_2_31_elements_is_not_before_it() -> None:
    """X has 2^30 elements, and Y four times as many: the sign of a difference is tested, not its upper bits."""
    layer = ConvTranspose3d.parse(f"in=1x1x1x1x{2**30} co=1 k=1x1x4 d=1x1x{2**30} bias=0")
    text = lowered(layer, CUDA).source
    assert re.search(r">> \(?\(?\w*\)?31\)?\) < ", text)
    assert not re.search(r">> \(?\(?\w*\)?31\)?\) != ", text)


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
