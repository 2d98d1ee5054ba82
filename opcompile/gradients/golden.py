"""The test vector of a derivative: operands that are a formula, and some elements of the result by the oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.golden import W_SALT, X_AMPLITUDE, X_SALT, elements, golden_tensor, golden_values, w_amplitude
from opcompile.gradients.gradient import Gradient, Shape
from opcompile.gradients.reference import reference
from opcompile.spec import Axis, ConvTranspose3d, at_batch

Array = NDArray[np.float64]

# What tells the values of one operand from those of another.
SALTS = {"dy": 4, "x": X_SALT, "w": W_SALT, "y": 5}

# A few channels and places stand for all.
_CHANNELS, _PLACES = 4, 3


@dataclass(frozen=True, slots=True, eq=False)
class GoldenGradient:
    """A test vector: call with ``operands``, compare the elements ``indices`` (flat) with ``expected``."""

    operands: dict[str, NDArray[Any]]
    indices: NDArray[np.int64]
    expected: Array


def amplitude(gradient: Gradient, name: str) -> int:
    """Return the largest value of an operand, in 64ths."""
    return w_amplitude(gradient.layer) if name == "w" else X_AMPLITUDE


def golden_operands(gradient: Gradient, batch: int) -> dict[str, NDArray[Any]]:
    """Return the operands of the test vector, in the layer's dtype."""
    return {
        name: golden_tensor(at_batch(shape, batch), SALTS[name], amplitude(gradient, name), gradient.layer.dtype)
        for name, shape in gradient.operands.items()
    }


def golden(gradient: Gradient) -> dict[str, Any]:
    """Compute the test vector's file: quick for a layer of any size, since few elements are asked for."""
    batch = gradient.layer.batch or 2
    parts = _of_input(gradient, batch) if gradient.wrt == "x" else [_of_sums(gradient, batch)]
    expected: dict[int, float] = {}
    for indices, values in parts:
        expected.update(zip(indices.ravel().tolist(), values.ravel().tolist(), strict=True))
    found = np.array(sorted(expected), np.int64)
    return {
        "batch": np.int64(batch),
        "indices": found,
        "expected": np.array([expected[index] for index in found.tolist()], np.float64),
    }


def _picked(count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, _CHANNELS)).astype(np.int64))


def _channels(picked: NDArray[np.int64], groups: Iterable[int], each: int) -> NDArray[np.int64]:
    return (np.array(list(groups), np.int64)[:, None] * each + picked).ravel()


def _of_sums(gradient: Gradient, batch: int) -> tuple[NDArray[np.int64], Array]:
    """Compute dW or dB of some channels of the first and the last group: a layer of its own, with all positions."""
    layer = gradient.layer
    groups = sorted({0, layer.groups - 1})
    c_in, m_out = layer.c_in, layer.m_out
    c, m = (np.unique(_picked(count)[[0, -1]]) for count in (c_in, m_out))
    part = replace(
        layer,
        batch=batch,
        groups=len(groups),
        channels_in=len(groups) * c.size,
        channels_out=len(groups) * m.size,
        layout="NCDHW",
    )
    channels = {"x": _channels(c, groups, c_in)} | dict.fromkeys(("dy", "y"), _channels(m, groups, m_out))
    operands = {
        name: _values(gradient, name, range(batch), channels[name], [range(n or 0) for n in sizes])
        for name, sizes in ((name, _spatial(layer, shape)) for name, shape in gradient.operands.items())
    }
    values = reference(Gradient(part, gradient.wrt), operands)
    if gradient.wrt == "b":
        return channels["dy"], values
    taps = np.arange(math.prod(a.kernel for a in layer.axes))
    rows = channels["x"].reshape(len(groups), c.size, 1, 1) * m_out + m[:, None]
    return rows * taps.size + taps, values


def _of_input(gradient: Gradient, batch: int) -> Iterable[tuple[NDArray[np.int64], Array]]:
    """Compute dX at the corners of the first and the last image, from the outputs near them."""
    layer = gradient.layer
    c_in = layer.c_in
    picked = _picked(c_in) if layer.groups <= _CHANNELS else _picked(c_in)[:1]
    channels = _channels(picked, range(layer.groups), c_in)
    everything = np.arange(layer.channels_out)
    weight = golden_values(np.arange(math.prod(layer.w_shape)), SALTS["w"], amplitude(gradient, "w"))
    for image, corner in itertools.product(sorted({0, batch - 1}), itertools.product(*map(_ends, layer.axes))):
        axes = [Axis(len(at), a.kernel, a.stride, a.dilation) for at, a in zip(corner, layer.axes, strict=True)]
        part = replace(layer, batch=1, channels_in=channels.size, axes=(axes[0], axes[1], axes[2]), layout="NCDHW")
        near = [
            range(at.start * a.stride - a.begin, at.start * a.stride - a.begin + b.out)
            for at, a, b in zip(corner, layer.axes, axes, strict=True)
        ]
        operands = {
            name: _values(gradient, name, [image], everything, near) for name in gradient.operands if name != "w"
        }
        operands["w"] = weight.reshape(layer.w_shape)[channels]
        places = elements(layer, layer.x_shape, [image], channels, corner)
        yield places, reference(Gradient(part, "x"), operands)


def _ends(axis: Axis) -> list[range]:
    length = min(axis.size, _PLACES)
    return [range(length), range(axis.size - length, axis.size)][: 1 if length == axis.size else 2]


def _spatial(layer: ConvTranspose3d, shape: Shape) -> Shape:
    _, _, *spatial = layer.from_layout(shape)
    return tuple(spatial)


def _values(
    gradient: Gradient, name: str, images: Iterable[int], channels: NDArray[np.int64], ranges: Sequence[range]
) -> Array:
    """Values of a box of an activation tensor, as ``(N, C, D, H, W)``; zero (of dY) where it has no element."""
    layer, shape = gradient.layer, gradient.operands[name]
    spatial = _spatial(layer, shape)
    d, h, w = ((np.array(r) >= 0) & (np.array(r) < (n or 0)) for r, n in zip(ranges, spatial, strict=True))
    there = d[:, None, None] & h[:, None] & w
    places = elements(layer, shape, images, channels, ranges)
    values = golden_values(np.where(there, places, 0), SALTS[name], amplitude(gradient, name))
    return np.where(there, values, 0.0)
