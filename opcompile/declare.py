"""The operator as a TVM tensor expression: phases, not zeros.

Along one axis, output ``o = s*q + f`` meets a fixed list of taps for each phase ``f``
(`opcompile.spec.Phase`), so a transposed convolution is ``sD*sH*sW`` small dense ones over a
padded input, with no zero-stuffing and no bounds test inside. The blocks, whose names are the
contract with `schedules` (renaming one orphans every tuned record):

``pad``
    ``(N, G, C/g, eD, eH, eW)``: the part of X that is read, with zeros around it, unless taps have sums at planes of X
    as they lie: then ``(N, G, C/g, eD, 1, H*W)``, or ``(N, G, C/g, 1, 1, D*H*W)``. Annotated with ``pitch``, the
    distance between two rows.
``phase_<fd>_<fh>_<fw>``
    ``(N, G, M/g, qD, qH, qW)``: one a phase that has taps, reduced over ``(tD, tH, tW, c)``.
``tap_<kd>``
    Instead of those, where a `Grain` asks for ``taps``: ``(N, G, M/g, kH, kW, qD, blocks, line)``, the products
    with each tap of plane ``kd`` of the kernel summed over ``c`` alone, at every element of X that is read, zeros
    beside it included, or at those of X as they lie; ``output`` adds up what meets in it.
``phases_<nd>_<nh>_<nw>``
    Instead of those, when they would be too many: ``(N, G, M/g, rD, rH, rW, qD, qH, qW)``, with the phases that have
    ``nd x nh x nw`` taps as axes, numbered by their first taps. An axis has two numbers of taps at most.
``output``
    Y in its layout: picks the phase, adds the bias, applies the activation.

A schedule works in tiles, and tiles need sizes they divide. Rather than predicates in the inner
loop, the declaration rounds the sizes of ``phase`` blocks up to a `Grain`; what is computed beyond
the output is never stored.

Where vectors run along positions, rows would have to be rounded up one by one. Instead a `Grain`
with ``rows`` lays so many of them end to end: ``pad`` is ``(N, G, C/g, eD, blocks, rows read * eW)``,
a ``phase`` ``(N, G, M/g, qD, blocks, line)``, and a tap is a distance along the line. Between two
rows a line computes the few sums whose taps reach from one into the other; they are never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

from tvm import te, tirx
from tvm_ffi import structural_map

from opcompile.activations import activate
from opcompile.positions import Grid, Lines, Planes, Volume, Where, Window, round_up
from opcompile.spec import Axis, ConvTranspose3d, Phase, at_batch

# The type of indices.
INDEX = "int64"


@dataclass(frozen=True, slots=True)
class Grain:
    """Multiples that the sizes of the phase blocks are rounded up to: M/g, and qD, qH, qW.

    With ``rows``, so many rows of qH form one line, through ``planes``, and the last multiple is that of its length.
    With ``taps``, each tap has sums of its own; without ``rows``, at planes of X as they lie, all end to end where
    ``planes`` are several. With ``stored``, factors stay in the type that they are stored in, and are widened as they
    are multiplied. With ``groups``, those of a layer with one channel in each are channels of a single one, rounded
    up as channels are, and each has an X of its own: ``pad`` is ``(N, 1, C, ...)``, and W ``(C, 1, ...)``.
    """

    channels: int = 1
    positions: tuple[int, int, int] = (1, 1, 1)
    rows: int = 0
    planes: int = 1
    taps: bool = False
    stored: bool = False
    groups: bool = False


def packed_from(spec: ConvTranspose3d, grain: Grain) -> tuple[int, int, int, int, int]:
    """Shape of the declared W: ``(C, M/g, kD, kH, kW)``, zero-padded to the grain."""
    c, m, kd, kh, kw = spec.w_shape
    if grain.groups:
        return (round_up(c, grain.channels), m, kd, kh, kw)
    return (c, round_up(m, grain.channels), kd, kh, kw)


def declare(spec: ConvTranspose3d, grain: Grain = Grain()) -> tirx.PrimFunc:
    """Return the unscheduled function ``main(X, W[, B], Y)``.

    X and Y have the spec's shapes and layout, W has the shape `packed_from` gives. Indices have 64
    bits: LLVM cannot tell whether a sum of narrower ones wraps, and would compute each address anew.
    The tensors may lie at any address that suits their element type.
    """
    scope = Scope.of(spec, grain)
    x = te.placeholder(scope.batched(*spec.x_shape[1:]), spec.dtype, name="X")
    w = te.placeholder(scope.sizes(*packed_from(spec, grain)), spec.dtype, name="W")
    b = te.placeholder(scope.sizes(spec.channels_out), spec.dtype, name="B")
    pad, wide = scope.pad(x), w if grain.stored else _widened(spec, w)
    pick = _pick_taps if grain.taps else _pick_axes if spec.phases_as_axes else _pick_blocks
    picked = pick(scope, pad, wide)

    def finish(n: Any, *at: Any) -> Any:
        _, m, *o = spec.from_layout([n, *at])
        z = picked(n, m, o) + sum_type(spec, b(m)) if spec.bias else picked(n, m, o)
        return activate(spec.activation, z).astype(spec.dtype)

    y = te.compute(scope.batched(*spec.y_shape[1:]), finish, name="output")
    func = te.create_prim_func([x, w, b, y] if spec.bias else [x, w, y])
    return unaligned(func, spec.itemsize)


Picker = Callable[[Any, Any, Sequence[Any]], Any]
Phases = tuple[Phase, ...]


@dataclass(frozen=True, slots=True)
class Scope:
    """What the blocks of one declaration share: where positions lie, rounded sizes, type and unknowns of indices.

    ``groups`` of ``channels`` each: of as many as the spec has, or of all channels where each has an X of its ``own``.
    """

    spec: ConvTranspose3d
    where: Where
    groups: int
    channels: int
    own: bool
    index: str
    batch: Any
    stored: bool = False

    @classmethod
    def of(cls, spec: ConvTranspose3d, grain: Grain) -> Scope:
        """Choose the layout of positions that suits ``spec`` and ``grain``; indices have 64 bits."""
        window = Window.of_all_taps if spec.phases_as_axes else Window.of
        where: Where
        depth, _, columns = grain.positions
        if grain.taps and not grain.rows:
            where = Planes(spec.axes, depth, columns) if grain.planes == 1 else Volume(spec.axes, columns)
        elif grain.rows:
            windows = [window(a, g) for a, g in zip(spec.axes, (depth, 1, 1), strict=True)]
            where = Lines(windows, grain.rows, grain.planes, columns, grain.taps)
        else:
            where = Grid([window(a, g) for a, g in zip(spec.axes, grain.positions, strict=True)])
        groups = 1 if grain.groups else spec.groups
        channels = round_up(spec.channels_out // groups, grain.channels)
        batch = te.var("batch", INDEX) if spec.batch is None else tirx.IntImm(INDEX, spec.batch)
        return cls(spec, where, groups, channels, grain.groups, INDEX, batch, grain.stored)

    def narrowed(self) -> Scope:
        """The same with indices as narrow as `narrow_index` allows."""
        spec = self.spec
        if spec.batch is None:
            return self
        pad = spec.batch * spec.channels_in * math.prod(self.where.read_from)
        phases = spec.phases[1] if spec.phases_as_axes else 1
        phase = spec.batch * self.groups * self.channels * math.prod(self.where.positions) * phases
        w_shape = (spec.channels_in, self.channels, *(axis.kernel for axis in spec.axes))
        sizes = [math.prod(at_batch(shape, 1)) for shape in (spec.x_shape, spec.y_shape, w_shape)]
        index = narrow_index(spec.batch, [*sizes, pad, phase])
        return replace(self, index=index, batch=tirx.IntImm(index, spec.batch))

    def sizes(self, *sizes: int | None) -> list[Any]:
        """Return the sizes in the type of the indices."""
        return [tirx.IntImm(self.index, n) for n in sizes]

    def batched(self, *sizes: int | None) -> list[Any]:
        """Return the batch, a variable where it is open, and the sizes."""
        return [self.batch, *self.sizes(*sizes)]

    def grouped(self, m: Any) -> tuple[Any, Any]:
        """The group of output channel ``m``, and its place there."""
        each = self.spec.channels_out // self.groups
        return tirx.floordiv(m, each), tirx.floormod(m, each)

    def reduced(self, counts: Sequence[int]) -> list[Any]:
        """Reduction axes over taps."""
        return [
            te.reduce_axis((tirx.IntImm(self.index, 0), n), f"t{a}")
            for n, a in zip(self.sizes(*counts), "dhw", strict=True)
        ]

    def summed_channels(self) -> Any:
        """Reduction axis over the input channels of a group."""
        zero, count = self.sizes(0, self.spec.c_in)
        return te.reduce_axis((zero, count), "c")

    def pad(self, x: Any) -> Any:
        """The part of X that is read, in the type of the sums or as stored bits, zero where X has no element."""
        spec, c_in = self.spec, self.spec.c_in

        def element(n: Any, g: Any, c: Any, *at: Any) -> Any:
            where = self.where.element(at)
            tests = [test for i, a in zip(where, spec.axes, strict=True) for test in (i >= 0, i < a.size)]
            channel = g * c_in + c
            if self.own and self.channels > spec.channels_in:
                tests.append(c < spec.channels_in)
            value = x(*spec.in_layout(n, channel, *where))
            held = tirx.reinterpret(self._bits, value) if self.stored else sum_type(spec, value)
            return tirx.if_then_else(tirx.all(*tests), held, tirx.const(0, held.ty.dtype))

        channels = self.channels if self.own else c_in
        shape = self.batched(self.groups, channels, *self.where.read_from)
        return te.compute(shape, element, name="pad", attrs={"pitch": self.where.pitch})

    def contract(
        self,
        pad: Any,
        w: Any,
        lead: Sequence[Any],
        q: Sequence[Any],
        taps: list[Any],
        first: Sequence[tuple[Any, Any]],
    ) -> Any:
        """Sum over taps and channels at ``q``; ``first`` holds the first tap and its offset along each axis."""
        spec, c_in = self.spec, self.spec.c_in
        n, g, m = lead
        c = self.summed_channels()
        along = list(zip(first, taps, spec.axes, strict=True))
        kernel = [tap + t * axis.tap_step for (tap, _), t, axis in along]
        offsets = [offset - t * axis.offset_step for (_, offset), t, axis in along]
        read = self.where.read(q, offsets)
        if self.own:
            of_x, of_w = pad(n, g, m, *read), w(m, c, *kernel)
        else:
            of_x, of_w = pad(n, g, c, *read), w(g * c_in + c, m, *kernel)
        if self.stored:
            of_x, of_w = sum_type(spec, tirx.reinterpret(spec.dtype, of_x)), sum_type(spec, of_w)
        return te.sum(of_x * of_w, axis=[*taps, c])

    @property
    def _bits(self) -> str:
        """Whole numbers as wide as stored elements: TVM would widen a buffer of its own that holds bfloat16."""
        return f"uint{8 * self.spec.itemsize}"


def narrow_index(batch: int | None, sizes: Sequence[int]) -> str:
    """The type of indices where 32 bits are better: these, if the batch is known and all ``sizes`` are below 2^30."""
    # rounding up and fusing loops may double a range: leave a factor of two below 2^31
    return INDEX if batch is None or max(sizes) >= 2**30 else "int32"


def sum_type(spec: ConvTranspose3d, value: Any) -> Any:
    """Widen ``value`` from the storage type to the type of the sums."""
    return value if spec.dtype == spec.sum_dtype else value.astype(spec.sum_dtype)


def _widened(spec: ConvTranspose3d, w: Any) -> Any:
    """W in the type of the sums."""
    if spec.dtype == spec.sum_dtype:
        return w
    return te.compute(w.shape, lambda *at: sum_type(spec, w(*at)), name="wide")


def _split(spec: ConvTranspose3d, o: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Positions and phases of an output element."""
    at = list(zip(o, (a.stride for a in spec.axes), strict=True))
    return [tirx.floordiv(i, s) for i, s in at], [tirx.floormod(i, s) for i, s in at]


