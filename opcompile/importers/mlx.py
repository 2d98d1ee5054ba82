"""MLX's words: ``mlx.core.conv_transpose3d`` and ``mlx.nn.ConvTranspose3d``, of MLX 0.32.

NDHWC, and W ``(C_out, kD, kH, kW, C_in)``: a permutation of ours, without a flip. Its output_padding and its
paddings are not checked: any that leaves an output is computed, negative ones too. A padding beyond
``dilation*(kernel-1)`` takes whole elements off the input, so that it crops stride times as much as PyTorch's.
Groups are refused in 3-D; with ``strict=False`` they mean what they mean to its 1-D and 2-D calls, with W
``(C_out, kD, kH, kW, C_in/groups)``.
"""

from __future__ import annotations

from typing import Any

from opcompile.errors import WordsError
from opcompile.importers.imported import (
    Imported,
    Rules,
    Triple,
    WeightOrder,
    cropped,
    is_kind,
    kind_name,
    promoted,
    repeated,
    shape_of,
    single_of,
    symmetric,
    weight_shape_of,
    whole,
)
from opcompile.spec import ConvTranspose3d as Spec

SYSTEM = "MLX"
ORDER = WeightOrder("MDHWC", shared="C")


def conv_transpose3d(
    input: Any,
    weight: Any,
    /,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    output_padding: Any = 0,
    groups: int = 1,
    *,
    stream: Any = None,
    bias: bool = False,
    dtype: str | None = None,
    strict: bool = True,
) -> Imported:
    """Read a call of ``mlx.core.conv_transpose3d``; arrays may be given by their shapes.

    MLX's call has no bias; with ``bias`` the layer takes one, as MLX's module adds it. Arrays of two dtypes
    are promoted as MLX does, and NumPy's float64 counts as float32, which ``mx.array`` makes of it. Raises
    `WordsError` where MLX refuses.
    """
    rules = Rules(SYSTEM, strict)
    x, w = shape_of(input), weight_shape_of(weight)
    words = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
    s, p, d, op = (_triple(rules, name, value) for name, value in words.items())
    groups = _count(rules, "groups", groups)
    _require(rules, x, w, groups, s, d)
    channels_in, channels_out, kernel = ORDER.sizes(w, groups)
    places = [_place(*axis) for axis in zip(x[1:4], kernel, s, p, d, op, strict=True)]
    outs = tuple(out for _, out in places)
    rules.must(
        min(outs) > 0,
        "[conv] Spatial dimensions of input after padding cannot be smaller than weight spatial dimensions. "
        f"The output would be {outs}",
    )
    if all(0 <= pad <= e * (k - 1) and extra >= 0 for k, e, pad, extra in zip(kernel, d, p, op, strict=True)):
        axes, zeros = symmetric(x[1:4], kernel, s, p, op, d)
    else:
        axes, zeros = cropped(x[1:4], kernel, s, d, [begin for begin, _ in places], outs)
    spec = Spec(
        batch=x[0],
        channels_in=channels_in,
        channels_out=channels_out,
        axes=axes,
        groups=groups,
        bias=bias,
        dtype=dtype or promoted(*(single_of(a) for a in (input, weight) if hasattr(a, "dtype"))),
        layout="NDHWC",
    )
    remarks = (f"stream={stream} says where MLX would run it",) if stream is not None else ()
    return Imported(SYSTEM, spec, ORDER, "NDHWC", "NDHWC", zeros, remarks=remarks).holding(weight)


def ConvTranspose3d(
    in_channels: int,
    out_channels: int,
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    output_padding: Any = 0,
    bias: bool = True,
    *,
    input: Any,
    dtype: str | None = None,
    strict: bool = True,
) -> Imported:
    """Read the constructor of ``mlx.nn.ConvTranspose3d``, for an ``input`` or its shape. Raises as above."""
    rules = Rules(SYSTEM, strict)
    kernel = _triple(rules, "kernel_size", kernel_size)
    weight = (_count(rules, "out_channels", out_channels), *kernel, _count(rules, "in_channels", in_channels))
    rules.must(min(weight) >= 0, f"Negative dimensions not allowed. Got {weight}.")
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
    named = dtype or promoted(single_of(input), "float32")
    return conv_transpose3d(shape_of(input), weight, **geometry, bias=bool(bias), dtype=named, strict=strict)


def from_module(module: Any, input: Any, *, strict: bool = True) -> Imported:
    """Read an ``mlx.nn.ConvTranspose3d`` with its weights, for an ``input`` or its shape. Raises as above."""
    if not is_kind(type(module), "ConvTranspose3d", "mlx.nn"):
        raise WordsError(f"{kind_name(module)} is not an mlx.nn.ConvTranspose3d; name the layer inside of it")
    geometry = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "output_padding")}
    bias = module.get("bias")
    read = conv_transpose3d(
        shape_of(input),
        module.weight.shape,
        **geometry,
        bias=bias is not None,
        dtype=promoted(*(single_of(a) for a in (input, module.weight) if hasattr(a, "dtype"))),
        strict=strict,
    )
    return read.with_weights(module.weight, bias)


def _place(size: int, kernel: int, stride: int, pad: int, dilation: int, extra: int) -> tuple[int, int]:
    """Return where the output begins in the full one, and its size.

    MLX pads the stuffed input with ``reach - pad`` zeros; where that is negative, it slices the input instead.
    """
    reach = dilation * (kernel - 1)
    low, high = reach - pad, reach - pad + extra
    off, rest = max(0, -low), size - max(0, -low) - max(0, -high)
    if rest < 1:
        return 0, 0
    return off * stride + reach - max(0, low), (rest - 1) * stride + 1 + max(0, low) + max(0, high) - reach


def _triple(rules: Rules, name: str, value: Any) -> Triple:
    """Return one value three times, or three. Raises `WordsError` as MLX's binding does."""
    given = repeated(value) or ()
    rules.must(
        len(given) == 3,
        f"conv_transpose3d(): incompatible function arguments: {name}={value!r}, "
        f"but {name} is int | tuple[int, int, int]",
    )
    a, b, c = given
    return a, b, c


def _count(rules: Rules, name: str, value: Any) -> int:
    found = whole(value)
    rules.must(
        found is not None, f"conv_transpose3d(): incompatible function arguments: {name}={value!r}, but {name} is int"
    )
    return found or 0


def _require(rules: Rules, x: tuple[Any, ...], w: tuple[int, ...], groups: int, s: Triple, d: Triple) -> None:
    for what, shape, form in (("input", x, "[N, ..., C_in]"), ("weight", w, "[C_out, ..., C_in]")):
        rules.must(
            len(shape) == 5,
            f"[conv] Invalid {what} array with {len(shape)} dimensions for 3D convolution. "
            f"Expected an array with 5 dimensions following the format {form}.",
        )
    rules.must(min(s) > 0, f"[conv] Input dilation sizes must be positive. Got input dilation {_row(s)}.")
    rules.must(min(d) > 0, f"[conv] Kernel dilation sizes must be positive. Got kernel dilation {_row(d)}.")
    rules.must(groups > 0, "[conv] Can only handle groups != 1 in 1D or 2D convolutions.")
    rules.strictly(groups == 1, "[conv] Can only handle groups != 1 in 1D or 2D convolutions.")
    rules.must(
        x[4] == w[4] * groups,
        "[conv] Expect the input channels in the input and weight array to match but got shapes - "
        f"input: {_row(x)} and weight: {_row(w)}",
    )


def _row(values: tuple[Any, ...]) -> str:
    return "(" + ",".join(str(n) for n in values) + ")"
