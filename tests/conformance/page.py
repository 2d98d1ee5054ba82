"""``docs/conformance.md``: every suite run in its environment, and what came of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "conformance.md"


@dataclass(frozen=True)
class Environment:
    """One run of one module: ``home`` is the virtual environment it needs, "" for the one at hand."""

    module: str
    system: str
    home: str = ""
    needs: str = "pip install 'opcompile[words]'"
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[str, ...]:
        """The names that its rows have on the page."""
        return (self.system, "Rmlx") if self.module == "with_mlx" else (self.system,)

    @property
    def python(self) -> Path | None:
        """The interpreter; None where the environment is not there. Beside the one at hand: ``.venv-lucid``."""
        if not self.home:
            return Path(sys.executable)
        default = Path(sys.prefix).with_name(f"{Path(sys.prefix).name}-{self.home}")
        place = Path(os.environ.get(f"CONFORMANCE_{self.home.upper()}", default)) / "bin" / "python"
        return place if place.exists() else None


HERE = [
    Environment("with_torch", "PyTorch"),
    Environment("with_mlx", "MLX"),
    Environment("with_keras", "Keras (jax)", settings={"KERAS_BACKEND": "jax"}),
    Environment("with_keras", "Keras (torch)", settings={"KERAS_BACKEND": "torch"}),
    Environment("with_jax", "JAX"),
    Environment("with_openvino", "OpenVINO"),
    Environment("with_tvm", "TVM topi.testing"),
]
APART = [
    Environment(
        "with_tensorflow",
        "TensorFlow",
        "tensorflow",
        "an environment of its own (make test-tensorflow)",
        {"TF_ENABLE_ONEDNN_OPTS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"},
    ),
    Environment("with_lucid", "Lucid", "lucid", "Python 3.12, in an environment of its own (make test-lucid)"),
]


def results(environment: Environment) -> list[dict[str, Any]]:
    """Run one environment's suites in a process of its own."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, **environment.settings, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    command = [str(environment.python), "-m", "conformance", environment.module, "--json"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{environment.system}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write(*only: str) -> int:
    """Run all, write the page, and return 1 where a case failed.

    With ``only``, modules like with_torch, the rows of the others stay as they are on the page.
    """
    before = PAGE.read_text().splitlines() if PAGE.exists() else []
    lines: list[str] = []
    failed = 0
    for environment in (*HERE, *APART):
        if only and environment.module not in only:
            lines += [line for line in before if line.partition(" | ")[0].removeprefix("| ") in environment.rows]
        elif environment.python is None:
            lines.append(_not_run(environment))
        else:
            print(environment.system, file=sys.stderr)
            for row in results(environment):
                lines.append(_row(row))
                failed += len(row["failed"])
                for line in row["failed"]:
                    print(f"FAILED {row['suite']}: {line}", file=sys.stderr)
    PAGE.write_text("\n".join([*_head(), *lines, *_never_run(), *_tail()]) + "\n")
    return int(failed > 0)


def _head() -> Iterator[str]:
    day = datetime.now(timezone.utc).date()
    yield "<!-- written by `make conformance`; change tests/conformance, not this page -->"
    yield "# Conformance"
    yield ""
    yield "Each row is one grid of layers: the same words went to our importer and to the real system, installed here."
    yield f"Run on {day}, Python {platform.python_version()} ({platform.machine()})."
    yield ""
    yield "- **passed**: both compute. Shapes agree, small integers to the last bit, real numbers within the derived"
    yield "  bound ([numerics](numerics.md)). The system is held against the oracle, which every artifact is held"
    yield "  against as well; **compiled** says how many of these a compiled kernel answered too (compiling takes"
    yield "  seconds, so that a grid compiles a handful)."
    yield "- **refused**: the system itself refuses, and our importer does so in its words."
    yield "- **failed**: anything else."
    yield ""
    yield "Values are drawn here: small integers first, then normal numbers."
    yield ""
    yield "| System | Version | What | Cases | Passed | Compiled | Refused | Failed | Not run, and why |"
    yield "|---|---|---|---|---|---|---|---|---|"


def _row(row: Mapping[str, Any]) -> str:
    why = "; ".join(f"{count}: {reason}" for reason, count in row["not_run"].items()) or "-"
    numbers = [row["cases"], row["passed"], row["compiled"] or "-", row["refused"], len(row["failed"])]
    return f"| {row['system']} | {row['version']} | {row['what']} | {' | '.join(map(str, numbers))} | {why} |"


def _not_run(environment: Environment) -> str:
    return f"| {environment.system} | - | - | 0 | 0 | - | 0 | 0 | all: it needs {environment.needs} |"


def _never_run() -> Iterator[str]:
    yield "| Rmlx, R keras3 | - | in R | 0 | 0 | - | 0 | 0 | all: they need R; their documented calls are unit tests |"
    yield "| Lucid 3 | - | - | 0 | 0 | - | 0 | 0 | all: it needs Python 3.14 and macOS 26; its rules were read |"


def _tail() -> Iterator[str]:
    yield from _TAIL.splitlines()


_TAIL = """
## Other people's tests

- **PyTorch**: shapes and arguments of the samples in its operator database for `nn.functional.conv_transpose3d`
  (10, in two dtypes) and of the module database's inputs (4), taken from the installed package.
- **Keras**: the parameters of its three shape tests and three value tests for `Conv3DTranspose`, and its own NumPy
  function `np_conv3d_transpose`, imported from the installed package and asked about the grid as well. (That
  function sizes dilated kernels as if they were not, so it is not asked about them.)
- **MLX**: the layers of `test_torch_conv_transpose_3D` (12) and `test_torch_conv_3D_grad` (30, here forward; the
  gradients of 24 are in `tests/test_gradient_peers.py`), with ten more in the manner of its output_padding tests.
- **TVM**: `topi.testing.conv3d_transpose_ncdhw_python`. It convolves by FFT, so only integers are compared, rounded.
- **ONNX**: its node tests and ONNX Runtime's attribute grid are run by `make test`.

## What was found on the way

- MLX 0.32, with a padding beyond `dilation*(kernel-1)` and a stride, crops stride times as much as PyTorch: it
  slices the input where the padding of the stuffed input would be negative. The importer follows MLX.
- MLX 0.32 takes negative paddings and an output_padding of any size; both mean zeros.
- PyTorch 2.13 refuses an output size of zero on some paths and gives an empty tensor on others.
- TensorFlow 2.21 ends the process when `output_shape` holds the spatial sizes alone, unless oneDNN is off.
- Lucid 2.8.5 refuses a padding beyond `dilation*(kernel-1)`, in NumPy's words; its functional page says that
  stride 2 gives (1, 1, 3, 3, 3) where its formula and its code give (1, 1, 2, 2, 2).
"""
