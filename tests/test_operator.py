"""The compiled operator equals the oracle, on every case and on layers nobody thought of."""

from __future__ import annotations

import math
import mmap
import re
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from kernels import HERE, Kernel, integers, kernel, reals
from strategies import specs

from opcompile import lower
from opcompile.bounds import compare
from opcompile.cases import CASES, Case, case, tagged
from opcompile.compiled import compiled
from opcompile.declare import Grain, Scope, declare
from opcompile.record import illegal
from opcompile.reference import linear, reference
from opcompile.spec import ACTIVATIONS, ConvTranspose3d
from opcompile.target import target
from schedules import llvm
from schedules.candidates import candidates
from schedules.layer import _beside
from schedules.rules import copies_chunks, weights_by_taps

# whose vectors hold 16 sums, as tiles here do; where they are narrower, LLVM splits them
WIDE = target("llvm:x86-64-v4")

# of the activations; the others differ in a formula, and take long together
QUICK = ("act-relu", "act-gelu", "act-tanh")


# Where several things are chosen at once, half of all ways in which every two choices meet; the others take long.
HALVES = pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.heavy)])


@cache
def kernel_of(name: str) -> Kernel:
    """The kernel of a case."""
    return kernel(case(name).spec)


def corner(example: Case) -> Any:
    rare = example.name.startswith("act-") and example.name not in QUICK
    return pytest.param(example, id=example.name, marks=[pytest.mark.heavy] * rare)


@pytest.mark.parametrize("example", [corner(example) for example in tagged("corner")])
def test_every_corner_case_is_exact_on_integers_and_within_the_bound_on_reals(example: Case) -> None:
    spec, run = example.spec, kernel_of(example.name)
    x, w, b = integers(spec)
    compare(spec, run(x, w, b), x, w, b, exact=True).require()
    x, w, b = reals(spec)
    compare(spec, run(x, w, b), x, w, b).require()


