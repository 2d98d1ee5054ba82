"""Named GPUs: what to compile for, what a kernel must not exceed there, and what a schedule reasons with.

A CUDA name is a compute capability, a Metal name a generation of Apple's chips. Both stand for a family of
devices; the numbers that rank schedules are those of one typical member, which the table names. A name may end in
flags, ``cuda:sm_80+tf32``: what is compiled only for those who ask for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from opcompile.errors import UnknownTargetError
from opcompile.meant import meant

if TYPE_CHECKING:
    from schedules.matrix import Unit

Language = Literal["cuda", "metal"]

_KIB = 1024


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device.

    What a kernel must keep to: ``threads`` of a block, bytes of ``shared`` memory that a block declares,
    ``registers`` of a thread. What ranks schedules: ``processors`` (streaming multiprocessors, cores), each with
    ``lanes`` multiply-adds a cycle, ``register_file`` 32-bit registers, ``shared_file`` bytes of shared memory and room
    for ``resident`` threads;
    ``clock_ghz``; ``bandwidth_gbs`` of device memory, in GB/s. ``warp`` threads run in step. A processor's tensor
    cores do ``matrix`` multiply-adds a cycle of 16 bits, summing in float32, for factors of ``matrix_types``: as warps'
    matrix instructions reach them. Where that is no more than ``lanes``, the same units do both. Values of ``widened``
    types are held as float32, for the device has none of theirs. With ``ahead`` kernels may fetch the next chunk while
    they multiply one.
    """

    example: str
    processors: int
    lanes: int
    clock_ghz: float
    bandwidth_gbs: float
    resident: int
    matrix: int = 0
    matrix_types: tuple[str, ...] = ()
    threads: int = 1024
    shared: int = 48 * _KIB
    shared_file: int = 100 * _KIB
    registers: int = 255
    register_file: int = 65536
    warp: int = 32
    widened: tuple[str, ...] = ()
    ahead: bool = True


@dataclass(frozen=True, slots=True)
class Flag:
    """What a name may add for ``language``: matrix instructions for factors of ``dtypes`` too.

    ``least`` is the compute capability that it needs.
    """

    language: Language
    dtypes: tuple[str, ...]
    least: tuple[int, int] = (0, 0)


# What CPUs may add (`opcompile.target`).
BF16 = "bf16"

# By default float32 is multiplied as float32, and kernels for Metal use nothing whose rounding Apple does not document.
FLAGS: dict[str, Flag] = {
    "simdgroup": Flag("metal", ("float16", "float32")),
    "tf32": Flag("cuda", ("float32",), (8, 0)),
}


