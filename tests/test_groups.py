"""Vectors along groups of one channel each, with channels last: right, legal where they can be, and chosen."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from kernels import HERE, integers, kernel, reals, scheduled, within_guards
from tvm import s_tir, tirx

from opcompile.bounds import compare
from opcompile.lower import KERNEL, workspace_bytes
from opcompile.record import illegal
from opcompile.reference import reference
from opcompile.spec import ConvTranspose3d
from opcompile.target import target
from schedules.llvm import Tiles, baseline, candidates
from schedules.rules import takes_groups
from tests.test_finish import statements

V4 = target("llvm:x86-64-v4")
NATIVE = [on for on in (target(name) for name in ("llvm:x86-64-v2", "llvm:x86-64-v3", "llvm:x86-64-v4")) if on.native]


def depthwise(channels: int, rest: str) -> ConvTranspose3d:
    before, _, after = rest.partition(" ")
    sizes = before.removeprefix("in=").split("x")
    return ConvTranspose3d.parse(
        f"in={sizes[0]}x{channels}x{'x'.join(sizes[1:])} co={channels} {after} g={channels} layout=NDHWC"
    )


LAYERS = [
    depthwise(20, "in=1x3x4x7 k=3 s=2 p=1 op=1"),  # a vector and a quarter
    depthwise(18, "in=2x3x4x5 k=3 s=1 p=1 act=relu"),
    depthwise(48, "in=Nx2x5x6 k=4 s=2 p=1 bias=0"),
    depthwise(32, "in=1x3x3x9 k=2 s=2 act=gelu"),
    depthwise(17, "in=1x4x3x5 k=3x1x5 s=1x2x3 d=2x1x1 p=1:0x0x2"),  # each axis another, and a phase without taps
    depthwise(19, "in=1x2x3x3 k=4 s=4"),  # 64 phases, as axes
    depthwise(21, "in=1x4x2x2 k=1x3x7 s=4x3x5 p=2:1x2:3x3:3 op=0x2x0 d=1x1x3"),  # no tap meets Y
    depthwise(24, "in=1x3x4x5 k=5 s=2 p=2 op=1 dtype=float16"),
    depthwise(24, "in=1x3x4x5 k=3 s=1 p=1 dtype=bfloat16"),
    depthwise(12, "in=1x3x4x5 k=3 s=2 p=1 dtype=float64"),
    depthwise(64, "in=1x3x3x4 k=2x3x3 s=1x2x2 p=0x1x1"),  # of which columns lie a power of two apart
]


def of_groups(spec: ConvTranspose3d, on: Any = HERE) -> list[Tiles]:
    return [e.tiles for e in candidates(spec, on.machine) if e.tiles.vector == "groups"]


@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_vectors_may_run_along_groups(spec: ConvTranspose3d) -> None:
    """The first choice, and the first of each other way of copying X and of going through bands."""
    ways = {(t.copy, t.bands_m > 1): t for t in reversed(of_groups(spec))}
    assert {copy for copy, _ in ways} <= {"task", "whole"}
    assert ways
    integral = spec.activation.name in ("none", "relu")
    x, w, b = (integers if integral else reals)(spec)
    for tiles in ways.values():
        assert illegal(asdict(tiles), spec, HERE) is None
        compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=integral).require()


@pytest.mark.parametrize(
    ("spec", "tiles"),
    [
        # bands along all axes, of which the last one of planes and of rows has some left
        (LAYERS[0], Tiles("groups", 16, 1, 3, 2, 32, 2, 2, 1, "task", 2, 2, 1)),
        (LAYERS[2], Tiles("groups", 16, 1, 4, 1, 16, 1, 2, 1, "task", 2, 3, 3)),
        (LAYERS[3], Tiles("groups", 16, 2, 4, 2, 32, 2, 4, 1, "whole")),
        (LAYERS[5], Tiles("groups", 16, 2, 3, 1, 32, 1, 1, 1, "task", 2, 1, 1)),
        (LAYERS[10], Tiles("groups", 16, 2, 3, 1, 32, 1, 1, 1, "whole", 1, 1, 2)),
        (depthwise(3, "in=1x3x4x5 k=3 s=1 p=1"), Tiles("groups", 16, 1, 5, 2, 16, 1, 2, 1, "task")),  # part of a vector
        (LAYERS[10], Tiles("groups", 16, 1, 9, 3, 16, 1, 3, 1, "task", 1, 1, 1)),  # a task of each vector; all rows
    ],
    ids=str,
)
def test_tiles_of_groups_may_be_any(spec: ConvTranspose3d, tiles: Tiles) -> None:
    assert illegal(asdict(tiles), spec, V4) is None
    integral = spec.activation.name in ("none", "relu")
    x, w, b = (integers if integral else reals)(spec)
    compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=integral).require()


@pytest.mark.parametrize("on", NATIVE, ids=lambda on: on.name)
def test_first_choices_of_all_machines_are_right(on: Any) -> None:
    spec = depthwise(40, "in=1x4x6x7 k=3 s=2 p=1 op=1 act=relu")
    x, w, b = integers(spec)
    compare(spec, kernel(spec, of_groups(spec, on)[0], on=on)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("text", ["in=1x3x4x7 k=3 s=2 p=1 op=1", "in=2x3x3x4 k=3 s=1 p=1", "in=1x3x4x6 k=2 s=2"])
@pytest.mark.parametrize("channels", [19, 32])
def test_nothing_is_read_or_written_beyond_the_tensors(channels: int, text: str, end: bool) -> None:
    spec = depthwise(channels, text)
    for tiles in {(t.copy, t.bands_m > 1, t.woven): t for t in reversed(of_groups(spec))}.values():
        x, w, b = integers(spec)
        np.testing.assert_array_equal(within_guards(spec, tiles, end=end), reference(spec, x, w, b))


def test_x_and_y_are_vectors_of_channels_and_nothing_is_transposed() -> None:
    spec = depthwise(40, "in=1x3x4x7 k=3 s=2 p=1 op=1")
    tiles = Tiles("groups", 16, 1, 4, 1, 48, 1, 1, 1, "task")
    lanes: dict[str, set[int]] = {"pad": set(), "output": set()}
    for at, loops in statements(scheduled(spec, tiles)[KERNEL].body):
        if isinstance(at, s_tir.SBlockRealize) and at.block.name_hint in lanes:
            widest = [int(loop.extent) for loop in loops if loop.kind == tirx.ForKind.VECTORIZED]
            lanes[at.block.name_hint].add(max(widest, default=1))
    assert lanes["output"] == {16, 8}
    assert lanes["pad"] - {1} == {16, 8}  # scalars are the zeros of lanes that no channel has


@pytest.mark.parametrize(
    ("channels", "changes", "apart"),
    [
        (128, {"bands_m": 8}, 128 + 16),
        (128, {"task": 128}, 128 + 16),
        (256, {"task": 32, "bands_m": 2}, 64 + 16),
        (96, {"task": 96}, 96),
    ],
)
def test_columns_of_a_copy_do_not_lie_in_few_places_of_the_first_cache(
    channels: int, changes: dict[str, Any], apart: int
) -> None:
    spec = depthwise(channels, "in=1x2x3x8 k=3 s=1 p=1")
    tiles = replace(Tiles("groups", 16, 1, 4, 1, 16, 1, 1, 1, "task", woven="tile"), **changes)
    columns = (1 + 2) * (1 + 2) * (8 + 2)
    assert workspace_bytes(spec, tiles) == 4 * apart * columns


@pytest.mark.parametrize("on", ["llvm:x86-64-v2", "llvm:x86-64-v3", "llvm:x86-64-v4", "llvm:znver5", "llvm:apple-m1"])
@pytest.mark.parametrize("channels", [16, 96, 320])
def test_depthwise_layers_with_channels_last_are_vectors_of_groups(channels: int, on: str) -> None:
    for rest in ("in=1x8x8x8 k=3 s=2 p=1 op=1", "in=1x16x24x24 k=3 p=1", "in=1x16x16x16 k=2 s=2"):
        spec = depthwise(channels, rest)
        assert baseline(spec, target(on).machine).tiles.vector == "groups"


def test_fewer_channels_than_a_vector_has_sums_are_no_vectors_of_groups() -> None:
    for channels, on in ((15, "llvm:znver5"), (7, "llvm:x86-64-v3"), (3, "llvm:x86-64-v2")):
        assert not of_groups(depthwise(channels, "in=1x8x8x8 k=3 s=2 p=1 op=1"), target(on))
        assert of_groups(depthwise(channels + 1, "in=1x8x8x8 k=3 s=2 p=1 op=1"), target(on))


@pytest.mark.parametrize(
    "text",
    [
        "in=1x32x3x4x5 co=32 k=3 s=2 g=32",  # channels first
        "in=1x32x3x4x5 co=32 k=3 s=2 g=16 layout=NDHWC",
        "in=1x32x3x4x5 co=64 k=3 s=2 g=32 layout=NDHWC",
        "in=1x1x3x4x5 co=1 k=3 s=2 layout=NDHWC",
    ],
)
def test_other_layers_have_no_vectors_of_groups(text: str) -> None:
    spec = ConvTranspose3d.parse(text)
    assert not takes_groups(spec)
    assert not of_groups(spec)
    tiles = Tiles("groups", 16, 1, 4, 1, 16, 1, 1, 1, "task")
    assert "that is for channels last, and groups of one input" in str(illegal(asdict(tiles), spec, V4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": 16}, "must divide the 40 channels"),
        ({"task": 64}, "a group has 40 channels, 48 with its last tile"),
        ({"task": 24}, "multiple of the register tile's 16 channels"),
        ({"chunk": 2}, "must divide the 1 input channels"),
        ({"copy": "chunk"}, "vector is 'groups'"),
        ({"scalars": 32}, "fill all registers"),
        ({"store": "streamed"}, "for large Y written in whole cache lines"),
        ({"products": 2, "chunk": 2}, "must divide the 1 input"),
    ],
)
def test_tiles_of_groups_that_cannot_be_are_refused(change: dict[str, Any], words: str) -> None:
    spec = depthwise(40, "in=1x3x4x7 k=3 s=2 p=1 op=1")
    sound = asdict(Tiles("groups", 16, 1, 4, 1, 48, 1, 1, 1, "task"))
    assert illegal(sound, spec, V4) is None
    assert words in str(illegal(sound | change, spec, V4))


def test_a_large_y_of_groups_is_streamed() -> None:
    spec = depthwise(64, "in=1x32x32x64 k=2 s=2")
    assert {t.store for t in of_groups(spec, V4)} == {"streamed"}
    small = depthwise(64, "in=1x2x3x4 k=2 s=2")
    tiles = Tiles("groups", 16, 2, 4, 1, 32, 1, 1, 1, "task", bands_m=2, store="streamed")
    x, w, b = integers(small)
    np.testing.assert_array_equal(
        kernel(small, tiles)(x, w, b), kernel(small, of_groups(small)[0], optimised=False)(x, w, b)
    )


@pytest.mark.heavy
def test_all_candidates_of_groups_agree() -> None:
    spec = depthwise(20, "in=1x3x5x6 k=3 s=2 p=1 op=1")
    x, w, b = integers(spec)
    choices = of_groups(spec)
    assert len({(t.vectors, t.scalars, t.rows) for t in choices}) > 20
    for tiles in choices[::7]:
        compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=True).require()
