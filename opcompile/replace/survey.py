"""A model -> its 5-D ConvTranspose nodes, each with what could be compiled for it."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.errors import ModelError
from opcompile.importers.onnx import Found, find
from opcompile.importers.outline import Shapes
from opcompile.replace.fusion import Fusion, fuse
from opcompile.replace.model import Graph, Model, Site
from opcompile.spec import ConvTranspose3d
from opcompile.verify import OWN_WEIGHTS

Array = NDArray[Any]

_UNFUSED = Fusion("")
_NAMELESS = "the model has not exactly one node that writes its output; give that a name of its own"


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One node: ``specs`` are what to compile, one for each shape of X, or the ``reason`` why there are none.

    With ``packed`` there is one, ``weight`` (canonical) and, where the spec has a bias that is known, ``bias``
    are constants, and ``fusion`` goes into these and the kernel. Otherwise the node calls ONNX Runtime's own kernel for
    every other shape, and nothing is fused, so that its result is the same in both.
    ``site`` is None for a node that cannot be edited, and then there is a reason.
    """

    name: str
    output: str
    site: Site | None
    specs: tuple[ConvTranspose3d, ...] = ()
    packed: bool = False
    weight: Array | None = None
    bias: Array | None = None
    fusion: Fusion = _UNFUSED
    reason: str | None = None


def survey(
    path: str | os.PathLike[str], shapes: Sequence[Shapes] = (), *, fused: bool = True, unfused: Collection[str] = ()
) -> tuple[Model, list[Node]]:
    """Read a model and find its nodes, in graph order; ``shapes`` are more shapes of its inputs to compile for.

    Without ``fused`` a node is compiled without what follows it; so are those whose output ``unfused`` names.
    Raises `ModelError` for a file that is no valid model, lacks a file with its data, or has no such node.
    """
    found = find(path)
    if not found:
        raise ModelError(
            f"{os.fspath(path)} has no ConvTranspose node on 5-D tensors; there is nothing to replace in it"
        )
    given = [{f.output: f for f in find(path, shapes=alternative)} for alternative in shapes]
    model = Model.read(path)
    model.require_files()
    sites = model.sites()
    nodes = []
    for f in found:
        others = [alternative[f.output] for alternative in given if f.output in alternative]
        nodes.append(_node(model, sites, f, others, fused and f.output not in unfused))
    return model, nodes


def require_nodes(path: str | os.PathLike[str], nodes: Sequence[Node], names: Collection[str]) -> None:
    """Raise `ModelError` where one of ``names`` is none of the ``nodes``."""
    there = list(dict.fromkeys(node.name for node in nodes))
    if unknown := sorted(set(names) - set(there)):
        raise ModelError(f"{os.fspath(path)} has no 5-D ConvTranspose node {unknown[0]!r}; it has: {', '.join(there)}")


def _node(model: Model, sites: dict[str, Site], found: Found, others: Sequence[Found], fused: bool) -> Node:
    site = sites.get(found.output)
    if site is None:
        return Node(found.name, found.output, None, reason=found.reason or _NAMELESS)
    specs = tuple(dict.fromkeys(f.spec for f in (found, *others) if f.spec is not None))
    if not specs:
        first = next(iter(others), found)
        return Node(found.name, found.output, site, reason=first.reason)
    if specs[0].dtype != "float32":
        reason = f"it computes in {specs[0].dtype}, and only float32 is replaced"
        if specs[0].dtype == "float16":
            reason += (
                "; export the model in float32, run `opcompile replace --mode override` on that file, and register its "
                "library with this model's session: it takes such nodes, which ONNX Runtime computes between Casts"
            )
        return Node(found.name, found.output, site, reason=reason)
    inputs = site.node.input
    weight = model.constant(inputs[1], site.graph)
    bias = model.constant(inputs[2], site.graph) if len(inputs) > 2 and inputs[2] else None
    if not all(np.isfinite(array).all() for array in (weight, bias) if array is not None):
        return Node(found.name, found.output, site, reason=OWN_WEIGHTS.reason)
    if found.spec is None or weight is None:
        return Node(found.name, found.output, site, specs, fusion=Fusion(found.output))
    spec, fusion = found.spec, Fusion(found.output)
    if fused:
        fusion, weight, bias = _fused(model, site.graph, spec, weight, bias, found.output)
    spec = replace(spec, bias=spec.bias or bias is not None, activation=fusion.activation)
    return Node(found.name, found.output, site, (spec,), True, weight, bias, fusion)


def _fused(
    model: Model, graph: Graph, spec: ConvTranspose3d, weight: Array, bias: Array | None, output: str
) -> tuple[Fusion, Array, Array | None]:
    """Return what is fused, and the weights and the bias with it.

    Nothing is that meets a bias which arrives at run time only, or that these cannot hold.
    """
    fusion = fuse(model, graph, output, spec.channels_out)
    if fusion.affine is None:
        return fusion, weight, bias
    folded = None if spec.bias and bias is None else fusion.affine.folded(weight, bias, spec.groups)
    return (Fusion(output), weight, bias) if folded is None else (fusion, *folded)
