"""The next chunk is fetched while one is multiplied: right to the last bit, in the order that was meant, race-free."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from gpu_kernels import CUDA, METAL, TF32, lowered, simulated
from kernels import integers

from opcompile.bounds import compare
from opcompile.cases import case
from opcompile.errors import VerificationError
from opcompile.gpus import gpu_target
from opcompile.spec import ConvTranspose3d
from schedules.gpu import GpuEstimate, baseline, candidates
from schedules.gpu_tiles import Sums, _waits

pytestmark = pytest.mark.usefixtures("headers_at_hand")

# A family, whether phases are apart, and a layer: with two chunks of a tap or more.
FORMS = {
    "staged, apart, a phase of one tap": ("staged", True, "in=1x16x3x5x7 co=10 k=3 s=2 p=1 op=1"),
    "staged, apart, phases without taps": ("staged", True, "in=2x20x2x4x3 co=24 k=4x2x3 s=2x1x2 d=2x1x1 layout=NDHWC"),
    "staged, phases with taps of their own": ("staged", False, "in=1x16x2x5x6 co=6 k=3x1x3 s=2x1x2 dtype=float64"),
    "staged, one product for all phases": ("staged", False, "in=Nx24x3x3x5 co=16 k=2 s=2 g=2 act=relu dtype=float16"),
    "matrix, apart": ("matrix", True, "in=1x96x3x3x5 co=40 k=3x1x3 s=2x1x2 p=1x0x1 op=1x0x1 dtype=float16"),
    "matrix, phases with taps of their own": ("matrix", False, "in=1x64x2x3x6 co=20 k=1x1x3 s=1x1x2 dtype=bfloat16"),
    "matrix, one product for all phases": (
        "matrix",
        False,
        "in=Nx128x3x3x5 co=48 k=2 s=2 g=2 dtype=float16 layout=NDHWC",
    ),
    "matrix, TF32": ("matrix", True, "in=1x64x2x4x4 co=32 k=4 s=2 p=1"),
}


def found(spec: ConvTranspose3d, family: str, apart: bool, *, ahead: bool = True) -> list[GpuEstimate]:
    target = TF32 if family == "matrix" and spec.dtype == "float32" else CUDA
    tiles = [e for e in candidates(spec, target.gpu) if (e.tiles.family, e.tiles.apart) == (family, apart)]
    return [e for e in tiles if e.tiles.ahead == ahead]


def kernel(spec: ConvTranspose3d, estimate: GpuEstimate) -> Any:
    tf32 = estimate.tiles.family == "matrix" and spec.dtype == "float32"
    return lowered(spec, TF32 if tf32 else CUDA, estimate.tiles)


@pytest.mark.gpu_table
@pytest.mark.parametrize(("family", "apart", "text"), FORMS.values(), ids=FORMS)
def test_it_is_right_with_two_chunks_and_with_more(family: str, apart: bool, text: str) -> None:
    spec = ConvTranspose3d.parse(text)
    x, w, b = integers(spec)
    by_count = {min(3, spec.c_in // e.tiles.chunk): e for e in reversed(found(spec, family, apart))}
    assert by_count.keys() == {2, 3}
    for estimate in by_count.values():
        made = kernel(spec, estimate)
        assert made.launch.shared_bytes <= estimate.shared
        compare(spec, simulated(made)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize(("family", "apart", "text"), FORMS.values(), ids=FORMS)
def test_a_chunk_is_loaded_before_the_products_and_stored_behind_them(family: str, apart: bool, text: str) -> None:
    """In one loop, whose products stay a loop: a compiler does not move loads across it."""
    spec = ConvTranspose3d.parse(text)
    estimate = next(e for e in found(spec, family, apart) if e.tiles.chunk >= (32 if family == "matrix" else 4))
    source = kernel(spec, estimate).source
    source = source[source.index('extern "C" __global__ void __launch_bounds__') :]
    loads, stores = r"= (?:\*\(\w+\*\)\()?W_ptr", r"W\w*_shared_ptr(?:_\d+)?(?: \+ .*\)|\[.*\]) = "
    places = {
        what: [found.start() for found in re.finditer(pattern, source)]
        for what, pattern in (("load", loads), ("product", r"#pragma unroll 1\n"), ("store", stores))
    }
    order = [what for _, what in sorted((place, what) for what in places for place in places[what])]
    runs = [what for what, before in zip(order, [None, *order], strict=False) if what != before]
    # the first chunk; then the next one, round about; then the last one's products
    ahead = ["load", "store", "load", "product", "store", "product"]
    assert runs == ahead * (len(runs) // len(ahead))


@pytest.mark.parametrize("form", ["staged, apart, a phase of one tap", "matrix, apart"])
def test_what_is_fetched_is_named_by_constants(form: str) -> None:
    """Otherwise a compiler may keep it in memory."""
    family, apart, text = FORMS[form]
    spec = ConvTranspose3d.parse(text)
    fit = (e for e in found(spec, family, apart) if e.tiles.chunk * e.tiles.positions >= 2 * e.tiles.threads)
    source = kernel(spec, next(fit)).source
    places = re.findall(r"\b(?:\w+_shared_local_ptr|columns_local_ptr)(?:\[(.*?)\] =| \+ (.*?)\) = )", source)
    assert len(places) >= 4
    assert all((index or offset).isdigit() for index, offset in places)


@pytest.mark.parametrize(
    ("family", "chunk", "tile_m", "tile_q", "turns"),
    [
        # two turns, though one would be short
        ("staged", 4, 1, 1, 2),
        ("staged", 32, 4, 2, 4),
        ("staged", 32, 8, 8, 32),
        ("matrix", 64, 16, 16, 2),
        ("matrix", 64, 32, 64, 4),
    ],
)
def test_the_products_are_a_loop_of_about_64_instructions(
    family: str, chunk: int, tile_m: int, tile_q: int, turns: int
) -> None:
    spec = ConvTranspose3d.parse("in=1x128x8x8x8 co=64 k=3 s=2 p=1 op=1 dtype=float16")
    chosen = (chunk, tile_m, tile_q)
    estimate = next(e for e in found(spec, family, True) if (e.tiles.chunk, e.tiles.tile_m, e.tiles.tile_q) == chosen)
    loops = re.findall(r"#pragma unroll 1\n\s*for \(int \w+ = 0; \w+ < (\d+);", kernel(spec, estimate).source)
    assert {int(extent) for extent in loops} == {turns}


@pytest.mark.parametrize(
    ("family", "apart", "text"), [FORMS["staged, apart, a phase of one tap"], FORMS["matrix, apart"]]
)
def test_it_takes_registers_and_no_more_shared_memory(family: str, apart: bool, text: str) -> None:
    spec = ConvTranspose3d.parse(text)
    (ahead, *_) = found(spec, family, apart)
    plain = next(e for e in candidates(spec, CUDA.gpu) if e.tiles == replace(ahead.tiles, ahead=False))
    assert kernel(spec, ahead).launch == kernel(spec, plain).launch
    assert ahead.shared == plain.shared
    t = ahead.tiles
    fetched = t.chunk * (t.channels + t.positions) * spec.itemsize / 4 / t.threads
    assert 0 <= ahead.registers - plain.registers - fetched < 1
    assert any("the next ones fetched meanwhile" in line for line in ahead.why())
    assert not any("fetched" in line for line in plain.why())


def test_the_registers_hold_the_weights_of_all_phases_and_wider_types() -> None:
    family, apart, text = FORMS["staged, one product for all phases"]
    spec = ConvTranspose3d.parse(text)
    for dtype, target, held in (("float16", CUDA, 2), ("bfloat16", gpu_target("cuda:sm_75"), 4)):
        layer = Sums.of(replace(spec, dtype=dtype), target.gpu)
        for estimate in found(spec, family, apart):
            t = estimate.tiles
            assert layer.fetched(t) == -(-t.chunk * (8 * t.channels + t.positions) * held // (4 * t.threads))


def test_a_block_waits_for_what_multiplying_does_not_cover() -> None:
    """Of 6 chunks of each of 8 taps."""
    spec = ConvTranspose3d.parse("in=1x96x8x8x8 co=64 k=3 s=2 p=1 op=1 dtype=float16")
    layer, steps = Sums.of(spec, CUDA.gpu), 8 * 96
    for family in ("matrix", "staged"):
        t = replace(found(spec, family, True)[0].tiles, chunk=16)
        assert _waits(layer, CUDA.gpu, t, steps, 1000.0) == 8 * 400
        assert _waits(layer, CUDA.gpu, t, steps, 100.0) == 8 * 400 + 40 * 300
    plain = replace(t, ahead=False)
    assert _waits(layer, CUDA.gpu, replace(plain, family="matrix"), steps, 1000.0) == 48 * 400
    # of phases apart each element is waited for, by nvcc's order
    elements = 16 * t.positions // t.threads
    assert _waits(layer, CUDA.gpu, plain, steps, 1000.0) == 48 * (400 + (elements - 1) * 160)
    assert _waits(layer, CUDA.gpu, replace(plain, apart=False), steps, 1000.0) == 0
    assert _waits(layer, METAL.gpu, plain, steps, 1000.0) == 0


@pytest.mark.gpu_table
@pytest.mark.parametrize(
    "form", ["staged, apart, a phase of one tap", "staged, one product for all phases", "matrix, apart"]
)
def test_a_barrier_taken_out_is_missed(form: str) -> None:
    family, apart, text = FORMS[form]
    spec = ConvTranspose3d.parse(text)
    made = kernel(spec, next(e for e in found(spec, family, apart) if e.tiles.threads > 64))
    # a warp stores its sums for the first time before others read them
    barriers = list(re.finditer(r"__syncthreads\(\);(?!\s+opcompile_mma_store)", made.source))
    assert len(barriers) >= 3
    x, w, b = integers(spec)
    for barrier in barriers:
        bent = replace(made, source=made.source[: barrier.start()] + made.source[barrier.end() :])
        with pytest.raises(VerificationError, match=r"race|beyond|FAIL"):
            compare(spec, simulated(bent)(x, w, b), x, w, b, exact=True).require()


def test_it_is_offered_where_a_tap_has_several_chunks() -> None:
    spec = ConvTranspose3d.parse("in=1x64x8x8x8 co=32 k=3 s=2 p=1 op=1 dtype=float16")
    every = [e.tiles for e in candidates(spec, CUDA.gpu)]
    ahead = [tiles for tiles in every if tiles.ahead]
    assert {tiles.family for tiles in ahead} == {"staged", "matrix"}
    assert max(tiles.chunk for tiles in ahead) == 32
    assert {tiles.chunk for tiles in every if tiles.family == "matrix"} == {16, 32, 64}
    assert not any(e.tiles.ahead for e in candidates(spec, METAL.gpu))
    # also shorter ones than without, but of four channels at least
    short = ConvTranspose3d.parse("in=1x16x8x8x8 co=32 k=3 s=2 p=1 op=1")
    few = [e.tiles for e in candidates(short, CUDA.gpu) if e.tiles.family == "staged"]
    assert {tiles.chunk for tiles in few if not tiles.ahead} == {8, 16}
    assert {tiles.chunk for tiles in few if tiles.ahead} == {4, 8}


@pytest.mark.parametrize(
    ("name", "dtype", "ahead"),
    [
        ("L15-segresnet-up1", "float32", True),
        ("L15-segresnet-up1", "float16", True),
        ("L31-monoscene-nyu", "float32", True),
        # bound by memory, and with loads that nothing tests
        ("L05-nnunet-up5", "float32", False),
    ],
)
def test_where_the_count_chooses_it(name: str, dtype: str, ahead: bool) -> None:
    assert baseline(replace(case(name).spec, dtype=dtype), CUDA.gpu).tiles.ahead == ahead
