"""The operator as a GPU schedule wants it: positions in one row, and the output written through a guard.

`opcompile.declare` states the same sums over ``(qD, qH, qW)``. Threads of a GPU take positions as they come,
across rows and planes, so here they are one axis ``q``, and every block has sizes that the tiles divide
(`FlatGrain`): no schedule meets a ragged end. What lies beyond the output is computed and not stored. Blocks:

``columns[_<fd>_<fh>_<fw>]``
    ``(N, G, tD, tH, tW, C/g, Q)``: the element of X that each product reads, zero where X has none.
``phase[_<fd>_<fh>_<fw>]``
    ``(N, G, M/g, Q)``: one a phase that has taps, reduced over ``(tD, tH, tW, c)``.
``result``
    ``(N, G, M/g, Q, sD, sH, sW)``: the phase that is meant, plus bias, activated, in the type of Y.
``output``
    Y in its layout: a scatter of ``result``, guarded where that was rounded up or cropped.

There is one ``phase`` with the phases as axes, ``(N, G, M/g, sD, sH, sW, Q)``, where all of them read the same
columns (`alike`: k2 s2 is a matrix product with more rows), or where one block each would be too many
(`opcompile.declare.phases_as_axes`; ``columns`` then has their axes as well, after ``G``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from tvm import ir, te, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from opcompile.declare import (
    Grain,
    Scope,
    activate,
    first_of,
    most_taps,
    packed_from,
    phases_as_axes,
    round_up,
    sum_type,
)
from opcompile.spec import Axis, ConvTranspose3d


@dataclass(frozen=True, slots=True)
class FlatGrain:
    """Multiples that the sizes of the blocks are rounded up to: M/g, and the number of positions."""

    channels: int = 1
    positions: int = 1


def alike(spec: ConvTranspose3d) -> bool:
    """Whether every phase reads the same elements of X, through taps of its own."""
    return all(len({(p.taps, p.first_offset) for p in axis.phases}) == 1 and axis.phases[0].taps for axis in spec.axes)


def phase_axes(spec: ConvTranspose3d) -> bool:
    """Whether the phases are axes of one block."""
    return alike(spec) or phases_as_axes(spec)


def declare_flat(spec: ConvTranspose3d, grain: FlatGrain = FlatGrain()) -> tirx.PrimFunc:
    """Return the unscheduled function ``main(X, W[, B], output)``, of the shapes that `declare` gives them."""
    return _Flat.of(spec, grain).function()


def positions(spec: ConvTranspose3d) -> int:
    """How many positions an image has, all axes together."""
    return math.prod(axis.positions for axis in spec.axes)


@dataclass(frozen=True, slots=True)
class _Flat:
    """One declaration: ``count`` positions, rounded up to ``rounded``, in the scope of what `declare` shares."""

    spec: ConvTranspose3d
    scope: Scope
    weight: tuple[int, ...]
    count: int
    rounded: int

    @classmethod
    def of(cls, spec: ConvTranspose3d, grain: FlatGrain) -> _Flat:
        count = positions(spec)
        rounded = round_up(count, grain.positions)
        # whole planes that hold the rounded positions: for the size of the indices
        planes = -(-rounded // math.prod(axis.positions for axis in spec.axes[1:]))
        within = Grain(grain.channels, (planes, 1, 1))
        return cls(spec, Scope.of(spec, within), packed_from(spec, within), count, rounded)

    def function(self) -> tirx.PrimFunc:
        spec, scope = self.spec, self.scope
        x = te.placeholder(scope.batched(*spec.x_shape[1:]), spec.dtype, name="X")
        w = te.placeholder(scope.sizes(*self.weight), spec.dtype, name="W")
        b = te.placeholder(scope.sizes(spec.channels_out), spec.dtype, name="B")
        picked = self._axes(x, w) if phase_axes(spec) else self._blocks(x, w)
        m_out = spec.channels_out // spec.groups

        def finished(n: Any, g: Any, m: Any, q: Any, *f: Any) -> Any:
            z = picked(n, g, m, q, f)
            if spec.bias:  # a channel that was rounded up has none, and borrows one
                z = z + sum_type(spec, b(g * m_out + tirx.min(m, m_out - 1) if self.ragged_channels else g * m_out + m))
            return activate(spec.activation, z).astype(spec.dtype)

        result = te.compute(scope.batched(*self._result_sizes()), finished, name="result")
        func = te.create_prim_func([x, w, b, result] if spec.bias else [x, w, result])
        return self._scattered(func)

    @property
    def ragged_channels(self) -> bool:
        return self.scope.channels * self.spec.groups != self.spec.channels_out

    def _result_sizes(self) -> tuple[int, ...]:
        phases = [len(axis.phases) for axis in self.spec.axes]
        return (self.spec.groups, self.scope.channels, self.rounded, *phases)

    def _at(self, q: Any) -> tuple[Any, Any, Any]:
        """Positions along the axes of the flat position ``q``."""
        _, height, width = (axis.positions for axis in self.spec.axes)
        return tirx.floordiv(q, height * width), tirx.floormod(tirx.floordiv(q, width), height), tirx.floormod(q, width)

    def _element(self, x: Any, n: Any, channel: Any, at: Sequence[Any]) -> Any:
        """X at ``at``, zero outside of it."""
        axes = self.spec.axes
        tests = [test for i, axis in zip(at, axes, strict=True) for test in (i >= 0, i < axis.size)]
        value = x(n, channel, *at) if self.spec.layout == "NCDHW" else x(n, *at, channel)
        return tirx.if_then_else(tirx.all(*tests), value, tirx.const(0, self.spec.dtype))

    def _product(self, column: Any, weight: Any) -> Any:
        return sum_type(self.spec, column) * sum_type(self.spec, weight)

    def _channel(self) -> tuple[int, Any]:
        c_in = self.spec.channels_in // self.spec.groups
        index = self.scope.index
        return c_in, te.reduce_axis((tirx.IntImm(index, 0), tirx.IntImm(index, c_in)), "c")

    def _blocks(self, x: Any, w: Any) -> Any:
        """One pair of blocks a phase; a phase without taps is zero and has none."""
        spec, scope = self.spec, self.scope

        def block(phases: Sequence[Any]) -> Any:
            name = "_".join(str(p.index) for p in phases)
            counts, (c_in, c) = [p.taps for p in phases], self._channel()

            def column(n: Any, g: Any, td: Any, th: Any, tw: Any, c: Any, q: Any) -> Any:
                of = zip(self._at(q), phases, (td, th, tw), spec.axes, strict=True)
                reads = [i + p.first_offset - t * axis.offset_step for i, p, t, axis in of]
                return self._element(x, n, g * c_in + c, reads)

            columns = te.compute(
                scope.batched(spec.groups, *counts, c_in, self.rounded), column, name=f"columns_{name}"
            )
            taps = scope.reduced(counts)
            kernel = [p.first_tap + t * axis.tap_step for p, t, axis in zip(phases, taps, spec.axes, strict=True)]
            return te.compute(
                scope.batched(spec.groups, scope.channels, self.rounded),
                lambda n, g, m, q: te.sum(
                    self._product(columns(n, g, *taps, c, q), w(g * c_in + c, m, *kernel)), axis=[*taps, c]
                ),
                name=f"phase_{name}",
            )

        every = list(product(*(axis.phases for axis in spec.axes)))
        blocks = [(phases, block(phases)) for phases in every if all(p.taps for p in phases)]

        def pick(n: Any, g: Any, m: Any, q: Any, f: Sequence[Any]) -> Any:
            value = None if len(blocks) == len(every) else tirx.const(0, spec.sum_dtype)
            for phases, computed in reversed(blocks):
                here = computed(n, g, m, q)
                tests = [i == p.index for i, p, a in zip(f, phases, spec.axes, strict=True) if len(a.phases) > 1]
                value = here if value is None or not tests else tirx.Select(tirx.all(*tests), here, value)
            return value

        return pick

    def _axes(self, x: Any, w: Any) -> Any:
        """One pair of blocks with the phases as axes, each reduced over the largest number of taps of any."""
        spec, scope, same = self.spec, self.scope, alike(self.spec)
        counts, (c_in, c) = [most_taps(axis) for axis in spec.axes], self._channel()
        phases = [len(axis.phases) for axis in spec.axes]

        def column(n: Any, g: Any, *at: Any) -> Any:
            *f, td, th, tw, c, q = at
            firsts = (
                [axis.phases[0].first_offset for axis in spec.axes]
                if same
                else [_of_phase(a, 1, i) for a, i in zip(spec.axes, f, strict=True)]
            )
            of = zip(self._at(q), firsts, (td, th, tw), spec.axes, strict=True)
            return self._element(x, n, g * c_in + c, [i + first - t * axis.offset_step for i, first, t, axis in of])

        sizes = [*([] if same else phases), *counts, c_in, self.rounded]
        columns = te.compute(scope.batched(spec.groups, *sizes), column, name="columns")
        taps = scope.reduced(counts)

        def contract(n: Any, g: Any, m: Any, fd: Any, fh: Any, fw: Any, q: Any) -> Any:
            f = (fd, fh, fw)
            firsts = [_of_phase(a, 0, i) for a, i in zip(spec.axes, f, strict=True)]
            kernel = [tap + t * axis.tap_step for tap, t, axis in zip(firsts, taps, spec.axes, strict=True)]
            read = columns(n, g, *([] if same else f), *taps, c, q)
            return te.sum(self._product(read, w(g * c_in + c, m, *kernel)), axis=[*taps, c])

        block = te.compute(scope.batched(spec.groups, scope.channels, *phases, self.rounded), contract, name="phase")

        def pick(n: Any, g: Any, m: Any, q: Any, f: Sequence[Any]) -> Any:
            value, gcds = block(n, g, m, *f, q), [math.gcd(a.stride, a.dilation) for a in spec.axes]
            tests = [tirx.floormod(i + a.begin, s) == 0 for i, a, s in zip(f, spec.axes, gcds, strict=True) if s > 1]
            return tirx.Select(tirx.all(*tests), value, tirx.const(0, spec.sum_dtype)) if tests else value

        return pick

    # --- the scatter ---

    def _scattered(self, func: tirx.PrimFunc) -> tirx.PrimFunc:
        spec, scope = self.spec, self.scope
        m_out = spec.channels_out // spec.groups

        def place(n: Any, g: Any, m: Any, q: Any, *f: Any) -> tuple[list[Any], list[Any]]:
            outputs = [i * a.stride + phase for i, phase, a in zip(self._at(q), f, spec.axes, strict=True)]
            channel = g * m_out + m
            where = [n, channel, *outputs] if spec.layout == "NCDHW" else [n, *outputs, channel]
            guards = [m < m_out] if self.ragged_channels else []
            guards += [q < self.count] if self.rounded > self.count else []
            guards += [
                o < a.out for o, a in zip(outputs, spec.axes, strict=True) if a.out % a.stride and a.positions > 1
            ]
            return where, guards

        y = tirx.decl_buffer(scope.batched(*spec.y_shape[1:]), spec.dtype, name="output")
        return scattered(func, y, ("n", "g", "m", "q", "fd", "fh", "fw"), place)


def scattered(
    func: tirx.PrimFunc,
    output: tirx.Buffer,
    names: Sequence[str],
    place: Callable[..., tuple[list[Any], list[Any]]],
) -> tirx.PrimFunc:
    """Make the last parameter, ``result``, a buffer of the function, and add a block that stores it in ``output``.

    ``place`` says where the element goes whose indices it is given, and under which guards. Tensor
    expressions cannot say that.
    """
    result = func.params[-1]
    sizes = list(result.shape)
    loops = [tirx.Var(name, size.ty.dtype) for name, size in zip(names, sizes, strict=True)]
    inside = [tirx.Var(f"v_{name}", size.ty.dtype) for name, size in zip(names, sizes, strict=True)]
    where, guards = place(*inside)
    body: Any = tirx.BufferStore(output, tirx.BufferLoad(result, inside), where)
    if guards:
        body = tirx.IfThenElse(tirx.all(*guards), body, None)
    block = SBlock(
        [
            tirx.IterVar(ir.Range.from_min_extent(_like(size, 0), size), var, tirx.IterVar.DataPar)
            for size, var in zip(sizes, inside, strict=True)
        ],
        [tirx.BufferRegion(result, [ir.Range.from_min_extent(i, _like(i, 1)) for i in inside])],
        [tirx.BufferRegion(output, [ir.Range.from_min_extent(i, _like(i, 1)) for i in where])],
        "output",
        body,
    )
    nest: Any = SBlockRealize(loops, True, block)
    for var, size in zip(reversed(loops), reversed(sizes), strict=True):
        nest = tirx.For(var, _like(size, 0), size, tirx.ForKind.SERIAL, nest)
    root = func.body.block
    whole = SBlock([], [], [], "root", tirx.SeqStmt([root.body, nest]), alloc_buffers=[*root.alloc_buffers, result])
    return tirx.PrimFunc([*func.params[:-1], output], SBlockRealize([], True, whole), func.ret_type, func.attrs)


def _like(index: Any, value: int) -> Any:
    return tirx.const(value, index.ty.dtype)


def _of_phase(axis: Axis, which: int, f: Any) -> Any:
    """First tap (0) or first offset (1) of phase ``f``, by comparisons: runs that rise by one, or stay.

    `opcompile.declare.first_of` has a formula for both. Its remainder of a shifted phase, ``(f/2 + 1) % 2``, loses
    the shift where the phase is itself a part of a block's index, and TVM then emits another tap's weight.
    """
    values = [first_of(axis, phase.index)[which] for phase in axis.phases]
    runs: list[range] = []
    for i, value in enumerate(values):
        run = runs[-1] if runs else range(0)
        slope = value - values[run.start] if len(run) == 1 else _slope(values, run)
        if runs and slope in (0, 1) and value == values[run.start] + slope * (i - run.start):
            runs[-1] = range(run.start, i + 1)
        else:
            runs.append(range(i, i + 1))
    *others, last = runs
    result = f * _slope(values, last) + (values[last.start] - _slope(values, last) * last.start)
    for run in reversed(others):
        here = f * _slope(values, run) + (values[run.start] - _slope(values, run) * run.start)
        result = tirx.Select(f < run.stop, here, result)
    return result


def _slope(values: Sequence[int], run: range) -> int:
    return values[run.start + 1] - values[run.start] if len(run) > 1 else 0
