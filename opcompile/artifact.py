"""A compiled layer as a directory that stands on its own: written whole, or not at all.

=============================  ==================================================================
``manifest.json``              spec, target, plan, packing, versions, sizes, SHA-256 of every file
``conv_transpose3d-<hash>.so``  the kernel and its run-time half; the C library is all it needs
``conv_transpose3d.h``         how to call it from C
``kernel.cu, kernel.metal``    for a GPU, instead of the header: the kernel's text
``launch.json``                for a GPU: the kernel's name, grid, block and arguments
``model.onnx``                 the same layer for other systems, with the weights that are known
``golden.npz``                 a test vector: some outputs of inputs that are a formula
``weights.npz``                packed weight and bias, where they are known
``report.json``                what verification found, once it was done
=============================  ==================================================================

The library's name holds its hash because loaders remember libraries by their path: another layer
compiled into the same directory must not find the old one.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import opcompile
from opcompile.artifact_gpu import gpu_files, library_name
from opcompile.atomic import new_beside, put, require_replaceable
from opcompile.digest import digest
from opcompile.errors import ArtifactError, CallError
from opcompile.golden import B_AMPLITUDE, B_SALT, W_SALT, X_AMPLITUDE, X_SALT, elements, golden_values, w_amplitude
from opcompile.gpus import GpuTarget
from opcompile.header import header
from opcompile.link import link
from opcompile.manifest import (
    FORMAT,
    GOLDEN,
    HEADER,
    MANIFEST,
    MODEL,
    REPORT,
    VERSION,
    WEIGHTS,
    parse_manifest,
    read_manifest,
)
from opcompile.packing import Packing
from opcompile.reference import reference
from opcompile.spec import Axis, ConvTranspose3d
from opcompile.tensors import STORAGE

if TYPE_CHECKING:
    from opcompile.build import AnyLowered
    from opcompile.lower import Lowered
    from opcompile.lower_gpu import LoweredGpu
    from opcompile.verify import Report


def write(
    lowered: Lowered | LoweredGpu,
    into: str | os.PathLike[str],
    *,
    weight: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    replacing: Callable[[], None] | None = None,
) -> Path:
    """Link ``lowered`` and write its artifact, replacing the one that is in ``into``; return the directory.

    ``weight`` is canonical; it and ``bias`` are stored packed when given. A reader of ``into`` sees
    the old artifact or the new one, and of two writers one comes last. ``replacing`` is called when
    all is written, before it takes its place. Raises `ArtifactError` where
    ``into`` holds anything but an artifact, `CallError` for weights that do not fit, `EngineError`
    when the library cannot be linked.
    """
    from opcompile.graph import export_onnx  # on use: it brings onnx

    spec, place = lowered.spec, Path(into).resolve()
    weight = _checked("weight", weight, spec.w_shape, spec.dtype)
    bias = _checked("bias", bias, (spec.channels_out,), spec.dtype)
    if bias is not None and not spec.bias:
        raise CallError("bias was given, but the layer has none (bias=0); leave it out")
    require_replaceable(place)
    if isinstance(lowered.target, GpuTarget):
        files, name = gpu_files(lowered, spec.batch)
    else:
        files, name = _cpu_files(lowered)

    def fill(beside: Path) -> dict[str, Any]:
        for file, content in files.items():
            (beside / file).write_bytes(content)
        (beside / GOLDEN).write_bytes(archive(_golden(spec, weight, bias)))
        stored = _packed(lowered.packing, weight, bias, spec.dtype)
        if stored:
            (beside / WEIGHTS).write_bytes(archive(stored))
        export_onnx(spec, beside / MODEL, weight=weight, bias=bias)
        shapes = {
            "x": spec.x_shape,
            "w": lowered.packing.shape,
            "b": (spec.channels_out if spec.bias else 0,),
            "y": spec.y_shape,
        }
        packing = lowered.packing.to_json()
        return manifest_of(lowered, spec, shapes, name, packing=packing, weights=sorted(stored))

    return publish(place, fill, replacing)


def publish(place: Path, fill: Callable[[Path], dict[str, Any]], replacing: Callable[[], None] | None) -> Path:
    """Let ``fill`` write the files of an artifact and return its manifest, then put it into ``place`` as a whole."""
    require_replaceable(place)
    beside = new_beside(place)
    try:
        _write_manifest(beside, fill(beside))
        if replacing:
            replacing()
        put(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return place


def _cpu_files(lowered: Lowered) -> tuple[dict[str, bytes], str]:
    """Return the library and its header, and which of them is the library."""
    text = header(lowered.spec, lowered.packing)
    library = link(lowered.object_code, text, lowered.target)
    name = library_name(library, lowered.target.system)
    return {name: library, HEADER: text.encode()}, name


def store(place: Path, report: Report) -> None:
    """Store what verification found; a report without any answer would say less than the one that is there.

    Raises `ArtifactError`.
    """
    if report.unanswered is not None:
        return
    try:
        add_report(place, report.to_json())
    except OSError as error:
        reason = error.strerror or error
        raise ArtifactError(f"{place} takes no report: {reason}; give it space, or make it yours") from error


def add_report(directory: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Store ``report`` as ``report.json`` of an artifact, in one step with the manifest.

    Raises `ArtifactError` when ``directory`` is no artifact, or another took its place meanwhile.
    """
    place = Path(directory).resolve()
    before = read_manifest(place)
    manifest = parse_manifest(before, place)
    name = f"d{manifest['derivative']} of " if manifest["derivative"] else ""
    if report.get("spec", name + manifest["spec"]) != name + manifest["spec"]:
        raise ArtifactError(f"{place} was replaced while a report on it was written; verify it again")
    beside = new_beside(place)
    try:
        for name in manifest["files"]:
            if name != REPORT:
                _link_or_copy(place / name, beside / name)
        (beside / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        _write_manifest(beside, manifest)
        put(beside, place)
        # what was in the place is beside it now
        if (beside / MANIFEST).read_bytes() != before:
            put(beside, place)
            raise ArtifactError(f"{place} was replaced while a report on it was written; verify it again")
    except FileNotFoundError as error:
        raise ArtifactError(f"{place} was replaced while a report on it was written; verify it again") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _checked(name: str, given: NDArray[Any] | None, shape: tuple[int, ...], dtype: str) -> NDArray[Any] | None:
    if given is None:
        return None
    if not isinstance(given, np.ndarray):
        raise CallError(f"{name} is a {type(given).__name__}, but must be a NumPy array {shape} of {dtype}; convert it")
    kind = given.dtype.name if given.dtype.isnative else f"byte-swapped {given.dtype.name}"
    if given.shape != shape or kind != dtype:
        raise CallError(f"{name} is {kind} {given.shape}, but the layer needs {dtype} {shape}")
    return given


def _link_or_copy(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copy2(source, destination)


# --- the files ---


def manifest_of(
    lowered: AnyLowered, layer: ConvTranspose3d, shapes: Mapping[str, Sequence[int | None]], library: str, **own: Any
) -> dict[str, Any]:
    """Return what every manifest says, and what one says of its ``own``; ``shapes`` are those of the tensors."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": str(layer),
        "derivative": None,
        "target": lowered.target.fields(),
        "plan": asdict(lowered.plan),
        "packing": {},
        "workspace_bytes": lowered.workspace_bytes,
        # of one batch element where the batch is dynamic
        "tensor_bytes": {name: layer.bytes_of(shape) for name, shape in shapes.items()},
        "library": library,
        "weights": [],
        "versions": {
            "opcompile": opcompile.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx")},
        },
        "files": {},
        **own,
    }


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest``, completed by the files that are in ``directory``, and by its own hash."""
    files = {}
    for path in sorted(directory.iterdir()):
        if path.name != MANIFEST:
            content = path.read_bytes()
            files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = json.loads(json.dumps({**manifest, "files": files}))
    manifest["sha256"] = digest(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def archive(arrays: Mapping[str, Any]) -> bytes:
    """Return a NumPy archive of ``arrays``."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _packed(
    packing: Packing, weight: NDArray[Any] | None, bias: NDArray[Any] | None, dtype: str
) -> dict[str, NDArray[Any]]:
    """Return what is known of ``W`` (packed) and ``B``; bfloat16 as bits, which the file format lacks."""
    known = {"W": None if weight is None else packing(weight), "B": bias}
    return {
        name: np.ascontiguousarray(array).view(STORAGE[dtype]) for name, array in known.items() if array is not None
    }


# --- the test vector ---

_MOST_OUTPUTS = 4096


def _golden(spec: ConvTranspose3d, weight: NDArray[Any] | None, bias: NDArray[Any] | None) -> dict[str, Any]:
    """Compute outputs from the corners of the first and the last image by the oracle.

    A corner needs only the inputs near it, so that this is quick for a layer of any size; a few
    channels of each group stand for all.
    """
    batch, groups, m = spec.batch or 2, spec.groups, spec.m_out
    # of each group
    picked = np.unique(np.linspace(0, m - 1, min(m, max(1, 8 // groups))).astype(int))
    channels = (np.arange(groups)[:, None] * m + picked).ravel()
    w, b = weight, bias
    if w is None:
        w = golden_values(np.arange(math.prod(spec.w_shape)), W_SALT, w_amplitude(spec)).reshape(spec.w_shape)
    if b is None:
        b = golden_values(np.arange(spec.channels_out), B_SALT, B_AMPLITUDE)
    expected: dict[int, float] = {}
    corners = itertools.product(*(_ends(axis) for axis in spec.axes))
    for image, corner in itertools.product({0, batch - 1}, corners):
        crops = [axis.crop(outputs) for axis, outputs in zip(spec.axes, corner, strict=True)]
        d, h, w_ = (axis for axis, _ in crops)
        part = replace(spec, batch=1, channels_out=channels.size, axes=(d, h, w_), layout="NCDHW")
        read = elements(spec, spec.x_shape, [image], np.arange(spec.channels_in), [inputs for _, inputs in crops])
        x = golden_values(read, X_SALT, X_AMPLITUDE)
        with np.errstate(invalid="ignore"):  # of weights that are not finite
            y = reference(part, x, w[:, picked], b[channels] if spec.bias else None)
        written = elements(spec, spec.y_shape, [image], channels, corner)
        expected.update(zip(written.ravel().tolist(), y.ravel().tolist(), strict=True))
    indices = np.array(sorted(expected), np.int64)
    if indices.size > _MOST_OUTPUTS:
        indices = np.sort(np.random.default_rng(0).choice(indices, _MOST_OUTPUTS, replace=False))
    values = np.array([expected[index] for index in indices.tolist()], np.float64)
    return {"batch": np.int64(batch), "indices": indices, "expected": values}


def _ends(axis: Axis) -> list[range]:
    """Return the first and the last outputs of an axis: some of every phase, where the stride is below 8."""
    length = min(axis.out, max(4, min(axis.stride + 1, 8)))
    return [range(length), range(axis.out - length, axis.out)][: 1 if length == axis.out else 2]