@dataclass(frozen=True, slots=True)
class GpuTarget:
    """A named GPU: ``language`` of its kernels, ``archs`` as its compiler calls it, ``flags`` of `FLAGS`.

    Several architectures are one library for all of them; the first chooses the tiles.
    """

    name: str
    language: Language
    archs: tuple[str, ...]
    gpu: Gpu
    flags: tuple[str, ...] = ()

    @property
    def machine(self) -> str:
        """The name that results are recorded under: what chooses the tiles, which is the first architecture."""
        return "+".join([f"{self.language}:{self.archs[0]}", *self.flags])

    def unit(self, dtype: str) -> Unit:
        """Return what multiplies matrices of ``dtype``, where the family ``matrix`` does."""
        if self.language == "metal":
            return "simdgroup"
        return "tf32" if dtype == "float32" else "mma"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The element types that kernels for it can have."""
        every = ("float32", "float16", "bfloat16", "float64")
        return every if self.language == "cuda" else every[:2]

    def fields(self) -> dict[str, object]:
        """Return what an artifact's manifest says of its target; its ``architecture`` is no CPU's: none loads it."""
        return {
            "name": self.name,
            "architecture": self.language,
            "system": "linux" if self.language == "cuda" else "darwin",
            "features": list(self.flags),
            "archs": list(self.archs),
            "example": self.gpu.example,
            "most_threads": self.gpu.threads,
            "most_shared_bytes": self.gpu.shared,
        }

    def tvm(self) -> dict[str, object]:
        """The configuration that ``tvm.target.Target`` takes."""
        if self.language == "cuda":
            return {"kind": "cuda", "arch": self.archs[0], "host": "cuda_host"}
        return {
            "kind": "metal",
            "max_threads_per_block": self.gpu.threads,
            "max_num_threads": self.gpu.threads,
            "max_shared_memory_per_block": self.gpu.shared,
            "thread_warp_size": self.gpu.warp,
            "host": {"kind": "llvm", "mtriple": "arm64-apple-macos"},
        }


def _apple(example: str, processors: int, clock_ghz: float, bandwidth_gbs: float) -> Gpu:
    # Apple documents threads and threadgroup memory. Beyond 128 registers compilers were seen to spill.
    # Matrices are multiplied by the units that multiply everything else. Where its compiler puts loads is not known.
    return Gpu(
        example,
        processors,
        128,
        clock_ghz,
        bandwidth_gbs,
        1024,
        matrix=128,
        shared=32 * _KIB,
        shared_file=60 * _KIB,
        registers=128,
        ahead=False,
    )


_HALVES = ("float16", "bfloat16")

# 48 KiB is what a block may declare everywhere; more must be asked for at the launch.
_GPUS: dict[str, tuple[Language, Gpu]] = {
    "cuda:sm_75": (
        "cuda",
        Gpu("T4", 40, 64, 1.59, 320, 1024, 512, ("float16",), shared_file=64 * _KIB, widened=("bfloat16",)),
    ),
    "cuda:sm_80": ("cuda", Gpu("A100", 108, 64, 1.41, 1555, 2048, 1024, _HALVES, shared_file=164 * _KIB)),
    "cuda:sm_86": ("cuda", Gpu("RTX 3090", 82, 128, 1.70, 936, 1536, 256, _HALVES)),
    "cuda:sm_89": ("cuda", Gpu("RTX 4090", 128, 128, 2.52, 1008, 1536, 256, _HALVES)),
    "cuda:sm_90": ("cuda", Gpu("H100", 132, 128, 1.83, 3350, 2048, 1024, _HALVES, shared_file=228 * _KIB)),
    "cuda:sm_100": ("cuda", Gpu("B200", 148, 128, 1.85, 8000, 2048, 1024, _HALVES, shared_file=228 * _KIB)),
    "cuda:sm_120": ("cuda", Gpu("RTX 5090", 170, 128, 2.41, 1792, 1536, 256, _HALVES)),
    "metal:apple-m1": ("metal", _apple("M1", 8, 1.28, 68)),
    "metal:apple-m2": ("metal", _apple("M2", 10, 1.40, 100)),
    "metal:apple-m3": ("metal", _apple("M3", 10, 1.38, 100)),
    "metal:apple-m4": ("metal", _apple("M4", 10, 1.47, 120)),
}


def capability(arch: str) -> tuple[int, int]:
    """Return what ``sm_90`` stands for: compute capability (9, 0)."""
    number = int(arch.removeprefix("sm_"))
    return number // 10, number % 10


def runs_on(archs: Sequence[str], device: tuple[int, int]) -> bool:
    """Whether a library for ``archs`` runs on a GPU of compute capability ``device``.

    Machine code runs on the same major capability from its own minor one; PTX, of the last architecture, on every
    later GPU.
    """
    known = [capability(arch) for arch in archs]
    return device >= known[-1] or any(device[0] == major and device[1] >= minor for major, minor in known)


def suited(device: tuple[int, int]) -> str | None:
    """Return the latest known architecture whose code runs on a GPU of compute capability ``device``; None without."""
    archs = [name.removeprefix("cuda:") for name in _GPUS if name.startswith("cuda:")]
    return max((arch for arch in archs if capability(arch) <= device), key=capability, default=None)


def gpu_names() -> list[str]:
    """Every name of a GPU."""
    return list(_GPUS)


def gpu_examples() -> dict[str, str]:
    """What a device is called by those who sell it, and its name here."""
    return {gpu.example: name for name, (_, gpu) in _GPUS.items()}


def is_gpu(name: str) -> bool:
    """Whether ``name`` is meant for a GPU, known or not."""
    return str(name).partition(":")[0] in ("cuda", "metal")


def gpu_target(name: str) -> GpuTarget:
    """Look a GPU up; ``cuda:sm_80+sm_90`` is a library for both, and `FLAGS` come last.

    Raises `UnknownTargetError`, listing the names there are.
    """
    language, _, rest = name.partition(":")
    parts = rest.split("+")
    flags = tuple(sorted({part for part in parts if part in FLAGS}))
    devices = list(dict.fromkeys(part for part in parts if part not in FLAGS))
    members = [f"{language}:{device}" for device in devices]
    _require_of_its_kind(name, language, devices)
    if not members or not all(member in _GPUS for member in members):
        several = f"several CUDA ones are joined like cuda:sm_80+sm_90, and flags added: {', '.join(_flagged())}"
        hint = _meant(name, language, devices)
        raise UnknownTargetError(f"target {name!r} is unknown; {hint}use one of {', '.join(_GPUS)}; {several}")
    kind, gpu = _GPUS[members[0]]
    # one text for all of them
    types = tuple(t for t in gpu.matrix_types if all(t in _GPUS[member][1].matrix_types for member in members))
    for flag in flags:
        _require(name, flag, kind, devices)
        types += FLAGS[flag].dtypes
    canonical = f"{language}:{'+'.join([*devices, *flags])}"
    return GpuTarget(canonical, kind, tuple(devices), replace(gpu, matrix_types=types), flags)


def _meant(name: str, language: str, devices: Sequence[str]) -> str:
    """Say what ``name`` may stand for: of several parts, the first of ``devices`` that is none."""
    strange = next((device for device in devices if f"{language}:{device}" not in _GPUS), "")
    if language == "cuda" and (hint := meant_capability(strange)):
        return hint
    if "+" in name and strange:
        return meant(strange, [*_GPUS, *FLAGS], gpu_examples())
    return meant(name, _GPUS, gpu_examples())


_CAPABILITY = re.compile(r"(?:sm|compute)_?(\d{2,3})[a-z]?", re.I)


def meant_capability(word: str, after: str = "") -> str:
    """Say which target runs on the compute capability that ``word`` spells; nothing where it spells none.

    ``after`` follows the name, as in `opcompile.meant.meant`.
    """
    if not (found := _CAPABILITY.fullmatch(word)):
        return ""
    arch = suited(capability(found[1]))
    if arch is None:
        return "none runs on a GPU that is earlier than compute capability 7.5; "
    return f"did you mean cuda:{arch}{after}? "


def _require_of_its_kind(name: str, language: str, devices: Sequence[str]) -> None:
    """Raise `UnknownTargetError` for a part that other targets have, and for several GPUs of Metal."""
    if BF16 in devices:
        raise UnknownTargetError(f"target {name!r}: +{BF16} is for llvm targets alone; leave it out")
    if language == "metal" and len(devices) > 1 and all(f"metal:{device}" in _GPUS for device in devices):
        raise UnknownTargetError(
            f"target {name!r}: a library for Metal is for one GPU, and {' and '.join(devices)} are {len(devices)}; "
            "compile for each of them"
        )


def _flagged() -> list[str]:
    return [f"+{flag} ({FLAGS[flag].language})" for flag in FLAGS]


def _require(name: str, flag: str, language: Language, devices: Sequence[str]) -> None:
    """Raise `UnknownTargetError` for a ``flag`` that is not for all of the ``devices``."""
    rule = FLAGS[flag]
    if language != rule.language:
        raise UnknownTargetError(f"target {name!r}: +{flag} is for {rule.language} targets alone; leave it out")
    early = [device for device in devices if rule.least > (0, 0) and capability(device) < rule.least]
    if early:
        least = ".".join(map(str, rule.least))
        raise UnknownTargetError(
            f"target {name!r}: +{flag} needs compute capability {least} or later, and {early[0]} is earlier; leave one "
            "of them out"
        )
