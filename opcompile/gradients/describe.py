"""What a derivative is and how it would be compiled: what `opcompile.describe` says of the layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from opcompile.describe import facts, plan_text
from opcompile.gpus import GpuTarget
from opcompile.gradients.gradient import Gradient
from opcompile.source import brief
from opcompile.target import any_target
from opcompile.tensors import sizes_text
from opcompile.units import binary, scaled

if TYPE_CHECKING:
    from rich.console import RenderableType

    from opcompile.lower import Plan, PlanName


@dataclass(frozen=True, slots=True)
class GradientDescription:
    """A derivative, the tiles that ``plan`` chose for ``target`` and the workspace in bytes: on a GPU none."""

    gradient: Gradient
    target: str
    plan: Plan
    workspace_bytes: int

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte that must move."""
        return self.gradient.flops / self.gradient.bytes()

    def to_json(self) -> dict[str, Any]:
        """Return plain values; shapes by the names of the tensors, the result's last."""
        gradient = self.gradient
        return {
            "spec": str(gradient.layer),
            "derivative": gradient.wrt,
            **gradient.operands,
            gradient.name: gradient.shape,
            "flop": gradient.flops,
            "bytes": gradient.bytes(),
            "flop_per_byte": round(self.intensity, 3),
            "workspace_bytes": self.workspace_bytes,
            "summed_in": gradient.layer.sum_dtype,
            "target": self.target,
            "plan": asdict(self.plan),
        }

    def renderables(self) -> Iterator[RenderableType]:
        """Yield what a terminal shows."""
        gradient, layer = self.gradient, self.gradient.layer
        one = "" if layer.batch else " for one batch element"
        result, operands = _spelled(gradient.name), ", ".join(map(_spelled, gradient.operands))
        shapes = ", ".join(map(sizes_text, gradient.operands.values()))
        summed = f"up to {gradient.terms(layer.batch or 1)} {'elements' if gradient.wrt == 'b' else 'products'} each"
        yield f"[bold]{brief(layer)}[/]"
        yield facts(
            {
                "computes": f"its derivative {gradient.name}",
                f"{operands} -> {result}": f"{shapes} -> {sizes_text(gradient.shape)}",
                "work": f"{scaled(gradient.flops, 'FLOP')}, {binary(gradient.bytes())} of {operands} and {result}: "
                f"{self.intensity:.3g} FLOP/byte",
                "sums": f"{summed}{one if gradient.wrt != 'x' else ''}, in {layer.sum_dtype}",
                "workspace": binary(self.workspace_bytes) + one,
                "target": self.target,
                "plan": plan_text(asdict(self.plan)),
            }
        )


def describe(gradient: Gradient, target: str = "llvm", plan: PlanName = "best") -> GradientDescription:
    """Choose tiles for ``gradient`` as `opcompile.compile` would, and say why. Raises what that raises."""
    machine = any_target(target)
    if isinstance(machine, GpuTarget):
        from opcompile.gradients.lower_gpu import choose as choose_gpu  # on use: it brings the compiler

        _, chosen = choose_gpu(gradient, machine, plan)
        return GradientDescription(gradient, machine.name, chosen, 0)
    from opcompile.gradients.lower import choose, workspace_bytes

    tiles, chosen = choose(gradient, machine, plan)
    return GradientDescription(gradient, machine.name, chosen, workspace_bytes(gradient, tiles))


def _spelled(name: str) -> str:
    """Write ``dx`` as dX."""
    return name[:-1] + name[-1].upper()
