"""Is it right, and is it faster? Kernels alone inside ONNX Runtime, and the whole model, against stock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.bench import Timing, pinned_to, ratio_of, take_turns
from opcompile.bounds import Answer, Inputs, compare_all
from opcompile.engines import OURS, Engine
from opcompile.errors import EngineError
from opcompile.graph import graph
from opcompile.machine import beside_others
from opcompile.replace.library import Kernel, Operator
from opcompile.replace.report import OutputCheck, Proof, Speed
from opcompile.replace.rewrite import alone
from opcompile.replace.sessions import InputSet, Session, version
from opcompile.spec import at_batch
from opcompile.verify import input_sets

Tensor = NDArray[Any]
STOCK = "onnxruntime"

# Draws of the signs that errors may have; the largest response is taken, twice.
_DRAWS = 3
_MARGIN = 2.0

# Kinds of NumPy's types.
_NUMBERS = tuple("fiu")

# One timing in forty of two equals says slower: so many in a row must.
_TIMES = 3


# --- one kernel ---


def prove(operator: Operator, kernel: Kernel, library: Path, threads: Sequence[int], seed: int) -> tuple[Proof, ...]:
    """Ask a kernel inside ONNX Runtime, ONNX Runtime's own and the oracle the same, and compare.

    Raises `EngineError` where ONNX Runtime refuses.
    """
    spec = kernel.spec
    packing = kernel.lowered.packing if operator.packed else None
    shape = packing.shape if packing else spec.w_shape
    model = alone(spec, operator.name, operator.domain, shape).SerializeToString()
    ours = {f"{OURS}, threads: {n}": Session(model, library, n) for n in threads}
    stock = Session(graph(spec).SerializeToString())
    found = []
    for number, question in enumerate(input_sets(spec, False)[1]):
        rng = np.random.default_rng([seed, number])
        x, w, b = (values.astype(np.float32) for values in question.draw(spec, rng, question.batch))
        inputs = Inputs.of(spec, x, w, b, grains=question.grains)
        feeds = {"X": x, "W": w, "B": b}
        answers = {STOCK: Answer(stock(feeds)["Y"], "float32")}
        feeds["W"] = packing(w) if packing else w
        answers |= {name: Answer(session(feeds)["Y"], "float32") for name, session in ours.items()}
        pairs = [(name, against) for name in ours for against in ("reference", STOCK)]
        checks = compare_all(inputs, answers, question.exact, pairs)
        found += [Proof(question.name, *pair, check) for pair, check in checks.items()]
    return tuple(found)


def race(
    operator: Operator, kernel: Kernel, library: Path, threads: Sequence[int], seconds: float
) -> tuple[Speed, ...]:
    """Time one node of a kernel and one of ONNX Runtime's own in turns, weights constant, on each number of threads."""
    spec, rng = kernel.spec, np.random.default_rng(0)
    shapes = (at_batch(spec.x_shape, 1), spec.w_shape, (spec.channels_out,))
    x, w, b = (rng.standard_normal(shape, np.float32) for shape in shapes)
    packed = kernel.lowered.packing(w) if operator.packed else w
    ours = alone(spec, operator.name, operator.domain, packed.shape, W=packed, B=b)
    stock = graph(spec, weight=w, bias=b if spec.bias else None)
    models = (ours.SerializeToString(), stock.SerializeToString())
    return tuple(_race(*models, library, {"X": x}, count, seconds) for count in threads)


def _race(
    ours: Path | bytes, stock: Path | bytes, library: Path, feeds: Mapping[str, Tensor], threads: int, seconds: float
) -> Speed:
    """Take one timing; where it says slower, take it again: what is slower is so `_TIMES` times in a row."""
    with pinned_to(threads) as pinned:
        sessions = {OURS: Session(ours, library, threads), STOCK: Session(stock, None, threads)}
        # either both write into what they have written, or neither
        again = [session.writes_again(feeds) for session in sessions.values()]
        engines = {
            name: Engine(version(), session.runner(feeds, all(again)), lambda: np.empty(0), "float32")
            for name, session in sessions.items()
        }
        for _ in range(_TIMES):
            (after, before), others = beside_others(pinned, lambda: take_turns(engines, seconds))
            speed = _speed(before, after, threads, others)
            if speed.verdict != "slower":
                break
    return speed


def _speed(before: Timing, after: Timing, threads: int, others: float) -> Speed:
    times = round(before.median_us, 3), round(after.median_us, 3)
    return Speed(threads, *times, ratio_of(after, before), round(others, 3))


# --- the whole model ---


class NotDeterministicError(EngineError):
    """A model of which two runs on the same input share no output: nothing can be held against it."""


def compare_models(
    stock: Path,
    replaced: Path,
    library: Path,
    spread: Path,
    sets: Sequence[InputSet],
    threads: Sequence[int],
) -> tuple[OutputCheck, ...]:
    """Hold the outputs of two models against each other; ``spread`` is the stock one, perturbed (see `rewrite`).

    The bound of an output is twice the largest response to three perturbations, each as large as the
    derived bounds of the replaced nodes. Where none reaches an output it must be equal to the bit; one that
    changes from run to run has an infinite bound.
    Raises `EngineError` where ONNX Runtime refuses, `NotDeterministicError`.
    """
    perturbed, one = Session(spread), Session(stock)
    bounds = []
    for inputs in sets:
        exact, again = one(inputs.feeds), one(inputs.feeds)
        changed = [name for name, y in exact.items() if _distance(again[name], y)]
        if len(changed) == len(exact):
            raise NotDeterministicError(
                "not judged: the model is not deterministic: every output of stock ONNX Runtime changes from run to "
                "run on the same input"
            )
        moved = [perturbed(inputs.feeds) for _ in range(_DRAWS)]
        bound = {name: _MARGIN * max(_distance(other[name], y) for other in moved) for name, y in exact.items()}
        bounds.append({**bound, **dict.fromkeys(changed, math.inf)})
    checks = []
    for count in threads:
        # on as many threads: ONNX Runtime's Conv may add up in another order on two
        right, ours = Session(stock, None, count), Session(replaced, library, count)
        for inputs, bound in zip(sets, bounds, strict=True):
            answers = ours(inputs.feeds)
            for name, y in right(inputs.feeds).items():
                largest = float(np.abs(y.astype(np.float64)).max(initial=0.0)) if y.dtype.kind in _NUMBERS else 1.0
                checks.append(OutputCheck(inputs.name, name, count, _distance(answers[name], y), bound[name], largest))
    return tuple(checks)


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two outputs; infinity where they do not compare."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    if one.dtype.kind not in (*_NUMBERS, "b"):
        return 0.0 if np.array_equal(one, other) else float("inf")
    a, b = one.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0))


def race_models(
    stock: Path, replaced: Path, library: Path, feeds: Mapping[str, Tensor], threads: Sequence[int], seconds: float
) -> tuple[Speed, ...]:
    """Time two models in turns, on each number of threads."""
    return tuple(_race(replaced, stock, library, feeds, count, seconds) for count in threads)
