"""An artifact -> a report: what was asked, what was answered, and what could not be asked and why.

First small integers, whose sums are exact in any order: a result that differs in one bit is wrong.
Then real numbers, where every element must keep within its own bound. ONNX Runtime is asked the same,
of the model that lies beside the kernel, and its answers are held against the oracle and against ours.
Neither TVM nor ONNX is imported: the oracle, the kernel and the model share nothing but the spec.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opcompile.arguments import checked_engines, checked_seed
from opcompile.bounds import (
    FORMATS,
    SUMS,
    Answer,
    Check,
    Inputs,
    bounds,
    compare,
    compare_all,
    compare_at,
    judge_nan,
    rounded,
    sums_of,
)
from opcompile.errors import ArtifactError, CallError, EngineError, TargetError, VerificationError, first_line
from opcompile.manifest import own_weights
from opcompile.needed import packages_named
from opcompile.packing import Packing
from opcompile.reference import reference
from opcompile.runtime_cuda import CudaArtifact
from opcompile.simulate import Simulated
from opcompile.spec import ConvTranspose3d, at_batch
from opcompile.target import cores
from opcompile.tensors import sizes_text, stored
from schedules.counted import counted

if TYPE_CHECKING:
    from rich.table import Table

    from opcompile.gradients.gradient import Gradient
    from opcompile.gradients.runtime import Derivative
    from opcompile.runtime import Artifact

__all__ = ["InputSet", "NotAsked", "Report", "Row", "bounds", "compare", "input_sets", "verify"]

Tensor = NDArray[Any]

ENGINES = ("reference", "onnxruntime")

# Above either of these, three input sets are asked, and otherwise all: the oracle takes seconds there.
_LARGE_FLOPS = 2**28
_LARGE_BYTES = 2**22


# --- the report ---


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: ``answer`` (of which engine, how it was called) held against another, on one input set.

    ``weights`` says whose: the ``caller``'s, or those ``compiled`` in.
    """

    inputs: str
    weights: str
    batch: int
    answer: str
    against: str
    check: Check


@dataclass(frozen=True, slots=True)
class NotAsked:
    """What could not be asked, and why."""

    what: str
    reason: str


OWN_WEIGHTS = NotAsked(
    "opcompile with the weights compiled in", "its weights hold infinities or NaN, for which there is no bound"
)


