"""What every importer gives: a layer in another system's words, in ours.

An importer answers three questions: which operator it is (the spec), how the system stores the weight, and
in which order X and Y have their axes. Letters name axes: N, C (input channels), M (output channels), D, H, W.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.errors import SpecError, WordsError, first_words
from opcompile.needed import bfloat16
from opcompile.spec import AXIS_NAMES, DTYPES, Axis, ConvTranspose3d

Tensor = NDArray[Any]
Axes = tuple[Axis, Axis, Axis]
Triple = tuple[int, int, int]

CANONICAL = "CMDHW"


@dataclass(frozen=True, slots=True)
class WeightOrder:
    """How a system stores W, beside our ``(C, M/g, kD, kH, kW)``.

    ``axes`` are its axes by letter; of C and M, ``shared`` is the one of which it stores one group's share;
    ``flipped`` says that its taps run backwards along every axis.
    """

    axes: str = CANONICAL
    shared: str = "M"
    flipped: bool = False

    def canonical(self, w: Tensor, groups: int) -> Tensor:
        """Return the system's weight as ``(C, M/g, kD, kH, kW)``."""
        w = w.transpose([self.axes.index(letter) for letter in CANONICAL])
        if self.shared == "C":
            c, m, *kernel = w.shape
            w = w.reshape(c, groups, m // groups, *kernel).swapaxes(0, 1).reshape(c * groups, m // groups, *kernel)
        return np.ascontiguousarray(w[:, :, ::-1, ::-1, ::-1] if self.flipped else w)

    def own(self, w: Tensor, groups: int) -> Tensor:
        """Return a canonical weight as the system stores it."""
        w = w[:, :, ::-1, ::-1, ::-1] if self.flipped else w
        if self.shared == "C":
            c, m, *kernel = w.shape
            w = w.reshape(groups, c // groups, m, *kernel).swapaxes(0, 1).reshape(c // groups, m * groups, *kernel)
        return np.ascontiguousarray(w.transpose([CANONICAL.index(letter) for letter in self.axes]))

    def sizes(self, shape: Sequence[int], groups: int) -> tuple[int, int, Triple]:
        """Return C, M and the kernel of a weight stored with ``shape``."""
        by_letter = dict(zip(self.axes, (int(n) for n in shape), strict=True))
        by_letter[self.shared] *= groups
        return by_letter["C"], by_letter["M"], (by_letter["D"], by_letter["H"], by_letter["W"])

    def shape(self, spec: ConvTranspose3d, kernel: Sequence[int]) -> tuple[int, ...]:
        """Return the shape in which the system stores the weight of ``spec`` with this ``kernel``."""
        by_letter = {"C": spec.channels_in, "M": spec.channels_out, **dict(zip(AXIS_NAMES, kernel, strict=True))}
        by_letter[self.shared] //= spec.groups
        return tuple(by_letter[letter] for letter in self.axes)

    def __str__(self) -> str:
        """How our weight becomes the system's, as NumPy says it (one group)."""
        order = ", ".join(str(CANONICAL.index(letter)) for letter in self.axes)
        flip = "w[:, :, ::-1, ::-1, ::-1]" if self.flipped else "w"
        return flip if self.axes == CANONICAL else f"{flip}.transpose({order})"


@dataclass(frozen=True, slots=True, eq=False)
class Imported:
    """A layer that came in ``system``'s words.

    ``spec`` is the operator; ``weight (C, M/g, kD, kH, kW)`` and ``bias (M,)`` are None where no values were
    given. ``x_layout`` and ``y_layout`` are the system's own ("NDHWC", or "CDHW" without a batch): `to_x` and
    `from_y` translate. ``zero_taps`` are zeros put before the kernel's taps, where the system leaves zeros at
    the low side of its output. ``remarks`` name what was said and has no effect here. ``target`` is the
    machine, where the system's words name one.
    """

    system: str
    spec: ConvTranspose3d
    order: WeightOrder = WeightOrder()
    x_layout: str = "NCDHW"
    y_layout: str = "NCDHW"
    zero_taps: Triple = (0, 0, 0)
    weight: Tensor | None = field(default=None, repr=False)
    bias: Tensor | None = field(default=None, repr=False)
    remarks: tuple[str, ...] = ()
    target: str = "llvm"

    @property
    def w_shape(self) -> tuple[int, ...]:
        """The shape in which the system stores the weight."""
        kernel = [axis.kernel - zeros for axis, zeros in zip(self.spec.axes, self.zero_taps, strict=True)]
        return self.order.shape(self.spec, kernel)

    @property
    def place(self) -> tuple[Triple, Triple]:
        """Where the output begins in the full one, counted from the first tap that is no zero, and its size."""
        a, b, c = (axis.begin - n * axis.dilation for axis, n in zip(self.spec.axes, self.zero_taps, strict=True))
        d, e, f = (axis.out for axis in self.spec.axes)
        return (a, b, c), (d, e, f)

    def to_w(self, w: Any) -> Tensor:
        """Return the system's weight in canonical form. Raises `WordsError` for another shape."""
        own = array(w)
        if own.shape != self.w_shape:
            raise WordsError(
                f"the weight has shape {own.shape}, but {self.system} stores this layer's as {self.w_shape}"
            )
        canonical = self.order.canonical(own, self.spec.groups)
        return np.pad(canonical, [(0, 0), (0, 0), *((zeros, 0) for zeros in self.zero_taps)])

    def to_x(self, x: Any) -> Tensor:
        """Return the system's input as X, in the spec's layout and dtype. Raises `WordsError` for another rank."""
        return np.ascontiguousarray(_moved("input", self._in_dtype(array(x)), self.x_layout, self.spec.layout))

    def from_y(self, y: Any) -> Tensor:
        """Return Y as the system would have given it. Raises `WordsError` for another rank."""
        return _moved("output", array(y), self.spec.layout, self.y_layout)

    def to_b(self, b: Any) -> Tensor:
        """Return the bias. Raises `WordsError` for another shape, and where the layer has none."""
        own = array(b)
        if not self.spec.bias:
            raise WordsError("the layer has no bias, but values of one were given; leave them out, or say that it has")
        if own.shape != (self.spec.channels_out,):
            raise WordsError(f"the bias has shape {own.shape}, but the layer gives {self.spec.channels_out} channels")
        return own

    def holding(self, weight: Any, bias: Any = None) -> Imported:
        """Return the layer with the values of a call's tensors; what was given by its shape stays unknown."""
        values, known = values_of(weight), values_of(bias)
        return replace(
            self,
            weight=None if values is None else self._in_dtype(self.to_w(values)),
            bias=None if known is None else self._in_dtype(known),
        )

    def with_weights(self, weight: Any, bias: Any = None) -> Imported:
        """Return the layer with values, both as the system stores them.

        They are converted to the dtype that the layer computes in, as the systems do when they load or promote
        weights. Raises `WordsError` for other shapes, and where one has a bias, of layer and values, that the
        other lacks.
        """
        if bias is None and self.spec.bias:
            raise WordsError("the layer has a bias, but its values are missing; give them, or say that it has none")
        own = None if bias is None else self._in_dtype(self.to_b(bias))
        return replace(self, weight=self._in_dtype(self.to_w(weight)), bias=own)

    def _in_dtype(self, a: Tensor) -> Tensor:
        return a.astype(bfloat16() if self.spec.dtype == "bfloat16" else self.spec.dtype, copy=False)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """One transposed convolution inside a model: a ``layer``, or the ``reason`` why there is none."""

    name: str
    layer: Imported | None
    reason: str | None = None

    @property
    def spec(self) -> ConvTranspose3d | None:
        """The layer's spec; None where there is no layer."""
        return self.layer.spec if self.layer else None

    @property
    def weight(self) -> Tensor | None:
        """The layer's weight in canonical form; None where there is no layer, or no values are known."""
        return self.layer.weight if self.layer else None

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias; None as for the weight, and where the layer has none."""
        return self.layer.bias if self.layer else None


def unique(names: Iterable[str]) -> list[str]:
    """Append _2, _3 ... to a name that was taken before."""
    taken: dict[str, None] = {}
    for given in names:
        name, number = given, 1
        while name in taken:
            number += 1
            name = f"{given}_{number}"
        taken[name] = None
    return list(taken)


def _moved(what: str, a: Tensor, have: str, want: str) -> Tensor:
    """Reorder axes by letter; a missing N is added in front or taken away."""
    if a.ndim != len(have):
        raise WordsError(f"the {what} has shape {a.shape}, but must have {len(have)} axes, in the order {have}")
    if "N" not in have:
        a, have = a[None], "N" + have
    batched = want if "N" in want else "N" + want
    a = a.transpose([have.index(letter) for letter in batched])
    return a if "N" in want else a[0]


# --- rules: what a system refuses, in its own words ---


@dataclass(frozen=True, slots=True)
class Rules:
    """What ``system`` refuses; with ``strict`` off, only what nobody could compute."""

    system: str
    strict: bool

    def must(self, fine: bool, rule: str) -> None:
        """Raise `WordsError` with the system's ``rule`` unless ``fine``: no such operator exists."""
        if not fine:
            raise WordsError(f"{self.system} refuses this: {rule}")

    def strictly(self, fine: bool, rule: str) -> None:
        """Raise `WordsError` unless ``fine``, where the operator exists and only this system refuses it."""
        if self.strict and not fine:
            raise WordsError(f"{self.system} refuses this: {rule}; opcompile computes it with strict=False")


# --- sizes ---


def symmetric(
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Axes, Triple]:
    """Return the axes of PyTorch's formula, which MLX and Lucid share, and the zero taps they need.

    ``out = (size-1)*stride - 2*padding + dilation*(kernel-1) + output_padding + 1``. Negative paddings, which
    some systems let pass, put zeros at that side.
    """
    begins, outs = list(padding), []
    for i, k, s, p, op, d in zip(spatial, kernel, stride, padding, output_padding, dilation, strict=True):
        outs.append((i - 1) * s - 2 * p + d * (k - 1) + op + 1)
    if min(*padding, *output_padding) < 0:
        return cropped(spatial, kernel, stride, dilation, begins, outs)
    axes = []
    for at, name in enumerate(AXIS_NAMES):
        pad = (padding[at], padding[at])
        axes.append(_axis(name, spatial[at], kernel[at], stride[at], dilation[at], pad, output_padding[at]))
    return (axes[0], axes[1], axes[2]), (0, 0, 0)


def cropped(
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    begins: Sequence[int],
    outs: Sequence[int],
) -> tuple[Axes, Triple]:
    """Return the axes whose output has ``outs`` elements and begins at ``begins`` of the full one.

    A negative begin means zeros at the low side: the kernel gets taps in front that are zero.
    """
    axes, taps = [], []
    for at, name in enumerate(AXIS_NAMES):
        i, k, s, d = spatial[at], kernel[at], stride[at], dilation[at]
        zeros = max(0, -(begins[at] // d)) if d > 0 else 0
        begin = begins[at] + zeros * d
        end = (i - 1) * s + d * (k + zeros - 1) + 1 - begin - outs[at]
        axes.append(_axis(name, i, k + zeros, s, d, (begin, max(0, end)), max(0, -end)))
        taps.append(zeros)
    return (axes[0], axes[1], axes[2]), (taps[0], taps[1], taps[2])


def _axis(name: str, size: int, kernel: int, stride: int, dilation: int, pad: tuple[int, int], extra: int) -> Axis:
    try:
        return Axis(size, kernel, stride, dilation, pad, extra)
    except SpecError as error:
        raise SpecError(f"axis {name}: {error}") from None


# --- values: whole numbers, arrays of any system, or the shapes of such ---


def whole(value: Any) -> int | None:
    """Return a whole number, Python's or an array library's, as an int; None for anything else."""
    try:
        return int(operator.index(value))
    except TypeError:
        return None


def whole_numbers(value: Any) -> tuple[int, ...] | None:
    """Return a sequence of whole numbers as ints; None for anything else."""
    if isinstance(value, (str, bytes, Mapping)):
        return None
    try:
        found = [whole(n) for n in value]
    except TypeError:
        return None
    given = tuple(n for n in found if n is not None)
    return given if len(given) == len(found) else None


def repeated(value: Any) -> tuple[int, ...] | None:
    """Return one whole number three times, a sequence of whole numbers as it is; None for anything else."""
    one = whole(value)
    return whole_numbers(value) if one is None else (one,) * 3


def shape_of(value: Any) -> tuple[Any, ...]:
    """Return the shape of an array, or a shape itself; what is no whole number in it stays. Raises `WordsError`."""
    shape = getattr(value, "shape", value)
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Iterable):
        raise WordsError(f"{value!r} is neither an array nor a shape; give one of these")
    sizes = tuple(shape)
    return tuple(n if whole(n) is None else whole(n) for n in sizes)


def weight_shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape of a weight, or such a shape itself. Raises `WordsError` where it holds anything but sizes."""
    shape = shape_of(value)
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise WordsError(f"the weight has the shape {shape}, but all its sizes must be whole numbers, 0 or more")
    return shape


def values_of(value: Any) -> Tensor | None:
    """Return an array's values, None for a shape or None."""
    return array(value) if hasattr(value, "shape") else None


def is_kind(kind: type, name: str, package: str) -> bool:
    """Say whether a class is ``name`` of ``package`` itself: another of that name may compute something else."""
    return kind.__name__ == name and kind.__module__.startswith(f"{package}.")


def kind_name(value: Any) -> str:
    """Return the full name of an object's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def dtype_of(dtype: Any, *values: Any) -> str:
    """Return the dtype that was asked for, else that of the first array, else float32. Raises `SpecError`."""
    found = [str(v.dtype) for v in values if hasattr(v, "dtype")]
    name = str(dtype or (found[0] if found else "float32"))
    known = re.search(r"(?<![a-z])(bfloat16|float(?:16|32|64))(?!\d)", name)
    if known is None:
        raise SpecError(f"the dtype is {name}, which opcompile does not compute; use one of {', '.join(DTYPES)}")
    return known.group(1)


def single_of(value: Any) -> str:
    """Return an array's dtype in a system that takes NumPy's float64, Python's own, as float32."""
    found = dtype_of(None, value)
    return "float32" if found == "float64" and isinstance(value, np.ndarray) else found


def promoted(*dtypes: str) -> str:
    """Return the smallest dtype that holds all, which is float32 for the two halves; float32 for none."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return "float64" if "float64" in dtypes else "float32"


def array(value: Any) -> Tensor:
    """Return an array of NumPy, PyTorch, MLX, JAX, TensorFlow, Keras or Lucid as NumPy's, its dtype kept.

    Raises `WordsError` for what holds no numbers.
    """
    is_bfloat16 = "bfloat16" in str(getattr(value, "dtype", ""))
    kind = type(value).__module__.split(".")[0]
    if kind == "torch":
        return _of_torch(value.detach(), is_bfloat16)
    elif kind == "mlx" and is_bfloat16:
        import mlx.core

        value = value.astype(mlx.core.float32)
    elif kind in ("keras", "lucid"):
        value = value.numpy()
    try:
        found = np.asarray(value)
    except ValueError as error:
        raise WordsError(f"this {type(value).__name__} gives no array: {error}; give one array of numbers") from error
    if found.dtype.kind in "OUSmM":
        raise WordsError(f"a value of type {type(value).__name__} was given, but it must be an array of numbers")
    return found.astype(bfloat16(), copy=False) if is_bfloat16 else found


def _of_torch(tensor: Any, is_bfloat16: bool) -> Tensor:
    try:
        found = np.asarray(tensor.cpu().float() if is_bfloat16 else tensor.cpu())
    except (TypeError, RuntimeError) as error:
        raise WordsError(
            f"a torch tensor ({tensor.dtype}, {tensor.layout}, {tensor.device}) gives no array: "
            f"{first_words(error)}; pass a plain one that holds values, by to_dense() or dequantize()"
        ) from error
    return found.astype(bfloat16()) if is_bfloat16 else found
