"""Named machines: what to compile for, and the few numbers a schedule reasons with.

``llvm`` is this machine; ``llvm:<name>`` is a processor by name, which need not be at hand. A name
stands for an instruction set, so that an artifact built for it runs on every processor that has it.
It may end in a flag, ``llvm:znver4+bf16``: what is compiled only for those who ask for it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from opcompile.errors import TargetError, UnknownTargetError
from opcompile.gpus import BF16, FLAGS, GpuTarget, gpu_examples, gpu_names, gpu_target, is_gpu, meant_capability
from opcompile.meant import meant


@dataclass(frozen=True, slots=True)
class Machine:
    """What a schedule's arithmetic needs to know of a processor.

    ``vector_bytes`` is the width of a vector register, ``registers`` their number, ``fma_in_flight`` how many
    multiply-adds hide the latency of one (latency times units), ``l1_bytes`` and ``l2_bytes`` the caches of one core,
    ``cores`` how many cores a layer should keep busy, ``fma_units`` how many vectors are multiplied and added in one
    cycle. ``pairs``: whether kernels may multiply bfloat16 as it is, two channels by one instruction. ``streams``: of
    how many bytes on Y is written past the caches; ``stretch``: of rows that are no whole cache lines, how many bytes
    at least are put together for that; 0: never. ``loading``: how many cycles a load takes from the multiply-adds
    beside it, as measured; ``overhead``: how many times as long as on most cores takes what is neither: copies, sums
    that leave registers, rows woven, waits for weights. ``settling``: cycles until what was stored last can be read by
    vectors that begin elsewhere, for the stores before it come first. ``l2_rate``: how many bytes come from the second
    cache in a cycle where vectors are of channels. ``whole_planes``: whether a plane of X as it lies is copied as one
    long row, not row by row.
    """

    vector_bytes: int
    registers: int
    fma_in_flight: int
    l1_bytes: int
    l2_bytes: int
    cores: int = 8
    fma_units: int = 2
    pairs: bool = False
    streams: int = 0
    stretch: int = 0
    loading: float = 0.32
    overhead: float = 1.0
    settling: int = 250
    l2_rate: int = 17
    whole_planes: bool = False

    @property
    def halved(self) -> Machine | None:
        """The same machine with vectors half as wide and twice as many at a time, where it computes them in halves."""
        if self.vector_bytes != 64 or self.fma_units > 1:
            return None
        in_flight, loading = 2 * self.fma_in_flight, self.loading / 2
        return replace(self, vector_bytes=32, fma_in_flight=in_flight, fma_units=2, loading=loading)


@dataclass(frozen=True, slots=True)
class Target:
    """A named machine. ``features`` are the processor flags that compiled code will use.

    ``triple`` is LLVM's (architecture-vendor-system), ``mcpu`` its processor name, ``mattr`` what
    is changed from that processor's defaults. ``flags`` end its name.
    """

    name: str
    triple: str
    mcpu: str
    mattr: tuple[str, ...]
    features: tuple[str, ...]
    machine: Machine
    flags: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """``x86_64`` or ``aarch64``."""
        return self.triple.split("-")[0].replace("arm64", "aarch64")

    @property
    def system(self) -> str:
        """``linux`` or ``darwin``."""
        return "darwin" if "apple" in self.triple else "linux"

    @property
    def native(self) -> bool:
        """Whether code for this target runs on this machine."""
        return host() == (self.architecture, self.system) and not self.missing_features()

    def missing_features(self) -> tuple[str, ...]:
        """The flags that this target needs and this processor lacks."""
        if self.system != "linux":
            return ()
        present = processor_flags()
        return tuple(f for f in self.features if f not in present)

    def fields(self) -> dict[str, object]:
        """Return what an artifact's manifest says of its target."""
        return {
            "name": self.name,
            "triple": self.triple,
            "architecture": self.architecture,
            "system": self.system,
            "features": list(self.features),
        }

    def tvm(self) -> dict[str, object]:
        """The configuration that ``tvm.target.Target`` takes."""
        options = [_SLP, _LICM]
        if self.mcpu in _LIKE_SKYLAKE:
            options.append(_LATENCIES)
        config: dict[str, object] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.mcpu, "cl-opt": options}
        if self.mattr:
            config["mattr"] = list(self.mattr)
        return config


