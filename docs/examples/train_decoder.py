"""Train a small decoder with compiled kernels, forward and backward, beside PyTorch's own layers.

    python docs/examples/train_decoder.py

Both start from the same weights, see the same data, and take the same steps. Needs PyTorch.
"""

from __future__ import annotations

import torch

import opcompile as oc


class Kernels:
    """A layer and its three derivatives, compiled."""

    def __init__(self, spec: oc.ConvTranspose3d) -> None:
        self.forward = oc.compile(spec)
        self.to_x = oc.compile(spec, derivative="x")
        self.to_w = oc.compile(spec, derivative="w")
        self.to_b = oc.compile(spec, derivative="b") if spec.bias else None


class Layer(torch.autograd.Function):
    """``y = Layer.apply(x, w, b, kernels)``, ``b`` None without a bias: what autograd needs to know of the four."""

    @staticmethod
    def forward(ctx, x, w, b, kernels):
        y = kernels.forward(x.detach(), w.detach(), None if b is None else b.detach())
        # the output tells the slope of a fused activation
        ctx.save_for_backward(x, w, *([y] if kernels.forward.spec.activation.name != "none" else []))
        ctx.kernels = kernels
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():  # what is computed here would count as constants
            raise RuntimeError("these kernels have no second derivatives; leave create_graph=True out")
        x, w, *y = (tensor.detach() for tensor in ctx.saved_tensors)
        kernels, needed = ctx.kernels, ctx.needs_input_grad
        dx = kernels.to_x(dy, w, *y) if needed[0] else None
        dw = kernels.to_w(dy, x, *y) if needed[1] else None
        db = kernels.to_b(dy, *y) if needed[2] else None
        return dx, dw, db, None


class Decoder(torch.nn.Module):
    """Two upsampling layers; ``compiled`` says whose."""

    def __init__(self, *, compiled: bool) -> None:
        super().__init__()
        self.up1 = torch.nn.ConvTranspose3d(8, 6, 3, stride=2, padding=1, output_padding=1)
        self.up2 = torch.nn.ConvTranspose3d(6, 2, 2, stride=2)
        texts = ("in=2x8x2x3x4 co=6 k=3 s=2 p=1 op=1 act=relu", "in=2x6x4x6x8 co=2 k=2 s=2")
        self.kernels = [Kernels(oc.ConvTranspose3d.parse(text)) for text in texts] if compiled else None

    def forward(self, x):
        if self.kernels is None:
            return self.up2(torch.relu(self.up1(x)))
        first, second = self.kernels
        x = Layer.apply(x, self.up1.weight, self.up1.bias, first)
        return Layer.apply(x, self.up2.weight, self.up2.bias, second)


def train(*, compiled: bool, steps: int = 60) -> list[float]:
    """Return the loss of every step."""
    torch.manual_seed(0)
    model = Decoder(compiled=compiled)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, target = torch.randn(2, 8, 2, 3, 4), torch.randn(2, 2, 8, 12, 16)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    theirs, ours = train(compiled=False), train(compiled=True)
    for step in range(0, len(ours), 10):
        print(f"step {step:3}: PyTorch {theirs[step]:.6f}, compiled {ours[step]:.6f}")
    print(f"at the end: PyTorch {theirs[-1]:.6f}, compiled {ours[-1]:.6f}")
