"""What follows a ConvTranspose and can be computed with it: constants for each channel, then one activation.

An activation may be one operator or several (``x * Sigmoid(x)``, the five nodes of a Gelu). Several are
recognised by their *values*: a region of elementwise operators with scalar constants, into which only the
layer's sum goes and out of which only one value comes, is evaluated on numbers of every size and held against
each formula of `opcompile.reference`. So it does not matter in which order an exporter multiplies. They may differ
by what float32 makes of the region's constants and of its intermediate values, and by no more: what a clamp or a
small addition changes is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from opcompile.errors import SpecError
from opcompile.importers.folding import DOMAINS
from opcompile.reference import activate, activated
from opcompile.replace.affine import Affine, affine, is_ordinary
from opcompile.replace.model import Graph, Model
from opcompile.spec import ACTIVATIONS, Activation

Array = NDArray[Any]

_MICROSOFT = "com.microsoft"
_LONGEST = 12
_FLOAT32 = np.finfo(np.float32)
# A unit in the last place, twice what rounding to float32 changes, and the least that it may.
_ROUNDING, _LEAST = float(_FLOAT32.eps), float(_FLOAT32.smallest_subnormal)
# Where functions bend and where they are flat, and every size that float32 has.
_SIZES = np.append(np.logspace(-44, 38, 329), float(_FLOAT32.max))
_SAMPLES = np.concatenate([np.linspace(-16, 16, 3201), np.linspace(-128, 128, 2561), _SIZES, -_SIZES])
# Where float32 may be further off than this, relative to what goes in and comes out, it says nothing.
_VAGUE = 1e-4

_NONE = Activation()


@dataclass(frozen=True, slots=True, eq=False)
class _Computed:
    """A value for each sample, in float64, and how far from it float32 may be."""

    value: Array
    error: Array | float = 0.0

    @classmethod
    def by(cls, function: Callable[..., Array], *given: _Computed) -> _Computed:
        """Compute ``function``: the error is what those of its operands make of it, and one rounding."""
        value = np.asarray(function(*(g.value for g in given)))
        corners = product(*((g.value - g.error, g.value + g.error) for g in given))
        moved = [np.abs(function(*corner) - value) for corner in corners]
        return cls(value, np.max(moved, axis=0) + _rounding(value))

    @classmethod
    def constant(cls, value: Array | float) -> _Computed:
        """A number that float32 has rounded, if it has more digits than a short one like 0.5 or 3."""
        exact = np.asarray(value, np.float64)
        with np.errstate(over="ignore"):
            short = exact.astype(np.float16).astype(np.float64) == exact
        return cls(exact, 0.0 if short else _rounding(exact))

    def is_activation(self, activation: Activation) -> bool:
        """Whether the values are those of ``activation`` on the samples."""
        expected = activate(activation, _SAMPLES)
        with np.errstate(invalid="ignore"):
            clear = self.error <= _VAGUE * (1 + np.abs(_SAMPLES) + np.abs(expected))
            close = clear & (np.abs(self.value - expected) <= self.error)
        return bool(np.all(close | (self.value == expected)))


def _rounding(value: Array | float) -> Array | float:
    return _ROUNDING * np.abs(value) + _LEAST


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """Nodes after a layer that go away with it: ``result`` is the value that the last of them writes.

    ``affine`` is what they multiply and add to each output channel, None where they do not; ``affine_nodes`` are
    those that do, the first of ``nodes``.
    """

    result: str
    affine: Affine | None = None
    activation: Activation = _NONE
    nodes: tuple[onnx.NodeProto, ...] = ()
    affine_nodes: tuple[onnx.NodeProto, ...] = ()


def fuse(model: Model, graph: Graph, output: str, channels: int) -> Fusion:
    """Return what can be computed with the ConvTranspose that writes ``output`` to ``channels`` channels."""
    whole, nodes = None, []
    region, activation = _activation(model, graph, output)
    while not region and (found := affine(model, graph, output, channels)) is not None:
        node, one = found
        one = one if whole is None else one.after(whole)
        if not one.is_ordinary():
            break
        whole = one
        nodes.append(node)
        output = node.output[0]
        region, activation = _activation(model, graph, output)
    result = region[-1].output[0] if region else output
    return Fusion(result, whole, activation, (*nodes, *region), tuple(nodes))


def _activation(model: Model, graph: Graph, value: str) -> tuple[list[onnx.NodeProto], Activation]:
    """Return the largest region after ``value`` that is an activation, and which one; no nodes where none is."""
    values = {value: _Computed(_SAMPLES)}
    region: list[onnx.NodeProto] = []
    best: tuple[list[onnx.NodeProto], Activation] = ([], Activation())
    known: Array | None = None
    while len(region) < _LONGEST:
        grown = next((n for n in _candidates(graph, values) if all(n is not r for r in region)), None)
        computed = None if grown is None else _computed(model, graph, grown, values)
        if grown is None or computed is None:
            break
        region.append(grown)
        values[grown.output[0]] = computed
        if _is_closed(graph, region, values):
            single = _single(model, graph, grown) if len(region) == 1 else None
            recognised = single or _recognised(computed)
            # what changes an activation, be it by less than float32 may be off, is no part of it
            changed = known is not None and recognised == best[1] and not np.array_equal(known, computed.value)
            if recognised is not None and not changed:
                best, known = (list(region), recognised), computed.value
    return best


def _candidates(graph: Graph, values: Mapping[str, _Computed]) -> list[onnx.NodeProto]:
    return [node for node in graph.proto.node if set(node.input) & set(values)]


def _is_closed(graph: Graph, region: list[onnx.NodeProto], values: Mapping[str, _Computed]) -> bool:
    """Whether nothing but the last value is read outside of the region."""
    *inner, _ = values
    return not any(
        graph.leaves(name) or any(all(reader is not node for node in region) for reader in graph.readers(name))
        for name in inner
    )


def _recognised(computed: _Computed) -> Activation | None:
    names = (name for name in ACTIVATIONS if name != "none")
    return next((found for found in map(Activation, names) if computed.is_activation(found)), None)


# --- operators ---


def _computed(model: Model, graph: Graph, node: onnx.NodeProto, values: Mapping[str, _Computed]) -> _Computed | None:
    """Return what an elementwise node makes of the samples; None for any other node."""
    if len(node.output) != 1 or (node.domain not in DOMAINS and node.domain != _MICROSOFT):
        return None
    single = _single(model, graph, node)
    with np.errstate(all="ignore"):
        if single is not None:
            given = values.get(node.input[0])
            return None if given is None else _activated(single, given)
        formula = _FORMULAS.get(node.op_type) if node.domain in DOMAINS else None
        if formula is None or node.attribute:
            return None
        operands = [values[name] if name in values else _constant(model, graph, name) for name in node.input]
        known = [operand for operand in operands if operand is not None]
        return _Computed.by(formula, *known) if len(known) == len(operands) else None


def _activated(single: Activation, given: _Computed) -> _Computed:
    """Compute one operator, whose parameters float32 has rounded."""
    return _Computed.by(partial(activated, single.name), given, *map(_Computed.constant, single.parameters))


def _constant(model: Model, graph: Graph, name: str) -> _Computed | None:
    scalar = _scalar(model, graph, name)
    return None if scalar is None or not is_ordinary(scalar) else _Computed.constant(scalar)


def _scalar(model: Model, graph: Graph, name: str) -> Array | None:
    array = model.constant(name, graph) if name else None
    if array is None or array.size != 1 or array.ndim > 5 or array.dtype.kind not in "fiu":
        return None
    return np.asarray(array.reshape(()).astype(np.float64))


_erf = np.vectorize(math.erf, otypes=[np.float64])
_FORMULAS: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Erf": _erf,
    "Min": np.minimum,
    "Max": np.maximum,
}


def _single(model: Model, graph: Graph, node: onnx.NodeProto) -> Activation | None:
    """Return the activation that one operator is."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    try:
        if node.domain == _MICROSOFT:
            return _of_microsoft(node, attributes)
        if node.op_type == "PRelu":
            slope = _scalar(model, graph, node.input[1])
            return None if slope is None else Activation("leaky_relu", (float(slope),))
        if node.op_type == "Clip":
            return _of_clip(model, graph, node, attributes)
        if node.op_type == "Gelu":
            return Activation("gelu_tanh" if attributes.get("approximate") == b"tanh" else "gelu")
        if node.op_type == "Swish":
            return Activation("silu") if attributes.get("alpha", 1.0) == 1 else None
        if node.op_type not in _OPERATORS:
            return None
        name, parameters = _OPERATORS[node.op_type]
        return Activation(name, tuple(float(attributes.get(key, default)) for key, default in parameters))
    except SpecError:
        return None  # a parameter that is no finite number: ONNX Runtime may make of it what it likes


