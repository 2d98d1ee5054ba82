"""The manifest of an artifact, and its files held against it."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format
from numpy.typing import NDArray

from opcompile.digest import digest
from opcompile.errors import ArtifactError
from opcompile.gradients.gradient import WRT
from opcompile.index import INDEX
from opcompile.paths import checked_path, open_file, read_file
from opcompile.tensors import aligned

FORMAT = "opcompile-artifact"
# 2: the field ``derivative``, without which a reader would take a derivative for the layer
VERSION = 2
MANIFEST = "manifest.json"
HEADER = "conv_transpose3d.h"
MODEL = "model.onnx"
GOLDEN = "golden.npz"
WEIGHTS = "weights.npz"
REPORT = "report.json"

_LARGE = 8 << 20
_PART = 1 << 20


def opened(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Return the directory of an artifact for any machine, and its manifest; every hash is checked.

    Raises `ArtifactError`.
    """
    directory = checked_path(path, "path").absolute()
    manifest = parse_manifest(read_manifest(directory), directory)
    check_files(directory, manifest, set(manifest["files"]))
    return directory, manifest


def fingerprint(manifest: dict[str, Any]) -> str:
    """Tell an artifact from any other: SHA-256 of its manifest, but for the report, which verifying it writes anew."""
    files = {name: entry for name, entry in manifest["files"].items() if name != REPORT}
    return digest({**manifest, "files": files})


