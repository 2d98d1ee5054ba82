"""PyTorch's operator, where it is installed: the oracle means what PyTorch means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from strategies import arrays, specs

from opcompile.bounds import compare
from opcompile.cases import Case, tagged
from opcompile.spec import Activation, ConvTranspose3d

pytestmark = pytest.mark.peers


def in_torch(spec: ConvTranspose3d, x, w, b) -> np.ndarray:
    """The sum and the bias in PyTorch: symmetric pads, and what they leave over cropped or filled by hand."""
    import torch

    x = np.moveaxis(x, -1, 1) if spec.layout == "NDHWC" else x
    tensors = [None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in (x, w, None)]
    y = torch.nn.functional.conv_transpose3d(
        *tensors, stride=[a.stride for a in spec.axes], dilation=[a.dilation for a in spec.axes], groups=spec.groups
    ).numpy()
    room = [(0, 0), (0, 0), *((0, max(0, a.begin + a.out - a.full)) for a in spec.axes)]
    y = np.pad(y, room)[(..., *(slice(a.begin, a.begin + a.out) for a in spec.axes))]
    y = y if b is None else y + b[:, None, None, None]
    return np.moveaxis(y, 1, -1) if spec.layout == "NDHWC" else y


def plain(spec: ConvTranspose3d) -> ConvTranspose3d:
    return replace(spec, dtype="float64", activation=Activation())


@pytest.mark.parametrize("c", [c for c in tagged("corner") if "activation" not in c.tags], ids=lambda c: c.name)
def test_every_corner_means_the_same_in_pytorch(c: Case) -> None:
    spec = plain(c.spec)
    for integers in (8, None):
        x, w, b = arrays(spec, integers=integers)
        assert compare(spec, in_torch(spec, x, w, b), x, w, b, exact=integers is not None).passed


@settings(max_examples=100)
@given(specs())
def test_any_layer_means_the_same_in_pytorch(spec: ConvTranspose3d) -> None:
    spec = plain(spec)
    x, w, b = arrays(spec, integers=8)
    assert compare(spec, in_torch(spec, x, w, b), x, w, b, exact=True).passed


def test_the_module_with_all_its_words_means_the_same() -> None:
    import torch

    spec = ConvTranspose3d.parse("in=2x6x3x4x5 co=9 k=3x4x5 s=2x1x3 p=1x0x2 op=1x1x0 d=1x2x1 g=3")
    x, w, b = arrays(spec)
    layer = torch.nn.ConvTranspose3d(6, 9, (3, 4, 5), (2, 1, 3), (1, 0, 2), (1, 1, 0), groups=3, dilation=(1, 2, 1))
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(w))
        layer.bias.copy_(torch.from_numpy(b))
        y = layer(torch.from_numpy(x)).numpy()
    assert compare(spec, y, x, w, b).passed
