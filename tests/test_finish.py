"""What `finish` adds to a schedule: vectors in the copy of X, and every line of Y asked for before it is written."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import DataType, s_tir, tirx
from tvm.s_tir import transform
from tvm.sym import Analyzer

from opcompile.compiled import compiled
from opcompile.lower import KERNEL, scheduled
from opcompile.spec import ACTIVATIONS, Activation, ConvTranspose3d
from opcompile.target import target
from schedules import llvm
from schedules.layer import tiles_of_band
from schedules.llvm import Tiles
from schedules.statements import ADDING, begin, every, replaced

MACHINE = target("llvm:x86-64-v4").machine
LANES = MACHINE.vector_bytes // 4
candidates = lru_cache(llvm.candidates)


def tiles_of(spec: ConvTranspose3d, vector: str) -> Tiles:
    """The first choice of a kind whose bands write Y."""
    return next(e.tiles for e in candidates(spec, MACHINE) if (e.tiles.vector, e.tiles.woven) == (vector, "band"))


def statements(at: Any, *, woven: bool = True) -> Iterator[tuple[Any, tuple[tirx.For, ...]]]:
    """Every statement that is no sequence, with the loops around it; of woven rows only where asked for."""
    for statement, loops, _ in guarded(at, woven=woven):
        yield statement, loops


def guarded(
    at: Any, loops: tuple[tirx.For, ...] = (), tests: tuple[Any, ...] = (), *, woven: bool = True
) -> Iterator[tuple[Any, tuple[tirx.For, ...], tuple[Any, ...]]]:
    """As `statements`, and the conditions around it, but for those that leave out a tap: that is, loops."""
    if isinstance(at, tirx.SeqStmt):
        for part in at.seq:
            yield from guarded(part, loops, tests, woven=woven)
        return
    yield at, loops, tests
    if isinstance(at, tirx.For):
        yield from guarded(at.body, (*loops, at), tests, woven=woven)
    elif isinstance(at, s_tir.SBlockRealize) and (woven or at.block.name_hint != "row"):
        yield from guarded(at.block.body, loops, tests, woven=woven)
    elif isinstance(at, tirx.IfThenElse):
        own = () if isinstance(at.then_case, tirx.For) else (at.condition,)
        yield from guarded(at.then_case, loops, (*tests, *own), woven=woven)
    elif isinstance(at, tirx.AttrStmt):
        yield from guarded(at.body, loops, tests, woven=woven)


def allocated(module: tvm.IRModule) -> list[Any]:
    """The buffers of a scheduled module, as large as they will be."""
    for step in (
        transform.PlanAndUpdateBufferAllocationLocation(),
        transform.ConvertBlocksToOpaque(),
        transform.CompactBufferAllocation(),
    ):
        module = step(module)
    return [held for block in every(s_tir.SBlock, module[KERNEL].body) for held in block.alloc_buffers]


def fetched(at: Any) -> Any:
    """The element whose line the statement asks for, if it does."""
    if not isinstance(at, tirx.Evaluate) or "llvm.prefetch" not in str(at):
        return None
    (element,) = (a.args[0] for a in at.value.args if hasattr(a, "op") and a.op.name == "tirx.address_of")
    return element


@pytest.mark.parametrize(
    ("text", "widths"),
    [
        ("in=1x4x3x4x40 co=3 k=3 s=2 p=1 op=1", [16, 8, 1]),  # the last column is a zero
        ("in=1x4x3x4x40 co=3 k=3 s=2", [1, 16, 8, 1]),  # so is the first
        ("in=1x4x3x4x22 co=3 k=3 s=1x1x2 p=1 op=0x0x1", [16, 6, 1]),
        ("in=1x4x3x4x40 co=3 k=3 s=2 p=1 op=1 layout=NDHWC", []),  # columns lie apart
    ],
)
def test_columns_between_the_zeros_are_copied_as_vectors(text: str, widths: list[int]) -> None:
    spec = ConvTranspose3d.parse(text)
    body = scheduled(spec, tiles_of(spec, "row"))[KERNEL].body
    copies = [
        loops[-1]
        for at, loops in statements(body)
        if isinstance(at, s_tir.SBlockRealize) and at.block.name_hint == "pad"
    ]
    assert [int(loop.extent) for loop in copies if widths] == widths
    assert all((loop.kind == tirx.ForKind.VECTORIZED) == (bool(widths) and int(loop.extent) > 1) for loop in copies)


@pytest.mark.parametrize(
    ("text", "copied", "written"), [("in=1x40 co=64", [16, 8], [16]), ("in=1x6 co=24", [6], [16, 8])]
)
def test_channels_that_come_last_are_copied_and_written_as_vectors(
    text: str, copied: list[int], written: list[int]
) -> None:
    spec = ConvTranspose3d.parse(text.replace(" co", "x3x4x7 co") + " k=3 s=2 p=1 op=1 layout=NDHWC")
    body = scheduled(spec, tiles_of(spec, "channels"))[KERNEL].body
    lanes: dict[str, list[int]] = {"pad": [], "output": []}
    for at, loops in statements(body):
        if isinstance(at, s_tir.SBlockRealize) and at.block.name_hint in lanes:
            assert loops[-1].kind == tirx.ForKind.VECTORIZED
            lanes[at.block.name_hint].append(int(loops[-1].extent))
    assert lanes["pad"] == copied
    assert sorted(set(lanes["output"]), reverse=True) == written


@pytest.mark.parametrize(
    ("text", "tests"),
    [
        ("in=1x4x3x4x40 co=3 k=3 s=2 p=1 op=1", 8),
        ("in=1x4x3x4x40 co=3 k=2 s=2", 0),  # no tap reads beside X
        ("in=1x4x3x4x40 co=3 k=3 s=1 p=0x1x1", 1),
    ],
)
def test_taps_that_read_zeros_are_left_out(text: str, tests: int) -> None:
    spec = ConvTranspose3d.parse(text)
    body = scheduled(spec, tiles_of(spec, "row"))[KERNEL].body
    assert sum(isinstance(at, tirx.IfThenElse) for at, _ in statements(body)) == tests


@pytest.mark.parametrize(
    ("text", "together"),
    [("k=4 s=2 p=1", True), ("k=3 p=1", True), ("k=3 s=2 p=1", False), ("k=4 s=2 p=1 dtype=float16", True)],
)
@pytest.mark.parametrize("vector", ["row", "line"])
def test_taps_of_a_row_are_taken_at_once(vector: str, text: str, together: bool) -> None:
    spec = ConvTranspose3d.parse(f"in=1x12x3x4x40 co=6 {text}")
    tiles = Tiles(vector, LANES, 2, 3, 1, 3, 1, 1, chunk=12, copy="whole")  # type: ignore[arg-type]
    kernel, taps = tuple(axis.kernel for axis in spec.axes), spec.axes[2].most_taps
    view, order = llvm.packed(spec, tiles, (12, 6, *kernel))
    *_, outer, inner, block = order
    assert [view[axis] for axis in (outer, inner, block)] == ([12, taps, 3] if together else [3, 12, 3])
    for at, loops in statements(scheduled(spec, tiles)[KERNEL].body):
        if isinstance(at, s_tir.SBlockRealize) and at.block.name_hint.endswith("_update"):
            f = int(at.block.name_hint.split("_")[3])
            of_phase = len(spec.axes[2].phases[f].offsets())
            of_row = [(int(each.extent), each.kind) for each in loops if _uses(at, -2, each)]
            assert of_row == [(of_phase, tirx.ForKind.UNROLLED)]


@pytest.mark.parametrize("text", ["in=1x4x3x8x40 co=4 k=7 s=2 p=3 g=4", "in=1x4x3x8x40 co=1 k=3 d=2"])
def test_products_of_a_row_of_x_follow_each_other_in_a_tile_of_several_rows(text: str) -> None:
    spec = ConvTranspose3d.parse(text)
    tiles = Tiles("row", LANES, 2, 1, 4, 1, 1, 4, chunk=spec.c_in, copy="task")
    step, turns = spec.axes[1].offset_step, dict[str, list[tuple[int, int]]]()
    for at, loops in statements(scheduled(spec, tiles)[KERNEL].body):
        if isinstance(at, s_tir.SBlockRealize) and ADDING.fullmatch(at.block.name_hint):
            *_, h, _, _, tap_h, _, _ = (replaced(value, begin(loops)) for value in at.iter_values)
            turn = (int(tap_h), int(Analyzer().simplify(h)))
            turns.setdefault(at.block.name_hint, []).append(turn)
    for name, of_phase in turns.items():
        taps = len(spec.axes[1].phases[int(name.split("_")[2])].offsets())
        assert sorted(of_phase) == list(itertools.product(range(taps), range(tiles.rows)))
        read = [h - tap_h * step for tap_h, h in of_phase]
        assert read == sorted(read)


@pytest.mark.parametrize(
    ("text", "along"),
    [
        ("in=1x4x3x4x4 co=32 k=4 s=2 p=1", 2),
        ("in=1x4x3x4x1 co=32 k=4 s=2", 2),
        ("in=1x4x2x2x5 co=32 k=3 s=1 p=1", 2),
        ("in=1x4x2x2x6 co=32 k=7 s=1 p=3", 2),
        ("in=1x4x3x4x9 co=32 k=4 s=2 p=1", 1),
        ("in=1x4x3x3x9 co=32 k=3 s=1 p=1", 1),
        ("in=1x4x2x2x9 co=32 k=1x5x1 s=1 p=0x3:1x0", 1),
    ],
)
def test_where_a_tile_has_all_of_a_row_or_a_plane_each_tap_takes_what_reads_x(text: str, along: int) -> None:
    spec = ConvTranspose3d.parse(text)
    _, height, width = (axis.positions for axis in spec.axes)
    axis, other = spec.axes[along], spec.axes[3 - along]

    def alone(t: Tiles) -> bool:
        return (t.trims_rows(height, 1), t.trims(width, 1)) == (along == 1, along == 2)

    tiles = next(e.tiles for e in candidates(spec, MACHINE) if alone(e.tiles))
    covered = tiles.rows if along == 1 else tiles.scalars
    taken: dict[int, list[int]] = {}
    for at, loops in statements(scheduled(spec, tiles)[KERNEL].body):
        if isinstance(at, s_tir.SBlockRealize) and at.block.name_hint.endswith("_update"):
            (positions,) = (e for e in loops if e.kind == tirx.ForKind.UNROLLED and _uses(at, 3 + along, e))
            taken.setdefault(int(at.block.name_hint.split("_")[1 + along]), []).append(int(positions.extent))
    others = len(spec.axes[0].phases) * len(other.phases)
    for f, phase in enumerate(axis.phases):
        reads = [sum(0 <= q + offset < axis.size for q in range(axis.positions)) for offset in phase.offsets()]
        wanted = [n for n in reads if n] if set(reads) != {covered} else [covered]
        assert sorted(taken.get(f, [])) == sorted(wanted * others)


def _uses(block: s_tir.SBlockRealize, value: int, loop: tirx.For) -> bool:
    return str(loop.loop_var) in str(block.iter_values[value])


def test_the_next_chunk_of_a_copy_of_all_x_is_asked_for() -> None:
    spec = ConvTranspose3d.parse("in=1x66x3x4x40 co=3 k=3 s=2 p=1 op=1")
    for copy, asked in (("whole", True), ("task", False)):
        tiles = Tiles("row", LANES, 2, 3, 1, 3, 1, 1, chunk=22, copy=copy)  # type: ignore[arg-type]
        elements = [
            (fetched(at), loops)
            for at, loops in statements(scheduled(spec, tiles)[KERNEL].body)
            if fetched(at) is not None and fetched(at).source.name == "pad"
        ]
        of_turn = [channel for channel in range(2) for _ in range(3)]
        assert len(elements) == 8 * (len(of_turn) if asked else 0), "two vectors and a line for what straddles, each"
        for (element, loops), channel in zip(elements, 8 * of_turn, strict=False):
            *_, chunk, _, c = (loop.loop_var for loop in loops)  # within the planes of taps, around their rows
            at = {chunk: tirx.const(1, "int32"), c: tirx.const(2, "int32")}
            assert (
                int(Analyzer().simplify(replaced(element.indices[-2], at))) == (1 + 1) * tiles.chunk + 2 * 2 + channel
            )


def asked_for(body: Any) -> Iterator[tuple[int, ...]]:
    """The elements of Y whose lines the kernel asks for as sums leave their registers, all loops walked through."""
    simplify = Analyzer().simplify
    for at, loops in statements(body, woven=False):
        element = fetched(at)
        if element is None or element.source.name != "output":
            continue
        for values in _turns(loops):
            known = {var: tirx.const(value, var.ty.dtype) for var, value in values.items()}
            yield tuple(int(simplify(replaced(i, known))) for i in element.indices)


def _turns(loops: tuple[tirx.For, ...]) -> Iterator[dict[tirx.Var, int]]:
    if not loops:
        yield {}
        return
    for rest in _turns(loops[1:]):
        for i in range(int(loops[0].extent)):
            yield {loops[0].loop_var: i, **rest}


@pytest.mark.parametrize(
    ("vector", "spans"),
    [
        ("channels", {"depth": 1}),
        ("row", {"depth": 1}),
        ("line", {"depth": 1}),
        ("line", {"depth": 2, "height": 3}),  # through both planes
    ],
)
def test_every_line_of_y_is_asked_for(vector: str, spans: dict[str, int]) -> None:
    spec = ConvTranspose3d.parse("in=1x2x2x3x32 co=16 k=2 s=2")
    body = scheduled(spec, replace(tiles_of(spec, vector), **spans))[KERNEL].body
    lines = {(n, m, d, h, w // LANES) for n, m, d, h, w in asked_for(body)}
    _, channels, depth, height, width = spec.y_shape
    every = {
        (0, m, d, h, w)
        for m in range(channels)
        for d in range(depth)
        for h in range(height)
        for w in range(width // LANES)
    }
    assert every <= lines


def test_a_line_of_y_is_asked_for_once_by_vectors_of_half_a_line() -> None:
    spec = ConvTranspose3d.parse("in=1x2x2x3x32 co=2 k=2 s=2")
    tiles = Tiles("row", 8, 2, 2, 1, 2, 1, 1, chunk=2, copy="task")
    asked = Counter((m, d, h, w // 16) for _, m, d, h, w in asked_for(scheduled(spec, tiles)[KERNEL].body))
    assert set(asked.values()) == {1}
    assert len(asked) == math.prod(spec.y_shape) // 16


@pytest.mark.parametrize(("vector", "asks"), [("channels", True), ("row", False)])
def test_with_channels_last_only_vectors_of_channels_are_lines(vector: str, asks: bool) -> None:
    spec = ConvTranspose3d.parse("in=1x2x2x3x32 co=16 k=2 s=2 layout=NDHWC")
    assert any(asked_for(scheduled(spec, tiles_of(spec, vector))[KERNEL].body)) == asks


@pytest.mark.parametrize("width", [4, 7, 8, 15, 16, 17, 31, 33, 64])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_a_row_of_y_is_written_by_vectors_that_end_where_it_ends(width: int, stride: int) -> None:
    spec = ConvTranspose3d.parse(f"in=1x2x2x3x{width} co=3 k=3 s=1x1x{stride} p=0x0x1")
    row, simplify = spec.axes[2].out, Analyzer().simplify
    written = []
    for at, loops in statements(scheduled(spec, tiles_of(spec, "row"))[KERNEL].body):
        if not isinstance(at, s_tir.SBlockRealize) or at.block.name_hint != "row":
            continue
        column, vectors = at.block.iter_vars[-1].var, loops[-1]
        stores = [store.indices[-1] for store, _ in statements(at.block.body) if isinstance(store, tirx.BufferStore)]
        for i in range(int(vectors.extent)):
            first = replaced(at.iter_values[-1], {vectors.loop_var: tirx.const(i, "int32")})
            for ramp in stores:
                begin = int(simplify(replaced(ramp.base, {column: first})))
                written.append(range(begin, begin + int(ramp.lanes)))
    assert all(len(part) == stride * 2 ** (len(part) // stride).bit_length() // 2 for part in written)
    assert {i for part in written for i in part} == set(range(row))
    assert sum(map(len, written)) < row + max(map(len, written))


def test_rows_of_many_phases_and_of_few_columns_are_left_to_llvm() -> None:
    for text in ("in=1x2x2x3x9 co=3 k=5 s=5", "in=1x2x2x3x1 co=3 k=3 s=1x1x2"):
        spec = ConvTranspose3d.parse(text)
        body = scheduled(spec, tiles_of(spec, "row"))[KERNEL].body
        names = {at.block.name_hint for at, _ in statements(body) if isinstance(at, s_tir.SBlockRealize)}
        assert "output" in names
        assert "row" not in names


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_rows_are_woven_with_every_activation_but_those_of_the_library(dtype: str) -> None:
    plain = ConvTranspose3d.parse(f"in=1x2x2x2x16 co=3 k=1 dtype={dtype}")
    tiles = tiles_of(plain, "row")
    of_library = {"gelu", "tanh", "tanh_shrink", "elu", "selu", "softplus", "log_sigmoid"} if dtype == "float64" else {}
    for activation in ACTIVATIONS:
        spec = replace(plain, activation=Activation(activation))
        body = scheduled(spec, tiles)[KERNEL].body
        names = {at.block.name_hint for at, _ in statements(body) if isinstance(at, s_tir.SBlockRealize)}
        assert ("row" in names) == (activation not in of_library), activation
        assert ("output" in names) == (activation in of_library), activation


def words(index: Any) -> str:
    """An index as text, without the type of its numbers."""
    return re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(index))


@pytest.mark.parametrize(
    ("channels", "width", "vector", "ahead"),
    [(6, 32, "row", 3), (128, 20, "row", 51), (128, 64, "row", 16), (128, 512, "row", 4), (128, 32, "line", 8)],
)
def test_x_is_asked_for_a_page_or_some_channels_before_it_is_copied(
    channels: int, width: int, vector: str, ahead: int
) -> None:
    spec = ConvTranspose3d.parse(f"in=1x{channels}x2x4x{width} co=3 k=2 s=2")
    tiles = replace(tiles_of(spec, vector), **({"height": 4} if vector == "line" else {}))  # type: ignore[arg-type]
    elements = [e for at, _ in statements(scheduled(spec, tiles)[KERNEL].body) if (e := fetched(at)) is not None]
    of_x = [text for e in elements if e.source.name == "X" and "T.min(" in (text := words(e.indices[1]))]
    assert of_x
    assert all(f" + {ahead}, {channels - 1})" in each for each in of_x)


@pytest.mark.parametrize(("copy", "width", "asked"), [("whole", 4, True), ("whole", 5, False), ("task", 4, False)])
def test_x_in_rows_that_no_two_tiles_share_is_asked_for_where_no_task_did(copy: Any, width: int, asked: bool) -> None:
    spec = ConvTranspose3d.parse(f"in=1x64x4x8x{width} co=8 k=2 s=2")
    tiles = Tiles("line", 16, 1, 8, 1, 8, 2, 8, 64, copy)
    elements = [e for at, _ in statements(scheduled(spec, tiles)[KERNEL].body) if (e := fetched(at)) is not None]
    assert asked == any(e.source.name == "X" and "T.min(" in words(e.indices[1]) for e in elements)


BF16 = target("llvm:sapphirerapids+bf16").machine


def of_planes(spec: ConvTranspose3d, depth: int) -> Tiles:
    """Tiles that sum each tap at planes of X as they lie."""
    kernel, rows = spec.axes[1].kernel * spec.axes[2].kernel, spec.axes[1].positions
    return Tiles("plane", LANES, 1, kernel, 1, 1, depth, rows, spec.channels_in, "task")


def test_planes_beside_x_are_left_out_unless_all_lie_end_to_end() -> None:
    spec = ConvTranspose3d.parse("in=1x4x3x4x8 co=1 k=3 s=2 p=1 op=1")
    for depth, tests in ((1, 3), (2, 3), (3, 0)):
        body = scheduled(spec, of_planes(spec, depth))[KERNEL].body
        assert sum(isinstance(at, tirx.IfThenElse) for at, _ in statements(body)) == tests
        (copied,) = {
            str(at.predicate) != "T.bool(True)"
            for at, _ in statements(body)
            if isinstance(at, s_tir.SBlockRealize) and at.block.name_hint == "pad"
        }
        assert copied == bool(tests)


def test_tiles_of_a_plane_are_an_odd_number_of_cache_lines_apart() -> None:
    spec = ConvTranspose3d.parse("in=1x64x3x8x8 co=1 k=3 s=2 p=1 op=1")
    (copied,) = (held for held in allocated(scheduled(spec, of_planes(spec, 1))) if held.name == "pad")
    assert int(copied.strides[4]) // 16 % 2 == 1
    assert int(copied.strides[4]) >= 64 * LANES


@pytest.mark.parametrize(("width", "masked"), [(8, [True]), (16, [True]), (40, [True, False, True])])
def test_vectors_within_a_row_of_y_are_not_masked(width: int, masked: list[bool]) -> None:
    spec = ConvTranspose3d.parse(f"in=1x4x2x3x{width} co=1 k=3x3x4 s=1x1x2 p=1")
    body = scheduled(spec, of_planes(spec, 1))[KERNEL].body
    rows = [at for at, _ in statements(body) if isinstance(at, s_tir.SBlockRealize) and at.block.name_hint == "row"]
    assert [bool(every(tirx.Select, at.block.body)) for at in rows] == masked


def test_rows_whose_vectors_would_leave_the_sums_are_left_to_llvm() -> None:
    for text, woven in (("2x8 k=1 d=4 op=0x0x3", False), ("2x8 k=1 d=4", True)):
        spec = ConvTranspose3d.parse(f"in=1x4x2x{text} co=1")
        body = scheduled(spec, of_planes(spec, 1))[KERNEL].body
        names = {at.block.name_hint for at, _ in statements(body) if isinstance(at, s_tir.SBlockRealize)}
        assert ("row" in names, "output" in names) == (woven, not woven)


@pytest.mark.parametrize(
    ("text", "vector", "changed"),
    [
        # in the loops over channels
        ("in=2x8x2x6x32 co=2 k=3 s=2 p=1 op=1", "row", {"height": 2, "bands_h": 3}),
        ("in=1x16x5x6x16 co=6 k=2 s=2", "row", {"bands_d": 5, "height": 3, "rows": 3, "chunk": 8}),
        ("in=1x8x2x6x16 co=48 k=2 s=2", "channels", {"task": 16}),
        ("in=1x8x4x6x16 co=16 k=3 s=1 p=1", "channels", {"vectors": 1, "scalars": 16}),  # columns left out
        ("in=1x8x4x6x16 co=6 k=2 s=2", "line", {"depth": 2, "height": 6}),  # through both planes
        ("in=1x8x4x6x32 co=6 k=3 s=2 p=1 op=1", "line", {"height": 2}),
        ("in=1x8x4x6x32 co=1 k=3 s=2 p=1 op=1", "taps", {"height": 3}),
        ("in=2x8x4x3x16 co=1 k=3 s=2 p=1 op=1", "plane", {"height": 3}),
        ("in=3x16x2x3x16 co=1 k=3 s=2 p=1 op=1", "plane", {"height": 3, "depth": 2, "copy": "chunk", "chunk": 8}),
        ("in=3x16x4x4x16 co=1 k=1x3x3 p=1x2x1", "plane", {"height": 2, "depth": 2}),  # cropped
        ("in=1x8x3x4x32 co=2 k=3 s=2 p=1 op=1 dtype=float16", "row", {}),
        ("in=1x16x3x4x32 co=16 k=2 s=2 dtype=bfloat16", "pairs", {}),
        # tile by tile, for few channels
        ("in=1x4x4x6x32 co=2 k=3 s=2 p=1 op=1", "row", {"height": 2, "bands_h": 3}),
        ("in=1x6x4x6x32 co=4 k=3 s=2 p=1 op=1 g=2", "row", {"depth": 2}),
        ("in=1x4x4x6x16 co=4 k=5 s=2 p=2 op=1 g=4", "row", {"bands_d": 2}),  # taps of a plane at once
        ("in=1x4x4x6x16 co=4 k=7 s=2 p=3 op=1 g=4", "row", {"bands_d": 2}),
        ("in=1x4x3x4x32 co=16 k=2 s=2 dtype=bfloat16", "pairs", {}),
        ("in=1x2x3x3x16 co=2 k=2 s=3x3x4", "row", {}),  # phases as axes
        # chunk by chunk
        ("in=2x24x2x6x32 co=2 k=3 s=2 p=1 op=1", "row", {"height": 2, "bands_h": 3, "copy": "chunk", "chunk": 8}),
        ("in=1x32x4x6x32 co=6 k=3 s=2 p=1 op=1 g=2", "line", {"height": 2, "copy": "chunk", "chunk": 8}),
    ],
)
def test_a_task_asks_for_what_of_x_the_next_one_copies(text: str, vector: str, changed: dict[str, int]) -> None:
    spec = ConvTranspose3d.parse(text)
    if vector == "pairs":
        chosen = next(e.tiles for e in candidates(spec, BF16) if e.tiles.products == 2)
    elif vector in ("taps", "plane"):
        chosen = Tiles(vector, LANES, 1, 9, 1, 1, 1, 1, spec.channels_in, "task")  # type: ignore[arg-type]
    else:
        chosen = tiles_of(spec, vector)
    several = {"depth": 1, "height": 1, "rows": 1, "bands_d": 1, "bands_h": 1, "bands_m": 1}
    tiles = replace(chosen, **several, copy="task")
    tiles = replace(tiles, **changed)
    axis_d, axis_h, _ = spec.axes
    planes, rows = tiles.depth * tiles.bands_d, tiles.height * tiles.bands_h
    of_m = -(-spec.channels_out // spec.groups // tiles.task)
    counts = (spec.batch or 1, spec.groups, of_m, -(-axis_d.positions // planes), -(-axis_h.positions // rows))
    tasks = list(itertools.product(*map(range, counts)))
    assert len(tasks) > 1
    asked = x_asked_for(scheduled(spec, tiles)[KERNEL].body)
    x = np.arange(math.prod(spec.x_shape)).reshape(spec.x_shape)
    elements = 64 // spec.itemsize

    def read(n: int, g: int, d: int, h: int, channels: slice) -> Any:
        of_d, of_h = (
            slice(max(0, q * count + axis.reads[0]), (q + 1) * count + axis.reads[1])
            for q, count, axis in ((d, planes, axis_d), (h, rows, axis_h))
        )
        if vector == "plane":  # as it lies
            of_d, of_h = slice(None) if tiles.depth == axis_d.positions else of_d, slice(None)
        c = spec.c_in
        return x[n, g * c : (g + 1) * c][channels, of_d, of_h].ravel() // elements

    in_chunks = tiles.copy == "chunk"
    for number, ((n, g, _, d, h), later) in enumerate(itertools.pairwise(tasks)):
        own = read(n, g, d, h, slice(tiles.chunk, None)) if in_chunks else []
        next_one = read(later[0], later[1], *later[3:], slice(0, tiles.chunk if in_chunks else None))
        assert {*own, *next_one} <= set(asked[number])
        assert max(Counter(asked[number]).values()) <= 2, "each line once, or with what it shares with the next"


@pytest.mark.parametrize("vector", ["row", "line"])
def test_between_two_chunks_sums_lie_in_memory_and_within_one_in_registers(vector: Any) -> None:
    spec = ConvTranspose3d.parse("in=1x32x4x6x32 co=6 k=3 s=2 p=1 op=1")
    tiles = Tiles(vector, LANES, 1, 3, 1, 3, 1, 2, chunk=8, copy="chunk", bands_h=3, bands_m=2)
    held = {held.name: math.prod(map(int, held.shape)) for held in allocated(scheduled(spec, tiles))}
    sums = {name: size for name, size in held.items() if name.startswith("phase")}
    assert len(sums) == 16
    for name, size in sums.items():
        assert size == 3 * LANES if name.endswith("local") else size >= 6 * 6 * 32, name
    (copied,) = (size for name, size in held.items() if name.startswith("pad"))
    assert copied < 2 * 8 * 2 * 7 * 33, "a chunk of two planes of seven rows"


def test_x_is_not_asked_for_by_many_lines_at_once_nor_by_a_single_task() -> None:
    for text, vector, asks in (
        ("in=1x7x32x128x128 co=1 k=1 s=1", "line", False),  # 112 lines for each of a few turns
        ("in=1x7x32x128x128 co=1 k=2 s=2", "line", True),
        ("in=1x8x1x1x16 co=16 k=2 s=2", "channels", False),
        ("in=Nx8x1x1x16 co=16 k=2 s=2", "channels", True),
        ("in=Nx8x1x1x16 co=16 k=2 s=2 layout=NDHWC", "channels", False),  # where rows lie side by side
    ):
        spec = ConvTranspose3d.parse(text)
        tiles = next(e.tiles for e in candidates(spec, MACHINE) if (e.tiles.vector, e.tiles.copy) == (vector, "task"))
        body = scheduled(spec, tiles)[KERNEL].body
        elements = [e for at, _ in statements(body) if (e := fetched(at)) is not None and e.source.name == "X"]
        assert any("T.min(" not in str(e) for e in elements) == asks, text


def x_asked_for(body: Any) -> dict[int, list[int]]:
    """For each task the lines of X that it asks for, but for those of its own copy."""
    asked: dict[int, list[int]] = {}
    for at, loops, tests in guarded(body):
        element = fetched(at)
        if element is None or element.source.name != "X" or "T.min(" in str(element):
            continue
        shape = [int(n) for n in element.source.shape]
        flat = sum(i * math.prod(shape[axis + 1 :]) for axis, i in enumerate(element.indices))
        of_line = 64 // (DataType(element.source.dtype).bits // 8)
        places = [compile(words(Analyzer().simplify(each)), "X", "eval") for each in (flat, *tests)]
        names = [str(loop.loop_var) for loop in loops]
        for turn in itertools.product(*(range(int(loop.extent)) for loop in loops)):
            known = {"T": SimpleNamespace(max=max), **dict(zip(names, turn, strict=True))}
            at_element, *asks = (eval(place, known) for place in places)  # noqa: S307
            if all(asks):
                asked.setdefault(turn[0], []).append(at_element // of_line)
    return asked


def test_y_is_asked_for_a_page_before_it_is_written() -> None:
    spec = ConvTranspose3d.parse("in=1x6x2x3x32 co=3 k=2 s=2")
    body = scheduled(spec, tiles_of(spec, "row"))[KERNEL].body
    elements = [e for at, _ in statements(body) if (e := fetched(at)) is not None]
    ahead = {words(e.indices[-1]) for e in elements if e.source.name == "output"}
    assert {"v_i3 + 1024", "v_i3 + 1040"} <= ahead


@pytest.mark.parametrize(("vector", "more"), [("channels", ""), ("line", ""), ("line", " dtype=float16")])
def test_weights_are_asked_for_a_tap_before_they_are_multiplied(vector: str, more: str) -> None:
    spec = ConvTranspose3d.parse("in=1x64x8x12x48 co=64 k=4 s=2 p=1" + more)
    a_row = {"rows": 1, "depth": 1, "height": 1, "bands_d": 1, "bands_h": 1, "bands_m": 1}
    of_w = weights_asked_for(spec, vector, **a_row)
    assert bool(of_w) == (not more)  # a task has widened its weights, and reads them where it put them
    for element in of_w:
        assert words(Analyzer().simplify(element.indices[8 if vector == "channels" else 7])).endswith("+ 64")
    assert bool(weights_asked_for(spec, vector, **a_row, copy="task")) == (not more), "beside X of the next task"
    planes = {**a_row, "depth": 8, "height": 12}
    assert tiles_of_band(spec, replace(tiles_of(spec, vector), **planes)) > 8
    assert not weights_asked_for(spec, vector, **planes), "each of many tiles would ask"


def test_weights_are_asked_for_where_they_are_many_and_read_once_or_twice() -> None:
    small = ConvTranspose3d.parse("in=1x64x4x6x32 co=32 k=2 s=2")  # 64 KiB
    row = ConvTranspose3d.parse("in=1x512x1x1x20 co=256 k=2 s=2")
    for columns in (10, 20):  # each weight is read twice, and once
        assert weights_asked_for(row, "channels", vectors=1, scalars=columns, task=16)
    few = ConvTranspose3d.parse("in=1x512x2x2x2 co=256 k=4 s=2")
    depthwise = ConvTranspose3d.parse("in=1x64x4x6x32 co=64 k=7 s=2 g=64")
    for spec, vectors in ((small, "channels"), (few, "channels"), (depthwise, "row")):
        assert not weights_asked_for(spec, vectors)


@pytest.mark.parametrize(
    ("vector", "vectors", "scalars", "kernel", "dtype", "of_turn", "lines"),
    [
        ("channels", 3, 4, "5", "float32", 4, 2),  # of 32 bytes a channel
        ("channels", 2, 6, "5", "float16", 4, 1),
        ("line", 2, 4, "2", "float32", 8, 2),  # of 16
        ("line", 2, 6, "2", "float32", 4, 2),  # of 24
        ("line", 2, 4, "4", "float32", 4, 2),  # of 32, two taps in a row of a phase
        ("row", 1, 12, "4", "float32", 2, 3),  # of 96
    ],
)
def test_a_turn_asks_for_each_line_of_its_weights(
    vector: str, vectors: int, scalars: int, kernel: str, dtype: str, of_turn: int, lines: int
) -> None:
    spec = ConvTranspose3d.parse(f"in=1x192x4x2x16 co=96 k={kernel} s=2 dtype={dtype}")
    task = vectors * 8 if vector == "channels" else scalars
    tiles = Tiles(vector, 8, vectors, scalars, 1, task, 1, 1, chunk=192, copy="whole")  # type: ignore[arg-type]
    body = scheduled(spec, tiles)[KERNEL].body
    asked = [(e, loops) for at, loops in statements(body) if (e := fetched(at)) is not None and e.source.name == "W"]
    blocks = vectors if vector == "channels" else 1
    assert len(asked) == math.prod(len(axis.phases) for axis in spec.axes) * blocks * lines
    a_line = 16 if dtype == "float32" else 32
    assert [int(Analyzer().simplify(e.indices[9])) for e, _ in asked[:lines]] == [i * a_line for i in range(lines)]
    for element, loops in asked:
        of_channels = loops[-1]
        assert int(of_channels.extent) == 192 // of_turn
        turns = [{loop.loop_var: tirx.const(0, "int64") for loop in loops} for _ in range(2)]
        turns[1][of_channels.loop_var] = tirx.const(1, "int64")
        channel = element.indices[8 if vector == "channels" else 7]
        channels = [int(Analyzer().simplify(replaced(channel, turn))) for turn in turns]
        assert channels == [192, 192 + of_turn]


@pytest.mark.parametrize(
    ("pads", "task", "depth", "height", "further"),
    [
        ("", 24, 4, 2, 3),  # a band has all positions: the next one has other channels
        ("", 48, 4, 2, 6),
        ("", 24, 4, 1, 1),
        ("", 24, 2, 2, 1),
        (" p=1 op=1", 24, 4, 2, 1),  # the taps of the last phase lie first
    ],
)
def test_behind_the_last_tap_what_the_next_band_begins_with_is_asked_for(
    pads: str, task: int, depth: int, height: int, further: int
) -> None:
    spec = ConvTranspose3d.parse("in=1x192x4x2x6 co=96 k=2 s=2" + pads)
    tiles = Tiles("channels", 8, 3, 6, 1, task, depth, height, chunk=192, copy="whole")
    asked = set()
    for at, loops in statements(scheduled(spec, tiles)[KERNEL].body):
        if (element := fetched(at)) is not None and element.source.name == "W":
            begins = {loop.loop_var: tirx.const(0, "int64") for loop in loops}
            at_first = 0
            for i, n in zip(element.indices, element.source.shape, strict=True):
                at_first = at_first * int(n) + int(Analyzer().simplify(replaced(i, begins)))
            asked.add(at_first)
    of_tap, taps, blocks = 192 * 8, 8, range(3)
    wanted = {(block * taps + tap + 1) * of_tap for tap in range(taps - 1) for block in blocks}
    assert {at for at in asked if at % of_tap == 0} == wanted | {(i + further) * taps * of_tap for i in blocks}


def weights_asked_for(spec: ConvTranspose3d, vector: str, **changed: Any) -> list[Any]:
    body = scheduled(spec, replace(tiles_of(spec, vector), **changed))[KERNEL].body
    elements = [fetched(at) for at, _ in statements(body)]
    return [e for e in elements if e is not None and e.source.name == "W"]


@pytest.mark.parametrize("vector", ["channels", "row", "line"])
def test_sums_are_taken_from_no_heap(vector: str) -> None:
    spec = ConvTranspose3d.parse("in=1x32x4x6x32 co=32 k=2 s=2")
    module = scheduled(spec, tiles_of(spec, vector))
    text = str(compiled(module, target("llvm:x86-64-v4").tvm()).mod.inspect_source("ll"))
    # the copy of X, and the phases where they are larger than what TVM puts on the stack
    assert text.count("load ptr, ptr @__TVMBackendAllocWorkspace") <= 1 + len(spec.axes[0].phases) ** 3
