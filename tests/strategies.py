"""Hypothesis strategies over the operator: legal layers of every kind, and texts that are no layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from opcompile.spec import ACTIVATIONS, DTYPES, LAYOUTS, Activation, Axis, ConvTranspose3d, at_batch

# What a text says about one field, and words of which one must be in the complaint.
_ILLEGAL = [
    ("in", "1x2x3x4", ["in="]),
    ("in", "1x2x3x4x5x6", ["in="]),
    ("in", "0x{c}x2x2x2", ["batch"]),
    ("in", "-1x{c}x2x2x2", ["batch"]),
    ("in", "nx{c}x2x2x2", ["in="]),
    ("in", "1x0x2x2x2", ["channels in"]),
    ("in", "1x{c}x0x2x2", ["axis D: size"]),
    ("in", "1x{c}x2x0x2", ["axis H: size"]),
    ("in", "1x{c}x2x2x-3", ["axis W: size"]),
    ("in", "1x{c}x2x2x2.5", ["in="]),
    ("in", "1x{c}x2x2x3000000000", ["axis W: size: 3000000000 is larger"]),
    ("in", "1x{c}x2x2x99999999999999999999", ["in=", "at most 2147483647"]),
    ("in", "2147483647x{c}x2147483647x2147483647x2147483647", ["X would have"]),
    ("in", "", ["in="]),
    ("co", "0", ["channels out"]),
    ("co", "x", ["co="]),
    ("co", "{co}x{co}", ["co="]),
    ("k", "0", ["kernel"]),
    ("k", "3x3", ["k="]),
    ("k", "3x3x3x3", ["k="]),
    ("k", "-3", ["kernel"]),
    ("k", "99999999999999", ["k=", "at most 2147483647"]),
    ("s", "0", ["stride"]),
    ("s", "1x2x-1", ["axis W: stride"]),
    ("s", "two", ["s="]),
    ("d", "0", ["dilation"]),
    ("d", "1x0x1", ["axis H: dilation"]),
    ("p", "-1", ["pad begin"]),
    ("p", "0:-1", ["pad end"]),
    ("p", "1:1:1", ["p="]),
    ("p", "100000", ["output size"]),
    ("p", "0x0:100000x0", ["axis H: the output size"]),
    ("op", "-1", ["output_pad"]),
    ("op", "1:1", ["op="]),
    ("g", "0", ["groups"]),
    ("g", "-1", ["groups"]),
    ("g", "{g_too_many}", ["groups"]),
    ("bias", "2", ["bias="]),
    ("bias", "true", ["bias="]),
    ("act", "swish", ["activation", "swish"]),
    ("act", "relu:1", ["activation relu"]),
    ("act", "elu:1:2", ["activation elu"]),
    ("act", "elu:x", ["act=elu"]),
    ("act", "elu:nan", ["activation elu"]),
    ("act", "", ["activation"]),
    ("dtype", "int8", ["dtype"]),
    ("dtype", "Float32", ["dtype"]),
    ("layout", "NHWC", ["layout"]),
    ("layout", "ncdhw", ["layout"]),
]


@st.composite
def axes(draw: st.DrawFn, largest: int = 4) -> Axis:
    """One legal axis: any kernel, stride, dilation, asymmetric pads and output_pad; never more than 30 out."""
    size, kernel, stride = (draw(st.integers(1, largest)) for _ in range(3))
    dilation, output_pad = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    spare = Axis(size, kernel, stride, dilation).full + output_pad - 1
    begin = draw(st.integers(0, min(5, spare)))
    end = draw(st.integers(0, min(5, spare - begin)))
    return Axis(size, kernel, stride, dilation, (begin, end), output_pad)


@st.composite
def activations(draw: st.DrawFn) -> Activation:
    """Any activation, its parameters at their defaults or drawn."""
    name = draw(st.sampled_from(list(ACTIVATIONS)))
    drawn = draw(st.lists(st.floats(0.01, 3), max_size=len(ACTIVATIONS[name])))
    return Activation(name, tuple(drawn))


@st.composite
def specs(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = DTYPES,
    layouts: tuple[str, ...] = LAYOUTS,
    largest: int = 4,
    most_outputs: int = 20_000,
) -> ConvTranspose3d:
    """Any legal layer, small: all fields vary, a dynamic batch included; Y has at most ``most_outputs`` elements."""
    groups, c, m = (draw(st.integers(1, 3)) for _ in range(3))
    spec = ConvTranspose3d(
        batch=draw(st.sampled_from([1, 2, None])),
        channels_in=groups * c,
        channels_out=groups * m,
        axes=(draw(axes(largest)), draw(axes(largest)), draw(axes(largest))),
        groups=groups,
        bias=draw(st.booleans()),
        activation=draw(activations()),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(layouts)),
    )
    return spec if np.prod([n or 2 for n in spec.y_shape]) <= most_outputs else draw(st.nothing())


@st.composite
def illegal_spec_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A legal text with one field spoiled, and the words that the error must hold."""
    spec = draw(specs())
    fields = dict(word.split("=", 1) for word in str(spec).split())
    kind = draw(st.sampled_from(["value", "value", "value", "unknown", "twice", "missing", "no value"]))
    if kind == "unknown":
        return f"{spec} stride=2", ["stride=2"]
    if kind == "twice":
        return f"{spec} k=3", ["k is given twice"]
    if kind == "no value":
        return f"{spec} g", ["'g'"]
    if kind == "missing":
        gone = draw(st.sampled_from(["in", "co", "k"]))
        return " ".join(f"{k}={v}" for k, v in fields.items() if k != gone), [f"{gone}= is missing"]
    key, value, words = draw(st.sampled_from(_ILLEGAL))
    fields[key] = value.format(c=spec.channels_in, co=spec.channels_out, g_too_many=spec.channels_in + 1)
    return " ".join(f"{k}={v}" for k, v in fields.items()), words


def arrays(
    spec: ConvTranspose3d, seed: int = 0, *, batch: int = 2, integers: int | None = None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Return x, w, b (None without a bias) in the spec's dtype: normal, or integers up to ``integers``.

    ``batch`` counts for a dynamic batch only.
    """
    import ml_dtypes  # noqa: F401  (it teaches NumPy the name bfloat16)

    rng = np.random.default_rng(seed)
    shapes = [at_batch(spec.x_shape, batch), spec.w_shape, (spec.channels_out,)]
    if integers is None:
        x, w, b = (rng.standard_normal(shape).astype(np.dtype(spec.dtype)) for shape in shapes)
    else:
        x, w, b = (rng.integers(-integers, integers + 1, shape).astype(np.dtype(spec.dtype)) for shape in shapes)
    return x, w, b if spec.bias else None
