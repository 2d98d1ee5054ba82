"""TensorFlow on the CPU: tf.nn.conv3d_transpose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from conformance.suite import Case, Result, described, run, sample
from opcompile.importers import tensorflow as words

SYSTEM, VERSION = "TensorFlow", tf.__version__


def suites() -> Iterator[Result]:
    yield run("tensorflow", SYSTEM, VERSION, "grid of tf.nn.conv3d_transpose", grid())
    yield run("tensorflow-wrong", SYSTEM, VERSION, "wrong and odd calls", wrong())


def of_call(name: str, x: Any, w: Any, args: tuple[Any, ...], **more: Any) -> Case:
    def theirs(a: Any, b: Any, _c: Any) -> np.ndarray:
        return tf.nn.conv3d_transpose(a, b, *args).numpy()

    return Case(name, lambda: words.conv3d_transpose(x, w, *args), theirs, x, w, **more)


def grid() -> Iterator[Case]:
    rows = sample(
        9,
        240,
        kernel=[(1, 1, 1), (2, 3, 1), (3, 3, 3), (4, 2, 5)],
        strides=[1, 2, (1, 2, 3), (1, 3, 2, 2, 1)],
        padding=["SAME", "VALID"],
        room=[(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 2), (-1, 0, 0)],
        batch=[1, 2],
    )
    for row in rows:
        kernel, batch, strides = row["kernel"], row["batch"], row["strides"]
        x = (batch, 3, 4, 2, 2)
        s = (strides,) * 3 if isinstance(strides, int) else strides if len(strides) == 3 else strides[1:4]
        reach = (1, 1, 1) if row["padding"] == "SAME" else kernel
        out = [(i - 1) * a + k + r for i, a, k, r in zip(x[1:4], s, reach, row["room"], strict=True)]
        if min(out) > 0:
            y = (batch, *out, 3)
            yield of_call(described(**row), x, (*kernel, 3, 2), (y, strides, row["padding"]))


def wrong() -> Iterator[Case]:
    x, w, y = (1, 3, 3, 3, 4), (3, 3, 3, 2, 4), (1, 6, 6, 6, 2)
    for name, args in {
        "too large": ((1, 7, 7, 7, 2), 2),
        "too small": ((1, 4, 4, 4, 2), 2),
        "VALID, too small": ((1, 6, 6, 6, 2), 2, "VALID"),
        "channels of the output": ((1, 6, 6, 6, 3), 2),
        "batch": ((2, 6, 6, 6, 2), 2),
        "same": (y, 2, "same"),
        "FULL": (y, 2, "FULL"),
        "two strides": (y, (2, 2)),
        "a stride of 0": (y, 0),
        "dilation": ((1, 3, 3, 3, 2), 1, "SAME", "NDHWC", 2),
        "data_format": (y, 2, "SAME", "NHWDC"),
        "the spatial sizes alone": ((6, 6, 6), 2),
        "a scalar for a shape": (6, 2),
        "NumPy's integers": (np.array(y), np.array([2, 2, 2])),
        "a string for strides": (y, "a"),
        "a dilation of 0": (y, 2, "SAME", "NDHWC", 0),
    }.items():
        # TensorFlow speaks of dilations above 1 there
        yield of_call(name, x, w, args, wordless=name == "a dilation of 0")
    yield of_call("channels of the input", x, (3, 3, 3, 2, 5), (y, 2))
    yield of_call("4-D", x[1:], w, (y, 2))
    yield of_call("a stride over the batch", x, w, (y, (2, 2, 2, 2, 1)))
