"""From a derivative to the text of one GPU kernel: what `opcompile.lower_gpu` does for the layer."""

from __future__ import annotations

from dataclasses import dataclass

import tvm

from opcompile.declare_flat import FlatGrain
from opcompile.gpus import GpuTarget
from opcompile.gradients.declare import Depth
from opcompile.gradients.declare_flat import columns, declare_flat, depth
from opcompile.gradients.gradient import Gradient
from opcompile.gradients.lower import require_untuned
from opcompile.launch import Launch
from opcompile.lower import Plan, PlanName
from opcompile.lower_gpu import GpuCode, require_dtype, require_startable, texts
from schedules import gpu
from schedules.division import over
from schedules.gpu import GpuTiles
from schedules.gradient_gpu_tiles import gpu_candidates, why
from schedules.unchecked import Schedule


@dataclass(frozen=True, slots=True)
class LoweredGpuGradient(GpuCode):
    """The kernel of a derivative; ``depth`` bounds the roundings of a term."""

    gradient: Gradient
    depth: Depth


def lower_gpu(gradient: Gradient, target: GpuTarget, plan: PlanName = "best") -> LoweredGpuGradient:
    """Emit the kernel of ``gradient`` for ``target``. Plans are those of `opcompile.gradients.lower.lower`.

    Raises `TargetError` for an element type that the target's language has not, `RecordError` for ``tuned``, and as
    `opcompile.lower_gpu.require_startable` does.
    """
    tiles, chosen = choose(gradient, target, plan)
    return emitted(gradient, target, tiles, chosen)


def choose(gradient: Gradient, target: GpuTarget, plan: PlanName) -> tuple[GpuTiles, Plan]:
    """The tiles that ``plan`` asks for, and the account of the choice."""
    require_untuned(gradient, plan)
    require_dtype(gradient.layer, target)
    estimate = gpu_candidates(gradient, target.gpu)[0]
    tiles = estimate.tiles
    unused = (f"+{flag} changes nothing: derivatives use no matrix instructions" for flag in target.flags)
    return tiles, Plan("baseline", tiles.family, tiles.fields(), (*why(estimate), *unused), None)


def emitted(gradient: Gradient, target: GpuTarget, tiles: GpuTiles, plan: Plan) -> LoweredGpuGradient:
    """Emit the kernel that ``tiles`` make."""
    source, host, objects = texts(scheduled(gradient, tiles), target)
    launch = Launch.of(
        source, target.language, blocks(gradient, tiles), tiles.block, gradient.name, gradient.wrt == "x"
    )
    require_startable(launch, target, gradient.layer.batch)
    found = depth(gradient, _terms(tiles), tiles.split)
    return LoweredGpuGradient(target, plan, source, host, objects, launch, gradient, found)


def scheduled(gradient: Gradient, tiles: GpuTiles) -> tvm.IRModule:
    """The module ready to compile."""
    name = gradient.kernel
    declared = declare_flat(gradient, FlatGrain(tiles.channels, tiles.positions), _terms(tiles))
    sch = Schedule(tvm.IRModule({name: declared.with_attr("global_symbol", name)}))
    sch.work_on(name)
    gpu.sums(sch, tiles, gradient.layer.dtype)
    return sch.mod


def blocks(gradient: Gradient, tiles: GpuTiles) -> int:
    """Thread blocks: for one image where these are not summed."""
    layer = gradient.layer
    wide = over(columns(gradient), tiles.positions)
    if gradient.wrt == "b":
        return wide
    return layer.groups * over(layer.c_in, tiles.channels) * wide


def _terms(tiles: GpuTiles) -> int:
    """What all groups of threads together sum in one step."""
    return tiles.chunk or tiles.split
