"""Compiled derivatives as the tests call them: in this process, without our runtime, on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from kernels import HERE, _tensor, callable_in, dtype_of
from numpy.typing import NDArray

from opcompile.gradients import lower
from opcompile.gradients.declare import depth
from opcompile.gradients.gradient import Gradient
from opcompile.reference import activate
from opcompile.spec import ConvTranspose3d, at_batch
from schedules.gradients import GradientTiles

Operands = dict[str, NDArray[Any]]


def kernel(
    gradient: Gradient, tiles: GradientTiles | None = None, *, optimised: bool = True
) -> Callable[[Operands], NDArray[Any]]:
    """Compile ``gradient`` for this machine; the result starts out as garbage."""
    tiles = tiles or lower.choose(gradient, HERE, "baseline")[0]
    function = callable_in(lower.scheduled(gradient, tiles), gradient.kernel, optimised=optimised)
    dtype, name = dtype_of(gradient.layer), gradient.layer.dtype

    def call(operands: Operands) -> NDArray[Any]:
        batch = operands["dy"].shape[0]
        out = np.full(at_batch(gradient.shape, batch), np.nan, dtype)
        given = [*(operands[key] for key in gradient.operands), out]
        tensors = [_tensor(np.ascontiguousarray(a, dtype), name) for a in given]
        function(*tensors)
        result = tensors[-1].numpy()
        return result.view(dtype) if name == "bfloat16" else result

    return call


def stated_depth(gradient: Gradient, batch: int, tiles: GradientTiles | None = None) -> int:
    tiles = tiles or lower.choose(gradient, HERE, "baseline")[0]
    return depth(gradient, lower.grain(tiles)).of(batch)


def draw(gradient: Gradient, *, integers: int | None = None, batch: int = 2, seed: int = 0) -> Operands:
    """Operands of the layer's dtype: normal, or integers up to ``integers``; Y is what the activation gives."""
    rng = np.random.default_rng(seed)
    layer = gradient.layer
    found = {}
    for name, shape in gradient.operands.items():
        sizes = at_batch(shape, batch)
        values = rng.standard_normal(sizes) if integers is None else rng.integers(-integers, integers + 1, sizes)
        if name == "y":
            values = activate(layer.activation, np.asarray(values, np.float64))
        found[name] = np.asarray(values).astype(dtype_of(layer))
    return found


def gradients_of(layer: ConvTranspose3d) -> list[Gradient]:
    return [Gradient(layer, wrt) for wrt in ("x", "w", "b") if wrt != "b" or layer.bias]  # type: ignore[arg-type]
