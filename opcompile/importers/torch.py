"""PyTorch's words: ``torch.nn.ConvTranspose3d``, ``F.conv_transpose3d``, exported programs.

Its operator is ours: W ``(C, M/g, kD, kH, kW)`` without a flip, padding that crops both sides alike. What it
refuses and we could compute is ``output_padding >= max(stride, dilation)`` and negative paddings.
Rules and messages are those of PyTorch 2.13. PyTorch itself is needed only to read its objects and files.
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from opcompile.errors import EngineError, ModelError, OpcompileError, SpecError, WordsError
from opcompile.importers.imported import (
    Found,
    Imported,
    Rules,
    Triple,
    WeightOrder,
    dtype_of,
    is_kind,
    kind_name,
    shape_of,
    symmetric,
    weight_shape_of,
    whole,
    whole_numbers,
)
from opcompile.say import DEFAULTS, keywords, several
from opcompile.spec import Activation, require_layer
from opcompile.spec import ConvTranspose3d as Spec

SYSTEM = "PyTorch"
ORDER = WeightOrder()


def conv_transpose3d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    dtype: str | None = None,
    strict: bool = True,
) -> Imported:
    """Read a call of ``torch.nn.functional.conv_transpose3d``; tensors may be given by their shapes.

    ``input`` is (N, C, D, H, W), or (C, D, H, W) without a batch; N may be None for a dynamic one. ``bias``
    may also be True. A tensor in channels_last_3d is one whose layout is NDHWC in memory: see `channels_last`.
    Raises `WordsError` where PyTorch refuses, `SpecError` for what it computes and we do not.
    """
    rules = Rules(SYSTEM, strict)
    x, w = shape_of(input), weight_shape_of(weight)
    _require_ranks(rules, x, w)
    words = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    s, p, op, d = (_triple(rules, name, value) for name, value in words.items())
    groups = _count(rules, "groups", groups)
    rules.must(groups > 0, "non-positive groups is not supported")
    _require_positive(rules, s, p, op, d)
    _require_channels(rules, x, w, bias, groups)
    _require_dtypes(rules, *(dtype_of(None, t) for t in (input, weight, bias) if hasattr(t, "dtype")))
    rules.strictly(all(o < max(a, b) for o, a, b in zip(op, s, d, strict=True)), _output_padding_rule(op, s, d))
    axes, zeros = _fitting(rules, x[-3:], w[2:], s, p, op, d)
    layout = "NCDHW" if len(x) == 5 else "CDHW"
    spec = Spec(
        batch=x[0] if len(x) == 5 else 1,
        channels_in=w[0],
        channels_out=w[1] * groups,
        axes=axes,
        groups=groups,
        bias=bias is not None and bias is not False,
        dtype=dtype_of(dtype, input, weight),
    )
    return Imported(SYSTEM, spec, ORDER, layout, layout, zeros).holding(weight, bias)


def ConvTranspose3d(
    in_channels: int,
    out_channels: int,
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    bias: bool = True,
    dilation: Any = 1,
    padding_mode: str = "zeros",
    device: Any = None,
    dtype: Any = None,
    *,
    input: Any,
    output_size: Sequence[int] | None = None,
    strict: bool = True,
) -> Imported:
    """Read the constructor of ``torch.nn.ConvTranspose3d``, for an ``input`` or its shape.

    ``output_size`` is what the module's call takes: it picks the output_padding. Raises as `conv_transpose3d`.
    """
    rules = Rules(SYSTEM, strict)
    counts = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
    in_channels, out_channels, groups = (_count(rules, name, value) for name, value in counts.items())
    rules.must(groups > 0, "groups must be a positive integer")
    rules.must(in_channels % groups == 0, "in_channels must be divisible by groups")
    rules.must(out_channels % groups == 0, "out_channels must be divisible by groups")
    rules.must(padding_mode == "zeros", 'Only "zeros" padding mode is supported for ConvTranspose3d')
    kernel = _triple(rules, "kernel_size", kernel_size)
    if output_size is not None:
        s, p, d = (_triple(rules, "", value) for value in (stride, padding, dilation))
        output_padding = _for_output_size(rules, shape_of(input), output_size, kernel, s, p, d)
    weight = (in_channels, out_channels // groups, *kernel)
    rules.must(min(weight) >= 0, f"Trying to create tensor with negative dimension {min(weight)}: {list(weight)}")
    words = (stride, padding, output_padding, groups, dilation)
    named = dtype_of(None if dtype is None else str(dtype))
    _require_dtypes(rules, *([dtype_of(None, input)] if hasattr(input, "dtype") else []), named)
    read = conv_transpose3d(shape_of(input), weight, bool(bias), *words, dtype=named, strict=strict)
    remarks = (f"device={device} says where PyTorch would run it",) if device is not None else ()
    return replace(read, remarks=remarks)


def from_module(module: Any, input: Any, output_size: Sequence[int] | None = None, *, strict: bool = True) -> Imported:
    """Read a ``torch.nn.ConvTranspose3d`` with its weights, for an ``input`` or its shape. Raises as above."""
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    kind = next((c for c in type(module).__mro__ if is_kind(c, "ConvTranspose3d", "torch.nn")), None)
    if kind is None:
        raise WordsError(f"{kind_name(module)} is not a torch.nn.ConvTranspose3d; name the layer inside of it")
    if type(module).forward is not kind.forward or "forward" in vars(module):  # type: ignore[attr-defined]
        raise WordsError(f"{type(module).__name__} has a forward of its own, which cannot be read; name a plain layer")
    if getattr(module, "has_uninitialized_params", bool)():
        raise WordsError(f"{type(module).__name__} has no weights yet; call it once, or load them")
    _require_no_hooks(module)
    if module.weight.is_meta:
        raise WordsError("the layer is on the device meta, where it has no weights; load them first")
    fields = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "groups")
    read = ConvTranspose3d(
        **{name: getattr(module, name) for name in fields},
        bias=module.bias is not None,
        dilation=module.dilation,
        padding_mode=module.padding_mode,
        dtype=module.weight.dtype,
        input=input,
        output_size=output_size,
        strict=strict,
    )
    return read.with_weights(module.weight, module.bias)


def _require_no_hooks(module: Any) -> None:
    """Raise `WordsError` for hooks: those of a norm or a mask make the weight, but only when the module is called."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if hooks:
        names = ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in hooks)
        raise WordsError(
            f"the layer has forward hooks ({names}), which may change its weight or its output and cannot be read; "
            "remove them (of torch.nn.utils: remove_weight_norm, remove_spectral_norm, prune.remove)"
        )


