"""TVM's own NumPy oracle of the operator, topi.testing.conv3d_transpose_ncdhw_python, put to ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tvm
from tvm.topi.testing import conv3d_transpose_ncdhw_python

from conformance.suite import Case, Result, described, run, sample
from opcompile.importers import torch as words


def suites() -> Iterator[Result]:
    yield run("tvm", "TVM topi.testing", tvm.__version__, "its NumPy oracle, by PyTorch's words", grid())


def grid() -> Iterator[Case]:
    rows = sample(
        10,
        180,
        kernel=[(1, 1, 1), (2, 3, 1), (3, 3, 3), (4, 2, 3)],
        stride=[(1, 1, 1), (2, 2, 2), (1, 2, 3), (3, 2, 1)],
        padding=[(0, 0, 0), (1, 1, 1), (0, 1, 0)],
        output_padding=[(0, 0, 0), (0, 1, 0), (1, 1, 0)],
        groups=[1, 2],
    )
    for row in rows:
        kernel = row.pop("kernel")
        fits = all(
            op < s and p < k
            for op, s, p, k in zip(row["output_padding"], row["stride"], row["padding"], kernel, strict=True)
        )
        if fits:  # the oracle has no rules of its own beyond an assertion, and pads less than a kernel
            yield of_oracle(described(k=kernel, **row), (1, 4, 3, 4, 3), (4, 3, *kernel), row)


def of_oracle(name: str, x: Any, w: Any, geometry: dict[str, Any]) -> Case:
    def theirs(a: Any, b: Any, _c: Any) -> np.ndarray:
        pads = tuple(geometry["padding"]) * 2
        return conv3d_transpose_ncdhw_python(
            a, b, geometry["stride"], pads, geometry["output_padding"], geometry["groups"]
        )

    return Case(name, lambda: words.conv_transpose3d(x, w, **geometry), theirs, x, w, rounds=True)
