"""From a spec to machine code: choose tiles, declare, schedule, compile.

`lower` never falls back in silence: what was used stands in `Plan`, and goes into the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import transform

from opcompile.compiled import allocated_bytes, object_code
from opcompile.declare import Grain, declare, packed_from
from opcompile.errors import RecordError, SpecError
from opcompile.gpus import GpuTarget
from opcompile.packing import Packing
from opcompile.record import Record, find_record
from opcompile.spec import ConvTranspose3d
from opcompile.target import Target
from schedules import llvm
from schedules.unchecked import Schedule

KERNEL = "conv_transpose3d"
PlanName = Literal["best", "baseline", "tuned"]
_FAMILIES = {
    "channels": "channel-vectors",
    "groups": "group-vectors",
    "row": "row-vectors",
    "line": "line-vectors",
    "taps": "tap-sums",
    "plane": "plane-sums",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What was used, for the manifest and for `inspect`."""

    name: str
    schedule: str
    tiles: dict[str, int | str]
    why: tuple[str, ...]
    record: str | None


@dataclass(frozen=True, slots=True)
class Lowered:
    """A compiled kernel ``conv_transpose3d(X, W packed[, B], Y)``, not yet linked.

    ``object_code`` is one relocatable object for ``target``. ``workspace_bytes`` is what a call
    allocates with one thread: the copy of X, sums that leave their registers, and what a task widens of 16-bit weights.
    """

    spec: ConvTranspose3d
    target: Target
    plan: Plan
    object_code: bytes
    packing: Packing
    workspace_bytes: int


def lower(spec: ConvTranspose3d, target: Target, plan: PlanName = "best", *, symbol: str = KERNEL) -> Lowered:
    """Compile ``spec`` for ``target``.

    ``plan`` is ``baseline`` (tiles by arithmetic), ``tuned`` (by a record; `RecordError` where there
    is none) or ``best`` (the record where there is one, else the baseline). The object code defines
    ``__tvm_ffi_<symbol>``: kernels that are linked together need different ones.
    """
    tiles, chosen = choose(spec, target, plan)
    module = scheduled(spec, tiles)
    named = tvm.IRModule({symbol: module[KERNEL].with_attr("global_symbol", symbol)})
    code, allocated = object_code(named, target)
    workspace = workspace_bytes(spec, tiles) if spec.batch is None else allocated
    return Lowered(spec, target, chosen, code, packing(spec, tiles), workspace)


def choose(spec: ConvTranspose3d, target: Target, plan: PlanName) -> tuple[llvm.Tiles, Plan]:
    """The tiles that ``plan`` asks for, and the account of the choice."""
    if (record := recorded(spec, target, plan)) is not None:
        tiles = llvm.Tiles(**record.tiles)
        record.require_declaration(declaration_hash(spec, tiles))
        return tiles, _plan("tuned", record.tiles, (*record.why(), *unused_flags(spec, target, tiles)), record)
    estimate = llvm.baseline(spec, target.machine)
    why = (*estimate.why(), *unused_flags(spec, target, estimate.tiles))
    return estimate.tiles, _plan("baseline", estimate.tiles.fields(), why, None)


def unused_flags(spec: ConvTranspose3d, target: Target, tiles: llvm.Tiles) -> Iterator[str]:
    """Say of each flag that changes nothing in this kernel why it does not."""
    for flag in target.flags:
        if spec.dtype != "bfloat16":
            yield f"+{flag} changes nothing: it is for bfloat16, and this layer has {spec.dtype}"
        elif tiles.products == 1:
            c = spec.c_in
            even = "other tiles come out faster" if c % 2 == 0 else f"channels are taken in pairs, and a group has {c}"
            yield f"+{flag} changes nothing, and all products are {spec.sum_dtype}: {even}"


def recorded(spec: ConvTranspose3d, target: Target | GpuTarget, plan: PlanName) -> Record | None:
    """The record that ``plan`` asks for; None where the baseline is to be used. Raises `RecordError`, `SpecError`."""
    require_plan(plan)
    record = None if plan == "baseline" else find_record(spec, target)
    if record is None and plan == "tuned":
        raise RecordError(
            f"no tuned record for {spec} on {target.name}; make one with `opcompile tune`, or use plan best"
        )
    return record


def require_plan(plan: str) -> None:
    """Raise `SpecError` for a plan that does not exist."""
    if plan not in ("best", "baseline", "tuned"):
        raise SpecError(f"plan {plan!r} is unknown; use best, baseline or tuned")


def _plan(name: str, tiles: dict[str, int | str], why: tuple[str, ...], record: Record | None) -> Plan:
    return Plan(name, _FAMILIES[str(tiles["vector"])], tiles, why, record.key if record else None)


def grain(spec: ConvTranspose3d, tiles: llvm.Tiles) -> Grain:
    """What the declaration must be rounded to for these tiles."""
    rows = 0 if tiles.vector == "plane" else tiles.line
    planes = llvm.joined(spec, tiles)
    groups = tiles.vector == "groups"
    return Grain(tiles.task, tiles.positions, rows, planes, tiles.by_taps, tiles.products > 1, groups)


def declared(spec: ConvTranspose3d, tiles: llvm.Tiles) -> tirx.PrimFunc:
    """The unscheduled function, rounded for these tiles."""
    return declare(spec, grain(spec, tiles)).with_attr("global_symbol", KERNEL)


def scheduled(spec: ConvTranspose3d, tiles: llvm.Tiles) -> tvm.IRModule:
    """The module ready to compile."""
    schedule = Schedule(tvm.IRModule({KERNEL: declared(spec, tiles)}))
    schedule.work_on(KERNEL)
    llvm.schedule(schedule, spec, tiles)
    return llvm.finish(schedule.mod, spec, tiles)


def packing(spec: ConvTranspose3d, tiles: llvm.Tiles) -> Packing:
    """How a canonical weight becomes the kernel's W."""
    padded = packed_from(spec, grain(spec, tiles))
    view, order = llvm.packed(spec, tiles, padded)
    return Packing(padded, view, order)


def declaration_hash(spec: ConvTranspose3d, tiles: llvm.Tiles) -> str:
    """The structural hash of the declaration: what a record is bound to."""
    return hashed(declared(spec, tiles))


def hashed(ir: tirx.PrimFunc | tvm.IRModule) -> str:
    """The structural hash of a function or a module: names of variables do not count."""
    return f"{tvm_ffi.structural_hash(ir) & (2**64 - 1):016x}"


def workspace_bytes(spec: ConvTranspose3d, tiles: llvm.Tiles) -> int:
    """Bytes that one call allocates with one thread (`Lowered`).

    For a dynamic batch: with one batch element.
    """
    return allocated_by(scheduled(spec.with_batch(spec.batch or 1), tiles))


def allocated_by(module: tvm.IRModule) -> int:
    """Bytes that a call of the one scheduled function allocates with one thread, as `object_code` finds them."""
    for step in (
        transform.LowerInitBlock(),
        transform.PlanAndUpdateBufferAllocationLocation(),
        transform.ConvertBlocksToOpaque(),
        transform.CompactBufferAllocation(),
        transform.LowerOpaqueBlock(),
    ):
        module = step(module)
    return allocated_bytes(module)
