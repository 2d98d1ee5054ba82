"""What no move of a schedule can say: vectors of some columns of a loop, taps left out, memory asked for early."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tvm
from tvm import s_tir, tirx
from tvm_ffi import structural_map

if TYPE_CHECKING:
    from opcompile.spec import ConvTranspose3d
    from schedules.tiles import Tiles

# Marks a loop over columns: those from the first number to the second may be vectors, of as many lanes as the third.
VECTORS = "opcompile.vectors"

# The block that adds one product to the sums of one phase.
_ADDING = re.compile(r"phase_\d+_\d+_\d+_update")
# The block that moves the sums of one phase out of registers, where each phase has blocks of its own.
_LEAVING = re.compile(r"phase_\d+_\d+_\d+_local")


def finish(module: tvm.IRModule, spec: ConvTranspose3d, tiles: Tiles) -> tvm.IRModule:
    """Rewrite a scheduled module: vectors copy X, zeros are not multiplied, Y is asked for before it is written.

    TVM splits no loop that begins elsewhere than at 0, and the columns of X between two pads are such; LLVM unrolls
    short rows into scalars. And between its last sum and its first store a task would wait for memory, line by line:
    by then the second cache has the lines.
    """
    ((name, function),) = module.functions.items()
    function = structural_map(function, (tirx.For, _in_vectors))
    function = structural_map(function, (tirx.For, lambda loop: _skipping(loop, spec, tiles)))
    if tiles.vector == "channels" or spec.layout == "NCDHW":  # else the elements of a vector lie apart in Y
        y = function.params[-1]
        function = structural_map(function, (tirx.For, lambda loop: _fetching(loop, spec, tiles, y)))
    return tvm.IRModule({name.name_hint: function})


def _in_vectors(loop: tirx.For) -> tirx.Stmt:
    """A marked loop: scalars, whole vectors, what is left of them as one, scalars."""
    if VECTORS not in loop.annotations:
        return loop
    low, high, widest = (int(i) for i in loop.annotations[VECTORS])
    whole = low + (high - low) // widest * widest
    parts, at = [], 0
    for end, lanes in ((low, 1), (whole, widest), (high, high - whole), (int(loop.extent), 1)):
        if end > at:
            parts.append(_columns(loop, at, (end - at) // lanes, lanes))
            at = end
    return parts[0] if len(parts) == 1 else tirx.SeqStmt(parts)


def _columns(loop: tirx.For, first: int, count: int, lanes: int) -> tirx.Stmt:
    """``count`` times ``lanes`` columns, from ``first`` on."""
    kind, name = loop.loop_var.ty.dtype, loop.loop_var.name
    vector, lane = tirx.Var(f"{name}_vector", kind), tirx.Var(f"{name}_lane", kind)
    body = _with(loop.body, {loop.loop_var: vector * lanes + lane + first})
    at_once = tirx.ForKind.VECTORIZED if lanes > 1 else tirx.ForKind.SERIAL
    zero = tirx.const(0, kind)
    inner = tirx.For(lane, zero, tirx.const(lanes, kind), at_once, body)
    return tirx.For(vector, zero, tirx.const(count, kind), tirx.ForKind.SERIAL, inner)


def _skipping(loop: tirx.For, spec: ConvTranspose3d, t: Tiles) -> tirx.Stmt:
    """Leave out a tap, with all its channels, where the plane or the row that it reads is zeros beside X.

    That is an eighth of all products where X has 8 x 8 x 8 elements and a kernel of 3 a stride of 2.
    """
    inner, first_of_tile = loop.body, {}
    while isinstance(inner, tirx.For) and inner.kind != tirx.ForKind.SERIAL:
        first_of_tile[inner.loop_var] = tirx.const(0, inner.loop_var.ty.dtype)
        inner = inner.body
    block = inner.block if isinstance(inner, s_tir.SBlockRealize) else None
    if loop.kind != tirx.ForKind.SERIAL or block is None or not _ADDING.fullmatch(block.name_hint) or not first_of_tile:
        return loop
    phase = [int(f) for f in block.name_hint.split("_")[1:4]]
    _, _, _, d, h, _, tap_d, tap_h, *_ = [_with(value, first_of_tile) for value in inner.iter_values]
    reads = [(spec.axes[0], phase[0], d, tap_d), (spec.axes[1], phase[1], h, tap_h)]
    tests = []
    for axis, f, q, tap in reads[: 1 if t.line or t.rows > 1 else 2]:  # a tile of several rows reads as many
        first, last = axis.reads
        i = q + (axis.phases[f].first_offset - tap * axis.offset_step)
        if first < 0:
            tests.append(i >= 0)
        if last + axis.positions > axis.size:
            tests.append(i < axis.size)
    return tirx.IfThenElse(tirx.all(*tests), loop, None) if tests else loop


def _fetching(loop: tirx.For, spec: ConvTranspose3d, t: Tiles, y: Any) -> tirx.Stmt:
    """Where a vector of sums leaves its registers, ask for one line of Y into the second cache.

    The phases of a row fill as many lines as they have vectors, and each vector asks for another one. A line that is
    not there, beyond Y, is not fetched and does no harm.
    """
    block = loop.body.block if isinstance(loop.body, s_tir.SBlockRealize) else None
    if loop.kind != tirx.ForKind.VECTORIZED or block is None or not _LEAVING.fullmatch(block.name_hint):
        return loop
    first_lane = {loop.loop_var: tirx.const(0, loop.loop_var.ty.dtype)}
    n, g, m, d, h, w, *_ = [_with(value, first_lane) for value in loop.body.iter_values]
    phase = [int(f) for f in block.name_hint.split("_")[1:4]]
    if t.vector == "channels":
        m = m * t.lanes
    else:
        w = w + phase[2] * t.lanes // spec.axes[2].stride
    if t.line:
        first, last = spec.axes[2].reads
        of_row = last - first + spec.axes[2].positions
        h, w = h * t.height + tirx.floordiv(w, of_row), tirx.floormod(w, of_row)
    o = [q * axis.stride + f for q, axis, f in zip((d, h, w), spec.axes, phase, strict=True)]
    if t.vector == "channels" and spec.layout == "NCDHW":  # the channels of a vector are a line each
        m = m + tirx.floormod(o[2], t.lanes)
    m = g * (spec.channels_out // spec.groups) + m
    line = y[(n, m, *o)] if spec.layout == "NCDHW" else y[(n, *o, m)]
    to_read, into_second_cache, data = (tirx.const(i, "int32") for i in (0, 2, 1))
    fetch = tirx.call_llvm_intrin("void", "llvm.prefetch", tirx.address_of(line), to_read, into_second_cache, data)
    return tirx.SeqStmt([loop, tirx.Evaluate(fetch)])


def _with(tree: Any, values: Mapping[tirx.Var, Any]) -> Any:
    """``tree`` with variables replaced."""
    return structural_map(tree, (tirx.Var, lambda var: values.get(var, var)))
