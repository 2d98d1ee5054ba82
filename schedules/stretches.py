"""Rows of Y that are no whole cache lines, written past the caches: what a band has of a plane, put together first.

Such rows cannot be streamed one by one (`schedules.streams`): two that are neighbours share a line. But all rows that
a band writes of a plane of a channel lie side by side. Register tiles write these to a buffer in the first cache,
whose lines end where those of Y do; then they go out, whole lines past the caches, and what they share with the rows
before and behind them as ever. These two lines are asked for before the rows are summed: a store that waits for memory
holds up all that come after it, the streamed ones first. Where Y begins does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tvm import s_tir, tirx
from tvm.ir import Range
from tvm_ffi import structural_map

from schedules.division import up
from schedules.statements import ROW, begin, every, in_turn, loop_over, nest, replaced
from schedules.tiles import CACHE_LINE, divided, elements_of_stretch, left_over

if TYPE_CHECKING:
    from opcompile.spec import ConvTranspose3d
    from schedules.tiles import Tiles

# float32 elements of a cache line.
_A_LINE = CACHE_LINE // 4


def stretches(spec: ConvTranspose3d, t: Tiles) -> tirx.Buffer:
    """The buffer of a band: rows of a plane of each channel, and room for them to begin anywhere in a line."""
    pitch = up(elements_of_stretch(spec, t), _A_LINE) + _A_LINE
    return tirx.decl_buffer((tirx.const(t.task, "int64"), tirx.const(pitch, "int64")), "float32", "stretches")


def in_stretches(
    rows: Sequence[tirx.Stmt], writing: tirx.Stmt, spec: ConvTranspose3d, t: Tiles, y: tirx.Buffer, to: tirx.Buffer
) -> tirx.Stmt:
    """Let ``rows``, which write those of each phase in turn, write to the buffer, and each plane be streamed from it.

    ``writing`` would write all that the band has.
    """
    loops, realize = nest(writing)
    n, m, d, h, w = [replaced(i, begin(loops)) for i in realize.iter_values]
    axis_d, axis_h, axis_w = spec.axes
    kind = w.ty.dtype
    everything = [Range.from_min_extent(tirx.const(0, kind), extent) for extent in to.shape]

    def first(channel: Any, phase: int) -> Any:
        """The address of what the band writes of a channel in a plane."""
        return tirx.address_of(tirx.BufferLoad(y, [n, channel, d + phase, h, tirx.const(0, kind)]))

    def place(channel: Any, phase: int) -> Any:
        """Where the buffer has it: as far behind a line as Y."""
        return tirx.call_extern(kind, "opcompile_behind_a_line", first(channel, phase))

    def put(block: s_tir.SBlock, phase: int) -> s_tir.SBlock:
        if block.name_hint != ROW:
            return block
        (store,) = every(tirx.BufferStore, block.body)
        _, channel, _, row, at = store.indices
        base = place(channel, phase) + (row - h) * axis_w.out
        at = tirx.Ramp(base + at.base, at.stride, at.lanes) if isinstance(at, tirx.Ramp) else base + at
        write = tirx.BufferStore(to, store.value, [channel - m, at])
        return s_tir.SBlock([], block.reads, [tirx.BufferRegion(to, everything)], ROW, write)

    def ask(channel: Any, phase: int, count: Any) -> tirx.Stmt:
        """Ask for the lines at both ends."""
        return tirx.Evaluate(tirx.call_extern("void", "opcompile_ends", first(channel, phase), count))

    def stream(channel: Any, phase: int, count: Any) -> tirx.Stmt:
        """Write out what was put together."""
        source = tirx.address_of(tirx.BufferLoad(to, [channel - m, place(channel, phase)]))
        call = tirx.call_extern("void", "opcompile_stretch", first(channel, phase), source, count)
        of_y = [Range.from_min_extent(tirx.const(0, i.ty.dtype), i) for i in y.shape]
        read, written = [tirx.BufferRegion(to, everything)], [tirx.BufferRegion(y, of_y)]
        block = s_tir.SBlock([], read, written, "stretch", tirx.Evaluate(call))
        return s_tir.SBlockRealize([], tirx.const(1, "bool"), block)

    def of_channels(act: Callable[[Any, int, Any], tirx.Stmt], phase: int) -> tirx.Stmt:
        """Do it for each channel of the band in a plane, as far as Y has them."""
        channel = tirx.Var("channel", kind)
        count = tirx.min(tirx.const(elements_of_stretch(spec, t), kind), (axis_h.out - h) * axis_w.out)
        _, of_group = divided(spec, t)
        more_channels, more_planes, _ = left_over(spec, t)
        tests = [
            *([tirx.floormod(m, of_group) + channel < of_group] if more_channels else []),
            *([d + phase < axis_d.out] if more_planes else []),
        ]
        body = act(m + channel, phase, count)
        body = tirx.IfThenElse(tirx.all(*tests), body, None) if tests else body
        return loop_over(channel, t.task, body)

    statements: list[tirx.Stmt] = []
    width = len(rows) // len(axis_d.phases)
    for phase in range(len(axis_d.phases)):
        of_plane = rows[phase * width : (phase + 1) * width]
        put_together = [structural_map(row, (s_tir.SBlock, partial(put, phase=phase))) for row in of_plane]
        statements += [of_channels(ask, phase), *put_together, of_channels(stream, phase)]
    return in_turn(statements)


# What LLVM needs for `in_stretches`.
FUNCTIONS = f"""
define void @opcompile_ends(ptr %y, i64 %count) alwaysinline {{
  %end = getelementptr float, ptr %y, i64 %count
  call void @llvm.prefetch.p0(ptr %y, i32 1, i32 3, i32 1)
  call void @llvm.prefetch.p0(ptr %end, i32 1, i32 3, i32 1)
  ret void
}}

