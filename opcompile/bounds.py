"""How far a right answer may be from the oracle: an error bound that is derived and never chosen.

`bounds` gives every output element its own bound on ``|computed - oracle|``; `compare` judges an
array by it, and is the only comparison in this project. NumPy only.
The derivation is in ``docs/numerics.md``; the comments here name its steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.errors import CallError, VerificationError
from opcompile.reference import activate, by_channels, linear, widened
from opcompile.spec import Activation, ConvTranspose3d, at_batch

Array = NDArray[np.float64]
Tensor = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Format:
    """A binary floating-point format, rounding to nearest. ``precision`` is in bits, hidden bit included.

    ``each`` is how many roundings a product costs on its way into a sum, ``factors`` the format that both of its
    factors are rounded to before.
    """

    precision: int
    smallest_exponent: int
    largest_exponent: int
    flushes: bool = True
    each: int = 1
    factors: Format | None = None

    @property
    def unit(self) -> float:
        """The unit roundoff u: a result in range is off by at most u times itself."""
        return 2.0**-self.precision

    @property
    def floor(self) -> float:
        """What a result below the normal range can lose: all of it where hardware flushes it to zero."""
        return 2.0**self.smallest_exponent if self.flushes else 2.0 ** (self.smallest_exponent - self.precision)

    @property
    def largest(self) -> float:
        """The largest number."""
        return (2 - 2 * self.unit) * 2.0**self.largest_exponent

    @property
    def limit(self) -> float:
        """From here on magnitudes round to infinity (for float64: the largest number itself)."""
        return min((2 - self.unit) * 2.0**self.largest_exponent, np.finfo(np.float64).max)

    def narrowed(self, storage: Format) -> Format | None:
        """What factors stored in ``storage`` are rounded to before they are multiplied; None where they are kept."""
        return self.factors or (self if self.precision < storage.precision else None)


FORMATS = {
    "float64": Format(53, -1022, 1023),
    "float32": Format(24, -126, 127),
    "bfloat16": Format(8, -126, 127),
    # float16 is a storage type only, and no conversion to it flushes
    "float16": Format(11, -14, 15, flushes=False),
}

# What sums are kept in. Tensor cores align the products of an instruction, four at least, and the sum so far, to the
# largest of them, and cut off: n + 2 times 2^-23 for n products. Apple does not say how simdgroup matrices round: they
# are granted the same, which covers cutting off each product and each sum. Pairs of bfloat16 are added one after the
# other, each sum rounded to nearest, and what is below the normal range flushed: as float32 is granted.
_CUT_OFF = replace(FORMATS["float32"], each=3)
TF32 = Format(11, -126, 127)
PAIRS = "bfloat16 pairs"
SUMS = {
    "float32": FORMATS["float32"],
    "float64": FORMATS["float64"],
    "tensor cores": _CUT_OFF,
    "TF32 tensor cores": replace(_CUT_OFF, factors=TF32),
    "simdgroup matrices": _CUT_OFF,
    PAIRS: FORMATS["float32"],
}


def gamma(roundings: float, unit: float) -> float:
    """Relative error of a product of this many factors (1 + delta), |delta| <= unit (Higham 2002, 3.1).

    From 1/unit roundings on nothing follows: more than any format holds is allowed, so that nothing is judged.
    """
    return roundings * unit / (1 - roundings * unit) if roundings * unit < 1 else 2.0**512


# --- the activation: how far it carries an error, and what it adds ---

# An elementary function is granted 8u of its range (4 ulp; the worst that was measured is 5.2u, ONNX
# Runtime's tanh), and the formula around it at most eight roundings.
_ELEMENTARY = 16.0
# A formula without elementary function: parameters rounded, then at most three operations.
_RATIONAL = 6.0


# Selections only: a sum that is exact stays exact.
EXACT_ACTIVATIONS = ("none", "relu", "relu6", "hard_tanh", "hard_shrink")


@dataclass(frozen=True, slots=True)
class _Carries:
    """How f treats an error: ``slope`` is the largest |f'|, and evaluating f at z costs at most
    ``own + of_z*|z| + of_y*|f(z)|`` units of roundoff, and ``floors`` times what is lost below the normal range.

    What is cut off only after it was rounded, as a hard_sigmoid, moves z itself, by ``before*|z|`` units of roundoff.
    """  # noqa: D205

    slope: float
    own: float = 0.0
    of_z: float = 0.0
    of_y: float = 0.0
    floors: float = 1.0
    before: float = 0.0


def _carries(activation: Activation) -> _Carries:
    """Slopes given as numbers are the largest |f'|, rounded up; a test holds each against a grid."""
    alpha, second, *_ = (*(abs(p) for p in activation.parameters), 0.0, 0.0)
    match activation.name:
        case "none" | "relu" | "relu6" | "hard_tanh" | "hard_shrink":
            return _Carries(1.0)
        case "leaky_relu":
            return _Carries(max(1.0, alpha), of_y=_RATIONAL)
        case "elu":
            return _Carries(max(1.0, alpha), own=_ELEMENTARY * alpha)
        case "selu":
            # a product with alpha may be flushed, and then multiplied with gamma
            return _Carries(
                second * max(1.0, alpha),
                own=_ELEMENTARY * alpha * second,
                of_y=_RATIONAL,
                floors=1.0 + second,
            )
        case "gelu" | "gelu_tanh":
            return _Carries(1.13, of_z=_ELEMENTARY)
        case "sigmoid":
            return _Carries(0.25, own=_ELEMENTARY)
        case "hard_sigmoid":
            return _Carries(alpha, own=_RATIONAL * second, before=_RATIONAL)
        case "silu":
            return _Carries(1.1, of_z=_ELEMENTARY)
        case "hard_silu":
            return _Carries(1.5, of_z=_RATIONAL)
        case "mish":
            return _Carries(1.09, of_z=_ELEMENTARY)
        case "softplus" | "log_sigmoid":
            return _Carries(1.0, of_y=_ELEMENTARY)
        case "softsign":
            return _Carries(1.0, of_y=_RATIONAL)
        case "tanh":
            return _Carries(1.0, own=_ELEMENTARY)
        case "soft_shrink":
            return _Carries(1.0, of_y=_RATIONAL)
        case "tanh_shrink":
            return _Carries(1.0, own=_ELEMENTARY, of_y=_ELEMENTARY)
        case "squareplus":
            # as it is usually written, it cancels for negative z
            return _Carries(1.0, own=_RATIONAL, of_z=_RATIONAL, of_y=_RATIONAL)
        case "sparse_plus":
            return _Carries(1.0, own=_RATIONAL, of_y=_RATIONAL)
    raise ValueError(f"activation {activation.name} has no error constants in verify")


