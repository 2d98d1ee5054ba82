"""What a grid is made of, and how one case is judged: our importer and the real system get the same words.

Both compute: the shapes must agree, small integers to the last bit, real numbers within the derived bound.
Both refuse: our message must repeat the system's own words. Anything else is a failure, unless the case says
beforehand that opcompile does not compute it (then it is counted as not run, with the reason).
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from opcompile.bounds import compare
from opcompile.errors import OpcompileError, VerificationError
from opcompile.importers.imported import Imported
from opcompile.reference import reference

# So many characters in a row of a system's message must be in ours.
WORDS_IN_COMMON = 20
COMPILED = 2


@dataclass(frozen=True)
class Case:
    """One layer in a system's words.

    ``read`` gives it to our importer. ``run`` gives it to the system, with x, w and b as the system lays them
    out (``x_shape``, ``w_shape``; b is None without ``bias``). ``wordless``: the system fails without a message
    that names the rule. ``rounds``: its sums are not exact (by FFT), so integers are rounded and reals not asked.
    ``uncomputed``: why opcompile does not compute what the system does.
    """

    name: str
    read: Callable[[], Imported]
    run: Callable[..., Any]
    x_shape: Sequence[int]
    w_shape: Sequence[int]
    bias: int = 0
    dtype: str = "float32"
    wordless: bool = False
    rounds: bool = False
    uncomputed: str = ""


@dataclass
class Result:
    """What became of a suite; ``failed`` names each case that did not pass, with what was found."""

    suite: str
    system: str
    version: str
    what: str
    cases: int = 0
    passed: int = 0
    compiled: int = 0
    refused: int = 0
    not_run: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(suite: str, system: str, version: str, what: str, cases: Iterable[Case]) -> Result:
    """Judge every case; the first that pass are compiled as well, where a compiler is installed."""
    result = Result(suite, system, version, what)
    compile_it = _compiler()
    for case in cases:
        result.cases += 1
        outcome, why = judge(case)
        if outcome == "passed" and compile_it and result.compiled < COMPILED and result.cases % 7 == 1:
            result.compiled += 1
            outcome, why = compiled(case, compile_it)
        if outcome == "failed":
            result.failed.append(f"{case.name}: {why}")
        elif outcome == "not run":
            result.not_run[why] = result.not_run.get(why, 0) + 1
        else:
            setattr(result, outcome, getattr(result, outcome) + 1)
    return result


def judge(case: Case) -> tuple[str, str]:
    """Return passed, refused, not run or failed, and why."""
    ours, our_error = _attempt(case.read, OpcompileError)
    x, w, b = inputs(case, integers=True)
    theirs, their_error = _attempt(lambda: np.asarray(case.run(x, w, b)), Exception)
    if their_error is not None:
        if our_error is None:
            return "failed", f"the system refuses: {their_error}"
        if not case.wordless and not in_its_words(str(our_error), str(their_error)):
            return "failed", f"refused in other words: {our_error} / {their_error}"
        return "refused", ""
    if our_error is not None and not theirs.size:
        return "not run", "an empty output"
    if our_error is not None:
        return ("not run", case.uncomputed) if case.uncomputed else ("failed", f"only we refuse: {our_error}")
    try:
        _compare(case, ours, np.rint(theirs) if case.rounds else theirs, (x, w, b), exact=True)
        if case.rounds:
            return "passed", ""
        arrays = inputs(case, integers=False)
        _compare(case, ours, np.asarray(case.run(*arrays)), arrays, exact=False)
    except VerificationError as error:
        return "failed", str(error)
    return "passed", ""


def _attempt(call: Callable[[], Any], kind: type[Exception]) -> tuple[Any, Exception | None]:
    try:
        return call(), None
    except kind as error:
        return None, error


def _compare(case: Case, read: Imported, y: np.ndarray, arrays: Sequence[Any], *, exact: bool) -> None:
    """Hold the system's output against the oracle, in the system's own layout and in ours."""
    x, w, b = arrays
    layer = read.with_weights(w, b)
    ours = layer.to_x(x)
    expected = layer.from_y(reference(layer.spec, ours, layer.weight, layer.bias))
    if expected.shape != y.shape:
        raise VerificationError(f"shape {y.shape}, but ours is {expected.shape}")
    back = _to_spec(y, layer)
    compare(layer.spec, back, ours, layer.weight, layer.bias, exact=exact).require()


def _to_spec(y: np.ndarray, layer: Imported) -> np.ndarray:
    """The system's output in the spec's layout."""
    have = layer.y_layout if "N" in layer.y_layout else "N" + layer.y_layout
    y = y if "N" in layer.y_layout else y[None]
    return np.ascontiguousarray(y.transpose([have.index(letter) for letter in layer.spec.layout]))


def compiled(case: Case, compile_it: Callable[..., Any]) -> tuple[str, str]:
    """Let our compiled kernel answer the system's own input."""
    x, w, b = inputs(case, integers=False)
    layer = case.read().with_weights(w, b)
    artifact = compile_it(layer.spec, weight=layer.weight, bias=layer.bias)
    y = artifact(layer.to_x(x))
    check = compare(layer.spec, y, layer.to_x(x), layer.weight, layer.bias)
    if layer.from_y(y).shape != np.asarray(case.run(x, w, b)).shape:
        return "failed", "the compiled kernel gives another shape"
    return ("passed", "") if check.passed else ("failed", f"compiled: {check}")


def _compiler() -> Callable[..., Any] | None:
    try:
        import onnx  # noqa: F401  (an artifact has a model in it)
        import tvm  # noqa: F401
    except ImportError:
        return None
    import opcompile

    return opcompile.compile


def inputs(case: Case, *, integers: bool) -> tuple[Any, Any, Any]:
    """Draw x, w, b as the system lays them out."""
    rng = np.random.default_rng(len(case.name))
    shapes = [tuple(case.x_shape), tuple(case.w_shape), (case.bias,)]
    draw = (lambda s: rng.integers(-4, 5, s)) if integers else rng.standard_normal
    x, w, b = (np.asarray(draw(shape)).astype(case.dtype) for shape in shapes)
    return x, w, b if case.bias else None


def in_its_words(ours: str, theirs: str) -> bool:
    """Whether our message repeats the system's: a long stretch of it, or all of a short one."""
    a, b = (re.sub(r"\s+", " ", text).lower() for text in (ours, theirs))
    enough = min(WORDS_IN_COMMON, len(b))
    return any(b[i : i + enough] in a for i in range(len(b) - enough + 1))


def sample(seed: int, count: int, **choices: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Draw ``count`` different rows of the product of all choices, the same ones everywhere."""
    rows = list(itertools.product(*choices.values()))
    for row in random.Random(seed).sample(rows, count):  # noqa: S311 (no secret)
        yield dict(zip(choices, row, strict=True))


def described(**words: Any) -> str:
    """A case's name: the words that it is made of."""
    return " ".join(f"{key}={value}".replace(" ", "") for key, value in words.items())
