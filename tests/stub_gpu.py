"""A GPU, its driver and its compiler as far as the tests need them where there are none; the rest is the real code."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from opcompile import cuda_driver
from opcompile.cuda_driver import DeviceTensor
from opcompile.spec import ConvTranspose3d

HERE = Path(__file__).parent / "gpu"
NVCC = HERE / "nvcc"
# the one kind of layer that kernel.c computes
LAYER = ConvTranspose3d.parse("in=1x1x8x8x8 co=1 k=1")


def build_driver(folder: Path) -> Path:
    """Return a directory with a ``libcuda.so.1``."""
    folder.mkdir(parents=True)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", HERE / "libcuda.c", "-o", folder / "libcuda.so.1"], check=True)
    return folder


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the driver that stands for NVIDIA's."""
    return build_driver(tmp_path_factory.mktemp("driver") / "lib")


@pytest.fixture
def gpu(driver: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A GPU of compute capability 9.0, in this process and in those it starts; ``STUB_CAPABILITY`` sets another."""
    monkeypatch.setenv("STUB_CAPABILITY", "9.0")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    monkeypatch.setenv("NVCC", str(NVCC))
    monkeypatch.setattr(cuda_driver, "_LIBRARY", str(driver / "libcuda.so.1"))
    forget()
    yield monkeypatch
    forget()


def forget() -> None:
    """Let the driver be asked anew."""
    cuda_driver.device.cache_clear()
    cuda_driver._library.cache_clear()


def tensor(array: NDArray[Any], *, ordinal: int = 0, offset: int = 0) -> tuple[DeviceTensor, NDArray[Any]]:
    """``array`` as a tensor that says it is on a GPU, ``offset`` bytes beyond a multiple of 64, and its memory."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    held = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    held[...] = array
    return DeviceTensor(held.ctypes.data, array.shape, array.dtype.name, ordinal, held), held
