"""Rows of Y that register tiles write: right, to their ends alone, without a buffer, all phases in one loop."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from kernels import assert_writes_y_alone, integers, kernel, within_guards
from tvm import s_tir, tirx

from opcompile import lower
from opcompile.bounds import compare
from opcompile.record import illegal
from opcompile.reference import reference
from opcompile.spec import ACTIVATIONS, ConvTranspose3d
from opcompile.target import target
from schedules.candidates import candidates
from schedules.llvm import Tiles
from schedules.statements import every

WIDE = target("llvm:x86-64-v4")
SMALL = ConvTranspose3d.parse("in=1x4x2x4x32 co=6 k=2 s=2")
TILES = Tiles("row", 16, 2, 3, 1, 3, 1, 2, 4, "task", 1, 2, 2, woven="tile")


@pytest.mark.parametrize(
    ("text", "tiles"),
    [
        ("in=1x4x2x4x32 co=6 k=2 s=2", TILES),
        (
            "in=2x8x2x4x16 co=8 k=2 s=2 g=2",
            replace(TILES, vectors=1, scalars=2, rows=2, task=4, copy="whole", bands_h=1, bands_m=1),
        ),
        (
            "in=1x4x3x2x48 co=6 k=1x2x2 s=1x2x2 act=relu",
            replace(TILES, vectors=3, scalars=2, task=2, bands_h=1, bands_m=3),
        ),
        (
            "in=1x4x2x3x16 co=4 k=3x1x2 s=3x1x2",
            replace(TILES, vectors=1, scalars=4, task=4, height=3, bands_h=1, bands_m=1),
        ),
        ("in=Nx4x2x4x32 co=6 k=2 s=2 bias=0", replace(TILES, depth=2, scalars=2, task=2, bands_m=3)),
        ("in=1x4x2x4x32 co=6 k=2 s=2 dtype=float16", TILES),
        (
            "in=1x4x2x4x32 co=6 k=2 s=2 dtype=bfloat16 act=leaky_relu:0.5",
            replace(TILES, copy="whole", bands_h=1, bands_m=1),
        ),
        # with no copy of X: all of it, a part, and in groups with one tap
        ("in=1x4x2x4x32 co=6 k=2 s=2", replace(TILES, copy="none", bands_h=1)),
        (
            "in=2x4x3x4x64 co=3 k=1x2x2 s=1x2x2 p=0x0:4x0:64 act=silu",
            replace(TILES, scalars=1, copy="none", bands_h=1, bands_m=1),
        ),
        ("in=Nx6x3x4x32 co=4 k=1 g=2", replace(TILES, scalars=2, task=2, chunk=3, copy="none", bands_h=2, bands_m=1)),
        # one tap in one phase of a row, and two in the other; the first and the last row and plane read beside X
        ("in=1x4x3x4x32 co=6 k=3 s=2 p=1 op=1", replace(TILES, bands_d=3)),
        ("in=2x4x3x4x32 co=6 k=4 s=2 p=1 g=2", replace(TILES, scalars=1, task=1, chunk=2, bands_m=3)),
        (
            "in=1x4x2x5x16 co=2 k=5 s=2 p=2:1x1:2x2:1",
            replace(TILES, vectors=1, scalars=2, task=2, bands_h=1, bands_m=1),
        ),
        # one channel, whose taps are unrolled with the rows that share X; a plane of taps that is too many
        (
            "in=1x3x3x6x32 co=3 k=3 s=2 p=1 op=1 g=3 act=relu",
            replace(TILES, scalars=1, rows=3, task=1, height=3, chunk=1, bands_m=1),
        ),
        (
            "in=1x2x2x4x16 co=2 k=3x7x7 s=1x2x2 p=1x3x3 op=0x1x1 g=2",
            replace(TILES, vectors=1, scalars=1, task=1, chunk=1, bands_h=2, bands_m=1),
        ),
        (
            "in=1x2x2x4x16 co=2 k=3x8x9 s=1x2x2 p=1x3x4 op=0x0x1",
            replace(TILES, vectors=1, scalars=1, rows=2, task=1, chunk=2, bands_m=2),
        ),
        ("in=1x4x2x4x20 co=3 k=2x3x3 s=2x1x2 d=1x2x3 p=0x2x2 dtype=float16", replace(TILES, bands_m=1)),
        # one phase; three, and four, with taps two and one
        ("in=1x4x3x4x37 co=6 k=3 s=1 p=1 act=relu", replace(TILES, rows=2, bands_d=3, bands_h=2)),
        (
            "in=1x3x3x5x20 co=3 k=5 s=1 p=2 g=3",
            replace(TILES, scalars=1, rows=2, task=1, chunk=1, bands_h=3, bands_m=1),
        ),
        ("in=1x4x2x4x20 co=3 k=2x3x5 s=2x3x3 p=0x0x1", replace(TILES, scalars=1, task=1, bands_m=3)),
        (
            "in=1x2x2x3x17 co=2 k=1x1x7 s=1x1x4 p=0x0x2 g=2",
            replace(TILES, vectors=1, scalars=1, rows=3, task=1, height=3, chunk=1, bands_h=1, bands_m=1),
        ),
    ],
)
def test_register_tiles_may_write_rows_of_y(text: str, tiles: Tiles) -> None:
    spec = ConvTranspose3d.parse(text)
    assert illegal(asdict(tiles), spec, WIDE) is None
    x, w, b = integers(spec)
    compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_of_whole_vectors(activation: str) -> None:
    spec = ConvTranspose3d.parse(f"in=1x4x1x2x32 co=3 k=1x1x2 s=1x1x2 act={activation} dtype=float16")
    function = lower.scheduled(spec, replace(TILES, bands_h=1, bands_m=1))[lower.KERNEL]
    stores = [each for each in every(tirx.BufferStore, function.body) if each.buffer.same_as(function.params[-1])]
    assert stores
    assert all(int(store.value.ty.dtype.lanes) == 2 * TILES.lanes for store in stores)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("in=1x4x2x4x33 co=6 k=2 s=2", {}),  # 66 columns: a whole tile, and two of the last
        ("in=1x4x2x4x16 co=6 k=3 s=2 p=1", {}),  # 31: one vector in two parts, and one of nothing
        ("in=1x4x2x4x25 co=6 k=3 s=2 p=1", {"vectors": 1}),  # 49: a vector, and 17
        ("in=1x4x2x4x17 co=6 k=3 s=2 p=1", {"vectors": 1}),  # 33: a vector, and one element
        ("in=1x4x2x4x1 co=6 k=2 s=2", {"vectors": 1}),
        ("in=1x4x2x3x32 co=7 k=3 s=2 p=1", {"bands_h": 2, "bands_m": 3}),  # channels, planes and rows
        ("in=1x4x2x4x32 co=6 k=2 s=2", {"scalars": 2, "task": 4}),  # whole tiles of channels, and no whole task
        ("in=1x4x3x5x32 co=10 k=3 s=2 p=1 g=2", {"chunk": 2, "task": 6, "depth": 2, "bands_h": 3, "bands_m": 1}),
    ],
)
@pytest.mark.parametrize("end", [False, True])
def test_they_write_to_the_end_of_rows_planes_and_channels(text: str, changes: dict[str, Any], end: bool) -> None:
    spec, tiles = ConvTranspose3d.parse(text), replace(TILES, **changes)
    assert illegal(asdict(tiles), spec, WIDE) is None
    np.testing.assert_array_equal(within_guards(spec, tiles, end=end), reference(spec, *integers(spec)))


@pytest.mark.parametrize("store", ["cached", "streamed"])
def test_they_write_all_of_y_at_any_address_and_nothing_beside_it(store: Any) -> None:
    assert_writes_y_alone(SMALL, replace(TILES, store=store))


def test_a_kernel_has_no_other_buffer_than_the_copy_of_x() -> None:
    of_task = SMALL.channels_in * SMALL.axes[2].size * TILES.height * TILES.bands_h * 4
    assert lower.workspace_bytes(SMALL, TILES) == of_task
    assert lower.workspace_bytes(SMALL, replace(TILES, woven="band")) > of_task


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("in=1x32x4x8x32 co=8 k=1", True),
        ("in=1x32x4x8x32 co=64 k=1 g=8", True),
        ("in=1x32x4x8x32 co=3 k=2 s=2 bias=0", True),
        ("in=1x32x4x8x32 co=9 k=1", False),  # each element would be read for many channels
        ("in=1x32x4x8x30 co=8 k=1", False),  # the last vector of X would end behind it
        ("in=1x32x4x8x32 co=8 k=1 s=1x1x2 op=0x0x1 p=0x0x1", False),  # a phase without taps
        ("in=1x32x4x8x32 co=8 k=1x1x3 p=0x0x1", False),  # zeros beside X
        ("in=1x32x4x8x32 co=8 k=1 dtype=float16", False),  # to be widened
        ("in=1x32x4x8x32 co=8 k=1 layout=NDHWC", False),
    ],
)
def test_x_is_read_where_it_lies_by_few_channels(text: str, right: bool) -> None:
    spec = ConvTranspose3d.parse(text)
    found = [e.tiles for e in candidates(spec, WIDE.machine) if e.tiles.copy == "none"]
    assert bool(found) == right
    assert (candidates(spec, WIDE.machine)[0].tiles.copy == "none") == right
    if right:
        assert lower.workspace_bytes(spec, found[0]) == 0
        assert all(illegal(asdict(tiles), spec, WIDE) is None for tiles in found)


def summed_in_a_loop(text: str, tiles: Tiles) -> set[tuple[str, ...]]:
    """The sums of each loop over channels, in their order."""
    found = set()
    for loop in every(tirx.For, lower.scheduled(ConvTranspose3d.parse(text), tiles)[lower.KERNEL].body):
        inner = loop.body.seq[0] if isinstance(loop.body, tirx.SeqStmt) else loop.body
        names = [str(block.name_hint) for block in every(s_tir.SBlock, loop)]
        unrolled = isinstance(inner, tirx.For) and inner.kind == tirx.ForKind.UNROLLED
        if loop.kind == tirx.ForKind.SERIAL and unrolled and all(name.endswith("_update") for name in names):
            found.add(tuple(name.removesuffix("_update") for name in names))
    return found


def test_a_loop_over_channels_sums_all_phases_of_a_row() -> None:
    rows = {tuple(f"phase_{d}_{h}_{w}" for w in (0, 1)) for d in (0, 1) for h in (0, 1)}
    assert summed_in_a_loop("in=1x4x2x4x32 co=6 k=2 s=2", TILES) == rows
    assert summed_in_a_loop("in=1x4x2x4x32 co=6 k=3 s=2 p=1 op=1", TILES) == rows  # of one tap, and of two
    assert summed_in_a_loop("in=1x4x2x4x32 co=6 k=1x1x4 s=1x1x3", replace(TILES, scalars=1, task=1, bands_m=6)) == {
        ("phase_0_0_0", "phase_0_0_1", "phase_0_0_2")
    }


@pytest.mark.parametrize(
    "columns", ["3 s=1x1x2 p=0x1x1 op=0x0x1", "4 s=1x1x2 p=0x1x1"]
)  # phases of one and two taps, of two each
def test_with_one_channel_products_of_a_row_of_x_follow_each_other(columns: str) -> None:
    tiles = replace(TILES, scalars=1, rows=2, task=1, chunk=1, bands_m=1, bands_h=2)
    (row,) = summed_in_a_loop(f"in=1x3x2x4x32 co=3 g=3 k=1x3x{columns}", tiles)
    # two rows of Y, three taps between them: of each row of X both phases, and then of the next
    assert row == ("phase_0_0_0", "phase_0_0_1") * 6


def test_taps_at_planes_beside_x_are_left_out() -> None:
    spec = ConvTranspose3d.parse("in=1x4x3x4x32 co=6 k=3 s=2 p=1 op=1")
    left_out = [
        each
        for each in every(tirx.IfThenElse, lower.scheduled(spec, TILES)[lower.KERNEL].body)
        if any(block.name_hint.endswith("_update") for block in every(s_tir.SBlock, each))
    ]
    assert len(left_out) == 4  # a row of each phase of planes and rows, all of its phases together


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("in=1x4x2x4x32 co=6 k=5 s=5", {}, "4 along W at most"),
        ("in=1x4x2x4x1 co=6 k=2 s=2 p=0x0x1:0", {"vectors": 1}, "4 along W at most"),  # one of two
        ("in=1x4x2x4x32 co=6 k=2 s=2 d=2", {"bands_h": 1}, "phases that all have taps"),
        ("in=1x4x2x4x32 co=6 k=2 s=2 layout=NDHWC", {}, "channels first"),
        ("in=1x4x2x4x16 co=6 k=2 s=2 dtype=float64", {"lanes": 8}, "not for float64"),
        ("in=1x4x2x4x32 co=6 k=2 s=2", {"vector": "line"}, "vectors along a row"),
        ("in=1x4x2x4x32 co=6 k=2 s=2", {"copy": "chunk", "chunk": 2}, "a copy of all channels"),
        (
            "in=1x4x2x4x32 co=6 k=2 s=2",
            {"scalars": 6, "task": 6, "rows": 2, "bands_m": 1},
            "48 sums of the 2 phases of a row",
        ),
        ("in=1x4x2x4x32 co=6 k=2 s=2", {"woven": "elsewhere"}, "woven is 'elsewhere', but must be 'band' or 'tile'"),
    ],
)
def test_tiles_that_cannot_write_rows_say_why(text: str, changes: dict[str, Any], words: str) -> None:
    assert words in str(illegal({**asdict(TILES), **changes}, ConvTranspose3d.parse(text), WIDE))


@pytest.mark.parametrize(
    ("text", "on", "wanted"),
    [
        ("in=1x32x16x32x32 co=32 k=2 s=2", "x86-64-v4", True),
        ("in=1x32x16x32x32 co=32 k=1x2x2 s=1x2x2", "znver5", True),
        ("in=1x32x16x32x32 co=32 k=2 s=2", "x86-64-v3", False),  # 16 registers
        ("in=1x32x16x32x30 co=32 k=2 s=2", "x86-64-v4", True),
        ("in=1x32x16x32x32 co=32 k=4 s=2 p=1", "x86-64-v4", True),
        ("in=1x32x16x32x32 co=32 k=3 s=2 p=1", "x86-64-v3", False),  # of several channels
        ("in=1x32x16x32x32 co=32 k=3 s=2 p=1 g=32", "x86-64-v3", True),
        ("in=1x32x16x32x32 co=32 k=3 s=2 p=1 act=gelu", "x86-64-v4", True),
        ("in=1x32x16x32x32 co=32 k=3 s=2 d=2 p=2", "x86-64-v4", False),  # no taps in one phase
        ("in=1x32x16x32x32 co=32 k=3 s=1 p=1", "x86-64-v4", True),
        ("in=1x32x16x32x32 co=32 k=3 s=3", "x86-64-v4", True),
        ("in=1x32x16x32x32 co=32 k=1x1x4 s=1x1x4", "x86-64-v4", True),
        ("in=1x32x16x32x32 co=32 k=1x1x5 s=1x1x5", "x86-64-v4", False),  # rows that are not woven
        ("in=1x32x16x32x32 co=32 k=2 s=2 act=gelu", "x86-64-v4", False),
        ("in=1x32x16x32x24 co=2 k=2 s=2", "x86-64-v4", False),
        ("in=1x32x16x32x32 co=2 k=3 s=2 p=1", "x86-64-v4", True),
        ("in=1x32x16x32x32 co=32 k=2 s=2 g=32 act=relu", "x86-64-v4", True),
    ],
)
def test_they_are_candidates_where_all_phases_have_taps(text: str, on: str, wanted: bool) -> None:
    spec, machine = ConvTranspose3d.parse(text), target(f"llvm:{on}")
    found = [e for e in candidates(spec, machine.machine) if e.tiles.woven == "tile"]
    assert bool(found) == wanted
    assert all(illegal(asdict(e.tiles), spec, machine) is None for e in found)
    assert all("writes what it sums" in " ".join(e.why()) for e in found)
