"""Timings side by side: what is timed is right, taken in turns, pinned, and judged by a stated rule."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from opcompile import compile, export_onnx, probes, summary, tune, verify
from opcompile._memory import weigh
from opcompile.bench import BenchReport, Ratio, Timing, bench, median_interval, memory_kept
from opcompile.bench_gpu import _as_documented, bench_gpu
from opcompile.bounds import PAIRS
from opcompile.engines import PEERS, Engine, Job, prepare
from opcompile.errors import CallError, EngineError, TargetError, VerificationError
from opcompile.plot import plot
from opcompile.roofline import Roof, Sample
from opcompile.spec import ConvTranspose3d, at_batch
from opcompile.target import flagged, processor_flags, target

pytestmark = pytest.mark.usefixtures("as_scheduled")

SPEC = ConvTranspose3d.parse("in=1x4x3x4x5 co=6 k=2 s=2")

# 100 GFLOP/s and 10 GB/s
ROOF = Roof("float32", (Sample(99.0, 10.0), Sample(100.0, 8.0)), (Sample(98.0, 9.5),))


def report_of(samples: dict[str, list[float]], roof: Roof = ROOF) -> BenchReport:
    """A report on made-up samples in microseconds; ours first."""
    timings = tuple(Timing(engine, "1.0", 1, tuple(times)) for engine, times in samples.items())
    return BenchReport(
        spec=str(SPEC),
        target="llvm:x86-64-v3",
        plan="baseline, row-vectors",
        threads=1,
        pinned=(1,),
        seed=0,
        date="2026-01-01T00:00:00+00:00",
        machine="an example",
        versions={},
        flop=SPEC.flops,
        needed_flop=SPEC.needed_flops,
        bytes=SPEC.bytes(),
        roof=roof,
        cpu_share=1.0,
        timings=timings,
        memory={"opcompile": 3 << 20},
        not_timed={"torch": "pip install 'opcompile[peers]'"},
        not_weighed={"onnxruntime": "it was tired"},
    )


@pytest.fixture(scope="module")
def measured() -> BenchReport:
    return bench(SPEC, against=("onnxruntime", "torch"), plan="baseline", seconds=0.05, seed=3)


# --- a real run ---


def test_every_number_carries_its_origin(measured: BenchReport) -> None:
    content = json.loads(json.dumps(measured.to_json()))
    assert content["spec"] == str(SPEC)
    assert content["seed"] == 3
    assert content["threads"] == 1
    assert content["plan"].startswith("baseline")
    assert {"opcompile", "apache-tvm", "numpy", "onnx"} <= content["versions"].keys()
    assert "Python" in content["machine"]
    engines = {timing["engine"]: timing for timing in content["timings"]}
    assert list(engines)[:2] == ["opcompile", "onnxruntime"]
    assert "torch" in {**engines, **content["not_timed"]}
    for timing in engines.values():
        samples = timing["samples_us"]
        assert len(samples) >= 11
        assert 0 < timing["min_us"] <= timing["median_us"] <= timing["p95_us"] <= max(samples)
        assert timing["calls"] * timing["median_us"] > 50
        assert timing["gflops"] == pytest.approx(SPEC.flops / timing["median_us"] / 1e3, abs=1e-3)


def test_a_round_holds_one_sample_of_each(measured: BenchReport) -> None:
    assert len({len(timing.samples_us) for timing in measured.timings}) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_the_process_is_pinned_while_timing_and_not_after(monkeypatch: pytest.MonkeyPatch) -> None:
    import opcompile.bench as module

    seen = []

    def looking(engines: dict[str, Any], seconds: float) -> tuple[Timing, ...]:
        seen.append(os.sched_getaffinity(0))
        raise EngineError("far enough")

    before = os.sched_getaffinity(0)
    monkeypatch.setattr(module, "take_turns", looking)
    with pytest.raises(EngineError):
        bench(SPEC, against=(), plan="baseline")
    assert [len(cpus) for cpus in seen] == [1]
    assert os.sched_getaffinity(0) == before


def test_engines_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    import opcompile.bench as module

    calls: list[str] = []
    engines = {name: Engine("1", lambda name=name: calls.append(name), np.empty, "float32") for name in ("a", "b", "c")}
    monkeypatch.setattr(module, "_calls", lambda _: (1, 1e6))
    timings = module.take_turns(engines, 0.01)
    assert [len(timing.samples_us) for timing in timings] == [11, 11, 11]
    assert "".join(calls[:9]) == "abcbcacab"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_a_fresh_y_has_the_same_pages_in_each_turn() -> None:
    """PyTorch makes its Y in each call; whether that is mapped anew must not hang on what was freed before."""
    import resource

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        np.empty(40 << 20, np.uint8)[::4096] = 1
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    with memory_kept():
        faults()
        assert max(faults() for _ in range(3)) < 10
    assert faults() > 10


def bent(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let an engine add one to some of its outputs."""
    import opcompile.engines as engines

    def maker(*args: Any) -> Any:
        engine = honest(*args)
        return replace(engine, y=lambda: engine.y() + np.float32([0, 0, 0, 1, 0, 0, 0, 0, 0, 0]))

    honest = engines._MAKERS[name]
    monkeypatch.setitem(engines._MAKERS, name, maker)