def channels_last(read: Imported) -> Imported:
    """Return the layer for tensors in ``torch.channels_last_3d``.

    Such a tensor has the shape (N, C, D, H, W), and its memory is NDHWC: ``x.permute(0, 2, 3, 4, 1)`` is
    contiguous, and is what the compiled layer takes without a copy.
    """
    if read.x_layout != "NCDHW":
        raise WordsError("channels_last_3d is a memory format of 5-D tensors; this input has no batch")
    return replace(read, spec=replace(read.spec, layout="NDHWC"))


# --- exported programs ---


def find(source: Any) -> list[Found]:
    """Return the 3-D transposed convolutions of a ``torch.export`` program, or of its ``.pt2`` file, in order.

    A batch that was exported as a dynamic dimension is dynamic. A file is loaded by ``torch.export.load``.
    Raises `ModelError` for what is no such program, `EngineError` without PyTorch.
    """
    torch = _torch()
    program = source
    if isinstance(source, (str, os.PathLike)):
        if not os.path.isfile(source):
            raise ModelError(f"there is no file {os.fspath(source)!r}; name a .pt2 file")
        log = logging.getLogger("torch.export")
        before, log.disabled = log.disabled, True  # it logs the traceback of what it raises
        try:
            program = torch.export.load(source)
        except Exception as error:  # of many kinds, and each means that it cannot be read
            reason = _other_content(source) or f"{error}; export it again"
            raise ModelError(f"cannot read {source} as a torch.export program: {reason}") from error
        finally:
            log.disabled = before
    if not hasattr(program, "graph_module"):
        raise ModelError(f"{type(source).__name__} is not a torch.export program; make one with torch.export.export")
    found = []
    for name, node, constants in _calls(program.graph_module, _constants(program)):
        try:
            words = _words_of(node, constants)
            if words is not None:
                found.append(Found(name, conv_transpose3d(**words)))
        except OpcompileError as error:
            found.append(Found(name, None, str(error)))
    return found


