"""A derivative's artifact -> a report: `opcompile.verify`'s questions, asked backward.

Neither TVM nor ONNX is imported: the oracle and the kernel share nothing but the description.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.bounds import EXACT_ACTIVATIONS, FORMATS, Check, judge
from opcompile.errors import EngineError, TargetError
from opcompile.gradients.bounds import Truth, judge_all
from opcompile.gradients.gradient import Gradient
from opcompile.gradients.runtime import Derivative, GradientArtifact
from opcompile.gradients.runtime_cuda import CudaGradient
from opcompile.gradients.simulate import SimulatedGradient
from opcompile.reference import activate
from opcompile.spec import at_batch
from opcompile.target import cores
from opcompile.tensors import stored
from opcompile.verify import (
    NotAsked,
    Report,
    Row,
    checkerboard,
    distinct,
    drawn_in,
    impulse,
    is_large,
    origin,
    rule_of,
    scaled,
)
from schedules.counted import counted

Tensor = NDArray[Any]
Operands = dict[str, Tensor]


# --- the operands ---


def _shapes(gradient: Gradient, batch: int) -> dict[str, tuple[int, ...]]:
    return {name: at_batch(shape, batch) for name, shape in gradient.operands.items()}


def _with_output(gradient: Gradient, drawn: Operands) -> Operands:
    """Let Y be what the activation gives, where it is an operand; what is beyond the type is its largest number."""
    if "y" not in drawn:
        return drawn
    most = FORMATS[gradient.layer.dtype].largest
    return {**drawn, "y": np.clip(activate(gradient.layer.activation, drawn["y"].astype(np.float64)), -most, most)}


def _integers(gradient: Gradient, rng: np.random.Generator, batch: int) -> Operands:
    """Integers so small, and in a long sum so many of them zero, that no sum of magnitudes reaches 2^23.

    Y is not summed: it comes from -8 .. 8 however long the sum is, beyond the kinks of relu6 and hard_sigmoid.
    """
    terms = gradient.terms(batch)
    most = max(1, min(8, math.isqrt(2**23 // terms)))
    drawn: Operands = {
        name: rng.integers(-most, most + 1, shape, np.int8) for name, shape in _shapes(gradient, batch).items()
    }
    if terms * most * most > 2**23:
        drawn["dy"] = drawn["dy"] * (rng.random(drawn["dy"].shape, np.float32) < 2**22 / terms)
    if "y" in drawn:
        drawn["y"] = rng.integers(-8, 9, drawn["y"].shape, np.int8)
    return _with_output(gradient, drawn)


def _normal(gradient: Gradient, rng: np.random.Generator, batch: int) -> Operands:
    """Draw sums of standard deviation 2."""
    number = drawn_in(gradient.layer.dtype)
    drawn: Operands = {name: rng.standard_normal(shape, number) for name, shape in _shapes(gradient, batch).items()}
    drawn["dy"] = drawn["dy"] * number(2 / math.sqrt(gradient.terms(batch)))
    return _with_output(gradient, drawn)


def _impulse(gradient: Gradient, rng: np.random.Generator, batch: int) -> Operands:
    """One element of dY alone: what lands in the wrong place is seen at once."""
    drawn = _normal(gradient, rng, batch)
    return {**drawn, "dy": impulse(drawn["dy"], rng)}


def _alternating(gradient: Gradient, rng: np.random.Generator, batch: int) -> Operands:
    """Neighbours cancel: sums far smaller than their terms, where the order of summation shows most."""
    drawn = _normal(gradient, rng, batch)
    factors: Operands = {name: np.abs(drawn[name]) for name in ("w", "x") if name in drawn}
    return {**drawn, "dy": np.abs(drawn["dy"]) * checkerboard(drawn["dy"].shape), **factors}


def _wide(gradient: Gradient, rng: np.random.Generator, batch: int) -> Operands:
    """Magnitudes far apart: sums that one of their terms decides."""
    drawn = _normal(gradient, rng, batch)
    return {**drawn, "dy": scaled(drawn["dy"], gradient.layer.dtype, rng)}


_Draw = Callable[[Gradient, np.random.Generator, int], Operands]


@dataclass(frozen=True, slots=True)
class _Question:
    name: str
    draw: _Draw
    batch: int
    exact: bool = False


def _questions(gradient: Gradient) -> tuple[str, list[_Question]]:
    """Choose the input sets by the size of the layer. Returns the rule in words, and the questions."""
    layer = gradient.layer
    main, *others = [layer.batch] if layer.batch else [2, 1, 3]
    exact = layer.activation.name in EXACT_ACTIVATIONS
    asked = [_Question("integers", _integers, main, exact), _Question("normal", _normal, main)]
    if not is_large(gradient):
        rest = {"impulse": _impulse, "alternating": _alternating, "wide": _wide}
        asked += [_Question(name, draw, main) for name, draw in rest.items()]
    asked += [_Question("integers", _integers, batch, exact) for batch in others]
    return rule_of(gradient, "derivative", "two"), asked


# --- the questions, one after the other ---


def _answers(artifact: Derivative, operands: Operands, threads: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(artifact, CudaGradient):
        yield "opcompile, on a GPU", artifact.on_host(operands)
    if isinstance(artifact, SimulatedGradient):  # it orders the threads itself
        yield "opcompile, simulated", artifact(**operands)
    if isinstance(artifact, GradientArtifact):
        given: dict[str, Any] = dict(operands)
        for count in threads:
            yield f"opcompile, {counted(count, 'thread')}", artifact(**given, threads=count)


def _ask(artifact: Derivative, question: _Question, rng: np.random.Generator, threads: Sequence[int]) -> Iterator[Row]:
    gradient = artifact.gradient
    drawn = question.draw(gradient, rng, question.batch)
    operands = {name: stored(gradient.layer.dtype, values) for name, values in drawn.items()}
    truth = Truth.of(gradient, operands)
    exact = question.exact and truth.exact(FORMATS[gradient.layer.sum_dtype])
    kept, twins = distinct(_answers(artifact, operands, threads))
    depth = artifact.depth(question.batch)
    checks = {name: judge_all(truth, answer, depth=depth, exact=exact) for name, answer in kept.items()}
    for name, twin in twins.items():
        yield Row(question.name, "caller", question.batch, name, "reference", checks[twin])


def _ask_golden(artifact: Derivative) -> tuple[Row, ...]:
    """Hold the answer against the test vector in the artifact, and the test vector against the oracle."""
    golden, gradient = artifact.golden(), artifact.gradient
    truth = Truth.of(gradient, golden.operands)
    layer, batch = gradient.layer, truth.batch
    sums, storage = FORMATS[layer.sum_dtype], FORMATS[layer.dtype]
    bound = truth.bound(sums, storage, artifact.depth(batch)).reshape(-1)[golden.indices]
    expected = truth.value.reshape(-1)[golden.indices]
    _, answer = next(_answers(artifact, golden.operands, (1,)))
    ours = np.asarray(answer).reshape(-1)[golden.indices].astype(np.float64)

    def check(values: Tensor) -> Check:
        found = judge("bound", layer.sum_dtype, values, expected, bound, min(storage.limit, sums.limit))
        place = np.unravel_index(int(golden.indices[found.index[0]]), truth.value.shape)
        return replace(found, index=tuple(int(i) for i in place))

    return (
        Row("golden.npz", "caller", batch, "opcompile", "reference", check(ours)),
        Row("golden.npz", "caller", batch, "golden.npz", "reference", check(golden.expected)),
    )


def verify(artifact: Derivative, *, seed: int = 0) -> Report:
    """Ask ``artifact`` and the oracle about the same operands, and compare; what cannot be asked is listed.

    Small integers first, to the last bit; reals, drawn and structured, under the bound of the depth that
    the artifact states; the test vector. Every question goes to it with one thread and with several,
    where these are a CPU's; with a dynamic batch, 1, 2 and 3 images are asked.
    """
    if isinstance(artifact, CudaGradient):
        artifact.require_gpu()
    started, gradient = time.perf_counter(), artifact.gradient
    rule, questions = _questions(gradient)
    threads = (1, max(2, cores())) if isinstance(artifact, GradientArtifact) else ()
    rows: list[Row] = []
    not_asked = [NotAsked("onnxruntime", "a derivative has no ONNX model; the oracle alone judges it")]
    if isinstance(artifact, SimulatedGradient):
        not_asked.insert(0, NotAsked(*artifact.simulator.instead))
    try:
        for number, question in enumerate(questions):
            rows += _ask(artifact, question, np.random.default_rng([seed, number]), threads)
        rows += _ask_golden(artifact)
    except (EngineError, TargetError) as error:
        not_asked.append(NotAsked("opcompile", str(error)))
    return Report(
        **origin(artifact.manifest, started, {}),
        spec=str(gradient),
        seed=seed,
        engines=("reference",),
        threads=threads,
        rule=rule,
        rows=tuple(rows),
        not_asked=tuple(not_asked),
    )
