"""From a spec to the text of one GPU kernel: choose tiles, declare, schedule, emit."""

from __future__ import annotations

import math
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx
from tvm.backend.cuda import export_cuda_host
from tvm.s_tir.transform import (
    CompactBufferAllocation,
    ConvertBlocksToOpaque,
    LiftThreadBinding,
    LowerInitBlock,
    LowerMatchBuffer,
    LowerOpaqueBlock,
    ManifestSharedMemoryLocalStage,
    PlanAndUpdateBufferAllocationLocation,
    UnifyThreadBinding,
)
from tvm.tirx.transform import StmtSimplify

from opcompile.declare_flat import FlatGrain, declare_flat, extents, only_taps, weight_shape
from opcompile.errors import KernelError, SpecError, TargetError
from opcompile.gpus import FLAGS, GpuTarget
from opcompile.launch import MOST_BLOCKS, Launch
from opcompile.lower import KERNEL, Plan, PlanName, hashed, recorded
from opcompile.packing import Packing
from opcompile.paths import scratch
from opcompile.spec import ConvTranspose3d
from schedules import gpu
from schedules.division import over
from schedules.gpu import GpuTiles
from schedules.unchecked import Schedule

# Every buffer in shared memory has its own place. TVM's reuse gives them the type of the first, and then refuses the
# pointers that matrix instructions take; its merging as bytes comes after the barriers, and makes races.
_OWN_PLACES = {"tirx.disable_storage_rewrite": True}

# TVM names common subexpressions, and goes on without the names; one that the grid has in common with a tensor's size
# would come to the kernel instead of the batch.
_NO_NAMES = {"tirx.disable_cse_tir": True}


@dataclass(frozen=True, slots=True)
class GpuCode:
    """A kernel as text: ``source`` in the target's language, and how to start it.

    ``host_source`` is, for CUDA, the C++ that checks the arguments and launches it;
    ``host_objects`` makes, for Metal, Mach-O objects that do the same with TVM's runtime.
    """

    target: GpuTarget
    plan: Plan
    source: str
    host_source: str
    host_objects: Callable[[], tuple[bytes, ...]]
    launch: Launch

    @property
    def workspace_bytes(self) -> int:
        """Bytes of device memory that a call allocates: none."""
        return 0


@dataclass(frozen=True, slots=True)
class LoweredGpu(GpuCode):
    """The kernel of a layer, and how its weights are packed."""

    spec: ConvTranspose3d
    packing: Packing


def lower_gpu(spec: ConvTranspose3d, target: GpuTarget, plan: PlanName = "best") -> LoweredGpu:
    """Emit the kernel of ``spec`` for ``target``. Plans are those of `opcompile.lower.lower`.

    Raises `TargetError` for an element type that the target's language has not, and as `require_startable` does.
    """
    tiles, chosen = choose(spec, target, plan)
    return emitted(spec, target, tiles, chosen)


def choose(spec: ConvTranspose3d, target: GpuTarget, plan: PlanName) -> tuple[GpuTiles, Plan]:
    """The tiles that ``plan`` asks for, and the account of the choice."""
    require_dtype(spec, target)
    if (record := recorded(spec, target, plan)) is not None:
        tiles = GpuTiles(**record.tiles)
        record.require_declaration(declaration_hash(spec, tiles))
        why = (*record.why(), *unused_flags(spec, target, tiles))
        return tiles, Plan("tuned", tiles.family, record.tiles, why, record.key)
    estimate = gpu.baseline(spec, target.gpu)
    tiles = estimate.tiles
    why = (*estimate.why(target.unit(spec.dtype)), *unused_flags(spec, target, tiles))
    return tiles, Plan("baseline", tiles.family, tiles.fields(), why, None)


def unused_flags(spec: ConvTranspose3d, target: GpuTarget, tiles: GpuTiles) -> Iterator[str]:
    """Say of each flag that changes nothing in this kernel why it does not."""
    for flag in target.flags:
        types = FLAGS[flag].dtypes
        if spec.dtype not in types:
            yield f"+{flag} changes nothing: it is for {' and '.join(types)}, and this layer has {spec.dtype}"
        elif tiles.family != "matrix":
            fills = any(e.tiles.family == "matrix" for e in gpu.candidates(spec, target.gpu))
            reason = "other tiles come out faster" if fills else gpu.FILLS
            yield f"+{flag} changes nothing, and all products are {spec.sum_dtype}: {reason}"


def require_dtype(spec: ConvTranspose3d, target: GpuTarget) -> None:
    """Raise `TargetError` for an element type that the target's language has not."""
    if spec.dtype not in target.dtypes:
        raise TargetError(
            f"{target.name} has no {spec.dtype}; compile the layer in {', '.join(target.dtypes)}, or for another target"
        )


