"""Taps left out where they would multiply zeros beside X, and rows of X that taps share."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from tvm import s_tir, tirx
from tvm_ffi import structural_map

from schedules.statements import (
    ADDING,
    ADDING_ANY,
    begin,
    every,
    in_turn,
    loop_over,
    nest,
    over_channels,
    phase_of,
    replaced,
    with_turns,
    within,
)

if TYPE_CHECKING:
    from opcompile.spec import ConvTranspose3d
    from schedules.tiles import Tiles


def trimmed(loop: tirx.For, spec: ConvTranspose3d, along: int) -> tirx.Stmt:
    """Where a tile has all rows of a plane (``along`` 1) or all columns (2), give each tap those that read X.

    The others read zeros beside it.
    """
    loops, inner = nest(loop.body)
    block = inner.block if isinstance(inner, s_tir.SBlockRealize) else None
    if loop.kind != tirx.ForKind.SERIAL or block is None or not ADDING.fullmatch(block.name_hint):
        return loop
    position, tap = inner.iter_values[3 + along], inner.iter_values[6 + along]
    if not loop.loop_var.same_as(tap):
        return loop
    unrolled = [each for each in loops if each.kind == tirx.ForKind.UNROLLED]
    (positions,) = [each for each in unrolled if any(var.same_as(each.loop_var) for var in every(tirx.Var, position))]
    axis = spec.axes[along]
    phase = axis.phases[phase_of(block)[along]]
    read = [(max(0, -at), min(axis.positions, axis.size - at)) for at in phase.offsets()]
    if all(span == (0, int(positions.extent)) for span in read):
        return loop
    parts = []
    for k, (low, high) in enumerate(read):
        if low < high:
            of_span = structural_map(loop.body, (tirx.For, partial(_span, positions, low, high)))
            parts.append(replaced(of_span, {loop.loop_var: tirx.const(k, tap.ty.dtype)}))
    return in_turn(parts or [tirx.Evaluate(0)])


def _span(positions: tirx.For, low: int, high: int, loop: tirx.For) -> tirx.For:
    """The loop over positions, from ``low`` to ``high`` alone; others as they are."""
    if not loop.loop_var.same_as(positions.loop_var):
        return loop
    kind = loop.loop_var.ty.dtype
    position = tirx.Var(loop.loop_var.name, kind)
    body = replaced(loop.body, {loop.loop_var: position + low})
    return loop_over(position, high - low, body, loop.kind)


def skipping(loop: tirx.For, spec: ConvTranspose3d, t: Tiles) -> tirx.Stmt:
    """Leave out a tap, with all its channels, where the plane or the row that it reads is zeros beside X.

    That is an eighth of all products where X has 8 x 8 x 8 elements and a kernel of 3 a stride of 2.
    """
    found = over_channels(loop)
    if found is None:
        return loop
    adding, tile = found
    phase = phase_of(adding.block)
    _, _, _, d, h, _, tap_d, tap_h, *_ = [replaced(value, begin(tile)) for value in adding.iter_values]
    reads = [(spec.axes[0], phase[0], d, tap_d), (spec.axes[1], phase[1], h, tap_h)]
    tests = []
    several = any(adding.iter_values[7].same_as(each.loop_var) and int(each.extent) > 1 for each in tile)
    rows_apart = not t.line and t.rows == 1 and not several
    for axis, f, q, tap in reads[: 2 if rows_apart else 1]:  # several rows or taps at once read several rows of X
        first, last = axis.reads
        i = q + (axis.phases[f].first_offset - tap * axis.offset_step)
        if first < 0:
            tests.append(i >= 0)
        if last + axis.positions > axis.size:
            tests.append(i < axis.size)
    return tirx.IfThenElse(tirx.all(*tests), loop, None) if tests else loop


def skipping_planes(loop: tirx.For, spec: ConvTranspose3d) -> tirx.Stmt:
    """Leave out what a tap sums by itself at a plane beside X."""
    found = over_channels(loop, ADDING_ANY)
    if found is None:
        return loop
    adding, _ = found
    tap = int(adding.block.name_hint.split("_")[1])
    plane = adding.iter_values[5] + spec.axes[0].offset(tap)
    return tirx.IfThenElse(tirx.all(plane >= 0, plane < spec.axes[0].size), loop, None)


def sharing_rows(loop: tirx.For, spec: ConvTranspose3d) -> tirx.Stmt:
    """Where taps are unrolled beside several rows, take in turn all products of a row of X, and then of the next.

    LLVM keeps their order: a vector of X is loaded, and soon not needed again. Tap by tap, it would load what all taps
    read, and put most of it on the stack.
    """
    found = over_channels(loop)
    if found is None:
        return loop
    adding, (channels, of_tap_h, of_tap_w, of_h, *columns) = found
    if not adding.iter_values[7].same_as(of_tap_h.loop_var):  # more taps than are unrolled
        return loop
    kind, step = loop.loop_var.ty.dtype, spec.axes[1].offset_step
    # a tap reads the row that lies a step before that of the tap before it
    products = sorted(
        product(range(int(of_tap_h.extent)), range(int(of_h.extent))), key=lambda at: at[1] - at[0] * step
    )
    rows = []
    for tap_h, h in products:
        at = {of_tap_h.loop_var: tirx.const(tap_h, kind), of_h.loop_var: tirx.const(h, kind)}
        rows.append(within(columns, replaced(adding, at)))
    tile = with_turns(channels, with_turns(of_tap_w, in_turn(rows)))
    before = loop.body.seq[:-1] if isinstance(loop.body, tirx.SeqStmt) else []
    return with_turns(loop, in_turn([*before, tile]))