# name, and the attributes that are its parameters with ONNX's defaults
_OPERATORS: dict[str, tuple[str, tuple[tuple[str, float], ...]]] = {
    "Relu": ("relu", ()),
    "LeakyRelu": ("leaky_relu", (("alpha", 0.01),)),
    "Elu": ("elu", (("alpha", 1.0),)),
    "Selu": ("selu", (("alpha", 1.67326319217681884765625), ("gamma", 1.05070102214813232421875))),
    "Sigmoid": ("sigmoid", ()),
    "HardSigmoid": ("hard_sigmoid", (("alpha", 0.2), ("beta", 0.5))),
    "HardSwish": ("hard_silu", ()),
    "Mish": ("mish", ()),
    "Softplus": ("softplus", ()),
    "Softsign": ("softsign", ()),
    "Tanh": ("tanh", ()),
    "Exp": ("exponential", ()),
}


def _of_microsoft(node: onnx.NodeProto, attributes: dict[str, Any]) -> Activation | None:
    if node.op_type == "Gelu" and len(node.input) == 1:
        return Activation("gelu")
    if node.op_type == "FastGelu" and len(node.input) == 1:
        return Activation("gelu_tanh")
    return Activation("silu") if node.op_type == "QuickGelu" and attributes.get("alpha", 1.702) == 1 else None


def _of_clip(model: Model, graph: Graph, node: onnx.NodeProto, attributes: dict[str, Any]) -> Activation | None:
    limits = [attributes.get(key) for key in ("min", "max")]
    for index, name in enumerate(node.input[1:]):
        if name:
            limit = _scalar(model, graph, name)
            if limit is None:
                return None
            limits[index] = float(limit)
    if limits[0] != 0 or limits[1] not in (6, None):
        return None
    return Activation("relu" if limits[1] is None else "relu6")
