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

import ctypes
import errno
import hashlib
import io
import itertools
import json
import math
import os
import platform
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import opcompile
from opcompile.artifact_gpu import gpu_files, library_name
from opcompile.errors import ArtifactError, CallError
from opcompile.golden import B_AMPLITUDE, B_SALT, W_SALT, X_AMPLITUDE, X_SALT, elements, golden_values, w_amplitude
from opcompile.gpus import GpuTarget
from opcompile.index import INDEX, LEFT_BY_BROWSERS
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
    digest,
    identity,
    parse_manifest,
    read_manifest,
)
from opcompile.packing import Packing
from opcompile.reference import reference
from opcompile.runtime import KERNEL, MOST_THREADS
from opcompile.spec import Axis, ConvTranspose3d
from opcompile.tensors import STORAGE, sizes_text

if TYPE_CHECKING:
    from opcompile.build import AnyLowered
    from opcompile.gradients.gradient import Gradient
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


# --- the directory ---


def new_beside(place: Path) -> Path:
    """Make a directory on the same file system, with the permissions that the user's are made with."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    beside.mkdir()
    return beside


def require_room(place: Path) -> None:
    """Raise `OSError` where no directory can be made beside ``place``, whose parents need not be there yet.

    Nothing stays behind: not those parents either.
    """
    there = next((folder for folder in place.parents if folder.exists()), place)
    probe = there / f".{place.name}.{uuid.uuid4().hex}"
    probe.mkdir()
    probe.rmdir()


def require_replaceable(place: Path) -> None:
    """Raise `ArtifactError` if replacing ``place`` would lose a file that is not an artifact's, or where one works."""
    require_elsewhere(place)
    before, objection = identity(place), _objection(place)
    # another writer may put its own there while we look: then look again
    while objection and identity(place) != before:
        before, objection = identity(place), _objection(place)
    if objection:
        way_out = "empty it" if place.is_dir() else "remove that file"
        raise ArtifactError(f"{place} {objection}; {way_out}, or name another directory")


def require_elsewhere(place: Path) -> None:
    """Raise `ArtifactError` if ``place`` is the current directory: replaced, it would be gone for the shell in it."""
    require_outside(place)
    if place.exists() and place.samefile(os.curdir):
        raise ArtifactError(
            f"{place} is the current directory, and another takes its place as a whole; "
            "change to another one (cd ..), and name it from there"
        )


def require_outside(place: Path) -> None:
    """Raise `ArtifactError` if ``place`` is inside of an artifact, which holds its own files and no others."""
    for folder in place.resolve().parents:
        if _listed(folder):
            raise ArtifactError(f"{place} is inside of the artifact {folder}; name a directory beside it")


