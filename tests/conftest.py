"""Settings for every test: Hypothesis draws the same examples on every machine, without a clock."""

from __future__ import annotations

import gc
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before NumPy is imported: test processes share the processors, and BLAS threads that wait for each other
# made the oracle six times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Keras chooses its backend when it is imported, and TensorFlow, its default, is not among our peers.
os.environ.setdefault("KERAS_BACKEND", "jax")

from stub_gpu import driver, gpu  # noqa: F401 (fixtures; they import NumPy)

from opcompile import simulate

settings.register_profile(
    "opcompile",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("opcompile")


def pytest_configure() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """Thousands of tests stay for the whole run: looking through them for garbage would find none, again and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def as_scheduled() -> Iterator[None]:
    """Let LLVM take each schedule as it is: where what is tested is around the kernel, and not the kernel."""
    from opcompile import compiled
    from opcompile.replace import library

    optimising = compiled.compiled

    def quickly(module: Any, target: Mapping[str, object], *rest: Any) -> Any:
        return optimising(module, {**target, "opt-level": 0}, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "compiled", quickly)
        yield
    library._kernel.cache_clear()


@pytest.fixture(scope="session")
def compiler_of_kernels(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a compiler for simulated kernels: GCC with the simulator's headers read already, or another as it is."""
    compiler = simulate._compiler()
    version = subprocess.run([*compiler, "-v"], capture_output=True, text=True, check=True).stderr
    if "gcc version" not in version:
        return compiler
    folder = tmp_path_factory.mktemp("headers")
    for name in ("cuda.h", "metal.h"):
        header, flags = simulate._HEADERS / name, (*simulate._FLAGS, *simulate._BOUNDS)
        subprocess.run([*compiler, *flags, "-x", "c++-header", header, "-o", folder / f"{name}.gch"], check=True)
    return [*compiler, f"-I{folder}"]


@pytest.fixture(scope="module")
def headers_at_hand(compiler_of_kernels: list[str]) -> Iterator[None]:
    """Where many kernels are simulated: to read the headers takes a third of what compiling one does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", shlex.join(compiler_of_kernels))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_records_of_ones_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was tuned on this machine must not decide what the tests compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPCOMPILE_RECORDS", str(tmp_path_factory.mktemp("records")))
        yield