_V2 = ("cx16", "popcnt", "sse4_2", "ssse3")
_V3 = (*_V2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_ICELAKE = (*_V4, "avx512_vnni", "avx512_bitalg", "avx512_vbmi2", "avx512ifma", "avx512vbmi", "avx512_vpopcntdq")
_SAPPHIRE = (*_ICELAKE, "amx_bf16", "amx_int8", "amx_tile", "avx512_bf16", "avx512_fp16", "avx_vnni")
_ZEN4 = (*_ICELAKE, "avx512_bf16")
_ZEN5 = (*_ZEN4, "avx512_vp2intersect", "avx_vnni")

_KIB = 1024
# LLVM prefers 256-bit vectors on the first processors with AVX-512: they slowed down under wide ones.
# It also takes gathers and scatters for cheap, and would interleave short rows with them, three times slower.
_WIDE = ("-prefer-256-bit", "+prefer-no-gather", "+prefer-no-scatter")

# LLVM would compute the addresses of four loads as one vector, and take it apart, in the innermost
# loop: half the speed for a gain it puts at 2. What it gains in interleaving phases is far above 15.
_SLP = "-slp-threshold:int=15"
# Constants of an activation stay where Y is written: LLVM would load them before all loops, and keep them in registers
# that a register tile needs for its sums, which it then puts onto the stack in each turn.
_LICM = "-disable-machine-licm:bool=true"
# By the latencies of Skylake, which it takes for those of these names, LLVM loads what a turn multiplies last before
# its first product: 27 sums then have no registers left, and are read and written in each turn.
_LIKE_SKYLAKE = ("x86-64-v4", "skylake-avx512", "cascadelake", "icelake-server")
_LATENCIES = "-schedmodel:bool=false"


def _x86(
    mcpu: str, features: tuple[str, ...], l1: int, l2: int, *, fma_units: int = 2, loading: float = 0.16, **more: Any
) -> Callable[[str], Target]:
    vector_bytes, registers, fma_in_flight = (16, 16, 4)
    if "fma" in features:
        vector_bytes, registers, fma_in_flight = (32, 16, 8)
    if "avx512f" in features:
        vector_bytes, registers, fma_in_flight = (64, 32, 4 * fma_units)
    measured = {"fma_units": fma_units, "loading": loading * fma_units, "streams": 32 << 20, **more}
    machine = Machine(vector_bytes, registers, fma_in_flight, l1 * _KIB, l2 * _KIB, **measured)
    mattr = _WIDE if vector_bytes == 64 else ()
    return lambda name: Target(name, "x86_64-unknown-linux-gnu", mcpu, mattr, features, machine)


def _arm(
    mcpu: str, features: tuple[str, ...], l1: int, l2: int, fma_in_flight: int, apple: bool = False
) -> Callable[[str], Target]:
    triple = "arm64-apple-macos" if apple else "aarch64-unknown-linux-gnu"
    machine = Machine(16, 32, fma_in_flight, l1 * _KIB, l2 * _KIB)
    return lambda name: Target(name, triple, mcpu, (), features, machine)


_NEON = ("asimd",)
_ARM82 = ("asimd", "asimddp", "asimdhp", "atomics")

_NAMED: dict[str, Callable[[str], Target]] = {
    "x86-64-v2": _x86("x86-64-v2", _V2, 32, 256),
    "x86-64-v3": _x86("x86-64-v3", _V3, 32, 256),
    "x86-64-v4": _x86("x86-64-v4", _V4, 32, 1024),
    "haswell": _x86("haswell", _V3, 32, 256),
    "skylake-avx512": _x86("skylake-avx512", _V4, 32, 1024),
    "cascadelake": _x86("cascadelake", (*_V4, "avx512_vnni"), 32, 1024),
    "icelake-server": _x86("icelake-server", _ICELAKE, 48, 1280),
    "sapphirerapids": _x86("sapphirerapids", _SAPPHIRE, 48, 2048),
    "znver3": _x86("znver3", _V3, 32, 512, loading=0.22),
    # two halves of a vector of 64 bytes, each in a unit of its own
    "znver4": _x86("znver4", _ZEN4, 32, 1024, fma_units=1),
    "znver5": _x86(
        "znver5",
        _ZEN5,
        48,
        1024,
        loading=0.02,
        overhead=0.25,
        settling=40,
        l2_rate=28,
        whole_planes=True,
        streams=16 << 20,
        stretch=5 << 10,
    ),
    "aarch64": _arm("generic", _NEON, 32, 512, 8),
    "cortex-a72": _arm("cortex-a72", _NEON, 32, 512, 8),
    "cortex-a76": _arm("cortex-a76", _ARM82, 64, 512, 8),
    "neoverse-n1": _arm("neoverse-n1", _ARM82, 64, 1024, 8),
    "apple-m1": _arm("apple-m1", (), 128, 4096, 16, apple=True),
    "apple-m2": _arm("apple-m2", (), 128, 4096, 16, apple=True),
    "apple-m3": _arm("apple-m3", (), 128, 4096, 16, apple=True),
    "apple-m4": _arm("apple-m4", (), 128, 4096, 16, apple=True),
}


# What a generic name is on a family of AMD's processors.
_AMD = {("x86-64-v3", "25"): "znver3", ("x86-64-v4", "25"): "znver4", ("x86-64-v4", "26"): "znver5"}

# What the processor must list for the flag: an instruction that multiplies bfloat16.
_BF16_FEATURE = "avx512_bf16"
# A generic name that lacks the instruction, and takes it on where the flag asks for it.
_BF16_ADDED = {"x86-64-v4": "+avx512bf16"}


def target(name: str) -> Target:
    """Look a CPU up. Raises `UnknownTargetError`, listing the names there are, and `TargetError` for a GPU.

    ``llvm+bf16`` raises `TargetError` on a processor without the instruction.
    """
    if not isinstance(name, str):
        raise UnknownTargetError(f"target is of type {type(name).__name__}, but must be a str, like 'llvm'")
    base, *flags = name.split("+")
    is_cpu = base in names()
    if is_cpu and set(flags) == {BF16}:
        return _with_bf16(name, target(base), here=base == "llvm")
    kind, _, machine = name.partition(":")
    if is_gpu(name):
        raise TargetError(f"target {name!r} is a GPU, and this works for CPUs: {', '.join(names())}")
    if is_cpu and (strange := next((flag for flag in flags if flag in FLAGS), "")):
        raise UnknownTargetError(
            f"target {name!r}: +{strange} is for {FLAGS[strange].language} targets alone; leave it out"
        )
    if kind != "llvm":
        every = [*names(), *gpu_names()]
        after = "".join(f"+{flag}" for flag in flags)
        if flags:
            near = meant(base, gpu_names() if flags != [BF16] else names(), gpu_examples(), after)
        else:
            near = meant(name, every, {**gpu_examples(), **dict.fromkeys(("cpu", "host", "native"), "llvm")})
        hint = meant_capability(base, after) or near
        may = f"; with a flag llvm+{BF16}, {', '.join(flagged())}" if base == "llvm" else ""
        raise UnknownTargetError(f"target {name!r} is unknown; {hint}use one of {', '.join(every)}{may}")
    if not machine and ":" not in name:
        return _this_machine()
    if machine not in _NAMED:
        hint = meant(name, [*names(), *flagged()])
        raise UnknownTargetError(
            f"target {name!r} is unknown; {hint}use one of {', '.join(names())}; with a flag {', '.join(flagged())}"
        )
    return _NAMED[machine](name)


def _with_bf16(name: str, base: Target, *, here: bool) -> Target:
    """The same machine, multiplying bfloat16. Raises `TargetError` where it cannot."""
    machine = base.name.removeprefix("llvm:")
    added = _BF16_ADDED.get(machine)
    if _BF16_FEATURE not in base.features and not added:
        who = f"this processor, {base.name}," if here else base.name
        error: type[TargetError] = TargetError if here else UnknownTargetError
        raise error(
            f"target {name!r}: +{BF16} needs AVX512-BF16, and {who} lacks it; leave it out, or use one of "
            f"{', '.join(flagged())}"
        )
    found = replace(
        base,
        name=f"{base.name}+{BF16}",
        mattr=(*base.mattr, *([added] if added else [])),
        features=tuple(dict.fromkeys((*base.features, _BF16_FEATURE))),
        machine=replace(base.machine, pairs=True),
        flags=(BF16,),
    )
    if here and not found.native:
        raise TargetError(
            f"target {name!r}: this processor does not list {_BF16_FEATURE}; leave +{BF16} out, or name the machine "
            f"to compile for: {', '.join(flagged())}"
        )
    return found


def flagged() -> list[str]:
    """Every name with a flag that `target` knows."""
    known = [name for name in _NAMED if name in _BF16_ADDED or _BF16_FEATURE in _NAMED[name](name).features]
    return [f"llvm:{name}+{BF16}" for name in known]


def any_target(name: str) -> Target | GpuTarget:
    """Look a CPU or a GPU up. Raises `TargetError`."""
    return gpu_target(name) if is_gpu(name) else target(name)


def names() -> list[str]:
    """Every name that `target` knows."""
    return ["llvm", *(f"llvm:{name}" for name in _NAMED)]


def _this_machine() -> Target:
    """The widest instruction set that this machine has, with the numbers of its own processor where they differ."""
    name = _here()
    here = _NAMED[name]("llvm:" + name)
    own = _AMD.get((name, _cpuinfo("cpu family"))) if _cpuinfo("vendor_id") == "AuthenticAMD" else None
    return replace(here, machine=_NAMED[own](here.name).machine) if own else here


def _here() -> str:
    """The name of the widest instruction set that this machine has."""
    architecture, system = host()
    if architecture == "x86_64" and system == "linux":
        for level in ("x86-64-v4", "x86-64-v3", "x86-64-v2"):
            if not _NAMED[level](level).missing_features():
                return level
        raise TargetError("this processor lacks SSE4.2 (x86-64-v2), the least that is supported")
    if architecture == "aarch64" and system == "darwin":
        return "apple-m1"
    if architecture == "aarch64" and system == "linux":
        return "cortex-a76" if not _NAMED["cortex-a76"]("").missing_features() else "aarch64"
    raise TargetError(
        f"target 'llvm' means this machine, but {system} on {architecture} is not supported; "
        f"name the machine to compile for: {', '.join(names()[1:])}"
    )


def host() -> tuple[str, str]:
    """Architecture and system of this machine, as `Target` names them: ``("x86_64", "linux")``."""
    machine = platform.machine().lower()
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine), platform.system().lower()


@lru_cache(maxsize=1)
def processor_flags() -> frozenset[str]:
    """The flags of this processor, as Linux lists them; empty elsewhere."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


@lru_cache(maxsize=8)
def _cpuinfo(name: str) -> str:
    """What Linux says of the first processor under this name; nothing elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return ""
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def cores() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