def _pick_blocks(scope: Scope, pad: Any, w: Any) -> Picker:
    """One block a phase, each reduced over exactly its taps; a phase without taps is zero and has no block."""
    spec, where = scope.spec, cast("Grid | Lines", scope.where)

    def block(phases: Phases) -> Any:
        taps = scope.reduced([p.taps for p in phases])
        return te.compute(
            scope.batched(scope.groups, scope.channels, *where.positions),
            lambda n, g, m, *q: scope.contract(
                pad, w, (n, g, m), q, taps, [(p.first_tap, p.first_offset) for p in phases]
            ),
            name="phase_" + "_".join(str(p.index) for p in phases),
        )

    blocks = {phases: block(phases) for phases in product(*(axis.phases for axis in spec.axes)) if meets(phases)}
    return _pick_phase(spec, lambda n, m, q, phases: blocks[phases](n, *scope.grouped(m), *where.place(q)))


def _pick_taps(scope: Scope, pad: Any, w: Any) -> Picker:
    """One block a plane of the kernel, each tap summed over channels alone; an output adds up the taps of its phase."""
    spec, c_in = scope.spec, scope.spec.c_in
    where = cast("Lines | Planes | Volume", scope.where)
    kernel = [axis.kernel for axis in spec.axes]
    at_first = [axis.reads[0] for axis in spec.axes[1:]]

    def block(kd: int, offset: int) -> Any:
        c = scope.summed_channels()
        return te.compute(
            scope.batched(scope.groups, scope.channels, *kernel[1:], *where.positions),
            lambda n, g, m, kh, kw, *q: te.sum(
                pad(n, g, c, *where.read(q, (offset, *at_first))) * w(g * c_in + c, m, kd, kh, kw), axis=c
            ),
            name=f"tap_{kd}",
        )

    blocks = {kd: block(kd, offset) for phase in spec.axes[0].phases for kd, offset in _taps(phase)}

    def value(n: Any, m: Any, q: Sequence[Any], phases: Phases) -> Any:
        terms = []
        for taps in product(*map(_taps, phases)):
            (kd, kh, kw), offsets = zip(*taps, strict=True)
            # lines have zeros beside X; of planes as they lie TVM allows no sums that are only read beside them
            beside = not all(axis.reaches(offset) for axis, offset in zip(spec.axes, offsets, strict=True))
            if beside and not isinstance(where, Lines):
                continue
            at, tests = where.sums(q, offsets)
            term = blocks[kd](n, *scope.grouped(m), kh, kw, *at)
            terms.append(tirx.if_then_else(tirx.all(*tests), term, tirx.const(0, spec.sum_dtype)) if tests else term)
        return sum(terms[1:], terms[0]) if terms else tirx.const(0, spec.sum_dtype)

    return _pick_phase(spec, value)


