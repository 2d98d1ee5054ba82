"""The three derivatives as TVM tensor expressions: dense sums over a padded copy of dY, no bounds test inside.

The blocks, whose names are the contract with `schedules.gradients`:

``pad``
    ``(N, G, M/g, eD, eH, eW)``: the part of dZ that is read, zeros around it; dZ is dY times the
    activation's slope, which is told from Y.
``weights`` (dX)
    ``(G, C/g, M/g, kD, kH, kW)``: W in the type of the sums, zeros beyond its channels.
``sum`` (dX)
    ``(N, G, C/g, D, H, W)``, reduced over ``(tD, tH, tW, m)``.
``copy`` (dW)
    ``(N, G, C/g, D, H, W)``: X in the type of the sums, zeros beyond it.
``part`` (dW)
    ``(N, D/d, H/h, G, C/g, M/g, kD, kH, kW, lane)``: one a block of positions, reduced over its
    planes d, rows h and columns; each lane sums the columns ``w % lanes == lane``.
``total`` (dW)
    ``(slice, G, C/g, M/g, kD, kH, kW, lane)``: the sum over the blocks of a slice of planes.
``whole`` (dW)
    ``(G, C/g, M/g, kD, kH, kW)``: the sum over slices and lanes.
``part``, ``whole``, ``rest`` (dB)
    ``(N, slice, M, lane)``: the sum over a slice of positions, of which each lane takes its share;
    ``(M,)``: over images, slices and lanes; ``(M,)``: what is left over, less than a vector a slice.
``output``
    The result, in its own shape, layout and type.

A reduction in parts is more than a matter of speed: the fewer additions a term passes through, the
smaller the error. `depth` counts them, and what is compiled is held to it.

A schedule works in tiles, and tiles need sizes they divide: sizes are rounded up to a `Grain`, as
the forward declaration does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from opcompile.declare import INDEX, sum_type, unaligned
from opcompile.elementary import expm1
from opcompile.gradients.gradient import Gradient
from opcompile.positions import round_up
from opcompile.spec import Activation, ConvTranspose3d


@dataclass(frozen=True, slots=True)
class Grain:
    """What sizes are rounded up to, and how sums are cut.

    ``c`` and ``m`` are multiples for C/g and M/g; ``positions`` those of D, H, W. A part
    (dW) covers ``block`` planes and rows. ``lanes`` sums are kept side by side. ``slices`` (dW: of the
    planes; dB: of the positions) are summed apart.
    """

    c: int = 1
    m: int = 1
    positions: tuple[int, int, int] = (1, 1, 1)
    block: tuple[int, int] = (1, 1)
    lanes: int = 1
    slices: int = 1


@dataclass(frozen=True, slots=True)
class Depth:
    """The most roundings that a term meets on its way into the result: ``fixed``, and so many for each image."""

    fixed: int
    per_image: int

    def of(self, batch: int) -> int:
        """The number for a batch."""
        return self.fixed + batch * self.per_image


def depth(gradient: Gradient, grain: Grain) -> Depth:
    """Count the roundings of a term: of its product, and one for each addition on its way."""
    layer = gradient.layer
    if gradient.wrt == "x":
        return Depth(gradient.terms(1), 0)
    if gradient.wrt == "b":
        return Depth(1 + _slice(gradient, grain), grain.slices * grain.lanes)
    planes, rows, width = _blocks(layer, grain)
    inside = grain.block[0] * grain.block[1] * (width // grain.lanes)
    return Depth(1 + inside + grain.slices * grain.lanes, planes // grain.slices * rows)


def declare(gradient: Gradient, grain: Grain = Grain()) -> tirx.PrimFunc:
    """Return the unscheduled function ``main(DY[, W or X][, Y], output)``.

    Every tensor has the shape that `Gradient` gives it, and may lie at any address that suits its
    element type. Indices have 64 bits, as in `opcompile.declare.declare`.
    """
    layer = gradient.layer
    scope = _Scope.of(gradient, grain)
    given = {
        name: te.placeholder(scope.shape(shape), layer.dtype, name=name.upper())
        for name, shape in gradient.operands.items()
    }
    dz = upstream(layer, given)
    make = {"x": _of_input, "w": _of_weight, "b": _of_bias}[gradient.wrt]
    output = make(scope, dz, given)
    return unaligned(te.create_prim_func([*given.values(), output]), layer.itemsize)


Element = Callable[..., Any]


def _blocks(layer: ConvTranspose3d, grain: Grain) -> tuple[int, int, int]:
    """How many parts lie along D and H, slices whole; and the width, rounded up."""
    depth, height, width = (axis.size for axis in layer.axes)
    planes = round_up(-(-depth // grain.block[0]), grain.slices)
    return planes, -(-height // grain.block[1]), round_up(width, grain.lanes)


def _slice(gradient: Gradient, grain: Grain) -> int:
    """How many sums of lanes a slice of dB takes."""
    positions = math.prod(axis.out for axis in gradient.layer.axes)
    return positions // (grain.slices * grain.lanes)


@dataclass(frozen=True, slots=True)
class _Scope:
    """What the blocks of one declaration share; ``positions`` are D, H and W, rounded up."""

    gradient: Gradient
    grain: Grain
    positions: tuple[int, ...]
    c: int
    m: int
    batch: Any

    @classmethod
    def of(cls, gradient: Gradient, grain: Grain) -> _Scope:
        layer = gradient.layer
        positions = tuple(round_up(a.size, n) for a, n in zip(layer.axes, grain.positions, strict=True))
        if gradient.wrt == "w":
            planes, rows, width = _blocks(layer, grain)
            positions = (planes * grain.block[0], rows * grain.block[1], width)
        c, m = round_up(layer.c_in, grain.c), round_up(layer.m_out, grain.m)
        batch = te.var("batch", INDEX) if layer.batch is None else tirx.IntImm(INDEX, layer.batch)
        return cls(gradient, grain, positions, c, m, batch)

    @property
    def layer(self) -> ConvTranspose3d:
        return self.gradient.layer

    def shape(self, sizes: Sequence[int | None]) -> list[Any]:
        return [self.batch if n is None else tirx.IntImm(INDEX, n) for n in sizes]

    def batched(self, *sizes: int) -> list[Any]:
        return [self.batch, *self.shape(sizes)]

    def reduced(self, name: str, extent: Any) -> Any:
        stop = tirx.IntImm(INDEX, extent) if isinstance(extent, int) else extent
        return te.reduce_axis((tirx.IntImm(INDEX, 0), stop), name)

    def taps(self) -> list[Any]:
        return [self.reduced(f"t{name}", a.kernel) for name, a in zip("dhw", self.layer.axes, strict=True)]

    def window(self, axis: int) -> int:
        """How many elements of Y's axis, from ``-begin`` on, all positions and taps together meet: whole strides."""
        a = self.layer.axes[axis]
        return round_up((self.positions[axis] - 1) * a.stride + (a.kernel - 1) * a.dilation + 1, a.stride)

    def pad(self, dz: Element) -> Any:
        """The part of dZ that is read, zero where Y has no element."""
        layer, m_out = self.layer, self.layer.m_out

        def element(n: Any, g: Any, m: Any, *at: Any) -> Any:
            where = [i - a.begin for i, a in zip(at, layer.axes, strict=True)]
            tests = [test for i, a in zip(where, layer.axes, strict=True) for test in (i >= 0, i < a.out)]
            tests += [m < m_out] if self.m > m_out else []
            return self.where(tests, dz(n, g * m_out + m, *where))

        return te.compute(self.batched(layer.groups, self.m, *map(self.window, range(3))), element, name="pad")

    def meets(self, positions: Sequence[Any], taps: Sequence[Any]) -> list[Any]:
        """Where in ``pad`` a position and a tap meet."""
        return [i * a.stride + t * a.dilation for i, t, a in zip(positions, taps, self.layer.axes, strict=True)]

    def where(self, tests: list[Any], value: Any) -> Any:
        zero = tirx.const(0, self.layer.sum_dtype)
        return tirx.if_then_else(tirx.all(*tests), value, zero) if tests else value