def emitted(spec: ConvTranspose3d, target: GpuTarget, tiles: GpuTiles, plan: Plan) -> LoweredGpu:
    """Emit the kernel that ``tiles`` make."""
    config = _OWN_PLACES if tiles.family == "matrix" else {}
    with tvm.transform.PassContext(config=config):
        source, host, objects = texts(scheduled(spec, tiles, target), target)
    launch = Launch.of(source, target.language, blocks(spec, tiles), tiles.block)
    require_startable(launch, target, spec.batch)
    return LoweredGpu(target, plan, source, host, objects, launch, spec, packing(spec, tiles))


def require_startable(launch: Launch, target: GpuTarget, batch: int | None) -> None:
    """Raise `KernelError` for more shared memory than a block may have, `SpecError` for more blocks than can start."""
    if launch.shared_bytes > target.gpu.shared:
        raise KernelError(
            f"{launch.kernel} declares {launch.shared_bytes} bytes of shared memory, and a block of {target.name} has "
            f"at most {target.gpu.shared}; compile the layer with plan baseline, or for another target"
        )
    if launch.grid(batch or 1) <= MOST_BLOCKS:
        return
    needs = f"{launch.kernel} needs {launch.blocks} thread blocks"
    if launch.most_images:
        raise SpecError(
            f"batch is {batch}, but {needs} for each image, and one launch has at most {MOST_BLOCKS}; compile it for a "
            f"batch of at most {launch.most_images}, and call it several times"
        )
    raise SpecError(f"{needs}, and one launch has at most {MOST_BLOCKS}; cut the layer into smaller ones")


def texts(module: tvm.IRModule, target: GpuTarget) -> tuple[str, str, Callable[[], tuple[bytes, ...]]]:
    """Compile a scheduled module: ``source``, ``host_source`` and ``host_objects`` of `GpuCode`."""
    config = {**tvm.transform.PassContext.current().config, **_NO_NAMES}
    module = _with_exact_constants(module, target)
    with tvm.target.Target(target.tvm()) as tvm_target, tvm.transform.PassContext(config=config):
        built = tvm.compile(module, target=tvm_target).mod
    source = built.imports[0].inspect_source(target.language)
    if target.language == "cuda":
        return source, host_half(export_cuda_host(built), source), tuple
    return _ARRAY.sub(r"\1alignas(16) \2", source), "", partial(_objects, built)


# An array of Metal, which is read and written as vectors: TVM declares it as aligned as its elements are.
_ARRAY = re.compile(r"^( +)((?:thread|threadgroup) (?:float|half)[24]? \w+\[)", re.M)


def _with_exact_constants(module: tvm.IRModule, target: GpuTarget) -> tvm.IRModule:
    """Give as bits those constants that TVM's text would change: seven digits for Metal, 15 decimals of a double."""
    dtype, bits, form = ("float32", "uint32", "e") if target.language == "metal" else ("float64", "uint64", ".15f")

    def exact(constant: Any) -> Any:
        value = np.dtype(dtype).type(constant.value)
        if str(constant.ty) != dtype or np.dtype(dtype).type(f"{value:{form}}") == value:
            return constant
        return tirx.reinterpret(dtype, tirx.const(int(value.view(bits)), bits))

    bodies = {name: tvm_ffi.structural_map(f.body, (tirx.FloatImm, exact)) for name, f in module.functions.items()}
    return tvm.IRModule({name: module[name].with_body(body) for name, body in bodies.items()})


# The host half only hands pointers on.
_HALVES = """\
#include <cstdint>
struct __half;
struct __nv_bfloat16;
using half = __half;
using nv_bfloat16 = __nv_bfloat16;
"""


def host_half(both: str, source: str) -> str:
    """Take the C++ out of TVM's text of ``both`` halves, with a prototype for the kernel that ``source`` defines.

    Apart, only the C++ reads the headers of `apache-tvm-ffi`, once and not three times.
    """
    (kernel,) = re.findall(r'^extern "C" __global__ void [^;{]*;\n.*', source, re.M | re.S)
    _, found, host = both.partition(kernel.strip())
    if not found:
        raise AssertionError("the kernel in the text of both halves is not the one that was emitted")
    name, parameters = re.findall(r"(\w+)\(([^()]*)\);", kernel)[0]
    types = ["void*" if "*" in parameter else parameter for parameter in parameters.split(",")]
    return f'{_HALVES}extern "C" void {name}({", ".join(types)});\n{host}'


