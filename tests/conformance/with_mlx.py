"""MLX on the CPU: its function, its module, its own grid; and Rmlx's words, which call it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np

from conformance.suite import Case, Result, described, run, sample
from opcompile.importers import mlx as words
from opcompile.importers import rmlx

SYSTEM, VERSION = "MLX", version("mlx")


def suites() -> Iterator[Result]:
    yield run("mlx", SYSTEM, VERSION, "grid of conv_transpose3d", grid())
    yield run("mlx-wrong", SYSTEM, VERSION, "wrong calls, and what MLX does not check", odd())
    yield run("mlx-module", SYSTEM, VERSION, "grid of nn.ConvTranspose3d", modules())
    yield run("mlx-own", SYSTEM, VERSION, "the layers of its own 3-D tests", own())
    yield run("mlx-groups", SYSTEM, VERSION, "groups, against its 2-D call (its 3-D one refuses them)", groups())
    yield run("rmlx", "Rmlx", f"on MLX {VERSION}", "R's words, computed by MLX (R is not run)", rmlx_grid())


def called(x: Any, w: Any, b: Any, geometry: dict[str, Any]) -> np.ndarray:
    y = np.array(mx.conv_transpose3d(mx.array(x), mx.array(w), **geometry))
    return y if b is None else y + b


def of_call(name: str, x: Any, w: Any, geometry: dict[str, Any], **more: Any) -> Case:
    return Case(
        name,
        lambda: words.conv_transpose3d(x, w, **geometry),
        lambda *arrays: called(*arrays, geometry),
        x,
        w,
        **more,
    )


def grid() -> Iterator[Case]:
    rows = sample(
        2,
        130,
        kernel=[(1, 1, 1), (2, 3, 1), (3, 3, 3), (4, 2, 3)],
        stride=[1, 2, (1, 2, 3), [3, 2, 1]],
        padding=[0, 1, (0, 1, 2)],
        dilation=[1, 2, (1, 3, 2)],
        output_padding=[0, 1, (1, 0, 2), 3],
        batch=[1, 2],
    )
    for row in rows:
        kernel, batch = row.pop("kernel"), row.pop("batch")
        yield of_call(described(k=kernel, n=batch, **row), (batch, 4, 5, 3, 2), (3, *kernel, 2), row)


def odd() -> Iterator[Case]:
    x, w = (1, 3, 3, 3, 4), (2, 3, 3, 3, 4)
    for geometry in (
        {"stride": 2, "output_padding": 2},
        {"stride": 2, "output_padding": 3},
        {"padding": -1},
        {"stride": 2, "padding": (-2, 0, -3), "dilation": 2},
        {"output_padding": -1},
        {"padding": 5},
        {"padding": 3, "stride": 3},
        {"groups": 2},
        {"stride": 0},
        {"stride": -1},
        {"dilation": 0},
        {"padding": "same"},
        {"stride": (2, 2)},
        {"stride": 2.0},
        {"stride": np.int64(2), "padding": np.array([1, 0, 1])},
        {"groups": 1.0},
        {"groups": "1"},
    ):
        yield of_call(described(**geometry), x, w, geometry)
    for given, weight in ((x, (2, 3, 3, 3, 5)), (x, (2, 3, 3, 4)), ((3, 3, 3, 4), w)):
        case = of_call(described(x=given, w=weight), given, weight, {})
        yield Case(**{**vars(case), "wordless": len(given) == 4})
    yield of_call("x=(1,0,3,3,4)", (1, 0, 3, 3, 4), w, {}, uncomputed="an input of size 0")
    yield of_call("x=(0,3,3,3,4)", (0, 3, 3, 3, 4), w, {}, uncomputed="a batch of 0")


def modules() -> Iterator[Case]:
    rows = sample(
        3, 40, k=[2, 3, (1, 2, 4)], s=[1, 2, (1, 2, 3)], p=[0, 1], d=[1, 2], op=[0, 1, (0, 1, 2)], bias=[True, False]
    )
    for row in rows:
        args = (2, 3, row["k"], row["s"], row["p"], row["d"], row["op"], row["bias"])
        kernel = row["k"] if isinstance(row["k"], tuple) else (row["k"],) * 3
        yield Case(
            described(**row),
            _reader(args),
            _runner(args),
            (2, 4, 3, 5, 2),
            (3, *kernel, 2),
            3 if row["bias"] else 0,
        )


def _reader(args: tuple[Any, ...]) -> Any:
    return lambda: words.ConvTranspose3d(*args, input=(2, 4, 3, 5, 2))


def _runner(args: tuple[Any, ...]) -> Any:
    def theirs(x: Any, w: Any, b: Any) -> np.ndarray:
        module = mlx.nn.ConvTranspose3d(*args)
        module.weight = mx.array(w)
        if b is not None:
            module.bias = mx.array(b)
        return np.array(module(mx.array(x)))

    return theirs


def own() -> Iterator[Case]:
    """The parameters of test_torch_conv_transpose_3D (12), test_torch_conv_3D_grad (30), and output paddings (10)."""
    forward = [((1,) * 3, (1,) * 3, 1, 0, 1, 0), ((3,) * 3, (3, 1, 1), 1, 0, 1, 0), ((15,) * 3, (3,) * 3, 3, 2, 1, 0)]
    for (n, c, o), row in itertools.product([(1, 1, 1), (1, 6, 1), (1, 1, 6), (2, 8, 16)], forward):
        yield _own("3D", n, c, o, *row)
    gradient = [
        ((1,) * 3, (1,) * 3, 1, 0, 1, 0),
        ((3,) * 3, (3, 1, 1), 1, 0, 1, 0),
        ((15,) * 3, (5,) * 3, 5, 2, 1, 0),
        ((16,) * 3, (3,) * 3, 2, 1, 1, 0),
        ((15,) * 3, (5,) * 3, 5, 2, (3, 2, 2), 0),
        ((16,) * 3, (3,) * 3, 2, 1, (3, 2, 2), 0),
    ]
    for (n, c, o), row in itertools.product([(1, 1, 1), (1, 6, 1), (1, 1, 6), (2, 4, 8), (2, 8, 16)], gradient):
        yield _own("3D grad", n, c, o, *row)
    extra = [
        ((4,) * 3, (3,) * 3, 2, 1, 1, 1),
        ((3, 4, 5), (3, 3, 3), (2, 2, 3), 0, 1, (1, 0, 2)),
        ((1,) * 3, (2,) * 3, 2, 0, 1, 1),
    ]
    for (n, c, o), row in itertools.product([(1, 1, 1), (1, 3, 2), (2, 4, 8)], extra):
        yield _own("3d output padding", n, c, o, *row)
    yield _own("C++ 3d output padding", 1, 1, 1, (2, 2, 2), (1, 1, 1), 2, 0, 1, 1)


def _own(test: str, n: int, c: int, o: int, size: Any, kernel: Any, s: Any, p: Any, d: Any, op: Any) -> Case:
    geometry = {"stride": s, "padding": p, "dilation": d, "output_padding": op}
    name = described(n=n, c=c, o=o, size=size, kernel=kernel, **geometry)
    return of_call(f"{test} {name}", (n, *size, c), (o, *kernel, c), geometry)


def groups() -> Iterator[Case]:
    """MLX's 2-D call computes groups; ours in 3-D, with a depth of one, must give the same."""
    rows = sample(4, 24, g=[2, 3], k=[(2, 3), (3, 3)], s=[1, 2, (3, 2)], p=[0, 1], d=[1, 2], op=[0, 1])
    for row in rows:
        flat = {"stride": row["s"], "padding": row["p"], "dilation": row["d"], "output_padding": row["op"]}
        deep = {name: _deep(value, int(name in ("stride", "dilation"))) for name, value in flat.items()}
        x, w = (2, 1, 4, 3, 6), (6, 1, *row["k"], 6 // row["g"])
        yield Case(described(**row), _grouped(x, w, deep, row["g"]), _flat(flat, row["g"]), x, w)


def _deep(value: Any, depth: int) -> tuple[int, ...]:
    return (depth, *((value, value) if isinstance(value, int) else value))


def _grouped(x: Any, w: Any, geometry: dict[str, Any], count: int) -> Any:
    return lambda: words.conv_transpose3d(x, w, **geometry, groups=count, strict=False)


def _flat(geometry: dict[str, Any], count: int) -> Any:
    def theirs(x: Any, w: Any, _b: Any) -> np.ndarray:
        return np.array(mx.conv_transpose2d(mx.array(x[:, 0]), mx.array(w[:, 0]), **geometry, groups=count))[:, None]

    return theirs


def rmlx_grid() -> Iterator[Case]:
    """R recycles scalars, and its whole numbers may be doubles; arrays lie column by column."""
    rows = sample(5, 27, stride=[1, 2.0, (1, 2, 3)], padding=[0, (1.0,), (0, 1, 1)], output_padding=[0, 1, [1, 0, 2]])
    for row in rows:
        for_mlx = {name: _ints(value) for name, value in row.items()}
        yield Case(
            described(**row),
            _rmlx(row),
            _column_major(for_mlx),
            (1, 3, 4, 2, 3),
            (4, 2, 2, 2, 3),
        )


def _ints(value: Any) -> tuple[int, ...]:
    given = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(int(n) for n in (given * 3 if len(given) == 1 else given))


def _rmlx(row: dict[str, Any]) -> Any:
    return lambda: rmlx.mlx_conv_transpose3d((1, 3, 4, 2, 3), (4, 2, 2, 2, 3), **row)


def _column_major(geometry: dict[str, Any]) -> Any:
    return lambda x, w, b: called(np.asfortranarray(x), np.asfortranarray(w), b, geometry)
