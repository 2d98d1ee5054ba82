"""The wheel: complete, and working where the checkout is not."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import opcompile

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the source tree")


def run(*command: str | Path, cwd: Path) -> str:
    """Run outside of the checkout, with nothing of it on the path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV", "OPCOMPILE", "VIRTUAL_ENV"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # without the build backend at hand, pip fetches it
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "-w", out, ROOT]
    run(*command, cwd=out)
    (found,) = out.glob("opcompile-*.whl")
    return found


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that holds the wheel, and sees the packages installed here for the rest."""
    place = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", place / "venv", cwd=place)
    python = place / "venv" / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
        wheel,
        cwd=place,
    )
    # a directory named in a .pth comes last, and .pth files in it (an editable install) are not read
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip()
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(own) / "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    return place


def test_the_wheel_carries_every_file_of_both_packages_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("opcompile", "schedules")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == sources
    assert {"opcompile/runtime.c", "opcompile/py.typed", "schedules/py.typed"} <= packed
    assert {n for n in packed if n.startswith("schedules/records/")} == {
        n for n in sources if n.startswith("schedules/records/")
    }
    assert f"Version: {opcompile.__version__}\n" in text
    assert "Requires-Dist: apache-tvm-ffi<0.1.15" in text


def test_it_is_imported_from_its_own_place(elsewhere: Path) -> None:
    command = "import opcompile, schedules; print(opcompile.__file__); print(schedules.__file__)"
    for line in run(elsewhere / "venv/bin/python", "-c", command, cwd=elsewhere).splitlines():
        assert Path(line).is_relative_to(elsewhere)


def test_importing_it_is_light(elsewhere: Path) -> None:
    command = (
        "import sys, opcompile; print(sorted({'tvm', 'onnx', 'onnxruntime', 'tvm_ffi', 'rich'} & set(sys.modules)))"
    )
    assert run(elsewhere / "venv/bin/python", "-c", command, cwd=elsewhere) == "[]\n"


def test_the_command_gives_its_version(elsewhere: Path) -> None:
    assert run(elsewhere / "venv/bin/opcompile", "--version", cwd=elsewhere) == f"opcompile {opcompile.__version__}\n"


def test_the_command_compiles_and_verifies(elsewhere: Path) -> None:
    run(elsewhere / "venv/bin/opcompile", "compile", "in=1x4x3x4x5 co=6 k=2 s=2 bias=0", "-o", "layer", cwd=elsewhere)
    assert (elsewhere / "layer" / "manifest.json").exists()
    assert (elsewhere / "layer" / "report.json").exists()
