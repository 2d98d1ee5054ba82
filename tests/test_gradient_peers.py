"""Other systems' gradients, where they are installed: the oracle means what they mean, and kernels train."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradient_kernels import draw, gradients_of, kernel
from hypothesis import given, settings
from strategies import specs
from test_gradients import TAKEN_TWICE

import opcompile
from opcompile.cases import Case, tagged
from opcompile.errors import CallError
from opcompile.gradients.bounds import compare
from opcompile.gradients.gradient import Gradient
from opcompile.reference import reference as forward
from opcompile.spec import ACTIVATIONS, Activation, ConvTranspose3d

pytestmark = pytest.mark.peers

# PyTorch has no exponential as an activation, and holds the 1/6 of its hard sigmoid in float32
SLOPES = [n for n in ACTIVATIONS if n not in (*TAKEN_TWICE, "none", "exponential", "hard_sigmoid")]


def plain(spec: ConvTranspose3d) -> ConvTranspose3d:
    return replace(spec, dtype="float64", activation=Activation())


def operands_of(spec: ConvTranspose3d, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"x": spec.x_shape, "w": spec.w_shape, "dy": spec.y_shape}
    return {n: rng.integers(-3, 4, [k or 2 for k in s]).astype(spec.dtype) for n, s in shapes.items()}


def in_torch(spec: ConvTranspose3d, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The three gradients by autograd: symmetric pads, and what they leave over cropped or filled by slices."""
    import torch

    x, w = (torch.tensor(values[name], requires_grad=True) for name in ("x", "w"))
    b = torch.zeros(spec.channels_out, dtype=x.dtype, requires_grad=True)
    first = x.movedim(-1, 1) if spec.layout == "NDHWC" else x
    y = torch.nn.functional.conv_transpose3d(
        first, w, stride=[a.stride for a in spec.axes], dilation=[a.dilation for a in spec.axes], groups=spec.groups
    )
    room = [n for a in reversed(spec.axes) for n in (0, max(0, a.begin + a.out - a.full))]
    y = torch.nn.functional.pad(y, room)[(..., *(slice(a.begin, a.begin + a.out) for a in spec.axes))]
    y = y + b[:, None, None, None]
    y = y.movedim(1, -1) if spec.layout == "NDHWC" else y
    y.backward(torch.tensor(values["dy"]))
    return {"x": x.grad.numpy(), "w": w.grad.numpy(), "b": b.grad.numpy()}


