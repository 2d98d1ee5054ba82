"""An artifact is written whole or not at all, and a directory that is not one any more is refused."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import opcompile
from opcompile import artifact, runtime
from opcompile.artifact import add_report, write
from opcompile.atomic import require_replaceable
from opcompile.build import compile_all
from opcompile.cases import tagged
from opcompile.describe import contents
from opcompile.digest import digest
from opcompile.errors import (
    ArtifactError,
    CallError,
    EngineError,
    OpcompileError,
    TargetError,
    VerificationError,
)
from opcompile.golden import golden_values, w_amplitude
from opcompile.gradients.artifact import header as header_of_derivative
from opcompile.gradients.gradient import Gradient
from opcompile.header import header
from opcompile.index import artifacts
from opcompile.link import link
from opcompile.lower import Lowered, lower
from opcompile.manifest import MANIFEST, REPORT, read_manifest
from opcompile.packing import Packing
from opcompile.reference import reference
from opcompile.runtime import Artifact, load
from opcompile.spec import ConvTranspose3d
from opcompile.target import target
from opcompile.tensors import ALIGNMENT
from opcompile.verify import verify

ONE = ConvTranspose3d.parse("in=1x3x2x3x4 co=4 k=2 s=2")
# the same shapes, another result
OTHER = ConvTranspose3d.parse("in=1x3x2x3x4 co=4 k=2 s=2 act=relu")


@pytest.fixture(scope="module")
def lowered() -> dict[ConvTranspose3d, Lowered]:
    return {spec: lower(spec, target("llvm"), "baseline") for spec in (ONE, OTHER)}


@pytest.fixture(scope="module")
def original(lowered: dict[ConvTranspose3d, Lowered], tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = ONE
    w = golden_values(np.arange(96), 5, 64).reshape(spec.w_shape).astype(np.float32)
    folder = tmp_path_factory.mktemp("original") / "it"
    write(lowered[spec], folder, weight=w, bias=np.arange(4, dtype=np.float32))
    add_report(folder, {"passed": True})
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def holds(layer: Artifact) -> bool:
    """Whether the kernel computes the layer that the manifest says."""
    golden = layer.golden()
    y = layer(golden.x, golden.w, golden.b)
    return bool(np.abs(y.ravel()[golden.indices] - golden.expected).max() < 1e-4)


def edit(folder: Path, change: Callable[[dict[str, Any]], object], *, honest: bool = True) -> None:
    """Change the manifest; an ``honest`` one gets the hash that belongs to it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    if honest:
        manifest["sha256"] = digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


# --- what is in it ---


def test_the_directory_holds_what_the_design_says(original: Path, lowered: dict[ConvTranspose3d, Lowered]) -> None:
    manifest = load(original).manifest
    names = {manifest["library"], "conv_transpose3d.h", "golden.npz", "model.onnx", "report.json", "weights.npz"}
    assert set(manifest["files"]) == names
    assert {path.name for path in original.iterdir()} == names | {MANIFEST}
    assert re.fullmatch(r"conv_transpose3d-[0-9a-f]{16}\.(so|dylib)", manifest["library"])
    assert manifest["spec"] == str(ONE)
    assert manifest["plan"]["name"] == "baseline"
    assert manifest["weights"] == ["B", "W"]
    assert Packing.from_json(manifest["packing"]) == lowered[ONE].packing
    assert manifest["workspace_bytes"] == lowered[ONE].workspace_bytes
    assert manifest["tensor_bytes"] == {
        "x": 4 * 72,
        "w": 4 * int(np.prod(lowered[ONE].packing.shape)),
        "b": 16,
        "y": 4 * 768,
    }
    assert set(manifest["versions"]) == {"opcompile", "python", "apache-tvm", "apache-tvm-ffi", "numpy", "onnx"}
    assert holds(load(original))


def test_the_model_beside_is_the_layer_with_its_weights(original: Path) -> None:
    import onnxruntime

    layer, x = load(original), np.arange(72, dtype=np.float32).reshape(1, 3, 2, 3, 4)
    session = onnxruntime.InferenceSession(str(original / "model.onnx"))
    (name,) = [i.name for i in session.get_inputs()]
    assert np.allclose(session.run(None, {name: x})[0], layer(x))


def test_packed_weights_begin_at_a_cache_line(original: Path) -> None:
    artifact = load(original)
    held, _ = artifact._weights
    assert held is not None
    packed = [artifact.pack(np.ones(ONE.w_shape, np.float32)) for _ in range(9)]
    assert {w.address % ALIGNMENT for w in (held, *packed)} == {0}