define i64 @opcompile_behind_a_line(ptr %y) alwaysinline {{
  %at = ptrtoint ptr %y to i64
  %bytes = and i64 %at, {CACHE_LINE - 1}
  %elements = lshr i64 %bytes, 2
  ret i64 %elements
}}

define void @opcompile_elements(ptr %y, ptr %from, i64 %begin, i64 %end) alwaysinline {{
entry:
  br label %next
next:
  %i = phi i64 [ %begin, %entry ], [ %after, %one ]
  %more = icmp ult i64 %i, %end
  br i1 %more, label %one, label %done
one:
  %source = getelementptr float, ptr %from, i64 %i
  %place = getelementptr float, ptr %y, i64 %i
  %value = load float, ptr %source, align 4
  store float %value, ptr %place, align 4
  %after = add i64 %i, 1
  br label %next
done:
  ret void
}}

define void @opcompile_stretch(ptr %y, ptr %from, i64 %count) alwaysinline {{
entry:
  %behind = call i64 @opcompile_behind_a_line(ptr %y)
  %before = sub i64 {_A_LINE}, %behind
  %to_line = and i64 %before, {_A_LINE - 1}
  %short = icmp ult i64 %count, %to_line
  %first = select i1 %short, i64 %count, i64 %to_line
  call void @opcompile_elements(ptr %y, ptr %from, i64 0, i64 %first)
  br label %next
next:
  %i = phi i64 [ %first, %entry ], [ %after, %line ]
  %after = add i64 %i, {_A_LINE}
  %more = icmp ule i64 %after, %count
  br i1 %more, label %line, label %left
line:
  %source = getelementptr float, ptr %from, i64 %i
  %place = getelementptr float, ptr %y, i64 %i
  %value = load <{_A_LINE} x float>, ptr %source, align 4
  store <{_A_LINE} x float> %value, ptr %place, align {CACHE_LINE}, !nontemporal !{{i32 1}}
  br label %next
left:
  call void @opcompile_elements(ptr %y, ptr %from, i64 %i, i64 %count)
  ret void
}}
"""
