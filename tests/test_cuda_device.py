"""A library for CUDA starts nothing on a GPU that cannot run it, nor with tensors that do not fit.

There is no GPU here: a driver and a kernel stand for NVIDIA's (tests/gpu), and host memory for a GPU's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stub_gpu import LAYER, NVCC, forget, tensor

import opcompile
from opcompile import artifact
from opcompile.cuda_driver import CUDA, Gpu, device
from opcompile.errors import CallError, TargetError
from opcompile.gpus import capability, gpu_names, gpu_target, runs_on, suited
from opcompile.lower_gpu import lower_gpu
from opcompile.packing import Packing
from opcompile.reference import reference
from opcompile.runtime_cuda import CudaArtifact, PackedCuda

X = np.arange(512, dtype=np.float32).reshape(LAYER.x_shape) - 200  # type: ignore[arg-type]
W, B = np.full(LAYER.w_shape, 3, np.float32), np.full(1, 5, np.float32)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The layer for one architecture, and for two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVCC", str(NVCC))
        folder = tmp_path_factory.mktemp("cuda")
        names = ("cuda:sm_90", "cuda:sm_80+sm_90")
        return {name: artifact.write(lower_gpu(LAYER, gpu_target(name)), folder / name[5:]) for name in names}


@pytest.fixture
def layer(places: dict[str, Path], gpu: pytest.MonkeyPatch) -> CudaArtifact:
    loaded: Any = opcompile.load(places["cuda:sm_90"])
    return loaded  # type: ignore[no-any-return]


def arguments(layer: CudaArtifact) -> tuple[dict[str, Any], NDArray[Any]]:
    """What a call takes, on the GPU, and the memory of its output."""
    out, y = tensor(np.zeros_like(X))
    x, w, b = (tensor(array)[0] for array in (X, layer.packing(W), B))
    return {"x": x, "w": PackedCuda(layer.packing, w), "b": b, "out": out}, y


def test_a_call_computes_the_layer(layer: CudaArtifact) -> None:
    given, y = arguments(layer)
    assert layer(**given) is given["out"]
    np.testing.assert_array_equal(y, reference(LAYER, X, W, B))


@pytest.mark.parametrize(
    ("archs", "device", "runs"),
    [
        (["sm_90"], (9, 0), True),
        (["sm_90"], (8, 9), False),  # older than everything in it
        (["sm_90"], (10, 0), True),  # by PTX
        (["sm_80", "sm_90"], (8, 6), True),  # machine code of an earlier minor
        (["sm_80", "sm_90"], (7, 5), False),
        (["sm_89", "sm_90"], (8, 6), False),  # machine code of a later minor
        (["sm_90", "sm_80"], (8, 6), True),
        (["sm_120"], (10, 0), False),
    ],
)
def test_what_runs_where(archs: list[str], device: tuple[int, int], runs: bool) -> None:
    assert runs_on(archs, device) is runs


def test_the_way_out_runs_there() -> None:
    for name in (n for n in gpu_names() if n.startswith("cuda")):
        arch = name.removeprefix("cuda:")
        assert suited(capability(arch)) == arch
    assert suited((8, 7)) == "sm_86"
    assert suited((6, 1)) is None


@pytest.mark.parametrize(
    ("target", "here", "words"),
    [
        (
            "cuda:sm_90",
            "8.6",
            r"GPU 0, Stub 0, has compute capability 8\.6, .* code for sm_90, and PTX for sm_90",
        ),
        ("cuda:sm_90", "8.7", r"--target cuda:sm_86, whose PTX later GPUs run too, or cuda:sm_86\+sm_90$"),
        ("cuda:sm_80+sm_90", "7.5", r"for sm_80, sm_90, and PTX for sm_90 and later; .*cuda:sm_75\+sm_80\+sm_90$"),
        ("cuda:sm_90", "6.1", "no target there is runs on it"),
    ],
)
def test_a_gpu_that_cannot_run_the_library_is_named_before_anything_starts(
    places: dict[str, Path], gpu: pytest.MonkeyPatch, target: str, here: str, words: str
) -> None:
    gpu.setenv("STUB_CAPABILITY", here)
    layer: Any = opcompile.load(places[target])
    given, y = arguments(layer)
    with pytest.raises(TargetError, match=words):
        layer(**given)
    assert not y.any()


def test_without_a_driver_or_a_gpu_the_error_says_so(layer: CudaArtifact, gpu: pytest.MonkeyPatch) -> None:
    given, y = arguments(layer)
    gpu.delenv("STUB_CAPABILITY")
    with pytest.raises(TargetError, match="the driver of NVIDIA's GPUs sees none on this machine"):
        layer(**given)
    forget()
    gpu.setattr("opcompile.cuda_driver._LIBRARY", "libno-such-driver.so.1")
    with pytest.raises(TargetError, match=r"there is no driver of an NVIDIA GPU .*libno-such-driver"):
        layer(**given)
    assert not y.any()


def test_the_driver_tells_what_it_has(gpu: pytest.MonkeyPatch) -> None:
    found = device()
    assert (found.name, found.capability, found.l2_bytes) == ("Stub 0", (9, 0), 4096)
    assert found.driver.endswith("CUDA 13.1")
    with pytest.raises(TargetError, match="there is no GPU 2 here, CUDA sees 2; CUDA_VISIBLE_DEVICES"):
        device(2)
    with pytest.raises(TargetError, match=r"cuMemAlloc_v2 with error 2: out of memory; end what else uses the GPU"):
        Gpu().empty((1 << 34,), "float32")


CASES = {
    "dtype": ({"x": lambda: tensor(X.astype(np.float16))[0]}, r"x is float16 \(1, 1, 8, 8, 8\), but .* needs float32"),
    "shape": ({"x": lambda: tensor(X[..., :7])[0]}, r"x is float32 \(1, 1, 8, 8, 7\), but .*\(1, 1, 8, 8, 8\)"),
    "rank": ({"b": lambda: tensor(B[None])[0]}, r"b is float32 \(1, 1\), but this kernel needs float32 \(1\)"),
    "alignment of x": ({"x": lambda: tensor(X, offset=8)[0]}, "x is not at a multiple of 16 bytes; pass a copy"),
    "alignment of out": ({"out": lambda: tensor(X, offset=4)[0]}, "out is not at a multiple of 16 bytes"),
    "another GPU": ({"b": lambda: tensor(B, ordinal=1)[0]}, "b is on another GPU than x; copy it there"),
    "out on another GPU": ({"out": lambda: tensor(X, ordinal=1)[0]}, "out is on another GPU than x"),
    "the CPU": ({"x": lambda: X}, "x is on DLPack device type 1, not on a CUDA GPU; copy it there first"),
    "no tensor": ({"out": lambda: [0.0]}, "out is of type list; pass a tensor on a GPU that speaks DLPack"),
    "no bias": ({"b": lambda: None}, "b is missing: this layer has a bias"),
    "no weight": ({"w": lambda: None}, "w is missing: this layer was compiled without weights"),
    "weight not packed": ({"w": lambda: tensor(W)[0]}, "w is no tensor of PyTorch, .*; pass packed weights"),
    "no out": ({"out": lambda: None}, "x is no tensor of PyTorch, .*; pass packed weights, b and out"),
}


@pytest.mark.parametrize("what", CASES)
def test_tensors_that_do_not_fit_are_refused_before_anything_starts(layer: CudaArtifact, what: str) -> None:
    given, y = arguments(layer)
    changed, words = CASES[what]
    with pytest.raises(CallError, match=words):
        layer(**{**given, **{name: make() for name, make in changed.items()}})
    assert not y.any()


def test_an_open_batch_is_at_least_1(layer: CudaArtifact) -> None:
    x, open_batch = tensor(X)[0], (None, 1, 8, 8, 8)
    assert layer.checked("x", x, open_batch)[0] == 1
    with pytest.raises(CallError, match=r"x is float32 \(0, 1, 8, 8, 8\), but .* \(N, 1, 8, 8, 8\), N at least 1"):
        layer.checked("x", tensor(X[:0])[0], open_batch)


def test_more_images_than_one_launch_has_blocks_for_are_refused(layer: CudaArtifact) -> None:
    open_batch = (None, 1, 8, 8, 8)
    assert layer._most is not None
    layer._most = 2
    assert layer.checked("x", tensor(np.concatenate([X, X]))[0], open_batch)[0] == 2
    with pytest.raises(CallError, match=r"x has a batch of 3, but this kernel takes at most 2, .* call it several"):
        layer.checked("x", tensor(np.concatenate([X, X, X]))[0], open_batch)


def test_weights_packed_for_another_layer_are_refused(layer: CudaArtifact) -> None:
    given, _ = arguments(layer)
    other = PackedCuda(Packing.identity((2, 1, 1, 1, 1)), given["w"].data)
    with pytest.raises(CallError, match="w was packed for another layer; use this artifact's pack"):
        layer(**{**given, "w": other})


def test_a_tensor_that_needs_a_gradient_is_refused(layer: CudaArtifact) -> None:
    given, _ = arguments(layer)

    class Learning:
        requires_grad = True
        __dlpack__, __dlpack_device__ = given["x"].__dlpack__, given["x"].__dlpack_device__

    with pytest.raises(CallError, match=r"x requires a gradient, .*; pass x\.detach\(\)"):
        layer(**{**given, "x": Learning()})


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_with_a_forward_mode_tangent_is_refused(layer: CudaArtifact) -> None:
    import torch
    from torch.autograd import forward_ad

    x = torch.from_numpy(X)
    with forward_ad.dual_level(), pytest.raises(CallError, match=r"x carries a forward-mode tangent, .* x\.detach\(\)"):
        layer.checked("x", forward_ad.make_dual(x, x), X.shape)


def test_a_tensor_without_values_is_refused(layer: CudaArtifact) -> None:
    given, _ = arguments(layer)

    class FakeTensor:
        __dlpack__, __dlpack_device__ = given["x"].__dlpack__, given["x"].__dlpack_device__

    with pytest.raises(CallError, match="x is a FakeTensor and has no values"):
        layer(**{**given, "x": FakeTensor()})


def test_a_tensor_that_is_not_exported_is_refused_in_one_line(layer: CudaArtifact) -> None:
    given, _ = arguments(layer)

    class Locked:
        def __dlpack_device__(self) -> tuple[int, int]:
            return CUDA, 0

        def __dlpack__(self, **words: Any) -> Any:
            raise BufferError("it is locked\nframe #0: ...")

    with pytest.raises(CallError, match=r"^x of type .*Locked cannot be exported by DLPack: [^\n]*it is locked$"):
        layer(**{**given, "x": Locked()})


def test_a_tensor_that_is_not_contiguous_is_refused(layer: CudaArtifact) -> None:
    given, _ = arguments(layer)
    turned = X.transpose(0, 1, 4, 3, 2)

    class Turned:
        def __dlpack_device__(self) -> tuple[int, int]:
            return CUDA, 0

        def __dlpack__(self, **words: Any) -> Any:
            return turned.__dlpack__()

    with pytest.raises(CallError, match=r"x is not contiguous in memory; pass x\.contiguous\(\)"):
        layer(**{**given, "x": Turned()})