def test_a_wrong_result_of_ours_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bent(monkeypatch, "opcompile")
    monkeypatch.setattr("opcompile.bench.take_turns", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(VerificationError, match=r"opcompile is wrong .* nothing was timed"):
        bench(SPEC, plan="baseline")


def test_a_peer_that_is_wrong_is_listed_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bent(monkeypatch, "onnxruntime")
    report = bench(SPEC, plan="baseline", seconds=0.01)
    assert [timing.engine for timing in report.timings] == ["opcompile"]
    assert re.match("its output is wrong: FAIL .* elements", report.not_timed["onnxruntime"])
    assert "onnxruntime" not in report.memory


@pytest.mark.parametrize("call", [1, 2, 9])
def test_a_peer_that_fails_is_listed_and_not_timed(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its first call, as calls are counted for a sample, or while it is timed."""
    import opcompile.engines as engines

    calls = 0

    def maker(*args: Any) -> Any:
        def run() -> None:
            nonlocal calls
            calls += 1
            if calls >= call:
                raise RuntimeError("no room for\ny")
            engine.run()

        engine = honest(*args)
        return replace(engine, run=run)

    honest = engines._MAKERS["onnxruntime"]
    monkeypatch.setitem(engines._MAKERS, "onnxruntime", maker)
    report = bench(SPEC, plan="baseline", seconds=0.01)
    assert [timing.engine for timing in report.timings] == ["opcompile"]
    assert report.not_timed["onnxruntime"].startswith("it failed: no room for")
    assert "onnxruntime" not in report.memory


@pytest.mark.parametrize(
    "text",
    [
        "in=Nx2x2x3x4 co=3 k=3 s=2 act=relu",
        "in=1x2x2x3x4 co=3 k=2 s=2 dtype=float64 layout=NDHWC",
        "in=1x2x2x3x4 co=3 k=2 s=2 dtype=float16 bias=0",
        "in=1x2x2x3x4 co=3 k=2 s=2 op=2 act=tanh",
    ],
)
def test_every_kind_of_layer_is_timed(text: str) -> None:
    report = bench(ConvTranspose3d.parse(text), plan="baseline", seconds=0.01, memory=False)
    assert [timing.engine for timing in report.timings] == ["opcompile", "onnxruntime"]
    assert report.not_timed == {}


def test_bfloat16_is_timed_alone() -> None:
    report = bench(
        ConvTranspose3d.parse("in=1x2x2x2x2 co=2 k=1 dtype=bfloat16"), plan="baseline", seconds=0.01, memory=False
    )
    assert [timing.engine for timing in report.timings] == ["opcompile"]
    assert "bfloat16" in report.not_timed["onnxruntime"]
    assert report.best is None
    assert not report.slower_than(1e9)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("in=1x1x2x2x2 co=1 k=1 dtype=float16", "float16"),
        ("in=1x1x2x2x2 co=1 k=1 act=relu", "relu"),
        ("in=1x1x2x2x2 co=1 k=3 p=1:0", "asymmetric padding 1:0"),
        ("in=1x1x2x2x2 co=1 k=3 s=2 op=2", "output_padding 2"),
    ],
)
def test_what_torch_cannot_say_is_said(text: str, reason: str) -> None:
    from opcompile.engines import require_torch_can

    with pytest.raises(EngineError, match=reason):
        require_torch_can(ConvTranspose3d.parse(text))


@pytest.mark.peers
@pytest.mark.parametrize(
    ("text", "peers"),
    [
        ("in=2x4x3x4x5 co=6 k=3x2x3 s=3x2x1 d=2x1x1 p=1x0x1 op=2x1x0 g=2", PEERS),
        ("in=1x4x3x4x5 co=6 k=3 s=2 p=1 op=1 layout=NDHWC", ("onnxruntime", "torch-channels-last", "openvino")),
        ("in=1x4x3x4x5 co=6 k=2 s=2 dtype=float64", ("onnxruntime", "torch", "torch-channels-last")),
        ("in=Nx4x3x4x5 co=6 k=2 s=2 dtype=float16 act=relu", ("onnxruntime", "openvino")),
    ],
)
def test_every_peer_is_timed_where_it_can_say_the_layer(text: str, peers: tuple[str, ...]) -> None:
    report = bench(
        ConvTranspose3d.parse(text), against=PEERS, plan="baseline", seconds=0.02, memory=text.startswith("in=2")
    )
    assert [timing.engine for timing in report.timings] == ["opcompile", *peers]
    assert report.not_timed.keys() == set(PEERS) - set(peers)
    assert report.memory.keys() == ({"opcompile", *peers} if text.startswith("in=2") else set())


@pytest.mark.peers
def test_torch_is_given_channels_last() -> None:
    import torch

    given = []

    def looking(x: Any, w: Any, *rest: Any, **options: Any) -> Any:
        given.append([t.is_contiguous(memory_format=torch.channels_last_3d) for t in (x, w)])
        return honest(x, w, *rest, **options)

    honest = torch.nn.functional.conv_transpose3d
    spec = ConvTranspose3d.parse("in=1x4x3x4x5 co=6 k=3 s=2 p=1 op=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv_transpose3d", looking)
        prepare("torch-channels-last", job_of(spec)).run()
        prepare("torch", job_of(spec)).run()
    assert given == [[True, True], [False, False]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"against": ("abacus",)}, "abacus"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 10**6}, "threads is 1000000"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CallError, match=words):
        bench(SPEC, **options)


# --- the limits of the machine ---


def assembly(name: str, dtype: str) -> list[str]:
    """The multiply-adds of the probe, in the assembly of a machine that need not be at hand."""
    import tvm

    machine = target(name)
    function = probes.multiply_add(dtype, *probes.vectors(machine.machine, dtype))
    with tvm.target.Target(machine.tvm()) as tvm_target:
        compiled = tvm.compile(tvm.IRModule({"multiply_add": function}), target=tvm_target)
    return [line.strip() for line in compiled.mod.inspect_source("asm").splitlines() if "fmadd" in line]


@pytest.mark.parametrize(
    ("name", "dtype", "instruction", "register", "count"),
    [
        ("llvm:x86-64-v4", "float32", "ps", "zmm", 24),
        ("llvm:x86-64-v4", "float64", "pd", "zmm", 24),
        ("llvm:x86-64-v3", "float32", "ps", "ymm", 12),
    ],
)
def test_the_probe_adds_in_registers_alone(name: str, dtype: str, instruction: str, register: str, count: int) -> None:
    lines = assembly(name, dtype)
    assert len(lines) % count == 0
    assert {line.split()[0][-2:] for line in lines} == {instruction}
    assert all(line.count(register) == 3 for line in lines), "an operand in memory"
    assert len({line.split(",")[-1] for line in lines}) == count, "sums of their own"


@pytest.mark.parametrize("name", flagged())
def test_the_probe_of_pairs_adds_in_registers_alone(name: str) -> None:
    import tvm

    with tvm.target.Target(target(name).tvm()) as tvm_target:
        compiled = tvm.compile(tvm.IRModule({"multiply_add": probes.multiply_pairs(24)}), target=tvm_target)
    text = compiled.mod.inspect_source("asm")
    lines = [line.strip() for line in text.splitlines() if "vdpbf16ps" in line]
    assert len(lines) % 24 == 0
    assert all(line.count("zmm") == 3 for line in lines), "an operand in memory"
    assert len({line.split(",")[-1] for line in lines}) == 24, "sums of their own"


@pytest.mark.skipif("avx512_bf16" not in processor_flags(), reason="this processor lists no avx512_bf16")
def test_the_probe_of_pairs_computes_what_it_says_and_counts_both_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_largest_cache", lambda: 1 << 20)
    monkeypatch.setattr(probes, "_STEPS", 1000)
    found = probes.Probes(PAIRS, 1)
    (y,) = found._registers
    assert set(y.numpy()) == {500.0}
    monkeypatch.setattr(found, "_time", lambda runs: 1000)
    assert found.sample().gflops == 2 * 2 * 16 * found._sums


@pytest.mark.skipif("avx512_bf16" not in processor_flags(), reason="this processor lists no avx512_bf16")
def test_pairs_are_timed_under_a_roof_of_their_own() -> None:
    spec = ConvTranspose3d.parse("in=1x16x4x4x16 co=8 k=2 s=2 dtype=bfloat16")
    report = bench(spec, target="llvm+bf16", plan="baseline", against=(), seconds=0.01, memory=False)
    assert report.roof.dtype == PAIRS
    assert report.target.endswith("+bf16")


def test_the_probes_compute_what_they_say() -> None:
    import tvm

    multiply_add, copy, lanes, sums = probes._compiled("float32")
    y = tvm.runtime.tensor(np.zeros(lanes * sums, np.float32))
    multiply_add(y, 3)
    assert (y.numpy() == 1.75).all()
    source = np.arange(640, dtype=np.uint8)
    x, y = tvm.runtime.tensor(source), tvm.runtime.tensor(np.zeros_like(source))
    copy(x, y, 10)
    assert (y.numpy() == source).all()


def test_a_machine_has_limits(measured: BenchReport) -> None:
    assert len(measured.roof.before) == len(measured.roof.after) == 5
    assert 0.1 < measured.roof.gflops < 1e6
    assert 0.1 < measured.roof.gbytes < 1e5


def test_every_thread_has_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_largest_cache", lambda: 1 << 20)
    monkeypatch.setattr(probes, "_STEPS", 1000)
    found = probes.Probes("float32", 3)
    for x, y in found._buffers:
        assert x.shape[0] * 3 >= 2 << 20
        assert (y.numpy() == 1).all()
    assert all((y.numpy() > 1.9).all() for y in found._registers)


def test_the_roofline_is_the_larger_of_two_times() -> None:
    assert (ROOF.gflops, ROOF.gbytes) == (100, 10)
    assert (ROOF.time_us(10**8, 10**6), ROOF.bound(10**8, 10**6)) == (1000, "compute")
    assert (ROOF.time_us(10**8, 10**8), ROOF.bound(10**8, 10**8)) == (10000, "memory")


def test_the_share_counts_no_product_that_is_cropped() -> None:
    report = report_of({"opcompile": [10.0] * 20})
    report = replace(report, flop=10**9, needed_flop=500_000, bytes=1)
    assert report.roofline_us == 5
    assert report.share(report.timings[0]) == 0.5
    assert report.gflops(report.timings[0]) == 1e5


def test_limits_that_change_are_noise() -> None:
    steady = (Sample(100, 10), Sample(99, 9), Sample(50, 9))
    assert not Roof("float32", steady, steady).noisy
    assert Roof("float32", steady, (Sample(79, 10),) * 3).noisy
    assert Roof("float32", (Sample(100, 7.9),) * 3, steady).noisy
    for report in (
        report_of({"opcompile": [1.0] * 20}, Roof("float32", steady, (Sample(79, 10),) * 3)),
        replace(report_of({"opcompile": [1.0] * 20}), cpu_share=0.6),
    ):
        assert report.noisy
        assert f"too noisy: {report.noisy}" in shown(report)
    assert report_of({"opcompile": [1.0] * 20}).noisy == ""


# --- peak memory ---


def job_of(spec: ConvTranspose3d) -> Job:
    x, w, b = (np.ones(at_batch(shape, 1), spec.dtype) for shape in (spec.x_shape, spec.w_shape, (6,)))
    return Job(spec, compile(spec, plan="baseline", weight=w, bias=b).directory, x, w, b, 1)


def test_every_engine_is_weighed(measured: BenchReport) -> None:
    assert measured.not_weighed == {}
    assert measured.memory.keys() == {timing.engine for timing in measured.timings}
    assert all(0 < size < 2**30 for size in measured.memory.values())


def test_weights_weigh() -> None:
    spec = ConvTranspose3d.parse("in=1x512x1x1x1 co=6 k=8")
    job = job_of(spec)
    # and a huge page of workspaces
    assert job.w.nbytes <= weigh("opcompile", job) < 4 * job.w.nbytes + (4 << 20)
    assert job.w.nbytes <= weigh("onnxruntime", job) < 4 * job.w.nbytes


def test_x_and_y_do_not_weigh() -> None:
    job = job_of(ConvTranspose3d.parse("in=1x6x64x64x64 co=6 k=1"))
    assert job.x.nbytes == 6 << 20
    assert weigh("opcompile", job) < 5 << 20


def test_what_cannot_be_weighed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")
    report = bench(SPEC, plan="baseline", seconds=0.01)
    assert report.memory == {}
    assert "status 1" in report.not_weighed["onnxruntime"]
    assert "peak memory of onnxruntime is unknown: the weighing process" in shown(report)


# --- several layers ---


def test_a_summary_has_a_line_a_layer() -> None:
    one = report_of({"opcompile": [1000.0] * 20, "onnxruntime": [2000.0] * 20, "torch": [3000.0] * 20})
    two = replace(report_of({"opcompile": [1000.0] * 20, "onnxruntime": [500.0] * 20}), cpu_share=0.5)
    three = report_of({"opcompile": [1000.0] * 20})
    lines = summary.markdown({"a|b": one, "two": two, "three": three}).splitlines()
    assert lines[0].startswith("| layer | time | GFLOP/s | of roofline |")
    assert lines[2].startswith("| a\\|b | 1 ms | ")
    assert lines[2].endswith("| 3 MiB | onnxruntime | 2 ms | 2.00 |")
    assert "(too noisy)" in lines[3]
    assert lines[4].endswith("| - | - | - |")
    assert "1.00 times as fast (geometric mean of 2; faster 1, slower 1)" in lines[6]
    console = Console(width=200)
    with console.capture() as printed:
        console.print(summary.table({"a": one}))
    assert "onnxruntime" in printed.get()


@pytest.mark.peers
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_shows_every_layer_and_engine(tmp_path: Path, suffix: str) -> None:
    one = report_of({"opcompile": [1000.0] * 20, "onnxruntime": [2000.0] * 20, "openvino": [3000.0] * 20})
    path = tmp_path / f"picture.{suffix}"
    with matplotlib_text():
        plot({"this layer": one, "that layer": one}, path)
    content = path.read_bytes()
    if suffix == "png":
        assert content.startswith(b"\x89PNG")
        return
    for words in ("1  this layer", "2  that layer", "openvino", "100 GFLOP/s, 10.0 GB/s", "an example; 1 thread"):
        assert words in content.decode(), words


@contextmanager
def matplotlib_text() -> Iterator[None]:
    """Let SVG hold text as text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        yield


def test_a_picture_that_cannot_be_drawn_is_said_before_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CallError, match=r"f\.bmp .*\.png"):
        plot({}, "f.bmp")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EngineError, match=r"opcompile\[plot\]"):
        plot({}, "f.png")


