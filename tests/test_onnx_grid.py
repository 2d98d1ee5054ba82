"""The 144 layers of ONNX Runtime's own attribute grid for three dimensions, against ONNX Runtime.

Groups x bias x strides x dilation x six ways of padding: the dimensions of ONNX Runtime's parameterised
ConvTranspose tests (pull request 32688), in our own sizes. The oracle computes all; a quarter, in which every three
choices meet, is compiled at once, and the others where time is no matter.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from kernels import kernel
from numpy.typing import NDArray
from onnx_engine import integers, one_node, run_onnxruntime

from opcompile.importers.onnx import find
from opcompile.reference import reference
from opcompile.spec import ConvTranspose3d

Operands = tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]

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


def compiled_at_once(choices: tuple[str, ...]) -> bool:
    """Of each kind of channels and of padding two rows that differ in all the rest: which two, goes in turn."""
    dimensions = (list(_CHANNELS), ["bias", "plain"], list(_STRIDES), list(_DILATIONS), list(_PADDINGS))
    channels, bias, stride, dilation, how = (n.index(name) for n, name in zip(dimensions, choices, strict=True))
    return 2 * (bias ^ stride) + (bias ^ dilation) == (channels + how) % 4


def test_there_are_144() -> None:
    assert len(_GRID) == 144


def test_every_three_choices_meet_in_what_is_compiled_at_once() -> None:
    chosen = [row for row in _GRID if compiled_at_once(row)]
    for three in combinations(range(5), 3):
        every, met = ({tuple(row[i] for i in three) for row in rows} for rows in (_GRID, chosen))
        assert met == every
    assert len(chosen) == 36, "with fewer they could not: of channels, paddings and two of the rest"


def in_onnxruntime(choices: tuple[str, ...]) -> tuple[ConvTranspose3d, Operands, NDArray[Any]]:
    """What a node of the grid means, its operands, and what ONNX Runtime computes."""
    channels, bias, stride, dilation, how = choices
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
    (y,) = run_onnxruntime(model, {"X": x, "W": w} | ({} if b is None else {"B": b}))
    return found.spec, (x, w, b), y


@pytest.mark.parametrize("choices", _GRID, ids="-".join)
def test_the_oracle(choices: tuple[str, ...]) -> None:
    spec, operands, expected = in_onnxruntime(choices)
    np.testing.assert_array_equal(reference(spec, *operands), expected)


@pytest.mark.parametrize(
    "choices",
    [pytest.param(row, marks=[pytest.mark.heavy] * (not compiled_at_once(row))) for row in _GRID],
    ids="-".join,
)
def test_the_kernel(choices: tuple[str, ...]) -> None:
    spec, operands, expected = in_onnxruntime(choices)
    np.testing.assert_array_equal(kernel(spec, optimised=False)(*operands), expected)
