"""Code for arm64, run in an emulated one: every case for Linux, families for macOS; what is wrong with it is found."""

from __future__ import annotations

import importlib.util
import json
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gpu_kernels import cut
from kernels import dtype_of, integers, reals

import opcompile as oc
from opcompile import build
from opcompile.artifact import header
from opcompile.bounds import compare
from opcompile.cases import CASES, Case
from opcompile.cli import cli
from opcompile.emulate import Emulator
from opcompile.errors import EngineError, TargetError, VerificationError
from opcompile.link import link, link_library
from opcompile.lower import lower
from opcompile.simulate import simulated
from opcompile.spec import ACTIVATIONS, ConvTranspose3d
from opcompile.target import target

pytestmark = pytest.mark.peers

LINUX, MACOS = target("llvm:cortex-a76"), target("llvm:apple-m1")
FIRST = target("llvm:aarch64")
SMALL = "in=1x4x3x3x3 co=4 k=3 s=2"
_EMULATED_FLOPS = 2**22


def check(spec: ConvTranspose3d, machine: Any, folder: Path) -> None:
    """The linked library is exact on integers, and within the bound on reals."""
    lowered, path = lower(spec, machine, "baseline"), folder / "library"
    path.write_bytes(link(lowered.object_code, header(spec, lowered.packing), machine))
    emulator = Emulator(path)
    for draw in (integers, reals):
        x, w, b = draw(spec)
        y = np.zeros((x.shape[0], *spec.y_shape[1:]), x.dtype)
        given = {"x": x, "w": lowered.packing(w), **({"b": b} if spec.bias else {})}
        emulator.run(given, y, x.shape[0])
        compare(spec, y, x, w, b, exact=draw is integers).require()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case_is_exact_on_integers_and_within_the_bound_on_reals(case: Case, tmp_path: Path) -> None:
    check(cut(case.spec, _EMULATED_FLOPS), LINUX, tmp_path)


@pytest.mark.parametrize("case", [c for c in CASES if "corner" in c.tags], ids=lambda c: c.name)
def test_corners_are_so_on_macos_too(case: Case, tmp_path: Path) -> None:
    check(cut(case.spec, _EMULATED_FLOPS), MACOS, tmp_path)


@pytest.mark.parametrize("machine", [LINUX, MACOS], ids=lambda m: m.name)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_functions_of_float64_are_those_of_a_library(activation: str, machine: Any, tmp_path: Path) -> None:
    check(ConvTranspose3d.parse(f"{SMALL} act={activation} dtype=float64"), machine, tmp_path)


@pytest.mark.parametrize("derivative", ["x", "w", "b"])
@pytest.mark.parametrize("machine", [LINUX, MACOS], ids=lambda m: m.name)
def test_derivatives_are_verified(machine: Any, derivative: Any, tmp_path: Path) -> None:
    spec = ConvTranspose3d.parse(f"{SMALL} act=tanh")
    place = build.write(spec, machine.name, "baseline", tmp_path / "d", derivative=derivative)
    assert oc.verify(simulated(place)).require().not_asked[0].what == "an arm64 processor"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_an_artifact_with_its_weights_and_an_open_batch_is_verified(dtype: str, tmp_path: Path) -> None:
    spec, rng = ConvTranspose3d.parse(f"in=Nx4x3x3x3 co=4 k=3 s=2 dtype={dtype}"), np.random.default_rng(0)
    w, b = (rng.standard_normal(shape).astype(dtype_of(spec)) for shape in (spec.w_shape, (4,)))
    place = build.write(spec, LINUX.name, "baseline", tmp_path / "a", weight=w, bias=b)
    report = oc.verify(simulated(place)).require()
    assert {row.batch for row in report.rows} >= {1, 2, 3}
    assert {row.weights for row in report.rows} == {"caller", "compiled"}