@dataclass(frozen=True, slots=True)
class Report:
    """All comparisons of one artifact, with the origin of every number.

    ``engines`` are those that were to be asked, ``threads`` the thread counts of the calls, ``rule`` says
    which input sets were chosen; ``date`` is in UTC.
    """

    spec: str
    target: str
    seed: int
    date: str
    machine: str
    versions: dict[str, str]
    engines: tuple[str, ...]
    threads: tuple[int, ...]
    rule: str
    elapsed_s: float
    rows: tuple[Row, ...]
    not_asked: tuple[NotAsked, ...]

    @property
    def failures(self) -> tuple[Row, ...]:
        """The comparisons that failed; one of which nothing could be judged has not."""
        return tuple(row for row in self.rows if row.check.failures)

    @property
    def passed(self) -> bool:
        """Whether answers of the artifact could be judged, with its own weights where it has any, and none failed."""
        return not self.failures and self.unverified is None

    @property
    def unverified(self) -> str | None:
        """Why nothing is known of the artifact as it is called; None where it was asked so."""
        return OWN_WEIGHTS.reason if OWN_WEIGHTS in self.not_asked else self.unanswered or self._unjudged

    @property
    def unanswered(self) -> str | None:
        """Why the artifact gave no answer at all; None where it gave one."""
        if any(row.answer.startswith("opcompile") for row in self.rows):
            return None
        return "; ".join(n.reason for n in self.not_asked if n.what == "opcompile")

    @property
    def _unjudged(self) -> str | None:
        """Whose weights gave no answer that could be judged; None where all did. Of NaN, no number was."""
        ours = [row for row in self.rows if row.answer.startswith("opcompile") and row.check.criterion != "NaN"]
        judged = {row.weights for row in ours if row.check.judged}
        kinds = [kind for kind in _WEIGHTS if kind in {row.weights for row in ours} - judged]
        return f"no answer with the {kinds[0]} weights can be judged: every sum may overflow" if kinds else None

    def require(self) -> Report:
        """Return self. Raises `VerificationError`, with the first comparison that failed, unless all passed."""
        if self.failures:
            row = self.failures[0]
            raise VerificationError(
                f"{len(self.failures)} of {len(self.rows)} comparisons failed for {self.spec}; the first: {row.answer} "
                f"against {row.against} on {row.inputs} (batch {row.batch}, {row.weights} weights): {row.check}"
            )
        if not self.passed:
            raise VerificationError(f"nothing was verified of {self.spec} as it is called: {self.unverified}")
        return self

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, strings and numbers; the verdict is ``passed``."""
        rows = [{**asdict(row), "check": row.check.to_json()} for row in self.rows]
        fields = {**asdict(self), "rows": rows, "not_asked": [asdict(n) for n in self.not_asked]}
        return {
            "passed": self.passed,
            "unverified": self.unverified,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()},
        }

    def table(self) -> Table:
        """Return the comparisons as a table for a terminal, with what could not be asked below it.

        Answers of ours that are equal to the bit share a line; how they were called is said once, where
        it is the same for every input set.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        lines: dict[tuple[str, str, str, str, str, str], list[str]] = {}
        checks: dict[tuple[str, str, str, str, str, str], Check] = {}
        for row in self.rows:
            engine, _, call = row.answer.partition(", ")
            line = (row.inputs, row.weights, str(row.batch), engine, row.against, repr(row.check))
            lines.setdefault(line, []).append(call)
            checks[line] = row.check
        calls = [", ".join(filter(None, found)) for found in lines.values()]
        usual = {kind: _most_frequent(lines, calls, kind) for kind in _WEIGHTS}
        batches, weights = ({getattr(row, name) for row in self.rows} for name in ("batch", "weights"))
        versions = ", ".join(f"{name} {version}" for name, version in sorted(self.versions.items()))
        notes = [f"{w} weights, each line: {c}; answers equal to the bit" for w, c in usual.items() if c]
        if any(row.check.criterion == "exact sums" for row in self.rows):
            notes.append("* these sums are exact, and the activation alone may err")
        if any(row.check.criterion == "bits" for row in self.rows):
            notes.append("bits: the answers must be equal to the last bit, and no bound is granted")
        if any(row.check.criterion == "NaN" for row in self.rows):
            notes.append("NaN: what reads NaN or infinity must be what it makes of it, and nothing else")
        if not all(row.check.judged for row in self.rows):
            notes.append("not judged: every sum may overflow, or has too many terms, and then any answer may be right")
        notes += [f"not asked: {n.what}: {n.reason}" for n in self.not_asked]
        notes += [f"{self.rule}; seed {self.seed}, {self.date}, {self.elapsed_s:.1f} s", f"{self.machine}; {versions}"]
        table = Table(
            title=Text(f"{self.spec}\non {self.target}"),
            title_justify="left",
            caption=Text("\n".join(notes)),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        # what is the same on every line needs no column
        shown = (True, len(weights) > 1, len(batches) > 1, True, True)
        for heading in compress(("inputs", "weights", "batch", "answer", "against"), shown):
            table.add_column(heading, overflow="fold")
        table.add_column("error", justify="right", no_wrap=True)
        table.add_column("of bound", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for (words, check), called in zip(checks.items(), calls, strict=True):
            inputs, kind, batch, engine, against, _ = words
            answer = f"{engine}: {called}" if called and called != usual[kind] else engine
            criterion = check.criterion if check.criterion in ("bits", "NaN") else f"{check.worst:.1%}"
            criterion += "*" if check.criterion == "exact sums" else ""
            verdict = "[green]pass[/]" if check.passed else f"[red]FAIL ({check.failures} of {check.elements})[/]"
            verdict = verdict if check.judged else "[yellow]not judged[/]"
            error = f"{check.largest_error:.2e}" if check.largest_error else "0"
            table.add_row(*compress((inputs, kind, batch, answer, against), shown), error, criterion, verdict)
        return table


_WEIGHTS = ("caller", "compiled")


def _most_frequent(lines: Iterable[tuple[str, ...]], calls: Iterable[str], kind: str) -> str:
    """Return how most lines with weights of ``kind`` were called; those of other engines are empty."""
    found = Counter(call for line, call in zip(lines, calls, strict=True) if line[1] == kind and call)
    return next((call for call, _ in found.most_common(1)), "")


# --- the inputs ---


@dataclass(frozen=True, slots=True)
class InputSet:
    """One input set: how to draw it, at which batch, and whether with the weights compiled in.

    What is ``exact`` has multiples of ``grains``, powers of two, in X and W. What is asked ``alone`` is not put to
    ONNX Runtime.
    """

    name: str
    draw: Callable[[ConvTranspose3d, np.random.Generator, int], tuple[Tensor, Tensor, Tensor]]
    batch: int
    compiled: bool = False
    exact: bool = False
    grains: tuple[float, float] = (1.0, 1.0)
    alone: bool = False


def _shapes(spec: ConvTranspose3d, batch: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return at_batch(spec.x_shape, batch), spec.w_shape, (spec.channels_out,)


def drawn_in(dtype: str) -> type[np.float32 | np.float64]:
    """Return what numbers for a layer of ``dtype`` are drawn in: one that has all its digits."""
    return np.float64 if dtype == "float64" else np.float32


def _largest_integer(spec: ConvTranspose3d) -> int:
    """Return the largest a such that terms * a^2 + a stays below 2^24: no float32 sum can round. At most 8."""
    return next((a for a in range(8, 0, -1) if spec.terms * a * a + a < 2**24), 0)


# Of X and W in the integers: sums of halves meet the kinks of every activation, and ±1/2, where hard_shrink jumps.
_HALVES = (1.0, 0.5)


def _integers(spec: ConvTranspose3d, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    most = _largest_integer(spec)
    x, w, b = (rng.integers(-most, most + 1, shape, np.int8) for shape in _shapes(spec, batch))
    return x, w * np.float32(0.5), b * np.float32(0.5)


def _ones(spec: ConvTranspose3d, _: np.random.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Y counts the products of each output: a product too many or too few shows where it is."""
    x, w, b = (np.ones(shape, np.int8) for shape in _shapes(spec, batch))
    return x, w, b


def _normal(spec: ConvTranspose3d, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw sums of standard deviation 2, so that activations are asked where they bend."""
    x, w, b = (rng.standard_normal(shape, drawn_in(spec.dtype)) for shape in _shapes(spec, batch))
    # no product at all where the pads leave nothing of an axis but zeros
    return x, w * x.dtype.type(2 / math.sqrt(max(1, spec.terms))), b


def _impulse(spec: ConvTranspose3d, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Y is the kernel, once: what lands in the wrong place is seen at once."""
    x, w, b = _normal(spec, rng, batch)
    return impulse(x, rng), w, b


def impulse(like: Tensor, rng: np.random.Generator) -> Tensor:
    """Return zeros and, anywhere, a single one."""
    drawn = np.zeros_like(like)
    drawn.reshape(-1)[rng.integers(drawn.size)] = 1
    return drawn


def _alternating(spec: ConvTranspose3d, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbours cancel: sums far smaller than their terms, where the order of summation shows most."""
    x, w, b = _normal(spec, rng, batch)
    return checkerboard(x.shape), np.abs(w), b


def checkerboard(shape: tuple[int, ...]) -> Tensor:
    """Return 1 and -1 in turns, along every axis."""
    parity = np.zeros((), np.int64)
    for size in shape:
        parity = parity[..., None] + np.arange(size)
    signs: Tensor = 1 - 2 * (parity % 2)
    return signs


def _wide(spec: ConvTranspose3d, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes far apart: sums that one of their terms decides."""
    x, w, b = _normal(spec, rng, batch)
    return scaled(x, spec.dtype, rng), w, b


def scaled(values: Tensor, dtype: str, rng: np.random.Generator) -> Tensor:
    """Multiply each value by any of 2^-20 .. 2^20 (2^-6 .. 2^6 in float16, whose largest number is 65504)."""
    most = 6 if dtype == "float16" else 20
    drawn: Tensor = np.ldexp(values, rng.integers(-most, most + 1, values.shape, np.int32))
    return drawn


def _tiny(spec: ConvTranspose3d, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """X about the smallest normal number of the format: half of it is subnormal.

    Only float16 must be kept. Others may be flushed: their Y may be 0, but nothing larger than what X can give.
    """
    x, w, b = _normal(spec, rng, batch)
    smallest = {"float16": 2.0**-14, "float64": 2.0**-1022}.get(spec.dtype, 2.0**-126)
    return x * x.dtype.type(smallest), w, b * 0


def _apart(spec: ConvTranspose3d, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """Choose elements of X of which no output reads two: a mask, and of each channel when its first turn is.

    Along each axis they are farther apart than the kernel reaches, and there the channels of a group take turns.
    """
    steps = [(axis.kernel - 1) * axis.dilation // axis.stride + 1 for axis in spec.axes]
    along = [np.arange(rng.integers(min(step, a.size)), a.size, step) for step, a in zip(steps, spec.axes, strict=True)]
    image, d, h, w = np.ix_(np.arange(batch), *along)
    turns = np.arange(batch * math.prod(map(len, along))).reshape(batch, *map(len, along))
    order = rng.permutation(spec.c_in)
    chosen = np.zeros((batch, spec.groups, spec.c_in, *(axis.size for axis in spec.axes)), bool)
    chosen[image, :, order[turns % spec.c_in], d, h, w] = True
    x = chosen.reshape(batch, spec.channels_in, *chosen.shape[3:])
    x = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if spec.layout == "NDHWC" else x
    return x, np.tile(np.argsort(order), spec.groups)


def _digits(spec: ConvTranspose3d, sums: str, batch: int) -> InputSet:
    """Let each output be one product, of as many digits as the sum has, and a bias: exact, however deep the layer.

    A channel splits the digits between X and W in halves, or gives all but two to X, or all but two to W; what the
    format of the factors lacks is left away. Sums are below 4, so that activations are asked where they bend.
    """
    factors = SUMS[sums].factors or FORMATS[spec.dtype]
    most = min(factors.precision, FORMATS[spec.dtype].precision)
    digits = min(SUMS[sums].precision, 2 * most)
    half = digits // 2
    grains = 2.0 ** (1 - half), 2.0 ** (1 - digits + half)

    def draw(spec: ConvTranspose3d, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen, turn = _apart(spec, rng, batch)
        of_x = np.array([half, digits - 2, 2])[turn % 3]
        number = drawn_in(spec.dtype)
        x, w, b = (2 * rng.random(shape, number) - 1 for shape in _shapes(spec, batch))
        scale_x, scale_w = (np.exp2(np.minimum(n, most)).astype(number) for n in (of_x, digits - of_x))
        scale_x = scale_x if spec.layout == "NDHWC" else scale_x.reshape(-1, 1, 1, 1)
        x = np.trunc(x * scale_x) * (chosen * number(grains[0]))
        w = np.trunc(w * scale_w.reshape(-1, 1, 1, 1, 1)) * number(grains[1])
        return x, w, np.trunc(b * number(2**half)) * number(grains[0] * grains[1])

    return InputSet("digits", draw, batch, exact=True, grains=grains, alone=spec.dtype == "float64")


def _scattered(spec: ConvTranspose3d, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each output is one product, of any magnitude: far below where activations bend, and far beyond.

    In float16 the largest are infinite. No sum of float32 or float64 may overflow.
    """
    of_x, of_w = {"float16": (4, 13), "float64": (500, 500)}.get(spec.dtype, (62, 62))
    x, _ = _apart(spec, rng, batch)
    # few elements of X are chosen: evenly, so that they cover the range as well
    evenly = rng.permutation(np.count_nonzero(x)) + 0.5
    x = x.astype(np.float64)
    x[x > 0] = np.exp2((2 * evenly / evenly.size - 1) * of_x)
    _, *shapes = _shapes(spec, batch)
    w, b = (np.exp2(rng.uniform(-of_w, of_w, shape)) for shape in shapes)
    return x, w * rng.choice([-1, 1], w.shape), b * 0


def is_large(work: ConvTranspose3d | Gradient) -> bool:
    """Whether a layer is asked three input sets only, and a derivative two."""
    return work.flops > _LARGE_FLOPS or work.bytes() > _LARGE_BYTES


def rule_of(work: ConvTranspose3d | Gradient, what: str, few: str) -> str:
    """Say which input sets ``work`` is asked, and why: ``what`` it is, and how ``few`` where it is large."""
    if not is_large(work):
        return "all input sets"
    size = f"{_LARGE_FLOPS // 10**6} MFLOP or {_LARGE_BYTES >> 20} MiB"
    return f"{few} input sets, because the {what} is larger than {size}"


# Images of the digits, where the batch is open: more than any other input set has.
_MANY = 5


def input_sets(spec: ConvTranspose3d, compiled: bool, sums: str | None = None) -> tuple[str, list[InputSet]]:
    """Choose the input sets by the size of the layer, and by what its kernel ``sums`` in, of `SUMS`.

    Returns the rule in words, and the questions.
    """
    large = is_large(spec)
    main, *others = [spec.batch] if spec.batch else [2, 1, 3]
    float64 = spec.dtype == "float64"  # which ONNX Runtime computes in float32
    integers = [("integers", _integers)] if _largest_integer(spec) else []
    asked = [InputSet(name, draw, main, exact=True, grains=_HALVES) for name, draw in integers]
    asked.append(_digits(spec, sums or spec.sum_dtype, spec.batch or _MANY))
    if large:
        asked.append(InputSet("normal", _normal, main, compiled))
    else:
        asked += [InputSet("ones", _ones, main, exact=True)] if integers else []
        reals = {"normal": _normal, "impulse": _impulse, "alternating": _alternating, "wide": _wide, "tiny": _tiny}
        asked += [InputSet(name, draw, main) for name, draw in reals.items()]
        asked.append(InputSet("scattered", _scattered, main, alone=float64))
        asked += [InputSet(name, reals[name], main, True) for name in ("normal", "impulse") if compiled]
    for batch in others:
        asked += [InputSet(name, draw, batch, exact=True, grains=_HALVES) for name, draw in integers]
        asked += [] if large else [InputSet("normal", _normal, batch, compiled)]
    return rule_of(spec, "layer", "three"), asked


# --- those who are asked ---


def _compiled_in(artifact: Artifact | CudaArtifact | Simulated) -> tuple[Tensor | None, Tensor | None]:
    """Return the canonical W and B that the artifact holds, each or None, out of its own packed file."""
    spec, arrays = artifact.spec, own_weights(artifact.directory, artifact.manifest)
    if spec.dtype == "bfloat16":
        arrays = {name: bits.view(stored("bfloat16", np.zeros(0)).dtype) for name, bits in arrays.items()}
    w = _unpacked(artifact.packing, arrays["W"], spec.w_shape) if "W" in arrays else None
    return w, arrays.get("B")


def _unpacked(packing: Packing, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    view = packed.transpose(np.argsort(packing.order))
    return np.ascontiguousarray(view.reshape(packing.padded)[tuple(slice(n) for n in shape)])


class _OnnxRuntime:
    """ONNX Runtime on the CPU, running one model. Raises `EngineError` with its own words where it cannot."""

    # ONNX's numbers for the element types; bfloat16 goes in and out as its bits
    _ELEMENT_TYPES = {"float32": 1, "float16": 10, "float64": 11, "bfloat16": 16}  # noqa: RUF012

    def __init__(self, model: Path, spec: ConvTranspose3d) -> None:
        try:
            import onnxruntime
            from onnxruntime.capi import onnxruntime_pybind11_state as state
        except ImportError as error:
            raise EngineError(f"the package onnxruntime is not installed ({error})") from error
        if not model.exists():
            raise EngineError(f"the artifact has no {model.name}")
        self.version: str = onnxruntime.__version__
        names = ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented")
        self._refusals = (*(getattr(state, name) for name in names), state.RuntimeException, RuntimeError, ValueError)
        self._spec, self._value = spec, onnxruntime.OrtValue
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            # its text, for ONNX Runtime takes no path that is not UTF-8
            self._session = onnxruntime.InferenceSession(
                model.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        except self._refusals as error:
            raise EngineError(first_line(error)) from error
        given = {each.name: each.shape for each in self._session.get_inputs()}
        self.inputs = tuple(given)
        wanted = [size if isinstance(size, int) else None for size in given.get("X", ())]
        if wanted != list(spec.x_shape):
            raise ArtifactError(
                f"{model.name} is of another layer: its X is {sizes_text(wanted)}, and this layer's "
                f"{sizes_text(spec.x_shape)}; compile the layer again"
            )

    def __call__(self, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        """Return Y in the spec's dtype."""
        y = np.empty(at_batch(self._spec.y_shape, x.shape[0]), x.dtype)
        binding = self._session.io_binding()
        try:
            for name, array in (("X", x), ("W", w), ("B", b)):
                if name in self.inputs:
                    binding.bind_ortvalue_input(name, self._wrapped(array))
            binding.bind_ortvalue_output("Y", self._wrapped(y))
            self._session.run_with_iobinding(binding)
        except self._refusals as error:
            raise EngineError(first_line(error)) from error
        return y

    def _wrapped(self, array: Tensor | None) -> Any:
        if array is None:
            raise EngineError("its model asks for weights that were compiled in")
        bits = array.view(np.uint16) if self._spec.dtype == "bfloat16" else array
        return self._value.ortvalue_from_numpy_with_onnx_type(bits, self._ELEMENT_TYPES[self._spec.dtype])


# --- the questions, one after the other ---


def here() -> str:
    """Name this machine, for a report."""
    return f"{platform.machine()} {platform.system()}, {counted(cores(), 'CPU')}, Python {platform.python_version()}"


def origin(manifest: Mapping[str, Any], started: float, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a report that say where and when an artifact was asked, and by what besides it."""
    return {
        "target": str(manifest["target"]["name"]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": here(),
        "versions": {**{k: str(v) for k, v in manifest["versions"].items()}, "numpy": np.__version__, **versions},
        "elapsed_s": round(time.perf_counter() - started, 3),
    }


def _ours(
    artifact: Artifact | CudaArtifact | Simulated,
    x: Tensor,
    passed: tuple[Tensor | None, Tensor | None],
    threads: Sequence[int],
) -> Iterator[tuple[str, Tensor]]:
    """Call the artifact with one thread, and with several; there with weights that were packed before."""
    w, b = passed
    if isinstance(artifact, Simulated):  # it orders the threads itself
        yield "opcompile, simulated", artifact(x, w, b)
        return
    if isinstance(artifact, CudaArtifact):
        yield "opcompile, on a GPU", artifact.on_host(x, w, b)
        return
    for count in threads:
        call = counted(count, "thread")
        if w is None or count == 1:
            yield f"opcompile, {call}", artifact(x, w, b, threads=count)
        else:
            yield f"opcompile, {call}, packed weights", artifact(x, artifact.pack(w), b, threads=count)


def distinct(answers: Iterator[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Keep answers that differ; of each other one, its twin: what is equal to the bit need not be judged twice."""
    kept: dict[str, Tensor] = {}
    twins: dict[str, str] = {}
    for name, y in answers:
        equal = (other for other, kept_y in kept.items() if np.array_equal(y, kept_y))
        twins[name] = next(equal, name)
        if twins[name] == name:
            kept[name] = y
    return kept, twins


@dataclass(frozen=True, slots=True)
class _Asked:
    """What came of one question: rows, what was not asked, and whether ONNX Runtime goes on being asked."""

    rows: tuple[Row, ...]
    not_asked: tuple[NotAsked, ...]
    runtime: _OnnxRuntime | None


def _ask(
    artifact: Artifact | CudaArtifact | Simulated,
    question: InputSet,
    own: tuple[Tensor | None, Tensor | None],
    runtime: _OnnxRuntime | None,
    rng: np.random.Generator,
    threads: Sequence[int],
) -> _Asked:
    spec = artifact.spec
    x, w, b = (stored(spec.dtype, values) for values in question.draw(spec, rng, question.batch))
    passed: tuple[Tensor | None, Tensor | None] = (w, b if spec.bias else None)
    if question.compiled:
        passed = (None if own[0] is not None else w, None if own[1] is not None else passed[1])
        w, b = (mine if mine is not None else drawn for mine, drawn in zip(own, (w, b), strict=True))
    inputs = Inputs.of(spec, x, w, b, grains=question.grains)
    kept, twins = distinct(_ours(artifact, inputs.x, passed, threads))
    answers = {name: Answer(y, sums_of(artifact.manifest)) for name, y in kept.items()}
    pairs = [(name, "reference") for name in twins]
    not_asked: list[NotAsked] = []
    if question.alone:
        pass
    elif runtime is not None and not question.compiled and any(mine is not None for mine in own):
        not_asked.append(NotAsked("onnxruntime with the caller's weights", "model.onnx holds the weights compiled in"))
    elif runtime is not None:
        try:
            answers["onnxruntime"] = Answer(runtime(inputs.x, inputs.w, inputs.b), computed_in="float32")
            pairs += [("onnxruntime", "reference"), *((name, "onnxruntime") for name in twins)]
        except EngineError as error:
            not_asked.append(NotAsked("onnxruntime", str(error)))
            runtime = None
    checks = compare_all(inputs, answers, question.exact, [(twins.get(one, one), other) for one, other in pairs])
    weights = "compiled" if question.compiled else "caller"
    rows = (
        Row(question.name, weights, question.batch, one, other, checks[twins.get(one, one), other])
        for one, other in pairs
    )
    return _Asked(tuple(rows), tuple(not_asked), runtime)


# What X holds besides numbers.
_BEYOND_NUMBERS = {"NaN": [np.nan], "infinities": [np.inf, -np.inf]}


def _ask_beyond_numbers(
    artifact: Artifact | CudaArtifact | Simulated, rng: np.random.Generator, threads: Sequence[int]
) -> Iterator[Row]:
    """Let one element of X be NaN, or two infinite: what becomes NaN and infinite by them must, and nothing else."""
    spec, batch = artifact.spec, artifact.spec.batch or 2
    computed_in = sums_of(artifact.manifest) or spec.sum_dtype
    for inputs, values in _BEYOND_NUMBERS.items():
        x, w, b = (stored(spec.dtype, drawn) for drawn in _normal(spec, rng, batch))
        x.reshape(-1)[rng.integers(x.size, size=len(values))] = values
        expected = rounded(spec.dtype, reference(spec, x, w, b))
        for name, y in _ours(artifact, x, (w, b if spec.bias else None), threads):
            yield Row(
                inputs, "caller", batch, name, "reference", judge_nan(computed_in, y.astype(np.float64), expected)
            )


def ask_golden(
    artifact: Artifact | CudaArtifact | Simulated, own: tuple[Tensor | None, Tensor | None]
) -> tuple[Row, ...]:
    """Hold the answer to the test vector in the artifact, and the vector itself, against the oracle.

    ``own`` are the canonical W and B that the artifact holds, each or None. Raises as a call.
    """
    golden = artifact.golden()
    w, b = (mine if given is None else given for mine, given in zip(own, (golden.w, golden.b), strict=True))
    call = artifact.on_host if isinstance(artifact, CudaArtifact) else artifact
    y = np.asarray(call(golden.x, golden.w, golden.b)).reshape(-1)[golden.indices]
    inputs = Inputs.of(artifact.spec, golden.x, w, b)
    weights, batch = "compiled" if golden.w is None else "caller", inputs.batch
    ours, vector = compare_at(inputs, golden.indices, [Answer(y, sums_of(artifact.manifest)), Answer(golden.expected)])
    return (
        Row("golden.npz", weights, batch, "opcompile", "reference", ours),
        Row("golden.npz", weights, batch, "golden.npz", "reference", vector),
    )


def _require_arguments(artifact: object, engines: Sequence[str]) -> None:
    """Raise `CallError` for what is no question to `verify`."""
    if not engines:
        raise CallError(f"engines are none, but must be some of {', '.join(ENGINES)}")
    if isinstance(artifact, (str, os.PathLike)):
        raise CallError(f"{os.fspath(artifact)!r} is a path; load the artifact there by opcompile.load first")
    if not hasattr(artifact, "manifest"):
        raise CallError(f"a {type(artifact).__name__} cannot be verified; opcompile.compile and load give what can")


def _unanswerable(spec: ConvTranspose3d, finite: bool) -> Iterator[NotAsked]:
    """Yield what nobody is asked, for there is no right answer."""
    if not finite:
        yield OWN_WEIGHTS
    if not _largest_integer(spec):
        yield NotAsked("integers", f"{spec.terms} products in one sum are too many to be exact in float32")


@packages_named()
def verify(
    artifact: Artifact | CudaArtifact | Simulated | Derivative, *, seed: int = 0, engines: Iterable[str] = ENGINES
) -> Report:
    """Ask ``artifact`` and ``engines`` about the same inputs, and compare.

    Order: small integers, to the last bit (or, for activations that are no selection, without any error of
    the sums), and numbers of many digits as well; reals under the bound, drawn and structured; NaN and infinities in
    X; the test vector in the artifact. Every question goes to the artifact with one thread and with several; with a
    dynamic batch, 1, 2, 3 and 5 images are asked.
    ``reference`` is the oracle; without it, answers are held only against each other.
    A derivative is asked the same way, and held against the oracle alone. Raises `CallError` for an engine
    it does not know; what cannot be asked is listed in the report.
    """
    seed, engines = checked_seed(seed), checked_engines(engines, "engines", ENGINES)
    _require_arguments(artifact, engines)
    from opcompile.gradients.runtime import Derivative  # on use: it is built on what is here
    from opcompile.gradients.verify import verify as verify_gradient

    if isinstance(artifact, Derivative):
        return verify_gradient(artifact, seed=seed)
    if isinstance(artifact, CudaArtifact):
        artifact.require_gpu()
    started, spec = time.perf_counter(), artifact.spec
    own = _compiled_in(artifact)
    known = [mine for mine in own if mine is not None]
    finite = all(np.isfinite(mine).all() for mine in known)
    rule, questions = input_sets(spec, bool(known) and finite, sums_of(artifact.manifest))
    simulated, on_gpu = isinstance(artifact, Simulated), isinstance(artifact, CudaArtifact)
    threads = () if simulated or on_gpu else (1, max(2, cores()))
    rows: list[Row] = []
    not_asked = [NotAsked(*artifact.simulator.instead)] if isinstance(artifact, Simulated) else []
    asked_versions: dict[str, str] = {}
    runtime = None
    if "onnxruntime" in engines:
        try:
            runtime = _OnnxRuntime(artifact.directory / "model.onnx", spec)
            asked_versions["onnxruntime"] = runtime.version
        except EngineError as error:
            not_asked.append(NotAsked("onnxruntime", str(error)))
    not_asked += _unanswerable(spec, finite)
    try:
        for number, question in enumerate(questions):
            asked = _ask(artifact, question, own, runtime, np.random.default_rng([seed, number]), threads)
            runtime = asked.runtime
            rows += asked.rows
            not_asked += [n for n in asked.not_asked if n not in not_asked]
        if not is_large(spec):
            rows += _ask_beyond_numbers(artifact, np.random.default_rng([seed, len(questions)]), threads)
        rows += ask_golden(artifact, own) if finite else ()
    except (EngineError, TargetError) as error:
        not_asked.append(NotAsked("opcompile", str(error)))
    return Report(
        **origin(artifact.manifest, started, asked_versions),
        spec=str(spec),
        seed=seed,
        engines=engines,
        threads=threads,
        rule=rule,
        rows=tuple(row for row in rows if row.against != "reference" or "reference" in engines),
        not_asked=tuple(not_asked),
    )
