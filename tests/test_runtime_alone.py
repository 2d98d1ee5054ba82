"""An artifact runs where there is no compiler: a virtual environment with NumPy and `apache-tvm-ffi` alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import venv
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from stub_gpu import LAYER

import opcompile
from opcompile.reference import reference
from opcompile.spec import ConvTranspose3d
from opcompile.tune_gpu import emit

ROOT = Path(opcompile.__file__).parents[1]
# two threads or more are worth waking for it
PARALLEL = ConvTranspose3d.parse("in=1x8x8x8x8 co=8 k=3 s=2 p=1 op=1")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of that environment."""
    folder = tmp_path_factory.mktemp("alone")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pinned = [f"{name}=={metadata.version(name)}" for name in ("apache-tvm-ffi", "numpy")]
    # our pip fills the other environment: to set one up there would take longer than the rest
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", *pinned], check=True
    )
    return python


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a parallel kernel."""
    return opcompile.compile(PARALLEL, into=tmp_path_factory.mktemp("parallel") / "it", plan="baseline").directory


def run(python: Path | str, code: str, *arguments: object) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_parallel_kernel_without_the_compiler(python: Path, parallel: Path, tmp_path: Path) -> None:
    threads = run(
        python,
        """
        import importlib.util, os, sys
        import numpy as np
        import opcompile
        assert not any(importlib.util.find_spec(name) for name in ("tvm", "onnx", "ml_dtypes", "torch"))
        layer = opcompile.load(sys.argv[1], threads=3)
        golden = layer.golden()
        np.savez(sys.argv[2], x=golden.x, w=golden.w, b=golden.b, y=layer(golden.x, layer.pack(golden.w), golden.b))
        print(len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 3)
        """,
        parallel,
        tmp_path / "y.npz",
    )
    assert int(threads) >= 3
    stored = np.load(tmp_path / "y.npz")
    # products and sums of these inputs are exact in float32
    assert np.array_equal(stored["y"], reference(PARALLEL, stored["x"], stored["w"], stored["b"]))


def test_candidates_for_a_gpu_are_timed_without_the_compiler(
    python: Path, tmp_path: Path, gpu: pytest.MonkeyPatch
) -> None:
    place = emit([LAYER], "cuda:sm_90", 1, into=tmp_path / "job")
    main = "import sys; from opcompile.measure import main; sys.exit(main())"
    assert run(python, main, place, "-o", tmp_path / "results.json").strip() == str(tmp_path / "results.json")
    (layer,) = json.loads((tmp_path / "results.json").read_text())["layers"]
    assert [s["rank"] for s in layer["finals"]] == [0]


def test_importing_and_loading_bring_no_compiler_in(parallel: Path) -> None:
    # not torch: tvm_ffi itself imports it where it is installed
    brought = run(
        sys.executable,
        """
        import sys, opcompile
        import numpy as np
        opcompile.load(sys.argv[1])
        print(*sorted({name.split(".")[0] for name in sys.modules} & {"tvm", "onnx", "onnxruntime"}))
        """,
        parallel,
    )
    assert brought.split() == []
