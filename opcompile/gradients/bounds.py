"""How far a right derivative may be from the oracle: the bound of `opcompile.bounds`, for sums going backward.

A derivative is a sum of products, so that the same step applies: a term that meets k roundings on its
way is off by at most gamma(k) times itself (Higham 2002, 3.1). Sums over all positions have so many
terms that this would allow a tenth of the result; what is compiled sums in parts, says how `depth` its
sums are, and is judged by that. NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.bounds import (
    EXACT_ACTIVATIONS,
    FORMATS,
    Check,
    Format,
    gamma,
    judge,
    judge_bits,
    require_operand,
    rounded,
)
from opcompile.errors import CallError, VerificationError
from opcompile.gradients.gradient import Gradient
from opcompile.gradients.reference import linear, slope
from opcompile.reference import widened
from opcompile.spec import Activation, at_batch

Array = NDArray[np.float64]
Tensor = NDArray[Any]

# Roundings on the way to a slope and its product with dY: an elementary function is granted 16, the
# formula around it and the parameters in it three, the product one.
_SLOPE = 20


@dataclass(frozen=True, slots=True)
class Truth:
    """The oracle's derivative of one set of operands, with what the bound needs to know of it.

    ``magnitude`` is the same sum of magnitudes, and ``farthest`` the largest number on the way to a term;
    ``flushed`` is what a subnormal Y that is taken for zero changes, and ``floors`` how often a term can lose what
    lies below the normal range; ``integers`` says that no operand has a fraction.
    """

    gradient: Gradient
    batch: int
    value: Array
    magnitude: Array
    farthest: float
    flushed: Array
    floors: float
    integers: bool

    @classmethod
    def of(cls, gradient: Gradient, operands: Mapping[str, Any]) -> Truth:
        """Ask the oracle. Raises `CallError` for operands that do not fit the derivative."""
        given = _checked(gradient, operands)
        dy, factor = given["dy"].astype(np.float64), given.get("w" if gradient.wrt == "x" else "x")
        sizes = None if factor is None else np.abs(factor.astype(np.float64))
        most = 1.0 if sizes is None else float(sizes.max())
        value_of, size_of, flushed = dy, np.abs(dy), np.zeros(())
        # a term, the sum it enters, and either of its factors times the other
        farthest, floors = float(size_of.max()), 2 + most
        if gradient.needs_output:
            y, activation = given["y"].astype(np.float64), gradient.layer.activation
            normal = np.where(np.abs(y) < FORMATS[gradient.layer.sum_dtype].floor, 0, y)
            jump = np.abs(slope(activation, y) - slope(activation, normal))
            reach = _reach(activation, y) + jump
            # the slope, and a product in it, times dY and the factor; and dY times the slope and the factor
            floors += (2 * farthest + float(reach.max())) * most
            if jump.any():
                flushed = linear(gradient, size_of * jump, sizes)
            value_of, size_of = dy * slope(activation, y), size_of * reach
            farthest = max(float(reach.max()), float(size_of.max()))
        floors += float(size_of.max())
        value, magnitude = linear(gradient, value_of, factor), linear(gradient, size_of, sizes)
        summed = [array for name, array in given.items() if name != "y"]
        integers = all(bool((np.trunc(array) == array).all()) for array in summed)
        return cls(gradient, given["dy"].shape[0], value, magnitude, farthest, flushed, floors, integers)

    def exact(self, sums: Format) -> bool:
        """Whether no partial sum can round, in any order: integers whose magnitudes stay below 2^precision."""
        selects = self.gradient.layer.activation.name in EXACT_ACTIVATIONS
        small = float(self.magnitude.max()) < 2.0**sums.precision
        return self.integers and selects and small and not self.flushed.any()

    def bound(self, sums: Format, storage: Format, depth: int) -> Array:
        """Bound |computed - oracle| for every element, where a term meets ``depth`` roundings at most."""
        terms, double = self.gradient.terms(self.batch), FORMATS["float64"]
        error, overflows = np.zeros_like(self.value), np.zeros((), bool)
        if not self.exact(sums):
            slopes = 0 if self.gradient.layer.activation.name in EXACT_ACTIVATIONS else _SLOPE
            inputs = 2 * (sums.precision < storage.precision)
            relative = gamma(min(depth, terms) + slopes + inputs, sums.unit) + gamma(terms + slopes, double.unit)
            error = self.magnitude * (relative * (1 + gamma(terms + slopes, double.unit)))
            error += terms * sums.floor * self.floors + self.flushed * (1 + relative)
            overflows = np.maximum(self.magnitude, self.farthest) * (1 + relative) >= sums.limit
        if storage.precision < sums.precision:
            error = error + (storage.unit * (np.abs(self.value) + error) + storage.floor)
        error[np.broadcast_to(overflows, error.shape)] = np.inf
        return error


def _checked(gradient: Gradient, operands: Mapping[str, Any]) -> dict[str, Tensor]:
    if set(operands) != set(gradient.operands):
        raise CallError(f"{gradient.name} takes {', '.join(gradient.operands)}, and was given {', '.join(operands)}")
    given = {name: np.asarray(operands[name]) for name in gradient.operands}
    batch = given["dy"].shape[0] if given["dy"].ndim else 0
    for name, array in given.items():
        require_operand(name, array, at_batch(gradient.operands[name], batch), gradient.layer.dtype, gradient)
    return given


def judge_all(truth: Truth, answer: Tensor, *, depth: int | None, exact: bool) -> Check:
    """Judge ``answer`` against the oracle.

    ``depth`` is how many roundings a term of the answer meets at most; None stands for as many as there are
    terms, which holds in any order. With ``exact``, for small integers, equality to the last bit is
    asked. Raises `VerificationError` for an answer of the wrong shape, `CallError` for one that holds no real
    numbers, a depth below 0, and where ``exact`` is asked for operands whose sums may round.
    """
    layer = truth.gradient.layer
    sums, storage = FORMATS[layer.sum_dtype], FORMATS[layer.dtype]
    if answer.shape != truth.value.shape:
        raise VerificationError(f"{truth.gradient} has shape {truth.value.shape}, and the answer {answer.shape}")
    if depth is not None and depth < 0:
        raise CallError(f"depth is {depth}, but must be a number of roundings, or None")
    actual = widened("the answer", answer)
    if exact:
        if not truth.exact(sums):
            raise CallError("exact needs integers whose sums of magnitudes stay below 2^24 (2^53 for float64 sums)")
        return judge_bits(layer.sum_dtype, actual, rounded(layer.dtype, truth.value))
    bound = truth.bound(sums, storage, truth.gradient.terms(truth.batch) if depth is None else depth)
    limit = min(storage.limit, sums.limit)
    return judge("bound", layer.sum_dtype, actual, truth.value, bound, limit)


def compare(
    gradient: Gradient, actual: Any, operands: Mapping[str, Any], *, depth: int | None = None, exact: bool = False
) -> Check:
    """Judge a derivative from anywhere, computed from these very ``operands``. See `judge_all`."""
    return judge_all(Truth.of(gradient, operands), np.asarray(actual), depth=depth, exact=exact)


def _reach(activation: Activation, y: Array) -> Array:
    """The magnitudes that are added up, at any time, on the way to a slope."""
    found: Array = np.broadcast_to(_REACHES[activation.name](y, *map(abs, activation.parameters)), y.shape)
    return found


_REACHES: dict[str, Callable[..., Any]] = {
    "relu": lambda y: np.where(y > 0, 1.0, 0.0),
    "relu6": lambda y: np.where((y > 0) & (y < 6), 1.0, 0.0),
    "leaky_relu": lambda y, alpha: np.where(y > 0, 1.0, alpha),
    "elu": lambda y, alpha: np.where(y > 0, 1.0, np.abs(y) + alpha),
    "selu": lambda y, alpha, gamma: np.where(y > 0, gamma, np.abs(y) + alpha * gamma),
    "sigmoid": lambda y: np.abs(y) * (1 + np.abs(y)),
    "hard_sigmoid": lambda _y, alpha, _beta: alpha,
    "softplus": lambda y: 1 + np.exp(-y),
    "softsign": lambda y: (1 + np.abs(y)) ** 2,
    "tanh": lambda y: 1 + y * y,
    "exponential": np.abs,
}
