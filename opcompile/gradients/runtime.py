"""Call a compiled derivative: what `opcompile.runtime` does for the layer, with other arguments."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from opcompile.errors import CallError
from opcompile.golden import read_vector
from opcompile.gradients.golden import GoldenGradient, golden_operands
from opcompile.gradients.gradient import Gradient
from opcompile.runtime import OnCpu, checked_threads
from opcompile.spec import ConvTranspose3d, at_batch
from opcompile.tensors import address_of, aligned, as_kind_of, framework_of


class Derivative:
    """What every artifact of a derivative is, wherever its kernel runs."""

    __slots__ = ()

    directory: Path
    manifest: dict[str, Any]
    gradient: Gradient

    def __repr__(self) -> str:
        """Name the derivative, the target and the place."""
        return f"<{type(self).__name__} {self.gradient} for {self.manifest['target']['name']} in {self.directory}>"

    @property
    def spec(self) -> ConvTranspose3d:
        """The layer that this is a derivative of."""
        return self.gradient.layer

    def golden(self) -> GoldenGradient:
        """Return the test vector that was computed when the artifact was written.

        Raises `ArtifactError` when its file has changed since, or holds none of this derivative.
        """
        gradient = self.gradient
        batch, indices, expected = read_vector(self.directory, self.manifest, gradient.operands["dy"], gradient.shape)
        return GoldenGradient(golden_operands(gradient, batch), indices, expected)

    def depth(self, batch: int) -> int:
        """Return how many roundings a term of the result meets at most."""
        return int(self.manifest["depth"]["fixed"] + batch * self.manifest["depth"]["per_image"])

    def bound(self, given: tuple[Any, ...], **named: Any) -> dict[str, Any]:
        """Bring the arguments of a call into order; a named one that is None was not given. Raises `CallError`."""
        names = list(self.gradient.operands)
        takes = f"{self.gradient.name} takes {', '.join(names)}"
        if len(given) > len(names):
            raise CallError(f"{takes}, and was given {len(given)} tensors")
        values = dict(zip(names, given, strict=False))
        for name, value in named.items():
            if value is None:
                continue
            if name not in names:
                raise CallError(f"{name} was given, but {takes}")
            if name in values:
                raise CallError(f"{name} was given twice, by its place and by its name")
            values[name] = value
        for name in names:
            if values.get(name) is None:
                raise CallError(f"{name} is missing: {takes}")
        return {name: values[name] for name in names}


class GradientArtifact(Derivative, OnCpu):
    """A loaded derivative: call it as ``dx = artifact(dy, w)``, ``dw = artifact(dy, x)`` or ``db = artifact(dy)``.

    A layer that fuses an activation takes its output as well, last: ``dx = artifact(dy, w, y)``. Safe
    to call from several threads at once.
    """

    __slots__ = ("gradient",)

    def __init__(self, directory: Path, manifest: dict[str, Any], library: ctypes.CDLL, threads: int) -> None:
        """Prefer `opcompile.load`, which checks what is taken for granted here."""
        self.gradient = gradient = Gradient(ConvTranspose3d.parse(manifest["spec"]), manifest["derivative"])
        shapes = {**gradient.operands, "out": gradient.shape}
        super().__init__(directory, manifest, library, threads, gradient.layer.dtype, shapes)

    def __call__(
        self,
        *given: Any,
        dy: Any = None,
        w: Any = None,
        x: Any = None,
        y: Any = None,
        out: Any = None,
        threads: int | None = None,
    ) -> Any:
        """Return the derivative, as the kind of tensor that ``dy`` is (or ``out``, filled, where that is given).

        The operands are those of `Gradient.operands`, in that order or by name: ``dy``, then ``w`` for dX
        or ``x`` for dW, then ``y`` where the layer fuses an activation. Weights are canonical. Tensors that
        are not contiguous are copied first. ``threads`` is the most to use in this call. Raises `CallError`.
        """
        most = self.threads if threads is None else checked_threads(threads, "threads")
        values = self.bound(given, dy=dy, w=w, x=x, y=y)
        dy = values["dy"]
        borrowed = {name: self._slots[name].borrow(value) for name, value in values.items()}
        batch = borrowed["dy"][1][0]
        for name, (_, shape, _) in borrowed.items():
            if self._slots[name].shape[0] is None and shape[0] != batch:
                raise CallError(f"{name} has batch {shape[0]}, but dy has {batch}")
        framework = None if out is not None or isinstance(dy, np.ndarray) else framework_of(dy)
        if out is None:
            shape = at_batch(self.gradient.shape, batch)
            result: Any = np.empty(shape, dy.dtype) if framework is None else aligned(shape, self._slots["out"].storage)
            target = address_of(result)
        else:
            spans = {name: each[:2] for name, each in borrowed.items()}
            result, target = out, self._borrow_out(out, spans)
        at = {name: address for name, (address, _, _) in borrowed.items()}
        if self._run(most, batch, *(name and at[name] for name in self.gradient.pointers), target):
            raise CallError(f"the kernel failed: {self._error().decode(errors='replace')}")
        return result if framework is None else as_kind_of(dy, result, framework, self.gradient.layer.dtype)
