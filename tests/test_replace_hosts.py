"""Libraries of replaced nodes in real hosts: Python, C, many threads, many sessions; and what a host can do wrong."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

import opcompile
from opcompile.replace.sessions import Session
from tests.onnx_engine import integers, value
from tests.replaced import run, saved, upsampling

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
LIBRARY = "opcompile_ops.so"
# large enough that its loops are cut into tasks
LARGE = ("n", 8, 8, 8, 8)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Replace a model with a dynamic batch; return the directory, with the original as stock.onnx."""
    folder = tmp_path_factory.mktemp("large")
    after = [helper.make_node("Tanh", ["up"], ["y"])]
    path = saved(upsampling(LARGE, channels=16, after=after), folder)
    opcompile.replace(path, folder / "out", plan="baseline", verify=False, measure=False)
    shutil.copy(path, folder / "stock.onnx")
    return folder


def ours(folder: Path, threads: int = 1) -> Session:
    return Session(folder / "out" / "model.onnx", folder / "out" / LIBRARY, threads)


# --- hosts ---


def onnxruntime_library() -> Path:
    (found,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    return found


def test_the_python_example(large: Path) -> None:
    command = [sys.executable, EXAMPLES / "onnxruntime_host.py", large / "out" / "model.onnx", large / "out" / LIBRARY]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.startswith("y (1, 16, 16, 16, 16) float32 sum of magnitudes")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("host") / "host"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    source = EXAMPLES / "onnxruntime_host.c"
    headers = f"-I{ROOT / 'opcompile' / 'replace'}"
    subprocess.run(["cc", "-std=c11", *warnings, headers, source, "-o", program, "-ldl", "-lm"], check=True)
    return program


def test_the_c_example(large: Path, host: Path) -> None:
    given = [host, onnxruntime_library(), large / "out" / "model.onnx", large / "out" / LIBRARY]
    told = subprocess.run(given, capture_output=True, text=True, check=True).stdout
    right = np.abs(run(large / "stock.onnx", np.ones((1, 8, 8, 8, 8), np.float32)), dtype=np.float64).sum()
    name, *_, total = told.split()
    assert (name, "65536 elements" in told) == ("y:", True)
    assert abs(float(total) - right) < 1e-6 * right  # X is 1 everywhere: most sums are rounded alike


def test_the_operators_compile_without_a_warning(tmp_path: Path) -> None:
    from opcompile.replace import library
    from opcompile.target import target

    here = target("llvm")
    kernel = library.compiled(opcompile.ConvTranspose3d.parse("in=1x4x3x4x5 co=6 k=2 s=2"), here, "baseline")
    table = tmp_path / "table.c"
    table.write_text(library.table([library.Operator.of([kernel], packed=True)]))
    code = ROOT / "opcompile" / "replace" / "ops.c"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    folders = [f"-I{ROOT / 'opcompile'}", f"-I{ROOT / 'opcompile' / 'replace'}"]
    for file in (code, table):
        command = ["cc", "-std=c11", "-O2", "-c", *warnings, *folders, file, "-o", tmp_path / "made.o"]
        subprocess.run(command, check=True)


# --- threads, sessions, libraries ---


def test_many_threads_at_once(large: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((1 + i % 3, 8, 8, 8, 8), np.float32) for i in range(8)]
    session = ours(large, 2)
    right = [session({"x": x})["y"] for x in inputs]

    def many(i: int) -> bool:
        return all(np.array_equal(session({"x": inputs[i]})["y"], right[i]) for _ in range(RUNS))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many, range(8)))


# of each thread; the heavy part of the checks asks for a thousand
RUNS = int(os.environ.get("OPCOMPILE_TEST_RUNS", "25"))


def test_runs_and_sessions_do_not_grow(large: Path) -> None:
    """After as many runs and sessions as filled every cache, as many again take no more memory."""

    def grown(work: Any, times: int) -> int:
        sizes = []
        for _ in range(2):
            for _ in range(times):
                work()
            gc.collect()
            sizes.append(resident())
        return sizes[1] - sizes[0]

    x = np.ones((2, 8, 8, 8, 8), np.float32)
    session = ours(large, 2)
    assert grown(lambda: session({"x": x}), RUNS) < 4 << 20
    assert grown(lambda: ours(large, 2)({"x": x}), RUNS) < 8 << 20


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_two_libraries_in_one_session(large: Path, tmp_path: Path) -> None:
    """They may even hold the same operator."""
    after = [helper.make_node("ConvTranspose", ["up", "v"], ["y"], strides=[2, 2, 2])]
    model = upsampling(LARGE, channels=16, after=after, constants={"v": integers((16, 2, 2, 2, 2))})
    path = saved(model, tmp_path)
    opcompile.replace(path, tmp_path / "out", plan="baseline", verify=False, measure=False)
    options = onnxruntime.SessionOptions()
    for library in (large / "out" / LIBRARY, tmp_path / "out" / LIBRARY):
        options.register_custom_ops_library(str(library))
    x = integers((2, 8, 8, 8, 8))
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), options)
    assert np.array_equal(session.run(None, {"x": x})[0], run(path, x))
    session = onnxruntime.InferenceSession(str(large / "out" / "model.onnx"), options)
    assert np.abs(session.run(None, {"x": x})[0] - run(large / "stock.onnx", x)).max() < 1e-6


