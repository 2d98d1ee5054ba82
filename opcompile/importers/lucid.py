"""Lucid's words: ``lucid.nn.ConvTranspose3d`` and ``F.conv_transpose3d``, of Lucid 2 and 3.

Its operator is ours, as PyTorch's is. Lucid 2 takes the padding strings "same" (symmetric, ``dilation *
(kernel-1) // 2``, so that the output is not ``size * stride``) and "valid" (none) in the layer, and wants
``0 <= output_padding < stride`` and no padding beyond ``dilation*(kernel-1)``. Lucid 3 takes no strings, no
groups and no dilation.
The messages are those of Lucid 2.8.5. (The "stride=2" example of the functional's page says that
(1, 1, 3, 3, 3) comes out; its own formula, its code and this module give (1, 1, 2, 2, 2).)
"""

from __future__ import annotations

from typing import Any

from opcompile.errors import WordsError
from opcompile.importers.imported import (
    Imported,
    Rules,
    Triple,
    WeightOrder,
    dtype_of,
    is_kind,
    kind_name,
    promoted,
    repeated,
    shape_of,
    symmetric,
    weight_shape_of,
    whole,
)
from opcompile.spec import ConvTranspose3d as Spec

SYSTEM = "Lucid"
ORDER = WeightOrder()
VERSIONS = (2, 3)


def conv_transpose3d(
    input_: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    version: int = 2,
    dtype: str | None = None,
    strict: bool = True,
) -> Imported:
    """Read a call of ``lucid.nn.functional.conv_transpose3d``; tensors may be given by their shapes.

    ``input_`` is (N, C, D, H, W); ``bias`` may also be True. ``version`` is Lucid's, 2 or 3. Tensors of two
    dtypes are promoted, as Lucid does. Raises `WordsError` where that Lucid refuses.
    """
    rules = _rules(version, strict)
    x, w = shape_of(input_), weight_shape_of(weight)
    rules.must(len(x) == 5, f"expected 5D input, got {len(x)}D")
    rules.must(len(w) == 5, f"output_padding length must be {len(w) - 2}, got 3")
    rules.must(not isinstance(padding, str), "string padding is not supported by conv_transpose3d; the layer takes it")
    words = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    s, p, op, d = (_triple(rules, name, value) for name, value in words.items())
    rules.must(min(s) > 0, f"stride is {s}, but must be positive")
    rules.must(min(d) > 0, f"dilation is {d}, but must be positive")
    for at, (o, a) in enumerate(zip(op, s, strict=True)):
        rules.strictly(0 <= o < a or version == 3, f"output_padding[{at}] must be in range [0, {a}), got {o}")
    rules.must(x[1] == w[0], "Weight's first dimension must match input channels.")
    groups = _count(rules, "groups", groups)
    rules.must(groups > 0, "groups must be a positive integer.")
    rules.must(w[0] % groups == 0, "Input channels must be divisible by groups.")
    rules.strictly(groups == 1 or version == 2, "conv_transpose3d supports groups=1 only")
    rules.strictly(max(d) == 1 or version == 2, "conv_transpose3d supports dilation=1 only")
    _require_bias(rules, bias, w[1] * groups)
    _require_output(rules, x[2:], w[2:], s, p, op, d)
    rules.strictly(
        all(pad <= e * (k - 1) for k, pad, e in zip(w[2:], p, d, strict=True)) or version == 3,
        f"index can't contain negative values: padding {p} exceeds dilation*(kernel-1)",
    )
    axes, zeros = symmetric(x[2:], w[2:], s, p, op, d)
    has_bias = bias is not None and bias is not False
    arrays = [a for a in (input_, weight, bias) if hasattr(a, "dtype")]
    named = dtype or promoted(*(dtype_of(None, a) for a in arrays))
    spec = Spec(x[0], w[0], w[1] * groups, axes, groups, has_bias, dtype=named)
    return Imported(rules.system, spec, ORDER, "NCDHW", "NCDHW", zeros).holding(weight, bias)


def ConvTranspose3d(
    in_channels: int,
    out_channels: int,
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    bias: bool = True,
    *,
    input: Any,
    version: int = 2,
    dtype: str | None = None,
    strict: bool = True,
) -> Imported:
    """Read the constructor of ``lucid.nn.ConvTranspose3d``, for an ``input`` or its shape. Raises as above."""
    rules = _rules(version, strict)
    counts = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
    in_channels, out_channels, groups = (_count(rules, name, value) for name, value in counts.items())
    rules.must(groups > 0, "groups must be a positive integer.")
    rules.must(in_channels % groups == 0, "in_channels must be divisible by groups.")
    rules.must(out_channels % groups == 0, "out_channels must be divisible by groups.")
    kernel = _triple(rules, "kernel_size", kernel_size)
    if isinstance(padding, str):
        rules.must(padding in ("same", "valid"), f"Unknown padding string: {padding}")
        rules.strictly(version == 2, "string padding is not supported")
        spread = _triple(rules, "dilation", dilation)
        padding = tuple(d * (k - 1) // 2 if padding == "same" else 0 for k, d in zip(kernel, spread, strict=True))
    weight = (in_channels, out_channels // groups, *kernel)
    words = (stride, padding, output_padding, dilation, groups)
    named = dtype or promoted(dtype_of(None, input), "float32")
    return conv_transpose3d(shape_of(input), weight, bool(bias), *words, version=version, dtype=named, strict=strict)


def from_module(module: Any, input: Any, *, strict: bool = True) -> Imported:
    """Read a ``lucid.nn.ConvTranspose3d`` with its weights, for an ``input`` or its shape. Raises as above."""
    if not is_kind(type(module), "ConvTranspose3d", "lucid.nn"):
        raise WordsError(f"{kind_name(module)} is not a lucid.nn.ConvTranspose3d; name the layer inside of it")
    geometry = (module.stride, module.padding, module.output_padding, module.dilation, module.groups)
    return conv_transpose3d(input, module.weight, module.bias, *geometry, strict=strict)


def _rules(version: int, strict: bool) -> Rules:
    if version not in VERSIONS:
        raise WordsError(f"Lucid's version is {version!r}, but must be 2 or 3")
    return Rules(f"{SYSTEM} {version}", strict)


def _triple(rules: Rules, name: str, value: Any) -> Triple:
    given = repeated(value)
    rules.must(given is not None, f"{name} is {value!r}, but must be int | tuple[int, int, int]")
    given = given or ()
    rules.must(len(given) == 3, f"{name} length must be 3, got {len(given)}")
    a, b, c = given
    return a, b, c


def _count(rules: Rules, name: str, value: Any) -> int:
    found = whole(value)
    rules.must(found is not None, f"{name} is {value!r}, but must be int")
    return found or 0


def _require_bias(rules: Rules, bias: Any, channels: int) -> None:
    if bias is None or isinstance(bias, bool):
        return
    size = shape_of(bias)
    rules.must(size == (channels,), f"cannot reshape a bias of shape {size} into shape (1,{channels},1,1,1)")


def _require_output(rules: Rules, x: Any, k: Any, s: Triple, p: Triple, op: Triple, d: Triple) -> None:
    for at, (i, n, a, b, c, e) in enumerate(zip(x, k, s, p, op, d, strict=True)):
        out = (i - 1) * a - 2 * b + e * (n - 1) + c + 1
        rules.must(out > 0, f"Non-positive output dim for axis {at}: {out}")