def test_compile_verifies_what_it_made_for_another_machine(tmp_path: Path) -> None:
    place = str(tmp_path / "a")
    result = CliRunner().invoke(cli, ["compile", SMALL, "-o", place, "--target", LINUX.name, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["layers"][0]["status"] == "verified"
    assert CliRunner().invoke(cli, ["verify", place, "--simulate"]).exit_code == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["not_asked"][0]["what"] == "an arm64 processor"


def test_without_the_packages_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "unicorn" else real(name))
    place = str(tmp_path / "a")
    result = CliRunner().invoke(cli, ["compile", SMALL, "-o", place, "--target", LINUX.name])
    assert result.exit_code == 0, result.output
    assert "does not run on this machine" in result.output
    assert "pip install 'opcompile[emulate]'" in result.output
    with pytest.raises(EngineError, match=r"emulating aarch64 needs the package unicorn; pip install"):
        simulated(place)


def test_other_processors_are_not_emulated(tmp_path: Path) -> None:
    place = build.write(ConvTranspose3d.parse(SMALL), "llvm:x86-64-v2", "baseline", tmp_path / "a")
    with pytest.raises(TargetError, match=r"a was compiled for llvm:x86-64-v2, and x86_64 is not emulated; load it on"):
        simulated(place)


FAULTS = {
    "reads beyond an input": ("y[0] = x[n];", r"reads 4 bytes, 0 bytes beyond the end of x"),
    "reads far beyond one": ("y[0] = w[n + 3];", r"reads 4 bytes, 12 bytes beyond the end of w"),
    "writes beyond the result": ("y[n] = x[0];", r"writes 4 bytes, 0 bytes beyond the end of the result"),
    "reads across its end": (
        "*(struct four *)y = *(struct four *)(x + n - 2);",
        r"reads 8 bytes, 0 bytes beyond the end of x",
    ),
    "writes before the result": ("y[-1] = 0;", "the library writes before the beginning of the result"),
    "writes to an input": ("((float *)x)[1] = 0;", r"writes to x"),
    "reads what is nowhere": ("y[0] = *(volatile float *)8;", r"reads 4 bytes at 0x8, where nothing lies"),
    "reads what it freed": (
        "void *p; posix_memalign(&p, 64, 64); free(p); y[0] = *(volatile float *)p;",
        r"reads 4 bytes at 0x\w+, where nothing lies",
    ),
    "copies to an input": ("memcpy((void *)x, w, n);", r"calls memcpy: Write to write-protected memory"),
    "fills an input": ("memset((void *)(x + 1), 0, 2 * n);", r"calls (memset|bzero): Write to write-protected memory"),
    "copies beyond the result": ("memcpy((void *)y, x, 4 * n); memcpy((void *)(y + 1), x, 4 * n);", "calls memcpy: In"),
    "copies from beyond an input": ("memcpy((void *)y, x + 1, 4 * n);", "calls memcpy: Invalid memory read"),
    "frees twice": ("void *p; posix_memalign(&p, 64, 64); free(p); free(p);", "frees what is not allocated"),
    "frees an input": ("free((void *)(uintptr_t)((uintptr_t)x & -4096));", "frees what is not allocated"),
    "has no such instruction": ('__asm__(".inst 0");', "the library, at 0x"),
    "fails": ("return -1;", "the kernel failed: in so many words"),
}


def faulty(tmp_path: Path, statement: str, machine: Any, features: Sequence[str] = ()) -> Emulator:
    source = tmp_path / "fault.c"
    source.write_text(
        "#define _GNU_SOURCE\n#include <stdint.h>\n#include <stdio.h>\n#include <stdlib.h>\n"
        "#include <string.h>\n#include <unistd.h>\n"
        "struct four { float at[4]; };\n"
        "static volatile int loaded;\n__attribute__((constructor)) static void load(void) { loaded = 1; }\n"
        '__attribute__((visibility("default"))) const char *opcompile_error(void) { return "in so many words"; }\n'
        '__attribute__((visibility("default"))) int opcompile_run(int threads, int64_t n, const float *x, '
        f"const float *w, const float *b, volatile float *y) {{ if (!loaded) return 1; {statement} return 0; }}\n"
    )
    path = tmp_path / "library"
    path.write_bytes(link_library([source], {}, [], ("opcompile_run", "opcompile_error"), machine))
    return Emulator(path, features)


@pytest.mark.parametrize("machine", [LINUX, MACOS], ids=lambda m: m.name)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_library_that_goes_wrong_is_found(fault: str, machine: Any, tmp_path: Path) -> None:
    statement, message = FAULTS[fault]
    x = np.zeros(5, "float32")
    with pytest.raises(VerificationError, match=message):
        faulty(tmp_path, statement, machine).run({"x": x, "w": x}, np.zeros(5, "float32"), 5)


@pytest.mark.parametrize("machine", [LINUX, MACOS], ids=lambda m: m.name)
def test_what_is_not_written_shows(machine: Any, tmp_path: Path) -> None:
    x, y = np.ones(5, "float32"), np.zeros(5, "float32")
    faulty(tmp_path, "y[1] = x[4];", machine).run({"x": x, "w": x}, y, 5)
    assert y[1] == 1
    assert np.isnan(y[[0, 2, 3, 4]]).all()


@pytest.mark.parametrize("status", [0, -1])
def test_an_input_is_gone_after_its_call(status: int, tmp_path: Path) -> None:
    """A second call may read nothing of the first, and many calls take no more memory than one."""
    statement = f"static const volatile float *old; if (old) y[0] = *old; old = x; return {status};"
    emulator, x, y = faulty(tmp_path, statement, LINUX), np.ones(5, "float32"), np.zeros(5, "float32")
    with suppress(VerificationError):
        emulator.run({"x": x, "w": x}, y, 5)
    with pytest.raises(VerificationError, match="where nothing lies"):
        emulator.run({"x": x, "w": x}, y, 5)


def test_an_instruction_that_the_first_have_not_is_found_in_what_is_for_all(tmp_path: Path) -> None:
    """It adds numbers of half precision."""
    statement, x, y = '__asm__ volatile(".inst 0x0e401400"); y[0] = 2;', np.ones(5, "float32"), np.zeros(5, "float32")
    faulty(tmp_path, statement, LINUX, LINUX.features).run({"x": x, "w": x}, y, 5)
    assert y[0] == 2
    with pytest.raises(VerificationError, match="the library, at 0x"):
        faulty(tmp_path, statement, LINUX, FIRST.features).run({"x": x, "w": x}, y, 5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_what_is_for_all_runs_on_the_first(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("unicorn.arm64_const.UC_CPU_ARM64_MAX")
    place = build.write(ConvTranspose3d.parse(f"{SMALL} dtype={dtype}"), FIRST.name, "baseline", tmp_path / "a")
    oc.verify(simulated(place)).require()


@pytest.mark.parametrize("machine", [LINUX, MACOS], ids=lambda m: m.name)
def test_the_c_library_does_what_one_does(machine: Any, tmp_path: Path) -> None:
    """A text is cut where there is no room for it; what is allocated begins where it was asked to."""
    statement = (
        'char text[6]; const char *volatile form = "%s"; y[0] = snprintf(text, sizeof text, form, "too long"); '
        "y[1] = text[4]; y[2] = text[5]; "
        "void *p; y[3] = posix_memalign(&p, 1 << 21, 64); y[4] = (uintptr_t)p % (1 << 21);"
    )
    x, y = np.ones(5, "float32"), np.zeros(5, "float32")
    faulty(tmp_path, statement, machine).run({"x": x, "w": x}, y, 5)
    assert y.tolist() == [8, ord("l"), 0, 0, 0]


TOO_EARLY = {
    "before an input": "y[1] = x[-1];",
    "what was allocated": "void *p; posix_memalign(&p, 64, 64); y[1] = *(volatile float *)p;",
    "the stack": "volatile float nothing[9]; y[1] = nothing[n];",
}


@pytest.mark.parametrize("machine", [LINUX, MACOS], ids=lambda m: m.name)
@pytest.mark.parametrize("what", TOO_EARLY)
def test_what_is_read_before_anything_is_written_there_is_nan(what: str, machine: Any, tmp_path: Path) -> None:
    x, y = np.ones(5, "float32"), np.zeros(5, "float32")
    faulty(tmp_path, TOO_EARLY[what], machine).run({"x": x, "w": x}, y, 5)
    assert np.isnan(y[1])


@pytest.mark.parametrize("machine", [LINUX, MACOS], ids=lambda m: m.name)
def test_a_function_that_is_not_emulated_is_named(machine: Any, tmp_path: Path) -> None:
    x = np.zeros(5, "float32")
    with pytest.raises(EngineError, match="the library calls getpid, which is not emulated"):
        faulty(tmp_path, "y[0] = getpid();", machine).run({"x": x, "w": x}, np.zeros(5, "float32"), 5)


def test_an_interrupt_stops_the_processor_and_nothing_else(tmp_path: Path) -> None:
    """It comes while the processor computes, before a function of the C library: it is neither late nor lost there."""
    statement = "if (x[0]) { for (int i = 0; i < 1 << 30; i++) loaded++; free(0); } y[0] = 2;"
    emulator, x, y = faulty(tmp_path, statement, LINUX), np.ones(5, "float32"), np.zeros(5, "float32")
    before, began = signal.signal(signal.SIGINT, signal.default_int_handler), time.monotonic()
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            emulator.run({"x": x, "w": x}, y, 5)
        assert time.monotonic() - began < 5  # of half a minute
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    emulator.run({"x": 0 * x, "w": x}, y, 5)
    assert y[0] == 2