def require_same(spec: ConvTranspose3d, theirs: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
    for gradient in gradients_of(spec):
        operands = {name: values[name] for name in gradient.operands}
        compare(gradient, theirs[gradient.wrt], operands, exact=True).require()


@pytest.mark.parametrize("c", [c for c in tagged("corner") if "activation" not in c.tags], ids=lambda c: c.name)
def test_every_corner_has_pytorch_s_gradients(c: Case) -> None:
    spec = plain(c.spec)
    values = operands_of(spec)
    require_same(spec, in_torch(spec, values), values)


@settings(max_examples=100)
@given(specs())
def test_any_layer_has_pytorch_s_gradients(spec: ConvTranspose3d) -> None:
    spec = plain(spec)
    values = operands_of(spec)
    require_same(spec, in_torch(spec, values), values)


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_are_those_of_pytorch_kinks_included(name: str) -> None:
    """dB of a layer that adds nothing else is the sum of dY times the slope: one element of each channel."""
    import torch

    z = np.concatenate([np.linspace(-7, 7, 113), [0.0, 6.0]])
    spec = ConvTranspose3d.parse(f"in=1x1x1x1x1 co={z.size} k=1 dtype=float64 act={name}")
    tensor = torch.tensor(z, requires_grad=True)
    getattr(torch.nn.functional, name)(tensor).sum().backward()
    ones, zeros = np.ones(spec.y_shape), np.zeros(spec.w_shape)  # type: ignore[arg-type]
    y = forward(spec, np.zeros((1, 1, 1, 1, 1)), zeros, z)
    compare(Gradient(spec, "b"), tensor.grad.numpy(), {"dy": ones, "y": y}).require()


MLX: list[str] = [
    "in=1x2x3x4x5 co=3 k=3",
    "in=2x4x3x4x5 co=6 k=3 s=2 p=1 op=1",
    "in=1x3x4x5x6 co=4 k=2x3x4 s=2x3x1 p=0x1x2",
    "in=1x3x4x5x6 co=4 k=3 d=2x1x3 p=1",
    "in=1x5x3x3x3 co=2 k=4 s=2 p=1",
    # the layers of MLX's own test_torch_conv_3D_grad, but for the widest channels
    *(
        f"in={n}x{c}x{layer} co={m}"
        for n, c, m in ((1, 1, 1), (1, 6, 1), (1, 1, 6), (2, 4, 8))
        for layer in (
            "1x1x1 k=1",
            "3x3x3 k=3x1x1",
            "15x15x15 k=5 s=5 p=2",
            "16x16x16 k=3 s=2 p=1",
            "15x15x15 k=5 s=5 p=2 d=3x2x2",
            "16x16x16 k=3 s=2 p=1 d=3x2x2",
        )
    ),
]


@pytest.mark.parametrize("text", MLX)
def test_mlx_has_the_same_gradients(text: str) -> None:
    mx = pytest.importorskip("mlx.core")
    spec = ConvTranspose3d.parse(f"{text} layout=NDHWC bias=0")
    values = operands_of(spec)
    mx.set_default_device(mx.cpu)

    def call(x: Any, w: Any) -> Any:
        names = {"stride": "stride", "padding": "begin", "dilation": "dilation", "output_padding": "output_pad"}
        words = {word: tuple(getattr(a, name) for a in spec.axes) for word, name in names.items()}
        return mx.conv_transpose3d(x, w, **words)

    w = np.ascontiguousarray(values["w"].transpose(1, 2, 3, 4, 0))
    _, found = mx.vjp(call, [mx.array(values["x"]), mx.array(w)], [mx.array(values["dy"])])
    dx, dw = (np.array(tensor) for tensor in found)
    require_same(spec, {"x": dx, "w": dw.transpose(4, 0, 1, 2, 3)}, values)


def test_kernels_have_the_gradients_of_a_pytorch_module() -> None:
    import torch

    spec = ConvTranspose3d.parse("in=2x20x3x4x5 co=9 k=3x4x5 s=2x1x3 p=1x0x2 op=1x1x0 d=1x2x1")
    layer = torch.nn.ConvTranspose3d(20, 9, (3, 4, 5), (2, 1, 3), (1, 0, 2), (1, 1, 0), dilation=(1, 2, 1))
    x = torch.randn(2, 20, 3, 4, 5, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    theirs = {"x": x.grad, "w": layer.weight.grad, "b": layer.bias.grad}
    values = {"x": x.detach().numpy(), "w": layer.weight.detach().numpy(), "dy": dy.numpy()}
    for gradient in gradients_of(spec):
        operands = {name: values[name] for name in gradient.operands}
        compare(gradient, theirs[gradient.wrt].numpy(), operands).require()
        compare(gradient, kernel(gradient)(draw(gradient) | operands), operands).require()


def test_the_example_trains_to_the_loss_of_pytorch() -> None:
    """Every step: rounding is carried on by the optimiser, but stays a thousandth of what was learnt."""
    example = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "examples" / "train_decoder.py"))
    theirs, ours = example["train"](compiled=False), example["train"](compiled=True)
    learnt = theirs[0] - theirs[-1]
    assert learnt > theirs[0] / 10
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < learnt / 1000


def test_the_example_refuses_second_derivatives_and_needs_no_bias() -> None:
    """A penalty on gradients, as of a WGAN, would lose them without an error."""
    torch = pytest.importorskip("torch")
    example = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "examples" / "train_decoder.py"))
    kernels = example["Kernels"](ConvTranspose3d.parse("in=1x3x2x3x2 co=4 k=3 s=2 bias=0"))
    x, w = torch.randn(1, 3, 2, 3, 2, requires_grad=True), torch.randn(3, 4, 3, 3, 3, requires_grad=True)
    y = example["Layer"].apply(x, w, None, kernels)
    (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    expected = torch.autograd.grad(torch.nn.functional.conv_transpose3d(x, w, stride=2).sum(), x)[0]
    assert torch.allclose(dx, expected, atol=1e-4)
    with pytest.raises(RuntimeError, match="no second derivatives; leave create_graph=True out"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_derivative_does_not_advise_what_loses_a_second_one() -> None:
    torch = pytest.importorskip("torch")
    spec = ConvTranspose3d.parse("in=1x3x2x3x2 co=4 k=3 s=2")
    dy = torch.randn(1, 4, 5, 7, 5, requires_grad=True)
    to_b = opcompile.compile(spec, derivative="b")
    words = r"^dy requires a gradient, and there are no second derivatives; leave create_graph=True out, or .*constant$"
    with pytest.raises(CallError, match=words):
        to_b(dy)
    assert torch.allclose(to_b(dy.detach()), dy.detach().sum((0, 2, 3, 4)), atol=1e-4)


def test_the_example_of_mlx_trains_to_the_loss_of_mlx() -> None:
    pytest.importorskip("mlx.core")
    example = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "examples" / "train_mlx.py"))
    layer = example["differentiable"](ConvTranspose3d.parse("in=2x4x3x4x5 co=3 k=2 s=2"))
    theirs, ours = example["train"](example["mlx_layer"]), example["train"](layer)
    assert theirs[-1] < 0.9 * theirs[0]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4 * theirs[0]
