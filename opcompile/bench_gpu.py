"""Our kernel and cuDNN side by side on an NVIDIA GPU: one process, one GPU, taking turns.

The rules are those of `opcompile.bench`; what differs is the clock. A sample is a CUDA graph of several calls, between
two events: neither the interpreter nor a launch is in it. The calls rotate through tensors that together exceed the
second cache twice over, and a large buffer is overwritten before each sample, so that every call finds its operands in
memory. cuDNN is asked by PyTorch, once for contiguous tensors and once with channels last, with
``cudnn.benchmark`` on, which tries its kernels, and TF32 off, which would round float32 inputs to 11 significant bits;
where the target asks for TF32, all have it.

The roofline's limits are measured in the same run: a matrix product by cuBLAS, and a copy in device memory.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from opcompile.arguments import checked_engines, checked_seconds, checked_seed
from opcompile.bench import BenchReport, Timing, answer_to_each, in_turns, small_inputs, timed
from opcompile.bounds import Inputs
from opcompile.cuda_driver import device
from opcompile.engines import OURS, require_torch_can, torch_geometry
from opcompile.errors import CallError, EngineError, TargetError, VerificationError, first_words
from opcompile.gpus import gpu_target
from opcompile.roofline import Roof, Sample
from opcompile.runtime_cuda import CudaArtifact
from opcompile.spec import ConvTranspose3d
from opcompile.tensors import stored
from opcompile.verify import ask_golden

if TYPE_CHECKING:
    from opcompile.lower import PlanName

PEERS = ("cudnn", "cudnn-channels-last")

# A sample has so many calls, or as many as fill this time.
_MOST_CALLS, _SAMPLE_US = 16, 5e3
# Overwritten before each sample: more than any second cache holds.
_FLUSHED_BYTES = 256 << 20
# Sizes of the probes: rows of a square matrix, bytes of a copy.
_MATRIX, _COPIED_BYTES = 8192, 1 << 30

Call = Callable[[], Any]


def bench_gpu(
    spec: ConvTranspose3d,
    *,
    target: str,
    against: Iterable[str] = PEERS,
    plan: PlanName = "best",
    seconds: float = 1.0,
    seed: int = 0,
) -> BenchReport:
    """Compile ``spec`` for ``target`` and time it on this machine's GPU, in turns with the engines of ``against``.

    A dynamic batch is timed with one image. Raises `CallError` for an unknown engine, `TargetError` where there is no
    GPU for the target, `EngineError` without nvcc or PyTorch, `VerificationError` where an output is wrong.
    """
    seconds, seed, against = checked_seconds(seconds), checked_seed(seed), checked_engines(against, "against", PEERS)
    from opcompile.build import compile  # on use: it brings the compiler

    if gpu_target(target).language != "cuda":
        raise TargetError(f"{target} cannot be timed by this version, which drives GPUs of CUDA alone")
    try:
        device()
    except TargetError as error:
        raise TargetError(
            f"{target} cannot be timed here: {error}; or compile it here (`opcompile compile --target {target}`), and "
            "time it there with opcompile.bench_gpu.bench_artifact(opcompile.load(DIR))"
        ) from error
    artifact: Any = compile(spec, target, plan)
    return bench_artifact(artifact, against=against, seconds=seconds, seed=seed)


def bench_artifact(
    artifact: CudaArtifact, *, against: Iterable[str] = PEERS, seconds: float = 1.0, seed: int = 0
) -> BenchReport:
    """Time an artifact that was compiled before, perhaps elsewhere. Raises as `bench_gpu`."""
    torch, spec, gpu = artifact.require_gpu(), artifact.spec, device()
    inputs, exact = small_inputs(spec, np.random.default_rng(seed))
    if not exact:
        raise CallError(f"{spec} sums {spec.terms} products, too many to hold engines against each other exactly")
    tf32 = "tf32" in artifact.manifest["target"]["features"]
    with _as_documented(torch, tf32), torch.inference_mode():
        layer = _Layer(torch, artifact, inputs)
        asked, not_timed = answer_to_each(dict.fromkeys(against), layer.peer)
        engines = {OURS: layer.ours(), **asked}
        layer.require_right(engines)
        probes = _Probes(torch, spec)
        before = probes.samples()
        series = {name: _Series(torch, engine.calls) for name, engine in engines.items()}
        timings = _in_turns(engines, series, seconds)
        roof = Roof(f"{spec.dtype}{', in TF32' if tf32 else ''}, by cuBLAS", before, probes.samples())
    return BenchReport(
        **timed(spec, artifact.manifest),
        threads=None,
        pinned=(),
        seed=seed,
        machine=f"{gpu.name}, compute capability {gpu.compute}; driver {gpu.driver}",
        roof=roof,
        cpu_share=1.0,
        timings=timings,
        memory={name: engine.workspace_bytes for name, engine in engines.items()},
        not_timed=not_timed,
        not_weighed={},
    )


@contextmanager
def _as_documented(torch: Any, tf32: bool) -> Iterator[None]:
    """Let cuDNN and cuBLAS multiply float32 as float32, or all in TF32, and cuDNN try its kernels; then as before."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = tf32, True, tf32
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before


# --- the engines ---


@dataclass(frozen=True, slots=True, eq=False)
class _Engine:
    """Calls that each return Y; ``workspace_bytes`` of device memory are taken on the way."""

    version: str
    calls: list[Call]
    workspace_bytes: int


