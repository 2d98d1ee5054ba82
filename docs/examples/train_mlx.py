"""A compiled layer that MLX can differentiate, beside MLX's own.

    python docs/examples/train_mlx.py

To MLX a compiled layer alone is a constant: its gradients would be zeros. Needs MLX.
"""

from __future__ import annotations

import mlx.core as mx

import opcompile as oc


def differentiable(spec: oc.ConvTranspose3d):
    """Return ``y = layer(x, w, b)``, whose gradients are compiled; for a layer with a bias, and no activation."""
    forward = oc.compile(spec)
    to_x, to_w, to_b = (oc.compile(spec, derivative=wrt) for wrt in ("x", "w", "b"))

    @mx.custom_function
    def layer(x, w, b):
        return forward(x, w, b)

    @layer.vjp
    def gradients(primals, dy, _):
        x, w, _ = primals
        return to_x(dy, w), to_w(dy, x), to_b(dy)

    return layer


def train(layer, steps: int = 30) -> list[float]:
    """Return the loss of every step."""
    mx.random.seed(0)
    x, target = mx.random.normal((2, 4, 3, 4, 5)), mx.random.normal((2, 3, 6, 8, 10))
    w, b = mx.random.normal((4, 3, 2, 2, 2)), mx.zeros((3,))
    step = mx.value_and_grad(lambda w, b: mx.mean((layer(x, w, b) - target) ** 2), argnums=(0, 1))
    losses = []
    for _ in range(steps):
        loss, (dw, db) = step(w, b)
        w, b = w - dw, b - db
        losses.append(loss.item())
    return losses


def mlx_layer(x, w, b):
    """The same layer by MLX, which has channels last."""
    y = mx.conv_transpose3d(x.transpose(0, 2, 3, 4, 1), w.transpose(1, 2, 3, 4, 0), stride=2) + b
    return y.transpose(0, 4, 1, 2, 3)


if __name__ == "__main__":
    compiled = differentiable(oc.ConvTranspose3d.parse("in=2x4x3x4x5 co=3 k=2 s=2"))
    theirs, ours = train(mlx_layer), train(compiled)
    for step in range(0, len(ours), 10):
        print(f"step {step:3}: MLX {theirs[step]:.6f}, compiled {ours[step]:.6f}")
    print(f"at the end: MLX {theirs[-1]:.6f}, compiled {ours[-1]:.6f}")
