"""JAX's words: ``jax.lax.conv_transpose``, of JAX 0.10, as a list of arguments.

Two traps. Without ``transpose_kernel`` the taps run backwards (W reversed along every axis, against every other
system here); with it, I and O of W change places as well. And explicit padding is that of the stuffed input,
``reach - 1 - padding`` of everybody else's, unless ``use_consistent_padding`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from opcompile.errors import SpecError, WordsError
from opcompile.importers.imported import (
    Imported,
    Rules,
    Triple,
    WeightOrder,
    cropped,
    dtype_of,
    promoted,
    shape_of,
    single_of,
    weight_shape_of,
    whole,
    whole_numbers,
)
from opcompile.spec import ConvTranspose3d as Spec

SYSTEM = "JAX"
_DEFAULT = ("NHWDC", "HWDIO", "NHWDC")


def conv_transpose(
    lhs: Any,
    rhs: Any,
    strides: Sequence[int],
    padding: Any,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    transpose_kernel: bool = False,
    precision: Any = None,
    preferred_element_type: Any = None,
    use_consistent_padding: bool = False,
    *,
    bias: bool = False,
    dtype: str | None = None,
    strict: bool = True,
) -> Imported:
    """Read a call of ``jax.lax.conv_transpose`` on 5-D arrays, which may be given by their shapes.

    The three spatial letters may be any; their order in W is that of the strides, and is our D, H, W. JAX's
    call has no bias; with ``bias`` the layer takes one. NumPy's float64 counts as float32, which JAX makes of
    it by default; JAX's own arrays keep theirs. Raises `WordsError` where JAX refuses.
    """
    rules = Rules(SYSTEM, strict)
    x, w = shape_of(lhs), weight_shape_of(rhs)
    dtypes = [single_of(a) for a in (lhs, rhs) if hasattr(a, "dtype")]
    rules.must(
        len(set(dtypes)) < 2,
        f"lax.conv_general_dilated requires arguments to have the same dtypes, got {', '.join(dtypes)}.",
    )
    rules.must(len(x) == len(w) == 5, f"lhs and rhs have the shapes {x} and {w}, but a 3-D call takes 5-D arrays")
    x_layout, kernel_axes, y_layout = _letters(rules, dimension_numbers, len(x))
    order = WeightOrder(_kernel_letters(kernel_axes, transpose_kernel), flipped=not transpose_kernel)
    channels_in, channels_out, kernel = order.sizes(w, 1)
    rules.must(hasattr(strides, "__len__"), f"object of type '{type(strides).__name__}' has no len()")
    s = _triple(rules, "strides", strides)
    d = _triple(rules, "rhs_dilation", (1, 1, 1) if rhs_dilation is None else rhs_dilation)
    sizes = dict(zip(x_layout, x, strict=True))
    rules.must(
        sizes["C"] == channels_in,
        "conv_general_dilated lhs feature dimension size divided by feature_group_count must equal the rhs input "
        f"feature dimension size, but {sizes['C']} // 1 != {channels_in}.",
    )
    spatial = [sizes[letter] for letter in "DHW"]
    for n in (*spatial, channels_in):
        if not isinstance(n, int):
            raise SpecError(f"lhs has the shape {x}; only the batch may be dynamic, so give the other sizes")
    reach = [e * (k - 1) + 1 for k, e in zip(kernel, d, strict=True)]
    pads = _pads(rules, padding, reach, s, use_consistent_padding)
    stuffed = [(i - 1) * a + 1 for i, a in zip(spatial, s, strict=True)]
    rules.must(
        all(n + low + high >= 0 for n, (low, high) in zip(stuffed, pads, strict=True)),
        f"Negative padding is larger than the size of the corresponding dimension: got padding={pads} for "
        f"lhs_shape[2:]={stuffed}",
    )
    begins = [r - 1 - low for r, (low, _) in zip(reach, pads, strict=True)]
    outs = [(i - 1) * a + 2 + low + high - r for i, a, r, (low, high) in zip(spatial, s, reach, pads, strict=True)]
    axes, zeros = cropped(spatial, kernel, s, d, begins, outs)
    spec = Spec(
        batch=sizes["N"],
        channels_in=channels_in,
        channels_out=channels_out,
        axes=axes,
        bias=bias,
        dtype=dtype_of(dtype or (dtypes[0] if dtypes else None)),
        layout="NDHWC" if x_layout == "NDHWC" else "NCDHW",
    )
    if preferred_element_type is not None:
        _require_result(spec.dtype, dtype_of(preferred_element_type))
    remarks = () if precision is None else (f"precision={precision} has no effect here",)
    return Imported(SYSTEM, spec, order, x_layout, y_layout, zeros, remarks=remarks).holding(rhs)


def _require_result(have: str, wanted: str) -> None:
    """Raise `WordsError` where Y would have another dtype than X and W: rounded, or infinite, where JAX's is not."""
    if wanted == have:
        return
    way_out = f"compute in {have}, and cast the output"
    if promoted(have, wanted) == wanted:
        way_out = f"cast x and w to {wanted} first, which is exact, or give dtype={wanted!r} with their shapes"
    raise WordsError(
        f"preferred_element_type={wanted} gives inputs of {have} an output of {wanted}, but opcompile computes a "
        f"layer in one dtype; {way_out}"
    )


# --- dimension numbers -> our letters ---


