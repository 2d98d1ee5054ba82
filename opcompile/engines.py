"""The engines that `bench` puts side by side: each prepares one layer, and fills Y whenever it is run.

What is prepared once is not timed: weights as constants, X and Y in the memory order the engine takes
(PyTorch alone makes its Y in each call, it has no other way; `bench` lets it keep the pages).
Every engine computes float32 in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.bounds import sums_of
from opcompile.errors import EngineError, first_line
from opcompile.manifest import MODEL
from opcompile.runtime import load
from opcompile.spec import ConvTranspose3d, at_batch
from opcompile.tensors import aligned

Tensor = NDArray[Any]
Run = Callable[[], None]

OURS = "opcompile"
PEERS = ("onnxruntime", "torch", "torch-channels-last", "openvino")

# The package that holds an engine, and how to get it.
_PACKAGES = {
    OURS: ("tvm_ffi", "pip install apache-tvm-ffi"),
    "onnxruntime": ("onnxruntime", "pip install onnxruntime"),
    "torch": ("torch", "pip install 'opcompile[peers]'"),
    "torch-channels-last": ("torch", "pip install 'opcompile[peers]'"),
    "openvino": ("openvino", "pip install 'opcompile[peers]'"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One layer to compute: the artifact ``directory`` that holds it, compiled and as a model, and its arrays.

    X has the spec's layout; W is canonical, and read only by those that do not find it in the directory.
    """

    spec: ConvTranspose3d
    directory: Path
    x: Tensor
    w: Tensor
    b: Tensor | None
    threads: int

    def new_y(self) -> Tensor:
        """An array for Y that begins at a cache line, as those of the engines do; its memory is not touched yet."""
        return aligned(at_batch(self.spec.y_shape, len(self.x)), self.x.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """Something that fills ``y()`` when it is ``run``; ``computed_in`` is the type it sums in."""

    version: str
    run: Run
    y: Callable[[], Tensor]
    computed_in: str


def prepare(name: str, job: Job) -> Engine:
    """Set an engine up for a layer. Raises `EngineError` where it is not installed or cannot say the layer."""
    return _MAKERS[name](job)


def package(name: str) -> ModuleType:
    """Import what an engine runs in. Raises `EngineError`, naming the way to get it."""
    module, way_out = _PACKAGES[name]
    if module == "openvino":  # its import would report itself over the network
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return import_module(module)
    except ImportError as error:
        raise EngineError(f"the package {module} is not installed ({error}); {way_out}") from error


def in_its_order(name: str, x: Tensor, spec: ConvTranspose3d) -> Tensor:
    """Return X with its elements in memory as the engine takes them; its shape stays that of the layer."""
    if name == "torch-channels-last" and spec.layout == "NCDHW":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    return x


def _ours(job: Job) -> Engine:
    artifact = load(job.directory)
    y = job.new_y()

    def run() -> None:
        artifact(job.x, out=y, threads=job.threads)

    sums = sums_of(artifact.manifest) or job.spec.sum_dtype
    return Engine(str(artifact.manifest["versions"]["opcompile"]), run, lambda: y, sums)


def _onnxruntime(job: Job) -> Engine:
    """Run the model beside the kernel; other dtypes and layouts go through the nodes that make it run them."""
    if job.spec.dtype == "bfloat16":
        raise EngineError("its Python side takes no bfloat16 arrays")
    onnxruntime: Any = package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = job.threads
    # its waiting threads may spin during a call, but not into the turns of others
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(str(job.directory / MODEL), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # they share no base, and each means that it cannot
        raise EngineError(first_line(error)) from error
    binding = session.io_binding()
    binding.bind_ortvalue_input("X", onnxruntime.OrtValue.ortvalue_from_numpy(job.x))
    out = onnxruntime.OrtValue.ortvalue_from_numpy(job.new_y())
    binding.bind_ortvalue_output("Y", out)
    return Engine(onnxruntime.__version__, lambda: session.run_with_iobinding(binding), out.numpy, "float32")


def _openvino(job: Job) -> Engine:
    """Run the model beside the kernel on one stream, in float32 whatever is stored."""
    if job.spec.dtype == "bfloat16":
        raise EngineError("its Python side takes no bfloat16 arrays")
    if job.spec.dtype == "float64":
        raise EngineError("it computes float64 in float32")
    openvino: Any = package("openvino")
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
        # the process is pinned already
        "ENABLE_CPU_PINNING": False,
    }
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(job.directory / MODEL), "CPU", settings)
    except RuntimeError as error:
        raise EngineError(f"it refuses the model: {error}".splitlines()[0]) from error
    request, y = compiled.create_infer_request(), job.new_y()
    request.set_input_tensor(openvino.Tensor(job.x, shared_memory=True))
    request.set_output_tensor(openvino.Tensor(y, shared_memory=True))
    # without share_outputs each call would copy Y once more
    return Engine(openvino.__version__.split("-")[0], lambda: request.infer(share_outputs=True), lambda: y, "float32")


