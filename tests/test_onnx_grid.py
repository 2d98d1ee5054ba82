"""The 144 layers of ONNX Runtime's own attribute grid for three dimensions, against ONNX Runtime.

Groups x bias x strides x dilation x six ways of padding: the dimensions of ONNX Runtime's parameterised
ConvTranspose tests (pull request 32688), in our own sizes.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from kernels import kernel
from onnx_engine import integers, one_node, run_onnxruntime

from opcompile.importers.onnx import find

_SIZES, _KERNEL = (3, 4, 5), (3, 2, 4)
# name -> (groups, channels in, channels out of a group)
_CHANNELS = {"dense": (1, 3, 4), "groups": (2, 4, 3), "depthwise": (4, 4, 1)}
_STRIDES = {"s1": (1, 1, 1), "s2x3x2": (2, 3, 2)}
_DILATIONS = {"d1": (1, 1, 1), "d2x1x3": (2, 1, 3)}
_PADDINGS = ("asymmetric", "same-upper", "same-lower", "valid", "output-padding", "output-shape")

_GRID = list(product(_CHANNELS, ("bias", "plain"), _STRIDES, _DILATIONS, _PADDINGS))


def padding(how: str, strides: tuple[int, ...], dilations: tuple[int, ...]) -> dict[str, Any]:
    """Return the attributes; where all strides are 1 there is no output_padding that ONNX Runtime accepts but 0."""
    full = [(n - 1) * s + d * (k - 1) + 1 for n, k, s, d in zip(_SIZES, _KERNEL, strides, dilations, strict=True)]
    return {
        "asymmetric": {"pads": [1, 0, 2, 0, 1, 1]},
        "same-upper": {"auto_pad": "SAME_UPPER"},
        "same-lower": {"auto_pad": "SAME_LOWER"},
        "valid": {"auto_pad": "VALID"},
        "output-padding": {"output_padding": [s - 1 for s in strides], "pads": [1, 1, 1, 1, 1, 1]},
        "output-shape": {"output_shape": [full[0] - 1, full[1] - 2, full[2] + strides[2] - 1]},
    }[how]


def test_there_are_144() -> None:
    assert len(_GRID) == 144


@pytest.mark.parametrize(("channels", "bias", "stride", "dilation", "how"), _GRID, ids=str)
def test_grid(channels: str, bias: str, stride: str, dilation: str, how: str) -> None:
    groups, c, m = _CHANNELS[channels]
    strides, dilations = _STRIDES[stride], _DILATIONS[dilation]
    x, w = integers((2, c, *_SIZES)), integers((c, m, *_KERNEL), seed=1)
    b = integers((groups * m,), seed=2) if bias == "bias" else None
    model = one_node(
        x.shape,
        w.shape,
        bias=None if b is None else groups * m,
        group=groups,
        strides=strides,
        dilations=dilations,
        **padding(how, strides, dilations),
    )
    (found,) = find(model)
    assert found.spec is not None, found.reason
    expected = run_onnxruntime(model, {"X": x, "W": w} | ({} if b is None else {"B": b}))[0]
    np.testing.assert_array_equal(kernel(found.spec, optimised=False)(x, w, b), expected)
