"""Rows of bfloat16 of two phases: rounded as everywhere else, and never shuffled."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernels import HERE, dtype_of, kernel
from tvm import tirx

from opcompile import lower
from opcompile.spec import ConvTranspose3d
from opcompile.target import Target, target
from schedules.statements import every

MACHINES = [target(f"llvm:x86-64-{level}") for level in ("v2", "v3", "v4")]
# Whole vectors, a part of one, two that overlap.
LAYERS = [
    "in=1x1x8x128x64 co=1 k=1x1x2 s=1x1x2 bias=0 dtype=bfloat16",
    "in=1x2x8x144x29 co=2 k=1x1x2 s=1x1x2 g=2 op=0x0x1 bias=0 dtype=bfloat16",
    "in=1x1x8x360x23 co=1 k=1x1x2 s=1x1x2 p=0x0x1 bias=0 dtype=bfloat16",
]


def every_number(spec: ConvTranspose3d) -> Any:
    """Every number of bfloat16, in an order that is none."""
    order = np.random.default_rng(0).permutation(2**16).astype(np.uint16)
    return np.resize(order, spec.x_shape).view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("on", [on for on in MACHINES if on.native], ids=lambda on: on.name)
@pytest.mark.parametrize("text", LAYERS)
def test_products_are_rounded_to_nearest_and_ties_to_even(text: str, on: Target) -> None:
    spec = ConvTranspose3d.parse(text)
    # products with 1 + 2^-7 end in ties too
    w = np.resize(np.array([1.0078125, -1.6640625], dtype_of(spec)), spec.w_shape)
    x = every_number(spec)
    got = kernel(spec, on=on)(x, w)
    ours, exact = (
        got.astype(np.float64),
        kernel(spec_in_float32(spec), on=on)(x.astype(np.float32), w.astype(np.float32)),
    )
    expected = exact.astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(ours, expected)
    assert np.isnan(ours).any()
    assert np.isinf(ours).any()


def spec_in_float32(spec: ConvTranspose3d) -> ConvTranspose3d:
    return ConvTranspose3d.parse(str(spec).replace(" dtype=bfloat16", ""))


@pytest.mark.parametrize("text", ["in=1x8x4x8x32 co=8 k=2 s=2", "in=1x32x6x8x16 co=32 k=3 s=2 p=1 op=1 g=32"])
def test_no_row_is_shuffled(text: str) -> None:
    spec = ConvTranspose3d.parse(f"{text} dtype=bfloat16")
    tiles, _ = lower.choose(spec, HERE, "baseline")
    (function,) = lower.scheduled(spec, tiles).functions.values()
    vectors = [each for each in every(tirx.Shuffle, function.body) if len(each.vectors) == 2]
    assert not vectors
    assert "opcompile_halves" in str(function)
