"""Channels that come last, written to Y by the register tiles that sum them: right, with no buffer, where they fit."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
from kernels import assert_writes_y_alone, integers, kernel, reals
from tvm import tirx

from opcompile import lower
from opcompile.bounds import compare
from opcompile.record import illegal
from opcompile.spec import ConvTranspose3d
from opcompile.target import target
from schedules.llvm import Tiles, baseline, candidates
from schedules.statements import every

WIDE = target("llvm:x86-64-v4")
TILES = Tiles("channels", 16, 2, 3, 2, 32, 1, 2, 4, "task", woven="tile")
OF_GROUPS = replace(TILES, vector="groups", chunk=1)


def last(text: str) -> ConvTranspose3d:
    return ConvTranspose3d.parse(f"{text} layout=NDHWC")


SMALL = last("in=1x4x2x4x6 co=32 k=3 s=2 p=1 op=1")
# planes, rows and columns of phases end before those of the tiles
RAGGED = last("in=1x4x3x5x7 co=32 k=3 s=2 p=1")


@pytest.mark.parametrize(
    ("text", "tiles"),
    [
        ("in=1x4x2x4x6 co=32 k=3 s=2 p=1 op=1", TILES),
        ("in=2x4x2x4x6 co=64 k=2 s=2 act=relu", replace(TILES, bands_h=2, bands_m=2)),
        ("in=Nx4x3x3x5 co=16 k=3 s=1 p=1", replace(TILES, vectors=1, scalars=5, rows=3, task=16, height=3)),
        ("in=1x4x2x4x4 co=32 k=4 s=2 p=1 bias=0", replace(TILES, scalars=2, copy="whole", bands_d=2)),
        ("in=1x8x2x2x6 co=64 k=2 s=2 g=2 act=gelu", TILES),
        ("in=1x8x2x2x6 co=128 k=2 s=2 g=2", replace(TILES, task=64)),  # several tiles a group
        ("in=1x12x2x2x6 co=96 k=3 s=2 p=1 op=1 g=3", replace(TILES, vectors=1)),
        ("in=1x4x1x2x6 co=16 k=1x2x3 s=1x2x3", replace(TILES, vectors=1, task=16, rows=1, height=1)),
        ("in=1x4x2x4x6 co=32 k=2 s=2 dtype=float16", TILES),
        ("in=1x4x2x4x6 co=32 k=2 s=2 dtype=bfloat16", replace(TILES, height=4)),
        ("in=1x32x2x4x6 co=32 k=3 s=2 p=1 op=1 g=32", OF_GROUPS),
        ("in=1x64x3x2x6 co=64 k=3 s=1 p=1 g=64", replace(OF_GROUPS, bands_m=2, bands_d=3)),
        ("in=1x32x2x4x6 co=32 k=5 s=2 p=2 op=1 g=32 dtype=float16", replace(OF_GROUPS, copy="whole")),
        ("in=2x4x3x5x7 co=32 k=3 s=2 p=1", replace(TILES, depth=2)),
        ("in=1x4x2x4x7 co=64 k=2 s=2 act=relu", replace(TILES, bands_h=2, bands_m=2)),
        ("in=1x4x1x1x2 co=32 k=2 s=2", replace(TILES, height=2)),  # one tile has the whole row, and more
        ("in=1x4x2x4x5 co=32 k=3 s=2 p=1", replace(TILES, scalars=4)),  # of some phases, the last has no column
        ("in=1x4x2x4x1 co=32 k=3 s=2 p=1", TILES),
        ("in=1x8x2x5x4 co=64 k=3x3x1 s=2x3x1 p=1x1x0 g=2 bias=0", replace(TILES, copy="whole")),
        ("in=1x32x3x5x7 co=32 k=3 s=2 p=1 g=32", replace(OF_GROUPS, bands_d=3)),
    ],
)
def test_register_tiles_may_write_channels_that_come_last(text: str, tiles: Tiles) -> None:
    spec = last(text)
    assert illegal(asdict(tiles), spec, WIDE) is None
    integral = spec.activation.name in ("none", "relu")
    x, w, b = (integers if integral else reals)(spec)
    compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=integral).require()


@pytest.mark.parametrize("store", ["cached", "streamed"])
@pytest.mark.parametrize("spec", [SMALL, RAGGED])
def test_they_write_all_of_y_at_any_address_and_nothing_beside_it(spec: ConvTranspose3d, store: Any) -> None:
    assert_writes_y_alone(spec, replace(TILES, store=store))


def test_a_kernel_has_no_other_buffer_than_the_copy_of_x() -> None:
    planes, rows, columns = 1 + 1, 2 + 1, 6 + 1
    assert lower.workspace_bytes(SMALL, TILES) == 4 * SMALL.channels_in * planes * rows * columns
    assert lower.workspace_bytes(SMALL, replace(TILES, woven="band")) > lower.workspace_bytes(SMALL, TILES)


def test_what_is_written_are_whole_vectors_of_sums() -> None:
    function = lower.scheduled(SMALL, TILES)[lower.KERNEL]
    stores = [each for each in every(tirx.BufferStore, function.body) if each.buffer.same_as(function.params[-1])]
    assert len(stores) == 8, "one a phase, unrolled later"
    assert all(int(store.value.ty.dtype.lanes) == TILES.lanes for store in stores)


def test_only_the_last_columns_of_a_row_are_tested_and_once_a_tile() -> None:
    def tests(spec: ConvTranspose3d, tiles: Tiles) -> int:
        function = lower.scheduled(spec, tiles)[lower.KERNEL]
        y, found = function.params[-1], every(tirx.IfThenElse, function.body)
        return sum(any(s.buffer.same_as(y) for s in every(tirx.BufferStore, each.then_case)) for each in found)

    assert tests(SMALL, TILES) == 0
    # 7 columns, and 6 of every second phase: 3 + 3 + 1, and 3 + 3
    assert tests(last("in=1x4x2x4x7 co=32 k=3 s=2 p=1x1x1 op=1x1x0"), TILES) == 8


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("in=1x4x2x4x6 co=32 k=1 s=2 op=1", {}, "phases that all have taps"),
        ("in=1x4x2x4x6 co=32 k=4 s=4", {}, "phases that all have taps"),  # 64 of them, axes of one block
        ("in=1x4x2x4x6 co=32 k=2 s=2 dtype=float64", {"lanes": 8, "task": 16}, "not for float64"),
        ("in=1x4x2x4x6 co=24 k=2 s=2", {}, "tasks must divide those of a group, and leave some over"),
        ("in=1x4x2x4x6 co=32 k=2 s=2", {"vector": "row", "task": 3}, "that is for channels first"),
        ("in=1x4x2x4x6 co=32 k=2 s=2", {"vector": "line", "rows": 1, "task": 3}, "along a row or channels"),
    ],
)
def test_tiles_that_cannot_write_channels_say_why(text: str, changes: dict[str, Any], words: str) -> None:
    assert words in str(illegal({**asdict(TILES), **changes}, last(text), WIDE))


@pytest.mark.parametrize("on", ["llvm:x86-64-v2", "llvm:x86-64-v3", "llvm:znver5"])
@pytest.mark.parametrize("text", ["in=1x128x8x8x8 co=256 k=2 s=2 g=2", "in=1x64x4x8x8 co=128 k=3 s=2 p=1 op=1 g=4"])
def test_first_choices_of_groups_can_be_scheduled(text: str, on: str) -> None:
    spec, machine = last(text), target(on)
    chosen = {e.tiles.woven: e.tiles for e in reversed(candidates(spec, machine.machine)) if e.tiles.of_channels}
    for tiles in chosen.values():
        assert illegal(asdict(tiles), spec, machine) is None
        lower.scheduled(spec, tiles)
    assert "tile" in chosen


def test_tiles_of_groups_write_rows_of_whole_positions_or_soon_go_on() -> None:
    spec = last("in=1x256x8x8x8 co=256 k=3 s=2 p=1 op=1 g=256")
    choices = [e.tiles for e in candidates(spec, WIDE.machine) if e.tiles.woven == "tile"]
    assert choices[0].vectors >= 4, "few lines of a position at a time are slower"
    assert all((t.depth, t.height) == (1, 1) for t in choices if t.channels < 256)


def test_where_channels_come_first_vectors_of_channels_are_not_written_so() -> None:
    spec = replace(SMALL, layout="NCDHW")
    assert "that is for channels last" in str(illegal(asdict(TILES), spec, WIDE))
    assert not any(e.tiles.woven == "tile" and e.tiles.of_channels for e in candidates(spec, WIDE.machine))


@pytest.mark.parametrize("on", ["llvm:x86-64-v3", "llvm:x86-64-v4", "llvm:znver5", "llvm:apple-m1"])
def test_they_are_chosen_where_writing_weighs(on: str) -> None:
    for text in ("in=1x16x12x12x12 co=96 k=2 s=2", "in=1x96x16x16x16 co=96 k=2 s=2 g=96"):
        spec, machine = last(text), target(on)
        chosen = baseline(spec, machine.machine)
        assert chosen.tiles.woven == "tile"
        assert "a register tile has 1 phase, and writes what it sums" in chosen.why()
        assert illegal(asdict(chosen.tiles), spec, machine) is None
