"""JAX: lax.conv_transpose, with all its ways to lay out arrays and to pad."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import lax

from conformance.suite import Case, Result, described, run, sample
from opcompile.importers import jax as words

SYSTEM, VERSION = "JAX", jax.__version__
LAYOUTS = [
    None,
    ("NDHWC", "DHWIO", "NDHWC"),
    ("NCDHW", "OIDHW", "NCDHW"),
    ("NHDWC", "DHWIO", "NWDHC"),
    ("CNXYZ", "XYZOI", "NXYZC"),
]


def suites() -> Iterator[Result]:
    yield run("jax", SYSTEM, VERSION, "grid of lax.conv_transpose", grid())
    yield run("jax-wrong", SYSTEM, VERSION, "wrong and odd calls", wrong())


def of_call(name: str, x: Any, w: Any, strides: Any, padding: Any, more: dict[str, Any], **case: Any) -> Case:
    def theirs(a: Any, b: Any, _c: Any) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(lax.conv_transpose(a, b, strides, padding, **more))

    return Case(name, lambda: words.conv_transpose(x, w, strides, padding, **more), theirs, x, w, **case)


def shaped(layout: str, spatial: str, sizes: dict[str, int], three: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sizes.get(letter) or three[spatial.index(letter)] for letter in layout)


def grid() -> Iterator[Case]:
    rows = sample(
        6,
        140,
        kernel=[(1, 1, 1), (2, 3, 1), (3, 3, 3), (4, 2, 5)],
        strides=[(1, 1, 1), (2, 2, 2), (1, 2, 3)],
        padding=["SAME", "VALID", ((1, 1), (0, 2), (3, 4)), [(2, 3), (5, 1), (4, 4)], ((-1, 2), (1, 1), (0, 3))],
        rhs_dilation=[None, (2, 1, 2)],
        dimension_numbers=LAYOUTS,
        transpose_kernel=[False, True],
        use_consistent_padding=[False, True],
    )
    for row in rows:
        kernel, strides, padding = row.pop("kernel"), row.pop("strides"), row.pop("padding")
        letters = row["dimension_numbers"] or ("NHWDC", "HWDIO", "NHWDC")
        spatial = "".join(letter for letter in letters[1] if letter not in "OI")
        inner, outer = (3, 2) if row["transpose_kernel"] else (2, 3)
        x = shaped(letters[0], spatial, {"N": 2, "C": 2}, (3, 4, 3))
        w = shaped(letters[1], spatial, {"I": inner, "O": outer}, kernel)
        yield of_call(described(k=kernel, s=strides, p=padding, **row), x, w, strides, padding, row)


def wrong() -> Iterator[Case]:
    x, w, s = (1, 3, 4, 5, 4), (3, 3, 3, 4, 2), (2, 2, 2)
    yield of_call("a scalar stride", x, w, 2, "SAME", {})
    yield of_call("two strides", x, w, (2, 2), "SAME", {})
    yield of_call("same", x, w, s, "same", {})
    yield of_call("scalars for pairs", x, w, s, (1, 1, 1), {})
    yield of_call("two pairs", x, w, s, [(1, 1)] * 2, {})
    yield of_call("a stride of 0", x, w, (0, 2, 2), "SAME", {})
    yield of_call("a dilation of 0", x, w, s, "SAME", {"rhs_dilation": (0, 2, 2)})
    yield of_call("channels", x, w, s, "SAME", {"transpose_kernel": True})
    for numbers in (
        ("NABBC", "DHWIO", "NWDHC"),
        ("NABDC", "DHWIO", "NWDHC"),
        ("NDHWC", "DHWIO"),
        ("NDHW", "DHWIO", "NDHWC"),
        ("NNDHW", "DHWIO", "NDHWC"),
    ):
        yield of_call(described(n=numbers), x, w, s, "SAME", {"dimension_numbers": numbers})
    yield of_call("4-D", x, w[1:], s, "SAME", {}, wordless=True)
    for padding in ("SAME_LOWER", "same", "valid", "full"):  # JAX takes the first three at strides of 1 alone
        yield of_call(f"{padding} at strides of 1", x, (3, 2, 3, 4, 2), (1, 1, 1), padding, {})
        yield of_call(f"{padding} at strides of 2", x, (3, 2, 3, 4, 2), s, padding, {})
        consistent = {"use_consistent_padding": True}
        yield of_call(f"{padding}, consistent", x, (3, 2, 3, 4, 2), (1, 1, 1), padding, consistent)
    yield of_call("lists, consistent", x, w, s, [[1, 1]] * 3, {"use_consistent_padding": True})
    yield of_call("no padding", x, w, s, None, {})
    yield of_call("positions", x, w, s, "SAME", {"dimension_numbers": (1, 2, 3)})
