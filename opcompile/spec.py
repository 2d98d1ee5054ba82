"""The operator: what a 3-D transposed convolution is, and nothing about how it runs.

Along one axis, with input size ``I``, kernel ``k``, stride ``s`` and dilation ``d``::

    full[i*s + t*d] += x[i] * w[t]          0 <= i < I, 0 <= t < k      (no flip)
    y[o] = full[o + begin]                  0 <= o < out, zero beyond ``full``

`ConvTranspose3d` is the only thing that the compiled path, the ONNX path and the oracle share.
Shapes: ``X (N, C, D, H, W)``, ``W (C, M/g, kD, kH, kW)``, ``B (M,)``, ``Y (N, M, oD, oH, oW)``;
with layout ``NDHWC`` X and Y carry their channels last, W and B stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from opcompile.errors import CallError, SpecError
from opcompile.meant import meant

T = TypeVar("T")

DTYPES = ("float32", "float16", "bfloat16", "float64")
LAYOUTS = ("NCDHW", "NDHWC")
AXIS_NAMES = ("D", "H", "W")

# name -> (parameter, default) pairs; the formulas are in `reference`, one line each.
ACTIVATIONS: dict[str, tuple[tuple[str, float], ...]] = {
    "none": (),
    "relu": (),
    "relu6": (),
    "leaky_relu": (("alpha", 0.01),),
    "elu": (("alpha", 1.0),),
    "selu": (("alpha", 1.6732632423543772), ("gamma", 1.0507009873554805)),
    "gelu": (),
    "gelu_tanh": (),
    "sigmoid": (),
    "hard_sigmoid": (("alpha", 1 / 6), ("beta", 0.5)),
    "silu": (),
    "hard_silu": (),
    "mish": (),
    "softplus": (),
    "softsign": (),
    "tanh": (),
    "exponential": (),
    "hard_tanh": (),
    "soft_shrink": (),
    "hard_shrink": (),
    "tanh_shrink": (),
    "log_sigmoid": (),
    "squareplus": (),
    "sparse_plus": (),
}

# Parameters that all of an activation is multiplied with.
_SCALES = (("selu", "gamma"), ("hard_sigmoid", "alpha"))

# How else people call these; case and punctuation do not count.
_OTHER_DTYPES = {
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "single": "float32",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
}
_OTHER_LAYOUTS = {"channels_first": "NCDHW", "channels_last": "NDHWC", "channels_last_3d": "NDHWC"}
_OTHER_ACTIVATIONS = {
    "identity": "none",
    "linear": "none",
    "swish": "silu",
    "hard_swish": "hard_silu",
    "exp": "exponential",
}

# The largest float32.
_LARGEST_PARAMETER = 2.0**128 - 2.0**104
_SMALLEST_PARAMETER = 2.0**-126

# Sizes beyond this are typing mistakes, and would make derived sizes pass 64 bits.
_LARGEST = 2**31 - 1

# The phases and the taps of an axis are counted and planned one by one.
_MOST_PLANNED = 4096

# Above this many phases with taps, a block each would cost more compile time and code than it saves; above this many
# phases in all, code that writes each.
_MOST_PHASE_BLOCKS = 27
_MOST_PHASES = 64


@dataclass(frozen=True, slots=True)
class Phase:
    """The taps that meet the outputs ``o = stride*q + index`` of one axis, and where they read.

    Tap number ``j`` (``0 <= j < taps``) is kernel element ``first_tap + j*tap_step`` and reads
    input element ``q + first_offset - j*offset_step``, which may lie outside the input (a zero).
    """

    index: int
    taps: int
    first_tap: int
    tap_step: int
    first_offset: int
    offset_step: int

    def offsets(self) -> range:
        """The input offsets relative to ``q``, in tap order."""
        stop = self.first_offset - self.taps * self.offset_step
        return range(self.first_offset, stop, -self.offset_step)


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis: input size, kernel, and how they meet. All sizes are in elements."""

    size: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    pad: tuple[int, int] = (0, 0)
    output_pad: int = 0

    def __post_init__(self) -> None:
        """Raise `SpecError` for what no transposed convolution can be."""
        if not isinstance(self.pad, tuple) or len(self.pad) != 2:
            raise SpecError(f"pad is {self.pad!r}, but must be a (begin, end) pair of ints")
        _require_ints("pad and output_pad", (*self.pad, self.output_pad))
        for name, value in (
            ("size", self.size),
            ("kernel", self.kernel),
            ("stride", self.stride),
            ("dilation", self.dilation),
        ):
            _require_ints(name, (value,))
            if value < 1:
                raise SpecError(f"{name} is {value}, but must be at least 1; write {name}=1 for no effect")
        for name, value in (("kernel", self.kernel), ("stride", self.stride)):
            if value > _MOST_PLANNED:
                raise SpecError(
                    f"{name} is {value}, but must be at most {_MOST_PLANNED}, for opcompile plans each tap and phase "
                    "of an axis; no layer that is known has more"
                )
        for name, value in (("pad begin", self.pad[0]), ("pad end", self.pad[1]), ("output_pad", self.output_pad)):
            if value < 0:
                raise SpecError(
                    f"{name} is {value}, but must be at least 0; a pad crops the output, output_pad makes it longer"
                )
        if self.out < 1:
            raise SpecError(
                f"the output size is {self.out}: (size-1)*stride + dilation*(kernel-1) + 1 = {self.full}, "
                f"less pad {self.pad[0]}+{self.pad[1]}, plus output_pad {self.output_pad}; "
                "it must be at least 1, so use less padding"
            )

    @property
    def full(self) -> int:
        """Size before cropping."""
        return (self.size - 1) * self.stride + self.dilation * (self.kernel - 1) + 1

    @property
    def out(self) -> int:
        """Output size."""
        return self.full - self.pad[0] - self.pad[1] + self.output_pad

    @property
    def begin(self) -> int:
        """How many elements of ``full`` are cropped at the low side."""
        return self.pad[0]

    @property
    def positions(self) -> int:
        """How many values ``q`` takes in ``o = stride*q + phase``."""
        return -(-self.out // self.stride)

    @property
    def landing(self) -> int:
        """How many (input element, tap) pairs meet an output that is kept: the multiplications that are needed."""
        pairs = 0
        for tap in range(self.kernel):
            # x[i] lands on output i*stride + shift
            shift = tap * self.dilation - self.begin
            first, last = max(0, -(shift // self.stride)), min(self.size - 1, (self.out - 1 - shift) // self.stride)
            pairs += max(0, last - first + 1)
        return pairs

    def crop(self, outputs: range) -> tuple[Axis, range]:
        """The axis whose whole output is ``outputs`` of this one, and the inputs that it reads, one at least."""
        low, high = outputs.start + self.begin, outputs.stop + self.begin
        # input i lands on i*stride .. i*stride + reach; keep one input at least, and none beyond ``low``
        reach = self.dilation * (self.kernel - 1)
        first = min(max(0, -(-(low - reach) // self.stride)), low // self.stride, self.size - 1)
        last = max(first + 1, min(self.size, -(-high // self.stride)))
        cropped = replace(self, size=last - first, pad=(0, 0), output_pad=0)
        begin = low - first * self.stride
        excess = cropped.full - begin - len(outputs)
        # the spare elements of a crop that lies beyond ``full`` are zeros: output_pad
        return replace(cropped, pad=(begin, max(0, excess)), output_pad=max(0, -excess)), range(first, last)

    @property
    def tap_step(self) -> int:
        """Distance between two taps that meet the same output."""
        return self.stride // math.gcd(self.stride, self.dilation)

    @property
    def offset_step(self) -> int:
        """Distance between the input elements that two such neighbouring taps read."""
        return self.dilation // math.gcd(self.stride, self.dilation)

    @property
    def offsets(self) -> list[int]:
        """The input offsets of the taps of all phases: phase by phase, in tap order."""
        return [offset for phase in self.phases for offset in phase.offsets()]

    @property
    def reads(self) -> tuple[int, int]:
        """The least and the greatest input offset of any phase's taps; both 0 where no tap meets an output."""
        offsets = self.offsets or [0]
        return min(offsets), max(offsets)

    def offset(self, tap: int) -> int:
        """The input element, relative to ``q``, that a tap reads for the outputs that it meets."""
        return -((tap * self.dilation - self.begin) // self.stride)

    def reaches(self, offset: int) -> bool:
        """Whether any position has an element of the input at this offset."""
        return -self.positions < offset < self.size

    @property
    def most_taps(self) -> int:
        """The largest number of taps of any phase, and 1 where none has a tap."""
        return max([1, *(phase.taps for phase in self.phases)])

    @property
    def even_taps(self) -> bool:
        """Whether every phase has taps, and as many as the others."""
        return math.gcd(self.stride, self.dilation) == 1 and self.kernel % self.tap_step == 0

    @property
    def spans(self) -> tuple[range, ...]:
        """The positions of each phase where these are numbered by their taps.

        With ``g = gcd(s, d)``, phase ``f`` then has the outputs ``o = s*q + (f // g)*d + f % g - begin``.
        """
        g = math.gcd(self.stride, self.dilation)
        lags = [self.begin - f // g * self.dilation - f % g for f in range(self.stride)]
        return tuple(range(-(-lag // self.stride), (self.out - 1 + lag) // self.stride + 1) for lag in lags)

    def first_tap(self, index: Any) -> Any:
        """The least ``t`` that solves ``(index + begin - t*d) % s == 0``, for a number of a phase or an expression.

        With ``g = gcd(s, d)`` that is ``(index + begin)/g * (d/g)^-1 mod s/g``; where g does not divide
        ``index + begin`` there is none, and what is returned means nothing.
        """
        g = math.gcd(self.stride, self.dilation)
        return (index + self.begin) // g * pow(self.dilation // g, -1, self.tap_step) % self.tap_step

    def phase(self, index: int) -> Phase:
        """The taps of output phase ``index``; possibly none (then the output is zero)."""
        place, first = index + self.begin, self.first_tap(index)
        if place % math.gcd(self.stride, self.dilation) or first >= self.kernel:
            return Phase(index, 0, 0, self.tap_step, 0, self.offset_step)
        taps = -(-(self.kernel - first) // self.tap_step)
        offset = (place - first * self.dilation) // self.stride
        return Phase(index, taps, first, self.tap_step, offset, self.offset_step)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One `Phase` for each ``o mod stride`` that occurs in the output."""
        return tuple(self.phase(index) for index in range(min(self.stride, self.out)))

    @property
    def summed(self) -> tuple[Phase, ...]:
        """Those phases that have taps; outputs of the others are sums of nothing."""
        return tuple(phase for phase in self.phases if phase.taps)


def _plain(given: object) -> object:
    """Return a text of a type of its own (NumPy's, an enumeration's) as a str, which is another text in messages."""
    return str.__str__(given) if isinstance(given, str) else given


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function applied to the sum plus the bias; ``none`` is the identity."""

    name: str = "none"
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Fill in default parameters; raise `SpecError` for an unknown name or a wrong count."""
        object.__setattr__(self, "name", _plain(self.name))
        if type(self.name) is not str or self.name not in ACTIVATIONS:
            # what stands after = or ( are parameters
            hint = meant(re.split(r"[=(]", str(self.name))[0], ACTIVATIONS, _OTHER_ACTIVATIONS)
            raise SpecError(
                f"activation {self.name!r} is unknown; {hint}use one of {', '.join(ACTIVATIONS)}, with its parameters "
                "after colons, like leaky_relu:0.2"
            )
        expected = ACTIVATIONS[self.name]
        listed = isinstance(self.parameters, tuple | list)
        if not listed or not all(isinstance(p, int | float) for p in self.parameters):
            raise SpecError(f"activation {self.name} has parameters {self.parameters!r}, but they must be numbers")
        given = tuple(self.parameters)
        if len(given) > len(expected):
            names = ", ".join(name for name, _ in expected) or "none"
            raise SpecError(f"activation {self.name} was given {len(given)} parameters, but takes: {names}")
        if not all(abs(p) <= _LARGEST_PARAMETER for p in given):
            raise SpecError(
                f"activation {self.name} has parameters {given}, but they must be finite numbers of at most 3.4e38: "
                "ONNX keeps them in float32"
            )
        if any(0 < abs(p) < _SMALLEST_PARAMETER for p in given):
            raise SpecError(
                f"activation {self.name} has parameters {given}, but they must be of at least 1.2e-38: of smaller "
                "ones float32 keeps few digits, or none; use a larger one, or 0"
            )
        defaults = tuple(default for _, default in expected[len(given) :])
        object.__setattr__(self, "parameters", (*map(float, given), *defaults))
        if self.name == "selu" and abs(math.prod(self.parameters)) > _LARGEST_PARAMETER:
            raise SpecError(
                f"activation selu has alpha*gamma={math.prod(self.parameters):g}, but it must be at most 3.4e38 in "
                "magnitude: results below zero approach its negative, which float32 cannot hold"
            )
        for (name, _), value in zip(expected, self.parameters, strict=True):
            if (self.name, name) in _SCALES and value == 0:
                raise SpecError(
                    f"activation {self.name} with {name}=0 is one number for every input; fill a tensor with it instead"
                )

    def __str__(self) -> str:
        """The text form: the name, then parameters that differ from the defaults."""
        if self.parameters == Activation(self.name).parameters:
            return self.name
        return ":".join([self.name, *(repr(p) for p in self.parameters)])

    @classmethod
    def parse(cls, text: str) -> Activation:
        """Read ``name`` or ``name:p1:p2``. Raises `SpecError`."""
        name, *parameters = _text("an activation", text, "leaky_relu:0.2").split(":")
        return cls(name, tuple(_number(f"act={text}", p) for p in parameters))


@dataclass(frozen=True, slots=True)
class ConvTranspose3d:
    """One layer. ``batch`` is None when it is known only at run time.

    Sums are accumulated in `sum_dtype`; ``groups`` split C and M into as many independent layers.
    """

    batch: int | None
    channels_in: int
    channels_out: int
    axes: tuple[Axis, Axis, Axis]
    groups: int = 1
    bias: bool = True
    activation: Activation = Activation()
    dtype: str = "float32"
    layout: str = "NCDHW"

    def __post_init__(self) -> None:
        """Raise `SpecError`, naming the attribute, the rule and the way out."""
        _require_ints("channels and groups", (self.channels_in, self.channels_out, self.groups))
        if self.batch is not None:
            _require_ints("batch", (self.batch,))
            if self.batch < 1:
                raise SpecError(f"batch is {self.batch}, but must be at least 1, or N for a dynamic batch")
        for name, value in (("channels in (C)", self.channels_in), ("channels out (co)", self.channels_out)):
            if value < 1:
                raise SpecError(f"{name} is {value}, but must be at least 1")
        if self.groups < 1:
            raise SpecError(f"groups (g) is {self.groups}, but must be at least 1")
        for name, value in (("channels in (C)", self.channels_in), ("channels out (co)", self.channels_out)):
            if value % self.groups:
                raise SpecError(
                    f"{name} is {value}, which groups g={self.groups} does not divide; choose g among its divisors"
                )
        if not isinstance(self.axes, tuple) or len(self.axes) != 3 or not all(isinstance(a, Axis) for a in self.axes):
            raise SpecError("axes must be a tuple of three Axis values, in the order D, H, W")
        if not isinstance(self.bias, bool):
            raise SpecError(f"bias is {self.bias!r}, but must be true or false")
        for name in ("dtype", "layout"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        # a NumPy dtype may equal its name, but is another key and another text
        if type(self.dtype) is not str or self.dtype not in DTYPES:
            hint = meant(str(self.dtype), DTYPES, _OTHER_DTYPES)
            raise SpecError(f"dtype {self.dtype!r} is not supported; {hint}use one of {', '.join(DTYPES)}")
        if type(self.layout) is not str or self.layout not in LAYOUTS:
            hint = meant(str(self.layout), LAYOUTS, _OTHER_LAYOUTS)
            raise SpecError(f"layout {self.layout!r} is not supported; {hint}use one of {', '.join(LAYOUTS)}")
        if not isinstance(self.activation, Activation):
            raise SpecError(
                f"activation is {self.activation!r}, but must be an Activation; Activation.parse reads a text"
            )
        for name, shape in (("X", self.x_shape), ("W", self.w_shape), ("Y", self.y_shape)):
            if self.bytes_of(shape) >= 2**63:
                raise SpecError(
                    f"{name} would have the shape {shape} of {self.dtype}, but a tensor must have less than 2^63 "
                    "bytes; choose smaller sizes"
                )

    # --- derived shapes ---

    @property
    def c_in(self) -> int:
        """C/g, the input channels of a group."""
        return self.channels_in // self.groups

    @property
    def m_out(self) -> int:
        """M/g, the output channels of a group."""
        return self.channels_out // self.groups

    @property
    def x_shape(self) -> tuple[int | None, ...]:
        """Shape of X in its layout; None stands for a dynamic batch."""
        return self.in_layout(self.batch, self.channels_in, *(a.size for a in self.axes))

    @property
    def w_shape(self) -> tuple[int, ...]:
        """Shape of the canonical weight, ``(C, M/g, kD, kH, kW)`` in both layouts."""
        return (self.channels_in, self.m_out, *(a.kernel for a in self.axes))

    @property
    def y_shape(self) -> tuple[int | None, ...]:
        """Shape of Y in its layout; None stands for a dynamic batch."""
        return self.in_layout(self.batch, self.channels_out, *(a.out for a in self.axes))

    def in_layout(self, n: T, channel: T, *at: T) -> tuple[T, ...]:
        """Return sizes, indices or loops ``(n, channel, d, h, w)`` in the order that X and Y have them in."""
        return (n, channel, *at) if self.layout == "NCDHW" else (n, *at, channel)

    def from_layout(self, of: Sequence[T]) -> list[T]:
        """Return what is in the order of X and Y as ``[n, channel, d, h, w]``."""
        return [*of] if self.layout == "NCDHW" else [of[0], of[-1], *of[1:-1]]

    # --- derived facts ---

    @property
    def sum_dtype(self) -> str:
        """The type sums are accumulated in."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def itemsize(self) -> int:
        """Bytes of an element of X, W, B and Y."""
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def sum_itemsize(self) -> int:
        """Bytes of a sum."""
        return 8 if self.sum_dtype == "float64" else 4

    @property
    def phases(self) -> tuple[int, int]:
        """How many phases have taps, and how many there are."""
        counts = [(len(axis.summed), len(axis.phases)) for axis in self.axes]
        summed, every = map(math.prod, zip(*counts, strict=True))
        return summed, every

    @property
    def many_phases(self) -> bool:
        """Whether the phases are too many for code that writes each."""
        return self.phases[1] > _MOST_PHASES

    @property
    def phases_as_axes(self) -> bool:
        """Whether the phases are declared as axes of blocks, by their numbers of taps, rather than a block each."""
        return self.phases[0] > _MOST_PHASE_BLOCKS or self.many_phases

    @property
    def terms(self) -> int:
        """The largest number of products summed into one output element."""
        taps = math.prod(max(p.taps for p in axis.phases) for axis in self.axes)
        return taps * self.c_in

    @property
    def flops(self) -> int:
        """Floating-point operations of the uncropped operator for one batch element (or the whole batch)."""
        return 2 * (self.batch or 1) * math.prod(self.w_shape) * math.prod(a.size for a in self.axes)

    @property
    def needed_flops(self) -> int:
        """The part of `flops` that ends in Y: products that cropping drops are not counted."""
        channels = self.channels_in * self.m_out
        return 2 * (self.batch or 1) * channels * math.prod(a.landing for a in self.axes)

    def bytes_of(self, shape: Iterable[int | None]) -> int:
        """Bytes of a tensor of the layer's type; a dynamic batch counts as 1."""
        return self.itemsize * math.prod(at_batch(shape, 1))

    def bytes(self) -> int:
        """Bytes of X, W, B and Y together, each counted once; a dynamic batch counts as 1."""
        shapes = [self.x_shape, self.w_shape, self.y_shape, *([(self.channels_out,)] if self.bias else [])]
        return sum(map(self.bytes_of, shapes))

    def with_batch(self, batch: int | None) -> ConvTranspose3d:
        """The same layer for another batch."""
        return replace(self, batch=batch)

    # --- text form ---

    def __str__(self) -> str:
        """The text form, every field spelled out; `parse` reads it back."""
        n = "N" if self.batch is None else str(self.batch)
        pads = [f"{a.pad[0]}:{a.pad[1]}" if a.pad[0] != a.pad[1] else str(a.pad[0]) for a in self.axes]
        if any(":" in p for p in pads):
            pads = [f"{a.pad[0]}:{a.pad[1]}" for a in self.axes]
        fields = {
            "in": "x".join([n, str(self.channels_in), *(str(a.size) for a in self.axes)]),
            "co": str(self.channels_out),
            "k": _triple(a.kernel for a in self.axes),
            "s": _triple(a.stride for a in self.axes),
            "p": _triple(pads),
            "op": _triple(a.output_pad for a in self.axes),
            "d": _triple(a.dilation for a in self.axes),
            "g": str(self.groups),
            "bias": str(int(self.bias)),
            "act": str(self.activation),
            "dtype": self.dtype,
            "layout": self.layout,
        }
        return " ".join(f"{key}={value}" for key, value in fields.items())

    @classmethod
    def parse(cls, text: str) -> ConvTranspose3d:
        """Read the text form ``in=1x64x12x16x32 co=64 k=3 s=2 p=1 op=1``.

        ``in`` is N x C x D x H x W in every layout (N itself for a dynamic batch); ``in``, ``co`` and
        ``k`` are required. ``k s p op d`` take one value or three (``3x3x2``); a pad may be
        ``begin:end``. Raises `SpecError`.
        """
        fields = _fields_of(_text("a layer", text, "in=1x64x12x16x32 co=64 k=3"))
        sizes = fields["in"].split("x")
        if len(sizes) != 5:
            raise SpecError(f"in={fields['in']} has {len(sizes)} sizes, but must be NxCxDxHxW, like {_FIELDS['in']}")
        if not sizes[0].lstrip("-").isdecimal() and sizes[0] != "N":
            raise SpecError(
                f"in={fields['in']} begins with {sizes[0]!r}, but must begin with a number, or N for any batch"
            )
        batch = None if sizes[0] == "N" else _integer("in", sizes[0])
        spatial = [_integer("in", n) for n in sizes[2:]]
        per_axis = {key: _per_axis(key, fields.get(key, default)) for key, default in _AXIS_DEFAULTS.items()}
        axes: list[Axis] = []
        for i, name in enumerate(AXIS_NAMES):
            k, s, op, d = (_integer(key, per_axis[key][i]) for key in ("k", "s", "op", "d"))
            try:
                axes.append(Axis(spatial[i], k, s, d, _pad_pair(per_axis["p"][i]), op))
            except SpecError as error:
                raise SpecError(f"axis {name}: {error}") from None
        bias = fields.get("bias", "1")
        if bias not in ("0", "1"):
            raise SpecError(f"bias={bias} is neither 0 nor 1; write bias=1 for a layer with a bias, bias=0 without")
        return cls(
            batch=batch,
            channels_in=_integer("in", sizes[1]),
            channels_out=_integer("co", fields["co"]),
            axes=(axes[0], axes[1], axes[2]),
            groups=_integer("g", fields.get("g", "1")),
            bias=bias == "1",
            activation=Activation.parse(fields.get("act", "none")),
            dtype=fields.get("dtype", "float32"),
            layout=fields.get("layout", "NCDHW"),
        )


_FIELDS = {
    "in": "in=1x64x12x16x32",
    "co": "co=64",
    "k": "k=3",
    "s": "s=2",
    "p": "p=1",
    "op": "op=1",
    "d": "d=1",
    "g": "g=1",
    "bias": "bias=1",
    "act": "act=relu",
    "dtype": "dtype=float32",
    "layout": "layout=NCDHW",
}
# How other systems call the same.
_OTHER_FIELDS = {
    "input": "in",
    "out_channels": "co",
    "channels_out": "co",
    "cout": "co",
    "filters": "co",
    "kernel": "k",
    "kernel_size": "k",
    "kernel_shape": "k",
    "stride": "s",
    "pad": "p",
    "padding": "p",
    "output_padding": "op",
    "dilation": "d",
    "group": "g",
    "activation": "act",
    "type": "dtype",
    "data_format": "layout",
}
_AXIS_DEFAULTS = {"k": "", "s": "1", "p": "0", "op": "0", "d": "1"}


def _triple(values: Iterable[object]) -> str:
    texts = [str(v) for v in values]
    return texts[0] if len(set(texts)) == 1 else "x".join(texts)


def _per_axis(key: str, text: str) -> list[str]:
    parts = text.split("x")
    if len(parts) not in (1, 3):
        raise SpecError(f"{key}={text} has {len(parts)} values, but takes one, or three in the order DxHxW")
    return parts * 3 if len(parts) == 1 else parts


def _pad_pair(text: str) -> tuple[int, int]:
    begin, colon, end = text.partition(":")
    if ":" in end:
        raise SpecError(f"p= holds {text!r}, but must be one number, or two, begin:end")
    return _integer("p", begin), _integer("p", end if colon else begin)


def at_batch(shape: Iterable[int | None], batch: int) -> tuple[int, ...]:
    """Return a shape with ``batch`` images where their number is open."""
    return tuple(batch if n is None else n for n in shape)


def fits(given: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    """Whether a tensor of shape ``given`` is one of ``shape``: with any batch of at least 1 where that is open."""
    return given == shape or (shape[:1] == (None,) and given[:1] >= (1,) and given[1:] == shape[1:])


def require_layer(spec: object) -> None:
    """Raise `CallError` for what is no layer, like its text."""
    if not isinstance(spec, ConvTranspose3d):
        raise CallError(f"the layer is a {type(spec).__name__}; read a text by ConvTranspose3d.parse first")


def _fields_of(text: str) -> dict[str, str]:
    """Return what the text form says of each key. Raises `SpecError`."""
    fields: dict[str, str] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if "," in word:
            raise SpecError(f"{word!r} has a comma; put blanks between fields, and x between sizes")
        if not equals or key not in _FIELDS:
            hint = meant(key, _FIELDS, _OTHER_FIELDS, f"={value}") if equals else ""
            raise SpecError(f"{word!r} is not a field of the form key=value; {hint}the keys are {' '.join(_FIELDS)}")
        if key in fields:
            raise SpecError(f"{key} is given twice; keep one of them")
        fields[key] = value
    for key in ("in", "co", "k"):
        if key not in fields:
            raise SpecError(f"{key}= is missing in {text!r}; write it like {_FIELDS[key]}")
    return fields


def _text(what: str, given: object, example: str) -> str:
    if not isinstance(given, str):
        raise SpecError(f"{what} is read from a str like {example!r}, and this is of type {type(given).__name__}")
    return given


def _integer(key: str, text: str) -> int:
    if text == "N":
        raise SpecError(f"{key}= holds N, but only the batch may be open, the first size of in=; give a number")
    if not re.fullmatch(r"-?[0-9]+", text):
        raise SpecError(f"{key}= holds {text!r}, but must be a whole number, like {_FIELDS[key]}")
    if len(text) > 12:
        raise SpecError(f"{key}= holds {text!r}, but must be at most {_LARGEST}")
    return int(text)


def _number(where: str, text: str) -> float:
    try:
        # Python's own rule takes 1_0, blanks and the digits of other scripts too
        return float(text if re.fullmatch(r"[-+.0-9a-zA-Z]+", text) else "")
    except ValueError:
        raise SpecError(f"{where}: {text!r} is not a number, like 0.01") from None


def _require_ints(what: str, values: Iterable[object]) -> None:
    for value in values:
        if type(value) is not int:
            raise SpecError(f"{what}: {value!r} is a {type(value).__name__}, but must be an int")
        if abs(value) > _LARGEST:
            raise SpecError(f"{what}: {value} is larger than {_LARGEST}, the largest size supported")
