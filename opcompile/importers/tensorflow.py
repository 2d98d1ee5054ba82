"""TensorFlow's words: ``tf.nn.conv3d_transpose``, of TensorFlow 2.21, as a list of arguments.

W is ``(kD, kH, kW, M, C)``: a permutation of ours, without a flip. The size is said outright, by
``output_shape``; "SAME" crops ``max(full - out, 0) // 2`` at the low side, "VALID" nothing. The kernels for
CPUs compute NDHWC without dilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opcompile.errors import SpecError
from opcompile.importers.imported import (
    Imported,
    Rules,
    Triple,
    WeightOrder,
    cropped,
    dtype_of,
    shape_of,
    weight_shape_of,
    whole,
    whole_numbers,
)
from opcompile.spec import ConvTranspose3d as Spec

SYSTEM = "TensorFlow"
ORDER = WeightOrder("DHWMC")
_LAYOUTS = ("NDHWC", "NCDHW")
_TENSORS = {"float32": "float", "float64": "double", "float16": "half", "bfloat16": "bfloat16"}


def conv3d_transpose(
    input: Any,
    filters: Any,
    output_shape: Sequence[Any],
    strides: Any,
    padding: str = "SAME",
    data_format: str = "NDHWC",
    dilations: Any = None,
    name: str | None = None,  # noqa: ARG001 (TensorFlow's)
    *,
    bias: bool = False,
    dtype: str | None = None,
    strict: bool = True,
) -> Imported:
    """Read a call of ``tf.nn.conv3d_transpose``; tensors may be given by their shapes.

    TensorFlow's call has no bias; with ``bias`` the layer takes one. A NumPy input is converted to the filters'
    dtype, as TensorFlow does. Raises `WordsError` where TensorFlow refuses on a CPU.
    """
    rules = Rules(SYSTEM, strict)
    x, w, y = shape_of(input), weight_shape_of(filters), _asked(rules, output_shape)
    _require_words(rules, padding, data_format)
    _require_dtypes(rules, input, filters)
    for what, shape in (("input", y), ("out_backprop", x), ("filter", w)):
        rules.must(len(shape) == 5, f"{what} tensor must have 5 dimensions")
    words = {"strides": strides, "dilations": dilations}
    s, d = (_triple(rules, name, 1 if value is None else value, data_format) for name, value in words.items())
    rules.must(min(s) > 0, f"Stride must be > 0, but got {min(s)}")
    rules.must(min(d) > 0, f"Dilated rates should be larger than 0, but got {min(d)}")
    rules.must(min((n for n in y if isinstance(n, int)), default=0) >= 0, f"Dimension {min(y)} must be >= 0")
    rules.strictly(max(d) == 1, "Current CPU implementation does not yet support dilation rates larger than 1.")
    given, asked = (dict(zip(data_format, shape, strict=True)) for shape in (x, y))
    channels_in, channels_out, kernel = ORDER.sizes(w, 1)
    _require_channels(rules, given, asked, channels_in, channels_out)
    for n in (*x[1:], *y[1:]):
        if not isinstance(n, int):
            raise SpecError(f"input {x} and output_shape {y} hold unknown sizes; only the batch may be dynamic")
    spatial, outs = ([sizes[letter] for letter in "DHW"] for sizes in (given, asked))
    begins = []
    for at, (i, k, a, e, out) in enumerate(zip(spatial, kernel, s, d, outs, strict=True)):
        reach = e * (k - 1) + 1
        _require_size(rules, at, i, reach, a, out, padding)
        begins.append(max((i - 1) * a + reach - out, 0) // 2 if padding == "SAME" else 0)
    axes, zeros = cropped(spatial, kernel, s, d, begins, outs)
    spec = Spec(
        batch=given["N"],
        channels_in=channels_in,
        channels_out=channels_out,
        axes=axes,
        bias=bias,
        dtype=dtype_of(dtype, filters, input),
        layout=data_format,
    )
    remarks = ("TensorFlow computes NCDHW on GPUs only",) if data_format == "NCDHW" else ()
    return Imported(SYSTEM, spec, ORDER, data_format, data_format, zeros, remarks=remarks).holding(filters)


def _asked(rules: Rules, output_shape: Any) -> tuple[Any, ...]:
    """Return the output's shape, from a list, an array or a tensor; an unknown size stays None."""
    rules.must(
        np.ndim(output_shape) == 1 and not isinstance(output_shape, (str, bytes)),
        f"shape must be a vector of {{int32,int64}}, got shape {output_shape!r}",
    )
    return tuple(n if whole(n) is None else whole(n) for n in output_shape)


