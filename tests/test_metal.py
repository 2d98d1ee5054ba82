"""Metal without a Mac: clang, which knows address spaces, accepts the text; the library links for macOS."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gpu_kernels import CUDA, METAL, SIMDGROUP, lowered, simulated

from opcompile import artifact
from opcompile.cases import CASES, Case
from opcompile.errors import TargetError
from opcompile.gradients.gradient import Gradient, Wrt
from opcompile.gradients.lower_gpu import lower_gpu
from opcompile.lower_gpu import choose
from opcompile.reference import reference
from opcompile.spec import Activation, ConvTranspose3d
from schedules.gpu import candidates

HEADERS = Path(__file__).with_name("metal")
EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
# Each family of schedules, each form of the declaration, both types, a dynamic batch, activations with functions.
TYPED = [c for c in CASES if c.spec.dtype in METAL.dtypes and ("real" in c.tags or "activation" in c.tags)]
TYPED += [
    c for c in CASES if c.name in ("batch-dynamic", "dilated-gcd2-of-4", "huge-stride", "float16", "channels-last")
]


def complaints(source: str, folder: Path) -> str:
    """What clang says of MSL text, without the attributes of parameters; shared arrays are static to C++."""
    text = re.sub(r"\[\[.*?\]\]", "", source)
    text = re.sub(r"(?m)^(  (?:alignas\(16\) )?)threadgroup (?=\w+ \w+\[)", r"\1static threadgroup ", text)
    (folder / "kernel.cpp").write_text(text)
    command = [sys.executable, "-m", "ziglang", "clang", "-xc++", "-fsyntax-only", "-w", "-nostdinc", "-ferror-limit=3"]
    done = subprocess.run(
        [*command, "-std=c++17", f"-I{HEADERS}", "kernel.cpp"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr if done.returncode else ""


@pytest.mark.peers
@pytest.mark.parametrize("case", TYPED, ids=lambda c: c.name)
def test_the_types_of_the_text_are_right(case: Case, tmp_path: Path) -> None:
    assert complaints(lowered(case.spec, METAL).source, tmp_path) == ""


@pytest.mark.peers
@pytest.mark.parametrize("wrt", ["x", "w", "b"])
def test_the_types_of_a_derivative_are_right(wrt: Wrt, tmp_path: Path) -> None:
    for text in ("in=Nx8x2x4x5 co=8 k=3 s=2 p=1 act=softplus dtype=float16", "in=1x8x2x4x5 co=8 k=2 s=2 layout=NDHWC"):
        gradient = Gradient(ConvTranspose3d.parse(text), wrt)
        assert complaints(lower_gpu(gradient, METAL).source, tmp_path) == ""


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("text", ["in=Nx32x3x3x5 co=24 k=2 s=2", "in=1x48x3x4x5 co=40 k=3 s=2 p=1 op=1 layout=NDHWC"])
def test_the_types_of_simdgroup_matrices_are_right(text: str, dtype: str, tmp_path: Path) -> None:
    spec = ConvTranspose3d.parse(f"{text} dtype={dtype}")
    tiles = {e.tiles.apart: e.tiles for e in candidates(spec, SIMDGROUP.gpu) if e.tiles.family == "matrix"}
    assert tiles
    for form in tiles.values():
        source = lowered(spec, SIMDGROUP, form).source
        assert "simdgroup_multiply_accumulate(" in source
        assert complaints(source, tmp_path) == ""


@pytest.mark.peers
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (r"simdgroup_load\(L\[0\], \(&\(W_shared", "simdgroup_load(L[0], (&(phase_shared"),
        (r"simdgroup_half8x8 L\[", "simdgroup_float8x8 L["),
        (
            r"(\n  alignas\(16\) threadgroup float phase_shared\[\d+\];)",
            r"\n  {\n    threadgroup float inner[8];\n  }\1",
        ),
    ],
)
def test_a_matrix_of_another_type_and_threadgroup_memory_in_a_scope_are_noticed(
    right: str, wrong: str, tmp_path: Path
) -> None:
    spec = ConvTranspose3d.parse("in=1x32x3x3x5 co=24 k=2 s=2 dtype=float16")
    (tiles, *_) = [e.tiles for e in candidates(spec, SIMDGROUP.gpu) if e.tiles.family == "matrix"]
    source = lowered(spec, SIMDGROUP, tiles).source
    bent = re.sub(right, wrong, source, count=1)
    assert bent != source
    assert "error" in complaints(bent, tmp_path)


@pytest.mark.peers
def test_a_pointer_that_loses_its_address_space_is_noticed(tmp_path: Path) -> None:
    """Without a cast, that is: clang lets casts pass."""
    source = lowered(ConvTranspose3d.parse("in=1x32x8x8x8 co=32 k=2 s=2"), METAL).source
    bent = source.replace(") {\n", ") {\n  float* p = X_ptr;\n", 1)
    assert bent != source
    assert "error" in complaints(bent, tmp_path)


def test_arrays_that_vectors_are_read_from_lie_at_multiples_of_16_bytes() -> None:
    for text in ("in=1x32x4x4x4 co=32 k=2 s=2 dtype=float16", "in=1x64x3x3x3 co=64 k=3 s=2"):
        source = lowered(ConvTranspose3d.parse(text), METAL).source
        arrays = re.findall(r"^ +(.*?)\b(?:thread|threadgroup) \w+ \w+\[\d+\];", source, re.M)
        assert arrays
        assert set(arrays) == {"alignas(16) "}


def test_constants_are_not_cut_to_seven_digits() -> None:
    spec = ConvTranspose3d.parse("in=1x1x1x2x3 co=1 k=1 bias=0 act=leaky_relu:0.1000004499")
    kernel = lowered(spec, METAL)
    assert "as_type<float>" in kernel.source
    x, w = -np.ones(spec.x_shape, np.float32), np.ones(spec.w_shape, np.float32)  # type: ignore[arg-type]
    assert set(simulated(kernel)(x, w).ravel()) == {-np.float32(0.1000004499)}
    assert "as_type" not in lowered(replace(spec, activation=Activation("leaky_relu", (0.1,))), METAL).source


@pytest.mark.parametrize("activation", ["leaky_relu:0.001234567890123456", "elu:1.23456789e-10"])
def test_constants_of_double_precision_are_not_cut_to_fifteen_decimals(activation: str) -> None:
    spec = ConvTranspose3d.parse(f"in=1x1x1x2x3 co=1 k=1 bias=0 act={activation} dtype=float64")
    x, w = np.full(spec.x_shape, -100.0), np.ones(spec.w_shape)  # type: ignore[arg-type]
    y = simulated(lowered(spec, CUDA))(x, w)
    assert np.allclose(y, reference(spec, x, w), rtol=1e-15, atol=0)


@pytest.mark.peers
def test_the_library_is_for_macos(tmp_path: Path) -> None:
    place = artifact.write(lowered(ConvTranspose3d.parse("in=1x4x2x2x4 co=8 k=2 s=2"), METAL), tmp_path / "a")
    (library,) = place.glob("*.dylib")
    assert library.read_bytes()[:8] == b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"  # Mach-O, arm64
    assert b"__tvm_ffi_conv_transpose3d" in library.read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_types_that_metal_has_not_are_refused(dtype: str) -> None:
    with pytest.raises(TargetError, match=f"metal:apple-m1 has no {dtype}; compile the layer in float32, float16"):
        choose(ConvTranspose3d.parse(f"in=1x1x1x1x1 co=1 k=1 dtype={dtype}"), METAL, "baseline")


# --- the runners: they need a Mac, and what can be read is read ---


@pytest.mark.parametrize("name", ["metal_pyobjc.py", "metal_mlx.py", "metal_run.swift"])
def test_a_runner_reads_what_launch_json_says(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    fields = json.loads(lowered(ConvTranspose3d.parse("in=1x1x1x1x1 co=1 k=1"), METAL).launch.to_json(1))
    for field in ("kernel", "grid", "block", "arguments"):
        assert field in fields
        assert re.search(rf"launch\.{field}\b|launch\[.{field}.\]", text) or (field, name) == ("kernel", "metal_mlx.py")
    # matrices are multiplied by threads in two dimensions
    assert re.search(r"block\[1\]|\*launch\[.block.\]|\[.block.\]\[1:?\]", text)
    used = set(re.findall(r"launch\.(\w+)|launch\[.(\w+).\]", text))
    assert {one or other for one, other in used} <= {*fields, "json"}
    if name.endswith(".py"):
        ast.parse(text)
    else:
        assert text.count("{") == text.count("}")


@pytest.mark.parametrize("name", ["metal_pyobjc.py", "metal_run.swift"])
def test_a_runner_believes_no_output_of_a_launch_that_failed(name: str) -> None:
    before, after = (EXAMPLES / name).read_text().split("waitUntilCompleted()")
    assert "maxTotalThreadsPerThreadgroup" in before
    assert re.match(r"\s*if .*command\.error", after)
