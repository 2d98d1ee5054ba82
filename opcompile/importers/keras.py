"""Keras 3's words: ``Conv3DTranspose``, and ``layer_conv_3d_transpose`` of R's keras3; Keras 3.15.

W is ``(kD, kH, kW, filters, C)``: a permutation of ours, without a flip. Sizes follow Keras's own formulas,
which all its backends compute: "valid" begins at the first element of the full output; "same" aims at
``size * stride``, and crops the smaller half at the low side. So "same" with an odd kernel and stride 2 has
the shape that PyTorch gives with padding and output_padding, one voxel further along.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from opcompile.errors import EngineError, ModelError, OpcompileError, SpecError, WordsError, first_words
from opcompile.importers.imported import (
    Found,
    Imported,
    Rules,
    Triple,
    WeightOrder,
    cropped,
    dtype_of,
    is_kind,
    kind_name,
    repeated,
    shape_of,
    unique,
    whole,
)
from opcompile.say import keras_words
from opcompile.spec import Activation, require_layer
from opcompile.spec import ConvTranspose3d as Spec

SYSTEM = "Keras"
ORDER = WeightOrder("DHWMC")

# Keras's elementwise activations with their defaults -> ours
ACTIVATIONS = {
    "linear": "none",
    "relu": "relu",
    "relu6": "relu6",
    "leaky_relu": "leaky_relu:0.2",
    "elu": "elu",
    "celu": "elu",
    "selu": "selu",
    "gelu": "gelu",
    "sigmoid": "sigmoid",
    "hard_sigmoid": "hard_sigmoid",
    "sparse_sigmoid": "hard_sigmoid:0.5:0.5",
    "silu": "silu",
    "swish": "silu",
    "hard_silu": "hard_silu",
    "hard_swish": "hard_silu",
    "mish": "mish",
    "softplus": "softplus",
    "softsign": "softsign",
    "tanh": "tanh",
    "exponential": "exponential",
    "hard_tanh": "hard_tanh",
    "soft_shrink": "soft_shrink",
    "hard_shrink": "hard_shrink",
    "tanh_shrink": "tanh_shrink",
    "log_sigmoid": "log_sigmoid",
    "squareplus": "squareplus",
    "sparse_plus": "sparse_plus",
}
# Of these no element stands alone, so that no kernel can apply them while it writes.
NOT_ELEMENTWISE = ("softmax", "log_softmax", "glu", "sparsemax")
# Keras's function has two parameters without defaults, so that its name alone computes nothing.
NOT_FUSED = ("threshold",)
_LAYOUTS = {"channels_last": "NDHWC", "channels_first": "NCDHW"}


def Conv3DTranspose(
    filters: int,
    kernel_size: Any,
    strides: Any = (1, 1, 1),
    padding: str = "valid",
    data_format: str | None = None,
    output_padding: Any = None,
    dilation_rate: Any = (1, 1, 1),
    activation: Any = None,
    use_bias: bool = True,
    kernel_initializer: Any = "glorot_uniform",
    bias_initializer: Any = "zeros",
    kernel_regularizer: Any = None,
    bias_regularizer: Any = None,
    activity_regularizer: Any = None,
    kernel_constraint: Any = None,
    bias_constraint: Any = None,
    trainable: bool = True,  # noqa: ARG001 (Keras's)
    name: str | None = None,  # noqa: ARG001
    dtype: Any = None,
    *,
    input: Any,
    initialize: bool = False,
    strict: bool = True,
) -> Imported:
    """Read the constructor of ``keras.layers.Conv3DTranspose``, for an ``input`` or its shape.

    N may be None for a dynamic batch. Without ``data_format`` and ``dtype``, those of ``keras.json`` count; the
    input's own dtype does not, for Keras converts it to the layer's. With ``initialize`` the initializers build
    the weights, as Keras itself does (which must then be installed); without it the layer has none yet.
    Regularizers and constraints are remarked: they change nothing here. Raises `WordsError` where Keras refuses,
    or for an activation that cannot be fused.
    """
    rules = Rules(SYSTEM, strict)
    kernel, strides, dilation = (
        _triple(rules, name, value)
        for name, value in (("kernel_size", kernel_size), ("strides", strides), ("dilation_rate", dilation_rate))
    )
    same = _is_same(rules, padding)
    extra = None if output_padding is None else _triple(rules, "output_padding", output_padding, least=0)
    layout = _layout(rules, data_format)
    count = whole(filters) or 0
    rules.must(
        count > 0,
        f"Invalid value for argument `filters`. Expected a strictly positive value. Received filters={filters}.",
    )
    _require_strides(rules, strides, dilation, extra)
    x = shape_of(input)
    rules.must(
        len(x) == 5, f"incompatible with the layer: expected min_ndim=5, found ndim={len(x)}. Full shape received: {x}"
    )
    sizes = dict(zip(layout, x, strict=True))
    spatial = [sizes[letter] for letter in "DHW"]
    for n in (*spatial, sizes["C"]):
        if not isinstance(n, int):
            raise SpecError(
                f"the input's shape is {x}; only the batch may be dynamic, so give the other sizes: to one layer of a "
                "model by keras.from_layer(layer, input), to all by a keras.Input of the model that holds them"
            )
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    places = [
        _place(i, k, s, same, None if extra is None else extra[at])
        for at, (i, k, s) in enumerate(zip(spatial, reach, strides, strict=True))
    ]
    axes, zeros = cropped(spatial, kernel, strides, dilation, *zip(*places, strict=True))
    spec = Spec(
        batch=sizes["N"],
        channels_in=sizes["C"],
        channels_out=count,
        axes=axes,
        bias=bool(use_bias),
        activation=_activation(activation),
        dtype=dtype_of(_policy(dtype) or _configured("floatx", "float32")),
        layout=layout,
    )
    training = {
        "kernel_regularizer": kernel_regularizer,
        "bias_regularizer": bias_regularizer,
        "activity_regularizer": activity_regularizer,
        "kernel_constraint": kernel_constraint,
        "bias_constraint": bias_constraint,
    }
    remarks = tuple(f"{key} has no effect on inference" for key, value in training.items() if value is not None)
    read = Imported(SYSTEM, spec, ORDER, layout, layout, zeros, remarks=remarks)
    return _initialized(read, kernel_initializer, bias_initializer) if initialize else read


def layer_conv_3d_transpose(
    object: Any,
    filters: Any,
    kernel_size: Any,
    strides: Any = (1, 1, 1),
    padding: str = "valid",
    output_padding: Any = None,
    data_format: str | None = None,
    dilation_rate: Any = (1, 1, 1),
    activation: Any = None,
    use_bias: bool = True,
    **words: Any,
) -> Imported:
    """Read a call of R keras3's ``layer_conv_3d_transpose``: ``object`` is the input or its shape.

    R's whole numbers may be floats, as its own ``as_integer`` takes them. The other ``words`` are those of
    `Conv3DTranspose`. Raises as that.
    """
    read = Conv3DTranspose(
        _as_integer(filters),
        _as_integer(kernel_size),
        _as_integer(strides),
        padding,
        data_format,
        None if output_padding is None else _as_integer(output_padding),
        _as_integer(dilation_rate),
        activation,
        use_bias,
        input=object,
        **words,
    )
    return replace(read, system="R keras3")


def from_config(config: Mapping[str, Any], input: Any, *, strict: bool = True) -> Imported:
    """Read the configuration of a layer, as ``layer.get_config()`` gives it. Raises as `Conv3DTranspose`."""
    if not isinstance(config, Mapping):
        raise WordsError(f"config is of type {kind_name(config)}; give layer.get_config()")
    try:
        inspect.signature(Conv3DTranspose).bind(**config, input=input, strict=strict)
    except TypeError as error:
        raise WordsError(f"config is not that of a Conv3DTranspose: {error}; give layer.get_config()") from error
    return Conv3DTranspose(**config, input=input, strict=strict)


def from_layer(layer: Any, input: Any = None, *, strict: bool = True) -> Imported:
    """Read a ``keras.layers.Conv3DTranspose`` with its weights; without ``input``, for the sizes it was built with.

    N is then dynamic, for a Keras layer takes any batch.
    Raises as `Conv3DTranspose`, and `SpecError` for a layer whose spatial sizes are not known.
    """
    kind = _kind(layer)
    if kind is None:
        raise WordsError(f"{kind_name(layer)} is not a keras.layers.Conv3DTranspose; name the layer inside of it")
    if type(layer).call is not kind.call:
        raise WordsError(f"{type(layer).__name__} has a call of its own, which cannot be read; name a plain layer")
    # of a function the configuration keeps no more than its name, which another may have too
    config = {**layer.get_config(), "activation": layer.activation}
    del config["name"]
    if input is None:
        built = layer.get_build_config() or {}
        if "input_shape" not in built:
            raise WordsError("the layer was not built yet; give the input's shape")
        input = (None, *built["input_shape"][1:])
    read = from_config(config, shape_of(input), strict=strict)
    if not layer.built:
        return read
    return read.with_weights(layer.kernel, layer.bias if layer.use_bias else None)


def find(source: Any) -> list[Found]:
    """Return the ``Conv3DTranspose`` layers of a Keras model, or of its ``.keras`` file, nested ones included.

    A layer that the model calls with several shapes comes once for each. Inside of a layer of one's own Keras notes
    no calls: there it has the sizes that it was built with, which a remark says.
    Loading such a file runs no code of it (Keras's safe mode). Raises `ModelError` for what is no such
    model, `EngineError` without Keras.
    """
    model = source
    if isinstance(source, (str, os.PathLike)):
        keras = _keras()
        if not os.path.exists(source):
            raise ModelError(f"there is no file {os.fspath(source)!r}; name a .keras file")
        try:
            model = keras.models.load_model(source, compile=False, safe_mode=True)
        except Exception as error:  # of many kinds, and each means that it cannot be read
            raise ModelError(
                f"cannot read {source} as a Keras model: {first_words(error)}; save it again as .keras"
            ) from error
    if not hasattr(model, "layers"):
        raise ModelError(f"{type(source).__name__} is not a Keras model; name one, or its .keras file")
    # the public `layers` knows nothing of wrapped layers, nor of those inside of a layer of one's own
    inside = model._flatten_layers()
    graphs = [getattr(part, "_functional", None) or part for part in inside]
    calls = {id(node) for g in graphs for nodes in getattr(g, "_nodes_by_depth", {}).values() for node in nodes}
    found = [f for layer in inside if _kind(layer) for f in _found(layer, calls)]
    names = unique(f.name for f in found)
    return [replace(f, name=name) for f, name in zip(found, names, strict=True)]


def _found(layer: Any, calls: Container[int]) -> list[Found]:
    """Read a layer once for each shape that it is called with in the graphs whose nodes ``calls`` holds."""
    shapes = [(None, *node.input_tensors[0].shape[1:]) for node in layer._inbound_nodes if id(node) in calls]
    return [_read(layer, shape) for shape in dict.fromkeys(shapes)] or [_read(layer)]


def _read(layer: Any, shape: Any = None) -> Found:
    try:
        read = from_layer(layer, shape)
    except OpcompileError as error:
        return Found(layer.name, None, str(error))
    remarks = read.remarks if shape else (*read.remarks, _AS_BUILT)
    return Found(layer.name, replace(read, remarks=remarks))


_AS_BUILT = "Keras notes no calls inside of another layer: the sizes are those that this one was built with"


def _kind(layer: Any) -> Any:
    """Return Keras's class among the layer's own and those that it derives from; None where it is not there."""
    return next((kind for kind in type(layer).__mro__ if is_kind(kind, "Conv3DTranspose", "keras")), None)


# --- the other way ---


def words(spec: Spec) -> str:
    """Return ``spec`` as a Keras layer, activation included; its kernel is ours, permuted (2, 3, 4, 1, 0).

    Raises `WordsError` with the reason where Keras's layer cannot say it.
    """
    require_layer(spec)
    more = {
        "data_format": "channels_first" if spec.layout == "NCDHW" else "channels_last",
        "activation": _name(spec.activation, spec.dtype),
    }
    dtype = "" if spec.dtype == "float32" else f", dtype={spec.dtype!r}"
    place = tuple(a.begin for a in spec.axes), tuple(a.out for a in spec.axes)
    for said in keras_words(spec, "({})", more):
        layer = f"keras.layers.Conv3DTranspose({said}{dtype})"
        if _means(layer, spec.x_shape) == place:
            return layer
    raise WordsError(
        'neither "same" nor "valid" begins and ends where this layer does; use "valid" and Cropping3D '
        "(`opcompile diff` writes both)"
    )


def layer(spec: Spec, weight: Any = None, bias: Any = None) -> Any:
    """Return ``spec`` as a Keras layer, built, with canonical weights where they are given.

    Raises `WordsError` as `words` does, and for values that are not the layer's; `EngineError` without Keras.
    """
    text, ours = words(spec), Imported("opcompile", spec)
    kernel = None if weight is None else ORDER.own(ours.to_w(weight), 1)
    values = None if bias is None else ours.to_b(bias)
    made = eval(text, {"__builtins__": {}}, {"keras": _keras()})  # noqa: S307 (a text of our own)
    made.build(spec.x_shape)
    if kernel is not None:
        made.kernel.assign(kernel)
    if values is not None:
        made.bias.assign(values)
    return made


def _means(text: str, x: tuple[int | None, ...]) -> tuple[Triple, Triple] | None:
    """Return where the output of a layer's text begins, and its size; None where Keras refuses it."""
    layers = {name: partial(_configuration, name) for name in ("LeakyReLU", "ELU")}
    reader = SimpleNamespace(layers=SimpleNamespace(Conv3DTranspose=partial(Conv3DTranspose, input=x), **layers))
    try:
        read: Imported = eval(text, {"__builtins__": {}}, {"keras": reader})  # noqa: S307 (a text of our own)
    except (WordsError, SpecError):
        return None
    return read.place


def _configuration(kind: str, **config: Any) -> dict[str, Any]:
    return {"class_name": kind, "config": config}


class _Code(str):
    """A text that stands for itself where a value is written."""

    __slots__ = ()
    __repr__ = str.__str__


def _name(activation: Activation, dtype: str) -> str | None:
    """Name an activation; a layer that stands for one computes in a dtype of its own."""
    said = "" if dtype == "float32" else f", dtype={dtype!r}"
    if activation.name == "none":
        return None
    if activation == Activation("leaky_relu", (0.2,)):
        return "leaky_relu"
    if activation.name == "leaky_relu":
        if activation.parameters[0] < 0:
            raise WordsError(f"{SYSTEM}'s LeakyReLU refuses a negative slope, as in {activation}; write a function")
        return _Code(f"keras.layers.LeakyReLU(negative_slope={activation.parameters[0]!r}{said})")
    if activation.name == "elu" and activation != Activation("elu"):
        return _Code(f"keras.layers.ELU(alpha={activation.parameters[0]!r}{said})")
    if activation != Activation(activation.name) or activation.name == "gelu_tanh":
        raise WordsError(f"{SYSTEM} has no name for the activation {activation}; give the layer a function")
    return activation.name


# --- sizes: Keras's formulas ---


def _place(size: int, reach: int, stride: int, same: bool, extra: int | None) -> tuple[int, int]:
    """Return where the output begins in the full one, and its size; ``reach`` is dilation*(kernel-1) + 1."""
    if not same:
        return 0, (size - 1) * stride + (max(reach, stride) if extra is None else reach + extra)
    padded = stride + reach - 2 if extra is None else reach + reach % 2 - 2 + extra
    low = min(padded // 2 + padded % 2, reach - 1)
    out = size * stride if extra is None else (size - 1) * stride + reach % 2 + extra
    return reach - 1 - low, out


# --- Keras's rules ---


def _triple(rules: Rules, name: str, value: Any, least: int = 1) -> Triple:
    said = f"The `{name}` argument must be a tuple of 3 integers. Received {name}={value}"
    given = repeated(value) or ()
    rules.must(len(given) == 3, said)
    wrong = {n for n in given if n < least}
    rules.must(
        not wrong, f"{said}, including values {wrong} that do not satisfy `value {'>= 0' if least == 0 else '> 0'}`"
    )
    a, b, c = given
    return a, b, c


def _is_same(rules: Rules, padding: Any) -> bool:
    word = padding.lower() if isinstance(padding, str) else padding
    rules.must(
        isinstance(word, str) and word in ("valid", "same"),
        f"The `padding` argument must be a list/tuple or one of {{'same', 'valid'}}. Received: {word}",
    )
    return bool(word == "same")


def _layout(rules: Rules, data_format: Any) -> str:
    word = _configured("image_data_format", "channels_last") if data_format is None else str(data_format).lower()
    rules.must(
        word in _LAYOUTS,
        "The `data_format` argument must be one of {'channels_first', 'channels_last'}. "
        f"Received: data_format={word}",
    )
    return _LAYOUTS[word]


def _configured(key: str, default: str) -> str:
    """Return a setting of ``keras.json``, or Keras's own default where there is none."""
    home = os.environ.get("KERAS_HOME") or os.path.join("~", ".keras")
    path = Path(os.path.expanduser(home)) / "keras.json"
    if not path.is_file():
        return default
    try:
        return str(json.loads(path.read_text()).get(key, default))
    except (ValueError, AttributeError, OSError) as error:
        raise WordsError(f"cannot read {path}: {error}; correct it, or say data_format and dtype") from error


def _require_strides(rules: Rules, strides: Triple, dilation: Triple, extra: Triple | None) -> None:
    for at, (op, s) in enumerate(zip(extra or (0, 0, 0), strides, strict=True)):
        rules.strictly(
            op < s,
            f"`output_padding` must be strictly less than `strides` for all dimensions. At dimension {at}, "
            f"`output_padding` is {op} but `strides` is {s}. Received: output_padding={extra}, strides={strides}",
        )
    rules.strictly(
        max(strides) == 1 or max(dilation) == 1,
        "`strides > 1` not supported in conjunction with `dilation_rate > 1`. "
        f"Received: strides={strides} and dilation_rate={dilation}",
    )


def _policy(dtype: Any) -> str | None:
    """Return the dtype that a layer computes in, from a name, a policy or its configuration."""
    if isinstance(dtype, Mapping):
        dtype = dtype.get("config", {}).get("name")
    name = getattr(dtype, "name", dtype)
    return None if name is None else str(name).removeprefix("mixed_")


def _as_integer(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_as_integer(n) for n in value)
    return int(value) if isinstance(value, float) and value == int(value) else value


# --- activations ---


def _activation(given: Any) -> Activation:
    """Return ours for a name, a function, a layer or its configuration. Raises `WordsError`."""
    if given is None:
        return Activation()
    if isinstance(given, Mapping):
        return _configured_activation(str(given.get("class_name")), given.get("config") or {})
    if hasattr(given, "get_config") and not isinstance(given, str):
        return _configured_activation(type(given).__name__, given.get_config())
    name = given if isinstance(given, str) else getattr(given, "__name__", repr(given))
    if callable(given) and not str(getattr(given, "__module__", "")).startswith("keras.src.activations"):
        # others of the same name compute something else: keras.ops.gelu and jax.nn.gelu the form with tanh
        raise WordsError(
            f"the activation {name} is a function of your own, or of another module than keras.activations, and cannot "
            "be fused; apply it to the output"
        )
    if name in ACTIVATIONS:
        return Activation.parse(ACTIVATIONS[name])
    if name in NOT_ELEMENTWISE:
        raise WordsError(f"the activation {name} is not elementwise, so it cannot be fused; apply it to the output")
    if name in NOT_FUSED:
        raise WordsError(f"the activation {name} has parameters that a name does not give; apply it to the output")
    raise WordsError(f"{SYSTEM} refuses this: Could not interpret activation function identifier: {name}")


def _configured_activation(kind: str, config: Any) -> Activation:
    if kind == "function":
        return _activation(config)
    if kind == "Activation":
        return _activation(config.get("activation"))
    if kind == "LeakyReLU":
        return Activation("leaky_relu", (float(config.get("negative_slope", 0.3)),))
    if kind == "ELU":
        return Activation("elu", (float(config.get("alpha", 1.0)),))
    if kind == "ReLU" and not config.get("threshold"):
        slope, top = config.get("negative_slope") or 0.0, config.get("max_value")
        if top is None:
            return Activation("leaky_relu", (float(slope),)) if slope else Activation("relu")
        if top == 6 and not slope:
            return Activation("relu6")
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()
    if plain in ("softmax", "p_re_lu", "re_lu") or plain not in ACTIVATIONS:
        raise WordsError(f"the activation layer {kind} with its parameters cannot be fused; apply it to the output")
    return _activation(plain)


# --- weights by initializers ---


def _initialized(read: Imported, kernel: Any, bias: Any) -> Imported:
    keras = _keras()
    make: Callable[..., Any] = keras.initializers.get
    try:
        w = make(kernel)(shape=read.w_shape, dtype=read.spec.dtype)
        b = make(bias)(shape=(read.spec.channels_out,), dtype=read.spec.dtype) if read.spec.bias else None
    except ValueError as error:
        raise WordsError(f"{SYSTEM} refuses this: {error}") from error
    to_numpy = keras.ops.convert_to_numpy
    return read.with_weights(to_numpy(w), None if b is None else to_numpy(b))


def _keras() -> Any:
    try:
        import keras
    except (ImportError, ValueError) as error:  # it knows no backend of that name
        backend = "set KERAS_BACKEND to one that is installed, torch or jax"
        missing = isinstance(error, ImportError) and error.name == "keras"
        way_out = "pip install 'opcompile[words]'" if missing else backend
        raise EngineError(f"the package keras is not usable ({error}); {way_out}") from error
    return keras
