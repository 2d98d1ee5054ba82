"""What follows a ConvTranspose and multiplies or adds a constant to each channel: a BatchNormalization, say.

It goes into the layer's weights and bias, in float64, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from opcompile.importers.folding import DOMAINS
from opcompile.replace.model import Graph, Model

Array = NDArray[Any]

# The opset from which on a BatchNormalization with one output is an inference: earlier ones ask is_test.
_INFERRING = 7

# What constants may multiply by, and the most that they may add: it leaves to numbers of 1e-8 to 1e8 float32's range.
_LEAST, _LARGEST = 2.0**-100, 2.0**100


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """``scale * z + shift`` for each output channel, in float64.

    ``reach`` is what nodes add, each by its magnitude and times what it is multiplied by after: the shift, had nothing
    cancelled. ``roundings`` is how many a term meets in the stock model's nodes, at most.
    """

    scale: Array
    shift: Array
    reach: Array
    roundings: int

    def after(self, first: Affine) -> Affine:
        """Return this behind ``first``, as one."""
        return Affine(
            self.scale * first.scale,
            self.scale * first.shift + self.shift,
            np.abs(self.scale) * first.reach + self.reach,
            self.roundings + first.roundings,
        )

    def is_ordinary(self) -> bool:
        """Whether what passes here is of an ordinary size: what comes after could undo that, but not in float32."""
        return is_ordinary(self.scale) and bool(np.all(self.reach <= _LARGEST))

    def folded(self, w: Array, b: Array | None, groups: int) -> tuple[Array, Array | None] | None:
        """Return canonical weights ``(C, M/g, ...)`` and a bias that compute it too; no bias where none is needed.

        None where a number would lose precision, or not be finite: below float32's normal ones, beyond its largest.
        """
        by_group = w.reshape(groups, -1, *w.shape[1:]).astype(np.float64)
        scale = self.scale.reshape(groups, 1, w.shape[1], *[1] * (w.ndim - 2))
        weights = (by_group * scale).reshape(w.shape)
        shift = self.scale * (0.0 if b is None else b.astype(np.float64)) + self.shift
        limits = np.finfo(np.float32)
        sizes = np.abs(np.concatenate([weights.ravel(), shift]))
        if not np.all((sizes == 0) | ((sizes >= limits.tiny) & (sizes <= limits.max))):
            return None
        bias = None if b is None and not shift.any() else shift.astype(np.float32)
        return weights.astype(np.float32), bias


def is_ordinary(constants: Array) -> bool:
    """Whether float32 holds what these make of numbers of ordinary sizes; 0 makes 0."""
    sizes = np.abs(constants)
    return bool(np.all((sizes == 0) | ((sizes >= _LEAST) & (sizes <= _LARGEST))))


def affine(model: Model, graph: Graph, value: str, channels: int) -> tuple[onnx.NodeProto, Affine] | None:
    """Return the only reader of ``value`` where it is such a node, and what it computes."""
    readers = graph.readers(value)
    if len(readers) != 1 or graph.leaves(value):
        return None
    node = readers[0]
    if node.domain not in DOMAINS or list(node.input).count(value) != 1:
        return None
    if node.op_type == "BatchNormalization":
        found = _of_batch_normalization(model, graph, node, value, channels)
    else:
        found = _of_arithmetic(model, graph, node, value, channels)
    return None if found is None else (node, found)


def _of_arithmetic(model: Model, graph: Graph, node: onnx.NodeProto, value: str, channels: int) -> Affine | None:
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or node.attribute:
        return None
    first = node.input[0] == value
    if node.op_type == "Div" and not first:
        return None
    other = _for_each_channel(model, graph, next(name for name in node.input if name != value), channels)
    if other is None:
        return None
    zeros, ones = np.zeros(channels), np.ones(channels)
    if node.op_type in ("Add", "Sub"):
        scale, shift = ones, other
        if node.op_type == "Sub":
            scale, shift = (ones, -other) if first else (-ones, other)
        return Affine(scale, shift, np.abs(other), 1)
    with np.errstate(divide="ignore"):
        scale = other if node.op_type == "Mul" else 1 / other
    return Affine(scale, zeros, zeros, 1) if np.isfinite(scale).all() else None


def _for_each_channel(model: Model, graph: Graph, name: str, channels: int) -> Array | None:
    """Return a constant of one element, or of one for each channel."""
    array = model.constant(name, graph)
    if array is None or array.dtype != np.float32 or array.ndim > 5:
        return None
    whole = array.reshape((1,) * (5 - array.ndim) + array.shape)
    if whole.shape not in ((1, channels, 1, 1, 1), (1, 1, 1, 1, 1)):
        return None
    return np.broadcast_to(whole.reshape(-1), (channels,)).astype(np.float64)


def _of_batch_normalization(
    model: Model, graph: Graph, node: onnx.NodeProto, value: str, channels: int
) -> Affine | None:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    trains = bool(attributes.get("training_mode", 0)) or len(node.output) != 1 or model.opset < _INFERRING
    if trains or attributes.get("spatial", 1) != 1 or len(node.input) != 5 or node.input[0] != value:
        return None
    given = [model.constant(name, graph) for name in node.input[1:]]
    if any(a is None or a.dtype != np.float32 or a.shape != (channels,) for a in given):
        return None
    scale, shift, mean, variance = (np.asarray(a, np.float64) for a in given)
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + attributes.get("epsilon", 1e-5))
        moved = mean * factor
    # a sum, a root, a quotient and two products at most, then the sum of what is multiplied and what is moved
    found = Affine(factor, shift - moved, np.abs(shift) + np.abs(moved), 8)
    return found if np.isfinite(found.reach).all() and np.isfinite(factor).all() else None