def _is_monotone(activation: Activation) -> bool:
    match activation.name:
        case "leaky_relu" | "elu" | "selu":
            return activation.parameters[0] >= 0
        case "gelu" | "gelu_tanh" | "silu" | "hard_silu" | "mish":
            return False
    return True


def _carried(activation: Activation, f: _Carries, z: Array, y: Array, error: Array) -> Array:
    """Bound |f(z^) - f(z)|, where |z^ - z| <= error: by the slope, and where f is monotone by f(z +- error)."""
    by_slope = f.slope * error
    if activation.name == "none" or not np.any(error) or not _is_monotone(activation):
        return by_slope
    farthest = np.zeros_like(z)
    for end in (np.nextafter(z - error, -np.inf), np.nextafter(z + error, np.inf)):
        at_end = activate(activation, end)
        away = np.abs(at_end - y)
        if activation.name not in EXACT_ACTIVATIONS:  # the oracle errs at both places
            away += _evaluated(f, end, at_end, FORMATS["float64"]) + _evaluated(f, z, y, FORMATS["float64"])
        farthest = np.maximum(farthest, away)
    # beyond the largest number there may be no value, but the slope counts there too
    return np.fmin(by_slope, farthest * (1 + 4 * FORMATS["float64"].unit))


def _evaluated(f: _Carries, z: Array, y: Array, sums: Format) -> Array:
    """Bound what evaluating f at up to ±z, where it is up to ±y, in ``sums`` costs."""
    # no infinity: there, what has no part in the cost would make it NaN
    largest = np.finfo(np.float64).max
    of_z = sums.unit * f.of_z * np.minimum(np.abs(z), largest)
    of_y = sums.unit * f.of_y * np.minimum(np.abs(y), largest)
    cost: Array = sums.unit * f.own + of_z + of_y + sums.floor * f.floors
    return cost


