"""PyTorch: its function, its module, its own samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from conformance.suite import Case, Result, described, run, sample
from opcompile.importers import torch as words

SYSTEM, VERSION = "PyTorch", torch.__version__


def suites() -> Iterator[Result]:
    yield run("torch", SYSTEM, VERSION, "grid of F.conv_transpose3d", grid())
    yield run("torch-wrong", SYSTEM, VERSION, "wrong and odd calls", wrong())
    yield run("torch-module", SYSTEM, VERSION, "grid of nn.ConvTranspose3d, output_size", modules())
    yield run("torch-opinfo", SYSTEM, VERSION, "its OpInfo samples, float32 and float64", opinfo())
    yield run("torch-inputs", SYSTEM, VERSION, "its module inputs", module_inputs())


def called(x: Any, w: Any, b: Any, geometry: dict[str, Any]) -> np.ndarray:
    tensors = [None if a is None else torch.from_numpy(a) for a in (x, w, b)]
    return F.conv_transpose3d(*tensors, **geometry).numpy()


def of_call(name: str, x: Any, w: Any, bias: int, geometry: dict[str, Any], **more: Any) -> Case:
    """One call of the function, by shapes."""
    return Case(
        name,
        lambda: words.conv_transpose3d(x, w, (bias,) if bias else None, **geometry),
        lambda *arrays: called(*arrays, geometry),
        x,
        w,
        bias,
        **more,
    )


def grid() -> Iterator[Case]:
    kernels, strides = [(1, 1, 1), (2, 3, 1), (3, 3, 3), (4, 2, 3)], [1, 2, (1, 2, 3), (3, 2, 1)]
    rows = sample(
        0,
        220,
        kernel=kernels,
        stride=strides,
        padding=[0, 1, (0, 1, 2)],
        output_padding=[0, 1, (1, 0, 1)],
        dilation=[1, 2, (1, 3, 2)],
        groups=[1, 2],
        batch=[0, 1, 2],
        bias=[False, True],
    )
    for row in rows:
        kernel, groups, batch, bias = (row.pop(key) for key in ("kernel", "groups", "batch", "bias"))
        x = (*([batch] if batch else []), 4, 4, 5, 3)
        w = (4, 3, *kernel)
        geometry = {**row, "groups": groups}
        # below zero, one of PyTorch's paths fails inside oneDNN, in words that name no rule
        s, p, d = (np.broadcast_to(row[name], 3) for name in ("stride", "padding", "dilation"))
        impossible = ((np.array(x[-3:]) - 1) * s - 2 * p + d * (np.array(kernel) - 1) + 1).min() < 0
        name = described(x=x, w=w, **geometry, bias=bias)
        yield of_call(name, x, w, 3 * groups * bias, geometry, wordless=bool(impossible))


def wrong() -> Iterator[Case]:
    x, w = (1, 4, 3, 3, 3), (4, 2, 3, 3, 3)
    for geometry in (
        {"stride": 2, "output_padding": 2},
        {"stride": (2, 1, 2), "output_padding": (1, 1, 3), "dilation": (1, 2, 1)},
        {"groups": 3},
        {"groups": 0},
        {"groups": -2},
        {"stride": 0},
        {"dilation": 0},
        {"padding": -1},
        {"output_padding": -1},
        {"padding": 5},
        {"padding": "same"},
        {"stride": (2, 2)},
        {"stride": 2.0},
        {"stride": True},
        {"stride": (np.int64(2),) * 3, "groups": np.int64(2)},
        {"groups": "2"},
        {"groups": 2.0},
    ):
        yield of_call(described(**geometry), x, w, 0, geometry)
    for given, weight, bias in (
        ((1, 3, 3, 3, 3), w, 0),
        ((3, 3, 3), w, 0),
        ((1, 4, 0, 3, 3), w, 0),
        (x, w, 3),
        (x, (4, 2, 3, 3), 0),
        (x, (4, 2, 0, 3, 3), 0),
    ):
        case = of_call(described(x=given, w=weight, bias=bias), given, weight, bias, {})
        yield Case(**{**vars(case), "wordless": len(weight) == 4})
    no_batch = "a batch of 0"
    yield of_call("x=(0,4,3,3,3)", (0, 4, 3, 3, 3), w, 0, {}, uncomputed=no_batch)


def of_module(name: str, x: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any], size: Any = None) -> Case:
    """One module with a call of it; made anew for each run, for a wrong one fails when it is made."""

    def layer() -> torch.nn.ConvTranspose3d:
        return torch.nn.ConvTranspose3d(*args, **kwargs)

    def theirs(a: Any, w: Any, b: Any) -> np.ndarray:
        module = layer()
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(w))
            if module.bias is not None:
                module.bias.copy_(torch.from_numpy(b))
            return module(torch.from_numpy(a), output_size=size).numpy()

    kernel = args[2] if isinstance(args[2], tuple) else (args[2],) * 3
    groups = kwargs.get("groups", 1)
    shape = (args[0], args[1] // groups if groups else 1, *kernel)
    bias = args[1] if kwargs.get("bias", True) else 0
    return Case(name, lambda: words.ConvTranspose3d(*args, **kwargs, input=x, output_size=size), theirs, x, shape, bias)


def modules() -> Iterator[Case]:
    rows = sample(1, 60, k=[2, 3, (1, 2, 4)], s=[1, 2, (1, 2, 3)], p=[0, 1], g=[1, 3], bias=[True, False])
    for row in rows:
        kwargs = {"stride": row["s"], "padding": row["p"], "groups": row["g"], "bias": row["bias"]}
        yield of_module(described(**row), (2, 6, 3, 3, 4), (6, 3, row["k"]), kwargs)
    for size in ((7, 7, 7), (8, 8, 8), (8, 7, 8), (9, 9, 9), (6, 7, 7), (1, 6, 8, 8, 8), (8, 8)):
        yield of_module(described(output_size=size), (1, 4, 3, 3, 3), (4, 6, 3), {"stride": 2}, size)
    yield of_module("unbatched output_size", (4, 3, 3, 3), (4, 6, 3), {"stride": 2}, (8, 8, 8))
    for kwargs in ({"groups": 4}, {"groups": 0}, {"padding_mode": "reflect"}, {"padding": "same"}, {"stride": (2, 2)}):
        yield of_module(described(**kwargs), (1, 4, 3, 3, 3), (4, 6, 3), kwargs)


def opinfo() -> Iterator[Case]:
    from torch.testing._internal.common_methods_invocations import op_db

    op = next(o for o in op_db if o.name == "nn.functional.conv_transpose3d")
    for dtype in (torch.float32, torch.float64):
        for at, given in enumerate(op.sample_inputs("cpu", dtype)):
            weight, bias = given.args
            shape, count = tuple(given.input.shape), 0 if bias is None else len(bias)
            name = f"sample {at} {dtype} {described(**given.kwargs)}"
            case = of_call(
                name, shape, tuple(weight.shape), count, given.kwargs, dtype=str(dtype).removeprefix("torch.")
            )
            read = _in_dtype(shape, tuple(weight.shape), count, given.kwargs, case.dtype)
            yield Case(**{**vars(case), "read": read})


def _in_dtype(x: Any, w: Any, bias: int, geometry: dict[str, Any], dtype: str) -> Any:
    return lambda: words.conv_transpose3d(x, w, (bias,) if bias else None, **geometry, dtype=dtype)


def module_inputs() -> Iterator[Case]:
    """The module database's two inputs, for the module and for its lazy form."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        if info.module_cls in (torch.nn.ConvTranspose3d, torch.nn.LazyConvTranspose3d):
            for given in info.module_inputs_func(info, "cpu", torch.float32, False, False):
                made, x = given.constructor_input, tuple(given.forward_input.args[0].shape)
                lazy = info.module_cls is torch.nn.LazyConvTranspose3d
                args = (x[-4], *made.args) if lazy else made.args
                yield of_module(f"{info.name} {given.desc}", x, args, made.kwargs)