def test_equal_input_gives_equal_files(lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path) -> None:
    one, two = write(lowered[ONE], tmp_path / "one"), write(lowered[ONE], tmp_path / "two")
    assert (one / MANIFEST).read_bytes() == (two / MANIFEST).read_bytes()
    library = one / load(one).manifest["library"]
    assert str(tmp_path).encode() not in library.read_bytes()


@pytest.mark.parametrize("case", [c for c in tagged("corner") if "activation" not in c.tags], ids=lambda c: c.name)
def test_golden_values_are_the_oracles(case: Any) -> None:
    spec = case.spec
    stored = artifact._golden(spec, None, None)
    batch = int(stored["batch"])
    x = golden_values(np.arange(batch * int(np.prod(spec.x_shape[1:]))), 1, 64).reshape(batch, *spec.x_shape[1:])
    w = golden_values(np.arange(int(np.prod(spec.w_shape))), 2, w_amplitude(spec)).reshape(spec.w_shape)
    full = reference(spec, x, w, golden_values(np.arange(spec.channels_out), 3, 64)).ravel()
    assert np.array_equal(full[stored["indices"]], stored["expected"])
    assert stored["indices"].size == min(4096, np.unique(stored["indices"]).size)
    assert stored["indices"].size >= min(full.size, 250)


def test_golden_values_where_no_weight_reaches_the_output() -> None:
    spec = ConvTranspose3d.parse("in=1x1x2x2x2 co=1 k=1 s=2 p=1")
    assert spec.terms == 0
    assert artifact._golden(spec, None, None)["expected"].size == 1


def test_golden_values_of_a_huge_layer_are_quick_and_ordinary() -> None:
    for case in tagged("large"):
        stored = artifact._golden(case.spec, None, None)
        assert 0.1 < np.abs(stored["expected"]).max() < 20, case.name


# --- from C ---

HOST = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include "conv_transpose3d.h"

#define COUNT(...) count((const int64_t[])__VA_ARGS__, sizeof((const int64_t[])__VA_ARGS__) / 8)
static size_t count(const int64_t *shape, size_t axes) {
  size_t n = 1;
  for (size_t i = 0; i < axes; i++) n *= (size_t)shape[i];
  return n;
}

