"""Is everything here that compiling, calling and comparing need? One line each, with the way out."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import opcompile
from opcompile.cuda_driver import device
from opcompile.errors import EngineError, OpcompileError, RecordError, TargetError
from opcompile.gpus import is_gpu
from opcompile.machine import processor
from opcompile.spec import ConvTranspose3d
from opcompile.target import Target, cores, flagged, target
from schedules.counted import counted

if TYPE_CHECKING:
    from rich.table import Table

    from opcompile.record import Record

# distribution -> (what for, how to get it); the extras are those of pyproject.toml
_REQUIRED = {
    "apache-tvm": ("compiles", "pip install 'apache-tvm>=0.27,<0.28'"),
    "apache-tvm-ffi": ("calls", "pip install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'"),
    "numpy": ("arrays and the oracle", "pip install numpy"),
    "onnx": ("reads and writes models", "pip install onnx"),
    "onnxruntime": ("the second opinion", "pip install onnxruntime"),
}
_OPTIONAL = {
    "ml_dtypes": ("bfloat16 arrays in NumPy", "pip install ml_dtypes"),
    "ziglang": ("links for other machines", "pip install 'opcompile[cross]'"),
    "unicorn": ("emulates an arm64", "pip install 'opcompile[emulate]'"),
    "lief": ("reads libraries for it", "pip install 'opcompile[emulate]'"),
    "torch": ("a peer for bench", "pip install 'opcompile[peers]'"),
    "openvino": ("a peer for bench", "pip install 'opcompile[peers]'"),
    "keras": ("its layers, and diff", "pip install 'opcompile[words]'"),
    "jax": ("its layers, and diff", "pip install 'opcompile[words]'"),
    "mlx": ("diff", "pip install 'opcompile[words]'"),
    "matplotlib": ("pictures of bench", "pip install 'opcompile[plot]'"),
    "psutil": ("tuning", "pip install 'opcompile[tune]'"),
    "cloudpickle": ("tuning", "pip install 'opcompile[tune]'"),
    "tornado": ("tuning over a tracker", "pip install 'opcompile[tune]'"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked for.

    ``state`` is ``ok``, ``missing``, ``unusable`` or ``optional`` (missing, and not needed).
    """

    what: str
    state: str
    found: str
    way_out: str = ""

    @property
    def fine(self) -> bool:
        """Whether nothing needs to be done."""
        return self.state in ("ok", "optional")


def doctor(*, build: bool = True) -> list[Finding]:
    """Look at packages, machine, linker and tuned records; with ``build``, also compile a small layer and check it."""
    findings = [
        Finding("opcompile", "ok", f"{opcompile.__version__}, Python {platform.python_version()} ({sys.executable})"),
        *(_package(name, what, way, "missing") for name, (what, way) in _REQUIRED.items()),
        *(_package(name, what, way, "optional") for name, (what, way) in _OPTIONAL.items()),
        *_machine(),
        _linker(),
        _gpu(),
        _nvcc(),
        *_records(),
    ]
    return [*findings, _small_layer()] if build else findings


