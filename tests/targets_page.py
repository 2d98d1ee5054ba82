"""Write the table of GPUs in ``docs/targets.md``, and what is verified where: ``python tests/targets_page.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opcompile.cases import CASES
from opcompile.errors import TargetError
from opcompile.gpus import FLAGS, gpu_names, gpu_target
from opcompile.target import flagged, names

PAGE = Path(__file__).parent.parent / "docs" / "targets.md"
MARK = "<!-- what follows is written by tests/targets_page.py -->\n"

# What the tests do to code for each kind of machine, and which tests.
SIMULATED = "simulated: `tests/test_gpu_table.py`; derivatives: `tests/test_gradient_gpu.py`"
CHECKED = {"cuda": "compiled by nvcc: `tests/test_cuda.py`", "metal": "types, by clang: `tests/test_metal.py`"}
# What was run where, by hand: a GPU is not at hand for every test run.
ON_DEVICE = {"cuda": "layers, on an H100: `tests/test_on_gpu.py`", "metal": "no"}

LINKED = "compiled and linked: `tests/test_target.py`, `tests/test_artifact.py`"
CPU_FLAGGED = "llvm:znver4+bf16"
ASSEMBLY = "instructions in its assembly: `tests/test_native_bf16.py`"

# Flags are tried on layers that fill matrices.
FLAGGED = {"cuda:sm_80+tf32": "layers of its own", "metal:apple-m2+simdgroup": "layers of its own"}


def page() -> str:
    """Return the page with its last part written anew."""
    before, _, _ = PAGE.read_text().partition(MARK)
    return "\n".join([before + MARK, *_gpus(), "", *_verified(), ""])


def _gpus() -> list[str]:
    columns = ("GPU", "as in", "threads of a block", "its shared memory", "registers of a thread", "types")
    head = " | ".join([*columns, "tensor cores", "flags"])
    rows = [f"| {head} |", "|---" * 8 + "|"]
    for name in gpu_names():
        t = gpu_target(name)
        limits = f"{t.gpu.threads} | {t.gpu.shared // 1024} KiB | {t.gpu.registers}"
        types = f"{', '.join(t.dtypes)} | {', '.join(t.gpu.matrix_types)}"
        rows.append(f"| `{name}` | {t.gpu.example} | {limits} | {types} | {', '.join(_flags(name))} |")
    return rows


def _flags(name: str) -> Iterator[str]:
    for flag, rule in FLAGS.items():
        try:
            gpu_target(f"{name}+{flag}")
        except TargetError:
            continue
        yield f"`+{flag}`: {', '.join(rule.dtypes)}"


def _verified() -> list[str]:
    head = ["| Target | cases | numerics | else | on the device |", "|---|---|---|---|---|"]
    rows = ["## What is verified, and how", "", *head]
    rows.append(f"| `{names()[0]}` | {len(CASES)} | run: `tests/test_operator.py` | | yes |")
    corners = sum("corner" in case.tags for case in CASES)
    for name, count in (("llvm:cortex-a76", len(CASES)), ("llvm:apple-m1", corners)):
        rows.append(f"| `{name}` | {count} | emulated: `tests/test_emulate.py` | {LINKED} | no |")
    rows.append(f"| other CPUs | | | {LINKED} | no |")
    for name in ("cuda:sm_90", "metal:apple-m1"):
        t = gpu_target(name)
        count = sum(case.spec.dtype in t.dtypes for case in CASES)
        rows.append(f"| `{name}` | {count} | {SIMULATED} | {CHECKED[t.language]} | {ON_DEVICE[t.language]} |")
    for name, count in FLAGGED.items():
        t = gpu_target(name)
        rows.append(f"| `{name}` | {count} | simulated: `tests/test_gpu_matrix.py` | {CHECKED[t.language]} | no |")
    for name in flagged():
        ran = "layers of its own | run: `tests/test_native_bf16.py`" if name == CPU_FLAGGED else " | "
        rows.append(f"| `{name}` | {ran} | {ASSEMBLY} | {'yes' if name == CPU_FLAGGED else 'no'} |")
    rows.append("| other GPUs | | | tiles within the limits: `tests/test_gpu_tiles.py` | no |")
    return rows


if __name__ == "__main__":
    PAGE.write_text(page())
