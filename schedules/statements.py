"""Statements of a scheduled module: found, put in turn, with variables replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm_ffi import structural_map

# The block that adds one product to the sums of one phase.
ADDING = re.compile(r"phase_\d+_\d+_\d+_update")
# The block that adds one product to any sums: of a phase, of phases as axes, of a tap.
ADDING_ANY = re.compile(r"(phases?_\d+_\d+_\d+|tap_\d+)_update")
# What is of one phase: its sums, and the blocks that make them.
OF_PHASE = re.compile(r"phase_(\d+)_(\d+)_(\d+)")
# The block that moves the sums of one phase out of registers, where each phase has blocks of its own.
LEAVING = re.compile(r"phase_\d+_\d+_\d+_local")
# The block that writes Y, one element at a time.
WRITING = "output"
# The block that writes vectors of a row of Y, or of a position's channels.
ROW = "row"


def over_channels(
    loop: tirx.For, blocks: re.Pattern[str] = ADDING
) -> tuple[s_tir.SBlockRealize, list[tirx.For]] | None:
    """Where a loop goes through channels: the block that adds their products, and the loops of its register tile."""
    # what a turn asks for comes before what it adds
    inner, tile = loop.body.seq[-1] if isinstance(loop.body, tirx.SeqStmt) else loop.body, []
    while isinstance(inner, tirx.For) and inner.kind != tirx.ForKind.SERIAL:
        tile.append(inner)
        inner = inner.body
    adding = isinstance(inner, s_tir.SBlockRealize) and blocks.fullmatch(inner.block.name_hint)
    return (inner, tile) if loop.kind == tirx.ForKind.SERIAL and adding and tile else None


def every(kind: Any, tree: Any) -> list[Any]:
    """The nodes of a kind in ``tree``."""
    found: list[Any] = []

    def seen(node: Any) -> Any:
        found.append(node)
        return node

    structural_map(tree, (kind, seen))
    return found


def phase_of(block: s_tir.SBlock) -> list[int]:
    """The phase that a block is of, along each axis."""
    return [int(f) for f in OF_PHASE.match(block.name_hint).groups()]  # type: ignore[union-attr]


def bound(realize: s_tir.SBlockRealize) -> dict[tirx.Var, Any]:
    """The variables of a block, each with its value in the loops around."""
    return dict(zip((v.var for v in realize.block.iter_vars), realize.iter_values, strict=True))


def channel_of(copy: s_tir.SBlockRealize) -> tirx.Var:
    """The variable of the block that copies X which says of which channel."""
    return next(v.var for v in copy.block.iter_vars if v.var.name == "v_c")


def begin(loops: Sequence[tirx.For]) -> dict[tirx.Var, Any]:
    """The variables of the loops, each at 0."""
    return {loop.loop_var: tirx.const(0, loop.loop_var.ty.dtype) for loop in loops}


def in_turn(statements: list[tirx.Stmt]) -> tirx.Stmt:
    """The statements, one after the other."""
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)


def loop_over(var: tirx.Var, count: int, body: tirx.Stmt, kind: int = tirx.ForKind.SERIAL) -> tirx.For:
    """A loop of ``count`` turns, from 0 on."""
    return tirx.For(var, tirx.const(0, var.ty.dtype), tirx.const(count, var.ty.dtype), kind, body)


def with_turns(loop: tirx.For, body: tirx.Stmt) -> tirx.For:
    """The loop, each of its turns ``body``."""
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, annotations=loop.annotations)


def replaced(tree: Any, values: Mapping[tirx.Var, Any]) -> Any:
    """``tree`` with variables replaced."""
    return structural_map(tree, (tirx.Var, lambda var: values.get(var, var)))


def nest(statement: tirx.Stmt) -> tuple[list[tirx.For], tirx.Stmt]:
    """The loops of a nest, from the outermost, and what is in the innermost."""
    loops: list[tirx.For] = []
    while isinstance(statement, tirx.For):
        loops.append(statement)
        statement = statement.body
    return loops, statement


def within(loops: Sequence[tirx.For], body: tirx.Stmt) -> tirx.Stmt:
    """The nest of these loops around other statements, with variables of its own."""
    own = {loop.loop_var: tirx.Var(loop.loop_var.name, loop.loop_var.ty.dtype) for loop in loops}
    body = replaced(body, own)
    for loop in reversed(loops):
        body = tirx.For(own[loop.loop_var], loop.min, loop.extent, loop.kind, body, annotations=loop.annotations)
    return body


def with_body(
    block: s_tir.SBlock, body: tirx.Stmt, name: str = "", buffers: Sequence[tirx.Buffer] = ()
) -> s_tir.SBlock:
    """The block with other statements, and maybe another name, and more buffers."""
    return s_tir.SBlock(
        block.iter_vars,
        block.reads,
        block.writes,
        name or block.name_hint,
        body,
        block.init,
        [*block.alloc_buffers, *buffers],
        block.match_buffers,
        block.annotations,
    )


def allocating(function: tirx.PrimFunc, buffer: tirx.Buffer) -> tirx.PrimFunc:
    """The function with one buffer more."""
    root = function.body
    block = with_body(root.block, root.block.body, buffers=[buffer])
    return function.with_body(s_tir.SBlockRealize(root.iter_values, root.predicate, block))


def side_by_side(first: Any, count: int) -> tirx.Ramp:
    """The indices of ``count`` neighbours, as those of a vector."""
    return tirx.Ramp(first, tirx.const(1, first.ty.dtype), count)


def vector_of(value: Any, lane: tirx.Var, lanes: int) -> Any:
    """What ``value`` is for all lanes, as one vector; None where it needs a loop."""
    to = tirx.decl_buffer((lanes,), value.ty.dtype)
    store = tirx.BufferStore(to, value, [lane])
    loop = loop_over(lane, lanes, store, tirx.ForKind.VECTORIZED)
    module = tirx.transform.VectorizeLoop()(tvm.IRModule({"vector": tirx.PrimFunc([to], loop)}))
    body = module["vector"].body
    return body.value if isinstance(body, tirx.BufferStore) else None


def interlaced(vectors: Sequence[Any], lanes: int, first: int = 0, size: int | None = None) -> Any:
    """One vector of the first lanes of all ``vectors``, then the second, and so on: all, or ``size`` from ``first``."""
    count = len(vectors)
    elements = range(first, first + (lanes * count if size is None else size))
    order = [tirx.const(i % count * lanes + i // count, "int32") for i in elements]
    return vectors[0] if len(order) == lanes and count == 1 else tirx.Shuffle(vectors, order)
