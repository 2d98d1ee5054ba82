"""GPU code on the CPU: emitted CUDA C or Metal, compiled as C++ and run with one fiber for each GPU thread.

An artifact for another CPU is opened here as well, and runs in an emulated one (`opcompile.emulate`).

It shows that a kernel computes what it should, and finds what a GPU would do in silence: an access beyond a
buffer (guarded pages) or an array, a write to an input, a read of shared memory that nobody has written (it is
poisoned), a barrier that some threads miss, and races: every run is done twice, with the threads and blocks in
opposite orders, and two results that differ in one bit are a race. It cannot show speed, that a GPU's own
compiler accepts the text, or a race that both orders happen to resolve alike.

Neither TVM nor a GPU is needed: a C++17 compiler is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opcompile.emulate import Emulator, require_emulated
from opcompile.errors import ArtifactError, CallError, EngineError, TargetError, VerificationError
from opcompile.golden import Golden, read_golden
from opcompile.gpus import is_gpu
from opcompile.gradients.gradient import Gradient
from opcompile.launch import LAUNCH, SOURCES, Launch, shared_arrays
from opcompile.machine import command_in
from opcompile.manifest import opened, own_weights, parse_manifest, read_manifest
from opcompile.packing import Packing
from opcompile.spec import ConvTranspose3d, at_batch, fits
from opcompile.target import cores
from opcompile.tensors import sizes_text

if TYPE_CHECKING:
    from opcompile.gradients.simulate import SimulatedGradient

_HEADERS = Path(__file__).with_name("simulator")
_FLAGS = ("-std=c++17", "-Og", "-w", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-ffp-contract=off")
# An index beyond an array, or a vector that is not aligned, ends the program; the two compilers spell it differently.
_BOUNDS = ("-fsanitize=bounds,alignment", "-fsanitize-undefined-trap-on-error")
# To look through the library of C++, of which nothing is called, takes a quarter of the time.
_LIBRARIES = ("-nodefaultlibs", "-lm", "-lc", "-lgcc") if sys.platform == "linux" else ("-lm",)
_FAULTS = {65: "an access out of bounds", 66: "a divergent barrier"}
_TOO_SMALL_FOR_TWO = 4


class Simulator:
    """One kernel, ready to run: ``source`` in ``language`` (``cuda`` or ``metal``), started as ``launch`` says."""

    instead = ("a GPU", "the kernel's text ran on the CPU, a fiber for each GPU thread")

    def __init__(self, source: str, language: str, launch: Launch) -> None:
        self.source, self.language, self.launch = source, language, launch
        self._folder = tempfile.mkdtemp(prefix="opcompile-simulate-")
        weakref.finalize(self, shutil.rmtree, self._folder, True)

    def run(self, inputs: Mapping[str, NDArray[Any]], y: NDArray[Any], batch: int) -> None:
        """Fill ``y``, contiguous, from the ``inputs`` that the launch names, W packed.

        Raises `VerificationError` for anything that is wrong with the kernel, and `EngineError` where there is
        no C++ compiler.
        """
        first, second = (self._ordered(inputs, y, batch, backwards) for backwards in (False, True))
        if first != second:
            places = np.flatnonzero(np.frombuffer(first, np.uint8) != np.frombuffer(second, np.uint8)) // y.itemsize
            raise VerificationError(
                f"{self.launch.kernel}: a race: {len(set(places.tolist()))} of {y.size} outputs depend on the order of "
                f"the threads, the first at flat index {places[0]}"
            )
        y.reshape(-1).view(np.uint8)[:] = np.frombuffer(first, np.uint8)

    def _ordered(self, inputs: Mapping[str, NDArray[Any]], y: NDArray[Any], batch: int, backwards: bool) -> bytes:
        """Run with buffers at the upper end of their pages, or, ``backwards``, at the lower."""
        program, result = self._program, self.launch.result
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            words = [str(n) for n in (self.launch.grid(batch), 1, 1, *self.launch.block)]
            words += [str(int(backwards)), str(int(not backwards)), str(self._workers(batch))]
            for argument in self.launch.arguments:
                if argument == "batch":
                    continue
                path = Path(name) / argument
                written = argument == result
                # it begins as NaN: what is not written shows
                content = b"\xff" * y.nbytes if written else np.ascontiguousarray(inputs[argument]).tobytes()
                path.write_bytes(content)
                words += [argument, str(path), str(len(content)), "w" if written else "r"]
            environment = {**os.environ, "SIMULATED_BATCH": str(batch)}
            done = subprocess.run([program, *words], capture_output=True, text=True, check=False, env=environment)
            if done.returncode in _FAULTS:
                raise VerificationError(f"{self.launch.kernel}: {_FAULTS[done.returncode]}: {done.stderr.strip()}")
            if done.returncode:
                raise EngineError(f"the simulation ended with status {done.returncode}: {done.stderr.strip()}")
            return (Path(name) / result).read_bytes()

    def _workers(self, batch: int) -> int:
        return cores() if self.launch.grid(batch) >= _TOO_SMALL_FOR_TWO else 1

    @cached_property
    def _program(self) -> str:
        """Compile, once; the program lives as long as this object."""
        text = translated(self.source, self.language, self.launch)
        path = Path(self._folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        path.with_suffix(".cpp").write_text(text)
        command = [*_compiler(), *_FLAGS, *_BOUNDS, f"-I{_HEADERS}", f"{path}.cpp", "-o", str(path), *_LIBRARIES]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise EngineError(f"the compiler {command[0]!r} cannot be started: {error.strerror}; set CXX") from None
        if done.returncode:
            raise EngineError(
                f"{shlex.join(command)} ended with status {done.returncode}; set CXX to a compiler of C++:\n"
                f"{done.stderr[:2000]}"
            )
        return str(path)


def _compiler() -> list[str]:
    if command := command_in("CXX"):
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    raise EngineError(
        "simulating GPU code needs a C++ compiler: no c++, g++ or clang++ is on PATH and CXX is not set; "
        "install one, or the package ziglang (pip install 'opcompile[cross]')"
    )


# --- an artifact ---


def simulated(path: str | os.PathLike[str]) -> Simulated | SimulatedGradient:
    """Open the artifact in ``path``, for a GPU or an arm64, whatever it computes. Raises as `Simulated` does."""
    from opcompile.gradients.simulate import SimulatedGradient  # it is made of what is here

    directory = Path(path).absolute()
    derivative = parse_manifest(read_manifest(directory), directory)["derivative"]
    return SimulatedGradient(directory) if derivative else Simulated(directory)


def opened_simulator(
    path: str | os.PathLike[str], *, derivative: bool = False
) -> tuple[Path, dict[str, Any], Simulator | Emulator]:
    """Return the directory of a layer's or a derivative's artifact, its manifest, and its kernel ready to run.

    Raises `ArtifactError`, also where it is the other of the two, `TargetError` for a CPU that is not emulated, and
    `EngineError` where what emulates is missing.
    """
    directory, manifest = opened(path)
    name, held = manifest["target"]["name"], manifest["derivative"]
    if bool(held) != derivative:
        what = f"the derivative d{held}" if held else "the layer itself, no derivative"
        raise ArtifactError(f"{path} holds {what}; opcompile.simulate.simulated opens either")
    if not is_gpu(name):
        try:
            require_emulated(manifest["target"]["architecture"])
        except TargetError as error:
            way_out = "load it on such a machine (`opcompile verify` without --simulate)"
            raise TargetError(f"{path} was compiled for {name}, and {error}; {way_out}") from None
        pointers = Gradient(ConvTranspose3d.parse(manifest["spec"]), held).pointers if held else ("x", "w", "b")
        library, features = directory / manifest["library"], manifest["target"]["features"]
        return directory, manifest, Emulator(library, features, pointers)
    language = name.partition(":")[0]
    try:
        source, launch = ((directory / file).read_text() for file in (SOURCES[language], LAUNCH))
    except OSError as error:
        raise ArtifactError(f"{error.filename} cannot be read: {error.strerror}; compile the layer again") from error
    return directory, manifest, Simulator(source, language, Launch.from_json(launch))


class Simulated:
    """An artifact for a GPU or an arm64, run on this CPU: called as `opcompile.runtime.Artifact` is, with NumPy's."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the artifact in directory ``path``. Raises as `opened_simulator` does."""
        self.directory, self.manifest, self.simulator = opened_simulator(path)
        self.spec = ConvTranspose3d.parse(self.manifest["spec"])
        self.packing = Packing.from_json(self.manifest["packing"])
        self._own = own_weights(self.directory, self.manifest)

    def __call__(self, x: NDArray[Any], w: NDArray[Any] | None = None, b: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return Y. ``w`` is canonical; it and ``b`` are left out where they were known at compile time.

        Raises `CallError` for arrays that do not fit, `VerificationError` for what is wrong with the kernel.
        """
        own = {name.lower(): array for name, array in self._own.items()}
        shapes = {"x": self.spec.x_shape, "w": self.spec.w_shape, "b": (self.spec.channels_out,)}
        inputs: dict[str, NDArray[Any]] = {}
        for name, array in (("x", x), ("w", w), ("b", b)):
            if array is None:
                if name in own:
                    inputs[name] = own[name]
                elif name != "b" or self.spec.bias:
                    raise CallError(f"{name} is missing: this layer was compiled without it")
                continue
            if not isinstance(array, np.ndarray):
                raise CallError(f"{name} is of type {type(array).__name__}; pass a NumPy array")
            if not fits(array.shape, shapes[name]) or array.dtype.name != self.spec.dtype:
                raise CallError(
                    f"{name} is {array.dtype} {array.shape}, but this layer needs {self.spec.dtype} "
                    f"{sizes_text(shapes[name])}"
                )
            inputs[name] = self.packing(array) if name == "w" else array
        y = np.empty(at_batch(self.spec.y_shape, x.shape[0]), x.dtype)
        self.simulator.run(inputs, y, x.shape[0])
        return y

    def golden(self) -> Golden:
        """Return the test vector in the artifact."""
        return read_golden(self.directory, self.manifest, self.spec, "W" in self._own, "B" in self._own)


# --- from the emitted text to a C++ program ---


def translated(source: str, language: str, launch: Launch) -> str:
    """Return the C++ program that runs ``launch`` of the kernel in ``source``."""
    text = _cuda(source) if language == "cuda" else source.replace("#include <metal_stdlib>", "")
    for number, array in enumerate(shared_arrays(text)):
        kind, name, count = array["type"], array["name"], array["count"]
        text = text.replace(
            array[0].lstrip("\n"),
            f'  auto &{name} = simulator::shared<{kind}[{count}]>({number}, "shared memory {name}");',
        )
    tensors = [name for name in launch.arguments if name != "batch"]
    passed = [f"({_pointer(source, name, launch)})arguments[{number}]" for number, name in enumerate(tensors)]
    if language == "metal":
        passed += [f"{launch.kernel}_args_t{{batch}}"] if "batch" in launch.arguments else []
        passed += [_index(source, name, place) for name, place in _PLACES.items()]
        text = text.replace("constant " + launch.kernel + "_args_t&", f"{launch.kernel}_args_t")
    elif "batch" in launch.arguments:
        passed.append("batch")
    return (
        f'#include "{language}.h"\n{text}\n'
        "static char *arguments[8];\nstatic long batch;\n"
        f"static void call() {{ {launch.kernel}({', '.join(passed)}); }}\n"
        "int main(int count, char **words) {\n"
        '  batch = atol(getenv("SIMULATED_BATCH"));\n  simulator::body = call;\n'
        "  return simulator::simulate(count, words, arguments);\n}\n"
    )


# Metal's parameters for where a thread is, and what they are to the simulator.
_PLACES = {"blockIdx": "simulator::block", "threadIdx": "simulator::current->at"}


def _index(source: str, name: str, place: str) -> str:
    """Return the argument for an index of Metal, which has as many dimensions as the launch needs."""
    found = re.search(rf"(uint[23]?) {name} \[\[", source)
    dimensions = int(found[1].removeprefix("uint") or 1) if found else 1
    words = ", ".join(f"{place}.{axis}" for axis in "xyz"[:dimensions])
    return words if dimensions == 1 else f"uint{dimensions}{{{words}}}"


# A function of ours that stands before a kernel.
_FUNCTION = re.compile(r"^(?:template <[^<>]*>\s)?static __device__ __forceinline__ \w+ opcompile_", re.M)
_END = re.compile(r"^\}\n", re.M)
# One that is an instruction of PTX, which the simulator's header has as well.
_PTX = re.compile(
    r"^static __device__ __forceinline__ \w+ opcompile_\w+\([^{}]*\) \{\n(?:#if .*\n)?  asm (?s:.*?)^\}\n", re.M
)


def _cuda(source: str) -> str:
    """Keep the kernel, and functions of ours: the simulator's header stands for TVM's preamble."""
    kernel, ours = source.index('extern "C" __global__'), _FUNCTION.search(source)
    end = _END.search(source, kernel)
    text = source[ours.start() if ours else kernel : end.end() if end else None]
    return _PTX.sub("", text).replace('extern "C" ', "")


def _pointer(source: str, argument: str, launch: Launch) -> str:
    """Return the type of a kernel's argument."""
    name = "output" if argument == launch.result else argument.upper()
    found = re.search(rf"(\w+)\s*\*\s*(?:__restrict__\s+)?{name}_ptr", source)
    if found is None:
        raise AssertionError(f"the kernel has no parameter {name}_ptr")
    return f"{found[1]} *"