def _taps(phase: Phase) -> list[tuple[int, int]]:
    """The taps of a phase, each with the offset that it reads at."""
    return [(phase.first_tap + j * phase.tap_step, offset) for j, offset in enumerate(phase.offsets())]


def meets(phases: Phases) -> bool:
    """Whether any tap meets an output of these phases."""
    return all(phase.taps for phase in phases)


def _pick_phase(spec: ConvTranspose3d, of: Callable[[Any, Any, Sequence[Any], Phases], Any]) -> Picker:
    """The value of the phase of an output, as `of_phase` picks it."""

    def pick(n: Any, m: Any, o: Sequence[Any]) -> Any:
        q, f = _split(spec, o)
        return of_phase(spec, f, lambda phases: of(n, m, q, phases))

    return pick


def of_phase(spec: ConvTranspose3d, f: Sequence[Any], of: Callable[[Phases], Any]) -> Any:
    """Of the phases that taps meet, the value that ``of`` gives for the one with numbers ``f``; zero for the others."""
    every = list(product(*(axis.phases for axis in spec.axes)))
    met = [phases for phases in every if meets(phases)]
    value = None if len(met) == len(every) else tirx.const(0, spec.sum_dtype)
    for phases in reversed(met):
        tests = [i == p.index for i, p, a in zip(f, phases, spec.axes, strict=True) if len(a.phases) > 1]
        here = of(phases)
        value = here if value is None or not tests else tirx.Select(tirx.all(*tests), here, value)
    return value


