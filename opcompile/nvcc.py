"""The text of a CUDA kernel and its host half -> one shared library that needs `apache-tvm-ffi` and the driver.

``nvcc`` is the system's, or that of NVIDIA's packages on PyPI. No GPU is needed: code is made for the named
architectures, and for later ones as PTX, which the driver translates when it first loads it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from opcompile.errors import EngineError, KernelError
from opcompile.gpus import GpuTarget
from opcompile.machine import command_in
from opcompile.paths import scratch

_FLAGS = ("-w", "-std=c++17", "-O2", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC")


def nvcc(kernel: str, host: str, target: GpuTarget) -> bytes:
    """Return the library of a kernel and its host half, in C++, for the architectures of ``target``.

    Raises `EngineError` without nvcc, or where it cannot compile at all, and `KernelError` with its words.
    """
    compiler, home = _nvcc(), _tvm_ffi()
    with scratch() as folder:
        # plain names, so that no path of this machine gets into the library
        (folder / "kernel.cu").write_text(kernel)
        (folder / "host.cpp").write_text(host)
        command = [*compiler, *_FLAGS, *_codes(target), f"-I{home / 'include'}", "kernel.cu", "host.cpp"]
        command += ["-o", "library.so"]
        command += [f"-L{home / 'lib'}", "-ltvm_ffi"]
        environment = {**os.environ, "PATH": f"{Path(compiler[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
        except OSError as error:
            raise EngineError(
                f"{compiler[0]} cannot be started: {error.strerror}; set NVCC to the CUDA compiler"
            ) from None
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            hint = _hint(said)
            refused = EngineError if hint or "nvcc fatal" in said else KernelError
            raise refused(f"{shlex.join(command)} ended with status {done.returncode}:\n{said[:4000]}{hint}")
        return (folder / "library.so").read_bytes()


def nvcc_version() -> str:
    """Return nvcc's version, like ``13.0.48``. Raises `EngineError` without nvcc."""
    compiler = _nvcc()
    try:
        said = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise EngineError(f"{compiler[0]} cannot be started: {error.strerror}; set NVCC to the CUDA compiler") from None
    found = re.search(r"\bV(\d[\d.]*)", said)
    return found[1] if found else said.strip()[-80:]


def _codes(target: GpuTarget) -> list[str]:
    """Ask for machine code of every architecture, and for PTX of the last."""
    numbers = [arch.removeprefix("sm_") for arch in target.archs]
    codes = [f"arch=compute_{n},code=sm_{n}" for n in numbers]
    return [
        word
        for code in (*codes, f"arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
        for word in ("-gencode", code)
    ]


def _nvcc() -> list[str]:
    if command := command_in("NVCC"):
        return command
    found = shutil.which("nvcc")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [Path(home) / "bin" / "nvcc" for home in homes]
    spec = importlib.util.find_spec("nvidia")
    for packages in spec.submodule_search_locations or () if spec else ():
        places += sorted(Path(packages).glob("*/bin/nvcc"))
    for place in places:
        if found is None and place.is_file():
            found = str(place)
    if found is None:
        raise EngineError(
            "building for CUDA needs nvcc, and none is on PATH, in CUDA_HOME or among the installed packages; "
            "install NVIDIA's from PyPI (pip install 'opcompile[cuda]'), or the CUDA toolkit, or set NVCC"
        )
    return [found]


def _tvm_ffi() -> Path:
    """Return the directory of the `apache-tvm-ffi` package: its headers and its library are what the code needs."""
    spec = importlib.util.find_spec("tvm_ffi")
    if spec is None or spec.origin is None:
        raise EngineError("building for CUDA needs the package apache-tvm-ffi; install it")
    return Path(spec.origin).parent


def _hint(said: str) -> str:
    if "nv/target" in said:
        return "\nthe headers of CCCL are missing; pip install nvidia-cuda-cccl"
    if "Unsupported gpu architecture" in said:
        return "\nthis nvcc does not know the architecture; install one that does, or name another target"
    return ""
