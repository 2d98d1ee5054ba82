"""What a person may call a layer -> layers: a model's file, a text, or the name of a case.

In this order: a file that exists is a model, and stands for its 3-D transposed convolutions: of a
``torch.export`` program where its name ends in ``.pt2``, of a Keras model where it ends in ``.keras``, else of
an ONNX file. A text with ``=`` is a layer's text form; the rest is looked up among the cases.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from opcompile.arguments import checked_list
from opcompile.cases import CASES, case
from opcompile.errors import CallError, ModelError, SpecError
from opcompile.spec import ConvTranspose3d

if TYPE_CHECKING:
    from opcompile.importers.outline import Shapes


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer that was asked for: a ``spec``, or the ``reason`` why the node has none.

    ``weight (C, M/g, kD, kH, kW)`` and ``bias (M,)`` are None where they are known at run time only.
    """

    name: str
    spec: ConvTranspose3d | None
    weight: NDArray[Any] | None = None
    bias: NDArray[Any] | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Where the layers came from: ``kind`` is ``model``, ``text`` or ``case``."""

    text: str
    kind: str
    layers: tuple[Layer, ...]

    @property
    def compilable(self) -> tuple[tuple[Layer, ConvTranspose3d], ...]:
        """The layers that have a spec. Raises `ModelError`, with the reasons, where none has."""
        found = tuple((layer, layer.spec) for layer in self.layers if layer.spec is not None)
        if not found:
            reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in self.layers)
            raise ModelError(f"no node of {self.text} can be compiled: {reasons}")
        return found

    @property
    def refused(self) -> tuple[Layer, ...]:
        """The nodes that have none, each with its reason."""
        return tuple(layer for layer in self.layers if layer.spec is None)

    def only(self) -> tuple[Layer, ConvTranspose3d]:
        """Return the one layer, with its spec. Raises `ModelError` where there are several, or it has none."""
        if len(self.layers) != 1:
            names = ", ".join(layer.name for layer in self.layers)
            raise ModelError(f"{self.text} has {len(self.layers)} such nodes ({names}); choose one with --node")
        return self.compilable[0]


def read(source: str | os.PathLike[str], nodes: Iterable[str] = (), shapes: Shapes | None = None) -> Source:
    """Return the layers that ``source`` stands for; of a model, those of ``nodes`` where any are named.

    ``shapes`` gives inputs of an ONNX model, by name, the sizes that the file leaves open (see `opcompile.find`).
    Raises `ModelError` for a file that is not a model with such nodes, `SpecError` for other words.
    """
    text = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(text, str):
        raise CallError(f"source is of type {type(source).__name__}, but must be a str or a path; {_SOURCES}")
    nodes = checked_list(nodes, "nodes")
    if os.path.isfile(text):
        return Source(text, "model", _of_model(text, nodes, shapes))
    folder = os.path.isdir(text)
    if not folder and (not text or text.endswith((".onnx", ".pt2", ".keras")) or (os.sep in text and "=" not in text)):
        raise ModelError(f"there is no file {text!r}; {_SOURCES}")
    for given, said in ((nodes, "a node was chosen"), (shapes, "a shape was given")):
        if given:
            raise ModelError(f"{said}, but {text!r} is not a model file; leave it out, or name an ONNX file")
    if folder and text not in {c.name for c in CASES}:
        raise ModelError(f"{text} is a directory; {_SOURCES}")
    if "=" in text:
        return Source(text, "text", (Layer("layer", ConvTranspose3d.parse(text)),))
    try:
        return Source(text, "case", (Layer(text, case(text).spec),))
    except SpecError as error:
        raise SpecError(f"{text!r} is neither a file nor a layer's text form ({_EXAMPLE}), and {error}") from None


_SOURCES = "name a model (.onnx, .pt2, .keras), a layer's text form or a case"
_EXAMPLE = "like in=1x64x12x16x32 co=64 k=3 s=2 p=1 op=1"


def _of_model(path: str, nodes: Sequence[str], shapes: Shapes | None) -> tuple[Layer, ...]:
    found = _found(path, shapes)
    if not found:
        raise ModelError(f"{path} has no 3-D transposed convolution; there is nothing to compile in it")
    unknown = sorted(set(nodes) - {layer.name for layer in found})
    if unknown:
        names = ", ".join(layer.name for layer in found)
        raise ModelError(f"{path} has no 3-D transposed convolution {unknown[0]!r}; it has: {names}")
    return tuple(layer for layer in found if not nodes or layer.name in nodes)


def _found(path: str, shapes: Shapes | None) -> list[Layer]:
    # on use: each brings its system
    if path.endswith((".pt2", ".keras")):
        if shapes:
            raise ModelError(f"a shape was given, but {path} is no ONNX model; save it with the sizes that it is for")
        from opcompile.importers import keras, torch

        inside = (torch if path.endswith(".pt2") else keras).find(path)
        layers = [(f.name, f.layer, f.reason) for f in inside]
        return [Layer(n, x.spec, x.weight, x.bias) if x else Layer(n, None, reason=why) for n, x, why in layers]
    from opcompile.importers.onnx import find

    return [Layer(f.name, f.spec, f.weight, f.bias, f.reason) for f in find(path, shapes=shapes)]


def brief(spec: ConvTranspose3d) -> str:
    """Return the shortest text that reads back as ``spec``: fields at their defaults are left out."""
    words = str(spec).split()
    smallest = str(ConvTranspose3d.parse("in=1x1x1x1x1 co=1 k=1")).split()
    kept = [w for w, default in zip(words, smallest, strict=True) if w.startswith(("in=", "co=", "k=")) or w != default]
    return " ".join(kept)
