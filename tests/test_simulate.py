"""The simulator finds what a GPU does in silence, and computes what a GPU computes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from gpu_kernels import CUDA, METAL, lowered, simulated
from kernels import integers

from opcompile import artifact, verify
from opcompile.bounds import compare
from opcompile.cli import cli
from opcompile.errors import ArtifactError, CallError, EngineError, TargetError, VerificationError
from opcompile.launch import Launch
from opcompile.simulate import Simulated, Simulator
from opcompile.spec import ConvTranspose3d
from schedules.gpu import GpuTiles

THREADS = 64


def run(body: str, language: str = "cuda", type_: str = "float", shared: str = "", size: int = THREADS) -> Any:
    """Run ``body`` with 64 threads on X of ``size`` elements 0, 1, ... and return Y of as many."""
    if language == "cuda":
        source = (
            f'extern "C" __global__ void __launch_bounds__({THREADS}) k({type_}* __restrict__ X_ptr, '
            f"{type_}* __restrict__ output_ptr) {{\n  int i = threadIdx.x;\n{shared}\n  {body}\n}}\n"
        )
    else:
        source = (
            "#include <metal_stdlib>\nusing namespace metal;\n"
            f"kernel void k(  device {type_}* X_ptr [[ buffer(0) ]],\n  device {type_}* output_ptr [[ buffer(1) ]],\n"
            "  uint blockIdx [[threadgroup_position_in_grid]],\n  uint threadIdx [[thread_position_in_threadgroup]]\n"
            f") {{\n  int i = threadIdx;\n{shared}\n  {body}\n}}\n"
        )
    dtype = np.dtype({"float": "float32", "half": "float16", "nv_bfloat16": ml_dtypes.bfloat16}[type_])
    x, y = np.arange(size).astype(dtype), np.zeros(size, dtype)
    launch = Launch.of(source, language, 1, (THREADS,))
    Simulator(source, language, replace(launch, blocks=1)).run({"x": x}, y.reshape(1, -1), 1)
    return y


SHARED = f"  __shared__ float s[{THREADS}];"
REVERSED = "output_ptr[i] = s[63 - i];"


def test_threads_exchange_values_through_shared_memory() -> None:
    y = run(f"s[i] = X_ptr[i]; __syncthreads(); {REVERSED}", shared=SHARED)
    np.testing.assert_array_equal(y, np.arange(THREADS)[::-1])
    y = run(
        f"s[i] = X_ptr[i]; threadgroup_barrier(mem_flags::mem_threadgroup); {REVERSED}",
        "metal",
        shared=f"  threadgroup float s[{THREADS}];",
    )
    np.testing.assert_array_equal(y, np.arange(THREADS)[::-1])


@pytest.mark.parametrize("language", ["cuda", "metal"])
def test_of_a_number_and_nan_a_device_takes_the_number(language: str) -> None:
    for body in ("max(X_ptr[i] / X_ptr[i], 2.0f)", "min(2.0f, X_ptr[i] / X_ptr[i])"):
        assert run(f"output_ptr[i] = {body};", language)[0] == 2


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (f"s[i] = X_ptr[i]; {REVERSED}", "race"),
        ("output_ptr[i / 2] = i; if (i < 32) output_ptr[i + 32] = 0;", "race"),
        ("output_ptr[i] = X_ptr[i + 1];", "256 bytes from the start of x"),
        ("output_ptr[i] = X_ptr[i - 1];", "-4 bytes from the start of x"),
        ("output_ptr[i + 64] = 0;", "the start of y"),
        ("X_ptr[i] = 0; output_ptr[i] = 0;", "only read"),
        ("float r[2]; r[i] = 1; output_ptr[i] = r[0];", "an array of registers"),
        ("s[i + 1] = 1; __syncthreads(); output_ptr[i] = s[i];", "shared memory"),
        ("output_ptr[i] = (*(float4*)(X_ptr + i % 4)).x;", "not aligned"),
        ("if (i < 32) __syncthreads(); output_ptr[i] = i;", "divergent barrier"),
        ("if (i < 32) __syncthreads(); else\n __syncthreads(); output_ptr[i] = i;", "divergent barrier"),
    ],
)
def test_what_a_gpu_would_not_say_is_said(body: str, words: str) -> None:
    with pytest.raises(VerificationError, match=re.escape(words)):
        run(body, shared=SHARED if "s[" in body else "")


@pytest.mark.parametrize("size", [61, 62, 63])
def test_an_access_closer_than_a_vector_to_the_end_is_seen(size: int) -> None:
    with pytest.raises(VerificationError, match=f"a write close to y, which has {4 * size} bytes"):
        run(f"if (i <= {size}) output_ptr[i] = 1;", size=size)
    y = run(f"if (i < {size}) output_ptr[i] = X_ptr[i + 1];", size=size)
    assert np.isnan(y).tolist() == [False] * (size - 1) + [True]


def test_shared_memory_begins_poisoned_and_output_unwritten() -> None:
    assert np.isnan(run("s[i / 2] = X_ptr[i]; __syncthreads(); output_ptr[i] = s[32 + i / 2];", shared=SHARED)).all()
    assert np.isnan(run("if (i) output_ptr[i] = i;")).tolist() == [True] + [False] * (THREADS - 1)


@pytest.mark.parametrize("type_", ["half", "nv_bfloat16"])
def test_narrow_types_round_as_numpy_does(type_: str) -> None:
    values = [0.1, -3.14159, 1e-7, 6e-8, 65504.0, 65520.0, 1e30, 2049.0, 2051.0, 5.9604645e-08, 0.0, -0.0]
    text = "".join(f"if (i == {i}) output_ptr[i] = ({type_}){v!r}f; " for i, v in enumerate(values))
    found = run(f"output_ptr[i] = X_ptr[i]; {text}", type_=type_)
    expected = np.arange(THREADS).astype(found.dtype)
    with np.errstate(over="ignore"):
        expected[: len(values)] = np.float32(values).astype(found.dtype)
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


# --- real kernels, bent ---

SMALL = ConvTranspose3d.parse("in=1x16x2x4x8 co=8 k=3 s=1x1x2 p=1 op=0x0x1")
STAGED = GpuTiles("staged", "positions", 4, 16, 2, 2, 4, 1, False)
SPLIT = GpuTiles("split", "positions", 4, 4, 2, 2, 0, 4, False)


@pytest.mark.gpu_table
@pytest.mark.parametrize("tiles", [STAGED, SPLIT], ids=lambda t: t.family)
@pytest.mark.parametrize("target", [CUDA, METAL], ids=lambda t: t.name)
def test_a_barrier_taken_out_of_a_kernel_is_missed(target: Any, tiles: GpuTiles) -> None:
    kernel = lowered(SMALL, target, tiles)
    x, w, b = integers(SMALL)
    compare(SMALL, simulated(kernel)(x, w, b), x, w, b, exact=True).require()
    barrier = re.compile(r"__syncthreads\(\);|threadgroup_barrier\([^)]*\);")
    assert barrier.search(kernel.source)
    bent = replace(kernel, source=barrier.sub("", kernel.source))
    with pytest.raises(VerificationError, match=r"race|beyond|FAIL"):
        compare(SMALL, simulated(bent)(x, w, b), x, w, b, exact=True).require()


def test_a_bent_index_is_found() -> None:
    kernel = lowered(SMALL, METAL, STAGED)
    x, w, b = integers(SMALL)
    bent = replace(kernel, source=kernel.source.replace("W_ptr + (", "W_ptr + 100000 + (", 1))
    assert bent.source != kernel.source
    with pytest.raises(VerificationError, match="start of w"):
        simulated(bent)(x, w, b)


# --- artifacts ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for Metal, which needs no compiler of its own to be written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opcompile.artifact_gpu.importlib.util.find_spec", lambda _: None)
        _, w, b = integers(SMALL)
        return artifact.write(lowered(SMALL, METAL, STAGED), tmp_path_factory.mktemp("gpu") / "a", weight=w, bias=b)


def test_an_artifact_for_a_gpu_holds_its_text_and_its_launch(place: Path) -> None:
    assert "kernel void conv_transpose3d" in (place / "kernel.metal").read_text()
    launch = json.loads((place / "launch.json").read_text())
    assert launch["grid"] == [2, 1, 1]
    assert launch["block"] == [64, 1, 1]
    assert launch["arguments"] == ["b", "w", "x", "y"]
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["target"]["name"] == "metal:apple-m1"
    assert manifest["library"] == ""
    assert manifest["workspace_bytes"] == 0


def test_a_simulated_artifact_is_verified(place: Path) -> None:
    report = verify(Simulated(place), engines=("reference",)).require()
    assert {row.weights for row in report.rows} == {"caller", "compiled"}
    assert "ran on the CPU" in report.not_asked[0].reason
    assert report.threads == ()


def test_the_command_line_verifies_by_simulation_where_it_is_asked_to(place: Path) -> None:
    done = CliRunner().invoke(cli, ["verify", str(place), "--simulate", "--json"], standalone_mode=False)
    assert done.return_value == 0
    assert json.loads(done.stdout)["passed"]
    done = CliRunner().invoke(cli, ["verify", str(place)], standalone_mode=False)
    assert isinstance(done.exception, TargetError)
    assert "--simulate" in str(done.exception)


def test_wrong_arrays_are_refused(place: Path) -> None:
    kernel, (x, w, b) = Simulated(place), integers(SMALL)
    np.testing.assert_array_equal(kernel(x), kernel(x, w, b))
    with pytest.raises(CallError, match="x is float64"):
        kernel(x.astype("float64"), w, b)
    with pytest.raises(CallError, match="w is float32"):
        kernel(x, w[1:], b)
    with pytest.raises(CallError, match=r"x is float32 \(\), but this layer needs"):
        kernel(np.array(x.sum()))
    with pytest.raises(CallError, match="x is of type list; pass a NumPy array"):
        kernel(x.tolist())


def test_a_changed_text_is_refused(place: Path, tmp_path: Path) -> None:
    for path in place.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "kernel.metal").write_text("")
    with pytest.raises(ArtifactError, match="changed after it was written"):
        Simulated(tmp_path)


def test_without_a_compiler_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("opcompile.simulate.importlib.util.find_spec", lambda _: None)
    with pytest.raises(EngineError, match=r"pip install 'opcompile\[cross\]'"):
        run("output_ptr[i] = i;")