def _require_dtypes(rules: Rules, input: Any, filters: Any) -> None:
    if isinstance(input, np.ndarray) or not (hasattr(input, "dtype") and hasattr(filters, "dtype")):
        return
    x, w = dtype_of(None, input), dtype_of(None, filters)
    rules.must(
        x == w,
        f"cannot compute Conv3DBackpropInputV2 as input #2(zero-based) was expected to be a {_TENSORS[w]} tensor but "
        f"is a {_TENSORS[x]} tensor",
    )


def _require_words(rules: Rules, padding: Any, data_format: Any) -> None:
    rules.must(
        isinstance(padding, str) and padding in ("SAME", "VALID"),
        f'Value for attr \'padding\' of "{padding}" is not in the list of allowed values: "SAME", "VALID"',
    )
    rules.must(
        isinstance(data_format, str) and data_format in _LAYOUTS,
        f'Value for attr \'data_format\' of "{data_format}" is not in the list of allowed values: "NDHWC", "NCDHW"',
    )


def _triple(rules: Rules, name: str, value: Any, layout: str) -> Triple:
    """Return one value three times, three, or the three of five that are not N and C."""
    one = whole(value)
    found = whole_numbers(value) if one is None else (one,)
    rules.must(found is not None, f"Expected int for argument '{name}' not {value!r}.")
    given = found or ()
    rules.must(
        len(given) in (1, 3, 5),
        f"{name} should be of length 1, 3 or 5. Received: {name}={list(given)} of length {len(given)}",
    )
    if len(given) == 5:
        by_letter = dict(zip(layout, given, strict=True))
        rules.must(
            by_letter["N"] == by_letter["C"] == 1,
            f"Current implementation does not yet support {name} in the batch and depth dimensions.",
        )
        given = tuple(by_letter[letter] for letter in "DHW")
    a, b, c = given * 3 if len(given) == 1 else given
    return a, b, c


def _require_channels(rules: Rules, given: dict[str, Any], asked: dict[str, Any], c: int, m: int) -> None:
    rules.must(
        asked["C"] == m,
        f"input and filter_sizes must have the same number of channels. Got {asked['C']} for input and {m} for "
        "filter_sizes",
    )
    rules.must(
        given["C"] == c,
        f"out_backprop and filter_sizes must have the same number of channels. Got {given['C']} for out_backprop "
        f"and {c} for filter_sizes",
    )
    rules.must(
        asked["N"] == given["N"],
        f"input and out_backprop must have the same batch size. Input batch: {asked['N']}, outbackprop batch: "
        f"{given['N']}, batch_dim: 0",
    )


def _require_size(rules: Rules, at: int, size: int, reach: int, stride: int, out: int, padding: str) -> None:
    """The forward convolution must lead from ``out`` back to ``size``."""
    forward = -(-out // stride) if padding == "SAME" else -(-(out - reach + 1) // stride)
    rules.strictly(
        forward == size,
        f"Conv3DBackpropInputOp: Size of out_backprop doesn't match computed: actual = {size}, computed = {forward} "
        f"spatial_dim: {at + 1} input: {out} filter: {reach} output: {size} stride: {stride}",
    )