def _torch(job: Job) -> Engine:
    require_torch_can(job.spec)
    if job.spec.layout != "NCDHW":
        raise EngineError("it is asked for contiguous NCDHW only; torch-channels-last is asked for NDHWC")
    return _in_torch(job, channels_last=False)


def _torch_channels_last(job: Job) -> Engine:
    """Let PyTorch have X and W with channels last; then it writes Y so where its kernel for that takes the layer."""
    require_torch_can(job.spec)
    return _in_torch(job, channels_last=True)


def _in_torch(job: Job, *, channels_last: bool) -> Engine:
    torch: Any = package("torch")
    torch.set_num_threads(job.threads)
    spec, order = job.spec, torch.channels_last_3d if channels_last else torch.contiguous_format
    x = torch.from_numpy(job.x if spec.layout == "NCDHW" else np.moveaxis(job.x, -1, 1)).contiguous(memory_format=order)
    w = torch.from_numpy(job.w).contiguous(memory_format=order)
    b = None if job.b is None else torch.from_numpy(job.b)
    geometry = torch_geometry(spec)
    last: dict[str, Any] = {}

    def run() -> None:
        last.clear()  # so that one Y is alive at a time
        with torch.inference_mode():
            last["y"] = torch.nn.functional.conv_transpose3d(x, w, b, **geometry)

    def y() -> Tensor:
        found = np.asarray(last["y"])
        return found if spec.layout == "NCDHW" else np.moveaxis(found, 1, -1)

    return Engine(str(torch.__version__), run, y, spec.sum_dtype)


def require_torch_can(spec: ConvTranspose3d, *, halves: bool = False) -> None:
    """Raise `EngineError` for what PyTorch's one call does not say; on a CPU nor in ``halves``."""
    if not halves and spec.dtype not in ("float32", "float64"):
        raise EngineError(f"its sums in {spec.dtype} are rounded on the way, which the derived bound does not cover")
    if spec.activation.name != "none":
        raise EngineError(f"it does not fuse the activation {spec.activation}")
    for axis in spec.axes:
        if axis.pad[0] != axis.pad[1]:
            raise EngineError(f"it has no asymmetric padding {axis.pad[0]}:{axis.pad[1]}")
        if axis.output_pad >= max(axis.stride, axis.dilation):
            raise EngineError(f"it refuses output_padding {axis.output_pad}, not below stride and dilation")


def torch_geometry(spec: ConvTranspose3d) -> dict[str, Any]:
    """Return the arguments of PyTorch's call that are no tensors, for what `require_torch_can` lets pass."""
    return {
        "stride": tuple(a.stride for a in spec.axes),
        "padding": tuple(a.begin for a in spec.axes),
        "output_padding": tuple(a.output_pad for a in spec.axes),
        "dilation": tuple(a.dilation for a in spec.axes),
        "groups": spec.groups,
    }


_MAKERS: dict[str, Callable[[Job], Engine]] = {
    OURS: _ours,
    "onnxruntime": _onnxruntime,
    "torch": _torch,
    "torch-channels-last": _torch_channels_last,
    "openvino": _openvino,
}