def table(findings: list[Finding]) -> Table:
    """Return the findings as a table for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(2):
        shown.add_column(no_wrap=True, style="bold" if column else "")
    shown.add_column(overflow="fold")
    marks = {
        "ok": "[green]ok[/]",
        "missing": "[red]missing[/]",
        "unusable": "[red]unusable[/]",
        "optional": "[yellow]absent[/]",
    }
    for f in findings:
        words = f.found + (f"\n-> {f.way_out}" if f.way_out else "")
        shown.add_row(marks[f.state], escape(f.what), escape(words))
    return shown


def _package(name: str, what: str, way_out: str, otherwise: str) -> Finding:
    try:
        return Finding(name, "ok", f"{metadata.version(name)}, {what}")
    except metadata.PackageNotFoundError:
        return Finding(name, otherwise, what, way_out)


def _machine() -> Iterator[Finding]:
    yield Finding("processor", "ok", processor())
    try:
        here = target("llvm")
        m = here.machine
        yield Finding(
            "target llvm",
            "ok",
            f"{here.name}: {', '.join(here.features) or 'no flags listed'}; {8 * m.vector_bytes}-bit vectors, "
            f"{m.registers} registers, {counted(m.fma_units, 'multiply-add')} a cycle, "
            f"L1 {m.l1_bytes >> 10} KiB, L2 {m.l2_bytes >> 10} KiB" + _flags(here),
        )
    except OpcompileError as error:
        yield Finding("target llvm", "missing", str(error), "name the machine to compile for with --target")
    asked = os.environ.get("OPCOMPILE_NUM_THREADS")
    yield Finding(
        "threads", "ok", f"{counted(cores(), 'CPU')} usable" + (f", OPCOMPILE_NUM_THREADS={asked}" if asked else "")
    )


def _flags(here: Target) -> str:
    """Say which flags the name of this machine may end in."""
    known = [name for name in flagged() if name.startswith(f"{here.name}+") and target(name).native]
    return "".join(f"; {name.removeprefix(here.name)} where you ask for it" for name in known)


def _linker() -> Finding:
    found = os.environ.get("CC", "").strip() or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found:
        return Finding("linker", "ok", found + (", from CC" if os.environ.get("CC", "").strip() else ""))
    if importlib.util.find_spec("ziglang"):
        return Finding("linker", "ok", "the package ziglang")
    way_out = "install a C compiler (apt install gcc), or pip install 'opcompile[cross]'"
    return Finding("linker", "missing", "no cc, gcc or clang on PATH, CC is not set, and no package ziglang", way_out)


def _gpu() -> Finding:
    try:
        gpu = device()
    except TargetError as error:
        return Finding("GPU", "optional", f"runs what is compiled for CUDA: {error}")
    return Finding("GPU", "ok", f"{gpu.name}, compute capability {gpu.compute}, driver {gpu.driver}")


def _nvcc() -> Finding:
    from opcompile.nvcc import nvcc_version

    try:
        return Finding("nvcc", "ok", f"{nvcc_version()}, compiles for CUDA")
    except EngineError:
        return Finding("nvcc", "optional", "compiles for CUDA", "pip install 'opcompile[cuda]', or set NVCC")


def _records() -> Iterator[Finding]:
    """Count the records that can be used, and name the others: each makes compiling its layer fail."""
    from opcompile.record import own_folder, shipped_folder

    try:
        mine = own_folder()
    except RecordError as error:
        yield Finding("tuned records", "unusable", str(error))
        return
    usable = []
    for folder in (mine, shipped_folder()):
        places = sorted(folder.glob("*/*.json"))
        bad = [said for place in places if (said := _unusable(place, folder)) is not None]
        usable.append(len(places) - len(bad))
        yield from (Finding("tuned record", "unusable", said) for said in bad)
    own, shipped = usable
    yield Finding("tuned records", "ok", f"{own} of your own in {mine}, {shipped} shipped")


def _unusable(place: Path, folder: Path) -> str | None:
    """Say why a record cannot be used, and the way out; None where it can."""
    from opcompile.record import read_in_place

    try:
        record = read_in_place(place, folder)
        if (declaration := _declared_now(record)) is not None:
            record.require_declaration(declaration)
    except RecordError as error:
        return str(error)
    return None


def _declared_now(record: Record) -> str | None:
    """Hash what this version declares for the layer and the tiles of a record; None where there is no compiler."""
    try:
        from opcompile import lower, lower_gpu
        from schedules.gpu_tiles import GpuTiles
        from schedules.tiles import Tiles
    except (ImportError, OSError):
        return None  # the packages above say so
    spec = ConvTranspose3d.parse(record.spec)
    if is_gpu(record.target):
        return lower_gpu.declaration_hash(spec, GpuTiles(**record.tiles))
    return lower.declaration_hash(spec, Tiles(**record.tiles))


def _small_layer() -> Finding:
    """Compile, link, load and verify a layer: the only proof that the parts fit together."""
    spec, way_out = (
        ConvTranspose3d.parse("in=1x4x3x4x5 co=6 k=2 s=2"),
        "see the lines above; run with OPCOMPILE_DEBUG=1",
    )
    try:
        from opcompile.build import compile
        from opcompile.verify import verify

        report = verify(compile(spec, plan="baseline")).require()
    except (OpcompileError, ImportError, OSError) as error:
        return Finding("a small layer", "missing", f"{type(error).__name__}: {error}", way_out)
    unasked = "".join(f"; {n.what} not asked: {n.reason}" for n in report.not_asked)
    return Finding(
        "a small layer", "ok", f"compiled, linked, loaded, and right in {len(report.rows)} comparisons{unasked}"
    )
