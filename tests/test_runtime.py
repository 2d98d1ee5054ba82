"""A loaded layer takes every tensor that fits, at any address, from any thread; the rest is a `CallError`."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace as changed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm_ffi

import opcompile
from opcompile import runtime
from opcompile.errors import ArtifactError, CallError
from opcompile.header import header
from opcompile.link import link, link_library
from opcompile.manifest import HEADER
from opcompile.packing import Packing
from opcompile.reference import reference
from opcompile.runtime import Artifact, Packed, load
from opcompile.spec import ConvTranspose3d
from opcompile.target import target
from opcompile.tensors import ALIGNMENT

LAYERS = {
    "float32": "in=1x5x3x4x5 co=6 k=3 s=2 p=1 op=1",
    "float16": "in=1x5x3x4x5 co=6 k=1x2x2 s=1x2x2 act=relu dtype=float16",
    "bfloat16": "in=2x5x3x4x5 co=6 k=1x2x2 s=1x2x2 dtype=bfloat16 layout=NDHWC",
    "float64": "in=Nx5x3x4x5 co=6 k=1x3x3 s=1x2x2 bias=0 dtype=float64",
    # all of X is copied before the first task: a workspace for each image
    "copied": "in=Nx32x3x3x3 co=32 k=3 p=1 bias=0 dtype=float64",
    # large enough that a second thread is worth waking
    "parallel": "in=1x8x8x8x8 co=8 k=3 s=2 p=1 op=1",
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("layers")
    return {
        name: opcompile.compile(ConvTranspose3d.parse(text), into=folder / name, plan="baseline")
        for name, text in LAYERS.items()
    }


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, np.ndarray, np.ndarray]:
    spec = ConvTranspose3d.parse(LAYERS["bfloat16"])
    _, w, b = whole_numbers(spec)
    folder = tmp_path_factory.mktemp("weighted")
    return opcompile.compile(spec, into=folder / "it", plan="baseline", weight=w, bias=b), w, b


def whole_numbers(spec: ConvTranspose3d, batch: int = 3, seed: int = 0) -> tuple[Any, Any, Any]:
    """Small whole inputs: every sum is exact in every dtype, so that results are equal or wrong."""
    random, dtype = np.random.default_rng(seed), DTYPES[spec.dtype]
    shapes = [tuple(n or batch for n in spec.x_shape), spec.w_shape, (spec.channels_out,)]
    x, w, b = (random.integers(-2, 3, shape).astype(dtype) for shape in shapes)
    return x, w, b if spec.bias else None


def right(spec: ConvTranspose3d, x: Any, w: Any, b: Any) -> np.ndarray:
    return reference(spec, x, w, b).astype(DTYPES[spec.dtype])


def at_offset(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy whose address is ``offset`` modulo 64."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    start = (offset - memory.ctypes.data) % 64
    moved = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


class OnlyDLPack:
    """A tensor of a library that knows DLPack and nothing else."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **_: Any) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