/* usage: host library packed.bin: prints the elements of y, then an error on purpose */
int main(int argc, char **argv) {
  void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
  opcompile_run_fn run;
  opcompile_error_fn error;
  *(void **)&run = dlsym(library, "opcompile_run");
  *(void **)&error = dlsym(library, "opcompile_error");
  size_t xs = COUNT(OPCOMPILE_X_SHAPE), ws = COUNT(OPCOMPILE_W_SHAPE);
  size_t bs = COUNT(OPCOMPILE_B_SHAPE), ys = COUNT(OPCOMPILE_Y_SHAPE);
  opcompile_element *x = malloc(xs * sizeof *x), *w = malloc(ws * sizeof *w);
  opcompile_element *b = malloc(bs * sizeof *b), *y = malloc(ys * sizeof *y);
  for (size_t i = 0; i < xs; i++) x[i] = opcompile_golden((uint32_t)i, 1, 64) / 64.f;
  for (size_t i = 0; i < bs; i++) b[i] = opcompile_golden((uint32_t)i, 3, 64) / 64.f;
  FILE *file = fopen(argv[2], "rb");
  if (!file || fread(w, sizeof *w, ws, file) != ws) return 1;
  if (run(2, 1, x, w, b, y)) return fprintf(stderr, "%s\n", error()), 1;
  for (size_t i = 0; i < ys; i++) printf("%.9g\n", y[i]);
  if (!run(2, 2, x, w, b, y) || !run(2, 1, x, w, NULL, y)) return 1;
  printf("%s\n", error());
  return argc - 3;
}
"""


def test_a_c_program_needs_the_header_and_the_library_alone(
    lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path
) -> None:
    layer = load(write(lowered[ONE], tmp_path / "it"))
    golden = layer.golden()
    (tmp_path / "packed.bin").write_bytes(layer.pack(golden.w).data.tobytes())
    (tmp_path / "host.c").write_text(HOST)
    command = [
        "cc",
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-O2",
        f"-I{layer.directory}",
        "host.c",
        "-o",
        "host",
        "-ldl",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    library = layer.directory / layer.manifest["library"]
    done = subprocess.run(
        [tmp_path / "host", library, tmp_path / "packed.bin"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *values, message = done.stdout.splitlines()
    y = layer(golden.x, golden.w, golden.b)
    assert np.array_equal(np.array(values, np.float32), y.ravel())
    assert message == "x, w, b and y must not be null"


CALLED = """
#include <dlfcn.h>
#include <stdio.h>
#include "header.h"
int call(int64_t batch, void *x, void *w, void *b, void *y, void *dy, void *dx);
int call(int64_t batch, void *x, void *w, void *b, void *y, void *dy, void *dx) {{
  (void)x, (void)w, (void)b, (void)y, (void)dy, (void)dx;
  {call}
  return 0;
}}
"""


@pytest.mark.parametrize("compiler", ["cc -x c -std=c11", "c++ -x c++ -std=c++11"])
@pytest.mark.parametrize("where", ["layer", "derivative", "docs"])
def test_the_call_that_is_written_down_compiles_without_a_warning(
    lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path, compiler: str, where: str
) -> None:
    layer = header(ONE, lowered[ONE].packing)
    included = header_of_derivative(Gradient(ONE, "x")) if where == "derivative" else layer
    text = (Path(__file__).parents[1] / "docs" / "artifact.md").read_text() if where == "docs" else included
    call = re.search(r"void \*library = dlopen.*?error\(\)\);", text, re.DOTALL)
    assert call is not None
    (tmp_path / "header.h").write_text(included)
    (tmp_path / "host.c").write_text(CALLED.format(call=call[0].replace("\n * ", "\n")))
    flags = ["-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-c"]
    subprocess.run([*compiler.split(), *flags, "host.c", "-o", "host.o"], cwd=tmp_path, check=True)


# Each includes the headers of three layers, and asks which one its words mean.
SEVERAL = r"""
#include "one/conv_transpose3d.h"
static const int64_t one[] = OPCOMPILE_X_SHAPE;
static const opcompile_element of_one = 0;
#include "wide/conv_transpose3d.h"
static const int64_t wide[] = OPCOMPILE_X_SHAPE;
static const opcompile_element of_wide = 0;
#include "slope/conv_transpose3d_dx.h"
static const int64_t slope[] = OPCOMPILE_DX_SHAPE, first[] = OPCOMPILE_FIRST_SHAPE;
#if defined OPCOMPILE_X_SHAPE || defined OPCOMPILE_B_SHAPE || defined OPCOMPILE_Y_SHAPE || OPCOMPILE_HAS_THIRD
#error "a derivative has words of the layer before"
#endif
int main(void) {
  opcompile_run_fn run = 0;
  return !(one[1] == 3 && wide[1] == 5 && slope[1] == 3 && first[1] == 4 && !run && opcompile_golden(0, 1, 64) < 65 &&
           sizeof of_one == 4 && sizeof of_wide == 8);
}
"""


@pytest.mark.parametrize("compiler", ["cc -std=c99", "c++ -x c++ -std=c++11"])
def test_headers_of_several_layers_in_one_file(
    lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path, compiler: str
) -> None:
    wide = ConvTranspose3d.parse("in=1x5x2x3x4 co=4 k=2 s=2 dtype=float64")
    packing = lowered[ONE].packing
    texts = {
        "one/conv_transpose3d.h": header(ONE, packing),
        "wide/conv_transpose3d.h": header(wide, packing),
        "slope/conv_transpose3d_dx.h": header_of_derivative(Gradient(ONE, "x")),
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    (tmp_path / "host.c").write_text(SEVERAL)
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run([*compiler.split(), *flags, "host.c", "-o", "host"], cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "host"], check=True)


def test_the_headers_declare_the_entries_as_they_are_defined(
    lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path
) -> None:
    here = Path(opcompile.__file__).parent
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-D_GNU_SOURCE=", "-include", "header.h"]
    for text in (header(ONE, lowered[ONE].packing), header_of_derivative(Gradient(ONE, "x"))):
        (tmp_path / "header.h").write_text(text)
        subprocess.run(["cc", *flags, here / "runtime.c"], cwd=tmp_path, check=True)


def test_each_library_calls_its_own_kernel_whatever_was_loaded_before(tmp_path: Path) -> None:
    """All have a kernel of the same name, which a library that is loaded for everybody would give to the next one."""
    libraries = []
    for name, activation in (("plain", ""), ("double", " act=leaky_relu:2")):
        layer = opcompile.compile(ConvTranspose3d.parse(f"in=1x1x1x1x4 co=1 k=1{activation}"), into=tmp_path / name)
        libraries.append(layer.directory / layer.manifest["library"])
    program = (
        "import ctypes, sys\n"
        "ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)\n"
        "x, w, b, y = ((ctypes.c_float * n)(*[value] * n) for n, value in ((4, -1), (1, 1), (1, 0), (4, 0)))\n"
        "assert ctypes.CDLL(sys.argv[2]).opcompile_run(1, ctypes.c_int64(1), x, w, b, y) == 0\n"
        "assert list(y) == [-2] * 4, list(y)\n"
    )
    subprocess.run([sys.executable, "-c", program, *libraries], check=True)


# --- what is refused ---


@pytest.mark.parametrize("suffix", [".so", ".h", ".npz", ".onnx", ".json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named(copy: Path, suffix: str, damage: str) -> None:
    for path in [p for p in copy.iterdir() if p.suffix == suffix and p.name != MANIFEST]:
        content = path.read_bytes()
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(
                content[:-1] if damage == "cut" else content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
            )
        with pytest.raises(ArtifactError, match=path.name):
            load(copy)
        path.write_bytes(content)
    assert holds(load(copy))


def too_late(_number: int, _frame: object) -> None:
    raise AssertionError("it waits for somebody who writes")


@pytest.mark.parametrize("name", [MANIFEST, "golden.npz", REPORT])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(10)
    try:
        assert list(artifacts(copy)) == ["copy"]
        with pytest.raises(ArtifactError, match=f"{name} cannot be read: not a regular file"):
            load(copy)
        if name == MANIFEST:
            with pytest.raises(ArtifactError, match="cannot be read: not a regular file"):
                contents(copy)
            with pytest.raises(ArtifactError, match="is not an artifact"):
                require_replaceable(copy)
        else:
            assert not contents(copy).whole
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_without_checks_what_is_loaded_is_checked_still(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"")
    assert holds(load(copy, check=False))
    for name in ("weights.npz", load(copy, check=False).manifest["library"]):
        # beside: to truncate a library that is loaded takes its memory away from the process
        sound = (copy / name).rename(copy / "sound")
        (copy / name).write_bytes(sound.read_bytes() + b" ")
        with pytest.raises(ArtifactError, match=rf"^{copy / name} was changed after it was written"):
            load(copy, check=False)
        sound.replace(copy / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=3), "format version 3"),
        (lambda m: m.update(format="another"), "format"),
        (lambda m: m.pop("spec"), "lacks spec"),
        (lambda m: m.update(spec="in=1"), "cannot be loaded"),
        (lambda m: m.update(packing={}), "packing"),
        (lambda m: m.update(target=3), "lacks target"),
        (lambda m: m["target"].pop("features"), "lacks features"),
        (lambda m: m["plan"].pop("schedule"), "lacks schedule"),
        (lambda m: m["plan"].update(tiles=[]), "lacks tiles"),
        (lambda m: m["target"].update(features=[["avx2"]]), "as features, which must be names"),
        (lambda m: m["target"].update(features=[{}]), "as features, which must be names"),
        (lambda m: m.update(files={}), "does not list"),
        (lambda m: m["files"].update({"../secret": {}}), "secret"),
        (lambda m: m["files"].update({"new": {"sha256": "0"}}), "without its size"),
        (lambda m: m["files"].update({"new": {"sha256": "0", "bytes": 1}}), "new cannot be read"),
        (lambda m: m.update(library="model.onnx"), "cannot be loaded"),
        (lambda m: m.update(spec=m["spec"].replace("co=4", "co=5")), "packed weights|bias"),
    ],
)
def test_a_manifest_that_makes_no_sense(copy: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(copy, change)
    with pytest.raises(ArtifactError, match=message):
        load(copy)


def test_an_edited_manifest(copy: Path) -> None:
    edit(copy, lambda m: m.update(spec=str(OTHER)), honest=False)
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "opcompile-artifact"}', "[" * 100_000])
def test_a_manifest_that_is_none(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match="manifest"):
        load(copy)


def test_any_single_changed_byte_of_a_manifest_is_noticed_or_harmless(copy: Path) -> None:
    original = (copy / MANIFEST).read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(original)
        broken[random.integers(len(broken))] ^= 1 << random.integers(7)
        (copy / MANIFEST).write_bytes(broken)
        try:
            layer = load(copy)
        except ArtifactError:
            continue
        assert layer.manifest == json.loads(original)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", "riscv64", "riscv64"),
        ("system", "plan9", "plan9"),
        ("features", ["fpu", "warp_drive"], "lacks warp_drive"),
    ],
)
def test_another_machine(copy: Path, field: str, value: object, message: str) -> None:
    if field == "features" and platform.system() != "Linux":
        pytest.skip("only Linux lists the flags of a processor")
    edit(copy, lambda m: m["target"].update({field: value}))
    with pytest.raises(TargetError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", np.zeros((3, 4, 2, 2, 3), np.float32)),
        ("weight", np.zeros((3, 4, 2, 2, 2))),
        ("bias", np.zeros(3, np.float32)),
        ("bias", np.zeros((4, 1), np.float32)),
        ("weight", np.zeros((3, 4, 2, 2, 2), np.dtype(np.float32).newbyteorder())),
        ("bias", [0.0] * 4),
    ],
)
def test_weights_that_do_not_fit(
    lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path, name: str, value: np.ndarray
) -> None:
    with pytest.raises(CallError, match=f"{name} is"):
        write(lowered[ONE], tmp_path / "it", **{name: value})
    with pytest.raises(CallError, match="bias was given, but the layer has none"):
        write(replace(lowered[ONE], spec=replace(ONE, bias=False)), tmp_path / "it", bias=np.zeros(4, np.float32))
    assert siblings(tmp_path / "it") == []


# --- one in the place of another ---


def test_another_layer_in_the_same_directory_is_that_layer(
    lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path
) -> None:
    x = -np.ones(ONE.x_shape, np.float32)
    w, b = np.ones(ONE.w_shape, np.float32), np.zeros(4, np.float32)
    first = load(write(lowered[ONE], tmp_path / "it"))
    assert first(x, w, b).max() < 0
    second = load(write(lowered[OTHER], tmp_path / "it"))
    assert (second.spec, second(x, w, b).max()) == (OTHER, 0)
    assert first(x, w, b).max() < 0
    third = load(write(lowered[ONE], tmp_path / "it"))
    assert third(x, w, b).max() < 0
    assert siblings(tmp_path / "it") == ["it"]


@pytest.mark.parametrize("at_once", [True, False], ids=["exchanged", "in steps"])
def test_what_is_no_artifact_is_not_replaced(
    lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr("opcompile.atomic._exchange", lambda *_: False)
    place = tmp_path / "thesis"
    place.mkdir()
    (place / ".DS_Store").write_text("where its window was")
    write(lowered[ONE], place)  # an empty directory is welcome
    (place / ".DS_Store").write_text("where its window was")
    write(lowered[ONE], place)
    (place / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt, which no artifact wrote"):
        write(lowered[OTHER], place)
    (place / "notes.txt").unlink()
    write(lowered[OTHER], place)
    (place / MANIFEST).write_text("{}")
    with pytest.raises(ArtifactError, match=r"empty it, or name another"):
        write(lowered[ONE], place)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ArtifactError, match="file is a file, and an artifact is a directory; remove that file, or"):
        write(lowered[ONE], file)
    with pytest.raises(ArtifactError, match="below lies in a file, and an artifact is a directory; remove that file"):
        write(lowered[ONE], file / "below")
    assert siblings(place) == ["file", "thesis"]


def test_a_damaged_artifact_is_replaced(lowered: dict[ConvTranspose3d, Lowered], copy: Path) -> None:
    (copy / "model.onnx").unlink()
    edit(copy, lambda m: m.update(spec="?"), honest=False)
    assert holds(load(write(lowered[OTHER], copy)))


def test_a_failed_write_leaves_everything_as_it_was(
    lowered: dict[ConvTranspose3d, Lowered], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copy / MANIFEST).read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(artifact, "_write_manifest", fail)
    with pytest.raises(OSError, match="no space"):
        write(lowered[OTHER], copy)
    assert (copy / MANIFEST).read_bytes() == before
    assert siblings(copy) == ["copy"]


def test_a_link_to_a_directory_stays_one(lowered: dict[ConvTranspose3d, Lowered], copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    write(lowered[OTHER], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "link").spec == load(copy).spec == OTHER


WRITER = """
import dataclasses, pickle, select, sys
from opcompile import artifact
lowered, library = pickle.load(open(sys.argv[1], "rb"))
lowered.plan = dataclasses.make_dataclass("Plan", ["name", "schedule", "tiles"])("baseline", "register_tiles", {})
artifact.link = lambda *_: library   # the part that takes long, and no part of what is tested
if sys.argv[3] == "in steps":
    artifact._exchange = lambda *_: False
