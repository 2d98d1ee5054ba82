"""A model's artifacts in one directory: one subdirectory a node, and ``index.json`` that lists them.

The index is about what was compiled, and is written once. What verification found is in the ``report.json`` of each
artifact alone: artifacts are verified later, elsewhere, one by one, and where nothing can be written.

Neither TVM nor ONNX is needed here, so that a machine without a compiler reads an index too.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcompile.digest import digest
from opcompile.errors import ArtifactError
from opcompile.paths import checked_path, discard, read_file

INDEX = "index.json"
FORMAT = "opcompile-index"
# 2: which artifact each directory holds, and the hash of the index itself
VERSION = 2
# What the report of a directory says that `replace` wrote.
REPLACED = "opcompile-replacement"
# What a file browser leaves in a directory that was looked at: nobody's loss.
LEFT_BY_BROWSERS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_LONGEST = 80
_BESIDE = re.compile(r"^\.(.+)\.[0-9a-f]{32}(\.old)?$")


def directory_names(nodes: Iterable[str]) -> list[str]:
    """Return a safe and unique directory name for each node.

    ASCII letters and digits, ``.``, ``-`` and ``_`` stay, other characters become ``_``; names that would
    be equal, or differ in case only, are numbered.
    """
    taken = {INDEX}
    names = []
    for node in nodes:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", node).strip("._-")[:_LONGEST] or "node"
        name, number = stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def require_place(directory: Path, names: Iterable[str]) -> None:
    """Raise `ArtifactError` where ``directory`` holds anything but an older index and directories of ``names``.

    So nothing is ever deleted, and no artifact of another model stays among these. What a writer at work, or one that
    was killed, has beside their places is neither.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is a file; a model is compiled into a directory, so name another place")
    ours = {INDEX, *names}
    present = {path.name for path in directory.iterdir()} - LEFT_BY_BROWSERS
    foreign = sorted(name for name in present if _BESIDE.sub(r"\1", name) not in ours)
    if foreign:
        raise ArtifactError(
            f"{directory} holds {', '.join(foreign[:3])}, not among the nodes to compile; empty it, or choose another"
        )


def begin_index(directory: Path) -> None:
    """Let ``index.json`` say that artifacts are being replaced: of several models, until `write_index` is called."""
    _write(directory, {"finished": False, "layers": []})


def write_index(directory: Path, fields: dict[str, Any], layers: Sequence[dict[str, Any]]) -> Path:
    """Write ``index.json`` as a whole, or not at all, and return its path."""
    return _write(directory, {"finished": True, **fields, "layers": list(layers)})


def _write(directory: Path, content: dict[str, Any]) -> Path:
    content = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **content}))
    content["sha256"] = digest(content)
    path = directory / INDEX
    beside = path.with_name(f".{INDEX}.{uuid.uuid4().hex}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(json.dumps(content, indent=2) + "\n")
            os.replace(beside, path)
        except OSError:
            discard(beside)
            raise
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}; name a directory that is yours") from error
    return path


@dataclass(frozen=True, slots=True)
class Listed:
    """A directory that should hold an artifact: of an index that with this ``fingerprint``, or else any (None)."""

    directory: Path
    fingerprint: str | None = None

    def require(self, fingerprint: str) -> None:
        """Raise `ArtifactError` unless the artifact that was found, with this ``fingerprint``, is the one listed."""
        if self.fingerprint not in (None, fingerprint):
            raise ArtifactError(
                f"{self.directory} holds another artifact than {INDEX} lists; compile the model again, "
                "or name this directory for what it holds"
            )


def artifacts(directory: str | os.PathLike[str]) -> dict[str, Listed]:
    """Return the artifacts in ``directory`` by name: those its index lists, or else itself.

    Whether they are artifacts is for `opcompile.load` to say, and whether they are these for `Listed.require`. Raises
    `ArtifactError` for an index that is corrupt or was changed, and for what `replace` wrote.
    """
    place = checked_path(directory, "directory")
    path = place / INDEX
    if not path.is_file():
        if _is_replaced(place):
            raise ArtifactError(
                f"{place} holds a model that replace wrote, and no artifact; its report.json says how it was verified"
            )
        return {place.name or str(place): Listed(place)}
    try:
        content = json.loads(read_file(path))
        known = content["format"], content["version"]
        compiled = [each for each in content["layers"] if each["directory"]]
        listed = {str(each["name"]): (each["directory"], str(each.get("fingerprint"))) for each in compiled}
        intact = content.get("sha256") == digest(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; compile the model again") from error
    if known != (FORMAT, VERSION):
        raise ArtifactError(
            f"{path} has format {known[0]!r} {known[1]!r}, and this program reads {FORMAT!r} {VERSION}; "
            "compile the model again"
        )
    if not intact:
        raise ArtifactError(f"{path} was changed after it was written; compile the model again")
    if not content.get("finished"):
        raise ArtifactError(f"{place} holds a model that was not compiled to its end; compile it again")
    for folder, _ in listed.values():
        if not isinstance(folder, str) or Path(folder).name != folder or folder == ".." or "\0" in folder:
            raise ArtifactError(f"{path} lists {folder!r}, which is not a directory beside it; compile the model again")
    if not listed:
        raise ArtifactError(f"{path} lists no artifact: no node of that model could be compiled")
    return {name: Listed(place / folder, fingerprint) for name, (folder, fingerprint) in listed.items()}


def _is_replaced(place: Path) -> bool:
    try:
        return bool(json.loads(read_file(place / "report.json"))["format"] == REPLACED)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
