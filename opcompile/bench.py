"""Our kernel and other engines side by side: one process, the same processors, taking turns.

A machine is never the same twice, so nothing is compared with a number from another run. Each *round*
times every engine once, in an order that moves on by one each time; what is judged is the ratio
within a round, and of all rounds the median with its 95 % interval by order statistics, which assumes
nothing about how times are distributed. The rule:

* *faster* or *slower*: the interval lies wholly above or below 1;
* *no difference seen*: the interval holds 1 and is narrow;
* *too noisy*: it holds 1 and is wider than a fifth of the ratio; then nothing is concluded.

What is timed is the layer with constant weights, as a network runs it (`opcompile.engines`). Every
engine's output is checked first: small integers, to the last bit where the activation allows. Before and
after, in the same process on the same processors, the limits of the machine are measured
(`opcompile.probes`); then each engine's peak memory, in a process of its own (`opcompile._memory`).
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from opcompile._memory import weigh
from opcompile.arguments import checked_engines, checked_seconds, checked_seed
from opcompile.bounds import Answer, Inputs, compare_all
from opcompile.engines import OURS, PEERS, Engine, Job, Run, prepare
from opcompile.errors import CallError, EngineError, VerificationError, first_words
from opcompile.machine import processor, system
from opcompile.roofline import Roof
from opcompile.source import brief
from opcompile.spec import ConvTranspose3d, at_batch, require_layer
from opcompile.target import cores
from opcompile.tensors import stored
from opcompile.units import binary, duration, scaled
from schedules.counted import counted

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

    from opcompile.lower import PlanName

T = TypeVar("T")

_FEWEST_ROUNDS = 11
_MOST_ROUNDS = 500
# A sample is the mean over as many calls as fill this time: the clock is read every 0.1 us or so.
_SAMPLE_US = 500.0
# An interval around 1 that is wider than this share of its ratio: the machine was busy with something else.
_NOISY = 0.2
# Below this share of a processor somebody else was on it. A waiting thread sleeps, but then its workers do not.
OWN_CPU = 0.9
# What tables say where the two numbers of operations differ.
NOT_CROPPED = "GFLOP/s and the roofline count the products that are not cropped"
# Columns of a table, and which of them a narrow terminal is spared first.
_NUMBERS = ("min", "median", "p95", "GFLOP/s", "GB/s", "of roofline", "peak memory")
_SPARED = ("p95", "GB/s", "min", "peak memory", "GFLOP/s")
# Parameters of glibc's `mallopt`, by the names in its malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


# --- the report ---


@dataclass(frozen=True, slots=True)
class Timing:
    """All samples of one engine in microseconds, in the order of the rounds; each is a mean over ``calls``."""

    engine: str
    version: str
    calls: int
    samples_us: tuple[float, ...]

    @property
    def min_us(self) -> float:
        """The fastest sample."""
        return min(self.samples_us)

    @property
    def median_us(self) -> float:
        """The middle sample."""
        return statistics.median(self.samples_us)

    @property
    def p95_us(self) -> float:
        """The sample that 95 % do not exceed."""
        return sorted(self.samples_us)[math.ceil(0.95 * len(self.samples_us)) - 1]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast as ``peer`` we are: the median over rounds, and its 95 % interval."""

    peer: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``faster``, ``slower``, ``no difference seen`` or ``too noisy``."""
        if self.low > 1 or self.high < 1:
            return "faster" if self.low > 1 else "slower"
        return "no difference seen" if self.high - self.low <= _NOISY * self.ratio else "too noisy"


@dataclass(frozen=True, slots=True)
class BenchReport:
    """The timings of one layer, with the origin of every number; ``timings[0]`` is ours.

    ``threads`` is None on a GPU. ``pinned`` names the processors that the process was kept on, or is empty where the
    system cannot.
    ``flop`` counts every product of an input element and a weight, as layers are usually measured;
    ``needed_flop`` those that are not cropped, which alone bind the roofline. ``memory`` is the peak
    of each engine in bytes, beside X and Y; ``not_weighed`` says why one has none. ``cpu_share`` is the
    processor time of this process over the time that passed, all rounds together.
    """

    spec: str
    target: str
    plan: str
    threads: int | None
    pinned: tuple[int, ...]
    seed: int
    date: str
    machine: str
    versions: dict[str, str]
    flop: int
    needed_flop: int
    bytes: int
    roof: Roof
    cpu_share: float
    timings: tuple[Timing, ...]
    memory: dict[str, int]
    not_timed: dict[str, str]
    not_weighed: dict[str, str]

    @property
    def ratios(self) -> tuple[Ratio, ...]:
        """One for each peer that was timed."""
        ours, *peers = self.timings
        return tuple(ratio_of(ours, peer) for peer in peers)

    @property
    def best(self) -> Ratio | None:
        """The ratio to the fastest peer, by its median; None where no peer was timed."""
        peers = {t.engine: t.median_us for t in self.timings[1:]}
        return min(self.ratios, key=lambda r: peers[r.peer], default=None)

    def slower_than(self, ratio: float) -> bool:
        """Whether we are surely less than ``ratio`` times as fast as the fastest peer: the whole interval is below."""
        return self.best is not None and self.best.high < ratio

    def gflops(self, timing: Timing) -> float:
        """10^9 floating-point operations a second, at the median, cropped ones counted."""
        return self.flop / timing.median_us / 1e3

    def needed_gflops(self, timing: Timing) -> float:
        """10^9 needed operations a second, at the median: what is shown to people, beside the roofline."""
        return self.needed_flop / timing.median_us / 1e3

    def gbytes(self, timing: Timing) -> float:
        """10^9 bytes a second of X, W, B and Y, each counted once, at the median."""
        return self.bytes / timing.median_us / 1e3

    @property
    def ran_on(self) -> str:
        """What of the machine it ran on: the GPU, or so many threads."""
        return "on the GPU" if self.threads is None else counted(self.threads, "thread")

    @property
    def where(self) -> str:
        """The same, with the processors that it was kept on."""
        if self.threads is None:
            return self.ran_on
        return self.ran_on + (f" on CPU {', '.join(map(str, self.pinned))}" if self.pinned else ", not pinned")

    @property
    def noisy(self) -> str:
        """What the machine did beside timing, or nothing: then absolute times can be believed."""
        if self.cpu_share < OWN_CPU:
            return f"other work had the processor for {1 - self.cpu_share:.0%} of the time"
        return "the limits of the machine changed from sample to sample" if self.roof.noisy else ""

    @property
    def roofline_us(self) -> float:
        """The least time on this machine, in microseconds: needed work at its peak, or bytes at its bandwidth."""
        return self.roof.time_us(self.needed_flop, self.bytes)

    def share(self, timing: Timing) -> float:
        """The share of the roofline that is reached, at the median; above 1 where a cache holds the data."""
        return self.roofline_us / timing.median_us

    def to_json(self) -> dict[str, Any]:
        """Return plain values, all samples included."""
        timings = [
            {
                **asdict(t),
                "min_us": t.min_us,
                "median_us": t.median_us,
                "p95_us": t.p95_us,
                "gflops": round(self.gflops(t), 3),
                "gbytes": round(self.gbytes(t), 3),
                "share_of_roofline": round(self.share(t), 4),
                "peak_memory": self.memory.get(t.engine),
            }
            for t in self.timings
        ]
        ratios = [{**asdict(r), "verdict": r.verdict} for r in self.ratios]
        best = self.best.peer if self.best else None
        computed = {"roof": self.roof.to_json(), "roofline_us": self.roofline_us, "noisy": self.noisy}
        compared = {"timings": timings, "ratios": ratios, "fastest_peer": best}
        return {**asdict(self), **computed, **compared}

    def table(self) -> RenderableType:
        """Return the timings as a table for a terminal, with the verdict below it.

        A narrow terminal is spared columns, one after the other, rather than parts of names and numbers.
        """
        spared = range(len(_SPARED) + 1)
        return _Fitting((self._table(), *(self._table(_SPARED[:n], narrow=True) for n in spared)))

    def _table(self, spared: Sequence[str] = (), *, narrow: bool = False) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        without = [f"left out, as the terminal is narrow: {', '.join(spared)}; --json has all"] if spared else []
        table = Table(
            title=brief(ConvTranspose3d.parse(self.spec)),
            title_justify="left",
            caption=Text("\n".join([*without, *self._words()])),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0) if narrow else (0, 1),
        )
        table.add_column("engine", no_wrap=True)
        between = "\n" if narrow else " "
        shown = [heading for heading in _NUMBERS if heading not in spared]
        for heading in shown:
            table.add_column(heading.replace(" ", between), justify="right", no_wrap=True)
        for t in self.timings:
            cells = self._cells(t)
            table.add_row(f"{t.engine}{between}{t.version}", *(cells[heading] for heading in shown))
        return table

    def _cells(self, t: Timing) -> dict[str, str]:
        times = (duration(t.min_us), duration(t.median_us), duration(t.p95_us))
        rates = (f"{self.needed_gflops(t):.1f}", f"{self.gbytes(t):.2f}", f"{self.share(t):.0%}")
        weight = binary(self.memory[t.engine]) if t.engine in self.memory else "-"
        return dict(zip(_NUMBERS, (*times, *rates, weight), strict=True))

    def _words(self) -> Iterator[str]:
        """Yield what stands below the table: verdicts, the roofline, what is missing, and the circumstances."""
        for r in self.ratios:
            yield f"{r.ratio:.2f} times as fast as {r.peer} ({r.low:.2f} to {r.high:.2f}): {r.verdict}"
        limits = f"{scaled(self.needed_flop, 'FLOP')} at {self.roof.gflops:.0f} GFLOP/s"
        limits += f", {scaled(self.bytes, 'B')} at {self.roof.gbytes:.1f} GB/s"
        bound = self.roof.bound(self.needed_flop, self.bytes)
        yield f"roofline: {duration(self.roofline_us)}, bound by {bound} ({limits})"
        if self.flop != self.needed_flop:
            yield f"{NOT_CROPPED}: {scaled(self.needed_flop, 'FLOP')} of {scaled(self.flop, 'FLOP')}"
        if self.noisy:
            yield f"too noisy: {self.noisy}; times and shares say little, ratios what their intervals say"
        yield from (f"not timed: {name}: {reason}" for name, reason in self.not_timed.items())
        yield from (f"peak memory of {name} is unknown: {reason}" for name, reason in self.not_weighed.items())
        yield f"{self.where}; {len(self.timings[0].samples_us)} rounds; plan {self.plan}; seed {self.seed}; {self.date}"
        yield self.machine


@dataclass(frozen=True, slots=True)
class _Fitting:
    """The first of several tables that is no wider than the terminal, or the last."""

    tables: Sequence[Table]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        fits = (t for t in self.tables if t.__rich_measure__(console, options).maximum <= options.max_width)
        yield next(fits, self.tables[-1])


def ratio_of(ours: Timing, peer: Timing) -> Ratio:
    """Compare two engines that took turns: the median over the rounds, and where it lies."""
    ratios = sorted(p / o for o, p in zip(ours.samples_us, peer.samples_us, strict=True))
    low, high = median_interval(len(ratios))
    return Ratio(peer.engine, statistics.median(ratios), ratios[low], ratios[high])


def median_interval(n: int) -> tuple[int, int]:
    """Return the positions in ``n`` sorted samples between which the median lies with 95 % probability.

    How many samples fall below the median is binomial: the outermost ones are dropped while at most
    2.5 % is lost on each side. Up to five samples cannot be so sure, and then it is the whole range.
    """
    lost, below = 0.0, 0
    while True:
        lost += math.comb(n, below) / 2**n
        if lost > 0.025:
            return max(below - 1, 0), n - 1 - max(below - 1, 0)
        below += 1


# --- measuring ---


def bench(
    spec: ConvTranspose3d,
    *,
    against: Iterable[str] = ("onnxruntime",),
    threads: int = 1,
    target: str = "llvm",
    plan: PlanName = "best",
    seconds: float = 2.0,
    seed: int = 0,
    memory: bool = True,
) -> BenchReport:
    """Time ``spec`` on this machine, in turns with the engines of ``against``, for about ``seconds`` each.

    A dynamic batch is timed with one image. A peer that is not installed, cannot say the layer, or gives a
    wrong output, is listed with its reason. ``memory`` weighs each engine afterwards, in a process of its own.
    Raises `CallError` for an unknown engine or more ``threads`` than there are processors,
    `VerificationError` where our output is wrong: such a result is never timed.
    """
    require_layer(spec)
    seconds, seed, against = checked_seconds(seconds), checked_seed(seed), checked_engines(against, "against", PEERS)
    if type(threads) is not int or not 1 <= threads <= cores():
        raise CallError(f"threads is {threads!r}, but must be from 1 to {cores()}, the processors this process may use")
    from opcompile.build import compile  # on use: both bring the compiler
    from opcompile.probes import Probes

    inputs, exact = small_inputs(spec, np.random.default_rng(seed))
    artifact = compile(spec, target, plan, weight=inputs.w, bias=inputs.b)
    job = Job(spec, artifact.directory, inputs.x, inputs.w, inputs.b, threads)
    with pinned_to(threads) as pinned:
        engines, not_timed = _prepared(tuple(dict.fromkeys(against)), job)
        wrong = _wrong(inputs, engines, exact)
        engines = {name: engine for name, engine in engines.items() if name not in wrong}
        probes = Probes(engines[OURS].computed_in, threads)
        before = probes.samples()
        cpu, wall = time.process_time(), time.perf_counter()
        with memory_kept():
            timings, failed = _turns_of_all(engines, seconds)
        engines = {name: engine for name, engine in engines.items() if name not in failed}
        cpu_share = (time.process_time() - cpu) / (time.perf_counter() - wall)
        roof = Roof(probes.dtype, before, probes.samples())
        weights, not_weighed = answer_to_each(engines if memory else (), lambda name: weigh(name, job))
    return BenchReport(
        **timed(spec, artifact.manifest),
        threads=threads,
        pinned=pinned,
        seed=seed,
        machine=f"{processor()}; {system()}",
        roof=roof,
        cpu_share=round(cpu_share, 3),
        timings=timings,
        memory=weights,
        not_timed={**not_timed, **wrong, **failed},
        not_weighed=not_weighed,
    )


def timed(spec: ConvTranspose3d, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a report that say what was timed, and when."""
    return {
        "spec": str(spec),
        "target": str(manifest["target"]["name"]),
        "plan": f"{manifest['plan']['name']}, {manifest['plan']['schedule']}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {k: str(v) for k, v in manifest["versions"].items()},
        "flop": spec.flops,
        "needed_flop": spec.needed_flops,
        "bytes": spec.bytes(),
    }