print("ready", flush=True)
sys.stdin.readline()
while not select.select([sys.stdin], [], [], 0)[0]:  # until it is closed
    artifact.write(lowered, sys.argv[2])
"""


@pytest.mark.parametrize("how", ["exchanged", "in steps"])
def test_two_processes_write_and_a_third_reads(
    lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path, how: str
) -> None:
    place = tmp_path / "it"
    writers = []
    for index, each in enumerate(lowered.values()):
        library = link(each.object_code, header(each.spec, each.packing), each.target)
        # the writers have a plan of their own, which spares them the import of TVM
        light = SimpleNamespace(**{f.name: getattr(each, f.name) for f in fields(each)} | {"plan": None})
        (tmp_path / f"{index}.pickle").write_bytes(pickle.dumps((light, library)))
        arguments = [sys.executable, "-c", WRITER, tmp_path / f"{index}.pickle", place, how]
        root = str(Path(opcompile.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": root}
        writers.append(
            subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        )
    write(lowered[ONE], place)
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        print("go", file=writer.stdin, flush=True)
    seen: list[tuple[ConvTranspose3d, bool]] = []
    # how soon each writer gets a turn is not ours to say: read until both have had one
    while len(seen) < 10_000 and (len(seen) < 100 or {spec for spec, _ in seen} != {ONE, OTHER}):
        layer = load(place)
        try:
            seen.append((layer.spec, holds(layer)))
        except ArtifactError:  # replaced between the two: its test vector is gone, and no other was taken for it
            seen.append((layer.spec, True))
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert {spec for spec, _ in seen} == {ONE, OTHER}
    assert all(right for _, right in seen)
    assert holds(load(place))
    assert [name for name in siblings(place) if "pickle" not in name] == ["it"]


def test_an_equal_artifact_that_came_meanwhile_is_read_anew(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer may put the very same into the place: the manifest does not tell, and the directory does."""
    check, calls = runtime.check_files, []

    def gone_at_first(directory: Path, manifest: dict[str, Any], names: set[str]) -> None:
        calls.append(directory)
        if len(calls) == 1:
            shutil.copytree(copy, copy.with_name("equal"))
            shutil.rmtree(copy)
            (copy.with_name("equal")).rename(copy)
            raise ArtifactError("a file is gone")
        check(directory, manifest, names)

    monkeypatch.setattr(runtime, "check_files", gone_at_first)
    assert holds(load(copy))
    assert len(calls) == 2


