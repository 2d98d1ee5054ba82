"""What an artifact for a GPU holds beside what every artifact does: the kernel's text, its launch, a library."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opcompile.errors import EngineError
from opcompile.launch import LAUNCH, SOURCES
from opcompile.nvcc import nvcc
from opcompile.paths import scratch

if TYPE_CHECKING:
    from opcompile.lower_gpu import GpuCode


def library_name(library: bytes, system: str, kernel: str = "conv_transpose3d") -> str:
    """Return a name that no other library has: loaders remember libraries by their path."""
    suffix = "dylib" if system == "darwin" else "so"
    return f"{kernel}-{hashlib.sha256(library).hexdigest()[:16]}.{suffix}"


def gpu_files(lowered: GpuCode, batch: int | None, kernel: str = "conv_transpose3d") -> tuple[dict[str, bytes], str]:
    """Return the files of a ``kernel`` by name, and which of them is the library.

    There is none for Metal where the package ziglang, which links for macOS, is not installed: the text and the
    launch are what a Mac needs. Raises `EngineError` where nvcc is missing, or a compiler fails.
    """
    language = lowered.target.language
    files = {SOURCES[language]: lowered.source.encode(), LAUNCH: lowered.launch.to_json(batch).encode()}
    if language == "cuda":
        library = nvcc(lowered.source, lowered.host_source, lowered.target)
    elif importlib.util.find_spec("ziglang") is not None:
        library = _dylib(lowered.host_objects())
    else:
        return files, ""
    name = library_name(library, "linux" if language == "cuda" else "darwin", kernel)
    return {**files, name: library}, name


def _dylib(objects: Sequence[bytes]) -> bytes:
    """Link host code for macOS on arm64; TVM's Metal runtime, which it needs, is found when it is loaded."""
    with scratch() as folder:
        paths = [folder / f"{number}.o" for number in range(len(objects))]
        for path, content in zip(paths, objects, strict=True):
            path.write_bytes(content)
        command = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-macos", "-shared"]
        command += ["-Wl,-undefined,dynamic_lookup", "-o", "library.dylib", *(path.name for path in paths)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineError(f"linking for macOS ended with status {done.returncode}:\n{done.stderr.strip()}")
        return (folder / "library.dylib").read_bytes()
