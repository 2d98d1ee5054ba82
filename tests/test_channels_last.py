"""Few output channels that come last: rows of Y woven from vectors of phases and channels, taps with own sums."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from kernels import HERE, integers, kernel, reals, scheduled, within_guards
from tvm import s_tir, tirx
from tvm.sym import Analyzer

from opcompile.bounds import compare
from opcompile.lower import KERNEL
from opcompile.record import illegal
from opcompile.reference import reference
from opcompile.spec import ConvTranspose3d
from opcompile.target import target
from schedules.llvm import Tiles, baseline, candidates
from schedules.rules import weaves, weights_by_taps
from schedules.statements import every, replaced
from tests.test_finish import statements

V4 = target("llvm:x86-64-v4")


def last(text: str) -> ConvTranspose3d:
    return ConvTranspose3d.parse(f"{text} layout=NDHWC")


def tiles_of(spec: ConvTranspose3d, vector: Any, **change: Any) -> Tiles:
    lanes = HERE.machine.vector_bytes // (8 if spec.dtype == "float64" else 4)
    m, c = spec.m_out, spec.c_in
    depth, height, scalars = 1, min(2, spec.axes[1].positions), m
    if vector in ("taps", "plane"):
        scalars = max(n for n in weights_by_taps(spec, vector) if n < 12)
    if vector == "plane":
        height = spec.axes[1].positions
    return replace(Tiles(vector, lanes, 1, scalars, 1, m, depth, height, c, "task"), **change)


@pytest.mark.parametrize(
    "text",
    [
        "in=1x8x3x4x18 co=2 k=3 s=2 p=1 op=1",
        "in=2x8x2x3x7 co=3 k=2 s=2 act=relu",
        "in=Nx4x3x4x5 co=4 k=3 s=1 p=1",
        "in=1x16x2x3x33 co=1 k=4 s=2 p=1 bias=0",
        "in=1x8x3x3x21 co=2 k=1x3x3 s=1x2x2 g=2",  # a channel of each of two groups
        "in=1x8x3x3x9 co=4 k=1x3x2 s=1x2x2 g=2 act=gelu",
        "in=1x4x3x4x5 co=8 k=2x3x3 s=1x2x1 p=1",
        "in=1x4x2x3x17 co=2 k=2x2x4 s=1x2x4",  # eight vectors make a row
        "in=1x6x2x3x16 co=2 k=1x3x3 s=1x2x2 p=0x1x1",  # six channels are copied in no squares
        "in=1x8x3x4x18 co=2 k=3 s=2 p=1 op=1 dtype=float16",
        "in=1x8x3x4x18 co=2 k=3 s=2 p=1 op=1 dtype=bfloat16",
        "in=1x8x2x3x18 co=3 k=3 s=2 p=1 dtype=float64",
        "in=1x8x4x4x3 co=2 k=3 s=2 p=1",
    ],
)
def test_rows_of_few_channels_are_right(text: str) -> None:
    spec = last(text)
    integral = spec.activation.name in ("none", "relu")
    x, w, b = (integers if integral else reals)(spec)
    for vector, change in (
        ("row", {}),
        ("line", {"copy": "whole"}),
        ("taps", {"vectors": 2}),
        ("plane", {"copy": "whole"}),
        ("plane", {"depth": spec.axes[0].positions}),
    ):
        tiles = tiles_of(spec, vector, **change)
        assert illegal(asdict(tiles), spec, HERE) is None
        compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=integral).require()


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("text", ["in=1x8x3x5x7 co=2 k=3 s=2 p=1 op=1", "in=2x4x3x3x19 co=3 k=3 s=1 p=1"])
def test_nothing_is_read_or_written_beyond_the_tensors(text: str, end: bool) -> None:
    spec = last(text)
    x, w, b = integers(spec)
    for vector, change in (
        ("row", {}),
        ("line", {"copy": "whole"}),
        ("taps", {}),
        ("plane", {}),
        ("plane", {"depth": 3}),
    ):
        y = within_guards(spec, tiles_of(spec, vector, **change), end=end)
        np.testing.assert_array_equal(y, reference(spec, x, w, b))


@pytest.mark.parametrize("width", [4, 5, 8, 15, 16, 31, 33])
@pytest.mark.parametrize(("channels", "stride"), [(1, 2), (2, 2), (3, 2), (4, 2), (3, 1), (8, 1), (2, 4)])
def test_a_row_is_written_by_vectors_of_all_its_channels(channels: int, stride: int, width: int) -> None:
    spec = last(f"in=1x2x2x3x{width} co={channels} k=3 s=1x1x{stride} p=0x0x1")
    row, simplify, written = spec.axes[2].out, Analyzer().simplify, []
    for at, loops in statements(scheduled(spec, tiles_of(spec, "row"))[KERNEL].body):
        if not isinstance(at, s_tir.SBlockRealize) or at.block.name_hint != "row":
            assert not isinstance(at, s_tir.SBlockRealize) or at.block.name_hint != "output"
            continue
        column, vectors = at.block.iter_vars[-2].var, loops[-1]
        for i in range(int(vectors.extent)):
            first = replaced(at.iter_values[-2], {vectors.loop_var: tirx.const(i, "int32")})
            for store in every(tirx.BufferStore, at.block.body):
                *_, w, ramp = store.indices
                begin = int(simplify(replaced(w, {column: first}) * channels + ramp.base))
                written.append(range(begin, begin + int(ramp.lanes)))
    assert {i for part in written for i in part} == set(range(row * channels))
    assert sum(map(len, written)) < row * channels + max(map(len, written))


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("in=1x2x2x3x16 co=5 k=2 s=2", {}),  # ten vectors
        ("in=1x2x2x3x16 co=9 k=3 s=1", {}),
        ("in=1x2x2x3x1 co=2 k=2 s=2", {}),  # a row shorter than two columns of each phase
        ("in=1x2x2x3x16 co=8 k=5x5x3 s=5x5x1 p=0x0x1 act=relu", {}),  # 200 vectors to unroll
        ("in=1x2x2x3x16 co=4 k=2 s=2", {"scalars": 2, "task": 2}),  # tasks of some of the channels
        ("in=1x2x2x3x16 co=3 k=2 s=2", {"scalars": 1, "task": 1}),  # of one
    ],
)
def test_other_rows_are_written_element_by_element(text: str, change: dict[str, int]) -> None:
    spec = last(text)
    assert weaves(spec) == bool(change)
    body = scheduled(spec, tiles_of(spec, "row", **change))[KERNEL].body
    names = {at.block.name_hint for at, _ in statements(body) if isinstance(at, s_tir.SBlockRealize)}
    assert "output" in names
    assert "row" not in names
    x, w, b = integers(spec)
    compare(
        spec, kernel(spec, tiles_of(spec, "row", **change), optimised=False)(x, w, b), x, w, b, exact=True
    ).require()


def test_planes_as_they_lie_are_copied_in_squares() -> None:
    """In squares of eight, of 35 columns; three that are left go one by one."""
    spec = last("in=1x16x3x5x7 co=2 k=3 s=2 p=1")
    stores = [
        store
        for at, _ in statements(scheduled(spec, tiles_of(spec, "plane"))[KERNEL].body)
        if isinstance(at, s_tir.SBlockRealize) and at.block.name_hint == "pad"
        for store in every(tirx.BufferStore, at.block.body)
    ]
    lanes = [int(store.indices[-1].lanes) if isinstance(store.indices[-1], tirx.Ramp) else 1 for store in stores]
    assert max(lanes) == 8
    assert lanes.count(8) >= 8


@pytest.mark.parametrize(
    ("text", "vectors"),
    [
        ("in=1x256x32x32x32 co=1 k=1x2x2 s=1x2x2", {"taps", "plane"}),
        ("in=1x320x21x21x21 co=2 k=4 s=2 p=1", {"taps", "plane"}),
        ("in=1x16x16x32x32 co=3 k=3 s=1 p=1", {"row", "line"}),
    ],
)
def test_few_channels_that_come_last_are_no_vectors(text: str, vectors: set[str]) -> None:
    for name in ("llvm:x86-64-v3", "llvm:x86-64-v4", "llvm:znver5"):
        assert baseline(last(text), target(name).machine).tiles.vector in vectors


def test_rows_of_activations_that_are_much_code_are_woven_where_they_are_few() -> None:
    for channels, activation, few in ((8, "relu", True), (4, "mish", True), (8, "mish", False), (1, "tanh", True)):
        assert weaves(last(f"in=1x2x2x3x16 co={channels} k=3x3x1 s=3x2x1 act={activation}")) == few


@pytest.mark.parametrize("on", ["llvm:x86-64-v2", "llvm:neoverse-n1"])
def test_vectors_of_four_sums_are_not_woven(on: str) -> None:
    spec = last("in=1x8x3x4x18 co=2 k=3 s=2 p=1 op=1")
    assert not any(e.tiles.by_taps for e in candidates(spec, target(on).machine))
    body = scheduled(spec, Tiles("row", 4, 1, 2, 1, 2, 1, 2, 8, "task"))[KERNEL].body
    assert {at.block.name_hint for at, _ in statements(body) if isinstance(at, s_tir.SBlockRealize)} >= {"output"}


def test_rows_that_are_woven_cost_less() -> None:
    woven, apart = last("in=1x32x16x16x16 co=4 k=2 s=2"), last("in=1x32x16x16x16 co=5 k=2 s=2")
    costs = [
        next(e.storing for e in candidates(s, V4.machine) if e.tiles.vector == "row") / s.channels_out
        for s in (woven, apart)
    ]
    assert costs[0] < 0.6 * costs[1]


def test_sums_by_taps_are_for_rows_that_are_woven() -> None:
    spec = last("in=1x4x3x4x20 co=5 k=3 s=2")
    assert not weights_by_taps(spec, "taps")
    assert not any(e.tiles.by_taps for e in candidates(spec, V4.machine))
    assert weights_by_taps(last("in=1x4x3x4x20 co=4 k=5 s=2"), "plane")
    assert not weights_by_taps(last("in=1x4x3x4x20 co=5 k=5"), "plane")  # 625 taps of a row
    tiles = Tiles("taps", 16, 1, 9, 1, 5, 1, 2, 4, "task")
    assert "for sums by taps the layer has too many channels, taps or phases" in str(illegal(asdict(tiles), spec, V4))