def _listed(place: Path) -> set[str]:
    """Return the files that the manifest of an artifact lists; none where there is no such manifest."""
    try:
        manifest = json.loads((place / MANIFEST).read_bytes())
        return set(manifest["files"]) if manifest["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _objection(place: Path) -> str | None:
    """Say why ``place`` must not be replaced; None when it is missing, empty or an artifact."""
    try:
        present = {path.name for path in place.iterdir()}
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return f"{'is' if place.exists() else 'lies in'} a file, and an artifact is a directory"
    present -= LEFT_BY_BROWSERS
    if not present:
        return None
    if INDEX in present:
        return "holds the artifacts of a model"
    listed = _listed(place)
    if not listed:
        return "is not an artifact"
    foreign = sorted(present - listed - {MANIFEST})
    return f"holds {', '.join(foreign[:3])}, which no artifact wrote" if foreign else None


def put(beside: Path, place: Path, require: Callable[[Path], None] | None = None) -> None:
    """Make ``beside`` the directory at ``place``; what was there lies at ``beside`` then.

    ``require`` raises where what is there must not be replaced; by default, what is no artifact.

    Directories are exchanged in one step where the system can: nobody ever finds the place empty.
    Elsewhere the old one is moved away first; then the place is empty for an instant, which
    `runtime.load` waits out, and a writer that dies in it leaves the old one beside, whole.
    """
    while True:
        try:
            os.rename(beside, place)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        (require or require_replaceable)(place)
        try:
            if not _exchange(beside, place):
                _exchange_in_steps(beside, place, require)
            return
        except FileNotFoundError:
            if not beside.exists():
                raise
            # another writer was between its own two steps


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False where system or file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
    if hasattr(library, "renameat2"):
        status = library.renameat2(here, paths[0], here, paths[1], swap)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        status = library.renamex_np(*paths, swap)
    else:
        return False
    if status == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _exchange_in_steps(beside: Path, place: Path, require: Callable[[Path], None] | None) -> None:
    aside = place.with_name(f"{beside.name}.old")
    os.rename(place, aside)
    try:
        os.rename(beside, place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            os.rename(aside, place)
            raise
        # another writer filled the empty place: replace that one instead
        shutil.rmtree(aside, ignore_errors=True)
        put(beside, place, require)
        return
    os.rename(aside, beside)


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


# --- the C header ---

_C_TYPES = {
    "float32": ("float", 2, 32),
    "float16": ("uint16_t /* the bits of an IEEE binary16 */", 2, 16),
    "bfloat16": ("uint16_t /* the bits of a bfloat16 */", 4, 16),
    "float64": ("double", 2, 64),
}


def header(spec: ConvTranspose3d, packing: Packing) -> str:
    """Return the C header of a layer: what ``layer.c`` is compiled with, and what a C host includes."""
    about = _ABOUT.format(
        spec=spec,
        x=sizes_text(spec.x_shape),
        y=sizes_text(spec.y_shape),
        w=sizes_text(packing.shape),
        w_canonical=sizes_text(spec.w_shape),
        padded=packing.padded,
        view=packing.view,
        order=packing.order,
        layout=spec.layout,
        b=f"({spec.channels_out},)" if spec.bias else "NULL: this layer has no bias",
        batch="any, at least 1" if spec.batch is None else f"always {spec.batch}",
        x_salt=X_SALT,
        w_salt=W_SALT,
        b_salt=B_SALT,
        x_amplitude=X_AMPLITUDE,
        w_amplitude=w_amplitude(spec),
        b_amplitude=B_AMPLITUDE,
    )
    shapes = (spec.x_shape, packing.shape, (spec.channels_out,), spec.y_shape)
    nulls = "x, w and y must not be null, and b must be null exactly when the layer has no bias"
    return about + c_code(spec.dtype, shapes, (True, spec.bias), nulls, KERNEL, useful_threads(spec))


def c_code(
    dtype: str,
    shapes: Sequence[Sequence[int | None]],
    given: tuple[bool, bool],
    nulls: str,
    kernel: str,
    threads: int,
) -> str:
    """Return the part of a C header that a compiler reads.

    ``shapes`` are those of the four pointers of a call; ``given`` says whether the second and the third are, and
    ``nulls`` says it in words. Headers of several layers go together: what all have in common is said once, and
    each one's own words replace those before.
    """
    c_type, code, bits = _C_TYPES[dtype]
    macros = {
        "opcompile_element": c_type,
        "OPCOMPILE_DTYPE_CODE": code,
        "OPCOMPILE_DTYPE_BITS": bits,
        **{f"OPCOMPILE_{name}_SHAPE": _c_shape(shape) for name, shape in zip("XWBY", shapes, strict=True)},
        **{f"OPCOMPILE_HAS_{name}": int(is_given) for name, is_given in zip(("W", "BIAS"), given, strict=True)},
        "OPCOMPILE_NULLS": f'"{nulls}"',
        "OPCOMPILE_KERNEL": kernel,
        "OPCOMPILE_USEFUL_THREADS": threads,
    }
    return _COMMON + "".join(f"#undef {name}\n#define {name} {value}\n" for name, value in macros.items())


def _c_shape(shape: Sequence[int | None]) -> str:
    """Write a shape as C initialises an array, a dynamic batch as 0."""
    return "{" + ", ".join(str(n or 0) for n in shape) + "}"


def useful_threads(work: ConvTranspose3d | Gradient) -> int:
    """Count a thread for each 25 us of work, for one batch element of a dynamic batch: waking one takes about 10.

    The work is estimated at 20 GFLOP/s and 5 GB/s, which a core of any supported machine reaches.
    """
    work_us = work.flops / 20e3 + work.bytes() / 5e3
    return max(1, min(MOST_THREADS, int(work_us / 25)))


_ABOUT = """\
/* A transposed 3-D convolution, compiled:
 *   {spec}
 *
 * The library beside this file needs the C library alone. Load it and call it so:
 *
 *   #include <dlfcn.h>
 *   void *library = dlopen("./conv_transpose3d-....so", RTLD_NOW | RTLD_LOCAL);
 *   opcompile_run_fn run;
 *   opcompile_error_fn error;
 *   *(void **)&run = dlsym(library, "opcompile_run");
 *   *(void **)&error = dlsym(library, "opcompile_error");
 *   if (run(0, batch, x, w, b, y)) fprintf(stderr, "%s\\n", error());
 *
 *   x  {x}, layout {layout}
 *   w  {w}, packed from the canonical {w_canonical}
 *   b  {b}
 *   y  {y}, layout {layout}; shares no memory with the others
 *
 * All are contiguous arrays of opcompile_element, aligned as that type is. batch is N: {batch}.
 * The packed w is the canonical one, filled up with zeros to {padded},
 * seen as {view}, its axes put into the order {order};
 * weights.npz, where it is there, holds it ready.
 *
 * threads is the most that the call may use, the caller among them: 1 to 1024, or 0 for the variable
 * OPCOMPILE_NUM_THREADS (read when the library is loaded), and without that every CPU the process may
 * run on, or as many as a container is granted. Calls may come from several threads at once; a child
 * process may call after a fork.
 * The result is 0, or something else, and then opcompile_error() says why, for the calling thread.
 *
 * The inputs of golden.npz: element i of x is opcompile_golden(i, {x_salt}, {x_amplitude}) / 64.0, of the canonical w
 * opcompile_golden(i, {w_salt}, {w_amplitude}) / 64.0, of b opcompile_golden(i, {b_salt}, {b_amplitude}) / 64.0; where
 * weights.npz holds w or b, those are used instead.
 */
"""

_COMMON = """\
#ifndef OPCOMPILE_H /* what the headers of all layers have in common */
#define OPCOMPILE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define OPCOMPILE_API __attribute__((visibility("default")))
OPCOMPILE_API int opcompile_run(int threads, int64_t batch, const void *x, const void *w, const void *b, void *y);
OPCOMPILE_API const char *opcompile_error(void);
typedef int (*opcompile_run_fn)(int, int64_t, const void *, const void *, const void *, void *);
typedef const char *(*opcompile_error_fn)(void);

static inline int32_t opcompile_golden(uint32_t i, uint32_t salt, uint32_t amplitude) {
  uint32_t h = i + salt * 0x9E3779B9u;
  h ^= h >> 16;
  h *= 0x7FEB352Du;
  h ^= h >> 15;
  h *= 0x846CA68Bu;
  h ^= h >> 16;
  return (int32_t)(h % (2 * amplitude + 1)) - (int32_t)amplitude;
}

#ifdef __cplusplus
}
#endif
#endif

/* What follows is of this layer. Where a file includes the headers of several, it is of the last one.
 *
 * element: of every array. DTYPE: DLPack's description of it. SHAPE: of the four pointers of a call, in its order;
 * a 0 is a batch that the call gives. USEFUL_THREADS: more of them, for each batch element where N is open, would
 * cost more than they bring. */
"""