def own_weights(directory: Path, manifest: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Return what an artifact holds of packed ``W`` and of ``B``; bfloat16 as bits. Raises `ArtifactError`."""
    return read_arrays(directory, manifest, WEIGHTS) if manifest["weights"] else {}


def identity(place: Path) -> tuple[int, ...] | None:
    """Tell a directory from any that takes its place; None where there is none, or none to be seen."""
    try:
        found = place.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def read_manifest(directory: Path) -> bytes:
    """Return the manifest's text. Raises `ArtifactError` where there is none."""
    patience, written = time.monotonic() + 1, False
    while True:
        try:
            return read_file(directory / MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            if written or time.monotonic() > patience:
                break
            # where directories cannot be exchanged, a writer leaves the place empty for an instant; one that is not
            # seen any more may have filled it since
            written = not any(directory.parent.glob(f".{escape(directory.name)}.*"))
            time.sleep(0 if written else 0.005)
        except OSError as error:
            raise ArtifactError(
                f"{directory / MANIFEST} cannot be read: {error.strerror}; "
                "name a directory that `opcompile compile` wrote"
            ) from error
    if (directory / INDEX).is_file():
        raise ArtifactError(f"{directory} holds the artifacts of a model; name one of them, like {directory}/<node>")
    what = "has no manifest.json, so it is not an artifact" if directory.exists() else "does not exist"
    raise ArtifactError(f"{directory} {what}; name a directory that `opcompile compile` wrote")


_FIELDS: dict[str, type] = {
    "spec": str,
    "target": dict,
    "plan": dict,
    "packing": dict,
    "workspace_bytes": int,
    "library": str,
    "weights": list,
    "files": dict,
    "versions": dict,
}
_TARGET_FIELDS: dict[str, type] = {"name": str, "architecture": str, "system": str, "features": list}
_PLAN_FIELDS: dict[str, type] = {"name": str, "schedule": str, "tiles": dict}
_DEPTH_FIELDS: dict[str, type] = {"fixed": int, "per_image": int}


def parse_manifest(text: bytes, directory: Path) -> dict[str, Any]:
    """Read a manifest and check all that can be without the other files. Raises `ArtifactError`."""
    where = directory / MANIFEST
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{where} is not the manifest of an artifact: its format is not {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise ArtifactError(
            f"{where} has format version {manifest.get('version')!r}, and this program reads version {VERSION}; "
            "compile the layer again, or load it with the program that wrote it"
        )
    if manifest.get("sha256") != digest(manifest):
        raise ArtifactError(f"{where} was changed after it was written; compile the layer again")
    _require_fields(where, _FIELDS, manifest)
    _require_fields(where, _TARGET_FIELDS, manifest["target"])
    _require_fields(where, _PLAN_FIELDS, manifest["plan"])
    if not all(isinstance(feature, str) for feature in manifest["target"]["features"]):
        raise ArtifactError(f"{where} lists {manifest['target']['features']} as features, which must be names")
    for name, entry in manifest["files"].items():
        if not name or name in (".", "..", MANIFEST) or "/" in name or "\\" in name:
            raise ArtifactError(f"{where} lists {name!r}, which is not a file of the artifact")
        if not (
            isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)
        ):
            raise ArtifactError(f"{where} lists {name} without its size and hash")
    if manifest.get("derivative", "") not in (None, *WRT):
        raise ArtifactError(f"{where} must say which derivative it is, x, w or b, or null for the layer itself")
    if manifest["derivative"]:
        _require_fields(where, _DEPTH_FIELDS, manifest.get("depth"))
    # an artifact for Metal may have none
    needed = [
        *([manifest["library"]] if manifest["library"] else []),
        GOLDEN,
        *([WEIGHTS] if manifest["weights"] else []),
    ]
    for name in needed:
        if name not in manifest["files"]:
            raise ArtifactError(f"{where} does not list {name}, which it needs")
    return manifest


def _require_fields(where: Path, fields: dict[str, type], values: object) -> None:
    for name, kind in fields.items():
        if not isinstance(values, dict) or not isinstance(values.get(name), kind):
            raise ArtifactError(f"{where} lacks {name}, which must be a {kind.__name__}")


def check_files(directory: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Raise `ArtifactError` where one of these files is not what the manifest says."""
    files = manifest["files"]
    if sum(files[name]["bytes"] for name in names) < _LARGE:
        for name in names:
            open_checked(directory, manifest, name).close()
        return
    from concurrent.futures import ThreadPoolExecutor  # hashing runs beside the interpreter

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(open_checked, directory, manifest, name) for name in names]:
            done.result().close()


def open_checked(directory: Path, manifest: dict[str, Any], name: str) -> BinaryIO:
    """Open a listed file. Raises `ArtifactError` when it is not what the manifest says."""
    entry, found = manifest["files"][name], hashlib.sha256()
    try:
        with ExitStack() as on_error:
            file = on_error.enter_context(open_file(directory / name))
            while part := file.read(_PART):
                found.update(part)
            if file.tell() != entry["bytes"] or found.hexdigest() != entry["sha256"]:
                _require_same(directory, manifest)
                raise ArtifactError(f"{directory / name} was changed after it was written; compile the layer again")
            file.seek(0)
            on_error.pop_all()
            return file
    except OSError as error:
        _require_same(directory, manifest)
        raise ArtifactError(f"{directory / name} cannot be read: {error.strerror}; compile the layer again") from error


def _require_same(directory: Path, manifest: dict[str, Any]) -> None:
    """Raise `ArtifactError` where another artifact took the place of the one with this manifest."""
    if fingerprint(parse_manifest(read_manifest(directory), directory)) != fingerprint(manifest):
        raise ArtifactError(
            f"{directory} was replaced by another artifact meanwhile; give each layer its own directory"
        )


def read_arrays(directory: Path, manifest: dict[str, Any], name: str) -> dict[str, NDArray[Any]]:
    """Return the arrays of a listed NumPy archive, each at a cache line. Raises `ArtifactError`."""
    checked = open_checked(directory, manifest, name)
    try:
        with checked as file, zipfile.ZipFile(file) as stored:
            return {member.removesuffix(".npy"): _read_array(stored, member) for member in stored.namelist()}
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{name} is not an archive of arrays: {error}") from error


def _read_array(archive: zipfile.ZipFile, member: str) -> NDArray[Any]:
    """Read a member into its place part by part: `numpy.load` holds an array twice, and starts it anywhere."""
    with archive.open(member) as file:
        read_header = {(1, 0): format.read_array_header_1_0, (2, 0): format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[format.read_magic(file)](file)
        if by_columns or dtype.hasobject:
            raise ValueError(f"{member} holds {dtype} by columns" if by_columns else f"{member} holds objects")
        array = aligned(shape, dtype)
        memory = array.reshape(-1).view(np.uint8)
        filled = 0
        while part := file.read(_PART):
            memory[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
            filled += len(part)
        if filled != memory.size:
            raise ValueError(f"{member} has {filled} of {memory.size} bytes")
        return array