def _objects(built: tvm.runtime.Module) -> tuple[bytes, ...]:
    """Export the host's half, with the kernel in it, unlinked."""
    with scratch() as folder:
        path = folder / "host.tar"
        built.export_library(str(path))
        with tarfile.open(path) as archive:
            files = [archive.extractfile(member) for member in archive if member.name.endswith(".o")]
            return tuple(file.read() for file in files if file is not None)


def declared(spec: ConvTranspose3d, tiles: GpuTiles) -> tirx.PrimFunc:
    """The unscheduled function, rounded for these tiles."""
    grain = FlatGrain(tiles.channels, tiles.positions, tiles.apart, tiles.own)
    return declare_flat(spec, grain).with_attr("global_symbol", KERNEL)


def scheduled(spec: ConvTranspose3d, tiles: GpuTiles, target: GpuTarget) -> tvm.IRModule:
    """The module ready to compile."""
    schedule = Schedule(tvm.IRModule({KERNEL: declared(spec, tiles)}))
    schedule.work_on(KERNEL)
    gpu.schedule(schedule, spec, tiles, target.unit(spec.dtype))
    module = schedule.mod
    if tiles.apart:
        count, long_first = blocks(spec, tiles), gpu.longest_first(spec)
        cut = only_taps(module[KERNEL], spec, gpu.TAPS_OF, blocks=count, long_first=long_first)
        module = tvm.IRModule({KERNEL: cut})
    module = _with_plain_indices(module)
    if tiles.ahead:
        module = _through_registers(module)
    return _shared_first(module) if tiles.family == "matrix" and gpu.HOISTED[target.unit(spec.dtype)] else module


def _with_plain_indices(module: tvm.IRModule) -> tvm.IRModule:
    """Simplify before TVM measures which part of a buffer is used: it would count what other threads use."""
    passes = [LowerInitBlock(), PlanAndUpdateBufferAllocationLocation(), ConvertBlocksToOpaque(), StmtSimplify()]
    return tvm.transform.Sequential(passes)(module)


def _through_registers(module: tvm.IRModule) -> tvm.IRModule:
    """Cut copies to shared memory in two, and unroll their turns, so that registers can hold what is loaded."""
    module = tvm.transform.Sequential([LiftThreadBinding(), ManifestSharedMemoryLocalStage()])(module)

    def unrolled(loop: Any) -> Any:
        if gpu.TURNS not in loop.annotations:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.UNROLLED, loop.body)

    body = tvm_ffi.structural_map(module[KERNEL].body, (tirx.For, unrolled))
    return tvm.IRModule({KERNEL: module[KERNEL].with_body(body)})


def _shared_first(module: tvm.IRModule) -> tvm.IRModule:
    """Declare shared memory where a block of threads begins.

    After TVM has measured it, which in a loop is what one turn needs.
    """
    passes = [LiftThreadBinding(), CompactBufferAllocation(), UnifyThreadBinding(), LowerMatchBuffer()]
    func = tvm.transform.Sequential([*passes, StmtSimplify(), LowerOpaqueBlock()])(module)[KERNEL]
    shared: list[Any] = []

    def taken(declared: Any) -> Any:
        if declared.buffer.scope() != "shared":
            return declared
        shared.append(declared)
        return tirx.Evaluate(0)

    def given(scope: Any) -> Any:
        if scope.attr_key != "thread_extent" or scope.node.thread_tag != "blockIdx.x":
            return scope
        return tirx.AttrStmt(scope.node, scope.attr_key, scope.value, tirx.SeqStmt([*shared, scope.body]))

    body = tvm_ffi.structural_map(func.body, (tirx.AllocBuffer, taken))
    return tvm.IRModule({KERNEL: func.with_body(tvm_ffi.structural_map(body, (tirx.AttrStmt, given)))})


def blocks(spec: ConvTranspose3d, tiles: GpuTiles) -> int:
    """Thread blocks for one image."""
    rows = over(spec.m_out, tiles.channels)
    apart = math.prod(axis.stride for axis in spec.axes) if tiles.apart else 1
    return spec.groups * rows * over(math.prod(extents(spec, tiles.apart)), tiles.positions) * apart


def packing(spec: ConvTranspose3d, tiles: GpuTiles) -> Packing:
    """How a canonical weight becomes the kernel's W."""
    padded = weight_shape(spec, tiles.channels)
    view, order = gpu.packed(spec, tiles, padded)
    return Packing(padded, view, order)


def declaration_hash(spec: ConvTranspose3d, tiles: GpuTiles) -> str:
    """The structural hash of the declaration: what a record is bound to."""
    return hashed(declared(spec, tiles))
