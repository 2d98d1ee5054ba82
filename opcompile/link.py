"""Kernel objects + C sources -> one shared library that needs the C library alone.

The system's ``cc`` (or ``$CC``) links for this kind of machine; the ``ziglang`` package brings a
compiler and the C libraries of the others, and stands in for ``cc`` where there is none.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from opcompile.errors import EngineError
from opcompile.machine import command_in
from opcompile.manifest import HEADER
from opcompile.paths import scratch
from opcompile.runtime import EXPORTS, KERNEL
from opcompile.target import Target, host

_HERE = Path(__file__).parent
# What every host of a kernel includes.
_SHARED = tuple(_HERE / name for name in ("call.h", "cpus.h", "kernel.h", "processor.h"))
_COMPILE = ("-std=c11", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-fwrapv", "-I.")
# Names of files where a compiler works.
_COMMON, _EXPORTS, _MADE, _TARGET = "common.o", "exports", "made", "target.c"
# The oldest C library that both architectures have: what zig links runs on every later one.
_OLDEST_GLIBC = "2.17"


def link(object_code: bytes, header: str, target: Target, kernel: str = KERNEL) -> bytes:
    """Return the library for ``target``, made of a relocatable kernel and the run-time half.

    ``header`` is the layer's C header, whose constants ``layer.c`` has for ``runtime.c``, ``kernel`` the kernel's
    symbol. Raises what `link_library` raises.
    """
    common = [_HERE / name for name in ("runtime.c", "layer.h")]
    own = {HEADER: header, "layer.c": (_HERE / "layer.c").read_text()}
    return link_library(common, own, [object_code], (kernel, *EXPORTS), target)


def link_library(
    common: Sequence[Path], own: Mapping[str, str], objects: Sequence[bytes], exports: Sequence[str], target: Target
) -> bytes:
    """Return the library for ``target`` of C files and relocatable ``objects``, which shows ``exports`` alone.

    ``common`` are a C file and its headers, the same in every library: it is compiled once in this process. ``own``
    are the texts of this library, by file name, which may include those headers. Raises `EngineError` when no linker
    is there for this target, or when it fails, with its own words.
    """
    linker = tuple(linker_for(target))
    shared = {path.name: path.read_text() for path in (*common, *_SHARED)}
    kernels = {f"kernel{number}.o": code for number, code in enumerate(objects)}
    listed, flags = (_for_mach_o if target.system == "darwin" else _for_elf)(exports)
    files: dict[str, str | bytes] = {**shared, **own, **kernels, _EXPORTS: listed, _TARGET: _words(target)}
    files[_COMMON] = _compiled(linker, tuple(shared.items()), target)
    linked = [*(name for name in (*own, _TARGET) if name.endswith(".c")), _COMMON, *kernels]
    return _made([*linker, *_COMPILE, "-shared", *linked, "-o", _MADE, *flags], files, target)


def _words(target: Target) -> str:
    """What ``processor.h`` reads of ``target``, in C."""
    name, features = json.dumps(target.name), json.dumps(" ".join(target.features))
    return f"const char target_name[] = {name}, target_features[] = {features};\n"


@lru_cache(maxsize=16)
def _compiled(linker: tuple[str, ...], sources: tuple[tuple[str, str], ...], target: Target) -> bytes:
    """Return the object of the C files among ``sources``, which are names and texts."""
    named = [name for name, _ in sources if name.endswith(".c")]
    return _made([*linker, *_COMPILE, "-c", *named, "-o", _MADE], dict(sources), target)


def _made(command: Sequence[str], files: Mapping[str, str | bytes], target: Target) -> bytes:
    """Return what ``command`` makes of ``files``, which lie beside it by name: no path of this machine gets into it."""
    with scratch() as folder:
        for file, content in files.items():
            (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        except OSError as error:
            raise EngineError(f"the linker {command[0]!r} cannot be started: {error.strerror}; set CC to one") from None
        if done.returncode:
            raise EngineError(
                f"linking for {target.name} failed: {shlex.join(command)} ended with status {done.returncode}:\n"
                f"{done.stderr.strip()}"
            )
        if not (folder / _MADE).exists():
            raise EngineError(
                f"the linker {command[0]!r} wrote nothing, and reported no error; set CC to one that does"
            )
        return (folder / _MADE).read_bytes()


def linker_for(target: Target) -> list[str]:
    """Return the command that compiles C and links for ``target``, without its arguments."""
    if (target.architecture, target.system) == host():
        if command := command_in("CC"):
            return command
        for name in ("cc", "gcc", "clang"):
            if shutil.which(name):
                return [name]
        missing = "no C compiler (cc, gcc or clang) is on PATH and CC is not set"
    else:
        missing = f"this machine's C compiler cannot link for {target.name} ({target.architecture} {target.system})"
    if importlib.util.find_spec("ziglang") is None:
        raise EngineError(f"{missing}; install the package ziglang (pip install 'opcompile[cross]'), which can")
    system = "macos" if target.system == "darwin" else f"linux-gnu.{_OLDEST_GLIBC}"
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{target.architecture}-{system}"]


def _for_elf(exports: Sequence[str]) -> tuple[str, list[str]]:
    """Export the entries alone, stay loaded (threads may be in the code), leave no symbol open.

    The kernel's symbol is the same in every library: each calls its own, whatever the process has loaded before.
    Nothing for a debugger: the C library's own objects have the paths of their sources.
    """
    listed = f"{{ global: {' '.join(f'{name};' for name in exports)} local: *; }};\n"
    flags = (
        f"--version-script={_EXPORTS}",
        "-z,nodelete",
        "-z,noexecstack",
        "-z,defs",
        "-Bsymbolic",
        "--build-id=none",
        "--strip-debug",
    )
    return listed, [*(f"-Wl,{flag}" for flag in flags), "-lm", "-lpthread", "-ldl"]


def _for_mach_o(exports: Sequence[str]) -> tuple[str, list[str]]:
    """Do the same for macOS, whose C library holds all three, and where the code pins itself (``runtime.c``)."""
    return "".join(f"_{name}\n" for name in exports), [f"-Wl,-exported_symbols_list,{_EXPORTS}"]
