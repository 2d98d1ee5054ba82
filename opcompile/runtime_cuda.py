"""Load a layer that was compiled for CUDA, and call it on tensors that are there: `apache-tvm-ffi` and the driver.

Calls are asynchronous, on the caller's stream: PyTorch's current one for its tensors; for others the default
stream, or what ``tvm_ffi.use_raw_stream`` sets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from opcompile.cuda_driver import CUDA, device, require_runs_on
from opcompile.errors import ArtifactError, CallError, EngineError
from opcompile.golden import Golden, read_golden
from opcompile.launch import LAUNCH, MOST_BLOCKS, Launch
from opcompile.manifest import fingerprint, own_weights
from opcompile.packing import Packing
from opcompile.runtime import load_again
from opcompile.spec import ConvTranspose3d, at_batch, fits
from opcompile.tensors import NOT_EXPORTED, detached, dtype_name, not_exported, sizes_text

_ALIGNMENT = 16
_SIMULATE = "`opcompile verify --simulate` runs the kernel's text on the CPU"


@dataclass(frozen=True, slots=True, eq=False)
class PackedCuda:
    """Weights on a GPU in one kernel's own layout: what `CudaArtifact.pack` returns."""

    packing: Packing
    data: Any


class OnGpu:
    """A library for CUDA, loaded: what a layer and its derivatives share."""

    def __init__(self, directory: Path, manifest: dict[str, Any], kernel: str) -> None:
        """Load the function ``kernel``. Raises `ArtifactError` for a library of no use."""
        self.directory, self.manifest = directory, manifest
        self._dtype = ConvTranspose3d.parse(manifest["spec"]).dtype
        self._suited: set[int] = set()
        self._most = Launch.from_json((directory / LAUNCH).read_bytes()).most_images
        try:
            import tvm_ffi

            self._from_dlpack = tvm_ffi.from_dlpack
            self._run = tvm_ffi.load_module(str(directory / manifest["library"]))[kernel]
        except ImportError as error:
            raise EngineError(f"calling a layer needs the package apache-tvm-ffi: {error}") from error
        except (OSError, RuntimeError, AttributeError) as error:
            raise ArtifactError(f"{directory / manifest['library']} cannot be loaded: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Name the directory, and what it holds, as `opcompile.runtime.Artifact` does."""
        return load_again, (str(self.directory), fingerprint(self.manifest))

    def checked(self, name: str, value: Any, shape: tuple[int | None, ...]) -> tuple[int, tuple[int, int]]:
        """Return the first size and the device of a tensor.

        Raises `CallError` for what does not fit, and `TargetError` on a GPU that the library is not for.
        """
        if not (hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")):
            raise CallError(f"{name} is of type {type(value).__name__}; pass a tensor on a GPU that speaks DLPack")
        value = detached(name, value)
        try:
            kind, number = value.__dlpack_device__()
        except NOT_EXPORTED as error:
            raise not_exported(name, value, error) from error
        if int(kind) != CUDA:
            raise CallError(f"{name} is on DLPack device type {int(kind)}, not on a CUDA GPU; copy it there first")
        try:
            tensor = self._from_dlpack(value)
        except NOT_EXPORTED as error:
            raise not_exported(name, value, error) from error
        given = tuple(tensor.shape)
        dtype = dtype_name(tensor, value)
        if not fits(given, shape) or dtype != self._dtype:
            least = ", N at least 1" if None in shape else ""
            raise CallError(
                f"{name} is {dtype} {given}, but this kernel needs {self._dtype} {sizes_text(shape)}{least}"
            )
        if None in shape and self._most is not None and given[0] > self._most:
            raise CallError(
                f"{name} has a batch of {given[0]}, but this kernel takes at most {self._most}, for which one launch "
                f"has {MOST_BLOCKS} thread blocks; call it several times"
            )
        if not tensor.is_contiguous():
            raise CallError(f"{name} is not contiguous in memory; pass {name}.contiguous()")
        if tensor.data_ptr() % _ALIGNMENT:
            raise CallError(f"{name} is not at a multiple of {_ALIGNMENT} bytes; pass a copy")
        if number not in self._suited:
            require_runs_on(self.manifest["target"]["archs"], device(number), f"the library in {self.directory}")
            self._suited.add(number)
        return int(given[0]), (int(kind), int(number))

    def start(self, arguments: Sequence[Any]) -> None:
        """Start the kernel. Raises `CallError`."""
        try:
            self._run(*arguments)
        except (RuntimeError, ValueError) as error:
            raise CallError(f"the kernel failed: {error}") from error

    def empty(self, name: str, beside: Any, shape: Sequence[int | None]) -> Any:
        """Return a new tensor where ``beside`` is, the argument ``name``, of its type. Raises `CallError`."""
        return _torch(beside, name).empty(shape, dtype=beside.dtype, device=beside.device)

    def require_gpu(self) -> Any:
        """Return PyTorch. Raises `EngineError` where it, or a GPU for it, is not there."""
        try:
            import torch
        except ImportError as error:
            raise EngineError(f"verifying on a GPU needs PyTorch: {error}; {_SIMULATE}") from error
        if not torch.cuda.is_available():
            raise EngineError(f"no GPU was found for {self.manifest['target']['name']}; {_SIMULATE}")
        return torch

    def there(self, array: NDArray[Any]) -> Any:
        """Return a copy on the GPU, by PyTorch."""
        import torch

        bits = torch.from_numpy(array.view("int16") if self._dtype == "bfloat16" else array)
        return bits.cuda().view(getattr(torch, self._dtype))

    def back(self, tensor: Any, dtype: Any) -> NDArray[Any]:
        """Return a copy in host memory, of NumPy's ``dtype``."""
        import torch

        found: NDArray[Any] = (tensor.view(torch.int16) if self._dtype == "bfloat16" else tensor).cpu().numpy()
        return found.view(dtype)


class CudaArtifact(OnGpu):
    """A loaded layer: call it as ``y = artifact(x, w, b)`` with tensors on a GPU."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        """Prefer `opcompile.load`, which has checked the files. Raises `ArtifactError` for a library of no use."""
        super().__init__(directory, manifest, "conv_transpose3d")
        self.spec = ConvTranspose3d.parse(manifest["spec"])
        self.packing = Packing.from_json(manifest["packing"])
        self._own = own_weights(directory, manifest)
        self._uploaded: dict[tuple[str, str], Any] = {}

    def __repr__(self) -> str:
        """Name the layer, the target and the place."""
        return f"<CudaArtifact {self.spec} for {self.manifest['target']['name']} in {self.directory}>"

    def __call__(self, x: Any, w: Any = None, b: Any = None, *, out: Any = None) -> Any:
        """Start the kernel and return Y, a tensor of PyTorch as ``x`` is, or ``out``, which any other ``x`` needs.

        ``w`` is canonical, and packed anew in each call, or what `pack` made of it; it and ``b`` are left out
        where they were known at compile time. All are contiguous, on one GPU, at multiples of 16 bytes. The
        call does not wait for the GPU. Raises `CallError`, and `TargetError` where the GPU is none that the library
        is for, before anything is started.
        """
        arguments = self._arguments(x, w, b, out)
        self.start(arguments)
        return arguments[-1]

    def bound(self, x: Any, w: Any = None, b: Any = None, *, out: Any) -> Callable[[], object]:
        """Check these tensors once; what is returned starts the kernel on them, at the least cost. Raises as a call."""
        return partial(self._run, *map(self._from_dlpack, self._arguments(x, w, b, out)))

    def pack(self, w: Any) -> PackedCuda:
        """Lay a canonical weight, a tensor of PyTorch, out for this kernel, where it is. Raises `CallError`."""
        torch = _torch(w, "w")
        if tuple(w.shape) != self.spec.w_shape or str(w.dtype).rpartition(".")[2] != self.spec.dtype:
            given = f"{str(w.dtype).rpartition('.')[2]} {tuple(w.shape)}"
            raise CallError(f"w is {given}, but this layer needs {self.spec.dtype} {self.spec.w_shape}")
        whole = torch.zeros(self.packing.padded, dtype=w.dtype, device=w.device)
        whole[tuple(slice(n) for n in self.spec.w_shape)] = w
        data = whole.reshape(self.packing.view).permute(self.packing.order).contiguous()
        return PackedCuda(self.packing, data)

    def golden(self) -> Golden:
        """Return the test vector in the artifact, in host memory."""
        return read_golden(self.directory, self.manifest, self.spec, "W" in self._own, "B" in self._own)

    def on_host(self, x: NDArray[Any], w: NDArray[Any] | None, b: NDArray[Any] | None) -> NDArray[Any]:
        """Return Y for NumPy arrays, which travel to the GPU and back by PyTorch. For verifying; raises as a call."""
        self.require_gpu()
        y = self(*(None if array is None else self.there(array) for array in (x, w, b)))
        return self.back(y, x.dtype)

    # --- arguments ---

    def _arguments(self, x: Any, w: Any, b: Any, out: Any) -> list[Any]:
        """Return what the kernel takes, the output last. Raises `CallError`, and `TargetError` for a GPU it is not for.

        Nothing was started when it raises.
        """
        batch, place = self.checked("x", x, self.spec.x_shape)
        weight = self._weight(x, w)
        bias = self._bias(x, b)
        y_shape = at_batch(self.spec.y_shape, batch)
        y = out if out is not None else self.empty("x", x, y_shape)
        tensors = {"w": (weight, self.packing.shape), "out": (y, y_shape)}
        if self.spec.bias:
            tensors["b"] = (bias, (self.spec.channels_out,))
        for name, (tensor, shape) in tensors.items():
            if self.checked(name, tensor, shape)[1] != place:
                raise CallError(f"{name} is on another GPU than x; copy it there")
        return [x, weight, *([bias] if self.spec.bias else []), y]

    def _weight(self, x: Any, w: Any) -> Any:
        if isinstance(w, PackedCuda):
            if w.packing != self.packing:
                raise CallError("w was packed for another layer; use this artifact's pack")
            return w.data
        if w is not None:
            return self.pack(w).data
        if "W" not in self._own:
            raise CallError(f"w is missing: this layer was compiled without weights; pass {self.spec.w_shape}")
        return self._upload(x, "W")

    def _bias(self, x: Any, b: Any) -> Any:
        if b is not None and not self.spec.bias:
            raise CallError("b was given, but this layer has no bias; leave it out")
        if b is None and self.spec.bias:
            if "B" not in self._own:
                raise CallError(
                    f"b is missing: this layer has a bias; pass {self.spec.dtype} ({self.spec.channels_out},)"
                )
            return self._upload(x, "B")
        return b

    def _upload(self, x: Any, name: str) -> Any:
        """Copy what was known at compile time to the GPU of ``x``, once."""
        torch = _torch(x, "x")
        key = (name, str(x.device))
        if key not in self._uploaded:
            bits = self._own[name].view("int16") if self.spec.dtype == "bfloat16" else self._own[name]
            self._uploaded[key] = torch.from_numpy(bits).to(x.device).view(x.dtype)
        return self._uploaded[key]


def _torch(value: Any, name: str) -> ModuleType:
    """Return PyTorch, whose tensor ``value`` must be. Raises `CallError`."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        raise CallError(
            f"{name} is no tensor of PyTorch, so none can be made beside it; pass packed weights, b and out as well"
        )
    return torch