def _through(activation: Activation, z: Array, y: Array, error: Array, sums: Format) -> Array:
    """Bound |f^(z^) - f(z)|, where y = f(z), |z^ - z| <= error, and f^ is f evaluated in ``sums``."""
    if activation.name == "hard_shrink":
        # it jumps by 1/2 at 1/2: where the error reaches that far, z^ may lie on the other side
        return error + 0.5 * ((np.abs(np.abs(z) - 0.5) <= error) & (error > 0))
    if activation.name == "exponential":
        # f' = f grows without limit, and reducing the argument costs u*|z|, relative to the result
        carried = y * np.expm1(np.minimum(error, 1))
        # e^z may be too small for a number where e^(z + error) is large
        end = np.exp(z + error) * (1 + FORMATS["float64"].unit * _ELEMENTARY * (1 + np.abs(z) + error))
        carried = np.where(error < 1, carried, end)
        relative = sums.unit * _ELEMENTARY * (1 + np.abs(z) + error)
        return carried + relative * y + relative * carried + sums.floor
    f = _carries(activation)
    error = error + sums.unit * f.before * (np.abs(z) + error)
    carried = _carried(activation, f, z, y, error)
    if activation.name in EXACT_ACTIVATIONS:
        return carried
    # f is evaluated at z^, where |z^| <= |z| + error and |f(z^)| <= |f(z)| + carried
    return carried + _evaluated(f, np.abs(z) + error, np.abs(y) + carried, sums)


def _stored(activation: Activation, z: Array, y: Array, error: Array, sums: Format, storage: Format) -> Array:
    """Take the steps behind the sum, which is off by ``error``: activation, the oracle's own error, storage."""
    error = _through(activation, z, y, error, sums)
    if activation.name not in EXACT_ACTIVATIONS:
        error = error + _through(activation, z, y, np.zeros(()), FORMATS["float64"])
    if storage.precision < sums.precision:
        error = error + (storage.unit * (np.abs(y) + error) + storage.floor)
    return error


def _below_limit(activation: Activation, z: Array, error: Array, sums: Format, storage: Format) -> Array:
    """Bound how far below the largest number a right answer may be, where f(z) is infinite; mostly by nothing."""
    nearer = np.sign(z) * np.maximum(np.nextafter(np.abs(z) - error, 0), 0)
    y = activate(activation, nearer)
    least = np.abs(y) - _stored(activation, nearer, y, np.zeros(()), sums, storage)
    below = np.nextafter(np.maximum(storage.limit - least, 0), np.inf)
    return np.where(np.isinf(y), 0.0, below)


# --- the bound ---


