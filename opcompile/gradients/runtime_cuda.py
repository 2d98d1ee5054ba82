"""Call a derivative that was compiled for CUDA: what `opcompile.runtime_cuda` does for the layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from opcompile.errors import CallError
from opcompile.gradients.gradient import Gradient
from opcompile.gradients.runtime import Derivative
from opcompile.runtime_cuda import OnGpu
from opcompile.spec import ConvTranspose3d, at_batch


class CudaGradient(Derivative, OnGpu):
    """A loaded derivative: called as `GradientArtifact` is, with tensors on a GPU."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        """Prefer `opcompile.load`, which has checked the files. Raises `ArtifactError` for a library of no use."""
        self.gradient = Gradient(ConvTranspose3d.parse(manifest["spec"]), manifest["derivative"])
        super().__init__(directory, manifest, self.gradient.kernel)

    def __call__(
        self, *given: Any, dy: Any = None, w: Any = None, x: Any = None, y: Any = None, out: Any = None
    ) -> Any:
        """Start the kernel and return the derivative, a tensor of PyTorch as ``dy`` is, or ``out``, filled.

        All are contiguous, on one GPU, at multiples of 16 bytes. The call does not wait for the GPU. Raises
        `CallError`, also where the GPU is none that the library is for.
        """
        operands, shapes = self.bound(given, dy=dy, w=w, x=x, y=y), self.gradient.operands
        batch, device = self.checked("dy", operands["dy"], shapes["dy"])
        shape = at_batch(self.gradient.shape, batch)
        result = out if out is not None else self.empty("dy", operands["dy"], shape)
        others = {name: tensor for name, tensor in operands.items() if name != "dy"}
        for name, tensor in {**others, "out": result}.items():
            wanted = at_batch(shapes.get(name, shape), batch)
            if self.checked(name, tensor, wanted)[1] != device:
                raise CallError(f"{name} is on another GPU than dy; copy it there")
        self.start([*operands.values(), result])
        return result

    def on_host(self, operands: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Return the derivative for NumPy arrays, which travel to the GPU and back. For verifying; raises as a call."""
        self.require_gpu()
        result = self(**{name: self.there(array) for name, array in operands.items()})
        return self.back(result, operands["dy"].dtype)
