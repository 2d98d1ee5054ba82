"""Call a compiled derivative: what `opcompile.runtime` does for the layer, with other arguments."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from opcompile.errors import CallError
from opcompile.gradients.golden import GoldenGradient, golden_operands
from opcompile.gradients.gradient import Gradient
from opcompile.runtime import (
    GOLDEN,
    STORAGE,
    Borrowed,
    Slot,
    address_of,
    aligned,
    as_kind_of,
    checked_threads,
    content,
    framework_of,
    load_again,
    read_arrays,
    require_apart,
)
from opcompile.spec import ConvTranspose3d, at_batch


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

        Raises `ArtifactError` when its file has changed since.
        """
        stored = read_arrays(self.directory, self.manifest, GOLDEN)
        operands = golden_operands(self.gradient, int(stored["batch"]))
        return GoldenGradient(operands, stored["indices"], stored["expected"])

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


class GradientArtifact(Derivative):
    """A loaded derivative: call it as ``dx = artifact(dy, w)``, ``dw = artifact(dy, x)`` or ``db = artifact(dy)``.

    A layer that fuses an activation takes its output as well, last: ``dx = artifact(dy, w, y)``. Safe
    to call from several threads at once.
    """

    __slots__ = ("_error", "_out", "_run", "_slots", "directory", "gradient", "manifest", "threads")

    def __init__(self, directory: Path, manifest: dict[str, Any], library: ctypes.CDLL, threads: int) -> None:
        """Prefer `opcompile.load`, which checks what is taken for granted here."""
        self.directory, self.manifest, self.threads = directory, manifest, threads
        self.gradient = gradient = Gradient(ConvTranspose3d.parse(manifest["spec"]), manifest["derivative"])
        dtype = gradient.layer.dtype
        storage = STORAGE[dtype]
        plain = None if dtype == "bfloat16" else storage
        self._slots = [Slot(name, shape, dtype, storage, plain) for name, shape in gradient.operands.items()]
        self._out = Slot("out", gradient.shape, dtype, storage, plain)
        self._run, self._error = library.opcompile_run, library.opcompile_error
        self._run.argtypes = [ctypes.c_int, ctypes.c_int64, *[ctypes.c_void_p] * 4]
        self._run.restype, self._error.restype = ctypes.c_int, ctypes.c_char_p

    def __reduce__(self) -> tuple[Any, ...]:
        """Name the directory, and what it holds, as `Artifact` does."""
        return load_again, (str(self.directory), content(self.manifest), self.threads or None)

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
        values = list(self.bound(given, dy=dy, w=w, x=x, y=y).values())
        borrowed = [slot.borrow(value) for slot, value in zip(self._slots, values, strict=True)]
        batch = borrowed[0][1][0]
        for slot, (_, shape, _) in zip(self._slots, borrowed, strict=True):
            if slot.shape[0] is None and shape[0] != batch:
                raise CallError(f"{slot.name} has batch {shape[0]}, but dy has {batch}")
        framework = None if out is not None or isinstance(values[0], np.ndarray) else framework_of(values[0])
        if out is None:
            shape = at_batch(self.gradient.shape, batch)
            result: Any = np.empty(shape, values[0].dtype) if framework is None else aligned(shape, self._out.storage)
            target = address_of(result)
        else:
            result, target = out, self._borrow_out(out, batch, borrowed)
        if self._run(most, batch, *self._pointers(borrowed), target):
            raise CallError(f"the kernel failed: {self._error().decode(errors='replace')}")
        return result if framework is None else as_kind_of(values[0], result, framework, self.gradient.layer.dtype)

    # --- arguments ---

    def _pointers(self, borrowed: list[Borrowed]) -> list[int | None]:
        """Return the first three pointers of the library's entry: dY, the factor, and Y where it is needed."""
        addresses = {slot.name: address for slot, (address, _, _) in zip(self._slots, borrowed, strict=True)}
        return [addresses["dy"], addresses.get("w", addresses.get("x")), addresses.get("y")]

    def _borrow_out(self, out: Any, batch: int, inputs: list[Borrowed]) -> int:
        borrowed = address, shape, _ = self._out.borrow(out, to_write=True)
        if self._out.shape[0] is None and shape[0] != batch:
            raise CallError(f"out has batch {shape[0]}, but dy has {batch}")
        spans = {slot.name: given[:2] for slot, given in zip(self._slots, inputs, strict=True)}
        require_apart(borrowed, spans, self._out.storage.itemsize)
        return address
