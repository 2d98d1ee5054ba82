"""The three derivatives as a GPU schedule wants them: each a product of matrices, one side of it gathered.

The blocks are those of `opcompile.declare_flat`, for a single phase, so that one schedule serves all four.
Rows of the product are the channels of X (dB has one row), and columns what the table says:

====== ===================== =========================== ===============================
       columns ``q``         summed, ``s``               result
====== ===================== =========================== ===============================
dX     positions of X        taps, output channels       ``(N, G, C/g, Q)``
dW     taps, output channels images, positions of X      ``(1, G, C/g, Q)``
dB     output channels       images, positions of Y      ``(1, 1, 1, Q)``
====== ===================== =========================== ===============================

``columns``
    ``(N, G, *s, q)``, N only where it is not summed: the element of dZ that each product reads, zero where
    there is none.
``weights``
    ``(G, *s, C/g)``: the other factor, W or X, zero beyond its channels; dB has none.
``phase``
    ``(N, G, C/g, Q)``: the sums.
``result``, ``output``
    The same in the type of the tensors, and a scatter of it, guarded where it was rounded up.

Both factors are widened to the type of the sums where they are copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from opcompile.declare import narrow_index, sum_type
from opcompile.declare_flat import FlatGrain, scattered, unravel
from opcompile.elementary import by_exponentials
from opcompile.gradients.declare import Depth, Element, read, upstream
from opcompile.gradients.gradient import Gradient
from opcompile.positions import round_up
from opcompile.spec import ConvTranspose3d, at_batch


def declare_flat(gradient: Gradient, grain: FlatGrain, terms: int) -> tirx.PrimFunc:
    """Return the unscheduled function ``main(DY[, W or X][, Y], output)``, of the shapes of `Gradient`.

    ``terms`` is a multiple that the positions summed by dW and dB are rounded up to.
    """
    return _Flat.of(gradient, grain, terms).function()


def columns(gradient: Gradient) -> int:
    """How many columns the product has, of an image where these are not summed."""
    layer = gradient.layer
    if gradient.wrt == "x":
        return math.prod(a.size for a in layer.axes)
    if gradient.wrt == "w":
        return layer.m_out * math.prod(a.kernel for a in layer.axes)
    return layer.channels_out


def summed(gradient: Gradient) -> int:
    """How many positions of an image dW or dB sums."""
    layer = gradient.layer
    return math.prod(a.size for a in layer.axes) if gradient.wrt == "w" else math.prod(a.out for a in layer.axes)


def depth(gradient: Gradient, terms: int, groups: int) -> Depth:
    """Count the roundings of a term, where ``groups`` of threads share the ``terms`` of a step, and add up at last."""
    if gradient.wrt == "x":
        return Depth(gradient.terms(1), 0)
    return Depth(1 + groups, round_up(summed(gradient), terms) // groups)


@dataclass(frozen=True, slots=True)
class _Flat:
    """One declaration: ``count`` columns, ``rounded`` up; so are ``rows``, and ``terms``, the positions summed."""

    gradient: Gradient
    index: str
    batch: Any
    count: int
    rounded: int
    rows: int
    terms: int

    @classmethod
    def of(cls, gradient: Gradient, grain: FlatGrain, terms: int) -> _Flat:
        layer, count = gradient.layer, columns(gradient)
        sizes = [math.prod(at_batch(shape, 1)) for shape in (*gradient.operands.values(), gradient.shape)]
        index = narrow_index(layer.batch, sizes)
        batch = te.var("batch", index) if layer.batch is None else tirx.IntImm(index, layer.batch)
        rows = 1 if gradient.wrt == "b" else round_up(layer.c_in, grain.channels)
        count_up = round_up(count, grain.positions)
        return cls(gradient, index, batch, count, count_up, rows, round_up(summed(gradient), terms))

    def function(self) -> tirx.PrimFunc:
        layer, gradient = self.layer, self.gradient
        given = {
            name: te.placeholder(self.shape(*shape), layer.dtype, name=name.upper())
            for name, shape in gradient.operands.items()
        }
        flat = upstream(layer, given)

        def dz(*at: Any) -> Any:
            return by_exponentials(flat(*at))

        make = {"x": self._of_input, "w": self._of_weight, "b": self._of_bias}[gradient.wrt]
        total, place = make(dz, given)
        result = te.compute(total.shape, lambda *at: total(*at).astype(layer.dtype), name="result")
        func = te.create_prim_func([*given.values(), result])
        output = tirx.decl_buffer(self.shape(*gradient.shape), layer.dtype, name="output")
        return scattered(func, output, ("n", "g", "c", "q"), place)

    # --- the three sums, and where they go ---

    def _of_input(self, dz: Element, given: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
        layer, c_in, m_out = self.layer, self.layer.c_in, self.layer.m_out
        sizes, kernel = [a.size for a in layer.axes], [a.kernel for a in layer.axes]
        w = given["w"]

        def column(n: Any, g: Any, td: Any, th: Any, tw: Any, m: Any, q: Any) -> Any:
            return self._met(dz, n, g * m_out + m, unravel(q, sizes), (td, th, tw))

        def weight(g: Any, td: Any, th: Any, tw: Any, m: Any, c: Any) -> Any:
            value = sum_type(layer, w(g * c_in + c, m, td, th, tw))
            return self._where([c < c_in] if self.rows > c_in else [], value)

        over = [self._reduced(name, size) for name, size in zip(("td", "th", "tw", "m"), (*kernel, m_out), strict=True)]
        met = te.compute(self.shape(None, layer.groups, *kernel, m_out, self.rounded), column, name="columns")
        factor = te.compute(self.shape(layer.groups, *kernel, m_out, self.rows), weight, name="weights")
        total = te.compute(
            self.shape(None, layer.groups, self.rows, self.rounded),
            lambda n, g, c, q: te.sum(met(n, g, *over, q) * factor(g, *over, c), axis=over),
            name="phase",
        )

        def place(n: Any, g: Any, c: Any, q: Any) -> tuple[list[Any], list[Any]]:
            return list(layer.in_layout(n, g * c_in + c, *unravel(q, sizes))), self._guards(c, q)

        return total, place

    def _of_weight(self, dz: Element, given: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
        layer, x = self.layer, read(self.layer, given["x"])
        c_in, m_out = layer.c_in, layer.m_out
        sizes, kernel = [a.size for a in layer.axes], [a.kernel for a in layer.axes]
        ragged = self.terms > math.prod(sizes)

        def here(k: Any) -> list[Any]:
            return [k < math.prod(sizes)] if ragged else []

        def column(g: Any, n: Any, k: Any, q: Any) -> Any:
            taps, m = unravel(tirx.floordiv(q, m_out), kernel), tirx.floormod(q, m_out)
            return self._met(dz, n, g * m_out + m, unravel(k, sizes), taps, here(k))

        def element(g: Any, n: Any, k: Any, c: Any) -> Any:
            tests = here(k) + ([c < c_in] if self.rows > c_in else [])
            return self._where(tests, x(n, g * c_in + c, *unravel(k, sizes)))

        over = [self._reduced("n", self.batch), self._reduced("k", self.terms)]
        met = te.compute(self.shape(layer.groups, None, self.terms, self.rounded), column, name="columns")
        factor = te.compute(self.shape(layer.groups, None, self.terms, self.rows), element, name="weights")
        total = te.compute(
            self.shape(1, layer.groups, self.rows, self.rounded),
            lambda _, g, c, q: te.sum(met(g, *over, q) * factor(g, *over, c), axis=over),
            name="phase",
        )

        def place(_: Any, g: Any, c: Any, q: Any) -> tuple[list[Any], list[Any]]:
            taps, m = unravel(tirx.floordiv(q, m_out), kernel), tirx.floormod(q, m_out)
            return [g * c_in + c, m, *taps], self._guards(c, q)

        return total, place

    def _of_bias(self, dz: Element, _given: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
        sizes = [a.out for a in self.layer.axes]

        def column(n: Any, k: Any, q: Any) -> Any:
            tests = [k < math.prod(sizes)] if self.terms > math.prod(sizes) else []
            tests += [q < self.count] if self.rounded > self.count else []
            return self._where(tests, dz(n, q, *unravel(k, sizes)))

        over = [self._reduced("n", self.batch), self._reduced("k", self.terms)]
        met = te.compute(self.shape(None, self.terms, self.rounded), column, name="columns")
        total = te.compute(
            self.shape(1, 1, 1, self.rounded), lambda _n, _g, _c, q: te.sum(met(*over, q), axis=over), name="phase"
        )
        return total, lambda _n, _g, c, q: ([q], self._guards(c, q))

    # --- what they share ---

    @property
    def layer(self) -> ConvTranspose3d:
        return self.gradient.layer

    def shape(self, *sizes: int | None) -> list[Any]:
        """The sizes in the type of the indices; None stands for the batch."""
        return [self.batch if n is None else tirx.IntImm(self.index, n) for n in sizes]

    def _reduced(self, name: str, extent: Any) -> Any:
        stop = tirx.IntImm(self.index, extent) if isinstance(extent, int) else extent
        return te.reduce_axis((tirx.IntImm(self.index, 0), stop), name)

    def _met(
        self, dz: Element, n: Any, channel: Any, at: Sequence[Any], taps: Sequence[Any], tests: Sequence[Any] = ()
    ) -> Any:
        """The element of dZ that a position and a tap meet, zero where Y has none."""
        axes = self.layer.axes
        where = [i * a.stride + t * a.dilation - a.begin for i, t, a in zip(at, taps, axes, strict=True)]
        inside = [test for o, a in zip(where, axes, strict=True) for test in (o >= 0, o < a.out)]
        return self._where([*tests, *inside], dz(n, channel, *where))

    def _where(self, tests: list[Any], value: Any) -> Any:
        zero = tirx.const(0, self.layer.sum_dtype)
        return tirx.if_then_else(tirx.all(*tests), value, zero) if tests else value

    def _guards(self, c: Any, q: Any) -> list[Any]:
        """What a sum that is stored must satisfy: its row and its column are no rounding up."""
        guards = [c < self.layer.c_in] if self.gradient.wrt != "b" and self.rows > self.layer.c_in else []
        return guards + ([q < self.count] if self.rounded > self.count else [])