# --- what goes in ---


def read(layer: ConvTranspose3d, tensor: Any) -> Element:
    """An activation tensor's element ``(n, channel, d, h, w)``, in the type of the sums."""

    def element(n: Any, channel: Any, *at: Any) -> Any:
        return sum_type(layer, tensor(*layer.in_layout(n, channel, *at)))

    return element


def upstream(layer: ConvTranspose3d, given: dict[str, Any]) -> Element:
    """The gradient of the sum: dY times the slope of the activation."""
    dy = read(layer, given["dy"])
    if "y" not in given:
        return dy
    y = read(layer, given["y"])
    return lambda *at: dy(*at) * slope(layer.activation, y(*at))


# --- the three sums ---


def _of_input(scope: _Scope, dz: Element, given: dict[str, Any]) -> Any:
    layer, pad = scope.layer, scope.pad(dz)
    c_in, m_out = layer.c_in, layer.m_out

    def weight(g: Any, c: Any, m: Any, *taps: Any) -> Any:
        value = sum_type(layer, given["w"](g * c_in + c, m, *taps))
        return scope.where([c < c_in] if scope.c > c_in else [], value)

    kernel = [a.kernel for a in layer.axes]
    weights = te.compute(scope.shape((layer.groups, scope.c, m_out, *kernel)), weight, name="weights")
    taps, m = scope.taps(), scope.reduced("m", m_out)
    total = te.compute(
        scope.batched(layer.groups, scope.c, *scope.positions),
        lambda n, g, c, *at: te.sum(pad(n, g, m, *scope.meets(at, taps)) * weights(g, c, m, *taps), axis=[*taps, m]),
        name="sum",
    )

    def element(n: Any, *at: Any) -> Any:
        _, channel, *spatial = layer.from_layout([n, *at])
        found = total(n, tirx.floordiv(channel, c_in), tirx.floormod(channel, c_in), *spatial)
        return found.astype(layer.dtype)

    return te.compute(scope.shape(scope.gradient.shape), element, name="output")


