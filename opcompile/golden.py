"""The test vector of an artifact: outputs, of inputs that are a formula."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.errors import ArtifactError
from opcompile.manifest import GOLDEN, read_arrays
from opcompile.spec import ConvTranspose3d, at_batch, fits
from opcompile.tensors import stored

# amplitudes are in 64ths
X_SALT, W_SALT, B_SALT = 1, 2, 3
X_AMPLITUDE = B_AMPLITUDE = 64


def golden_values(index: NDArray[Any], salt: int, amplitude: int) -> NDArray[np.float64]:
    """Return ``k / 64`` with whole ``-amplitude <= k <= amplitude`` for each element index.

    ``k`` hashes the index by unsigned 32-bit arithmetic, which the C header repeats; with an
    amplitude of at most 128 every dtype holds the values exactly.
    """
    h = (np.asarray(index) & 0xFFFFFFFF).astype(np.uint32) + np.uint32(salt * 0x9E3779B9 & 0xFFFFFFFF)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    return ((h % np.uint32(2 * amplitude + 1)).astype(np.int64) - amplitude) / 64


def elements(
    spec: ConvTranspose3d,
    shape: Sequence[int | None],
    images: Iterable[int],
    channels: NDArray[np.int64],
    ranges: Sequence[range],
) -> NDArray[np.int64]:
    """Return where the elements of a box of an activation tensor lie in memory, in the order ``(N, C, D, H, W)``."""
    strides = spec.from_layout([math.prod(at_batch(shape[axis + 1 :], 1)) for axis in range(5)])
    box = np.ix_(np.array(list(images)), channels, *(np.array(r) for r in ranges))
    return np.asarray(sum(i * stride for i, stride in zip(box, strides, strict=True)), np.int64)


def w_amplitude(spec: ConvTranspose3d) -> int:
    """Return the amplitude of W that gives sums of about unit size, so that no activation saturates or overflows."""
    return max(1, min(128, math.isqrt(192**2 // max(1, spec.terms))))


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """A test vector: call with ``x, w, b``, compare the elements ``indices`` (flat, of Y) with ``expected``.

    ``w`` and ``b`` are None where the artifact holds its own; ``expected`` is the oracle's, in float64.
    """

    x: NDArray[Any]
    w: NDArray[Any] | None
    b: NDArray[Any] | None
    indices: NDArray[np.int64]
    expected: NDArray[np.float64]


def read_golden(
    directory: Path, manifest: dict[str, Any], spec: ConvTranspose3d, own_weight: bool, own_bias: bool
) -> Golden:
    """Return the test vector of an artifact, without what the artifact holds of its own. Raises `ArtifactError`."""
    bias = spec.bias and not own_bias
    batch, indices, expected = read_vector(directory, manifest, spec.x_shape, spec.y_shape)
    return Golden(
        x=golden_tensor(at_batch(spec.x_shape, batch), X_SALT, X_AMPLITUDE, spec.dtype),
        w=None if own_weight else golden_tensor(spec.w_shape, W_SALT, w_amplitude(spec), spec.dtype),
        b=golden_tensor((spec.channels_out,), B_SALT, B_AMPLITUDE, spec.dtype) if bias else None,
        indices=indices,
        expected=expected,
    )


def read_vector(
    directory: Path, manifest: dict[str, Any], given: tuple[int | None, ...], result: tuple[int | None, ...]
) -> tuple[int, NDArray[np.int64], NDArray[np.float64]]:
    """Return the batch of a test vector, and places and values of some elements of the result.

    ``given`` is the shape of a tensor that has the batch, ``result`` that of the result. Raises `ArtifactError`.
    """
    stored = read_arrays(directory, manifest, GOLDEN)
    try:
        batch, indices, expected = (stored[name] for name in ("batch", "indices", "expected"))
        if [array.dtype.name for array in (batch, indices, expected)] != ["int64", "int64", "float64"]:
            raise ValueError("its arrays are of other types")
        fitting = fits(at_batch(given, int(batch)), given) and indices.shape == expected.shape == (indices.size,)
        count = math.prod(at_batch(result, int(batch)))
        if not fitting or not indices.size or indices.min() < 0 or indices.max() >= count:
            raise ValueError("its indices are none of this layer's result")
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{GOLDEN} is no test vector of this layer: {error}; compile the layer again") from error
    return int(batch), indices, expected


def golden_tensor(shape: tuple[int, ...], salt: int, amplitude: int, dtype: str) -> NDArray[Any]:
    """Return a tensor of `golden_values`. Raises as `stored`."""
    return stored(dtype, golden_values(np.arange(math.prod(shape)), salt, amplitude).reshape(shape))
