"""X with channels last, copied in squares of channels and columns: right, by vectors, and asked for early."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from kernels import HERE, integers, kernel, scheduled
from tvm import s_tir, tirx
from tvm.sym import Analyzer

from opcompile.lower import KERNEL
from opcompile.reference import reference
from opcompile.spec import ConvTranspose3d
from schedules.fetches import BYTES_AHEAD
from schedules.llvm import Tiles
from schedules.statements import every, replaced
from schedules.tiles import CACHE_LINE
from tests.test_finish import fetched, statements


def tiles_of(spec: ConvTranspose3d, vector: Any, copy: Any) -> Tiles:
    lanes = HERE.machine.vector_bytes // (8 if spec.dtype == "float64" else 4)
    m, c = spec.m_out, spec.c_in
    return Tiles(vector, lanes, 1, 1, 1, task=m, depth=1, height=2, chunk=c, copy=copy)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("in=1x16x2x3x19 co=2 k=3 s=2 p=1 op=1", 8),  # three columns more than squares have
        ("in=2x12x3x2x8 co=3 k=2 s=2 act=relu", 4),
        ("in=1x8x2x3x16 co=3 k=1x3x3 s=1", 8),
        ("in=1x24x2x2x9 co=4 k=3 s=1 p=1 g=2", 4),
        ("in=1x8x2x3x11 co=1 k=1x3x4 s=1x1x2 p=0x1x3", 8),  # columns of X at both ends are read by no tap
        ("in=1x6x2x3x16 co=2 k=1x2x2 s=1x1x2", 0),  # six channels are no squares
        ("in=1x8x2x3x3 co=2 k=1x2x2 s=1x1x2", 0),  # nor are three columns
        ("in=1x8x2x2x10 co=2 k=1x2x2 s=1x1x2 dtype=float16", 8),
        ("in=1x8x2x2x10 co=2 k=1x2x2 s=1x1x2 dtype=float64", 8),
        ("in=1x8x2x2x10 co=2 k=1x2x2 s=1x1x2 dtype=bfloat16", 0),
        ("in=1x8x2x2x16 co=2 k=2 s=2", 8),
    ],
)
@pytest.mark.parametrize(("vector", "copy"), [("row", "whole"), ("line", "task")])
def test_what_is_copied_in_squares_is_right(text: str, size: int, vector: str, copy: str) -> None:
    spec = ConvTranspose3d.parse(f"{text} layout=NDHWC")
    tiles = tiles_of(spec, vector, copy)
    assert widest_of_copy(spec, tiles) == (min(size, tiles.lanes) or 1)
    x, w, b = integers(spec)
    y = kernel(spec, tiles, optimised=False)(x, w, b)
    np.testing.assert_array_equal(y, reference(spec, x, w, b if spec.bias else None))


def widest_of_copy(spec: ConvTranspose3d, tiles: Tiles) -> int:
    """How many elements the widest store of the copy of X writes."""
    blocks = (block for block in every(s_tir.SBlock, scheduled(spec, tiles)[KERNEL].body) if block.name_hint == "pad")
    stores = [store for block in blocks for store in every(tirx.BufferStore, block)]
    return max(int(getattr(store.indices[-1], "lanes", 1)) for store in stores)


@pytest.mark.parametrize(
    ("width", "vector", "size"),
    [
        (10, "line", 1),  # two rows are five register tiles of four columns: some tile has the end of one
        (10, "row", 4),
        (12, "line", 4),
    ],
)
def test_lines_that_are_cut_into_register_tiles_have_squares_within_them(width: int, vector: str, size: int) -> None:
    spec = ConvTranspose3d.parse(f"in=1x8x2x2x{width} co=2 k=2 s=2 layout=NDHWC")
    tiles = replace(tiles_of(spec, vector, "whole"), lanes=4)
    assert widest_of_copy(spec, tiles) == size
    x, w, b = integers(spec)
    np.testing.assert_array_equal(kernel(spec, tiles, optimised=False)(x, w, b), reference(spec, x, w, b))


@pytest.mark.parametrize("channels", [8, 24])
def test_each_line_of_a_row_is_asked_for_once_a_page_before_it_is_copied(channels: int) -> None:
    spec = ConvTranspose3d.parse(f"in=1x{channels}x2x3x16 co=2 k=3 s=2 p=1 op=1 layout=NDHWC")
    elements = []
    for at, loops in statements(scheduled(spec, tiles_of(spec, "row", "whole"))[KERNEL].body):
        element = fetched(at)
        if element is None or element.source.name != "X":
            continue
        squares, of_channels = loops[-2:]
        for square, turn in product(range(int(squares.extent)), range(int(of_channels.extent))):
            values = {squares.loop_var: square, of_channels.loop_var: turn}
            known = {var: tirx.const(value, var.ty.dtype) for var, value in values.items()}
            column, channel = (int(Analyzer().simplify(replaced(i, known))) for i in element.indices[-2:])
            elements.append(column * channels + channel)
    of_line = CACHE_LINE // spec.itemsize
    assert sorted(elements) == [BYTES_AHEAD // spec.itemsize + i * of_line for i in range(16 * channels // of_line)]


def test_the_channels_of_a_group_are_not_side_by_side_and_not_asked_for() -> None:
    spec = ConvTranspose3d.parse("in=1x16x2x3x16 co=4 k=3 s=2 p=1 op=1 g=2 layout=NDHWC")
    asked = [fetched(at) for at, _ in statements(scheduled(spec, tiles_of(spec, "row", "whole"))[KERNEL].body)]
    assert not [element for element in asked if element is not None and element.source.name == "X"]