def _prepared(names: Sequence[str], job: Job) -> tuple[dict[str, Engine], dict[str, str]]:
    """Return the engines that can compute the layer, ours first, and the reasons of those that cannot."""
    ours = prepare(OURS, job)
    peers, not_timed = answer_to_each(names, lambda name: prepare(name, job))
    return {OURS: ours, **peers}, not_timed


def answer_to_each(names: Iterable[str], ask: Callable[[str], T]) -> tuple[dict[str, T], dict[str, str]]:
    """Return what each engine answers, and the reasons of those that cannot."""
    answers, reasons = {}, {}
    for name in names:
        try:
            answers[name] = ask(name)
        except EngineError as error:
            reasons[name] = str(error)
    return answers, reasons


@contextmanager
def pinned_to(threads: int) -> Iterator[tuple[int, ...]]:
    """Keep this thread, and those it starts, on as many processors; afterwards as before."""
    if not hasattr(os, "sched_setaffinity"):
        yield ()
        return
    before = os.sched_getaffinity(0)
    chosen = sorted(before)[-threads:]  # the first one serves most interrupts
    os.sched_setaffinity(0, chosen)
    try:
        yield tuple(chosen)
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def memory_kept() -> Iterator[None]:
    """Let what an engine frees stay with this process, so that it has the same pages in its next turn.

    An engine that makes its Y in each call would otherwise have fresh pages each time, or not: whether glibc
    maps a large block anew depends on what the process happened to free before, and a page fault every
    4 KiB is up to a third of a layer's time. Afterwards glibc's limits are what they grow to by themselves.
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is None:
        yield
        return
    mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, 1 << 16)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)
        malloc_trim(0)


def small_inputs(spec: ConvTranspose3d, rng: np.random.Generator) -> tuple[Inputs, bool]:
    """Draw integers so small that every sum is exact, where there are such; else normal numbers."""
    largest = min(3, math.isqrt((2**24 - 1) // (spec.terms + 1)))
    shapes = (at_batch(spec.x_shape, 1), spec.w_shape, (spec.channels_out,))
    if largest:
        drawn = [rng.integers(-largest, largest + 1, shape).astype(np.float32) for shape in shapes]
    else:
        drawn = [rng.standard_normal(shape, np.float32) for shape in shapes]
    x, w, b = (stored(spec.dtype, values) for values in drawn)
    return Inputs.of(spec, x, w, b if spec.bias else None), largest > 0


class PeerFailedError(EngineError):
    """A peer, ``name``, that raised while it was timed."""

    def __init__(self, name: str, error: Exception) -> None:
        """Say what it said."""
        super().__init__(f"it failed: {first_words(error)}")
        self.name = name


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """Say which peer it was that raised."""
    try:
        yield
    except Exception as error:
        if name == OURS:
            raise
        raise PeerFailedError(name, error) from error


def _turns_of_all(engines: dict[str, Engine], seconds: float) -> tuple[tuple[Timing, ...], dict[str, str]]:
    """Let all take turns; a peer that fails is left out, for the reason that is returned, and they begin again."""
    failed: dict[str, str] = {}
    while True:
        try:
            return take_turns({n: engine for n, engine in engines.items() if n not in failed}, seconds), failed
        except PeerFailedError as error:
            failed[error.name] = str(error)


def take_turns(engines: dict[str, Engine], seconds: float) -> tuple[Timing, ...]:
    """Warm up, find out how many calls fill a sample, then time round after round. Raises `PeerFailedError`."""
    calls = {}
    for name, engine in engines.items():
        with _asking(name):
            calls[name] = _calls(engine.run)
    round_us = sum(count * us for count, us in calls.values())

    def sample(name: str) -> float:
        count, us = calls[name]
        with _asking(name):
            if us < _SAMPLE_US:
                engines[name].run()  # what fits into the caches is brought back into them
            return _time(engines[name].run, count)

    samples = in_turns(sample, list(engines), seconds, round_us)
    return tuple(Timing(name, e.version, calls[name][0], samples[name]) for name, e in engines.items())


def in_turns(
    sample: Callable[[str], float], names: list[str], seconds: float, round_us: float
) -> dict[str, tuple[float, ...]]:
    """Sample each of ``names`` round after round, in an order that moves on by one, for about ``seconds`` each.

    Never in so few rounds that nothing can be concluded.
    """
    samples: dict[str, list[float]] = {name: [] for name in names}
    rounds = min(max(int(seconds * len(names) * 1e6 / round_us), _FEWEST_ROUNDS), _MOST_ROUNDS)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(sample(name))
    return {name: tuple(taken) for name, taken in samples.items()}


def _calls(run: Run) -> tuple[int, float]:
    """Return how many calls make a sample, and the time of one in microseconds."""
    run()
    us = min(_time(run, 1) for _ in range(3))
    return max(1, math.ceil(_SAMPLE_US / us)), us


def _time(run: Run, calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        run()
    return (time.perf_counter_ns() - start) / 1e3 / calls


def _wrong(inputs: Inputs, engines: dict[str, Engine], exact: bool) -> dict[str, str]:
    """Return what is wrong with the outputs of peers. Raises `VerificationError` where ours are."""

    def answer(name: str) -> Answer:
        with _asking(name):
            engines[name].run()
            return Answer(engines[name].y(), engines[name].computed_in)

    answers, failed = answer_to_each(engines, answer)
    pairs = [(name, "reference") for name in answers]
    wrong = {name: check for (name, _), check in compare_all(inputs, answers, exact, pairs).items() if not check.passed}
    if OURS in wrong:
        raise VerificationError(f"{OURS} is wrong on {inputs.spec}, so nothing was timed: {wrong[OURS]}")
    return failed | {name: f"its output is wrong: {check}" for name, check in wrong.items()}