def run_alone(code: str, *arguments: object, **environment: str) -> str:
    """Run Python in a process of its own; fail with its output if it does not end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(opcompile.__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- right answers ---


@pytest.mark.parametrize("name", LAYERS)
def test_every_dtype_layout_and_batch_is_exact_on_whole_numbers(layers: dict[str, Artifact], name: str) -> None:
    layer = layers[name]
    for batch in (1, 3):
        x, w, b = whole_numbers(layer.spec, batch)
        expected = right(layer.spec, x, w, b)
        for weight in (w, layer.pack(w)):
            y = layer(x, weight, b)
            assert type(y) is np.ndarray
            assert y.dtype == x.dtype
            assert np.array_equal(y, expected)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_every_address(layers: dict[str, Artifact], name: str) -> None:
    layer = layers[name]
    x, w, b = whole_numbers(layer.spec)
    expected = right(layer.spec, x, w, b)
    for offset in range(0, 64, x.itemsize):
        out = at_offset(np.full_like(expected, 77), offset)
        moved = at_offset(x, offset)
        bias = None if b is None else at_offset(b, offset)
        weight = runtime.Packed.of(w.shape, layer.spec.dtype, layer.packing, at_offset(layer.pack(w).data, offset))
        assert moved.ctypes.data % 64 == weight.address % 64 == out.ctypes.data % 64 == offset
        assert layer(moved, weight, bias, out=out) is out
        assert np.array_equal(out, expected), offset


def test_an_element_across_two_is_copied(layers: dict[str, Artifact]) -> None:
    layer = layers["float32"]
    x, w, b = whole_numbers(layer.spec)
    moved = at_offset(x, 1)
    assert not moved.flags.aligned
    assert np.array_equal(layer(moved, at_offset(w, 3), at_offset(b, 2)), right(layer.spec, x, w, b))
    out = at_offset(right(layer.spec, x, w, b), 1)
    for given in (out, OnlyDLPack(out)):
        with pytest.raises(CallError, match="out is at an address that is no multiple of its element's size, 4; pass"):
            layer(x, w, b, out=given)


def test_what_is_not_contiguous_is_copied(layers: dict[str, Artifact]) -> None:
    layer = layers["float32"]
    x, w, b = whole_numbers(layer.spec)
    expected = right(layer.spec, x, w, b)
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    for same in (np.asfortranarray(x), wide[..., ::2], np.ascontiguousarray(x[..., ::-1])[..., ::-1]):
        assert not same.flags.c_contiguous
        assert np.array_equal(layer(same, np.asfortranarray(w), np.repeat(b, 2)[::2]), expected)
    ones = np.broadcast_to(np.float32(1), x.shape)
    assert np.array_equal(layer(ones, w, b), right(layer.spec, ones, w, b))


def test_read_only_arrays_are_taken_as_they_are(layers: dict[str, Artifact]) -> None:
    layer = layers["float32"]
    x, w, b = whole_numbers(layer.spec)
    for array in (x, w, b):
        array.flags.writeable = False
    assert layer._slots["x"].borrow(x)[0] == x.ctypes.data
    assert np.array_equal(layer(x, w, b), right(layer.spec, x, w, b))


def test_contiguous_tensors_are_never_copied(layers: dict[str, Artifact]) -> None:
    for layer in layers.values():
        x, _, _ = whole_numbers(layer.spec)
        assert layer._slots["x"].borrow(x)[0] == x.ctypes.data
        if layer.spec.dtype != "bfloat16":  # NumPy does not export it
            assert layer._slots["x"].borrow(OnlyDLPack(x))[0] == x.ctypes.data


def test_any_dlpack_tensor_is_taken(layers: dict[str, Artifact]) -> None:
    layer = layers["float32"]
    x, w, b = whole_numbers(layer.spec)
    expected = right(layer.spec, x, w, b)
    y = layer(tvm_ffi.from_dlpack(x), OnlyDLPack(w), OnlyDLPack(b))
    assert isinstance(y, tvm_ffi.Tensor)
    assert np.array_equal(np.from_dlpack(y), expected)
    out = np.zeros_like(expected)
    strided = np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    assert layer(OnlyDLPack(strided), layer.pack(OnlyDLPack(w)), b, out=out) is out
    assert np.array_equal(out, expected)
    out[...] = 0
    layer(x, w, b, out=OnlyDLPack(out))
    assert np.array_equal(out, expected)
    with pytest.raises(CallError, match="pass out="):
        layer(OnlyDLPack(x), w, b)


@pytest.mark.peers
def test_what_jax_traces_is_called_back(layers: dict[str, Artifact]) -> None:
    jax = pytest.importorskip("jax")
    layer = layers["float32"]
    x, w, b = whole_numbers(layer.spec)
    expected = right(layer.spec, x, w, b)
    for around in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(CallError, match=r"x is traced by JAX, and has no values yet; .*jax\.pure_callback"):
            around(lambda x: layer(x, w, b))(x if around is not jax.grad else 1.0)
    like = jax.ShapeDtypeStruct(expected.shape, expected.dtype)
    assert np.array_equal(jax.jit(lambda x: jax.pure_callback(layer, like, x, w, b))(x), expected)


@pytest.mark.peers
@pytest.mark.parametrize("name", LAYERS)
def test_torch_tensors(layers: dict[str, Artifact], name: str) -> None:
    import torch

    layer = layers[name]
    arrays = whole_numbers(layer.spec)
    expected = right(layer.spec, *arrays).astype(np.float64)
    dtype = getattr(torch, layer.spec.dtype)
    x, w, b = (None if a is None else torch.from_numpy(a.astype(np.float64)).to(dtype) for a in arrays)
    y = layer(x, w, b)
    assert isinstance(y, torch.Tensor)
    assert y.dtype == dtype
    assert np.array_equal(y.double().numpy(), expected)
    assert layer._slots["x"].borrow(x)[0] == x.data_ptr()
    last = x.to(memory_format=torch.channels_last_3d)
    assert np.array_equal(layer(last, layer.pack(w), b).double().numpy(), expected)
    out = torch.zeros_like(y)
    assert layer(arrays[0], w, b, out=out) is out
    assert torch.equal(out, y)
    with pytest.raises(CallError, match=r"x requires a gradient.*detach"):
        layer(x.requires_grad_(), w, b)
    for nothing_is_recorded in (torch.no_grad, torch.inference_mode):
        with nothing_is_recorded():
            assert torch.equal(layer(x, w.requires_grad_(), b), y)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_without_values_is_refused(layers: dict[str, Artifact]) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = layers["float32"]
    x, w, b = (torch.from_numpy(a) for a in whole_numbers(layer.spec))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        with pytest.raises(CallError, match=r"x is a FakeTensor and has no values; .* torch\.library\.custom_op"):
            layer(fake, mode.from_tensor(w), mode.from_tensor(b))
    with pytest.raises(CallError, match="x is a FakeTensor"):
        layer(fake, w, b)
    with pytest.raises(CallError, match="w is a FakeTensor"):
        layer.pack(mode.from_tensor(w))
    with pytest.raises(CallError, match="x is a meta tensor and has no values"):
        layer(x.to("meta"), w, b)
    with pytest.raises(CallError, match=r"x of type torch\.Tensor has no values"):
        torch.func.functionalize(lambda x: layer(x, w, b))(x)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_what_pytorch_does_not_export_is_said_in_one_line(layers: dict[str, Artifact]) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = layers["float32"]
    x, w, b = (torch.from_numpy(a) for a in whole_numbers(layer.spec))
    words = {
        r"^x is a tensor of layout torch\.sparse_coo, not a dense one; pass x\.to_dense\(\)$": x.to_sparse(),
        r"^x is a tensor of layout torch\._mkldnn, .* x\.to_dense\(\)$": x.to_mkldnn(),
        r"^x is quantized; pass x\.dequantize\(\)$": torch.quantize_per_tensor(x, 1, 0, torch.qint8),
        r"^x is a nested tensor; pass torch\.nested\.to_padded_tensor\(x, 0\)$": torch.nested.nested_tensor([x[0]]),
        r"^x is torch\.complex64, but this layer computes in float32; convert it first$": torch.complex(x, x),
    }
    for word, tensor in words.items():
        with pytest.raises(CallError, match=word):
            layer(tensor, w, b)
    with FakeTensorMode(), pytest.raises(CallError, match=r"x of type .* by DLPack: [^\n]*FakeTensorMode"):
        layer(x, w, b)
    layer(torch.quantize_per_tensor(x, 1, 0, torch.qint8).dequantize(), w, b)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_a_forward_mode_tangent_is_refused(layers: dict[str, Artifact]) -> None:
    import torch
    from torch.autograd import forward_ad

    layer = layers["float32"]
    x, w, b = (torch.from_numpy(a) for a in whole_numbers(layer.spec))
    y = layer(x, w, b)
    words = r"x carries a forward-mode tangent, .*; pass x\.detach\(\)"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        # unlike gradients, tangents are recorded under `no_grad` too
        for around in (nullcontext, torch.no_grad):
            with around(), pytest.raises(CallError, match=words):
                layer(dual, w, b)
        with pytest.raises(CallError, match="w carries a forward-mode tangent"):
            layer(x, forward_ad.make_dual(w, w), b)
        assert torch.equal(layer(dual.detach(), w, b), y)
        derivative = opcompile.compile(layer.spec, derivative="b")
        with pytest.raises(CallError, match="dy carries a forward-mode tangent"):
            derivative(forward_ad.make_dual(y, y))
    with pytest.raises(CallError, match=words):
        torch.func.jvp(lambda x: layer(x, w, b), (x,), (x,))


@pytest.mark.peers
def test_a_parameter_is_taken_from_a_pytorch_without_the_exchange_in_c(
    layers: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    layer = layers["float32"]
    x, w, b = (torch.from_numpy(a) for a in whole_numbers(layer.spec))
    y = layer(x, w, b)
    with torch.no_grad():
        assert torch.equal(layer(x, w.requires_grad_(), b), y)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_goes_around_a_call(layers: dict[str, Artifact]) -> None:
    import torch

    layer = layers["float32"]
    x, w, b = (torch.from_numpy(a) for a in whole_numbers(layer.spec))
    call = torch.compiler.disable(layer)
    y = torch.compile(lambda x: call(-x, w, b) + 1, backend="eager")(x)
    assert torch.equal(y, layer(-x, w, b) + 1)


def test_weights_of_compile_time(weighted: tuple[Artifact, np.ndarray, np.ndarray]) -> None:
    layer, w, b = weighted
    x, other, another = whole_numbers(layer.spec, seed=1)
    assert np.array_equal(layer(x), right(layer.spec, x, w, b))
    assert np.array_equal(layer(x, b=another), right(layer.spec, x, w, another))
    assert np.array_equal(layer(x, other, another), right(layer.spec, x, other, another))
    with pytest.raises(CallError, match="b is missing"):
        layer(x, other)
    golden = layer.golden()
    assert golden.w is None
    assert golden.b is None
    assert np.array_equal(layer(golden.x).ravel()[golden.indices], golden.expected.astype(ml_dtypes.bfloat16))


def test_a_bias_of_compile_time_goes_with_a_weight_of_the_call(tmp_path: Path) -> None:
    spec = ConvTranspose3d.parse("in=1x3x2x3x4 co=5 k=2 s=2")
    x, w, b = whole_numbers(spec)
    layer = opcompile.compile(spec, into=tmp_path / "it", plan="baseline", bias=b)
    assert np.array_equal(layer(x, w), right(spec, x, w, b))
    assert opcompile.verify(layer).passed
    with pytest.raises(CallError, match="w is missing"):
        layer(x)


def test_golden_holds(layers: dict[str, Artifact]) -> None:
    layer = layers["float32"]
    golden = layer.golden()
    full = reference(layer.spec, golden.x, golden.w, golden.b)
    assert np.array_equal(full.ravel()[golden.indices], golden.expected)
    assert np.abs(layer(golden.x, golden.w, golden.b).ravel()[golden.indices] - golden.expected).max() < 1e-5


# --- wrong calls ---


def bad(name: str, value: Any) -> Any:
    """A call of the float32 layer with one argument replaced."""

    def call(layer: Artifact) -> None:
        x, w, b = whole_numbers(layer.spec)
        arguments = {"x": x, "w": w, "b": b, name: value(locals()) if callable(value) else value}
        layer(arguments.pop("x"), **arguments)

    return call


WRONG = {
    "no weights": (bad("w", None), "w is missing"),
    "no bias": (bad("b", None), "b is missing"),
    "a list": (bad("x", [1.0]), "x is of type list"),
    "nothing": (bad("x", None), "x is of type NoneType"),
    "a number": (bad("w", 1.5), "w is of type float"),
    "rank": (bad("x", lambda v: v["x"][0]), r"x has shape \(5, 3, 4, 5\), but this layer needs \(1, 5, 3, 4, 5\)"),
    "batch": (bad("x", lambda v: np.repeat(v["x"], 2, 0)), r"x has shape \(2, 5, 3, 4, 5\)"),
    "shape of w": (bad("w", lambda v: v["w"][:, :3]), "w has shape"),
    "shape of b": (bad("b", lambda v: v["b"][:3]), "b has shape"),
    "dtype": (bad("x", lambda v: v["x"].astype(np.float64)), "x is float64, but this layer computes in float32"),
    "dtype of w": (bad("w", lambda v: v["w"].astype(np.int32)), "w is int32"),
    "dtype by dlpack": (bad("w", lambda v: OnlyDLPack(v["w"].astype(np.int32))), "w is int32"),
    "shape by dlpack": (bad("x", lambda v: OnlyDLPack(v["x"][0])), "x has shape"),
    "byte order": (bad("x", lambda v: v["x"].astype(">f4")), "byte-swapped float32"),
    "mask": (bad("x", lambda v: np.ma.masked_array(v["x"], v["x"] > 0)), "masked"),
    "mask of what is not contiguous": (
        bad("x", lambda v: np.ma.masked_array(np.asfortranarray(v["x"]), v["x"] > 0)),
        "masked",
    ),
    "object array": (bad("x", lambda v: v["x"].astype(object)), "x is object"),
    "device": (bad("x", lambda v: OnlyDLPack(v["x"], (2, 0))), "x is on DLPack device type 2, not the CPU"),
    "not exportable": (bad("x", lambda v: OnlyDLPack(v["x"].astype(object))), "cannot be exported"),
    "out of another shape": (bad("out", np.zeros((1, 6, 6, 8, 9), np.float32)), "out has shape"),
    "out of another dtype": (bad("out", np.zeros((1, 6, 6, 8, 10))), "out is float64"),
    "out strided": (bad("out", np.zeros((1, 6, 6, 8, 20), np.float32)[..., ::2]), "out is not contiguous"),
    "threads zero": (bad("threads", 0), "threads is 0"),
    "threads many": (bad("threads", 1025), "threads is 1025"),
    "threads text": (bad("threads", "two"), "threads is 'two'"),
    "threads fraction": (bad("threads", 1.5), r"threads is 1\.5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(layers: dict[str, Artifact], name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(CallError, match=message):
        call(layers["float32"])


@pytest.mark.parametrize("name", ["x", "w", "b", "out"])
def test_float64_is_no_bfloat16(layers: dict[str, Artifact], name: str) -> None:
    """NumPy takes float64 for equal to None, the type that it has for bfloat16."""
    layer = layers["bfloat16"]
    x, w, b = whole_numbers(layer.spec)
    arguments = {"x": x, "w": w, "b": b, "out": right(layer.spec, x, w, b)}
    arguments[name] = arguments[name].astype(np.float64)
    with pytest.raises(CallError, match=f"{name} is float64, but this layer computes in bfloat16"):
        layer(arguments.pop("x"), **arguments)
    with pytest.raises(CallError, match="dy is float64, but this layer computes in bfloat16"):
        opcompile.compile(layer.spec, derivative="b")(np.ones(layer.spec.y_shape))


def test_a_read_only_out(layers: dict[str, Artifact]) -> None:
    layer = layers["float32"]
    x, w, b = whole_numbers(layer.spec)
    out = np.zeros((1, 6, 6, 8, 10), np.float32)
    out.flags.writeable = False
    with pytest.raises(CallError, match="out is read-only"):
        layer(x, w, b, out=out)


@pytest.mark.peers
def test_an_immutable_out(layers: dict[str, Artifact]) -> None:
    import jax.numpy as jnp

    layer = layers["float32"]
    x, w, b = whole_numbers(layer.spec)
    out = jnp.zeros((1, 6, 6, 8, 10))
    with pytest.raises(CallError, match="out is a JAX array, which is immutable"):
        layer(x, w, b, out=out)
    assert not out.any()


@pytest.mark.peers
def test_a_lazily_negated_tensor(layers: dict[str, Artifact]) -> None:
    import torch

    layer = layers["float32"]
    x, w, b = map(torch.from_numpy, whole_numbers(layer.spec))
    negated = torch.complex(x, -x).conj().imag
    with pytest.raises(CallError, match=r"x is a lazily negated view; pass x\.resolve_neg\(\)"):
        layer(negated, w, b)
    assert torch.equal(layer(negated.resolve_neg(), w, b), layer(x, w, b))


def test_a_bias_too_many(layers: dict[str, Artifact]) -> None:
    layer = layers["float64"]
    x, w, _ = whole_numbers(layer.spec)
    with pytest.raises(CallError, match="b was given, but this layer has no bias"):
        layer(x, w, np.zeros(6))


def test_an_empty_or_other_batch(layers: dict[str, Artifact]) -> None:
    layer = layers["float64"]
    x, w, _ = whole_numbers(layer.spec)
    with pytest.raises(
        CallError, match=r"x has shape \(0, 5, 3, 4, 5\), but this layer needs \(N, 5, 3, 4, 5\), N at least 1"
    ):
        layer(x[:0], w)
    with pytest.raises(CallError, match="out has batch 2, but x has 3"):
        layer(x, w, out=layer(x[:2], w))


@pytest.mark.parametrize("name", ["x", "w", "b"])
def test_out_over_an_input(layers: dict[str, Artifact], name: str) -> None:
    layer = layers["float32"]
    x, w, b = whole_numbers(layer.spec)
    out = right(layer.spec, x, w, b)
    memory = out.reshape(-1)
    packed = layer.pack(w)
    if name == "x":
        x = memory[-x.size :].reshape(x.shape)
    elif name == "b":
        b = memory[:6]
    else:
        memory = np.zeros(packed.data.size + out.size, np.float32)
        memory[: packed.data.size] = packed.data.ravel()
        data = memory[: packed.data.size].reshape(packed.data.shape)
        packed = runtime.Packed.of(w.shape, "float32", layer.packing, data)
        out = memory[packed.data.size - 1 :][: out.size].reshape(out.shape)
    with pytest.raises(CallError, match=f"out shares memory with {name}"):
        layer(x, packed, b, out=out)


def test_weights_packed_for_another_layer(layers: dict[str, Artifact]) -> None:
    layer = layers["float32"]
    x, _, b = whole_numbers(layer.spec)
    other = layers["parallel"]
    with pytest.raises(CallError, match="w was packed for another layer"):
        layer(x, other.pack(whole_numbers(other.spec)[1]), b)
    # what `pack` returns is no array: shapes that coincide confuse nobody
    with pytest.raises(CallError, match="w has shape"):
        layer(x, layer.pack(whole_numbers(layer.spec)[1]).data, b)


def test_packed_weights_outlive_a_reload(layers: dict[str, Artifact]) -> None:
    layer = layers["float32"]
    x, w, b = whole_numbers(layer.spec)
    assert np.array_equal(load(layer.directory)(x, layer.pack(w), b), right(layer.spec, x, w, b))


# --- threads ---

COUNT_THREADS = """
    import os, sys, numpy as np, opcompile
    layer = opcompile.load(sys.argv[1], threads=int(sys.argv[2]) or None)
    g = layer.golden()
    before = len(os.listdir("/proc/self/task"))
    layer(g.x, g.w, g.b)
    print(len(os.listdir("/proc/self/task")) - before, end="")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(
    ("argument", "variable", "workers"), [(3, "", "2"), (1, "3", "0"), (0, "4", "3"), (0, "1", "0")]
)
def test_threads_by_argument_and_by_variable(
    layers: dict[str, Artifact], argument: int, variable: str, workers: str
) -> None:
    found = run_alone(COUNT_THREADS, layers["parallel"].directory, argument, OPCOMPILE_NUM_THREADS=variable)
    assert found == workers


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "4096"])
def test_a_malformed_variable(layers: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OPCOMPILE_NUM_THREADS", text)
    with pytest.raises(CallError, match="OPCOMPILE_NUM_THREADS"):
        load(layers["float32"].directory)


def test_eight_threads_at_once(layers: dict[str, Artifact]) -> None:
    layer = layers["parallel"]
    inputs = [whole_numbers(layer.spec, seed=seed) for seed in range(8)]
    expected = [right(layer.spec, *each) for each in inputs]

    def many(index: int) -> int:
        (x, w, b), packed = inputs[index], layer.pack(inputs[index][1])
        return sum(
            not np.array_equal(layer(x, packed if call % 50 else w, b, threads=1 + (call + index) % 4), expected[index])
            for call in range(1000)
        )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(many, range(8))) == [0] * 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_process_may_call_after_a_fork(layers: dict[str, Artifact]) -> None:
    run_alone(
        """
        import os, sys, threading, warnings, numpy as np, opcompile
        warnings.simplefilter("ignore", DeprecationWarning)
        layer = opcompile.load(sys.argv[1], threads=3)
        g = layer.golden()
        y = layer(g.x, g.w, g.b)
        stop = False
        def busy():
            while not stop:
                layer(g.x, g.w, g.b)
        other = threading.Thread(target=busy)
        other.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                ok = all(np.array_equal(layer(g.x, g.w, g.b), y) for _ in range(3))
                os._exit(0 if ok and len(os.listdir("/proc/self/task")) == 3 else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop = True
        other.join()
        """,
        layers["parallel"].directory,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_memory_that_is_not_there_is_an_error_and_no_crash(layers: dict[str, Artifact]) -> None:
    assert layers["copied"].manifest["plan"]["tiles"]["copy"] == "whole"
    out = run_alone(
        """
        import resource, sys, numpy as np, opcompile
        layer = opcompile.load(sys.argv[1], threads=2)
        g = layer.golden()
        y = layer(g.x, g.w)
        x = np.zeros((20_000, *g.x.shape[1:]))
        out = np.zeros((20_000, *y.shape[1:]))
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), -1))
        for _ in range(2):
            try:
                layer(x, g.w, out=out)
            except opcompile.OpcompileError as error:
                print(type(error).__name__, error)
            assert np.array_equal(layer(g.x, g.w), y)
        """,
        layers["copied"].directory,
        # glibc would reserve 64 MiB for the second thread, which may begin only after the limit was worked out
        MALLOC_ARENA_MAX="1",
    )
    assert out.count("CallError") == 2
    assert "bytes of workspace are needed and cannot be allocated" in out


# --- the run-time half alone, with a kernel in C that does what it is told ---

KERNEL = r"""
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
struct environment { void *sync_handle; int32_t num_task; };
typedef int (*task_fn)(int, struct environment *, void *);
__attribute__((weak)) int (*__TVMBackendParallelLaunch)(task_fn, void *, int);
__attribute__((weak)) int (*__TVMBackendParallelBarrier)(int, struct environment *);
__attribute__((weak)) void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
__attribute__((weak)) int (*__TVMBackendFreeWorkspace)(int, int, void *);
void TVMFFIErrorSetRaisedFromCStrParts(const char *, const char **, int32_t);
struct tensor { float *data; };
struct value { int32_t type, unused; struct tensor *tensor; };
struct closure { float *x, *y; };

static int met;
int polls; /* of the library whose threads count them */

static int task(int index, struct environment *environment, void *closure) {
  float *x = ((struct closure *)closure)->x, *y = ((struct closure *)closure)->y;
  int wanted = (int)x[0];
  if (wanted == 1) { /* count the tasks */
    usleep(1000);
    y[index] = (float)environment->num_task;
  } else if (wanted == 2) { /* a failing one */
    usleep(1000);
    if (index != (int)x[2]) return 0;
    const char *parts[] = {"task ", "failed"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 2);
    return -7;
  } else if (wanted == 3) { /* a loop in a loop */
    struct closure inner = {(float[]){1, 0, 0}, y + 8 * index};
    return __TVMBackendParallelLaunch(task, &inner, 3);
  } else if (wanted == 4) {
    return __TVMBackendParallelBarrier(index, environment);
  } else if (wanted == 5) { /* leaves without freeing */
    if (!__TVMBackendAllocWorkspace(1, 0, 1 << 20, 2, 32)) return -2;
    return -1;
  } else if (wanted == 6) { /* waits for all, ten seconds at most */
    __atomic_add_fetch(&met, 1, __ATOMIC_SEQ_CST);
    int all = environment->num_task, tries = 10000;
    while (__atomic_load_n(&met, __ATOMIC_SEQ_CST) < all && tries--) usleep(1000);
    return tries < 0 ? -9 : 0;
  }
  return 0;
}

int __tvm_ffi_conv_transpose3d(void *handle, const struct value *arguments, int32_t count, struct value *result) {
  float *x = arguments[0].tensor->data, *y = arguments[count - 1].tensor->data;
  struct closure closure = {x, y};
  if (x[0] < 10) return __TVMBackendParallelLaunch(task, &closure, (int)x[1]);
  if (x[0] == 11) return -3; /* without a word */
  if (x[0] == 12) { /* all meet, one sleeps until others have polled, and all meet again */
    struct closure meet = {(float[]){6}, y};
    met = 0;
    int status = __TVMBackendParallelLaunch(task, &meet, (int)x[1]);
    met = 0;
    int before = polls, last = before + 50;
    for (int i = 0; i < 10000 && __atomic_load_n(&polls, __ATOMIC_RELAXED) < last; i++) usleep(1000);
    y[0] = (float)(polls - before);
    return status ? status : __TVMBackendParallelLaunch(task, &meet, (int)x[1]);
  }
  if (x[0] == 13) return y[0] = (float)polls, 0;
  /* workspaces of x[1], x[2], ... bytes, all at once; their addresses go to y */
  void *spaces[8];
  int n = 0;
  for (; x[1 + n] != 0; n++) {
    spaces[n] = __TVMBackendAllocWorkspace(1, 0, x[1 + n] < 0 ? UINT64_MAX : (uint64_t)x[1 + n], 2, 32);
    if (!spaces[n]) return -1;
    memset(spaces[n], n, (size_t)x[1 + n]);
    memcpy(y + 2 * n, &spaces[n], sizeof(void *));
  }
  while (n--) __TVMBackendFreeWorkspace(1, 0, spaces[n]);
  return 0;
}
"""


class Stub:
    """The C kernel above, called the way `Artifact` calls a real one."""

    def __init__(self, library: Path) -> None:
        self.folder, self.library = library.parent, ctypes.CDLL(str(library))
        self.library.opcompile_error.restype = ctypes.c_char_p
        self.library.opcompile_run.argtypes = [ctypes.c_int, ctypes.c_int64, *[ctypes.c_void_p] * 4]
        self.y = np.zeros(4096, np.float32)

    def __call__(self, *words: float, threads: int = 4, batch: int = 1) -> int:
        x = np.zeros(4096, np.float32)
        x[: len(words)] = words
        self.y[:] = 0
        data = self.y.ctypes.data
        status: int = self.library.opcompile_run(threads, batch, x.ctypes.data, data, data, data)
        return status

    @property
    def error(self) -> str:
        return str(self.library.opcompile_error().decode())

    def addresses(self, *sizes: float) -> list[int]:
        assert self(10, *sizes, 0) == 0, self.error
        return [int(a) for a in self.y.view(np.uint64)[: len(sizes)]]


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    folder = tmp_path_factory.mktemp("stub")
    (folder / "kernel.c").write_text(KERNEL)
    subprocess.run(["cc", "-c", "-O1", "-fPIC", "kernel.c"], cwd=folder, check=True)
    spec = ConvTranspose3d.parse("in=1x1x16x16x16 co=1 k=9 p=4")
    code = (folder / "kernel.o").read_bytes()
    (folder / "stub.so").write_bytes(link(code, header(spec, Packing.identity(spec.w_shape)), target("llvm")))
    return Stub(folder / "stub.so")


@pytest.fixture(scope="module")
def polling(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Stub:
    """The same, whose threads poll for a minute instead of 0.1 ms, and count how often."""
    folder, own = tmp_path_factory.mktemp("polling"), Path(opcompile.__file__).parent
    text = (own / "runtime.c").read_text()
    for old, new in (
        ("#define POLL_NS 100000", "extern int polls;\n#define POLL_NS 60000000000"),
        ("sched_yield()", "__atomic_add_fetch(&polls, 1, __ATOMIC_RELAXED), sched_yield()"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "runtime.c").write_text(text)
    spec = ConvTranspose3d.parse("in=1x1x16x16x16 co=1 k=9 p=4")
    texts = {HEADER: header(spec, Packing.identity(spec.w_shape)), "layer.c": (own / "layer.c").read_text()}
    code = (stub.folder / "kernel.o").read_bytes()
    common = [folder / "runtime.c", own / "layer.h"]
    (folder / "stub.so").write_bytes(
        link_library(common, texts, [code], (runtime.KERNEL, *runtime.EXPORTS), target("llvm"))
    )
    return Stub(folder / "stub.so")


def test_threads_poll_within_a_call_and_sleep_after_it(polling: Stub) -> None:
    for threads in (2, 3):
        assert polling(12, threads, threads=threads) == 0  # one who polls takes part in the next loop
        assert polling.y[0] >= 50, "nobody has polled"
    polls = []
    for _ in range(2):
        time.sleep(0.1)
        assert polling(13) == 0
        polls.append(int(polling.y[0]))
    assert polls[0] == polls[1] > 0


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tasks", [1, 2, 7, 64])
def test_as_many_tasks_as_asked_for(stub: Stub, threads: int, tasks: int) -> None:
    assert stub(1, tasks, threads=threads) == 0
    assert stub.y[: tasks + 1].tolist() == [tasks] * tasks + [0]


def test_as_many_tasks_as_threads_when_none_is_asked_for(stub: Stub) -> None:
    assert stub(1, 0, threads=3) == 0
    assert stub.y[:4].tolist() == [3, 3, 3, 0]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("failing", [0, 3, 5])
def test_a_failing_task_ends_the_call_with_its_own_words(stub: Stub, threads: int, failing: int) -> None:
    assert stub(2, 6, failing, threads=threads) == -7
    assert stub.error == "task failed"
    assert stub(1, 6, threads=threads) == 0
    assert stub.error == ""


def test_a_loop_in_a_loop_runs_where_it_is(stub: Stub) -> None:
    assert stub(3, 4) == 0
    assert stub.y[:32].reshape(4, 8).tolist() == [[3, 3, 3, 0, 0, 0, 0, 0]] * 4


def test_a_barrier_is_refused(stub: Stub) -> None:
    assert stub(4, 2) == -1
    assert "barrier" in stub.error


def test_a_silent_failure_gets_a_message(stub: Stub) -> None:
    assert stub(11) == -3
    assert "without a message" in stub.error


def test_workspaces_are_aligned_and_used_again(stub: Stub) -> None:
    first = stub.addresses(100, 1 << 20, 4096)
    assert [a % 64 for a in first] == [0, 0, 0]
    assert sorted(stub.addresses(4096, 100, 1 << 20)) == sorted(first)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workspaces_do_not_pile_up(stub: Stub) -> None:
    def resident_mib() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

    stub.addresses(64 << 20)
    before = resident_mib()
    for size in range(1, 64):
        stub.addresses(size << 20, 64)
        assert stub(5, 3) == -1  # forgets a workspace in each task
    assert resident_mib() - before < 16
    for size in range(65, 81):  # none of these fits where another was
        stub.addresses(size << 20)
    assert resident_mib() - before < 64


def test_a_workspace_beyond_all_memory(stub: Stub) -> None:
    assert stub(10, 64, -1) == -1
    assert "workspace" in stub.error


@pytest.mark.parametrize("threads", [-1, 1025])
def test_threads_are_checked_in_c_too(stub: Stub, threads: int) -> None:
    assert stub(1, 1, threads=threads) == -1
    assert "threads" in stub.error


@pytest.mark.parametrize(
    ("layer", "batch", "right"),
    [
        ("in=Nx1x1x1x1 co=1 k=1", 2**61, False),
        ("in=Nx1x1x1x1 co=1 k=1", 2**63 - 1, False),
        ("in=Nx1x1x1x1 co=1 k=1", 2**40, True),
        ("in=Nx1x1x1x1 co=1 k=8 s=8", 2**53, False),  # of y
        ("in=Nx1x8x8x8 co=1 k=1 p=7:0", 2**53, False),  # of x
    ],
)
def test_a_batch_of_more_bytes_than_addresses(stub: Stub, tmp_path: Path, layer: str, batch: int, right: bool) -> None:
    """Refused, instead of what is left of the size modulo 2^64."""
    spec, code = ConvTranspose3d.parse(layer), (stub.folder / "kernel.o").read_bytes()
    (tmp_path / "open.so").write_bytes(link(code, header(spec, Packing.identity(spec.w_shape)), target("llvm")))
    dynamic = Stub(tmp_path / "open.so")
    assert (dynamic(1, 1, batch=batch) == 0) == right
    assert right or "batch is so large that a tensor would have more than 2^63 bytes" in dynamic.error


@pytest.mark.parametrize("feature", ["telepathy", "f", "avx51", "sim"])
def test_another_processor_is_named_in_c_too(stub: Stub, tmp_path: Path, feature: str) -> None:
    """A kernel of instructions that this one lacks is not called: whole words count, the first of them too."""
    here, spec = target("llvm"), ConvTranspose3d.parse("in=1x1x16x16x16 co=1 k=9 p=4")
    better = changed(here, name="llvm:better", features=(feature, *here.features))
    code = (stub.folder / "kernel.o").read_bytes()
    (tmp_path / "better.so").write_bytes(link(code, header(spec, Packing.identity(spec.w_shape)), better))
    there = Stub(tmp_path / "better.so")
    assert there(1, 1) == -1
    assert f"compiled for llvm:better, and this processor has no {feature}" in there.error


# --- the library ---


def test_only_the_entries_are_exported_and_nothing_is_left_open(layers: dict[str, Artifact]) -> None:
    for layer in layers.values():
        library = layer.directory / layer.manifest["library"]
        lines = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout.splitlines()
        defined = {line.split()[2] for line in lines if line.split()[1:2] != ["U"] and line.split()[0] not in "Uw"}
        assert defined == {runtime.KERNEL, *runtime.EXPORTS}
        assert not [line for line in lines if "TVM" in line]


def test_it_is_also_a_module_of_tvm_ffi(layers: dict[str, Artifact]) -> None:
    layer = layers["float32"]
    x, w, b = whole_numbers(layer.spec)
    y = np.zeros_like(right(layer.spec, x, w, b))
    kernel = tvm_ffi.load_module(str(layer.directory / layer.manifest["library"]))["conv_transpose3d"]
    kernel(x, layer.packing(w), b, y)
    assert np.array_equal(y, right(layer.spec, x, w, b))
    with pytest.raises((TypeError, ValueError), match="Mismatched X"):
        kernel(x[:, :, :, :, :2].copy(), layer.packing(w), b, y)


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="does not exist"):
        load(tmp_path / "file" / "nowhere")
    (tmp_path / "odd" / "manifest.json").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="cannot be read: Is a directory"):
        load(tmp_path / "odd")
    with pytest.raises(CallError, match=r"path is a path of \d+ characters, which is too long here"):
        load(tmp_path / ("long" * 100))


# --- pickled ---


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301


def test_another_process_takes_a_layer_and_its_weights(layers: dict[str, Artifact]) -> None:
    layer = layers["float32"]
    x, w, b = whole_numbers(layer.spec)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        y = pool.submit(layer, x, layer.pack(w), b, threads=1).result()
    assert np.array_equal(y, right(layer.spec, x, w, b))


def test_what_was_pickled_is_what_is_loaded(tmp_path: Path) -> None:
    one, other = (ConvTranspose3d.parse(LAYERS[name]) for name in ("float32", "float16"))
    layer = opcompile.compile(one, into=tmp_path / "it", plan="baseline", verify=True)
    held = pickle.dumps(layer)
    again = pickle.loads(held)  # noqa: S301
    assert (again.spec, again.directory, again.threads) == (layer.spec, layer.directory, layer.threads)
    opcompile.compile(other, into=tmp_path / "it", plan="baseline")
    with pytest.raises(ArtifactError, match="it holds another artifact than the one that was pickled"):
        pickle.loads(held)  # noqa: S301


def test_a_derivative_is_pickled_too(tmp_path: Path) -> None:
    spec = ConvTranspose3d.parse("in=1x2x2x2x2 co=2 k=2 bias=0")
    layer = opcompile.compile(spec, into=tmp_path / "it", plan="baseline", derivative="x")
    assert pickled(layer).gradient == layer.gradient


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_packed_weights_that_are_copied_have_memory_of_their_own(
    layers: dict[str, Artifact], copied: Callable[[Packed], Packed]
) -> None:
    layer = layers["bfloat16"]
    x, w, b = whole_numbers(layer.spec)
    packed = copied(layer.pack(w))
    assert packed.address == packed.data.ctypes.data
    assert packed.address % ALIGNMENT == 0
    assert not packed.data.flags.writeable
    assert np.array_equal(layer(x, packed, b), right(layer.spec, x, w, b))