@dataclass(frozen=True, slots=True)
class Inputs:
    """One set of inputs, checked, with what the bound needs to know of all of it.

    ``integers`` says that X and W are whole multiples of their ``grains``, powers of two, and B of the product of both.
    """

    spec: ConvTranspose3d
    x: Tensor
    w: Tensor
    b: Tensor | None
    largest: tuple[float, float, float]
    integers: bool
    grains: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def of(cls, spec: ConvTranspose3d, x: Any, w: Any, b: Any, *, grains: tuple[float, float] = (1.0, 1.0)) -> Inputs:
        """Check shapes, values and formats against the spec. Raises `CallError`."""
        x, w, b = np.asarray(x), np.asarray(w), None if b is None or not spec.bias else np.asarray(b)
        expected = {"x": (x, (x.shape[0] if spec.batch is None and x.ndim else spec.batch, *spec.x_shape[1:]))}
        expected |= {"w": (w, spec.w_shape)} | ({} if b is None else {"b": (b, (spec.channels_out,))})
        for name, (array, shape) in expected.items():
            require_operand(name, array, shape, spec.dtype, spec)
        given = [array for array, _ in expected.values()]
        largest = [max(float(array.max()), -float(array.min())) for array in given] + [0.0]
        integers = all(map(_are_multiples, given, (*grains, grains[0] * grains[1])))
        return cls(spec, x, w, b, (largest[0], largest[1], largest[2]), integers, grains)

    @property
    def batch(self) -> int:
        """How many images there are; what the spec says, unless its batch is dynamic."""
        return int(self.x.shape[0])

    def sums_exactly(self, sums: Format) -> bool:
        """Whether no factor and no partial sum can round, in any order: integers of magnitudes below 2^precision."""
        (x, w, b), (of_x, of_w) = self.largest, self.grains
        factors = sums.narrowed(FORMATS[self.spec.dtype])
        fits = factors is None or max(x / of_x, w / of_w) <= 2.0**factors.precision
        limit = of_x * of_w * 2.0**sums.precision
        # what holds few zeros is told by its largest elements, without a sum
        return self.integers and fits and (self.spec.terms * x * w + b < limit or self._products() + b < limit)

    def _products(self) -> float:
        """No less than any output's sum of magnitudes without bias: all weights of a channel count as its largest."""
        spec, g = self.spec, self.spec.groups
        weights = np.abs(self.w.astype(np.float64)).reshape(g, spec.c_in, -1).max(axis=2)
        most = 0.0
        for part in _parts(spec, self.batch):
            x = np.abs(self.x[part.x].astype(np.float64))
            x = np.moveaxis(x, -1, 1) if spec.layout == "NDHWC" else x
            x = np.einsum("ngcdhw,gc->ngdhw", x.reshape(len(x), g, spec.c_in, *x.shape[2:]), weights)
            layer = replace(part.spec, channels_in=g, channels_out=g, layout="NCDHW")
            most = max(most, float(linear(layer, x, np.ones(layer.w_shape)).max()))
        return most


def _are_multiples(array: Tensor, grain: float) -> bool:
    whole = array / grain
    return bool((np.trunc(whole) == whole).all())


def require_operand(name: str, array: Tensor, shape: tuple[int | None, ...], dtype: str, taker: object) -> None:
    """Raise `CallError` unless ``array`` is what ``taker`` takes: of its shape, in its format, and finite."""
    if array.shape != shape:
        raise CallError(f"{name} has shape {array.shape}, but {taker} takes {shape}")
    if not array.size:
        raise CallError(f"{name} has shape {array.shape}, but a batch must be at least 1")
    widened(name, array)
    if array.dtype.name != dtype and not np.array_equal(rounded(dtype, array), array):
        raise CallError(
            f"{name} is {array.dtype.name} and holds values that {dtype} cannot; "
            f"round it first, so that the oracle reads what the kernel reads"
        )
    if not np.isfinite(array).all():
        raise CallError(f"{name} holds infinities or NaN, for which there is no bound")


# 8 MiB of float64: some ten such arrays are alive at a time, and the allocator reuses arrays of this size.
_PART_ELEMENTS = 2**20


@dataclass(frozen=True, slots=True)
class _Part:
    """A block of Y, and the layer that computes it from a block of X: cropping is what pads do."""

    spec: ConvTranspose3d
    x: tuple[slice, ...]
    y: tuple[slice, ...]


