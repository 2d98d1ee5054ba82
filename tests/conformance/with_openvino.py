"""OpenVINO on the CPU, by the words that `opcompile.say` writes for it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np

from conformance.suite import Case, Result, run, sample
from opcompile.ask import ask
from opcompile.importers.imported import Imported
from opcompile.say import openvino_call
from opcompile.spec import Axis, ConvTranspose3d, at_batch

SYSTEM, VERSION = "OpenVINO", version("openvino").split("-")[0]


def suites() -> Iterator[Result]:
    yield run("openvino", SYSTEM, VERSION, "grid of (Group)ConvolutionBackpropData", grid())


def grid() -> Iterator[Case]:
    rows = sample(
        11,
        130,
        kernel=[(1, 1, 1), (2, 3, 1), (3, 3, 3), (4, 2, 3)],
        stride=[(1, 1, 1), (2, 2, 2), (1, 2, 3), (3, 2, 1)],
        pads=[((0, 0),) * 3, ((1, 1),) * 3, ((0, 1), (1, 0), (0, 0)), ((0, 2), (1, 1), (2, 0))],
        extra=[(0, 0, 0), (1, 0, 1), (0, 3, 0)],
        dilation=[(1, 1, 1), (2, 1, 3)],
        groups=[1, 2],
        bias=[False, True],
    )
    for row in rows:
        sizes = zip((4, 3, 5), row["kernel"], row["stride"], row["dilation"], row["pads"], row["extra"], strict=True)
        axes = [Axis(*axis) for axis in sizes]
        spec = ConvTranspose3d(2, 4, 6, (axes[0], axes[1], axes[2]), row["groups"], row["bias"])
        yield of_spec(spec)


def of_spec(spec: ConvTranspose3d) -> Case:
    layer = Imported(SYSTEM, spec)

    def theirs(x: Any, w: Any, b: Any) -> np.ndarray:
        return ask(SYSTEM, openvino_call(spec), layer, x, w, b)[1]

    shape = at_batch(spec.x_shape, 1)
    return Case(str(spec), lambda: layer, theirs, shape, spec.w_shape, spec.channels_out * spec.bias)