# --- what a host can do wrong ---


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 8, 8, 8, 9), "invalid dimensions"),
        ((1, 8, 8, 8), "Invalid rank"),
        ((1, 7, 8, 8, 8), "invalid dimensions"),
    ],
)
def test_another_shape(shape: tuple[int, ...], words: str, large: Path) -> None:
    with pytest.raises(opcompile.OpcompileError, match=words):
        ours(large)({"x": np.zeros(shape, np.float32)})


@pytest.fixture
def loose(large: Path) -> tuple[onnx.ModelProto, Path]:
    """The replaced model, edited so that ONNX Runtime knows nothing of the input's shape."""
    model = onnx.load(large / "out" / "model.onnx")
    model.graph.input[0].CopyFrom(value("x", None))
    return model, large / "out" / LIBRARY


@pytest.mark.parametrize(
    "shape", [(1, 8, 8, 8, 9), (1, 8, 8, 8), (8,), (), (1, 7, 8, 8, 8), (1, 8, 0, 8, 8), (1, 8, 8, 8, 8, 1)], ids=str
)
def test_a_shape_that_was_not_compiled(shape: tuple[int, ...], loose: tuple[onnx.ModelProto, Path]) -> None:
    model, library = loose
    with pytest.raises(opcompile.OpcompileError, match=r"X has shape \(.*\), but this kernel was compiled for \(0, 8,"):
        run(model, np.zeros(shape, np.float32), library)


def test_no_images(loose: tuple[onnx.ModelProto, Path]) -> None:
    model, library = loose
    assert run(model, np.zeros((0, 8, 8, 8, 8), np.float32), library).shape == (0, 16, 16, 16, 16)


def our_node(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.domain.startswith("opcompile"))


def test_a_missing_bias(loose: tuple[onnx.ModelProto, Path]) -> None:
    model, library = loose
    our_node(model).input.pop()
    with pytest.raises(opcompile.OpcompileError, match=r"input|Input"):
        run(model, np.zeros((1, 8, 8, 8, 8), np.float32), library)


def test_a_weight_of_another_shape(loose: tuple[onnx.ModelProto, Path]) -> None:
    model, library = loose
    tensor = next(t for t in model.graph.initializer if t.name == our_node(model).input[1])
    tensor.dims[:] = [int(np.prod(tensor.dims))]
    with pytest.raises(opcompile.OpcompileError, match=r"W has shape \(\d+\), but this kernel was compiled for"):
        run(model, np.zeros((1, 8, 8, 8, 8), np.float32), library)


def test_another_type(loose: tuple[onnx.ModelProto, Path]) -> None:
    model, library = loose
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    with pytest.raises(opcompile.OpcompileError, match="double"):
        run(model, np.zeros((1, 8, 8, 8, 8)), library)


def test_an_operator_that_the_library_lacks(loose: tuple[onnx.ModelProto, Path]) -> None:
    model, library = loose
    our_node(model).op_type = "ConvTranspose3d_0000000000000000"
    with pytest.raises(opcompile.OpcompileError, match="ConvTranspose3d_0000000000000000"):
        run(model, np.zeros((1, 8, 8, 8, 8), np.float32), library)
    with pytest.raises(opcompile.OpcompileError, match="opcompile"):
        run(model, np.zeros((1, 8, 8, 8, 8), np.float32))


@pytest.mark.parametrize("offset", [0, 4, 1])
def test_an_input_at_any_address(offset: int, large: Path) -> None:
    """The graph's input goes straight to the kernel, which takes any address that suits a float."""
    path = large / "out" / "direct.onnx"
    model = onnx.load(large / "out" / "model.onnx")
    del model.graph.node[0]
    our_node(model).input[0] = "x"
    onnx.save(model, path)
    x = integers((1, 8, 8, 8, 8))
    memory = np.zeros(x.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    memory[start : start + x.nbytes] = x.view(np.uint8).reshape(-1)
    session = Session(path, large / "out" / LIBRARY)
    binding = session._session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, memory.ctypes.data + start)
    binding.bind_output("y")
    if offset % 4:
        with pytest.raises(Exception, match="no multiple of 4 bytes"):
            session._session.run_with_iobinding(binding)
        return
    session._session.run_with_iobinding(binding)
    assert np.array_equal(binding.copy_outputs_to_cpu()[0], session({"x": x})["y"])
