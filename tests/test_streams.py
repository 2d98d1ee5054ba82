"""Y written past the caches: right at any address, streamed where it begins at a cache line, and only where it pays."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import pytest
from kernels import HERE, assert_writes_y_alone, integers

import opcompile as oc
from opcompile import lower
from opcompile.compiled import compiled
from opcompile.record import illegal
from opcompile.spec import ConvTranspose3d
from opcompile.target import Target, target
from schedules import llvm
from schedules.llvm import Tiles
from schedules.rules import puts_together, streams
from schedules.tiles import CACHE_LINE, elements_of_stretch

candidates = lru_cache(llvm.candidates)
V4, V3 = target("llvm:x86-64-v4"), target("llvm:x86-64-v3")


def streaming(spec: ConvTranspose3d, vector: str, on: Target) -> Tiles:
    """Tiles that stream a Y far too small for it."""
    if vector in ("taps", "plane"):
        lanes, kernel = on.machine.vector_bytes // 4, spec.axes[1].kernel * spec.axes[2].kernel
        of_taps = Tiles(
            "taps", lanes, 1, kernel, 1, spec.channels_out, 1, 2, spec.channels_in, "task", store="streamed"
        )
        return of_taps if vector == "taps" else replace(of_taps, vector="plane", height=spec.axes[1].positions)
    return replace(next(e.tiles for e in candidates(spec, on.machine) if e.tiles.vector == vector), store="streamed")


# of each width of vectors one
@pytest.mark.parametrize("on", {on.machine.vector_bytes: on for on in (V3, HERE)}.values(), ids=lambda on: on.name)
@pytest.mark.parametrize(
    ("vector", "text"),
    [
        ("row", "in=1x3x2x3x16 co=5 k=2 s=2"),
        ("row", "in=2x3x2x3x33 co=5 k=1x3x3 s=1x2x2 p=0x1x2 op=0x1x1"),
        ("line", "in=1x4x2x3x24 co=6 k=2 s=2 act=relu"),
        ("line", "in=1x3x2x3x16 co=4 k=3 s=1 p=1"),
        ("row", "in=1x3x2x2x16 co=4 k=1x1x3 s=1x1x3"),
        ("row", "in=1x3x2x2x20 co=4 k=1x2x4 s=1x2x4"),
        ("row", "in=1x4x2x2x16 co=4 k=2 s=2 g=2"),
        ("taps", "in=1x4x2x3x16 co=1 k=3 s=2 p=1 op=1"),
        ("plane", "in=1x4x2x3x16 co=1 k=1x3x3 s=1x2x2 p=0x1x1 op=0x1x1"),
        ("channels", "in=1x8x2x3x5 co=32 k=1x2x2 s=1x2x2 layout=NDHWC"),
        ("channels", "in=1x8x2x3x5 co=64 k=1x2x3 s=1x1x2 p=0x0x1 g=2 layout=NDHWC bias=0"),
    ],
)
def test_what_is_streamed_is_right_at_any_address(vector: str, text: str, on: Target) -> None:
    spec = ConvTranspose3d.parse(text)
    tiles = streaming(spec, vector, on)
    assert_writes_y_alone(spec, tiles, on=on, offsets=(0, 16, 8))


@pytest.mark.parametrize("on", [V4, V3], ids=lambda on: on.name)
def test_whole_lines_are_streamed_and_waited_for(on: Target) -> None:
    spec = ConvTranspose3d.parse("in=1x8x4x6x32 co=16 k=1x1x2 s=1x1x2")
    tiles = streaming(spec, "row", on)
    streamed, cached = (
        str(compiled(lower.scheduled(spec, t), on.tvm()).mod.inspect_source("asm"))
        for t in (tiles, replace(tiles, store="cached"))
    )
    for instruction in ("vmovntps", "sfence"):
        assert instruction in streamed
        assert instruction not in cached


def test_lines_of_y_are_asked_for_only_where_it_is_not_streamed() -> None:
    spec = ConvTranspose3d.parse("in=1x8x4x6x32 co=16 k=2 s=2")
    body = lower.scheduled(spec, streaming(spec, "row", V4))[lower.KERNEL].body
    asking = [line for line in str(body).splitlines() if "llvm.prefetch" in line or "opcompile_asked" in line]
    assert any("output" in line for line in asking)
    assert all(("opcompile_asked" in line) == ("output" in line) for line in asking)


@pytest.mark.parametrize(
    ("text", "vector", "on", "far"),
    [
        ("in=1x32x48x48x48 co=32 k=2 s=2", "line", "llvm:x86-64-v4", True),
        ("in=1x32x48x48x48 co=32 k=2 s=2", "row", "llvm:x86-64-v3", True),
        ("in=1x32x48x48x48 co=32 k=2 s=2", "row", "llvm:neoverse-n1", False),  # not measured
        ("in=1x32x48x48x48 co=32 k=2 s=2", "channels", "llvm:x86-64-v4", False),  # its elements lie apart
        ("in=1x32x48x48x48 co=8 k=2 s=2", "row", "llvm:x86-64-v4", False),  # 27 MiB
        ("in=4x32x48x48x48 co=8 k=2 s=2", "row", "llvm:x86-64-v4", True),
        ("in=1x8x16x32x64 co=32 k=2 s=2", "row", "llvm:x86-64-v4", True),  # 32 MiB
        ("in=1x8x16x32x64 co=31 k=2 s=2", "row", "llvm:x86-64-v4", False),
        ("in=1x8x16x32x64 co=16 k=2 s=2", "row", "llvm:znver5", True),  # measured there: from 16 MiB on
        ("in=1x8x16x32x64 co=15 k=2 s=2", "row", "llvm:znver5", False),
        ("in=1x8x48x48x48 co=16 k=4 s=4", "row", "llvm:aarch64", False),  # in whole lines, of four vectors
        ("in=1x64x64x64x64 co=64 k=3 s=2 p=1 g=64", "row", "llvm:x86-64-v4", False),  # rows of 127
        ("in=1x32x48x48x48 co=32 k=5 s=5", "row", "llvm:x86-64-v4", False),  # rows that are not woven
        ("in=1x32x64x64x64 co=32 k=3 s=1 p=1", "row", "llvm:x86-64-v4", True),
        ("in=1x32x64x64x64 co=32 k=3 s=1 p=1", "row", "llvm:x86-64-v3", False),  # half a line at a time
        ("in=1x32x64x64x64 co=32 k=2 s=2 dtype=float16", "row", "llvm:x86-64-v4", False),
        ("in=1x32x64x64x64 co=32 k=2 s=2 dtype=float64", "row", "llvm:x86-64-v4", False),
        ("in=1x32x48x48x48 co=32 k=2 s=2 layout=NDHWC", "channels", "llvm:x86-64-v4", True),
        ("in=1x32x48x48x48 co=32 k=2 s=2 layout=NDHWC", "channels", "llvm:x86-64-v3", False),  # half a line
        ("in=1x32x48x48x48 co=40 k=2 s=2 layout=NDHWC", "channels", "llvm:x86-64-v4", False),
        ("in=1x32x48x48x48 co=32 k=2 s=2 layout=NDHWC", "line", "llvm:x86-64-v4", False),
    ],
)
def test_a_large_y_in_whole_lines_is_streamed(text: str, vector: str, on: str, far: bool) -> None:
    spec, machine = ConvTranspose3d.parse(text), target(on).machine
    assert streams(spec, vector, machine) == far
    of_vector = [e for e in candidates(spec, machine) if e.tiles.vector == vector]
    assert {e.tiles.store for e in of_vector} <= {"streamed" if far else "cached"}
    assert all(("Y is written past the caches" in " ".join(e.why())) == far for e in of_vector[:1])
    for estimate in of_vector[:1]:
        tiles = asdict(estimate.tiles)
        assert illegal(tiles, spec, target(on)) is None
        error = illegal({**tiles, "store": "streamed"}, spec, target(on))
        assert error is None if far else error and "for large Y written in whole cache lines" in error


# Tiles of rows that are no whole lines, and far too small to be streamed so.
STRETCHES = Tiles("row", 16, 1, 1, 1, 1, 1, 4, 1, "task", bands_h=1, store="streamed", woven="tile")


@pytest.mark.parametrize("on", {on.machine.vector_bytes: on for on in (V3, HERE)}.values(), ids=lambda on: on.name)
@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("in=2x3x3x9x20 co=3 k=3 s=2 p=1 g=3", {}),  # 17 rows: eight, eight and one
        ("in=2x3x3x9x20 co=3 k=3 s=2 p=1 g=3 act=relu", {"bands_d": 3, "bands_h": 3}),
        ("in=1x4x3x9x20 co=6 k=3 s=2 p=1", {"scalars": 3, "task": 6, "chunk": 4, "rows": 2}),
        ("in=1x4x3x5x20 co=7 k=3 s=2 p=1", {"scalars": 2, "task": 2, "chunk": 4, "bands_m": 4}),  # a channel left over
        ("in=1x4x3x5x20 co=10 k=3 s=2 p=1 g=2", {"scalars": 2, "task": 6, "chunk": 2}),  # beside the next group
        ("in=1x2x2x2x1 co=3 k=2 s=2", {"chunk": 2, "height": 1, "bands_m": 3}),  # of less than a line
        ("in=1x2x2x5x7 co=3 k=3x1x2 s=3x1x2 bias=0", {"chunk": 2, "height": 5, "bands_m": 3}),
        ("in=1x2x1x3x7 co=2 k=4x2x2 s=3x2x2 p=1x0x0", {"chunk": 2, "height": 3, "bands_m": 2}),  # two planes of three
    ],
)
def test_rows_that_share_lines_are_put_together_and_streamed(text: str, changes: dict[str, Any], on: Target) -> None:
    spec = ConvTranspose3d.parse(text)
    tiles = replace(STRETCHES, lanes=on.machine.vector_bytes // 4, **changes)
    assert_writes_y_alone(spec, tiles, on=on, offsets=(0, 4, 60))


@pytest.mark.parametrize("on", [V4, V3], ids=lambda on: on.name)
def test_what_is_put_together_goes_past_the_caches_and_is_waited_for(on: Target) -> None:
    spec, tiles = (
        ConvTranspose3d.parse("in=1x3x3x9x20 co=3 k=3 s=2 p=1 g=3"),
        replace(STRETCHES, lanes=on.machine.vector_bytes // 4),
    )
    streamed, cached = (
        str(compiled(lower.scheduled(spec, t), on.tvm()).mod.inspect_source("asm"))
        for t in (tiles, replace(tiles, store="cached"))
    )
    for instruction in ("vmovntps", "sfence", "prefetcht0"):  # the last for both ends
        assert instruction in streamed
        assert instruction not in cached
    # of eight rows of 39 elements, in whole lines, and one more to begin anywhere in the first
    assert lower.workspace_bytes(spec, tiles) - lower.workspace_bytes(spec, replace(tiles, store="cached")) == 4 * (
        320 + 16
    )


@pytest.mark.parametrize(
    ("text", "on", "wanted"),
    [
        ("in=1x64x64x64x64 co=64 k=3 s=2 p=1 g=64", "llvm:znver5", True),
        ("in=1x64x64x64x64 co=64 k=3 s=2 p=1 g=64", "llvm:znver4", False),  # not measured
        ("in=1x64x64x64x64 co=64 k=3 s=2 p=1 op=1 g=64", "llvm:znver5", False),  # whole lines
        ("in=1x64x32x32x32 co=64 k=3 s=2 p=1 g=64", "llvm:znver5", True),
        ("in=1x32x24x24x24 co=32 k=3 s=2 p=1 g=32", "llvm:znver5", False),  # 13 MiB
        ("in=1x64x64x64x64 co=64 k=3 s=2 p=1 g=64 dtype=float16", "llvm:znver5", False),
        ("in=1x16x32x32x32 co=16 k=5 s=5 p=0x0x1 g=16", "llvm:znver5", False),  # not by tiles
    ],
)
def test_a_large_y_whose_rows_share_lines_is_streamed(text: str, on: str, wanted: bool) -> None:
    spec, machine = ConvTranspose3d.parse(text), target(on).machine
    found = [e.tiles for e in candidates(spec, machine) if puts_together(spec, e.tiles)]
    assert bool(found) == wanted
    assert all(machine.stretch <= 4 * elements_of_stretch(spec, t) <= machine.l1_bytes // 2 // t.task for t in found)
    assert all(illegal(asdict(t), spec, target(on)) is None for t in found[:1])
    assert not wanted or found[0] == candidates(spec, machine)[0].tiles


def test_what_is_put_together_is_of_one_plane_and_by_tiles() -> None:
    spec, on = ConvTranspose3d.parse("in=1x64x64x64x64 co=64 k=3 s=2 p=1 g=64"), target("llvm:znver5")
    tiles = candidates(spec, on.machine)[0].tiles
    for changes in ({"woven": "band"}, {"depth": 2, "bands_d": 1}):
        assert "or plane by plane by tiles of rows" in str(illegal({**asdict(tiles), **changes}, spec, on))


def test_records_from_before_are_of_cached_stores() -> None:
    spec = ConvTranspose3d.parse("in=1x32x48x48x48 co=32 k=2 s=2")
    tiles = candidates(spec, V4.machine)[0].tiles
    assert tiles.store == tiles.fields()["store"] == "streamed"
    before = {name: n for name, n in tiles.fields().items() if name != "store"}
    assert illegal(before, spec, V4) is None
    assert Tiles(**before) == replace(tiles, store="cached")  # type: ignore[arg-type]
    error = illegal({**before, "store": "elsewhere"}, spec, V4)
    assert error == "store is 'elsewhere', but must be 'cached' or 'streamed'"


def test_the_y_of_a_call_begins_at_a_cache_line() -> None:
    spec = ConvTranspose3d.parse("in=1x3x2x3x16 co=5 k=2 s=2")
    artifact = oc.compile(spec)
    x, w, b = integers(spec)
    several = [artifact(x, w, b) for _ in range(8)]  # NumPy's own would lie anywhere
    assert {y.ctypes.data % CACHE_LINE for y in several} == {0}
