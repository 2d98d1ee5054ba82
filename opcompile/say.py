"""A spec in other systems' words: calls that are ready to paste, the likeliest to be exact first.

What a call computes is not said here: `opcompile.diff` gives the very text to that system's importer. In the
texts X is ``x``, W as the system stores it ``w``, B ``b``. Activations are left out: they follow the sum in
every system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcompile.errors import WordsError
from opcompile.spec import Axis, ConvTranspose3d


@dataclass(frozen=True, slots=True)
class System:
    """A system that can be asked in words.

    ``calls`` writes a spec as calls; ``layout`` is that of its x and y (None: the spec's own); ``order`` the
    order of its w's axes; ``adds_bias``: its call has no bias, so that one is added to its output.
    """

    name: str
    calls: Callable[[ConvTranspose3d], Iterator[str]]
    layout: str | None = None
    order: str = "CMDHW"
    adds_bias: bool = False


# --- words that several systems share ---


def several(values: Sequence[int], form: str) -> str:
    """Write three values, equal ones as one."""
    return str(values[0]) if len(set(values)) == 1 else form.format(", ".join(str(n) for n in values))


def keywords(given: Mapping[str, Any], defaults: Mapping[str, Any], form: str = "({})") -> str:
    """Write what differs from the defaults as keyword arguments, as Python or, for ``c({})``, as R does."""
    said = []
    for name, value in given.items():
        is_triple = isinstance(value, (list, tuple))
        if (value[0] if is_triple and len(set(value)) == 1 else value) != defaults[name]:
            text = several(value, form) if is_triple else repr(value)
            said.append(f", {name}={text}" if form == "({})" else f", {name} = {text}")
    return "".join(said)


def _reach(axis: Axis) -> int:
    return axis.dilation * (axis.kernel - 1) + 1


# --- PyTorch's formula: PyTorch, MLX, Rmlx, Lucid ---

DEFAULTS = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}


def _symmetric(spec: ConvTranspose3d, form: str = "({})") -> Iterator[str]:
    """Yield keyword arguments: those that begin where the spec begins, then those with all that it keeps."""
    begins = [axis.begin for axis in spec.axes]
    ends = [axis.full - axis.begin - axis.out for axis in spec.axes]
    both = [max(0, min(b, e)) for b, e in zip(begins, ends, strict=True)]
    for padding, extra in (
        (begins, [max(0, b - e) for b, e in zip(begins, ends, strict=True)]),
        (both, [max(0, p - e) for p, e in zip(both, ends, strict=True)]),
    ):
        words = {
            "stride": [a.stride for a in spec.axes],
            "padding": padding,
            "output_padding": extra,
            "groups": spec.groups,
            "dilation": [a.dilation for a in spec.axes],
        }
        yield keywords(words, DEFAULTS, form)


def _torch(spec: ConvTranspose3d) -> Iterator[str]:
    for words in _symmetric(spec):
        yield f"F.conv_transpose3d(x, w{', b' if spec.bias else ''}{words})"


def _mlx(spec: ConvTranspose3d) -> Iterator[str]:
    for words in _symmetric(spec):
        yield f"mx.conv_transpose3d(x, w{words})"


def _rmlx(spec: ConvTranspose3d) -> Iterator[str]:
    for words in _symmetric(spec, "c({})"):
        yield f"mlx_conv_transpose3d(x, w{words})"


# --- "same" and "valid": Keras, TensorFlow, JAX ---


def _require_one_group(spec: ConvTranspose3d) -> None:
    if spec.groups != 1:
        raise WordsError(f"it has no groups, but the layer has {spec.groups}")


_KERAS_DEFAULTS = {
    "strides": 1,
    "padding": "valid",
    "output_padding": None,
    "dilation_rate": 1,
    "use_bias": True,
    "data_format": "channels_last",
    "activation": None,
}


def keras_words(spec: ConvTranspose3d, form: str = "({})", more: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Yield arguments of ``Conv3DTranspose`` that may mean ``spec``, with ``more``. Raises `WordsError` for groups."""
    _require_one_group(spec)
    same = [a.out - (a.size - 1) * a.stride - _reach(a) % 2 for a in spec.axes]
    valid = [a.out + a.begin - (a.size - 1) * a.stride - _reach(a) for a in spec.axes]
    said = [("same", None), ("valid", None), ("same", same), ("valid", [max(0, n) for n in valid])]
    for padding, extra in said:
        if extra is not None and min(extra) < 0:
            continue
        words = {
            "strides": [a.stride for a in spec.axes],
            "padding": padding,
            "output_padding": extra,
            "dilation_rate": [a.dilation for a in spec.axes],
            "use_bias": spec.bias,
            **(more or {}),
        }
        kernel = several([a.kernel for a in spec.axes], form)
        yield f"{spec.channels_out}, {kernel}{keywords(words, _KERAS_DEFAULTS, form)}"


def _keras(spec: ConvTranspose3d) -> Iterator[str]:
    for words in keras_words(spec):
        yield f"keras.layers.Conv3DTranspose({words})(x)"


def _r_keras(spec: ConvTranspose3d) -> Iterator[str]:
    for words in keras_words(spec, "c({})"):
        yield f"layer_conv_3d_transpose(x, {words})".replace("= False", "= FALSE").replace("'", '"')


def _tensorflow(spec: ConvTranspose3d) -> Iterator[str]:
    _require_one_group(spec)
    strides = several([a.stride for a in spec.axes], "({})")
    more = keywords({"dilations": [a.dilation for a in spec.axes]}, {"dilations": 1})
    asked, covering = [a.out for a in spec.axes], [max(a.full, a.begin + a.out) for a in spec.axes]
    for padding, outs in (("SAME", asked), ("VALID", asked), ("VALID", covering)):
        shape = (spec.batch, *outs, spec.channels_out)
        yield f"tf.nn.conv3d_transpose(x, w, {shape}, {strides}, '{padding}'{more})"


def _jax(spec: ConvTranspose3d) -> Iterator[str]:
    _require_one_group(spec)
    numbers = f"dimension_numbers=({spec.layout!r}, 'OIDHW', {spec.layout!r}), transpose_kernel=True"
    lows = [_reach(a) - 1 - a.begin for a in spec.axes]
    highs = [a.out - (a.size - 1) * a.stride - 2 + _reach(a) - low for a, low in zip(spec.axes, lows, strict=True)]
    dilation = tuple(a.dilation for a in spec.axes)
    more = "" if dilation == (1, 1, 1) else f", rhs_dilation={dilation}"
    strides = tuple(a.stride for a in spec.axes)
    yield f"lax.conv_transpose(x, w, {strides}, {tuple(zip(lows, highs, strict=True))}{more}, {numbers})"


SYSTEMS = (
    System("PyTorch", _torch, "NCDHW"),
    System("MLX", _mlx, "NDHWC", "MDHWC", adds_bias=True),
    System("Rmlx", _rmlx, "NDHWC", "MDHWC", adds_bias=True),
    System("Lucid 2", _torch, "NCDHW"),
    System("Lucid 3", _torch, "NCDHW"),
    System("Keras", _keras, "NDHWC", "DHWMC"),
    System("R keras3", _r_keras, "NDHWC", "DHWMC"),
    System("TensorFlow", _tensorflow, "NDHWC", "DHWMC", adds_bias=True),
    System("JAX", _jax, None, adds_bias=True),
)


# --- ONNX and OpenVINO: every pad has its own number, so that they say any layer ---


def onnx_attributes(spec: ConvTranspose3d, auto_pad: str | None = None) -> dict[str, Any]:
    """Return the attributes of a ConvTranspose node; with ``auto_pad`` it is that which places the output."""
    pads = [*(a.pad[0] for a in spec.axes), *(a.pad[1] for a in spec.axes)]
    placed = {"pads": pads, "output_padding": [a.output_pad for a in spec.axes]}
    attributes = {
        "strides": [a.stride for a in spec.axes],
        **({"auto_pad": auto_pad} if auto_pad else placed),
        "dilations": [a.dilation for a in spec.axes],
        "group": spec.groups,
    }
    plain = {"strides": [1] * 3, "pads": [0] * 6, "output_padding": [0] * 3, "dilations": [1] * 3, "group": 1}
    return {name: value for name, value in attributes.items() if value != plain.get(name)}


def onnx_call(spec: ConvTranspose3d, auto_pad: str | None = None) -> str:
    """Return such a node as ``onnx.helper`` makes it."""
    inputs = '["x", "w", "b"]' if spec.bias else '["x", "w"]'
    words = "".join(f", {name}={value!r}" for name, value in onnx_attributes(spec, auto_pad).items())
    return f'helper.make_node("ConvTranspose", {inputs}, ["y"]{words})'


def openvino_call(spec: ConvTranspose3d) -> str:
    """Return the call of OpenVINO's opset, whose w is that of `openvino_weight`."""
    name = "convolution_backprop_data" if spec.groups == 1 else "group_convolution_backprop_data"
    words = {
        "strides": [a.stride for a in spec.axes],
        "pads_begin": [a.pad[0] for a in spec.axes],
        "pads_end": [a.pad[1] for a in spec.axes],
        "dilations": [a.dilation for a in spec.axes],
        "output_padding": [a.output_pad for a in spec.axes],
    }
    return f"opset.{name}(x, w, " + ", ".join(f"{key}={value}" for key, value in words.items()) + ")"


def openvino_weight(spec: ConvTranspose3d) -> str:
    """Return W as that call takes it: with groups these stand in front, (g, C/g, M/g, kD, kH, kW)."""
    return "w" if spec.groups == 1 else f"w.reshape({spec.groups}, -1, *w.shape[1:])"
