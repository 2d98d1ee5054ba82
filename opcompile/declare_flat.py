"""The operator as a GPU schedule wants it: positions in one row, and the output written through a guard.

`opcompile.declare` states the same sums over ``(qD, qH, qW)``. Threads of a GPU take positions as they come,
across rows and planes, so here they are one axis ``q``, and every block has sizes that the tiles divide
(`FlatGrain`): no schedule meets a ragged end. What lies beyond the output is computed and not stored. Blocks:

``columns[_<fd>_<fh>_<fw>]``
    ``(N, G, tD, tH, tW, C/g, Q)``: the element of X that each product reads, zero where X has none. With positions
    that are one thread's, ``Q`` is two axes.
``phase[_<fd>_<fh>_<fw>]``
    ``(N, G, M/g, Q)``: one a phase that has taps, reduced over ``(tD, tH, tW, c)``.
``result``
    ``(N, G, M/g, Q, sD, sH, sW)``: the phase that is meant, plus bias, activated, in the type of Y.
``output``
    Y in its layout: a scatter of ``result``, guarded where that was rounded up or cropped.

There is one ``phase`` with the phases as axes, ``(N, G, M/g, sD, sH, sW, Q)``, in two cases (`phase_axes`). Where all
of them have as many taps, they can read the same ``columns``: a matrix product with more rows. Where they are tiles
of the grid (``apart``), a block of threads sums one of them, and ``columns`` has their axes as well, after ``G``.
As axes, phases are numbered by their taps (`Numbering`), so that which weights one of them reads is an affine
function of its number, as `compute_at` needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import tvm_ffi
from tvm import ir, te, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from opcompile.activations import activate
from opcompile.declare import Grain, Phases, Scope, meets, of_phase, sum_type
from opcompile.elementary import by_exponentials
from opcompile.positions import round_up
from opcompile.spec import Axis, ConvTranspose3d

# Activations that end in a `max` or `min`, which on a GPU makes a number of NaN.
_CLIPS = ("relu", "relu6", "hard_sigmoid", "hard_tanh")


@dataclass(frozen=True, slots=True)
class FlatGrain:
    """Multiples that the sizes of the blocks are rounded up to: M/g, and the number of positions.

    With ``apart``, phases are summed one by one. ``own`` neighbours in ``q`` are one thread's: they lie a tile's
    ``positions / own`` apart, so that what neighbouring threads read and write at a time lies side by side.
    """

    channels: int
    positions: int
    apart: bool = False
    own: int = 1


@dataclass(frozen=True, slots=True)
class Numbering:
    """The phases of an axis by their taps, and the positions of each.

    With ``g = gcd(s, d)``, phase ``f = r*g + c`` (``0 <= f < s``) has the outputs ``o = s*q + r*d + c - begin``. For
    ``c = 0`` they meet the taps ``t = r + j*s/g``, at input ``q - j*d/g``, which does not depend on ``r``; for others
    none. In this order the first ``q`` may differ from phase to phase.
    """

    axis: Axis

    @property
    def gcd(self) -> int:
        """How many phases share each first tap, of which one has any."""
        return math.gcd(self.axis.stride, self.axis.dilation)

    @property
    def most_taps(self) -> int:
        """Taps of the phase that has the most."""
        return -(-self.axis.kernel // self.axis.tap_step)

    @property
    def aligned(self) -> bool:
        """Whether all phases begin at the same position."""
        return len({span.start for span in self.axis.spans}) == 1

    @property
    def together(self) -> range:
        """The positions of all phases."""
        spans = self.axis.spans
        return range(min(span.start for span in spans), max(span.stop for span in spans))

    def output(self, q: Any, f: Any) -> Any:
        """The output at position ``q`` of phase ``f``."""
        shift = self.first_tap(f) * self.axis.dilation - self.axis.begin
        return q * self.axis.stride + (shift if self.gcd == 1 else shift + tirx.floormod(f, self.gcd))

    def first_tap(self, f: Any) -> Any:
        """The first tap of phase ``f``."""
        return f if self.gcd == 1 else tirx.floordiv(f, self.gcd)

    def has_taps(self, f: Any) -> list[Any]:
        """Tests for whether phase ``f`` is one of those with taps."""
        return [] if self.gcd == 1 else [tirx.floormod(f, self.gcd) == 0]

    def taps(self, f: Any) -> Any:
        """How many taps phase ``f`` has."""
        count = tirx.max(tirx.floordiv(self.axis.kernel - 1 - self.first_tap(f), self.axis.tap_step) + 1, 0)
        tests = self.has_taps(f)
        return tirx.Select(tests[0], count, _like(count, 0)) if tests else count

    def first(self, f: Any) -> Any:
        """The first position of phase ``f``, by comparisons."""
        firsts = [span.start for span in self.axis.spans]
        result = _like(f, firsts[-1])
        for number in reversed(range(len(firsts) - 1)):
            if firsts[number] != firsts[number + 1]:
                result = tirx.Select(f <= number, _like(f, firsts[number]), result)
        return result


def same_columns(spec: ConvTranspose3d, apart: bool) -> bool:
    """Whether every phase reads the same elements of X, through taps of its own."""
    return all(axis.even_taps and (Numbering(axis).aligned or not apart) for axis in spec.axes)


def phase_axes(spec: ConvTranspose3d, apart: bool) -> bool:
    """Whether the phases are axes of one block."""
    return apart or same_columns(spec, apart)


def declare_flat(spec: ConvTranspose3d, grain: FlatGrain) -> tirx.PrimFunc:
    """Return the unscheduled function ``main(X, W[, B], output)``, of the shapes that `declare` gives X, B and Y.

    W has that of `weight_shape`.
    """
    return _Flat.of(spec, grain).function()


def weight_shape(spec: ConvTranspose3d, channels: int) -> tuple[int, ...]:
    """Shape of the declared W: ``(C, M/g, kD, kH, kW)``, with M/g rounded up."""
    c, m, *kernel = spec.w_shape
    return (c, round_up(m, channels), *kernel)


def extents(spec: ConvTranspose3d, apart: bool) -> tuple[int, ...]:
    """How many positions there are along each axis; an image has their product."""
    if same_columns(spec, apart):
        return tuple(len(Numbering(axis).together) for axis in spec.axes)
    return tuple(axis.positions for axis in spec.axes)


@dataclass(frozen=True, slots=True)
class _Flat:
    """One declaration: its positions along the axes, ``rounded`` in all, in the scope of what `declare` shares."""

    spec: ConvTranspose3d
    grain: FlatGrain
    scope: Scope
    extents: tuple[int, ...]
    rounded: int

    @classmethod
    def of(cls, spec: ConvTranspose3d, grain: FlatGrain) -> _Flat:
        each = extents(spec, grain.apart)
        rounded = round_up(math.prod(each), grain.positions)
        # whole planes that hold the rounded positions: for the size of the indices
        planes = -(-rounded // math.prod(axis.positions for axis in spec.axes[1:]))
        return cls(spec, grain, Scope.of(spec, Grain(grain.channels, (planes, 1, 1))).narrowed(), each, rounded)

    def function(self) -> tirx.PrimFunc:
        spec, scope = self.spec, self.scope
        x = te.placeholder(scope.batched(*spec.x_shape[1:]), spec.dtype, name="X")
        w = te.placeholder(scope.sizes(*weight_shape(spec, self.grain.channels)), spec.dtype, name="W")
        b = te.placeholder(scope.sizes(spec.channels_out), spec.dtype, name="B")
        picked = self._axes(x, w) if self._as_axes else self._blocks(x, w)
        m_out = spec.m_out

        def finished(n: Any, g: Any, m: Any, q: Any, *f: Any) -> Any:
            z = picked(n, g, m, q, f)
            if spec.bias:  # a channel that was rounded up has none, and borrows one
                z = z + sum_type(spec, b(g * m_out + tirx.min(m, m_out - 1) if self.ragged_channels else g * m_out + m))
            y = by_exponentials(activate(spec.activation, z))
            return (tirx.Select(tirx.isnan(z), z, y) if spec.activation.name in _CLIPS else y).astype(spec.dtype)

        result = te.compute(scope.batched(*self._result_sizes()), finished, name="result")
        func = te.create_prim_func([x, w, b, result] if spec.bias else [x, w, result])
        return self._scattered(func)

    @property
    def ragged_channels(self) -> bool:
        return self.scope.channels * self.spec.groups != self.spec.channels_out

    @property
    def _as_axes(self) -> bool:
        return phase_axes(self.spec, self.grain.apart)

    def _phases(self) -> list[int]:
        """How many phases there are along each axis: as axes all that the stride has, also beyond a short output."""
        return [axis.stride if self._as_axes else len(axis.phases) for axis in self.spec.axes]

    def _result_sizes(self) -> tuple[int, ...]:
        return (self.spec.groups, self.scope.channels, self.rounded, *self._phases())

    @property
    def _of_columns(self) -> tuple[int, ...]:
        """The positions as the last axes of ``columns``: in a row, or in rows of which each thread has a column."""
        lanes = self.grain.positions // self.grain.own
        return (self.rounded,) if self.grain.own == 1 else (self.rounded // lanes, lanes)

    def _read(self, q: Any) -> tuple[Any, ...]:
        """Where ``columns`` holds ``q``."""
        tile, own = self.grain.positions, self.grain.own
        if own == 1:
            return (q,)
        inside = tirx.floormod(q, tile)
        return (tirx.floordiv(q, tile) * own + tirx.floormod(inside, own), tirx.floordiv(inside, own))

    def _held(self, at: Sequence[Any]) -> Any:
        """The place of what ``columns`` holds at ``at``: they are in order."""
        return at[0] if self.grain.own == 1 else at[0] * (self.grain.positions // self.grain.own) + at[1]

    def _place(self, q: Any) -> Any:
        """The place of ``q`` among the positions."""
        return self._held(self._read(q))

    def _at(self, place: Any) -> list[Any]:
        """Positions along the axes, of the one at ``place``."""
        return unravel(place, self.extents)

    def _element(self, x: Any, n: Any, channel: Any, at: Sequence[Any]) -> Any:
        """X at ``at``, zero outside of it."""
        axes = self.spec.axes
        tests = [test for i, axis in zip(at, axes, strict=True) for test in (i >= 0, self._within(i, axis))]
        value = x(*self.spec.in_layout(n, channel, *at))
        return tirx.if_then_else(tirx.all(*tests), value, tirx.const(0, self.spec.dtype))

    def _within(self, i: Any, axis: Axis) -> Any:
        """Test ``i < axis.size``: by a sign where TVM would make an equation of this and ``i >= 0``.

        Its simplifier trips over one of 64 bits.
        """
        equation = 1 < axis.size == axis.dilation and i.ty.dtype == "int64"
        return _negative(i - axis.size) if equation else i < axis.size

    def _product(self, column: Any, weight: Any) -> Any:
        return sum_type(self.spec, column) * sum_type(self.spec, weight)

    def _channel(self) -> tuple[int, Any]:
        c_in = self.spec.c_in
        index = self.scope.index
        return c_in, te.reduce_axis((tirx.IntImm(index, 0), tirx.IntImm(index, c_in)), "c")

    def _blocks(self, x: Any, w: Any) -> Any:
        """One pair of blocks a phase; a phase without taps is zero and has none."""
        spec, scope = self.spec, self.scope

        def block(phases: Phases) -> Any:
            name = "_".join(str(p.index) for p in phases)
            counts, (c_in, c) = [p.taps for p in phases], self._channel()

            def column(n: Any, g: Any, td: Any, th: Any, tw: Any, c: Any, *at: Any) -> Any:
                of = zip(self._at(self._held(at)), phases, (td, th, tw), spec.axes, strict=True)
                reads = [i + p.first_offset - t * axis.offset_step for i, p, t, axis in of]
                return self._element(x, n, g * c_in + c, reads)

            columns = te.compute(
                scope.batched(spec.groups, *counts, c_in, *self._of_columns), column, name=f"columns_{name}"
            )
            taps = scope.reduced(counts)
            kernel = [p.first_tap + t * axis.tap_step for p, t, axis in zip(phases, taps, spec.axes, strict=True)]
            return te.compute(
                scope.batched(spec.groups, scope.channels, self.rounded),
                lambda n, g, m, q: te.sum(
                    self._product(columns(n, g, *taps, c, *self._read(q)), w(g * c_in + c, m, *kernel)), axis=[*taps, c]
                ),
                name=f"phase_{name}",
            )

        blocks = {phases: block(phases) for phases in product(*(axis.phases for axis in spec.axes)) if meets(phases)}
        return lambda n, g, m, q, f: of_phase(spec, f, lambda phases: blocks[phases](n, g, m, q))

    # --- the phases as axes ---

    def _axes(self, x: Any, w: Any) -> Any:
        """One pair of blocks, reduced over the largest number of taps of any phase.

        What a phase has less must not be summed: `only_taps` cuts the loops of what was scheduled.
        """
        spec, scope, same = self.spec, self.scope, same_columns(self.spec, self.grain.apart)
        numberings, (c_in, c) = [Numbering(axis) for axis in spec.axes], self._channel()
        counts = [n.most_taps for n in numberings]

        def column(n: Any, g: Any, *rest: Any) -> Any:
            f, (td, th, tw, c, *at) = ([], rest) if same else (rest[:3], rest[3:])
            positions = self._positions(self._held(at), None if same else f)
            of = zip(numberings, positions, (td, th, tw), strict=True)
            return self._element(x, n, g * c_in + c, [i - t * axis.axis.offset_step for axis, i, t in of])

        sizes = [*([] if same else self._phases()), *counts, c_in, *self._of_columns]
        columns = te.compute(scope.batched(spec.groups, *sizes), column, name="columns")
        taps = scope.reduced(counts)

        def contract(n: Any, g: Any, m: Any, fd: Any, fh: Any, fw: Any, q: Any) -> Any:
            f = (fd, fh, fw)
            kernel = [
                tap if axis.axis.even_taps else tirx.min(tap, axis.axis.kernel - 1)
                for axis, i, t in zip(numberings, f, taps, strict=True)
                for tap in [axis.first_tap(i) + t * axis.axis.tap_step]
            ]
            read = columns(n, g, *([] if same else f), *taps, c, *self._read(q))
            return te.sum(self._product(read, w(g * c_in + c, m, *kernel)), axis=[*taps, c])

        sums = scope.batched(spec.groups, scope.channels, *self._phases(), self.rounded)
        block = te.compute(sums, contract, name="phase")

        def pick(n: Any, g: Any, m: Any, q: Any, f: Sequence[Any]) -> Any:
            value = block(n, g, m, *f, q)
            tests = [test for axis, i in zip(numberings, f, strict=True) for test in axis.has_taps(i)]
            return tirx.Select(tirx.all(*tests), value, tirx.const(0, spec.sum_dtype)) if tests else value

        return pick

    def _positions(self, place: Any, f: Sequence[Any] | None) -> list[Any]:
        """Positions along the axes, as the phases ``f`` count them; without ``f`` as all of them do."""
        numberings = [Numbering(axis) for axis in self.spec.axes]
        if f is None:
            return [i + n.together.start for i, n in zip(self._at(place), numberings, strict=True)]
        return [i + n.first(phase) for i, n, phase in zip(self._at(place), numberings, f, strict=True)]

    # --- the scatter ---

    def _below(self, index: Any, limit: Any) -> Any:
        """Test ``index < limit``, by the sign of the difference where a thread's positions lie apart.

        Of a comparison TVM makes bounds for the loops around it, and each thread would then keep the whole buffer.
        """
        if self.grain.own == 1:
            return index < limit
        return _negative(index - limit)

    def _scattered(self, func: tirx.PrimFunc) -> tirx.PrimFunc:
        spec, scope = self.spec, self.scope
        m_out, count = spec.m_out, math.prod(self.extents)
        same = same_columns(spec, self.grain.apart)
        axes = list(zip(spec.axes, self.extents, self._phases(), strict=True))

        def place(n: Any, g: Any, m: Any, q: Any, *f: Any) -> tuple[list[Any], list[Any]]:
            channel = g * m_out + m
            guards = [m < m_out] if self.ragged_channels else []
            where = self._place(q)
            guards += [self._below(where, count)] if self.rounded > count else []
            if self._as_axes:
                at = self._positions(where, None if same else f)
                outputs = [Numbering(a).output(i, phase) for a, i, phase in zip(spec.axes, at, f, strict=True)]
            else:
                outputs = [i * a.stride + phase for i, phase, a in zip(self._at(where), f, spec.axes, strict=True)]
            for o, (axis, positions, phases) in zip(outputs, axes, strict=True):
                if positions * phases > axis.out:
                    guards += [self._below(-1, o)] if same and not Numbering(axis).aligned else []
                    guards.append(self._below(o, axis.out))
            return list(spec.in_layout(n, channel, *outputs)), guards

        y = tirx.decl_buffer(scope.batched(*spec.y_shape[1:]), spec.dtype, name="output")
        return scattered(func, y, ("n", "g", "m", "q", "fd", "fh", "fw"), place)


def only_taps(func: tirx.PrimFunc, spec: ConvTranspose3d, mark: str, *, blocks: int, long_first: bool) -> tirx.PrimFunc:
    """Let loops over taps end where those of a block's phase do, in a scheduled function whose phases are apart.

    The loops are those that are annotated with ``mark``, and the axis. Of the ``blocks`` of an image, phases vary
    fastest in the block's index; with ``long_first`` those of a row do, and those of the other axes slowest.
    """
    grids: list[Any] = []

    def found(loop: Any) -> None:
        if loop.thread_binding is not None and loop.thread_binding.thread_tag == "blockIdx.x":
            grids.append(loop)

    tvm_ffi.structural_walk(func.body, (tirx.For, found))
    block = grids[0].loop_var
    fd, fh, fw = (axis.stride for axis in spec.axes)
    others = tirx.floordiv(block, blocks // (fd * fh) if long_first else fw)
    phases = (tirx.floormod(tirx.floordiv(others, fh), fd), tirx.floormod(others, fh), tirx.floormod(block, fw))

    def cut(loop: Any) -> Any:
        if mark not in loop.annotations:
            return loop
        axis = int(loop.annotations[mark])
        rest = {name: value for name, value in loop.annotations.items() if name != mark}
        extent = loop.extent if spec.axes[axis].even_taps else Numbering(spec.axes[axis]).taps(phases[axis])
        body = loop.body
        if int(loop.extent) == 1:  # TVM counts on the one turn in some places and not in others
            body = tvm_ffi.structural_map(body, (tirx.Var, lambda v: loop.min if v.same_as(loop.loop_var) else v))
        return tirx.For(loop.loop_var, loop.min, extent, loop.kind, body, loop.thread_binding, rest)

    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.For, cut)))


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


def unravel(flat: Any, sizes: Sequence[int]) -> list[Any]:
    """The index of each axis, of an element's number."""
    _, height, width = sizes
    return [
        tirx.floordiv(flat, height * width),
        tirx.floormod(tirx.floordiv(flat, width), height),
        tirx.floormod(flat, width),
    ]


def _like(index: Any, value: int) -> Any:
    return tirx.const(value, index.ty.dtype)


def _negative(index: Any) -> Any:
    """Test the sign.

    Of 64 bits, too, the number is shifted by 31 of them: TVM may make an index of 32, and keeps what it is shifted by.
    """
    return tirx.shift_right(index, _like(index, 31)) < 0