def _parts(spec: ConvTranspose3d, batch: int, elements: int = _PART_ELEMENTS) -> Iterator[_Part]:
    """Cut Y into blocks of about ``elements``: by images, then by rows of D, of H, of W."""
    sizes = [batch, *(axis.out for axis in spec.axes)]
    inner = [spec.channels_out * math.prod(sizes[i + 1 :]) for i in range(4)]
    steps = [max(1, min(size, elements // n)) for size, n in zip(sizes, inner, strict=True)]
    starts = (range(0, size, step) for size, step in zip(sizes, steps, strict=True))
    for at in itertools.product(*starts):
        yield _part(spec, [slice(i, min(i + step, size)) for i, step, size in zip(at, steps, sizes, strict=True)])


def _part(spec: ConvTranspose3d, block: Sequence[slice]) -> _Part:
    """Return the part that holds outputs ``block``: images, and rows of D, H and W."""
    crops = [axis.crop(range(s.start, s.stop)) for axis, s in zip(spec.axes, block[1:], strict=True)]
    layer = replace(spec, batch=None, axes=(crops[0][0], crops[1][0], crops[2][0]))
    images, *written = block
    read, channels = [slice(at.start, at.stop) for _, at in crops], slice(0, None)
    return _Part(layer, spec.in_layout(images, channels, *read), spec.in_layout(images, channels, *written))


@dataclass(frozen=True, slots=True)
class _Truth:
    """The oracle on one block: z the sum with bias, y = f(z), and the sum of magnitudes (None when all is exact)."""

    spec: ConvTranspose3d
    z: Array
    y: Array
    magnitude: Array | None
    largest: tuple[float, float, float]

    @classmethod
    def of(cls, part: _Part, inputs: Inputs, magnitudes: bool) -> _Truth:
        spec, x, w = part.spec, inputs.x[part.x].astype(np.float64), inputs.w.astype(np.float64)
        by_channel: Array | float = 0.0
        if inputs.b is not None:
            by_channel = by_channels(spec, inputs.b.astype(np.float64))
        z = linear(spec, x, w)
        z += by_channel
        magnitude = None
        if magnitudes:
            magnitude = linear(spec, np.abs(x, out=x), np.abs(w, out=w))
            magnitude += np.abs(by_channel)
        return cls(spec, z, activate(spec.activation, z), magnitude, inputs.largest)

    def bound(self, sums: Format, storage: Format, exact: bool) -> Array:
        """Take the four steps of ``docs/numerics.md``: sum, activation, the oracle's own error, storage."""
        spec, double = self.spec, FORMATS["float64"]
        x, w, _ = self.largest
        error, overflows = np.zeros_like(self.z), np.zeros((), bool)
        if not exact:
            if self.magnitude is None:
                raise ValueError("a bound for sums that round needs the sum of magnitudes")
            # t products and the bias: t roundings a product, one more where there is a bias,
            # and two more where the engine first rounds the inputs to a narrower format
            roundings = sums.each * spec.terms + spec.bias + 2 * (sums.precision < storage.precision)
            relative = gamma(roundings, sums.unit)
            if sums.factors is not None:  # (1 + v)^2 - 1 for both of them, and that is summed with errors too
                relative += (2 + sums.factors.unit) * sums.factors.unit * (1 + relative)
            relative += gamma(spec.terms + 1, double.unit)
            error = self.magnitude * (relative * (1 + gamma(spec.terms + 1, double.unit)))
            # a term, and either of its factors, can be lost below the normal range
            error += spec.terms * sums.floor * (x + w + 2)
            overflows = self.magnitude * (1 + relative) >= sums.limit
            if (factors := sums.narrowed(storage)) is not None:
                overflows |= max(x, w) >= factors.limit
        with np.errstate(over="ignore", invalid="ignore"):
            bound = _stored(spec.activation, self.z, self.y, error, sums, storage)
            if (beyond := np.isinf(self.y)).any():
                bound[beyond] = _below_limit(spec.activation, self.z[beyond], error[beyond], sums, storage)
        bound[overflows] = np.inf
        return bound


def _engine(spec: ConvTranspose3d, computed_in: str | None) -> Format:
    name = computed_in or spec.sum_dtype
    if name not in SUMS:
        raise CallError(f"computed_in is {name!r}, but sums are known for {', '.join(SUMS)} only")
    return SUMS[name]


def sums_of(manifest: Mapping[str, Any]) -> str | None:
    """What an artifact's kernel sums in, of `SUMS`; None is ``spec.sum_dtype``."""
    if manifest["plan"]["schedule"] == "matrix":
        return matrices_sum_in(manifest["target"]["architecture"], ConvTranspose3d.parse(manifest["spec"]).dtype)
    return pairs_sum_in(manifest["plan"].get("tiles", {}))


def pairs_sum_in(tiles: Mapping[str, Any]) -> str | None:
    """What a CPU's kernel with these tiles sums in, of `SUMS`; None is ``spec.sum_dtype``."""
    return PAIRS if tiles.get("products", 1) > 1 else None


def matrices_sum_in(architecture: str, dtype: str) -> str:
    """What matrix instructions sum in, of `SUMS`, on a GPU of ``cuda`` or ``metal`` in a layer of ``dtype``."""
    if architecture == "metal":
        return "simdgroup matrices"
    return "TF32 tensor cores" if dtype == "float32" else "tensor cores"


def bounds(spec: ConvTranspose3d, x: Any, w: Any, b: Any = None, *, computed_in: str | None = None) -> Array:
    """Bound |computed - oracle| for every element of Y, whatever the order of the sums, fused or not.

    ``computed_in`` names what an engine sums in, of `SUMS`, where that is not ``spec.sum_dtype``. The result has
    Y's shape; it is infinite where a partial sum may overflow. Where |oracle| + bound reaches the largest
    number of a format on the way, infinity is a right answer too (`compare` knows).
    Integers that no partial sum can round have no summation error: there the bound is the activation's and
    the storage's alone. Raises `CallError` for inputs that do not fit the spec.
    """
    inputs, sums = Inputs.of(spec, x, w, b), _engine(spec, computed_in)
    exact = inputs.sums_exactly(sums)
    whole = next(_parts(spec, inputs.batch, elements=2**62))
    return _Truth.of(whole, inputs, magnitudes=not exact).bound(sums, FORMATS[spec.dtype], exact)


def rounded(dtype: str, y: Tensor) -> Array:
    """Round to the nearest number of a format, ties to even; float32 first where the format is bfloat16."""
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return y.astype(dtype).astype(np.float64)
        bits = y.astype(np.float32).view(np.uint32)
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)


# --- the judgement ---


@dataclass(frozen=True, slots=True)
class Check:
    """How one array compares with another, element by element.

    ``criterion``: ``bits`` (equal to the correctly rounded exact result), ``exact sums`` (the sum is exact,
    the activation has a bound), ``bound``, or ``NaN`` (which elements are NaN or infinite). ``worst`` is the largest
    |error| / bound, found at ``index`` (with ``bits`` and ``NaN``: 0, or infinity for a difference).
    ``unjudged`` elements have sums that may overflow.
    """

    criterion: str
    computed_in: str
    elements: int
    failures: int
    unjudged: int
    worst: float
    index: tuple[int, ...]
    actual: float
    expected: float
    bound: float
    largest_error: float

    @property
    def judged(self) -> bool:
        """Whether any element could be judged."""
        return self.unjudged < self.elements

    @property
    def passed(self) -> bool:
        """Every element that could be judged is right, and some could."""
        return self.failures == 0 and self.judged

    def __str__(self) -> str:
        """One line for a person."""
        if not self.judged:
            return f"nothing to judge by {self.criterion}: every sum may overflow, or has too many terms"
        verdict = "pass" if self.passed else f"FAIL ({self.failures} of {self.elements} elements)"
        return (
            f"{verdict} by {self.criterion}: worst {self.worst:.3g} of the bound at {self.index}: "
            f"{self.actual!r} for {self.expected!r} +- {self.bound:.3g}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the verdict as plain values."""
        return {key: _plain(value) for key, value in asdict(self).items()} | {"passed": self.passed}

    def require(self) -> Check:
        """Return self. Raises `VerificationError` unless it passed."""
        if not self.passed:
            raise VerificationError(str(self))
        return self


def _plain(value: Any) -> Any:
    """Dictionaries, lists, strings and finite numbers; what is not finite becomes its name."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def judge_bits(computed_in: str, actual: Array, expected: Array) -> Check:
    """Judge one block by equality."""
    wrong = actual != expected
    failures = int(np.count_nonzero(wrong))
    at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    largest = 0.0
    if failures:
        with np.errstate(invalid="ignore"):
            largest = float(np.nan_to_num(np.abs(actual[wrong] - expected[wrong]), nan=np.inf, posinf=np.inf).max())
    return Check(
        criterion="bits",
        computed_in=computed_in,
        elements=actual.size,
        failures=failures,
        unjudged=0,
        worst=math.inf if failures else 0.0,
        index=tuple(int(i) for i in at),
        actual=float(actual[at]),
        expected=float(expected[at]),
        bound=0.0,
        largest_error=largest,
    )


def judge_nan(computed_in: str, actual: Array, expected: Array) -> Check:
    """Judge one block by where NaN and either infinity are, and by nothing else."""
    check = judge_bits(computed_in, _beyond_numbers(actual), _beyond_numbers(expected))
    if check.failures:
        check = replace(check, actual=float(actual[check.index]), expected=float(expected[check.index]))
    return replace(check, criterion="NaN")


def _beyond_numbers(y: Array) -> Array:
    return np.where(np.isnan(y), 1, np.where(np.isinf(y), y, 0))


def judge(criterion: str, computed_in: str, actual: Array, expected: Array, bound: Array, limit: float) -> Check:
    """Judge one block. Equal values pass; an infinity passes where the other one, bound included, reaches ``limit``.

    So does one of the other sign, where the bound reaches that far.
    """
    unjudged = 0
    with np.errstate(all="ignore"):
        error = np.subtract(actual, expected)
        ratio = np.abs(error, out=error) / bound
    # the largest is NaN where any is: then, and only then, look at every element for its reason
    if not np.isfinite(ratio.max()) or not np.isfinite(bound.max()):
        no_bound = np.isinf(bound)
        either = np.isinf(actual) | np.isinf(expected)
        with np.errstate(over="ignore"):
            overflow = either & (np.abs(np.clip(actual, -limit, limit) - np.clip(expected, -limit, limit)) <= bound)
        fine = no_bound | overflow | (actual == expected)
        error[fine], ratio[fine] = 0.0, 0.0
        error[np.isnan(error)], ratio[np.isnan(ratio)] = np.inf, np.inf
        unjudged = int(no_bound.sum())
    at = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    return Check(
        criterion=criterion,
        computed_in=computed_in,
        elements=actual.size,
        failures=int((ratio > 1).sum()) if ratio[at] > 1 else 0,
        unjudged=unjudged,
        worst=float(ratio[at]),
        index=tuple(int(i) for i in at),
        actual=float(actual[at]),
        expected=float(expected[at]),
        bound=float(bound[at]),
        largest_error=float(error.max()),
    )


def _join(checks: Sequence[Check]) -> Check:
    """One check for the whole from those of its blocks: the worst speaks, the counts add up."""
    worst = max(checks, key=lambda c: c.worst)
    return replace(
        worst,
        elements=sum(c.elements for c in checks),
        failures=sum(c.failures for c in checks),
        unjudged=sum(c.unjudged for c in checks),
        largest_error=max(c.largest_error for c in checks),
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """One engine's output, and the format it sums in (None: the spec's)."""

    y: Tensor
    computed_in: str | None = None


def compare_all(
    inputs: Inputs, answers: Mapping[str, Answer], exact: bool, pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Check]:
    """Judge each of ``pairs``: an answer and the one it is held against, or ``reference``, computed once for all.

    Two answers are held against each other under the sum of their bounds. Raises `VerificationError` for an
    answer of the wrong shape, `CallError` where ``exact`` is asked for inputs whose sums may round.
    """
    spec, storage = inputs.spec, FORMATS[inputs.spec.dtype]
    shape = at_batch(spec.y_shape, inputs.batch)
    engines = {name: answer.computed_in or spec.sum_dtype for name, answer in answers.items()}
    exactly = {engine: inputs.sums_exactly(_engine(spec, engine)) for engine in engines.values()}
    for name, answer in answers.items():
        if answer.y.shape != shape:
            raise VerificationError(f"{name} gave shape {answer.y.shape}, but {spec} has {shape}")
        if exact and not exactly[engines[name]]:
            raise CallError(
                "exact needs integers whose sums of magnitudes stay below 2^24 (2^53 for float64 sums), and that TF32 "
                "holds (2^11) where factors are rounded to it"
            )
    bits = exact and spec.activation.name in EXACT_ACTIVATIONS
    criterion = "bits" if bits else "exact sums" if exact else "bound"
    found: dict[tuple[str, str], list[Check]] = {}
    for part in _parts(spec, inputs.batch):
        truth = _Truth.of(part, inputs, magnitudes=not all(exactly.values()))
        expected = rounded(spec.dtype, truth.y) if bits else truth.y
        bound = {} if bits else {e: truth.bound(_engine(spec, e), storage, exactly[e]) for e in exactly}
        values = {name: widened(name, answer.y[part.y]) for name, answer in answers.items()}

        for name, other in dict.fromkeys(pairs):
            right = expected if other == "reference" else values[other]
            if bits:
                check = judge_bits(engines[name], values[name], right)
            else:
                both = bound[engines[name]] if other == "reference" else bound[engines[name]] + bound[engines[other]]
                asked = [engines[name]] if other == "reference" else [engines[name], engines[other]]
                limit = min(storage.limit, *(_engine(spec, engine).limit for engine in asked))
                check = judge(criterion, engines[name], values[name], right, both, limit)
            index = tuple(i + s.start for i, s in zip(check.index, part.y, strict=True))
            found.setdefault((name, other), []).append(replace(check, index=index))
    return {key: _join(checks) for key, checks in found.items()}


def compare(
    spec: ConvTranspose3d,
    actual: Any,
    x: Any,
    w: Any,
    b: Any = None,
    *,
    computed_in: str | None = None,
    exact: bool = False,
) -> Check:
    """Judge ``actual`` (Y, any float dtype) by the oracle on the very inputs it was computed from.

    With ``exact``, for inputs of small integers, the result must equal the correctly rounded oracle to the
    last bit; activations that are not exact on integers keep the bound, without any error of the sums.
    Raises `CallError` for inputs that do not fit the spec, and for what holds no real numbers, `VerificationError`
    for an output of another shape.
    """
    answers = {"actual": Answer(np.asarray(actual), computed_in)}
    pair = ("actual", "reference")
    return compare_all(Inputs.of(spec, x, w, b), answers, exact, [pair])[pair]


def compare_at(inputs: Inputs, indices: NDArray[np.int64], answers: Sequence[Answer]) -> list[Check]:
    """Judge answers that are known at some elements of Y only: ``indices``, flat. One check for each answer.

    The oracle is asked for the boxes that hold the indices, one for each image and corner of Y.
    """
    spec, storage = inputs.spec, FORMATS[inputs.spec.dtype]
    exactly = [inputs.sums_exactly(_engine(spec, answer.computed_in)) for answer in answers]
    at = np.unravel_index(indices, at_batch(spec.y_shape, inputs.batch))
    image, _, *position = spec.from_layout(at)
    places, voxels = np.stack(at, axis=1), np.stack([image, *position], axis=1)
    corners = np.concatenate([voxels[:, :1], 2 * voxels[:, 1:] // [axis.out for axis in spec.axes]], axis=1)
    found: list[list[Check]] = [[] for _ in answers]
    for corner in np.unique(corners, axis=0):
        chosen = (corners == corner).all(axis=1)
        low, high = voxels[chosen].min(axis=0), voxels[chosen].max(axis=0) + 1
        part = _part(spec, [slice(int(i), int(j)) for i, j in zip(low, high, strict=True)])
        truth = _Truth.of(part, inputs, magnitudes=not all(exactly))
        inside = tuple((places[chosen] - [s.start or 0 for s in part.y]).T)
        for checks, answer, exact in zip(found, answers, exactly, strict=True):
            sums = _engine(spec, answer.computed_in)
            values = widened("the answer", answer.y)[chosen]
            bound, limit = truth.bound(sums, storage, exact)[inside], min(storage.limit, sums.limit)
            check = judge("bound", answer.computed_in or spec.sum_dtype, values, truth.y[inside], bound, limit)
            checks.append(replace(check, index=tuple(int(i) for i in places[chosen][check.index[0]])))
    return [_join(checks) for checks in found]