def _letters(rules: Rules, numbers: Any, rank: int) -> tuple[str, str, str]:
    """Return the layouts of X, W and Y; spatial letters become D, H, W in the order they have in W."""
    given = _DEFAULT if numbers is None else _spelled(rules, numbers)
    rules.must(len(given) == 3, f"convolution dimension_numbers list/tuple must be length 3, got {len(given)}.")
    for at, (text, (a, b)) in enumerate(zip(given, (("N", "C"), ("O", "I"), ("N", "C")), strict=True)):
        rules.must(
            len(text) == rank,
            f"convolution dimension_numbers[{at}] must have len equal to the ndim of lhs and rhs, got {len(text)}",
        )
        rules.must(
            text.count(a) == text.count(b) == 1,
            f"convolution dimension_numbers[{at}] must contain the characters '{a}' and '{b}' exactly once, "
            f"got {text}.",
        )
        rules.must(
            len(set(text)) == len(text),
            f"convolution dimension_numbers[{at}] cannot have duplicate characters, got {text}.",
        )
    spatial = [letter for letter in given[1] if letter not in "OI"]
    rules.must(
        set(given[0]) - set("NC") == set(spatial) == set(given[2]) - set("NC"),
        f"convolution dimension_numbers elements must each have the same set of spatial characters, got {given}.",
    )
    ours = dict(zip(spatial, "DHW", strict=True))
    x, w, y = ("".join(ours.get(letter, letter) for letter in text) for text in given)
    return x, w, y


def _spelled(rules: Rules, numbers: Any) -> tuple[str, ...]:
    """Return a ``ConvDimensionNumbers`` (positions of batch, feature, spatial) as letters; others as they are."""
    if not hasattr(numbers, "lhs_spec"):
        kind = type(numbers).__name__
        rules.must(isinstance(numbers, (tuple, list)), f"convolution dimension_numbers must be tuple/list, got {kind}.")
        rules.must(
            all(isinstance(text, str) for text in numbers),
            f"convolution dimension_numbers elements must be strings, got {tuple(type(text) for text in numbers)}.",
        )
        return tuple(numbers)
    specs = [numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec]
    texts = []
    for positions, letters in zip(specs, ("NCDHW", "OIDHW", "NCDHW"), strict=True):
        by_position = dict(zip(positions, letters, strict=True))
        texts.append("".join(by_position[at] for at in range(len(positions))))
    return tuple(texts)


def _kernel_letters(axes: str, transposed: bool) -> str:
    return axes.translate(str.maketrans("OI", "CM" if transposed else "MC"))


# --- paddings ---


def _triple(rules: Rules, name: str, values: Any) -> Triple:
    rules.must(whole(values) is None, f"'{type(values).__name__}' object is not iterable")
    found = whole_numbers(values)
    rules.must(found is not None, f"{name} is {values!r}, but must be a sequence of ints")
    given = found or ()
    rules.must(len(given) == 3, f"Wrong number of explicit pads for convolution: expected 3, got {len(given)}.")
    rules.must(min(given) > 0, f"All dilations must be positive, got {given}.")
    a, b, c = given
    return a, b, c


def _pads(rules: Rules, padding: Any, reach: Sequence[int], strides: Triple, consistent: bool) -> list[tuple[int, int]]:
    """Return the zeros (low, high) around the stuffed input."""
    if isinstance(padding, str):
        return _by_name(rules, padding, reach, strides, consistent)
    pairs = [whole_numbers(pair) or () for pair in padding] if _is_iterable(padding) else [()]
    rules.must(
        all(len(pair) == 2 for pair in pairs),
        "padding argument to conv_general_dilated should be a string or a sequence of (low, high) pairs, "
        f"got {padding}",
    )
    rules.must(len(pairs) == 3, f"Wrong number of explicit pads for convolution: expected 3, got {len(pairs)}.")
    if consistent:
        rules.must(all(isinstance(pair, tuple) for pair in padding), f"Invalid padding mode: {padding[0]}")
        return [(r - 1 - low, r - 1 - high) for r, (low, high) in zip(reach, pairs, strict=True)]
    return [(low, high) for low, high in pairs]


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) and whole(value) is None


def _by_name(
    rules: Rules, padding: str, reach: Sequence[int], strides: Triple, consistent: bool
) -> list[tuple[int, int]]:
    """Return the zeros of a padding string. At strides of 1 JAX passes unknown ones on to its plain convolution."""
    if padding in ("SAME", "VALID"):
        return [_named(padding, r, s) for r, s in zip(reach, strides, strict=True)]
    rules.must(not consistent, f"Invalid padding mode: {padding}")
    rules.must(
        max(strides) == 1,
        f"String padding is not implemented for transposed convolution using this op, got {padding}; "
        "say 'SAME', 'VALID' or (low, high) pairs",
    )
    word = padding.upper()
    rules.must(
        word in ("SAME", "SAME_LOWER", "VALID"),
        f"Unrecognized padding type: expected 'VALID', 'SAME', or 'SAME_LOWER', got {padding}.",
    )
    totals = [0 if word == "VALID" else r - 1 for r in reach]
    pairs = [(total // 2, total - total // 2) for total in totals]
    return [(high, low) for low, high in pairs] if word == "SAME_LOWER" else pairs


def _named(padding: str, reach: int, stride: int) -> tuple[int, int]:
    total = reach + stride - 2 + (max(reach - stride, 0) if padding == "VALID" else 0)
    low = reach - 1 if padding == "VALID" or stride > reach - 1 else -(-total // 2)
    return low, total - low
