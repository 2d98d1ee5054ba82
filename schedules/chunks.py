"""X copied by a task in chunks of its channels, each of which goes through all sums of the task before the next.

What a task reads of many channels of wide rows does not fit into the second cache, and would come from the third once
for each phase. A chunk of the channels does fit, and so do the sums of few output channels: a phase puts them down at
the end of a chunk, and takes them up again in the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import s_tir, tirx
from tvm_ffi import structural_map

from schedules.statements import bound, channel_of, every, in_turn, nest, replaced, with_turns, within

if TYPE_CHECKING:
    from schedules.tiles import Tiles


@dataclass(frozen=True, slots=True)
class _Phase:
    """A phase of a band, or a plane of taps: of each tile, zeros, a loop over chunks, and sums that leave registers."""

    tiles: Sequence[tirx.For]
    zeros: tirx.Stmt
    chunks: tirx.For
    leave: tirx.Stmt

    @classmethod
    def of(cls, statement: tirx.Stmt) -> _Phase:
        """The parts of a statement that sums a phase."""
        tiles, tile = nest(statement)
        zeros, chunks, leave = tile.seq
        return cls(tiles, zeros, chunks, leave)

    def of_chunk(self, chunk: tirx.Var) -> tirx.Stmt:
        """What one chunk adds to the sums of the phase."""
        put_down, taken_up = (structural_map(self.leave, (s_tir.SBlock, each)) for each in (_put_down, _taken_up))
        tile = [
            tirx.IfThenElse(chunk == 0, self.zeros, taken_up),
            structural_map(self.chunks.body, (s_tir.SBlock, _apart)),
            tirx.IfThenElse(chunk == self.chunks.extent - 1, self.leave, put_down),
        ]
        return within(self.tiles, replaced(in_turn(tile), {self.chunks.loop_var: chunk}))


def by_chunks(task: tirx.For, t: Tiles) -> tirx.Stmt:
    """A task that goes through its bands once for each chunk, and writes Y at the end."""
    if task.kind != tirx.ForKind.PARALLEL or not isinstance(task.body, tirx.SeqStmt):
        return task
    copy, *widening, all_bands = task.body.seq
    bands, band = nest(all_bands)
    *sums, write = band.seq
    phases = [_Phase.of(each) for each in sums]
    chunks = phases[0].chunks
    chunk = tirx.Var("chunk", chunks.loop_var.ty.dtype)
    first = chunk * t.chunk
    copying = structural_map(copy, (tirx.For, lambda loop: _copied_from(loop, first, t.chunk)))
    adding = within(bands, in_turn([phase.of_chunk(chunk) for phase in phases]))
    in_chunks = tirx.For(chunk, chunks.min, chunks.extent, tirx.ForKind.SERIAL, in_turn([copying, adding]))
    return with_turns(task, in_turn([*widening, in_chunks, within(bands, write)]))


def _copied_from(loop: tirx.For, first: Any, count: int) -> tirx.For:
    """The loop over channels that copies X, over ``count`` from ``first`` on; others as they are."""
    (copy, *_) = every(s_tir.SBlockRealize, loop)
    channel = bound(copy)[channel_of(copy)]
    if not channel.same_as(loop.loop_var):
        return loop
    of_chunk = tirx.Var(loop.loop_var.name, loop.loop_var.ty.dtype)
    body = replaced(loop.body, {loop.loop_var: first + of_chunk})
    return tirx.For(of_chunk, loop.min, tirx.const(count, of_chunk.ty.dtype), loop.kind, body)


def _put_down(block: s_tir.SBlock) -> s_tir.SBlock:
    """What moves sums out of registers, under another name: that of the last chunk alone asks for lines of Y."""
    return _block(f"{block.name_hint}_put_down", block.iter_vars, block.reads, block.writes, block.body)


def _taken_up(block: s_tir.SBlock) -> s_tir.SBlock:
    """What moves them in again."""
    memory, register = block.body.buffer, block.body.value
    back = tirx.BufferStore(register.source, tirx.BufferLoad(memory, block.body.indices), register.indices)
    return _block(f"{block.name_hint}_taken_up", block.iter_vars, block.writes, block.reads, back)


def _apart(block: s_tir.SBlock) -> s_tir.SBlock:
    """What adds products, no reduction any more: TVM would keep the sums of one outside of all its loops, in memory."""
    iter_vars = [tirx.IterVar(v.dom, v.var, tirx.IterVar.DataPar) for v in block.iter_vars]
    return _block(block.name_hint, iter_vars, block.reads, block.writes, block.body)


def _block(name: str, iter_vars: Any, reads: Any, writes: Any, body: tirx.Stmt) -> s_tir.SBlock:
    return s_tir.SBlock(iter_vars, reads, writes, name, body)
