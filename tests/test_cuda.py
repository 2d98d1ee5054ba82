"""CUDA without a GPU: the library is built, loads without a compiler, and refuses what it cannot take."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_kernels import CUDA, lowered
from kernels import integers

import opcompile
from opcompile import artifact, build, nvcc
from opcompile.cases import case
from opcompile.errors import CallError, EngineError, KernelError, TargetError
from opcompile.gpus import gpu_target
from opcompile.lower_gpu import lower_gpu
from opcompile.runtime_cuda import CudaArtifact
from opcompile.simulate import Simulated
from opcompile.spec import ConvTranspose3d
from opcompile.target import target

SMALL = ConvTranspose3d.parse("in=1x4x2x2x4 co=8 k=2 s=2")
HAS_NVCC = shutil.which("nvcc") is not None
needs_nvcc = pytest.mark.skipif(not HAS_NVCC, reason="no nvcc on PATH")


def test_a_library_for_several_architectures_asks_for_each_and_for_ptx() -> None:
    codes = nvcc._codes(gpu_target("cuda:sm_80+sm_90"))
    assert codes[1::2] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=sm_90",
        "arch=compute_90,code=compute_90",
    ]


def test_without_nvcc_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("opcompile.nvcc.importlib.util.find_spec", lambda _: None)
    with pytest.raises(EngineError, match=r"pip install 'opcompile\[cuda\]'"):
        nvcc._nvcc()


def test_nvcc_of_pypi_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.touch()
    monkeypatch.setenv("PATH", "")
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    assert nvcc._nvcc() == [str(compiler)]


def test_nvcc_is_a_command_as_the_c_compiler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", f"{sys.executable} -c 'print(\"V12.3\")'")
    assert nvcc.nvcc_version() == "12.3"


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("nvcc fatal   : Failed to preprocess host compiler properties.", EngineError),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_75'", EngineError),
        ("ptxas error   : Entry function 'k' uses too much shared data", KernelError),
    ],
)
def test_a_broken_compiler_is_no_refused_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, refused: type[EngineError]
) -> None:
    """Of which others of a model may be fine."""
    script = tmp_path / "nvcc"
    script.write_text(f'#!/bin/sh\necho "{said}" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("NVCC", str(script))
    with pytest.raises(EngineError, match=said[:10]) as caught:
        nvcc.nvcc("", "", CUDA)
    assert type(caught.value) is refused


def test_a_gpu_is_never_meant_by_accident() -> None:
    with pytest.raises(TargetError, match=r"cuda:sm_90.*sm_80\+sm_90"):
        build.write(SMALL, "cuda", "baseline", "never")
    with pytest.raises(TargetError, match="is a GPU"):
        target("cuda:sm_90")


# --- with nvcc ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not HAS_NVCC:
        pytest.skip("no nvcc on PATH")
    return artifact.write(lowered(SMALL, CUDA), tmp_path_factory.mktemp("cuda") / "a")


@pytest.mark.gpu_table
def test_the_library_loads_where_there_is_no_compiler(place: Path) -> None:
    """In a process that cannot import TVM or ONNX, with `apache-tvm-ffi` alone."""
    code = f"""
        import sys
        for name in ("tvm", "onnx", "onnxruntime"):
            sys.modules[name] = None
        import opcompile.runtime
        layer = opcompile.runtime.load({str(place)!r})
        print(type(layer).__name__, layer.spec)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split()[0] == "CudaArtifact"
    libraries = subprocess.run(["ldd", next(place.glob("*.so"))], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"lib(tvm\w*|cuda\w*)", libraries)) == {"tvm_ffi"}


@pytest.mark.gpu_table
def test_wrong_tensors_are_refused(place: Path) -> None:
    layer: Any = opcompile.load(place)
    assert isinstance(layer, CudaArtifact)
    x, w, b = integers(SMALL)
    with pytest.raises(CallError, match="not on a CUDA GPU"):
        layer(x, w, b)
    with pytest.raises(CallError, match="pass a tensor"):
        layer([1], w, b)
    with pytest.raises(CallError, match="no tensor of PyTorch"):
        layer.pack(w)
    with pytest.raises(EngineError, match="--simulate"):
        opcompile.verify(layer)
    np.testing.assert_array_equal(layer.golden().x.shape, SMALL.x_shape)


@pytest.mark.gpu_table
@pytest.mark.parametrize(
    ("name", "dtype", "flags"),
    [
        ("L03-nnunet-up3", "float32", ""),
        ("L24-psmnet-conv5", "float32", ""),
        ("L01-nnunet-up1", "float32", ""),
        ("L34-mednext-up0", "float32", ""),
        ("L03-nnunet-up3", "bfloat16", ""),
        ("L24-psmnet-conv5", "float16", ""),
        ("L03-nnunet-up3", "float32", "+tf32"),
        ("L24-psmnet-conv5", "float32", "+tf32"),
    ],
)
def test_ptxas_finds_no_spill_and_about_the_registers_of_the_estimate(
    name: str, dtype: str, flags: str, tmp_path: Path
) -> None:
    if not HAS_NVCC:
        pytest.skip("no nvcc on PATH")
    kernel = lowered(replace(case(name).spec, dtype=dtype), gpu_target(CUDA.name + flags))
    assert ("precision::tf32" in kernel.source) == bool(flags)
    (tmp_path / "k.cu").write_text(kernel.source)
    command = ["nvcc", "-w", "-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas", "-v", "k.cu", "-o", "k.cubin"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert " 0 bytes spill stores" in said
    (registers,) = re.findall(r"Used (\d+) registers", said)
    assert int(registers) * kernel.launch.threads <= CUDA.gpu.register_file
    assert int(registers) <= CUDA.gpu.registers
    shared = re.findall(r"(\d+) bytes smem", said)
    assert int(shared[0] if shared else 0) == kernel.launch.shared_bytes


@pytest.mark.gpu_table
@needs_nvcc
@pytest.mark.parametrize(
    ("dtype", "name", "computed_in"),
    [("float16", "cuda:sm_80", "tensor cores"), ("float32", "cuda:sm_80+sm_90+tf32", "TF32 tensor cores")],
)
def test_an_artifact_with_matrix_instructions_is_judged_by_how_they_sum(
    dtype: str, name: str, computed_in: str, tmp_path: Path
) -> None:
    spec = ConvTranspose3d.parse(f"in=1x64x4x8x8 co=64 k=2 s=2 dtype={dtype}")
    kernel = lower_gpu(spec, gpu_target(name))
    assert kernel.plan.schedule == "matrix"
    place = artifact.write(kernel, tmp_path / "a")
    assert json.loads((place / "manifest.json").read_text())["target"]["name"] == name
    report = opcompile.verify(Simulated(place)).require()
    ours = [row.check for row in report.rows if row.answer.startswith("opcompile")]
    assert ours
    assert {check.computed_in for check in ours} == {computed_in}
