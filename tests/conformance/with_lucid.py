"""Lucid 2, which needs Python 3.12: its function, its layer, its documented examples."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import lucid
import numpy as np
from lucid import nn
from lucid.nn import functional as F

from conformance.suite import Case, Result, described, run, sample
from opcompile.importers import lucid as words

SYSTEM, VERSION = "Lucid", version("lucid-dl")


def suites() -> Iterator[Result]:
    yield run("lucid", SYSTEM, VERSION, "grid of F.conv_transpose3d", grid())
    yield run("lucid-wrong", SYSTEM, VERSION, "wrong and odd calls", wrong())
    yield run("lucid-layer", SYSTEM, VERSION, "grid of nn.ConvTranspose3d, padding strings", layers())
    yield run("lucid-documented", SYSTEM, VERSION, "its documented examples", documented())


def of_call(name: str, x: Any, w: Any, bias: int, geometry: dict[str, Any], **more: Any) -> Case:
    def theirs(a: Any, b: Any, c: Any) -> np.ndarray:
        tensors = [None if t is None else lucid.tensor(t) for t in (a, b, c)]
        return F.conv_transpose3d(*tensors, **geometry).numpy()

    given = (bias,) if bias else None
    return Case(name, lambda: words.conv_transpose3d(x, w, given, **geometry), theirs, x, w, bias, **more)


def grid() -> Iterator[Case]:
    rows = sample(
        7,
        300,
        kernel=[(1, 1, 1), (2, 3, 1), (3, 3, 3), (2, 2, 3)],
        stride=[1, 2, (1, 2, 3)],
        padding=[0, (0, 1, 1)],
        output_padding=[0, 1, (0, 1, 2)],
        dilation=[1, 2, (1, 2, 1)],
        groups=[1, 2],
        bias=[False, True],
    )
    for row in rows:
        kernel, bias = row.pop("kernel"), row.pop("bias")
        x, w = (2, 4, 3, 4, 3), (4, 3, *kernel)
        yield of_call(described(k=kernel, **row, bias=bias), x, w, 3 * row["groups"] * bias, row)


def wrong() -> Iterator[Case]:
    x, w = (1, 4, 3, 3, 3), (4, 2, 3, 3, 3)
    for geometry in (
        {"stride": 2, "output_padding": 2},
        {"groups": 3},
        {"dilation": 2, "output_padding": 1},
        {"output_padding": -1},
        {"padding": 5},
        {"output_padding": (1, 1)},
        {"stride": (np.int64(2),) * 3},
    ):
        yield of_call(described(**geometry), x, w, 0, geometry)
    for geometry in (
        {"groups": 0},
        {"stride": 0},
        {"padding": "same"},
        {"stride": (2, 2)},
        {"stride": 2.0},
        {"groups": 2.0},
    ):
        yield of_call(described(**geometry), x, w, 0, geometry, wordless=True)
    yield of_call("negative padding", x, w, 0, {"padding": -1})
    yield of_call("channels", (1, 3, 3, 3, 3), w, 0, {})
    yield of_call("bias", x, w, 3, {}, wordless=True)
    yield of_call("4-D weight", x, (4, 2, 3, 3), 0, {})


def of_layer(name: str, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **more: Any) -> Case:
    def theirs(a: Any, w: Any, b: Any) -> np.ndarray:
        layer = nn.ConvTranspose3d(*args, **kwargs)
        layer.weight.data = w
        if b is not None:
            layer.bias.data = b
        return layer(lucid.tensor(a)).numpy()

    kernel = args[2] if isinstance(args[2], tuple) else (args[2],) * 3
    groups = kwargs.get("groups", 1) or 1
    bias = args[1] if kwargs.get("bias", True) else 0
    shape = (args[0], args[1] // groups, *kernel)
    return Case(name, lambda: words.ConvTranspose3d(*args, **kwargs, input=x), theirs, x, shape, bias, **more)


def layers() -> Iterator[Case]:
    rows = sample(
        8,
        60,
        k=[2, 3, (1, 2, 4)],
        stride=[1, 2, (1, 2, 3)],
        padding=["same", "valid", 0, 1],
        dilation=[1, 2],
        groups=[1, 3],
        bias=[True, False],
    )
    for row in rows:
        kernel = row.pop("k")
        yield of_layer(described(k=kernel, **row), (1, 6, 3, 3, 4), (6, 3, kernel), row)
    for kwargs in ({"groups": 4}, {"groups": 0}, {"padding": "full"}, {"output_padding": 1}):
        yield of_layer(described(**kwargs), (1, 4, 3, 3, 3), (4, 6, 3), kwargs)


def documented() -> Iterator[Case]:
    yield of_layer("upsampling", (1, 4, 8, 8, 8), (4, 2, 3), {"stride": 2, "padding": 1, "output_padding": 1})
    yield of_layer("decoder", (2, 8, 4, 4, 4), (8, 4, 4), {"stride": 2, "padding": 1})
    yield of_call("basic", (1, 1, 1, 1, 1), (1, 1, 2, 2, 2), 1, {"stride": 1, "padding": 0})
    yield of_call("stride=2: (1,1,2,2,2), whatever the page says", (1, 1, 1, 1, 1), (1, 1, 2, 2, 2), 1, {"stride": 2})
    yield of_call("grouped", (1, 2, 1, 1, 1), (2, 1, 1, 1, 1), 2, {"groups": 2})