@dataclass(frozen=True, slots=True)
class _Alike:
    """The phases of an axis that have as many ``taps``: their first taps are ``count``, from ``first`` on."""

    first: int
    count: int
    taps: int

    @classmethod
    def of(cls, axis: Axis) -> list[_Alike]:
        """Those of the output; first taps between theirs are of phases that a short one has not."""
        firsts: dict[int, list[int]] = {}
        for phase in axis.summed:
            firsts.setdefault(phase.taps, []).append(phase.first_tap)
        return [cls(min(each), max(each) - min(each) + 1, taps) for taps, each in sorted(firsts.items(), reverse=True)]


def _pick_axes(scope: Scope, pad: Any, w: Any) -> Picker:
    """Blocks with the phases as axes, each of those that have as many taps along each axis."""
    spec, where = scope.spec, cast("Grid | Lines", scope.where)

    def block(alike: Sequence[_Alike]) -> Any:
        taps = scope.reduced([each.taps for each in alike])

        def at(n: Any, g: Any, m: Any, *rq: Any) -> Any:
            tap = [each.first + r for each, r in zip(alike, rq[:3], strict=True)]
            firsts = [(t, axis.offset(t)) for t, axis in zip(tap, spec.axes, strict=True)]
            return scope.contract(pad, w, (n, g, m), rq[3:], taps, firsts)

        phases = [each.count for each in alike]
        shape = scope.batched(scope.groups, scope.channels, *phases, *where.positions)
        return te.compute(shape, at, name="phases_" + "_".join(str(each.taps) for each in alike))

    of_axes = [_Alike.of(axis) for axis in spec.axes]
    blocks = [(alike, block(alike)) for alike in product(*of_axes)]
    all_meet = all(sum(a.count for a in each) == axis.stride for each, axis in zip(of_axes, spec.axes, strict=True))

    def pick(n: Any, m: Any, o: Sequence[Any]) -> Any:
        q, f = _split(spec, o)
        taps = [_first_tap(axis, i) for axis, i in zip(spec.axes, f, strict=True)]
        value = None if all_meet else tirx.const(0, spec.sum_dtype)
        for alike, sums in blocks:
            here = sums(n, *scope.grouped(m), *(t - a.first for t, a in zip(taps, alike, strict=True)), *where.place(q))
            tests = [test for t, a in zip(taps, alike, strict=True) for test in (t >= a.first, t < a.first + a.count)]
            value = here if value is None else tirx.if_then_else(tirx.all(*tests), here, value)
        return value

    return pick


def _first_tap(axis: Axis, f: Any) -> Any:
    """The first tap of phase ``f``, an expression; where it has none, one beyond all."""
    g, tap = math.gcd(axis.stride, axis.dilation), axis.first_tap(f)
    return tap if g == 1 else tirx.Select(tirx.floormod(f + axis.begin, g) == 0, tap, tirx.const(axis.kernel, INDEX))


def unaligned(func: tirx.PrimFunc, alignment: int) -> tirx.PrimFunc:
    """The same function for tensors at any address that is a multiple of ``alignment``, the bytes of an element.

    TVM assumes 64-byte aligned tensors and emits instructions that fault on others. A Buffer's
    alignment can only be given when it is made, which `te` does, so others take their places.
    """

    def own(tensor: tirx.Var) -> tirx.Var:
        held = tensor.ty
        return tirx.decl_buffer(held.shape, held.dtype, tensor.name, data_alignment=alignment, layout=held.layout)

    tensors = {parameter: own(parameter) for parameter in func.params}
    return structural_map(func, (tirx.Var, lambda var: tensors.get(var, var)))
