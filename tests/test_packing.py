"""The map from canonical to packed weights: exact, invertible on paper, and refused where it makes no sense."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from opcompile.errors import ArtifactError, CallError
from opcompile.packing import Packing

# 12 output channels filled up to 16, as two vectors of 8
VECTORS = Packing((8, 16, 3, 3, 3), (8, 2, 8, 3, 3, 3), (1, 3, 4, 5, 0, 2))


def test_channels_become_vectors_and_the_rest_is_zero() -> None:
    w = np.arange(8 * 12 * 27, dtype=np.float32).reshape(8, 12, 3, 3, 3) + 1
    packed = VECTORS(w)
    assert packed.shape == VECTORS.shape == (2, 3, 3, 3, 8, 8)
    assert packed.flags.c_contiguous
    for c, m, d, h, k in np.ndindex(8, 16, 3, 3, 3):
        assert packed[m // 8, d, h, k, c, m % 8] == (w[c, m, d, h, k] if m < 12 else 0)


def test_taps_are_filled_up_too() -> None:
    packed = Packing((2, 3, 4, 4, 4), (2, 3, 2, 2, 2, 2, 2, 2), (2, 4, 6, 3, 5, 7, 0, 1))(np.ones((2, 3, 3, 3, 3)))
    assert packed.sum() == 2 * 3 * 27
    assert not packed[1, :, :, 1].any()


def test_identity_is_the_weight_itself() -> None:
    w = np.random.default_rng(0).standard_normal((3, 2, 1, 2, 3))
    assert np.array_equal(Packing.identity(w.shape)(w), w)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_values_and_dtype_are_kept(dtype: type) -> None:
    w = np.arange(8 * 12 * 27).reshape(8, 12, 3, 3, 3).astype(dtype)
    packed = VECTORS(w)
    assert packed.dtype == dtype
    assert packed[1, 2, 0, 1, 5, 3] == w[5, 11, 2, 0, 1]


def test_a_strided_weight_packs_like_its_copy() -> None:
    w = np.arange(8 * 12 * 27.0).reshape(3, 3, 3, 12, 8).T
    assert np.array_equal(VECTORS(w), VECTORS(w.copy()))


def test_json_holds_all_of_it() -> None:
    assert Packing.from_json(json.loads(json.dumps(VECTORS.to_json()))) == VECTORS


@pytest.mark.parametrize(
    ("padded", "view", "order", "rule"),
    [
        ((2, 3), (2, 3), (0, 0), "permutation"),
        ((2, 3), (2, 3), (0, 2), "permutation"),
        ((2, 3), (2, 4), (0, 1), "number"),
        ((2, 0), (2, 0), (0, 1), "at least 1"),
        ((), (), (), "at least 1"),
    ],
)
def test_moves_that_do_not_fit_together(
    padded: tuple[int, ...], view: tuple[int, ...], order: tuple[int, ...], rule: str
) -> None:
    with pytest.raises(ArtifactError, match=rule):
        Packing(padded, view, order)


@pytest.mark.parametrize(
    "fields", [{}, {"padded": 1, "view": [1], "order": [0]}, {"padded": ["x"], "view": [1], "order": [0]}]
)
def test_json_that_is_no_packing(fields: dict) -> None:
    with pytest.raises(ArtifactError, match="packing"):
        Packing.from_json(fields)


@pytest.mark.parametrize("shape", [(8, 17, 3, 3, 3), (8, 12, 3, 3)])
def test_a_weight_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(CallError, match="does not fit"):
        VECTORS(np.zeros(shape))
