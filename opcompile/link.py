"""Kernel objects + C sources -> one shared library that needs the C library alone.

The system's ``cc`` (or ``$CC``) links for this kind of machine; the ``ziglang`` package brings a
compiler and the C libraries of the others, and stands in for ``cc`` where there is none.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from opcompile.errors import EngineError
from opcompile.machine import command_in
from opcompile.runtime import EXPORTS, HEADER, KERNEL, host
from opcompile.target import Target

_HERE = Path(__file__).parent
# What every host of a kernel includes.
_SHARED = "kernel.h"
_COMPILE = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-fwrapv", "-shared")
# The oldest C library that both architectures have: what zig links runs on every later one.
_OLDEST_GLIBC = "2.17"


def link(object_code: bytes, header: str, target: Target, kernel: str = KERNEL) -> bytes:
    """Return the library for ``target``, made of a relocatable kernel and the run-time half.

    ``header`` is the layer's C header, which ``runtime.c`` includes, ``kernel`` the kernel's symbol. Raises what
    `link_library` raises.
    """
    sources = {HEADER: header, "runtime.c": (_HERE / "runtime.c").read_text()}
    return link_library(sources, [object_code], (kernel, *EXPORTS), target)


def link_library(sources: Mapping[str, str], objects: Sequence[bytes], exports: Sequence[str], target: Target) -> bytes:
    """Return the library for ``target`` of C files and relocatable ``objects``, which shows ``exports`` alone.

    ``sources`` are texts by file name; ``kernel.h`` is put beside them, and ``.c`` files are compiled.
    Raises `EngineError` when no linker is there for this target, or when it fails, with its own words.
    """
    with tempfile.TemporaryDirectory(prefix="opcompile-") as name:
        folder = Path(name)
        # texts, so that no path of this machine gets into the library
        for file, text in {_SHARED: (_HERE / _SHARED).read_text(), **sources}.items():
            (folder / file).write_text(text)
        linked = [file for file in sources if file.endswith(".c")]
        for number, code in enumerate(objects):
            linked.append(f"kernel{number}.o")
            (folder / linked[-1]).write_bytes(code)
        command = [*_linker(target), *_COMPILE, "-I.", *linked, "-o", "library"]
        command += (_for_mach_o if target.system == "darwin" else _for_elf)(folder, exports)
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        except OSError as error:
            raise EngineError(f"the linker {command[0]!r} cannot be started: {error.strerror}; set CC to one") from None
        if done.returncode:
            raise EngineError(
                f"linking for {target.name} failed: {shlex.join(command)} ended with status {done.returncode}:\n"
                f"{done.stderr.strip()}"
            )
        return (folder / "library").read_bytes()


def _linker(target: Target) -> list[str]:
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


def _for_elf(folder: Path, exports: Sequence[str]) -> list[str]:
    """Export the entries alone, stay loaded (threads may be in the code), leave no symbol open."""
    (folder / "exports").write_text(f"{{ global: {' '.join(f'{name};' for name in exports)} local: *; }};\n")
    flags = ("--version-script=exports", "-z,nodelete", "-z,noexecstack", "-z,defs", "--build-id=none")
    return [*(f"-Wl,{flag}" for flag in flags), "-lm", "-lpthread", "-ldl"]


def _for_mach_o(folder: Path, exports: Sequence[str]) -> list[str]:
    """Do the same for macOS, whose C library holds all three, and where the code pins itself (``runtime.c``)."""
    (folder / "exports").write_text("".join(f"_{name}\n" for name in exports))
    return ["-Wl,-exported_symbols_list,exports"]