# --- the judgement ---


@pytest.mark.parametrize(
    ("n", "position"),
    # tables of the sign test give these (David and Nagaraja 2003, 7.1), counted from 0
    [(1, 0), (5, 0), (6, 0), (9, 1), (11, 1), (12, 2), (20, 5), (25, 7), (50, 17)],
)
def test_the_interval_of_a_median(n: int, position: int) -> None:
    assert median_interval(n) == (position, n - 1 - position)


def test_the_interval_holds_the_median_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    low, high = median_interval(30)
    samples = np.sort(rng.exponential(size=(4000, 30)), axis=1)
    held = (samples[:, low] <= math.log(2)) & (math.log(2) <= samples[:, high])
    assert 0.95 <= held.mean() <= 0.98


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Ratio("p", 1.5, 1.4, 1.6), "faster"),
        (Ratio("p", 0.7, 0.65, 0.75), "slower"),
        (Ratio("p", 1.0, 0.95, 1.05), "no difference seen"),
        (Ratio("p", 3.0, 1.5, 4.5), "faster"),
        (Ratio("p", 1.0, 0.91, 1.1), "no difference seen"),
        (Ratio("p", 1.0, 0.89, 1.11), "too noisy"),
        (Ratio("p", 1.4, 0.9, 1.6), "too noisy"),
    ],
)
def test_the_verdict_follows_the_rule(ratio: Ratio, verdict: str) -> None:
    assert ratio.verdict == verdict


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that slows down for both in most of the rounds changes no ratio."""
    ours = [1.0, 5.0, 25.0] * 7
    report = report_of({"opcompile": ours, "onnxruntime": [2 * t for t in ours], "torch": [3 * t for t in ours]})
    assert [(r.peer, r.ratio, r.low, r.high) for r in report.ratios] == [("onnxruntime", 2, 2, 2), ("torch", 3, 3, 3)]
    assert report.best is not None
    assert report.best.peer == "onnxruntime"
    assert (report.slower_than(2.0), report.slower_than(2.1)) == (False, True)


def test_slower_than_asked_means_the_whole_interval() -> None:
    report = report_of({"opcompile": [1.0] * 20, "onnxruntime": [2.0 + n / 100 for n in range(20)]})
    assert report.best is not None
    assert 2.0 < report.best.low < 2.09 < report.best.ratio < 2.1 < report.best.high < 2.19
    assert (report.slower_than(2.1), report.slower_than(2.19)) == (False, True)


def test_nothing_is_concluded_from_noise() -> None:
    report = report_of({"opcompile": [1.0] * 20, "onnxruntime": [0.1, 4.0] * 10})
    assert report.ratios[0].verdict == "too noisy"
    assert not report.slower_than(3.9)


def shown(report: BenchReport, width: int = 120) -> str:
    console = Console(width=width)
    with console.capture() as printed:
        console.print(report.table())
    return printed.get()


def test_the_table_tells_all() -> None:
    report = report_of({"opcompile": [1000.0] * 20, "onnxruntime": [1500.0] * 20})
    for words in (
        "in=1x4x3x4x5 co=6 k=2 s=2",
        "1.50 ms",
        "1.50 times as fast as onnxruntime (1.50 to 1.50): faster",
        "not timed: torch: pip install 'opcompile[peers]'",
        "1 thread on CPU 1; 20 rounds",
        "an example",
        "3 MiB",
        "peak memory of onnxruntime is unknown: it was tired",
        "bound by memory (23.0 kFLOP at 100 GFLOP/s, ",
    ):
        assert words in shown(report)
    assert "too noisy" not in shown(report)


@pytest.mark.parametrize(
    ("width", "left_out"), [(120, ""), (80, "p95"), (70, "p95, GB/s"), (44, "p95, GB/s, min, peak memory, GFLOP/s")]
)
def test_a_narrow_table_has_whole_names_and_says_what_it_lacks(width: int, left_out: str) -> None:
    report = report_of({"opcompile": [1000.0] * 20, "torch-channels-last": [1500.0] * 20})
    text = shown(report, width)
    assert "torch-channels-last" in text
    assert "…" not in text
    assert "1.50 ms" in text
    assert max(map(len, text.splitlines())) <= width
    words = f"left out, as the terminal is narrow: {left_out}; --json has all"
    assert (words in " ".join(text.split())) == bool(left_out)


def test_tables_count_what_is_not_cropped() -> None:
    cropped = ConvTranspose3d.parse("in=1x4x3x4x5 co=6 k=4 s=2 p=1")
    report = report_of({"opcompile": [10.0] * 20})
    report = replace(report, spec=str(cropped), flop=cropped.flops, needed_flop=cropped.needed_flops)
    note = "GFLOP/s and the roofline count the products that are not cropped"
    assert (report.flop, report.needed_flop) == (184_320, 120_960)
    assert f"{note}: 121 kFLOP of 184 kFLOP" in report._words()
    assert " 12.1 " in shown(report)
    assert "| 10 us | 12.1 |" in summary.markdown({"a": report})
    assert f"- {note}\n" in summary.markdown({"a": report})
    assert report.to_json()["timings"][0]["gflops"] == 18.432
    assert not any(note in line for line in report_of({"opcompile": [10.0] * 20})._words())


# --- on a GPU: what needs none of it ---


def test_a_report_of_a_gpu_has_no_threads() -> None:
    on_gpu = replace(report_of({"opcompile": [1.0] * 11, "cudnn": [2.0] * 11}), threads=None, pinned=())
    assert on_gpu.where == "on the GPU"
    assert any(line.startswith("on the GPU; 11 rounds") for line in on_gpu._words())
    assert "an example; on the GPU; llvm:x86-64-v3; 2026-01-01" in summary.markdown({"a": on_gpu})


def test_without_a_gpu_none_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise TargetError("there is no driver")

    monkeypatch.setattr("opcompile.bench_gpu.device", no_driver)
    with pytest.raises(TargetError, match=r"cannot be timed here: there is no driver.*; or compile .*bench_artifact"):
        bench_gpu(SPEC, target="cuda:sm_90")


def test_what_is_timed_on_a_gpu_is_known() -> None:
    with pytest.raises(CallError, match="engine 'openvino' is unknown here; choose among cudnn"):
        bench_gpu(SPEC, target="cuda:sm_90", against=("openvino",))
    with pytest.raises(TargetError, match="metal:apple-m1 cannot be timed by this version"):
        bench_gpu(SPEC, target="metal:apple-m1")


def test_what_is_compiled_for_another_machine_is_not_loaded() -> None:
    for name in ("metal:apple-m1", "llvm:apple-m1"):
        with pytest.raises(TargetError, match=rf"code for {name} does not run on this machine \(it is for another\)"):
            compile(SPEC, name)


def test_a_text_is_no_layer_and_a_directory_no_artifact(tmp_path: Path) -> None:
    for call in (compile, tune, bench, lambda text: export_onnx(text, tmp_path / "layer.onnx")):
        with pytest.raises(CallError, match="the layer is a str; read a text by ConvTranspose3d"):
            call(str(SPEC))  # type: ignore[operator]
    with pytest.raises(CallError, match="is a path; load the artifact there by opcompile"):
        verify(str(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize("tf32", [False, True])
def test_on_a_gpu_peers_have_tf32_where_the_target_has_and_only_then(tf32: bool) -> None:
    cudnn, matmul = SimpleNamespace(allow_tf32=True, benchmark=False), SimpleNamespace(allow_tf32=False)
    torch = SimpleNamespace(backends=SimpleNamespace(cudnn=cudnn, cuda=SimpleNamespace(matmul=matmul)))
    with _as_documented(torch, tf32):
        assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == (tf32, tf32, True)
    assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == (True, False, False)