class _Layer:
    """One layer's tensors on the GPU, and who computes it."""

    def __init__(self, torch: Any, artifact: CudaArtifact, inputs: Inputs) -> None:
        spec = artifact.spec
        self._torch, self._artifact = torch, artifact
        self._x, self._w = (artifact.there(stored(spec.dtype, values)) for values in (inputs.x, inputs.w))
        self._b = None if inputs.b is None else artifact.there(stored(spec.dtype, inputs.b))
        held = spec.with_batch(inputs.batch).bytes()
        self._sets = min(_MOST_CALLS, 1 + math.ceil(2 * device().l2_bytes / held))

    def ours(self) -> _Engine:
        """The artifact, its weights packed once."""
        calls = [self._bound(self._x.clone(), self._artifact.pack(self._w)) for _ in range(self._sets)]
        version = str(self._artifact.manifest["versions"]["opcompile"])
        return self._weighed(version, calls)

    def _bound(self, x: Any, w: Any) -> Call:
        return lambda: self._artifact(x, w, self._b)

    def peer(self, name: str) -> _Engine:
        """PyTorch's layer. Raises `EngineError` where it cannot say ours."""
        torch, spec = self._torch, self._artifact.spec
        require_torch_can(spec, halves=True)
        if name == "cudnn" and spec.layout != "NCDHW":
            raise EngineError("it is asked for contiguous NCDHW only; cudnn-channels-last is asked for NDHWC")
        order = torch.contiguous_format if name == "cudnn" else torch.channels_last_3d
        x = self._x if spec.layout == "NCDHW" else self._x.movedim(-1, 1)
        layer, geometry = torch.nn.functional.conv_transpose3d, torch_geometry(spec)

        def bound() -> Call:
            own, w = x.clone(memory_format=order), self._w.clone(memory_format=order)
            return lambda: layer(own, w, self._b, **geometry)

        calls = [bound() for _ in range(self._sets)]
        try:
            calls[0]()
        except RuntimeError as error:
            raise EngineError(first_words(error)) from error
        return self._weighed(f"{torch.backends.cudnn.version()}, torch {torch.__version__}", calls)

    def _weighed(self, version: str, calls: list[Call]) -> _Engine:
        """Call once, so that kernels are loaded and chosen; then see what a call takes of the device's memory."""
        cuda = self._torch.cuda
        calls[0]()
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        y = calls[0]()
        taken = cuda.max_memory_allocated() - before - y.numel() * y.element_size()
        return _Engine(version, calls, max(0, taken))

    def require_right(self, engines: dict[str, _Engine]) -> None:
        """Hold ours against the oracle on the artifact's test vector, and every other answer against ours, to the bit.

        The inputs are integers whose sums are exact. Raises `VerificationError`: a wrong answer is not timed.
        """
        for row in ask_golden(self._artifact, (None, None)):
            row.check.require()
        ours = engines[OURS].calls[0]()
        for name, engine in engines.items():
            theirs = engine.calls[0]()
            if name != OURS and self._artifact.spec.layout == "NDHWC":
                theirs = theirs.movedim(1, -1)
            wrong = int((theirs != ours).sum())
            if wrong:
                raise VerificationError(
                    f"{name} and opcompile differ in {wrong} elements of {self._artifact.spec}, on integers whose sums "
                    "are exact, so nothing was timed"
                )


# --- time ---


@contextmanager
def _uncollected() -> Iterator[None]:
    """Let Python free nothing meanwhile: a CUDA graph that is freed while another is captured spoils it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass(slots=True, eq=False)
class _Series:
    """A CUDA graph of some calls, on buffers in turn; `sample` replays it between two events."""

    torch: Any
    calls: Sequence[Call]
    count: int = field(init=False)
    _graph: Any = field(init=False)
    _kept: list[Any] = field(init=False)
    _flushed: Any = field(init=False)
    _events: tuple[Any, Any] = field(init=False)

    def __post_init__(self) -> None:
        torch = self.torch
        self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            us = min(self._timed(self.calls[0]) for _ in range(3))
            self.count = max(1, min(_MOST_CALLS, int(_SAMPLE_US / us)))
            self._graph = torch.cuda.CUDAGraph()
            with _uncollected(), torch.cuda.graph(self._graph, stream=stream):
                # every Y is kept, so that none is written where the one before lies in the cache
                self._kept = [self.calls[n % len(self.calls)]() for n in range(self.count)]
        torch.cuda.synchronize()

    def sample(self) -> float:
        """Microseconds of one call, the mean over the graph."""
        self._flushed.zero_()
        return self._timed(self._graph.replay) / self.count

    def _timed(self, run: Call) -> float:
        begin, end = self._events
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3


def _in_turns(engines: dict[str, _Engine], series: dict[str, _Series], seconds: float) -> tuple[Timing, ...]:
    round_us = sum(s.sample() * s.count for s in series.values())
    samples = in_turns(lambda name: series[name].sample(), list(engines), seconds, round_us)
    return tuple(Timing(name, e.version, series[name].count, samples[name]) for name, e in engines.items())


class _Probes:
    """The limits of the GPU, as its own libraries reach them."""

    def __init__(self, torch: Any, spec: ConvTranspose3d) -> None:
        dtype = getattr(torch, spec.dtype)
        # drawn numbers: on zeros the clock stays higher
        self._factors = [torch.randn(_MATRIX, _MATRIX, device="cuda").to(dtype) for _ in range(2)]
        self._from, self._to = (torch.empty(_COPIED_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
        product = torch.empty_like(self._factors[0])
        self._product = _Series(torch, [lambda: torch.mm(*self._factors, out=product)])
        self._copy = _Series(torch, [lambda: self._to.copy_(self._from)])

    def samples(self, count: int = 5) -> tuple[Sample, ...]:
        """Measure both limits ``count`` times."""
        flop = 2 * _MATRIX**3
        return tuple(
            Sample(flop / self._product.sample() / 1e3, 2 * _COPIED_BYTES / self._copy.sample() / 1e3)
            for _ in range(count)
        )
