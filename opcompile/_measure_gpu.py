"""The measuring process on a GPU: `main` checks and times one candidate, or several in turns.

`opcompile.measure` starts it. It needs NumPy, `apache-tvm-ffi` and the driver. A candidate that ruins the GPU's
context, or this process, ruins its own measurement alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opcompile.bounds import Answer, Inputs, compare_at, sums_of
from opcompile.cuda_driver import Gpu
from opcompile.errors import ArtifactError, EngineError, TargetError
from opcompile.golden import Golden
from opcompile.manifest import opened
from opcompile.runtime_cuda import CudaArtifact, PackedCuda
from opcompile.trials import SAMPLE_MS, answer, failed

# A sample is the mean of so many calls, fewer where they would take longer than SAMPLE_MS.
_CALLS = 16
# A GPU that had nothing to do raises its clock in this time.
_WARM_S = 0.2

Start = Callable[[], object]


def main() -> None:
    """Answer the job on standard input."""
    answer(_measured)


def _measured(job: dict[str, Any]) -> dict[str, Any]:
    """Answer with times in us, or whose fault it is that there are none: the ``candidate``'s, the ``machine``'s."""
    try:
        gpu = Gpu()
        layers = [CudaArtifact(*opened(Path(directory))) for directory in job["directories"]]
        golden = layers[0].golden()
        started = _prepared(gpu, layers, golden)
    except (ArtifactError, EngineError, TargetError) as error:
        return failed("machine", error)
    try:
        for layer in layers:
            _require_right(gpu, layer, golden)
        return {"times_us": _in_turns(gpu, started, job["samples"])}
    except Exception as error:  # noqa: BLE001 (whatever it is, it is the candidate's result)
        return failed("candidate", error)


def _require_right(gpu: Gpu, layer: CudaArtifact, golden: Golden) -> None:
    """Raise `VerificationError` unless ``layer`` gives the golden vector, within its bound."""
    dtype = layer.spec.dtype
    x, w = gpu.put(golden.x, dtype), gpu.put(layer.packing(_given(golden.w)), dtype)
    b = None if golden.b is None else gpu.put(golden.b, dtype)
    y = gpu.empty((x.shape[0], *_sizes(layer)), dtype)
    layer(x, PackedCuda(layer.packing, w), b, out=y)
    found = gpu.get(y, golden.x.dtype).reshape(-1)[golden.indices]
    inputs = Inputs.of(layer.spec, golden.x, golden.w, golden.b)
    (check,) = compare_at(inputs, golden.indices, [Answer(found, sums_of(layer.manifest))])
    check.require()


def _prepared(gpu: Gpu, layers: Sequence[CudaArtifact], golden: Golden) -> list[list[Start]]:
    """Return for each layer what starts it, on one set of tensors after the other.

    Together the sets are larger than the second cache twice over, or there is one for each call of a sample: no call
    finds anything of the one before. A dynamic batch is one element.
    """
    dtype = layers[0].spec.dtype
    x = golden.x if layers[0].spec.batch else golden.x[:1]
    y_shape = (x.shape[0], *_sizes(layers[0]))
    held = x.nbytes + _given(golden.w).nbytes + math.prod(y_shape) * x.itemsize
    count = min(_CALLS, 1 + math.ceil(2 * gpu.device.l2_bytes / held))
    sets = [
        (gpu.put(x, dtype), None if golden.b is None else gpu.put(golden.b, dtype), gpu.empty(y_shape, dtype))
        for _ in range(count)
    ]
    packed = [layer.packing(_given(golden.w)) for layer in layers]
    return [
        [layer.bound(x, PackedCuda(layer.packing, gpu.put(w, dtype)), b, out=y) for x, b, y in sets]
        for layer, w in zip(layers, packed, strict=True)
    ]


def _in_turns(gpu: Gpu, started: Sequence[Sequence[Start]], samples: int) -> list[list[float]]:
    """Take samples of each layer in microseconds, one of each, then the next of each."""
    series = []
    for starts in started:
        until = time.monotonic() + _WARM_S
        us = gpu.timed_us(starts[:1])
        while time.monotonic() < until:
            us = gpu.timed_us(starts[:1])
        calls = max(1, min(_CALLS, int(SAMPLE_MS * 1e3 / max(us, 1))))
        series.append([starts[number % len(starts)] for number in range(calls)])
    times: list[list[float]] = [[] for _ in series]
    for _ in range(samples):
        for of_layer, calls_of_layer in zip(times, series, strict=True):
            of_layer.append(round(gpu.timed_us(calls_of_layer), 4))
    return times


def _sizes(layer: CudaArtifact) -> tuple[int, ...]:
    return tuple(size for size in layer.spec.y_shape[1:] if size is not None)


def _given(array: Any) -> Any:
    """Return the weight of the test vector, which an artifact without weights of its own has."""
    if array is None:
        raise ArtifactError("a candidate has weights compiled in, which none is emitted with; emit it again")
    return array