def _other_content(path: str | os.PathLike[str]) -> str | None:
    """Say what PyTorch put into a file other than a program, and the way out; None where it is not known."""
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if not any(name.endswith("/data.pkl") and name.count("/") == 1 for name in names):
        return None
    is_script = any("/code/" in name for name in names)
    kind = "it is TorchScript" if is_script else "it holds a state dict or a pickled module"
    return f"{kind}; save the program of torch.export.export by torch.export.save"


# Operators that run graphs of their own, once, on the operands that follow these graphs.
_ONCE = ("cond", "wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint")


def _calls(module: Any, constants: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield the calls of a graph and of those inside of it: a name, the node, the constants by their names there."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        yield inside + node.name, node, constants
        graphs = [a for a in node.args if getattr(a, "op", "") == "get_attr"]
        for graph in graphs:
            part = getattr(module, graph.target)
            if hasattr(part, "graph"):
                operands = node.args[node.args.index(graphs[-1]) + 1 :] if node.target.__name__ in _ONCE else ()
                given = operands[0] if operands and isinstance(operands[0], (tuple, list)) else operands
                names = [n.name for n in part.graph.nodes if n.op == "placeholder"]
                known = {n: constants[o.name] for n, o in zip(names, given, strict=False) if _name(o) in constants}
                yield from _calls(part, known, f"{inside}{graph.name}.")


def _name(operand: Any) -> str:
    return getattr(operand, "name", "")


_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")


def _words_of(node: Any, constants: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the call of a node in the words of `conv_transpose3d`; None where it is no such call.

    Raises `ModelError` for one that computes in another dtype than its input's.
    """
    name = str(node.target).partition(".default")[0].partition(".input")[0]
    if node.op != "call_function" or name not in ("aten.conv_transpose3d", "aten.convolution"):
        return None
    names = _ARGUMENTS if name == "aten.conv_transpose3d" else _CONVOLUTION
    words = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if not words.pop("transposed", True) or len(_shape(words["weight"])) != 5:
        return None
    dtype, computed = (n.meta["val"].dtype for n in (words["input"], node))
    if computed != dtype:
        raise ModelError(
            f"it takes {dtype} and gives {computed}, as in torch.autocast; export the program with one dtype instead"
        )
    words["dtype"] = str(dtype)
    words["input"] = _shape(words["input"])
    for key in ("weight", "bias"):
        if words.get(key) is not None:
            words[key] = constants.get(words[key].name, _shape(words[key]))
    return words


def _shape(node: Any) -> tuple[Any, ...]:
    """Return the shape of a node's tensor; None for a symbolic batch. Other symbolic sizes fail as such later."""
    first, *rest = node.meta["val"].shape
    return (int(first) if isinstance(first, int) else None, *(n if isinstance(n, int) else str(n) for n in rest))


def _constants(program: Any) -> dict[str, Any]:
    """Return the parameters, buffers and constants of a program by the names of their graph inputs."""
    signature = program.graph_signature
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    # buffers that are not persistent are among the constants
    held = {**program.constants, **program.state_dict}
    goals = {**inputs, **signature.inputs_to_lifted_tensor_constants}
    return {name: held[goal] for name, goal in goals.items() if goal in held}


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise EngineError(f"the package torch is not installed ({error}); pip install 'opcompile[words]'") from error
    return torch


# --- the other way ---

_ACTIVATIONS = {
    "relu": "ReLU()",
    "relu6": "ReLU6()",
    "leaky_relu": "LeakyReLU({0!r})",
    "elu": "ELU({0!r})",
    "selu": "SELU()",
    "gelu": "GELU()",
    "gelu_tanh": "GELU(approximate='tanh')",
    "sigmoid": "Sigmoid()",
    "hard_sigmoid": "Hardsigmoid()",
    "silu": "SiLU()",
    "hard_silu": "Hardswish()",
    "mish": "Mish()",
    "softplus": "Softplus()",
    "softsign": "Softsign()",
    "tanh": "Tanh()",
    "hard_tanh": "Hardtanh()",
    "soft_shrink": "Softshrink()",
    "hard_shrink": "Hardshrink()",
    "tanh_shrink": "Tanhshrink()",
    "log_sigmoid": "LogSigmoid()",
}


def words(spec: Spec) -> str:
    """Return the layer as PyTorch's modules, activation included; its weight is ours as it is.

    Raises `WordsError` with the reason where PyTorch's module cannot say it.
    """
    require_layer(spec)
    if spec.layout != "NCDHW":
        raise WordsError("PyTorch's layer takes NCDHW: its channels_last_3d is a memory order, so permute X before")
    padding, extra = [a.begin for a in spec.axes], []
    for axis in spec.axes:
        extra.append(axis.out - (axis.full - 2 * axis.begin))
        if not 0 <= extra[-1] < max(axis.stride, axis.dilation):
            raise WordsError(
                f"PyTorch pads both sides alike: padding={axis.begin} would need output_padding={extra[-1]}, which "
                f"must be at least 0 and less than the larger of stride {axis.stride} and dilation {axis.dilation}; "
                "pad less there, and crop the output"
            )
    words = {
        "stride": [a.stride for a in spec.axes],
        "padding": padding,
        "output_padding": extra,
        "groups": spec.groups,
        "bias": spec.bias,
        "dilation": [a.dilation for a in spec.axes],
    }
    kernel = several([a.kernel for a in spec.axes], "({})")
    said = keywords(words, {**DEFAULTS, "bias": True})
    dtype = "" if spec.dtype == "float32" else f", dtype=torch.{spec.dtype}"
    layer = f"torch.nn.ConvTranspose3d({spec.channels_in}, {spec.channels_out}, {kernel}{said}{dtype})"
    if spec.activation.name == "none":
        return layer
    return f"torch.nn.Sequential({layer}, torch.nn.{_activation(spec.activation)})"


def _activation(activation: Activation) -> str:
    text = _ACTIVATIONS.get(activation.name)
    if text is None or ("{" not in text and activation != Activation(activation.name)):
        raise WordsError(f"PyTorch has no module for the activation {activation}; write a function")
    return text.format(*activation.parameters)


def module(spec: Spec, weight: Any = None, bias: Any = None) -> Any:
    """Return ``spec`` as a PyTorch module, with canonical weights where they are given.

    Raises `WordsError` as `words` does, and for values that are not the layer's; `EngineError` without PyTorch.
    """
    torch, text, ours = _torch(), words(spec), Imported("opcompile", spec)
    w = None if weight is None else ours.to_w(weight)
    b = None if bias is None else ours.to_b(bias)
    made = eval(text, {"__builtins__": {}}, {"torch": torch})  # noqa: S307 (a text of our own)
    layer = made[0] if spec.activation.name != "none" else made
    with torch.no_grad():
        for parameter, values in ((layer.weight, w), (layer.bias, b)):
            if values is not None:
                parameter.copy_(torch.from_numpy(values.astype("float64")))
    return made


# --- PyTorch's rules ---


def _require_ranks(rules: Rules, x: tuple[Any, ...], w: tuple[Any, ...]) -> None:
    rules.must(
        len(x) in (4, 5),
        f"Expected 4D (unbatched) or 5D (batched) input to conv_transpose3d, but got input of size: {list(x)}",
    )
    rules.must(
        len(w) == 5 and all(n > 0 for n in w[1:]),
        "non-empty 5D (n_output_plane x n_input_plane x kernel_depth x kernel_height x kernel_width) tensor "
        f"expected for weight, but got: {list(w)}",
    )
    for n in x[1:]:
        if not isinstance(n, int):
            raise SpecError(f"the input has a dynamic size {n}; only the batch may be dynamic, so fix the others")
    rules.must(min(x[-3:]) > 0, f"Only zero batch or zero channel inputs are supported, but got input shape: {list(x)}")


def _triple(rules: Rules, name: str, value: Any) -> Triple:
    given = [value] if _is_int(value) else value
    rules.must(
        isinstance(given, (list, tuple)),
        f"conv_transpose3d(): argument '{name}' must be tuple of ints, not {type(value).__name__}",
    )
    for at, each in enumerate(given):
        rules.must(
            _is_int(each),
            f"conv_transpose3d(): argument '{name}' must be tuple of ints, "
            f"but found element of type {type(each).__name__} at pos {at}",
        )
    rules.must(
        len(given) in (1, 3),
        f"expected {name} to be a single integer value or a list of 3 values to match the convolution dimensions, "
        f"but got {name}={list(given)}",
    )
    a, b, c = (int(n) for n in (given * 3 if len(given) == 1 else given))
    return a, b, c


def _count(rules: Rules, name: str, value: Any) -> int:
    rules.must(_is_int(value), f"conv_transpose3d(): argument '{name}' must be int, not {type(value).__name__}")
    return int(value)


def _is_int(value: Any) -> bool:
    return whole(value) is not None and not isinstance(value, bool)


def _require_positive(rules: Rules, s: Triple, p: Triple, op: Triple, d: Triple) -> None:
    rules.must(min(s) > 0, "non-positive stride is not supported")
    named = ", ".join(f"dilation_{axis}: {n}" for axis, n in zip(("depth", "height", "width"), d, strict=True))
    rules.must(min(d) > 0, f"dilation should be greater than zero, but got {named}")
    rules.strictly(min(p) >= 0, "negative padding is not supported")
    rules.strictly(min(op) >= 0, "negative output_padding is not supported")


def _require_channels(rules: Rules, x: tuple[Any, ...], w: tuple[int, ...], bias: Any, groups: int) -> None:
    rules.must(
        w[0] % groups == 0,
        f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
        f"but got weight of size [{list(w)}] instead",
    )
    given = f"Given transposed=1, weight of size {list(w)}, expected"
    rules.must(x[-4] == w[0], f"{given} input{list(x)} to have {w[0]} channels, but got {x[-4]} channels instead")
    if bias is None or isinstance(bias, bool):
        return
    size, m = shape_of(bias), w[1] * groups
    rules.must(
        size == (m,), f"{given} bias to be 1-dimensional with {m} elements, but got bias of size {list(size)} instead"
    )


_SCALARS = {"float32": "Float", "float64": "Double", "float16": "Half", "bfloat16": "BFloat16"}


def _require_dtypes(rules: Rules, *dtypes: str) -> None:
    for other in dtypes[1:]:
        rules.must(other == dtypes[0], f"expected scalar type {_SCALARS[dtypes[0]]} but found {_SCALARS[other]}")


def _output_padding_rule(op: Triple, s: Triple, d: Triple) -> str:
    words = []
    for name, values in (("output_padding", op), ("stride", s), ("dilation", d)):
        words += [f"{name}_{axis}: {n}" for axis, n in zip(("depth", "height", "width"), values, strict=True)]
    return f"output padding must be smaller than either stride or dilation, but got {' '.join(words)}"


def _fitting(
    rules: Rules, x: Sequence[int], k: Sequence[int], s: Triple, p: Triple, op: Triple, d: Triple
) -> tuple[Any, Triple]:
    outs = [(i - 1) * a - 2 * b + e * (n - 1) + c + 1 for i, n, a, b, c, e in zip(x, k, s, p, op, d, strict=True)]
    sizes, results = (" x ".join(str(n) for n in values) for values in (x, outs))
    rules.must(
        min(outs) > 0,
        f"Given input size per channel: ({sizes}). Calculated output size per channel: ({results}). "
        "Output size is too small",
    )
    return symmetric(x, k, s, p, op, d)


def _for_output_size(
    rules: Rules, x: tuple[Any, ...], asked: Sequence[int], k: Triple, s: Triple, p: Triple, d: Triple
) -> Triple:
    """Return the output_padding that gives the size that was asked for."""
    around = len(x) - 3
    given = whole_numbers(asked)
    rules.must(given is not None, f"output_size is {asked!r}, but must be a tuple of ints")
    given = given or ()
    sizes = given[around:] if len(given) == 3 + around else given
    rules.must(
        len(sizes) == 3,
        f"ConvTranspose3D: for {len(x)}D input, output_size must have 3 or {3 + around} elements (got {len(given)})",
    )
    least = [(i - 1) * a - 2 * b + e * (n - 1) + 1 for i, n, a, b, e in zip(x[-3:], k, s, p, d, strict=True)]
    most = [n + a - 1 for n, a in zip(least, s, strict=True)]
    rules.strictly(
        all(low <= n <= high for low, n, high in zip(least, sizes, most, strict=True)),
        f"requested an output size of {sizes}, but valid sizes range from {least} to {most} "
        f"(for an input of {list(x[-3:])})",
    )
    a, b, c = (n - low for n, low in zip(sizes, least, strict=True))
    return a, b, c
