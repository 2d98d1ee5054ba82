"""An ONNX model -> the same model running our kernels inside ONNX Runtime, without TVM.

Two modes. *rewrite*: the 5-D ConvTranspose nodes, with what multiplies or adds behind them and the activation, become
nodes of our own operators; weights are packed in the new file. *override*: the model file stays as it is, and
the library takes ONNX's own operator over; where no kernel was compiled for a shape it calls ONNX Runtime's.

=============  =====================================================================
`model`        the graphs of a model: who reads what, which values are constants
`survey`       which nodes there are, and what could be compiled for each
`fusion`       what follows a node and is computed with it
`affine`       what of that goes into weights and bias
`library`      kernels -> one shared library: ``ops.c``, ``ort.h`` and a table
`rewrite`      edits of a model
`sessions`     ONNX Runtime, with and without the library
`prove`        right? faster? kernels alone, and the whole model
`place`        the directory that is written
`job`          the steps, one after the other
`report`       the answers
=============  =====================================================================
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from opcompile.arguments import checked_flag, checked_list, checked_seconds, checked_seed, require_progress
from opcompile.errors import CallError
from opcompile.needed import packages_named
from opcompile.paths import checked_path

if TYPE_CHECKING:
    from opcompile.lower import PlanName
    from opcompile.replace.report import Report
    from opcompile.spec import ConvTranspose3d

Mode = Literal["rewrite", "override"]
Progress = Callable[[int, int, str | None], None]

__all__ = ["calls", "layers", "replace"]


@packages_named()
def replace(
    model: str | os.PathLike[str],
    into: str | os.PathLike[str],
    *,
    mode: Mode = "rewrite",
    target: str = "llvm",
    plan: PlanName = "best",
    shapes: Sequence[Mapping[str, Sequence[int | str]]] = (),
    nodes: Sequence[str] = (),
    everything: bool = False,
    verify: bool = True,
    measure: bool = True,
    threads: Sequence[int] = (1, 2),
    seconds: float = 0.5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Compile a model's 5-D ConvTranspose nodes into a library for ONNX Runtime; write it and the model ``into`` it.

    ``shapes`` give inputs whose sizes the model leaves open sizes to compile for, by name; every other shape
    is ONNX Runtime's. ``nodes`` chooses some by name. Every kernel runs alone inside ONNX Runtime first: one
    that is not faster there on some of ``threads``, or is slower on any, is left out, unless ``everything`` is
    asked for. Then the whole model is verified and timed against the stock one. ``verify`` and ``measure``
    turn either off; code for another machine is neither. ``seconds`` is the time for each engine and timing; what
    seems slower is timed up to three times.

    The directory is written whole or not at all; an older one of ours is replaced. What was found stands in
    the report, which is stored in the directory as well: a result that is wrong (``passed``) or slower
    (``slower``) is no exception. Raises `ModelError` for a file that is no model with such nodes,
    `ArtifactError` for a directory that holds other files, `TargetError`, `EngineError`, `CallError`.
    """
    from opcompile.replace.job import Job  # on use: it brings onnx

    if mode not in ("rewrite", "override"):
        raise CallError(f"mode is {mode!r}, but must be rewrite or override")
    _require_alternatives(shapes)
    require_progress(progress)
    job = Job(
        model=checked_path(model, "model"),
        into=checked_path(into, "into"),
        mode=mode,
        target=target,
        plan=plan,
        shapes=tuple(shapes),
        nodes=checked_list(nodes, "nodes"),
        everything=checked_flag(everything, "everything"),
        verify=checked_flag(verify, "verify"),
        measure=checked_flag(measure, "measure"),
        threads=checked_list(threads, "threads"),
        seconds=checked_seconds(seconds),
        seed=checked_seed(seed),
        progress=progress or (lambda _done, _total, _name: None),
    )
    return job.run()


@packages_named()
def layers(
    model: str | os.PathLike[str],
    *,
    shapes: Sequence[Mapping[str, Sequence[int | str]]] = (),
    nodes: Sequence[str] = (),
) -> list[ConvTranspose3d]:
    """Return what `replace` would compile of a model, each layer once: what to tune for it.

    Where what follows a node goes into its kernel, these are two: the layer with it, and the one without, which is
    tried where the first does not gain. ``shapes`` and ``nodes`` are those of `replace`. Raises `ModelError`,
    `CallError`.
    """
    from opcompile.replace.survey import require_nodes, survey  # on use: it brings onnx

    _require_alternatives(shapes)
    path, chosen = checked_path(model, "model"), checked_list(nodes, "nodes")
    found = [node for fused in (True, False) for node in survey(path, tuple(shapes), fused=fused)[1]]
    require_nodes(path, found, chosen)
    return list(dict.fromkeys(spec for node in found for spec in node.specs if not chosen or node.name in chosen))


def _require_alternatives(shapes: Sequence[Mapping[str, Sequence[int | str]]]) -> None:
    if not isinstance(shapes, Sequence) or not all(isinstance(alternative, Mapping) for alternative in shapes):
        raise CallError("shapes is a list with a mapping for each alternative, like [{'x': (1, 8, 16, 16, 16)}]")


def calls(library: str | os.PathLike[str]) -> dict[str, int]:
    """Return how often each kernel of a library was called in this process, by its spec, since it was loaded.

    ``onnxruntime`` counts the calls of ONNX Runtime's own kernel, for shapes that were not compiled. Of
    two kernels for the same layer the numbers are added. Raises `CallError` for what is no such library.
    """
    try:
        loaded = ctypes.CDLL(os.path.abspath(library))
        ask = loaded.opcompile_calls
    except (OSError, AttributeError) as error:
        raise CallError(f"{os.fspath(library)} is no library that replace has written: {error}") from error
    name, count = ctypes.c_char_p(), ctypes.c_uint64()
    found: dict[str, int] = {}
    index = 0
    while ask(index, ctypes.byref(name), ctypes.byref(count)):
        spec = (name.value or b"").decode()
        found[spec] = found.get(spec, 0) + count.value
        index += 1
    return found
