"""GPU kernels as the tests call them: emitted, and run by the simulator on NumPy arrays."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from kernels import Kernel
from numpy.typing import NDArray

from opcompile.gpus import Gpu, gpu_target
from opcompile.lower import Plan
from opcompile.lower_gpu import LoweredGpu, choose, emitted
from opcompile.simulate import Simulator
from opcompile.spec import ConvTranspose3d
from schedules.gpu import GpuEstimate, GpuTiles

CUDA, METAL = gpu_target("cuda:sm_90"), gpu_target("metal:apple-m1")
TF32, SIMDGROUP = gpu_target("cuda:sm_80+tf32"), gpu_target("metal:apple-m2+simdgroup")
_FOR_TESTS = Plan("baseline", "", {}, (), None)


def lowered(spec: ConvTranspose3d, target: Any, tiles: GpuTiles | None = None) -> LoweredGpu:
    return emitted(spec, target, tiles or choose(spec, target, "baseline")[0], _FOR_TESTS)


def assert_within_limits(estimate: GpuEstimate, gpu: Gpu) -> None:
    """What a schedule is estimated to take is there on the device."""
    assert estimate.tiles.threads <= gpu.threads
    assert estimate.shared <= gpu.shared
    assert estimate.registers <= gpu.registers
    assert estimate.registers * estimate.tiles.threads <= gpu.register_file


def simulated(kernel: LoweredGpu) -> Kernel:
    """Return ``y = call(x, w, b)``."""
    simulator = Simulator(kernel.source, kernel.target.language, kernel.launch)

    def call(x: NDArray[Any], w: NDArray[Any], b: NDArray[Any] | None = None) -> NDArray[Any]:
        y = np.zeros((x.shape[0], *kernel.spec.y_shape[1:]), x.dtype)
        simulator.run({"x": x, "w": kernel.packing(w), **({} if b is None else {"b": b})}, y, x.shape[0])
        return y

    return call


def cut(spec: ConvTranspose3d, most_flops: int) -> ConvTranspose3d:
    """The same layer on fewer elements: the longest axis is halved until the work is small."""
    while spec.flops > most_flops and max(a.size for a in spec.axes) > 3:
        longest = max(range(3), key=lambda i: spec.axes[i].size)
        axes = [replace(a, size=math.ceil(a.size / 2)) if i == longest else a for i, a in enumerate(spec.axes)]
        spec = replace(spec, axes=tuple(axes))
    return spec