# --- reports ---


def test_a_report_belongs_to_the_artifact(lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path) -> None:
    place = write(lowered[ONE], tmp_path / "it")
    assert REPORT not in load(place).manifest["files"]
    for report in ({"passed": True}, {"passed": False, "rows": [1.5, "x", None]}):
        add_report(place, report)
        assert json.loads((place / REPORT).read_text()) == report
        assert REPORT in load(place).manifest["files"]
    (place / REPORT).write_text('{"passed": true}')
    with pytest.raises(ArtifactError, match=r"report\.json was changed"):
        load(place)
    with pytest.raises(ArtifactError, match="does not exist"):
        add_report(tmp_path / "nowhere", {})
    assert siblings(place) == ["it"]


@pytest.mark.parametrize("at_once", [True, False], ids=["exchanged", "in steps"])
def test_a_report_never_brings_an_old_artifact_back(
    lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr("opcompile.atomic._exchange", lambda *_: False)
    place = write(lowered[ONE], tmp_path / "it")
    complete = artifact._write_manifest

    def interrupted(directory: Path, manifest: dict[str, Any]) -> None:
        complete(directory, manifest)
        monkeypatch.setattr(artifact, "_write_manifest", complete)
        write(lowered[OTHER], place)

    monkeypatch.setattr(artifact, "_write_manifest", interrupted)
    with pytest.raises(ArtifactError, match="was replaced while"):
        add_report(place, {})
    assert load(place).spec == OTHER
    assert siblings(place) == ["it"]


def test_another_artifact_in_its_place_is_named_as_such(
    lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path
) -> None:
    loaded = load(write(lowered[ONE], tmp_path / "it"))
    report = verify(loaded)
    write(lowered[OTHER], tmp_path / "it")
    with pytest.raises(ArtifactError, match="was replaced by another artifact meanwhile; give each layer its own"):
        loaded.golden()
    with pytest.raises(ArtifactError, match="was replaced while a report on it was written; verify it again"):
        artifact.store(tmp_path / "it", report)


def test_nothing_is_written_inside_of_an_artifact(lowered: dict[ConvTranspose3d, Lowered], copy: Path) -> None:
    for place in (copy / "inner", copy / "far" / "inner"):
        with pytest.raises(ArtifactError, match=r"is inside of the artifact .*copy; name a place beside it"):
            write(lowered[ONE], place)
    with pytest.raises(ArtifactError, match="is inside of the artifact"):
        compile_all(Path(__file__).parent / "models" / "unet.onnx", copy / "inner")
    write(lowered[ONE], copy)


def test_the_model_of_an_artifact_is_not_compiled_into_its_place(copy: Path, tmp_path: Path) -> None:
    model = copy.rename(copy.with_name("ConvTranspose_0")) / "model.onnx"
    with pytest.raises(CallError, match=r"cannot write .*ConvTranspose_0: .*model\.onnx is read, and would be lost"):
        compile_all(model, tmp_path)


def test_reports_from_many_threads(copy: Path) -> None:
    barrier = threading.Barrier(4)

    def report(number: int) -> bool:
        barrier.wait()
        try:
            add_report(copy, {"number": number})
        except ArtifactError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert any(pool.map(report, range(4)))
    assert holds(load(copy))
    assert siblings(copy) == ["copy"]


def test_a_model_s_directory_is_no_artifact_and_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"holds the artifacts of a model; name one of them, like .*/<node>"):
        load(tmp_path)


