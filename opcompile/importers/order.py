"""The order of a graph's nodes: each behind those that it reads from.

ONNX asks for it. ONNX Runtime does not, and its own converter to float16 appends the Casts of the inputs at the end.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import onnx


def reads(node: onnx.NodeProto) -> set[str]:
    """Return what a node reads, and what the graphs inside of it read and do not define."""
    read = set(node.input)
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            of_inner = {name for n in inner.node for name in reads(n)} | {o.name for o in inner.output}
            defined = {name for n in inner.node for name in n.output}
            defined |= {v.name for v in (*inner.input, *inner.initializer)}
            read |= of_inner - defined
    return read


def order(graph: onnx.GraphProto) -> None:
    """Put the nodes into order, in place; those that are stay as they were, and so do those that have none."""
    writer = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    needed = {index: {writer[n] for n in reads(node) if n in writer} for index, node in enumerate(graph.node)}
    if all(before < index for index, befores in needed.items() for before in befores):
        return
    try:
        ordered = list(TopologicalSorter(needed).static_order())
    except CycleError:
        return  # ONNX's checker says so
    nodes = [onnx.NodeProto.FromString(graph.node[index].SerializeToString()) for index in ordered]
    del graph.node[:]
    graph.node.extend(nodes)