@pytest.mark.parametrize(
    "name", ["k3-s2", "k4-s2", "k5-s3", "dilated-gcd2", "channels-last", "huge-stride", "huge-stride-k", "k7-s4-d3"]
)
def test_nan_in_x_reaches_the_sums_that_it_reaches_in_the_oracle_and_no_others(name: str) -> None:
    spec = case(name).spec
    x, w, b = reals(spec)
    x.ravel()[x.size // 2] = np.nan
    found, right = (np.isnan(y.astype(np.float64)) for y in (kernel_of(name)(x, w, b), reference(spec, x, w, b)))
    assert right.any()
    np.testing.assert_array_equal(found, right)


# which compare with a number, and the rest, which compute
SELECTIONS = ("relu", "relu6", "elu", "selu", "hard_sigmoid", "hard_tanh", "hard_shrink", "sparse_plus")


@pytest.mark.parametrize(
    ("activation", "dtype", "machine"),
    [
        pytest.param(name, dtype, machine, marks=[pytest.mark.heavy] * (rare or name not in SELECTIONS))
        for name in ACTIVATIONS
        for dtype, machine, rare in [
            ("float32", "llvm", False),
            ("float64", "llvm", True),
            ("float16", "llvm", True),
            ("bfloat16", "llvm", True),
            ("float32", "llvm:x86-64-v3", True),
        ]
    ],
)
@pytest.mark.parametrize(
    "text", ["in=1x3x2x3x19 co=5 k=1x1x3 s=1x1x2 p=0x0x1 op=0x0x1", "in=1x3x2x2x3 co=19 k=2 layout=NDHWC"]
)
def test_no_activation_makes_a_number_of_nan(activation: str, dtype: str, machine: str, text: str) -> None:
    """In vectors, and in the scalars beside them."""
    on = target(machine)
    if not on.native:
        pytest.skip(f"this machine does not run {machine}")
    spec = ConvTranspose3d.parse(f"{text} act={activation} dtype={dtype}")
    x, w, b = reals(spec)
    x.ravel()[::7] = np.nan
    found = np.isnan(kernel(spec, on=on)(x, w, b).astype(np.float64))
    assert 0 < found.sum() < found.size
    with np.errstate(invalid="ignore"):  # logaddexp warns of NaN
        right = reference(spec, x, w, b)
    np.testing.assert_array_equal(found, np.isnan(right))
    np.testing.assert_array_equal(found, np.isnan(linear(spec, x, w)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("act", ["leaky_relu:0", "leaky_relu:1", "elu:0", "elu:1", "selu:0:1", "hard_sigmoid:1:0"])
def test_a_parameter_of_0_or_1_loses_no_nan_and_no_infinity(act: str, dtype: str) -> None:
    """TVM makes 0 of a product with 0, whatever the other factor."""
    spec = ConvTranspose3d.parse(f"in=1x1x1x1x19 co=1 k=1 bias=0 act={act} dtype={dtype}")
    x, w = np.resize(np.array([np.nan, np.inf, -np.inf, -2, 0, 3], dtype), spec.x_shape), np.ones(spec.w_shape, dtype)
    found, right = kernel(spec)(x, w), reference(spec, x, w)
    beyond = ~np.isfinite(x)
    np.testing.assert_array_equal(found[beyond], right[beyond])
    finite = np.where(beyond, 0, x)
    compare(spec, np.where(beyond, reference(spec, finite, w), found), finite, w).require()


@given(spec=specs())
@settings(max_examples=40)
def test_any_legal_layer_compiles_and_equals_the_oracle(spec: ConvTranspose3d) -> None:
    x, w, b = integers(spec)
    compare(spec, kernel(spec, optimised=False)(x, w, b), x, w, b, exact=True).require()


VECTORS = ["channels", "row", "line"]
RAGGED = ["prime-sizes", "groups-wide", "k-below-s-mixed", "huge-stride-k", "channels-last-groups"]


@pytest.mark.parametrize("rest", [False, pytest.param(True, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize("name", RAGGED)
def test_tiles_that_divide_nothing_are_legal(name: str, vector: Any, rest: bool) -> None:
    """At once one choice of bands and copy for each layer and vector, so that every two choices meet."""
    spec = case(name).spec
    m = spec.m_out
    channels = 32 if vector == "channels" else 3
    task = channels * -(-m // channels) if spec.groups > 1 else channels
    c = spec.c_in
    chunk = max(n for n in range(1, c) if c % n == 0) if c > 1 else 1
    rows = 1 if vector == "line" else 2
    at_once = llvm.Tiles(vector, 16, 2, 3, rows, task, depth=2, height=4, chunk=chunk, copy="task")
    depth, height, _ = (axis.positions for axis in spec.axes)
    in_turn = replace(at_once, bands_d=-(-depth // 2), bands_h=-(-height // 4), bands_m=-(-m // task))
    x, w, b = integers(spec)
    copies = ["task", "whole", *(["chunk"] if vector != "channels" and copies_chunks(spec) else [])]
    n, v = RAGGED.index(name), VECTORS.index(vector)
    chosen = ((at_once, in_turn)[(n + v) % 2], copies[(n // 2 + v) % len(copies)])
    for bands, copy in product((at_once, in_turn), copies):
        if ((bands, copy) != chosen) == rest:
            tiles = replace(bands, copy=copy)  # type: ignore[arg-type]
            compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize(
    "text",
    [
        "in=Nx24x3x4x20 co=3 k=2x4x4 s=1x2x2 p=1x3x3",
        "in=1x24x3x5x19 co=5 k=2x3x3 s=1x2x2 p=1 op=0x1x1 dtype=float16 act=relu",
        "in=1x24x3x5x19 co=4 k=3 s=1x2x1 p=1 g=2 dtype=bfloat16 bias=0",
        "in=1x24x3x4x9 co=5 k=1x3x2 s=2 dtype=float64",
    ],
)
@pytest.mark.parametrize("vector", ["row", "line"])
def test_a_task_may_copy_x_by_chunks_of_its_channels(text: str, vector: Any) -> None:
    spec = ConvTranspose3d.parse(text)
    m = spec.m_out
    lanes = 8 if spec.dtype == "float64" else 16
    tiles = llvm.Tiles(vector, lanes, 1, 2, 1, -(-m // 2) * 2, depth=1, height=2, chunk=4, copy="chunk", bands_h=2)
    x, w, b = integers(spec, batch=2) if spec.batch is None else integers(spec)
    compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize(
    ("text", "on", "copy"),
    [
        ("in=1x128x12x12x20 co=2 k=3 p=1", "llvm:znver5", "whole"),
        ("in=1x128x12x12x20 co=2 k=3 p=1", "llvm:znver4", "chunk"),  # not measured there
        ("in=1x128x14x14x14 co=3 k=2 s=2", "llvm:znver5", "chunk"),  # no tap overlaps another
    ],
)
def test_planes_that_several_tasks_read_are_copied_first_on_zen_5(text: str, on: str, copy: str) -> None:
    first = candidates(ConvTranspose3d.parse(text), target(on).machine)[0].tiles
    assert (first.vector, first.copy) == ("plane", copy)


@HALVES
@pytest.mark.parametrize(
    ("text", "through"),
    [
        ("in=1x5x5x3x7 co=3 k=2 s=2", True),
        ("in=2x4x4x2x9 co=3 k=2x1x2 s=3x1x3 op=1x0x1 act=relu", True),
        ("in=1x4x5x3x7 co=4 k=1x1x3 s=1 p=0x0x1", True),  # taps of a row alone
        ("in=1x6x5x4x5 co=6 k=2x1x2 s=2x1x2 g=2 layout=NDHWC", True),
        ("in=Nx4x5x3x7 co=3 k=1x2x2 s=1x2x2 p=0x2x0 dtype=float16", True),
        ("in=1x4x5x3x7 co=3 k=2x2x1 s=2x2x1 p=2:0x0x0 dtype=bfloat16", True),
        ("in=1x3x5x2x6 co=2 k=4 s=4", True),  # 64 phases, as axes
        ("in=1x4x5x3x7 co=4 k=2 s=2 p=1", False),  # the phases of a plane read two of X
        ("in=1x4x5x3x7 co=4 k=1x3x2 s=1x2x2 p=0x1x0", False),
    ],
)
def test_a_line_goes_through_planes_where_no_tap_reads_another(text: str, through: bool, half: int) -> None:
    spec = ConvTranspose3d.parse(text)
    depth, height, _ = (axis.positions for axis in spec.axes)
    m = spec.m_out
    x, w, b = integers(spec)
    for i, (copy, (planes, bands)) in enumerate(product(("task", "whole"), ((2, 1), (depth, 1), (2, -(-depth // 2))))):
        tiles = llvm.Tiles("line", 16, 1, m, 1, m, planes, height, 1, copy, bands)  # type: ignore[arg-type]
        assert illegal(asdict(tiles), spec, WIDE) is None
        assert llvm.joined(spec, tiles) == (planes if through else 1)
        assert llvm.joined(spec, replace(tiles, vector="row")) == 1
        assert llvm.joined(spec, replace(tiles, height=height - 1)) == 1
        if i % 2 == half:
            compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=True).require()


@HALVES
@pytest.mark.parametrize(
    "text",
    [
        "in=1x5x3x5x18 co=2 k=2x3x3 s=1x2x2 p=1 op=0x1x1",
        "in=2x4x2x3x40 co=3 k=1x4x4 s=1x2x2 p=0x1x1 act=relu",
        "in=1x3x3x4x7 co=4 k=2 s=2 bias=0",
        "in=1x6x4x5x6 co=4 k=2x3x4 s=1x3x2 d=3x1x2 p=1 g=2",
        "in=1x3x3x4x5 co=1 k=2x1x3 s=3x2x4",
        "in=Nx3x3x4x5 co=2 k=3 s=1 p=1",
        "in=1x4x3x4x20 co=2 k=1x3x3 s=1x2x2 dtype=float16",
        "in=1x4x3x4x20 co=2 k=1x3x3 s=1x2x2 dtype=bfloat16",
    ],
)
def test_each_tap_may_have_sums_of_its_own(text: str, half: int) -> None:
    spec = ConvTranspose3d.parse(text)
    x, w, b = integers(spec)
    c, m = spec.c_in, spec.m_out
    weights = weights_by_taps(spec, "taps")
    assert weights[-1] == m * spec.axes[1].kernel * spec.axes[2].kernel
    for i, scalars in enumerate(sorted({weights[0], max(n for n in weights if n < 20)}, reverse=True)):
        for j, (copy, bands, chunk) in enumerate((("task", 2, c), ("whole", 1, c), ("chunk", 1, c // 2))):
            if copy == "chunk" and (i or c % 2):
                continue
            tiles = llvm.Tiles("taps", 16, 1 + i, scalars, 1, m, 1, 2, chunk, copy, bands)  # type: ignore[arg-type]
            if spec.axes[0].positions % bands == 0:
                assert illegal(asdict(tiles), spec, WIDE) is None
            if (i + j) % 2 == half:
                compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize(
    ("text", "ways"),
    [
        ("in=1x6x3x5x18 co=2 k=3 s=2 p=1 op=1", [("task", 1, 1), ("task", 3, 1)]),
        ("in=2x4x3x3x7 co=1 k=2x4x4 s=1x2x2 p=1 act=relu", [("chunk", 1, 2), ("whole", 2, 1)]),
        ("in=1x4x3x4x9 co=4 k=2 s=2 bias=0", [("task", 2, 1), ("chunk", 3, 1)]),
        # a tap further from its row than a vector is long
        ("in=1x8x4x5x20 co=4 k=2x3x4 s=1x3x2 d=3x1x2 p=1 g=2", [("whole", 1, 1)]),
        ("in=1x2x3x2x40 co=1 k=2x1x3 s=3x2x1 p=0x0x1", [("task", 1, 3)]),
        ("in=Nx4x3x4x5 co=2 k=3 s=1 p=1", [("whole", 3, 1), ("chunk", 1, 1)]),
        ("in=1x4x2x3x20 co=1 k=3 s=1x2x4 p=1x2x1 op=0x0x3", [("task", 1, 1)]),
        # planes are cropped
        ("in=1x4x4x4x8 co=2 k=1x3x4 s=1x2x2 p=0x2x3 dtype=float16", [("task", 4, 1), ("task", 2, 2)]),
        ("in=1x4x4x4x8 co=1 k=1x3x3 s=1x2x2 p=0x1x1 dtype=bfloat16", [("chunk", 2, 1)]),
        ("in=1x2x3x3x6 co=1 k=3x3x7 s=2 p=1x1x3 dtype=float64", [("task", 1, 1)]),
        # taps that read beside X everywhere
        ("in=1x4x2x3x5 co=1 k=3x1x3 d=6x1x1 p=6x0x1", [("task", 2, 1), ("chunk", 1, 2)]),
        # as many taps as there may be
        ("in=1x8x2x4x4 co=2 k=5 s=2 p=2 op=1", [("whole", 1, 1), ("chunk", 2, 1)]),
        ("in=1x4x3x3x5 co=1 k=7 s=3 p=2", [("task", 1, 1)]),
        # phases that would be axes
        ("in=1x4x2x3x4 co=2 k=5 s=4 p=1", [("whole", 2, 1), ("task", 1, 2)]),
        ("in=1x4x3x2x3 co=1 k=4 s=4 d=1x1x3 act=relu", [("task", 1, 1)]),
        # nothing to read before the sums of the first tap
        ("in=1x4x3x1x2 co=1 k=1x1x3 d=1x1x17 p=0x0x17", [("task", 1, 1)]),
    ],
)
def test_taps_may_be_summed_at_planes_of_x_as_they_lie(text: str, ways: list[tuple[Any, int, int]]) -> None:
    spec = ConvTranspose3d.parse(text)
    x, w, b = integers(spec)
    c, m, rows = spec.c_in, spec.m_out, spec.axes[1].positions
    lanes, scalars = 8 if spec.dtype == "float64" else 16, max(n for n in weights_by_taps(spec, "plane") if n < 26)
    for copy, depth, bands in ways:
        chunk = c // 2 if copy == "chunk" else c
        tiles = llvm.Tiles("plane", lanes, 1, scalars, 1, m, depth, rows, chunk, copy, bands)
        assert illegal(asdict(tiles), spec, WIDE) is None
        compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize(
    "text",
    [
        "in=1x3x4x7x18 co=3 k=3x7x7 s=1x2x2 p=1x3x3 g=3",
        "in=1x2x3x8x9 co=2 k=2x5x5 s=1x2x2 p=0x2x2 op=0x1x1 g=2 dtype=float16",
        "in=1x2x3x8x9 co=2 k=3x4x4 s=1x1x2 p=1 d=1x2x1 g=2",
        "in=1x6x3x6x17 co=1 k=3 s=1 p=1",  # several channels, each with all its taps
        "in=1x6x3x6x17 co=2 k=3x3x2 s=1x2x2 g=2 layout=NDHWC",
        "in=1x2x2x9x9 co=2 k=1x9x7 p=0x4x3 g=2",  # more taps than are unrolled
    ],
)
def test_rows_of_a_tile_may_share_what_their_taps_read(text: str) -> None:
    spec = ConvTranspose3d.parse(text)
    x, w, b = integers(spec)
    for vectors, rows in ((2, 4), (1, 8)):
        tiles = llvm.Tiles("row", 8, vectors, 1, rows, 1, 1, rows, spec.c_in, "task")
        compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize(
    "text",
    [
        "in=2x4x3x4x4 co=20 k=4 s=2 p=1",
        "in=1x6x3x3x5 co=24 k=3 s=1 p=1 g=2",
        "in=1x4x2x3x3 co=16 k=3 s=2 p=1 op=1 layout=NDHWC",
        "in=1x3x2x4x2 co=17 k=5x3x3 s=1 p=3:0x2:2x0:2 d=1x2x1",
    ],
)
def test_a_tile_may_have_all_rows_of_a_plane_of_which_each_tap_takes_what_reads_x(text: str) -> None:
    spec = ConvTranspose3d.parse(text)
    _, height, width = (axis.positions for axis in spec.axes)
    _, taps_h, taps_w = (axis.most_taps for axis in spec.axes)
    all_rows = [e.tiles for e in candidates(spec, WIDE.machine) if e.tiles.trims_rows(height, taps_h * taps_w)]
    ways = {tiles.trims(width, taps_w): tiles for tiles in reversed(all_rows)}
    assert True in ways, "rows and columns"
    x, w, b = integers(spec)
    for tiles in ways.values():
        compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize(
    "text",
    [
        "in=1x21x3x3x4 co=3 k=1x1x2 s=3x2x5 p=0:0x0:1x1:1 op=0x0x1 g=3 bias=0",  # 30 phases, and one output channel
        "in=1x4x2x2x17 co=1 k=1x3x7 s=4x3x5 p=2:1x2:3x3:3 op=0x2x0 d=1x1x3",  # 30 phases, and no tap meets Y
        "in=1x32x1x1x16 co=4 k=2x3x3 s=1x2x1 p=1:0x0x0 d=3x3x1 g=2 bias=0 act=gelu dtype=float64",
    ],
)
def test_what_no_tile_can_do_is_not_tried(text: str) -> None:
    spec = ConvTranspose3d.parse(text)
    x, w, b = integers(spec)
    check = compare(spec, kernel(spec, optimised=False)(x, w, b), x, w, b, exact=spec.activation.name == "none")
    check.require()


@pytest.mark.parametrize("more", ["layout=NDHWC", "p=1", "g=2 layout=NDHWC", "layout=NDHWC dtype=float16"])
def test_vectors_may_be_halves_where_whole_ones_waste_channels(more: str) -> None:
    """Zen 4 computes vectors of 64 bytes in two halves: of 24 channels two whole ones waste a quarter."""
    spec = ConvTranspose3d.parse(f"in=1x12x3x4x9 co={48 if 'g=2' in more else 24} k=2x3x3 s=1x2x2 {more}")
    zen4, other = target("llvm:znver4"), target("llvm:x86-64-v4")
    halves = [e.tiles for e in candidates(spec, zen4.machine) if e.tiles.lanes == 8]
    assert {t.vector for t in halves} == {"channels"}
    tiles = next(t for t in halves if t.vectors == 3 and t.scalars > 2)
    x, w, b = integers(spec)
    compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=True).require()
    assert illegal(asdict(tiles), spec, zen4) is None
    assert "a vector of llvm:x86-64-v4 has 64 bytes, 16 sums" in str(illegal(asdict(tiles), spec, other))
    assert "16 sums" in str(illegal(asdict(replace(tiles, vector="row")), spec, zen4))
    assert all(e.tiles.lanes == 16 for e in candidates(spec, other.machine))


def test_vectors_are_whole_where_they_waste_no_channels() -> None:
    spec = ConvTranspose3d.parse("in=1x12x3x4x9 co=32 k=3 s=2")
    assert all(e.tiles.lanes == 16 for e in candidates(spec, target("llvm:znver4").machine))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("scalars", 4, "one of 3, 9, 18"),
        ("task", 1, "the 2 channels of a group"),
        ("chunk", 2, "all input channels"),
        ("rows", 2, "must be 1"),
        ("vector", "plane", "all 5 rows"),
    ],
)
def test_sums_by_taps_are_of_whole_rows_of_taps(field: str, value: Any, words: str) -> None:
    spec = ConvTranspose3d.parse("in=1x4x3x4x20 co=2 k=3 s=2")
    tiles = llvm.Tiles("taps", 16, 1, 9, 1, 2, 1, 2, 4, "task")
    assert illegal(asdict(tiles), spec, WIDE) is None
    assert words in str(illegal({**asdict(tiles), field: value}, spec, WIDE))


@pytest.mark.parametrize(
    "text", ["s=2 co=9 k=3", "s=2 co=2 k=5", "s=2 co=5 k=3 layout=NDHWC", "co=2 k=1x3x2 s=1x3x1 p=0x12:0x0 op=0x2x0"]
)
def test_not_every_layer_has_sums_by_taps(text: str) -> None:
    spec = ConvTranspose3d.parse(f"in=1x4x3x4x20 {text}")
    tiles = llvm.Tiles("taps", 16, 1, 9, 1, spec.channels_out, 1, 2, 4, "task")
    assert "for sums by taps the layer has" in str(illegal(asdict(tiles), spec, WIDE))


@pytest.mark.parametrize(
    ("text", "tiles"),
    [
        ("in=1x8x4x2x5 co=64 k=2 s=2 g=2", llvm.Tiles("channels", 16, 1, 5, 1, 16, 2, 2, 4, "whole")),
        ("in=1x8x4x2x20 co=16 k=1x4x4 s=1x2x2 p=0x1x1 g=2", llvm.Tiles("row", 16, 1, 4, 1, 4, 2, 2, 4, "task")),
    ],
)
def test_a_group_may_be_several_tasks(text: str, tiles: llvm.Tiles) -> None:
    spec = ConvTranspose3d.parse(text)
    x, w, b = integers(spec)
    compare(spec, kernel(spec, tiles, optimised=False)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize("text", ["in=1x16x4x6x20 co=128 k=2 s=2 g=2", "in=2x6x3x4x5 co=9 k=2 s=2 g=3"])
def test_with_channels_last_a_task_has_whole_groups(text: str) -> None:
    spec = ConvTranspose3d.parse(f"{text} layout=NDHWC")
    candidates = llvm.candidates(spec, HERE.machine)
    for tiles in {c.tiles.vector: c.tiles for c in candidates}.values():
        lower.scheduled(spec, tiles)
        assert illegal(asdict(tiles), spec, HERE) is None
    assert all(c.tiles.task >= spec.m_out for c in candidates)
    lanes = HERE.machine.vector_bytes // 4
    part = replace(candidates[0].tiles, vector="row", lanes=lanes, vectors=1, scalars=1, rows=1, task=1)
    assert "must cover the" in str(illegal(asdict(part), spec, HERE))


def test_a_dynamic_batch_is_one_kernel_for_every_batch() -> None:
    spec, run = case("batch-dynamic").spec, kernel_of("batch-dynamic")
    for batch in (1, 2, 5):
        x, w, b = integers(spec, batch=batch)
        compare(spec, run(x, w, b), x, w, b, exact=True).require()


@pytest.mark.heavy
def test_all_candidates_of_a_layer_agree() -> None:
    spec = ConvTranspose3d.parse("in=1x5x3x5x18 co=20 k=3 s=2 p=1 op=1")
    candidates = llvm.candidates(spec, HERE.machine)
    assert len({(c.tiles.vector, c.tiles.rows) for c in candidates}) >= 8
    assert {c.tiles.height > c.tiles.rows for c in candidates} == {True, False}
    x, w, b = integers(spec)
    chosen = candidates[:: len(candidates) // 5]
    first, *others = [kernel(spec, c.tiles)(x, w, b) for c in chosen]
    for other in others:
        np.testing.assert_array_equal(first, other)


# --- no zero-stuffing ---


@pytest.mark.parametrize("name", ["k2-s2", "k3-s2", "k4-s2", "k5-s3", "dilated-gcd2", "k-below-s"])
def test_every_multiplication_is_by_a_tap(name: str) -> None:
    """The phase blocks together reduce over exactly the taps of the kernel, once each."""
    spec = case(name).spec
    text = re.sub(r"T\.int64\((\d+)\)", r"\1", declare(spec).script())
    reduced = [
        np.prod([int(n) for n in re.findall(r"T\.axis\.reduce\((\d+)", block)] or [0])
        for block in text.split('with T.sblock("')[1:]
        if block.startswith("phase_")
    ]
    remapped = sum(
        p.taps * q.taps * r.taps for p in spec.axes[0].phases for q in spec.axes[1].phases for r in spec.axes[2].phases
    )
    grids = re.findall(r"for ([\w, ]+) in T\.grid\(([\d, ]+)\):\s+with T\.sblock\(\"phase_", text)
    assert grids
    taps = 0
    for names, sizes in grids:
        size = dict(zip(names.split(", "), map(int, sizes.split(", ")), strict=True))
        taps += size["td"] * size["th"] * size["tw"]
    assert taps == remapped
    assert reduced


@pytest.mark.parametrize(
    ("layer", "blocks"),
    [
        ("k=9 s=7", {"2_2_2", "2_2_1", "2_1_2", "2_1_1", "1_2_2", "1_2_1", "1_1_2", "1_1_1"}),
        ("k=4 s=4", {"1_1_1"}),
        ("k=7x8x4 s=4", {"2_2_1", "1_2_1"}),
        ("k=6x4x3 s=4x4x6", {"2_1_1", "1_1_1"}),  # one that no tap meets has no sums
        ("k=6 s=4x4x8 d=1x1x4", {"2_2_3", "2_1_3", "1_2_3", "1_1_3"}),
        ("k=6 s=4 p=6x3x3", {"1_2_2", "1_2_1", "1_1_2", "1_1_1"}),  # an output that is too short for those with two
        ("k=1x1x2 s=9 p=1:16x0x0", set()),  # and for any with taps
    ],
)
def test_many_phases_are_axes_of_blocks_by_their_taps_and_no_zero_is_multiplied(layer: str, blocks: set[str]) -> None:
    spec = ConvTranspose3d.parse(f"in=1x4x3x4x5 co=5 {layer}")
    assert spec.phases_as_axes
    text = declare(spec).script()
    assert set(re.findall(r'T\.sblock\("phases_(\w+)"\)', text)) == blocks
    assert 'T.sblock("phase_' not in text
    x, w, b = integers(spec)
    compare(spec, kernel(spec, optimised=False)(x, w, b), x, w, b, exact=True).require()


def test_few_phases_are_blocks_of_their_own() -> None:
    assert not case("k5-s3").spec.phases_as_axes


def test_taps_of_many_phases_are_summed_by_themselves_as_far_as_that_compiles_soon() -> None:
    def weights(layer: str) -> list[int]:
        return weights_by_taps(ConvTranspose3d.parse(f"in=1x64x4x6x6 co=2 {layer}"), "plane")

    assert weights("k=5 s=4")
    assert weights("k=6 s=3")
    assert not weights("k=6 s=4")
    assert not weights("k=4 s=5")  # 125 phases are too much code to write them


@pytest.mark.parametrize(
    ("layer", "blocks"),
    [("k=1 s=4", 1), ("k=2 s=4", 8), ("k=3 s=4", 27), ("k=4 s=4 d=2", 8), ("k=1 s=5", 0), ("k=4 s=8 d=2", 0)],
)
def test_phases_without_taps_are_not_summed(layer: str, blocks: int) -> None:
    """Unless all are axes: because those with taps are many, or those to be written."""
    spec = ConvTranspose3d.parse(f"in=1x4x2x2x3 co=4 {layer}")
    assert declare(spec).script().count('T.sblock("phase_') == blocks
    assert spec.phases_as_axes == (not blocks)
    x, w, b = integers(spec)
    compare(spec, kernel(spec, optimised=False)(x, w, b), x, w, b, exact=True).require()


@pytest.mark.parametrize(
    "text", ["in=1x8x3x3x3 co=8 k=3 s=9", "in=1x8x4x4x4 co=16 k=7 s=4 d=3", "in=1x4x3x3x3 co=4 k=16 s=8"]
)
def test_code_stays_small_however_many_phases(text: str) -> None:
    assert len(lower.lower(ConvTranspose3d.parse(text), HERE, "baseline").object_code) < 300_000


# --- indices ---


def test_gpus_index_tensors_of_fewer_than_2_30_elements_with_32_bits() -> None:
    small = ConvTranspose3d.parse("in=1x4x8x8x8 co=4 k=2 s=2")
    large = ConvTranspose3d.parse("in=1x64x400x400x400 co=32 k=2 s=2")
    assert large.y_shape == (1, 32, 800, 800, 800)
    assert Scope.of(small, Grain()).narrowed().index == "int32"
    assert Scope.of(large, Grain()).narrowed().index == "int64"
    assert Scope.of(replace(small, batch=None), Grain()).narrowed().index == "int64"


@pytest.mark.parametrize("text", ["in=1x8x6x14x20 co=16 k=3 s=1 p=1", "in=1x8x27x27x27 co=16 k=3 s=1 p=1"])
def test_products_of_a_register_tile_compute_no_addresses(text: str) -> None:
    """A broadcast element lies at a constant distance from the first: LLVM once added and widened an index for each."""
    spec, machine = ConvTranspose3d.parse(text), target("llvm:znver4")
    estimates = llvm.candidates(spec, machine.machine)
    tiles = next(e.tiles for e in estimates if e.tiles.trims(spec.axes[2].positions, 3))
    assembly = str(compiled(lower.scheduled(spec, tiles), machine.tvm()).mod.inspect_source("asm"))
    loops = [re.findall(r"^\t(\w+)", block, re.M) for block in re.split(r"^\.LBB", assembly, flags=re.M)]
    products = [loop for loop in loops if sum(op.startswith("vfmadd") for op in loop) >= tiles.scalars - 1]
    assert products
    assert all(sum(op.startswith(("lea", "mov")) for op in loop[: loop.index("jne")]) <= 2 for loop in products)


@pytest.mark.parametrize("on", [f"llvm:{name}" for name in ("x86-64-v4", "icelake-server", "sapphirerapids", "znver5")])
def test_sums_of_a_register_tile_stay_in_registers(on: str) -> None:
    """27 sums, three vectors of X and a weight, two channels a turn: LLVM once loaded all vectors of X first."""
    spec = ConvTranspose3d.parse("in=1x192x4x8x16 co=8 k=3 p=1 layout=NDHWC")
    tiles = llvm.Tiles("plane", 16, 3, 9, 1, 8, 1, 8, 192, "whole")
    assembly = str(compiled(lower.scheduled(spec, tiles), target(on).tvm()).mod.inspect_source("asm"))
    turns = [block.split("\tjne\t")[0] for block in re.split(r"^\.LBB", assembly, flags=re.M)]
    products = [turn for turn in turns if turn.count("vfmadd") >= 2 * 27]
    assert products
    assert not any("(%rsp)" in turn for turn in products)


def test_an_element_beyond_2_31_is_read() -> None:
    """X of 4.4 GB, of which one element is non-zero and one output is wanted: untouched pages cost nothing."""
    spec = ConvTranspose3d.parse("in=1x1x1291x1300x1300 co=1 k=1 p=1290:0x1299:0x1299:0 bias=0 dtype=float16")
    assert spec.y_shape == (1, 1, 1, 1, 1)
    assert 1291 * 1300 * 1300 > 2**31
    tiles = lower.choose(spec, HERE, "baseline")[0]
    function = compiled(lower.scheduled(spec, tiles), HERE.tvm())[lower.KERNEL]
    x = np.frombuffer(mmap.mmap(-1, 2 * 1291 * 1300 * 1300), np.float16).reshape(1, 1, 1291, 1300, 1300)
    x[0, 0, -1, -1, -1] = 3
    w = lower.packing(spec, tiles)(np.full(spec.w_shape, 2, np.float16))
    y = tvm.runtime.empty((1, 1, 1, 1, 1), "float16")
    function(tvm.runtime.from_dlpack(x), tvm.runtime.tensor(w), y)
    assert y.numpy().item() == 6


def test_gelu_is_far_within_its_bound() -> None:
    """Its error function is a polynomial of ours: a quarter of what the bound grants, and exact at both ends."""
    spec = ConvTranspose3d.parse("in=1x1x1x1x24001 co=1 k=1 s=1 bias=0 act=gelu")
    x = np.linspace(-12, 12, 24001, dtype=np.float32).reshape(spec.x_shape)
    y = kernel(spec)(x, np.ones(spec.w_shape, np.float32)).ravel().astype(np.float64)
    z = x.ravel().astype(np.float64)
    expected = [0.5 * v * (1 + math.erf(v * math.sqrt(0.5))) for v in z.tolist()]
    assert np.all(np.abs(y - expected) <= 4 * 2.0**-24 * np.abs(z))
    assert np.all(y[z < -6] == 0)
    assert np.all(y[z > 6] == z[z > 6])


def test_reads_beside_x_are_counted_however_long_an_axis_is() -> None:
    for axis in {axis for each in CASES for axis in each.spec.axes}:
        offsets = [offset for phase in axis.phases for offset in phase.offsets()]
        reads = [q + offset for offset in offsets for q in range(axis.positions)]
        assert _beside(axis) == sum(not 0 <= i < axis.size for i in reads) / max(1, len(reads))
    longest = ConvTranspose3d.parse(f"in=1x1x1x1x{2**31 - 1} co=1 k=1")
    assert candidates(longest, HERE.machine)