@pytest.mark.parametrize("name", [".", "{}"])
def test_the_directory_that_one_works_in_is_not_taken_away(
    lowered: dict[ConvTranspose3d, Lowered], copy: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    here = os.stat(".").st_ino
    for replaced in (lambda place: write(lowered[ONE], place), lambda place: add_report(place, {})):
        with pytest.raises(ArtifactError, match=r"is the current directory.*\(cd \.\.\), and name it from there"):
            replaced(name.format(copy))
    assert os.stat(copy).st_ino == here
    assert holds(load(copy))
    assert siblings(copy) == ["copy"]


# --- linking ---


def test_a_linker_that_fails_is_quoted(lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path) -> None:
    broken = replace(lowered[ONE], object_code=b"not an object")
    with pytest.raises(EngineError, match=r"(?s)linking for llvm.* ended with status.*kernel0\.o"):
        write(broken, tmp_path / "it")


def test_the_compiler_of_the_environment_is_used(
    lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc --special")
    with pytest.raises(EngineError, match=r"/nowhere/cc.*set CC"):
        write(lowered[ONE], tmp_path / "it")
    monkeypatch.setenv("CC", "'cc")
    with pytest.raises(EngineError, match=r"CC is \"'cc\", which is no command: No closing quotation"):
        write(lowered[ONE], tmp_path / "it")
    monkeypatch.setenv("CC", "true")
    with pytest.raises(EngineError, match=r"the linker 'true' wrote nothing, and reported no error; set CC"):
        write(lowered[ONE], tmp_path / "it")
    monkeypatch.setenv("CC", "cc -g0")
    assert holds(load(write(lowered[ONE], tmp_path / "it")))


def without_ziglang(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ziglang" else real(name))


def test_no_linker_at_all(
    lowered: dict[ConvTranspose3d, Lowered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ziglang(monkeypatch)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"no C compiler .* on PATH and CC is not set; install the package ziglang"):
        write(lowered[ONE], tmp_path / "it")


def test_another_machine_needs_ziglang(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ziglang(monkeypatch)
    away = target("llvm:cortex-a72" if platform.machine() == "x86_64" else "llvm:x86-64-v3")
    with pytest.raises(EngineError, match=rf"cannot link for {away.name} .*ziglang"):
        link(b"", header(ONE, Packing.identity(ONE.w_shape)), away)


def require_no_paths(folder: Path) -> None:
    """The library, whose name is its hash, has neither paths of this machine nor what a debugger wants."""
    library = next(folder.glob("conv_transpose3d-*.*")).read_bytes()
    for path in (tempfile.gettempdir(), sys.prefix, ".debug_", "ziglang"):
        assert path.encode() not in library


def test_a_library_has_no_path_of_this_machine(tmp_path: Path) -> None:
    require_no_paths(write(lower(ONE, target("llvm"), "baseline"), tmp_path / "it"))


@pytest.mark.peers
@pytest.mark.parametrize("name", ["llvm:cortex-a72", "llvm:apple-m1", "llvm:x86-64-v3"])
def test_ziglang_links_for_every_machine(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec("ziglang"), "make test-peers installs it"
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    machine = target(name)
    folder = write(lower(ONE, machine, "baseline"), tmp_path / "it")
    magic = next(folder.glob("conv_transpose3d-*.*")).read_bytes()[:4]
    assert magic == (b"\xcf\xfa\xed\xfe" if machine.system == "darwin" else b"\x7fELF")
    if machine.native:
        assert holds(load(folder))
    else:
        with pytest.raises(TargetError, match="or compile it for this one"):
            load(folder)
    again = write(lower(ONE, machine, "baseline"), tmp_path / "again")
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in folder.iterdir())
    require_no_paths(folder)


def test_every_error_is_one_of_ours() -> None:
    assert all(issubclass(e, OpcompileError) for e in (ArtifactError, CallError, EngineError, TargetError))


def test_a_wrong_artifact_is_said_to_be_wrong_where_its_report_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifact, "add_report", full)
    with pytest.raises(ArtifactError, match="takes no report: No space left on device"):
        opcompile.compile(ONE, plan="baseline", into=tmp_path / "right", verify=True)
    call = Artifact.__call__
    monkeypatch.setattr(Artifact, "__call__", lambda *given, **named: call(*given, **named) + 1)
    with pytest.raises(VerificationError, match="comparisons failed"):
        opcompile.compile(ONE, plan="baseline", into=tmp_path / "wrong", verify=True)


@pytest.mark.parametrize(("room", "words"), [(8192, "a temporary file .* make room in {}"), (0, ".*; make room")])
def test_no_room_for_temporary_files_is_an_error_and_not_the_end_of_the_process(
    room: int, words: str, tmp_path: Path
) -> None:
    """In a process of its own: what ends it would end this one."""
    script = (
        "import opcompile, resource\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        f"try: opcompile.compile(opcompile.ConvTranspose3d.parse({str(ONE)!r}))\n"
        "except opcompile.OpcompileError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"EngineError {words.format(tmp_path)}, or set TMPDIR .*\n", done.stdout)
    assert not list(tmp_path.iterdir())


def put(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, with the hashes that belong to it."""
    (folder / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit(folder, lambda manifest: manifest["files"].update({name: entry}))


def test_a_model_of_another_layer_is_refused_where_it_is_asked(copy: Path, tmp_path: Path) -> None:
    opcompile.export_onnx(ConvTranspose3d.parse("in=1x3x2x3x5 co=4 k=2 s=2"), tmp_path / "other.onnx")
    put(copy, "model.onnx", (tmp_path / "other.onnx").read_bytes())
    with pytest.raises(ArtifactError, match=r"model.onnx is of another layer: its X is \(1, 3, 2, 3, 5\), .* again"):
        verify(load(copy))


@pytest.mark.parametrize(
    "change",
    [
        {"indices": [10**6]},
        {"indices": []},
        {"indices": [-1]},
        {"indices": np.array([0.5])},
        {"indices": [[0]], "expected": [[1.0]]},
        {"batch": None},
        {"batch": np.array(1.9)},
        {"expected": [1.0, 2.0]},
        {"indices": [0], "expected": np.array([1 + 5j])},
        {"indices": [0], "expected": np.array(["1"])},
    ],
    ids=str,
)
def test_a_test_vector_of_another_layer_is_refused(change: dict[str, Any], copy: Path) -> None:
    with np.load(copy / "golden.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    for name, values in change.items():
        if values is None:
            del arrays[name]
        else:
            arrays[name] = values if isinstance(values, np.ndarray) else np.array(values, arrays[name].dtype)
            if name == "indices":
                arrays["expected"] = arrays["expected"][: len(values)]
    file = io.BytesIO()
    np.savez(file, **arrays)
    put(copy, "golden.npz", file.getvalue())
    with pytest.raises(ArtifactError, match=r"golden.npz is no test vector of this layer: .*; compile the layer again"):
        load(copy).golden()


def test_a_place_that_a_writer_fills_after_it_was_looked_at_is_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = copy.rename(copy.with_name("away"))

    def through_since(_: Path, pattern: str) -> Any:
        if away.exists():
            away.rename(copy)
        return iter(())

    monkeypatch.setattr(Path, "glob", through_since)
    assert read_manifest(copy) == (copy / MANIFEST).read_bytes()


def test_the_folder_of_what_was_compiled_is_removed_without_a_warning(tmp_path: Path) -> None:
    source = "import opcompile as oc\nmade = oc.compile(oc.ConvTranspose3d.parse('in=1x4x3x3x3 co=4 k=2 s=2'))\n"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", source]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not done.stderr
    assert not list(tmp_path.iterdir())