def _of_weight(scope: _Scope, dz: Element, given: dict[str, Any]) -> Any:
    layer, grain, pad, x = scope.layer, scope.grain, scope.pad(dz), read(scope.layer, given["x"])
    c_in = layer.c_in

    def element(n: Any, g: Any, c: Any, *at: Any) -> Any:
        tests = [i < a.size for i, a, n in zip(at, layer.axes, scope.positions, strict=True) if n > a.size]
        tests += [c < c_in] if scope.c > c_in else []
        return scope.where(tests, x(n, g * c_in + c, *at))

    copy = te.compute(scope.batched(layer.groups, scope.c, *scope.positions), element, name="copy")
    (planes, rows, width), kernel = _blocks(layer, grain), [a.kernel for a in layer.axes]
    d, h = (scope.reduced(name, size) for name, size in zip("dh", grain.block, strict=True))
    w = scope.reduced("w", width // grain.lanes)

    def in_block(n: Any, d_o: Any, h_o: Any, g: Any, c: Any, m: Any, *rest: Any) -> Any:
        *taps, lane = rest
        at = [d_o * grain.block[0] + d, h_o * grain.block[1] + h, w * grain.lanes + lane]
        return te.sum(copy(n, g, c, *at) * pad(n, g, m, *scope.meets(at, taps)), axis=[d, h, w])

    sums = (layer.groups, scope.c, scope.m, *kernel, grain.lanes)
    part = te.compute(scope.batched(planes, rows, *sums), in_block, name="part")
    n, h_o = scope.reduced("n", scope.batch), scope.reduced("ho", rows)
    d_o = scope.reduced("do", planes // grain.slices)
    total = te.compute(
        scope.shape((grain.slices, *sums)),
        lambda s, *at: te.sum(part(n, s * (planes // grain.slices) + d_o, h_o, *at), axis=[n, d_o, h_o]),
        name="total",
    )
    s, lane = scope.reduced("s", grain.slices), scope.reduced("lane", grain.lanes)
    whole = te.compute(
        scope.shape((layer.groups, c_in, layer.m_out, *kernel)),
        lambda *at: te.sum(total(s, *at, lane), axis=[s, lane]),
        name="whole",
    )
    return te.compute(
        scope.shape(layer.w_shape),
        lambda c, *at: whole(tirx.floordiv(c, c_in), tirx.floormod(c, c_in), *at).astype(layer.dtype),
        name="output",
    )


def _of_bias(scope: _Scope, dz: Element, _given: dict[str, Any]) -> Any:
    layer, grain = scope.layer, scope.grain
    positions = math.prod(axis.out for axis in layer.axes)
    inside, k = _slice(scope.gradient, grain), scope.reduced("k", _slice(scope.gradient, grain))

    def term(n: Any, m: Any, position: Any) -> Any:
        # rows and planes lie end to end: LLVM cannot tell from quotients and rests, and would gather the elements
        return dz(n, m, 0, 0, position)

    part = te.compute(
        scope.batched(grain.slices, layer.channels_out, grain.lanes),
        lambda n, s, m, lane: te.sum(term(n, m, (s * inside + k) * grain.lanes + lane), axis=[k]),
        name="part",
    )
    n, s, lane = scope.reduced("n", scope.batch), scope.reduced("s", grain.slices), scope.reduced("lane", grain.lanes)
    whole = te.compute(
        scope.shape((layer.channels_out,)), lambda m: te.sum(part(n, s, m, lane), axis=[n, s, lane]), name="whole"
    )
    # what is left over, less than a vector a slice
    begun = inside * grain.slices * grain.lanes
    rest = None
    if begun < positions:
        n, k = scope.reduced("n", scope.batch), scope.reduced("k", positions - begun)
        rest = te.compute(
            scope.shape((layer.channels_out,)),
            lambda m: te.sum(term(n, m, begun + k), axis=[n, k]),
            name="rest",
        )
    return te.compute(
        scope.shape((layer.channels_out,)),
        lambda m: (whole(m) if rest is None else whole(m) + rest(m)).astype(layer.dtype),
        name="output",
    )


# --- slopes of activations, told from their output ---


def slope(activation: Activation, y: Any) -> Any:
    """The slope where the activation gave ``y``; at a kink the one of PyTorch."""
    return _SLOPES[activation.name](y, *(tirx.const(p, y.ty.dtype) for p in activation.parameters))


def _const(y: Any, value: float) -> Any:
    return tirx.const(value, y.ty.dtype)


def _step(y: Any, above: Any, below: Any) -> Any:
    return tirx.Select(y > _const(y, 0), above, below)


def _between(y: Any, high: float, inside: Any) -> Any:
    return tirx.Select(tirx.all(y > _const(y, 0), y < _const(y, high)), inside, _const(y, 0))


_SLOPES: dict[str, Callable[..., Any]] = {
    "relu": lambda y: _step(y, _const(y, 1), _const(y, 0)),
    "relu6": lambda y: _between(y, 6, _const(y, 1)),
    "leaky_relu": lambda y, alpha: _step(y, _const(y, 1), alpha),
    "elu": lambda y, alpha: _step(y, _const(y, 1), y + alpha),
    "selu": lambda y, alpha, gamma: _step(y, gamma, y + alpha * gamma),
    "sigmoid": lambda y: y * (_const(y, 1) - y),
    "hard_sigmoid": lambda y, alpha, _beta: _between(y, 1, alpha),
    "softplus": lambda y: -expm1(-y),
    "softsign": lambda y: (_const(y, 1) - tirx.abs(y)) * (_const(y, 1) - tirx.abs(y)),
    "tanh": lambda y: _const(y, 1) - y * y,
    "exponential": lambda y: y,
}
