"""From a derivative to machine code: choose tiles, declare, schedule, compile."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import tvm

from opcompile.compiled import object_code
from opcompile.errors import RecordError
from opcompile.gradients.declare import Depth, Grain, declare, depth
from opcompile.gradients.gradient import Gradient
from opcompile.lower import Plan, PlanName, allocated_by, require_plan
from opcompile.target import Target
from schedules import gradients
from schedules.gradients import BiasTiles, GradientTiles, InputTiles
from schedules.unchecked import Schedule


@dataclass(frozen=True, slots=True)
class LoweredGradient:
    """A compiled kernel ``conv_transpose3d_d<wrt>(dy[, w or x][, y], out)``, not yet linked.

    ``object_code`` is one relocatable object for ``target``; ``depth`` bounds the roundings of a term;
    ``workspace_bytes`` is what a call with one thread allocates (of one image where the batch is dynamic).
    """

    gradient: Gradient
    target: Target
    plan: Plan
    object_code: bytes
    depth: Depth
    workspace_bytes: int


def lower(gradient: Gradient, target: Target, plan: PlanName = "best") -> LoweredGradient:
    """Compile ``gradient`` for ``target``.

    ``plan`` is ``best`` or ``baseline``, which are the same: tiles by arithmetic. Derivatives are not
    tuned, so that ``tuned`` raises `RecordError`.
    """
    tiles, chosen = choose(gradient, target, plan)
    module = scheduled(gradient, tiles)
    code, workspace = object_code(module, target)
    if gradient.layer.batch is None:
        workspace = workspace_bytes(gradient, tiles)
    return LoweredGradient(gradient, target, chosen, code, depth(gradient, grain(tiles)), workspace)


def workspace_bytes(gradient: Gradient, tiles: GradientTiles) -> int:
    """Bytes that one call allocates with one thread; for a dynamic batch: with one batch element."""
    return allocated_by(scheduled(gradient.with_batch(gradient.layer.batch or 1), tiles))


def choose(gradient: Gradient, target: Target, plan: PlanName) -> tuple[GradientTiles, Plan]:
    """The tiles that ``plan`` asks for, and the account of the choice."""
    require_untuned(gradient, plan)
    estimate = gradients.candidates(gradient, target.machine)[0]
    tiles: GradientTiles = estimate.tiles
    unused = (f"+{flag} changes nothing: derivatives multiply in the type of their sums" for flag in target.flags)
    return tiles, Plan("baseline", f"{tiles.vector}-vectors", asdict(tiles), (*estimate.why(), *unused), None)


def require_untuned(gradient: Gradient, plan: PlanName) -> None:
    """Raise `RecordError` for plan ``tuned``: derivatives are not."""
    require_plan(plan)
    if plan == "tuned":
        raise RecordError(f"no tuned record for {gradient}: derivatives are not tuned; use plan best or baseline")


def grain(tiles: GradientTiles) -> Grain:
    """What the declaration must be rounded to for these tiles, and how its sums are cut."""
    if isinstance(tiles, InputTiles):
        return Grain(c=tiles.channels, positions=(tiles.depth, tiles.height, tiles.columns))
    lanes = tiles.lanes if tiles.vector == "row" else 1
    if isinstance(tiles, BiasTiles):
        return Grain(lanes=lanes, slices=tiles.slices)
    return Grain(c=tiles.task_c, m=tiles.task_m, block=(tiles.depth, tiles.height), lanes=lanes, slices=tiles.slices)


def scheduled(gradient: Gradient, tiles: GradientTiles) -> tvm.IRModule:
    """The module ready to compile."""
    name = gradient.kernel
    declared = declare(gradient, grain(tiles)).with_attr("global_symbol", name)
    sch = Schedule(tvm.IRModule({name: declared}))
    sch.work_on(name)
    gradients.schedule(sch, gradient, tiles)
    return sch.mod
