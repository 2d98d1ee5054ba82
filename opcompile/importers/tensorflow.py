"""TensorFlow's words: ``tf.nn.conv3d_transpose``, of TensorFlow 2.21, as a list of arguments.

W is ``(kD, kH, kW, M, C)``: a permutation of ours, without a flip. The size is said outright, by
``output_shape``; "SAME" crops ``max(full - out, 0) // 2`` at the low side, "VALID" nothing. The kernels for
CPUs compute NDHWC without dilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opcompile.errors import SpecError
from opcompile.importers.imported import Imported, Rules, Triple, WeightOrder, cropped, dtype_of, shape_of
from opcompile.spec import ConvTranspose3d as Spec

SYSTEM = "TensorFlow"
ORDER = WeightOrder("DHWMC")
_LAYOUTS = ("NDHWC", "NCDHW")


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

    TensorFlow's call has no bias; with ``bias`` the layer takes one. Raises `WordsError` where TensorFlow
    refuses on a CPU.
    """
    rules = Rules(SYSTEM, strict)
    x, w, y = shape_of(input), shape_of(filters), tuple(output_shape)
    _require_words(rules, padding, data_format)
    for what, shape in (("input", y), ("out_backprop", x), ("filter", w)):
        rules.must(len(shape) == 5, f"{what} tensor must have 5 dimensions")
    s, d = _triple(rules, "strides", strides, data_format), _triple(rules, "dilations", dilations or 1, data_format)
    rules.must(min(s) > 0, f"Stride must be > 0, but got {min(s)}")
    rules.must(min(d) > 0, f"Dilated rates should be larger than 0, but got {min(d)}")
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
        dtype=dtype_of(dtype, input, filters),
        layout=data_format,
    )
    remarks = ("TensorFlow computes NCDHW on GPUs only",) if data_format == "NCDHW" else ()
    return Imported(SYSTEM, spec, ORDER, data_format, data_format, zeros, remarks=remarks).holding(filters)


def _require_words(rules: Rules, padding: Any, data_format: Any) -> None:
    rules.must(
        padding in ("SAME", "VALID"),
        f'Value for attr \'padding\' of "{padding}" is not in the list of allowed values: "SAME", "VALID"',
    )
    rules.must(
        data_format in _LAYOUTS,
        f'Value for attr \'data_format\' of "{data_format}" is not in the list of allowed values: "NDHWC", "NCDHW"',
    )


def _triple(rules: Rules, name: str, value: Any, layout: str) -> Triple:
    """Return one value three times, three, or the three of five that are not N and C."""
    given = [value] if isinstance(value, int) else list(value)
    rules.must(
        len(given) in (1, 3, 5),
        f"{name} should be of length 1, 3 or 5. Received: {name}={given} of length {len(given)}",
    )
    if len(given) == 5:
        by_letter = dict(zip(layout, given, strict=True))
        rules.must(
            by_letter["N"] == by_letter["C"] == 1,
            f"Current implementation does not yet support {name} in the batch and depth dimensions.",
        )
        given = [by_letter[letter] for letter in "DHW"]
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
