"""The operator as a TVM tensor expression: phases, not zeros.

Along one axis, output ``o = s*q + f`` meets a fixed list of taps for each phase ``f``
(`opcompile.spec.Phase`), so a transposed convolution is ``sD*sH*sW`` small dense ones over a
padded input, with no zero-stuffing and no bounds test inside. The blocks, whose names are the
contract with `schedules` (renaming one orphans every tuned record):

``pad``
    ``(N, G, C/g, eD, eH, eW)``: the part of X that is read, with zeros around it.
``phase_<fd>_<fh>_<fw>``
    ``(N, G, M/g, qD, qH, qW)``: one a phase that has taps, reduced over ``(tD, tH, tW, c)``.
``phase``
    Instead of those, when they would be too many: ``(N, G, M/g, sD, sH, sW, qD, qH, qW)``, the
    phases as axes and their taps padded to equal number with zero weights.
``output``
    Y in its layout: picks the phase, adds the bias, applies the activation.

A schedule works in tiles, and tiles need sizes they divide. Rather than predicates in the inner
loop, the declaration rounds the sizes of ``phase`` blocks up to a `Grain`; what is computed beyond
the output is never stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import tvm
from tvm import te, tirx

from opcompile.spec import Activation, Axis, ConvTranspose3d, Phase

# Above this many phases, one block each would cost more compile time and code than it saves.
MOST_PHASE_BLOCKS = 27

_ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Grain:
    """Multiples that the sizes of the phase blocks are rounded up to: M/g, and qD, qH, qW."""

    channels: int = 1
    positions: tuple[int, int, int] = (1, 1, 1)


def phases_as_axes(spec: ConvTranspose3d) -> bool:
    """Whether the phases of ``spec`` are axes of one block rather than a block each."""
    return math.prod(len(axis.phases) for axis in spec.axes) > MOST_PHASE_BLOCKS


def round_up(size: int, grain: int) -> int:
    """The smallest multiple of ``grain`` that is at least ``size``."""
    return -(-size // grain) * grain


@dataclass(frozen=True, slots=True)
class _Window:
    """The part of one input axis that the phases read: ``extent`` elements from ``start`` on."""

    start: int
    extent: int
    positions: int

    @classmethod
    def of(cls, axis: Axis, grain: int, as_axes: bool) -> _Window:
        positions = round_up(axis.positions, grain)
        reads = [offset for phase in axis.phases for offset in phase.offsets()] or [0]
        low, high = min(reads), max(reads)
        if as_axes:  # every phase is given the same number of taps, the surplus ones with zero weights
            most = _taps(axis)
            low = min(p.first_offset - (most - 1) * p.offset_step for p in axis.phases)
            high = max(p.first_offset for p in axis.phases)
        return cls(low, high - low + positions, positions)


def _taps(axis: Axis) -> int:
    return max(1, *(phase.taps for phase in axis.phases), 0)


def packed_from(spec: ConvTranspose3d, grain: Grain) -> tuple[int, int, int, int, int]:
    """Shape of the declared W: ``(C, M/g, kD, kH, kW)``, zero-padded to the grain and to whole taps."""
    c, m, *kernel = spec.w_shape
    if phases_as_axes(spec):
        kernel = [max(k, a.tap_step * _taps(a)) for k, a in zip(kernel, spec.axes, strict=True)]
    kd, kh, kw = kernel
    return (c, round_up(m, grain.channels), kd, kh, kw)


def declare(spec: ConvTranspose3d, grain: Grain = Grain()) -> tirx.PrimFunc:  # noqa: B008 (frozen)
    """Return the unscheduled function ``main(X, W[, B], Y)``.

    X and Y have the spec's shapes and layout, W has the shape `packed_from` gives. Indices are
    32-bit where every tensor has fewer than 2^31 elements, 64-bit otherwise and for a dynamic batch.
    The tensors may lie at any address that suits their element type.
    """
    as_axes = phases_as_axes(spec)
    windows = [_Window.of(a, g, as_axes) for a, g in zip(spec.axes, grain.positions, strict=True)]
    c_in, (c_total, m_rounded, *kernel) = spec.channels_in // spec.groups, packed_from(spec, grain)
    index = _index_dtype(spec, windows, m_rounded)

    def sized(*sizes: Any) -> list[Any]:
        return [tirx.IntImm(index, n) if isinstance(n, int) else n for n in sizes]

    batch = te.var("batch", index) if spec.batch is None else tirx.IntImm(index, spec.batch)
    x_shape, y_shape = ([batch, *sized(*shape[1:])] for shape in (spec.x_shape, spec.y_shape))
    x = te.placeholder(x_shape, spec.dtype, name="X")
    w = te.placeholder(sized(c_total, m_rounded, *kernel), spec.dtype, name="W")
    b = te.placeholder(sized(spec.channels_out), spec.dtype, name="B")

    padded = te.compute(
        [batch, *sized(spec.groups, c_in, *(window.extent for window in windows))],
        lambda n, g, c, *at: _inside(spec, x, n, g * c_in + c, [i + win.start for i, win in zip(at, windows)]),
        name="pad",
    )
    c = te.reduce_axis((tirx.IntImm(index, 0), tirx.IntImm(index, c_in)), "c")

    def contract(starts: Sequence[Any], firsts: Sequence[Any], taps: Sequence[Any], n: Any, g: Any, m: Any) -> Any:
        window = [q - t * a.offset_step for q, t, a in zip(starts, taps, spec.axes, strict=True)]
        tap = [k + t * a.tap_step for k, t, a in zip(firsts, taps, spec.axes, strict=True)]
        products = _sum_type(spec, padded(n, g, c, *window)) * _sum_type(spec, w(g * c_in + c, m, *tap))
        return te.sum(products, axis=[*taps, c])

    def reduced_over(counts: Sequence[int]) -> list[Any]:
        zero = tirx.IntImm(index, 0)
        return [te.reduce_axis((zero, tirx.IntImm(index, k)), f"t{a}") for k, a in zip(counts, "dhw", strict=True)]

    positions = [window.positions for window in windows]
    blocks: dict[tuple[int, ...], Any] = {}

    def one_phase(phases: Sequence[Phase]) -> Any:
        """The block of one phase on each axis, reduced over exactly its taps."""
        taps = reduced_over([p.taps for p in phases])

        def at_position(n: Any, g: Any, m: Any, *at: Any) -> Any:
            starts = [q + p.first_offset - win.start for q, p, win in zip(at, phases, windows, strict=True)]
            return contract(starts, [p.first_tap for p in phases], taps, n, g, m)

        name = "phase_" + "_".join(str(p.index) for p in phases)
        return te.compute([batch, *sized(spec.groups, m_rounded, *positions)], at_position, name=name)

    def every_phase() -> Any:
        """One block with the phases as axes, each reduced over the largest number of taps."""
        taps = reduced_over([_taps(a) for a in spec.axes])

        def at_position(n: Any, g: Any, m: Any, *at: Any) -> Any:
            found = [_first(a, f) for a, f in zip(spec.axes, at[:3], strict=True)]
            starts = [q + off - win.start for q, (_, off), win in zip(at[3:], found, windows, strict=True)]
            return contract(starts, [tap for tap, _ in found], taps, n, g, m)

        strides = [len(a.phases) for a in spec.axes]
        return te.compute([batch, *sized(spec.groups, m_rounded, *strides, *positions)], at_position, name="phase")

    if as_axes:
        whole = every_phase()
    else:
        for phases in product(*(axis.phases for axis in spec.axes)):
            if all(phase.taps for phase in phases):
                blocks[tuple(phase.index for phase in phases)] = one_phase(phases)

    m_out = spec.channels_out // spec.groups
    zero = tirx.const(0, spec.sum_dtype)

    def pick(n: Any, m: Any, *o: Any) -> Any:
        q = [tirx.floordiv(i, a.stride) for i, a in zip(o, spec.axes, strict=True)]
        f = [tirx.floormod(i, a.stride) for i, a in zip(o, spec.axes, strict=True)]
        at = [n, tirx.floordiv(m, m_out), tirx.floormod(m, m_out)]
        if as_axes:
            return _where_taps(spec, f, whole(*at, *f, *q), zero)
        value: Any = None if len(blocks) == math.prod(len(a.phases) for a in spec.axes) else zero
        for indices, block in reversed(blocks.items()):
            here = block(*at, *q)
            meets = [fi == i for fi, i, a in zip(f, indices, spec.axes, strict=True) if len(a.phases) > 1]
            value = here if value is None or not meets else tirx.Select(tirx.all(*meets), here, value)
        return value

    def finish(n: Any, m: Any, *o: Any) -> Any:
        z = pick(n, m, *o)
        if spec.bias:
            z = z + _sum_type(spec, b(m))
        return activate(spec.activation, z).astype(spec.dtype)

    def output(n: Any, *at: Any) -> Any:
        return finish(n, *at) if spec.layout == "NCDHW" else finish(n, at[-1], *at[:-1])

    y = te.compute(y_shape, output, name="output")
    func = te.create_prim_func([x, w, b, y] if spec.bias else [x, w, y])
    return _unaligned(func, {"X": spec.dtype, "W": spec.dtype, "B": spec.dtype, "output": spec.dtype})


def _index_dtype(spec: ConvTranspose3d, windows: Sequence[_Window], m_rounded: int) -> str:
    if spec.batch is None:
        return "int64"
    padded = spec.channels_in * math.prod(win.extent for win in windows)
    phase = spec.groups * m_rounded * math.prod(win.positions for win in windows)
    if phases_as_axes(spec):
        phase *= math.prod(len(a.phases) for a in spec.axes)
    x, y = (math.prod(n or 1 for n in shape) for shape in (spec.x_shape, spec.y_shape))
    # element numbers must fit, and so must byte addresses' worth of rounding: leave a factor of two
    largest = max(x, y, spec.batch * padded, spec.batch * phase, math.prod(packed_from(spec, Grain(m_rounded))))
    return "int64" if largest >= 2**30 else "int32"


def _sum_type(spec: ConvTranspose3d, value: Any) -> Any:
    return value if spec.dtype == spec.sum_dtype else value.astype(spec.sum_dtype)


def _inside(spec: ConvTranspose3d, x: Any, n: Any, c: Any, at: Sequence[Any]) -> Any:
    """Element of X where there is one, else zero."""
    element = x(n, c, *at) if spec.layout == "NCDHW" else x(n, *at, c)
    tests = [test for i, a in zip(at, spec.axes, strict=True) for test in (i >= 0, i < a.size)]
    return tirx.if_then_else(tirx.all(*tests), element, tirx.const(0, spec.dtype))


def _first(axis: Axis, f: Any) -> tuple[Any, Any]:
    """First tap and input offset of phase ``f``, as expressions: `Axis.phase` solved for ``t``.

    ``(f + begin - t*d) % s == 0`` with ``g = gcd(s, d)`` has the solution
    ``t = (f + begin)/g * (d/g)^-1 mod s/g`` when g divides ``f + begin``, and none otherwise: the
    value is then meaningless, and `_where_taps` discards it.
    """
    g = math.gcd(axis.stride, axis.dilation)
    inverse = pow(axis.dilation // g, -1, axis.tap_step) if axis.tap_step > 1 else 0
    tap = tirx.floormod(tirx.floordiv(f + axis.begin, g) * inverse, axis.tap_step)
    return tap, tirx.floordiv(f + axis.begin - tap * axis.dilation, axis.stride)


def _where_taps(spec: ConvTranspose3d, f: Sequence[Any], value: Any, zero: Any) -> Any:
    gcds = [math.gcd(a.stride, a.dilation) for a in spec.axes]
    tests = [tirx.floormod(i + a.begin, g) == 0 for i, a, g in zip(f, spec.axes, gcds, strict=True) if g > 1]
    return tirx.Select(tirx.all(*tests), value, zero) if tests else value


def _unaligned(func: tirx.PrimFunc, params: dict[str, str]) -> tirx.PrimFunc:
    """The same function for tensors at any address that suits their element type.

    TVM assumes 64-byte aligned tensors and emits instructions that fault on others. A Buffer's
    alignment can only be given when it is made, which `te` does, so it is changed in the
    function's serialised form.
    """
    graph = json.loads(tvm.ir.save_json(func))
    nodes = graph["nodes"]
    for node in nodes:
        if node["type"] != "ir.Var":
            continue
        data = node["data"]
        kind = nodes[data["ty"]]
        if kind["type"] == "tirx.BufferType" and (name := nodes[data["name"]]["data"]) in params:
            kind["data"]["data_alignment"] = _ITEMSIZE[params[name]]
    return tvm.ir.load_json(json.dumps(graph))


# --- activations, on the sum type ---


def activate(activation: Activation, z: Any) -> Any:
    """The activation as an expression in the type of ``z``; `opcompile.reference` has the formulas."""
    return _FORMULAS[activation.name](z, *(tirx.const(p, z.ty.dtype) for p in activation.parameters))


def _const(z: Any, value: float) -> Any:
    return tirx.const(value, z.ty.dtype)


def _clip(z: Any, low: float, high: float) -> Any:
    return tirx.min(tirx.max(z, _const(z, low)), _const(z, high))


def _sigmoid(z: Any) -> Any:
    # exp of a large positive number is inf, and 1/inf the right limit
    return _const(z, 1) / (_const(z, 1) + tirx.exp(-z))


def _hard_sigmoid(z: Any, alpha: Any, beta: Any) -> Any:
    return _clip(alpha * z + beta, 0, 1)


def _elu(z: Any, alpha: Any) -> Any:
    return tirx.Select(z >= _const(z, 0), z, alpha * (tirx.exp(tirx.min(z, _const(z, 0))) - _const(z, 1)))


def _tanh(z: Any) -> Any:
    # in the exponential of a negative number, which cannot overflow
    e = tirx.exp(_const(z, -2) * tirx.abs(z))
    magnitude = (_const(z, 1) - e) / (_const(z, 1) + e)
    return tirx.Select(z >= _const(z, 0), magnitude, -magnitude)


def _softplus(z: Any) -> Any:
    return tirx.max(z, _const(z, 0)) + tirx.log(_const(z, 1) + tirx.exp(-tirx.abs(z)))


def _mish(z: Any) -> Any:
    # tanh(log(1 + e)) = e*(e + 2) / (e*(e + 2) + 2), with e = exp(z) kept from overflowing: beyond 20 it is 1
    e = tirx.exp(tirx.min(z, _const(z, 20)))
    ratio = e * (e + _const(z, 2)) / (e * (e + _const(z, 2)) + _const(z, 2))
    return tirx.Select(z > _const(z, 20), z, z * ratio)


def _gelu(z: Any) -> Any:
    return _const(z, 0.5) * z * (_const(z, 1) + tirx.erf(z * _const(z, math.sqrt(0.5))))


def _gelu_tanh(z: Any) -> Any:
    inner = _const(z, math.sqrt(2 / math.pi)) * (z + _const(z, 0.044715) * z * z * z)
    return _const(z, 0.5) * z * (_const(z, 1) + _tanh(inner))


_FORMULAS: dict[str, Callable[..., Any]] = {
    "none": lambda z: z,
    "relu": lambda z: tirx.max(z, _const(z, 0)),
    "relu6": lambda z: _clip(z, 0, 6),
    "leaky_relu": lambda z, alpha: tirx.Select(z >= _const(z, 0), z, alpha * z),
    "elu": _elu,
    "selu": lambda z, alpha, gamma: gamma * _elu(z, alpha),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "sigmoid": _sigmoid,
    "hard_sigmoid": _hard_sigmoid,
    "silu": lambda z: z * _sigmoid(z),
    "hard_silu": lambda z: z * _hard_sigmoid(z, _const(z, 1 / 6), _const(z, 0.5)),
    "mish": _mish,
    "softplus": _softplus,
    "softsign": lambda z: z / (_const(z, 1) + tirx.abs(z)),
    "tanh": _tanh,
    "exponential": tirx.exp,
}
