"""The command line: one command parses, makes one library call, and prints.

stdout carries the result (with ``--json`` nothing else), stderr messages and progress. Exit codes:

====  ====================================================================================
0     fine
1     verification failed, or slower than asked
2     bad input: the message names what was given, the rule, and the way out
3     a target, package or program that is needed is not available
70    a mistake of ours; OPCOMPILE_DEBUG=1 shows where
130   interrupted (143: by SIGTERM)
141   whoever read the output has gone
====  ====================================================================================

Whatever is heavy is imported by the command that needs it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import click
from click.core import ParameterSource

from opcompile import __version__
from opcompile.errors import ArtifactError, CallError, EngineError, ModelError
from opcompile.exits import CommandGroup
from opcompile.gpus import is_gpu
from opcompile.needed import bfloat16
from opcompile.tables import built_table, cases_table, measured_table, records_table, report_tables
from opcompile.terminal import plain, print_result, progress, tell, title

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import RenderableType

    from opcompile.bench import BenchReport
    from opcompile.cases import Case
    from opcompile.describe import Description
    from opcompile.gradients.describe import GradientDescription
    from opcompile.importers.outline import Shapes
    from opcompile.index import Listed
    from opcompile.record import Record
    from opcompile.source import Source
    from opcompile.spec import ConvTranspose3d
    from opcompile.trials import Progress as TuneProgress
    from opcompile.verify import Report

T = TypeVar("T")


class _HasManifest(Protocol):
    @property
    def manifest(self) -> dict[str, Any]: ...


Held = TypeVar("Held", bound=_HasManifest)


# --- words that several commands share ---


class _Number(click.FloatRange):
    """A finite number in a range: click takes nan for one that lies in any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


_source = click.argument("source", metavar="SOURCE")
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_target = click.option(
    "--target",
    default="llvm",
    show_default=True,
    metavar="T",
    help="Machine to compile for, and flags (cuda:sm_80+tf32, llvm+bf16); `doctor` shows this one.",
)
_plan = click.option(
    "--plan",
    type=click.Choice(["best", "baseline", "tuned"]),
    default="best",
    show_default=True,
    help="baseline: tiles by arithmetic; tuned: by a record; best: tuned where there is a record.",
)
_derivative = click.option(
    "--derivative",
    type=click.Choice(["x", "w", "b"]),
    help="The derivative with respect to the input, the weight or the bias, instead of the layer.",
)
_nodes = click.option("--node", "nodes", multiple=True, metavar="NAME", help="Only this node of a model (repeatable).")
_shapes = click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=NxCxDxHxW",
    callback=lambda _ctx, _param, texts: _shapes_of(texts),
    help="Shape of an ONNX model's input with open sizes (repeatable, once an input).",
)
_threads = click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Most threads to use.")


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="opcompile", message="%(prog)s %(version)s")
def cli() -> None:
    """Compile 3-D transposed convolutions ahead of time, and prove them equal to ONNX Runtime.

    SOURCE is an ONNX file (all its 5-D ConvTranspose nodes), a torch.export program (.pt2), a Keras model
    (.keras), a layer as text, like "in=1x64x12x16x32 co=64 k=3 s=2 p=1 op=1", or the name of a case
    (`opcompile cases`).
    """


# --- commands ---


@cli.command("compile")
@_source
@click.option("-o", "--output", "into", required=True, metavar="DIR", help="Directory to write.")
@_target
@_plan
@_derivative
@_nodes
@_shapes
@click.option("--no-verify", is_flag=True, help="Write the artifacts unchecked.")
@_json
def compile_(
    source: str,
    into: str,
    target: str,
    plan: Any,
    derivative: Any,
    nodes: tuple[str, ...],
    shapes: Shapes,
    no_verify: bool,
    as_json: bool,
) -> int:
    """Compile SOURCE into DIR, and verify it.

    A layer becomes the artifact DIR; a model becomes one artifact a node, DIR/<node>, and DIR/index.json.
    A node that cannot be compiled is listed with its reason. Exit code 1: an output is wrong;
    2: nothing could be compiled; 3: an artifact could not be asked, or holds weights that are infinite or NaN.
    """
    from opcompile.build import compile_all

    with progress("compiling") as show:
        built = compile_all(
            source,
            into,
            target,
            plan,
            derivative=derivative,
            nodes=nodes,
            shapes=shapes,
            verify=not no_verify,
            progress=lambda s: show(s.done, s.total, f"{s.step} {s.name}" if s.step != "done" else None),
        )
    print_result(as_json, {"directory": into, "layers": [b.to_json() for b in built]}, lambda: built_table(built, into))
    if any(b.status == "wrong" for b in built):
        return 1
    if any(b.report and b.report.unverified is not None for b in built):
        return 3
    return 0 if any(b.directory for b in built) else 2


@cli.command()
@click.argument("directory", metavar="DIR")
@click.option(
    "--simulate",
    is_flag=True,
    help="Run code for a GPU or an arm64 on this CPU: simulated, one fiber for each GPU thread, or emulated.",
)
@_json
def verify(directory: str, simulate: bool, as_json: bool) -> int:
    """Verify the artifact in DIR, or every artifact of a model, against the oracle and ONNX Runtime.

    The report is stored in the artifact as report.json, unless DIR cannot be written, or nothing answered.
    Exit code 1: an output is wrong;
    2: an artifact is missing, was changed, or is not the one that the model's index.json lists;
    3: one could not be asked or judged, or holds weights that are infinite or NaN.
    """
    from opcompile.index import artifacts
    from opcompile.runtime import load_any
    from opcompile.simulate import simulated
    from opcompile.verify import verify as check

    places = artifacts(directory)

    def verified(place: Path, loaded: Any) -> Report:
        report = check(loaded)
        _store(place, report)
        return report

    def begin(number: int, name: str) -> None:
        show(number, len(places), f"verify {name}")

    with progress("verifying") as show:
        reports, unread = _each(places, simulated if simulate else load_any, verified, begin)
        show(len(places), len(places), None)
    passed = not unread and all(report.passed for report in reports.values())
    listed = {n: reports[n].to_json() if n in reports else {"passed": False, "reason": unread[n]} for n in places}
    print_result(as_json, {"passed": passed, "artifacts": listed}, lambda: report_tables(reports, unread))
    if any(report.failures for report in reports.values()):
        return 1
    return 2 if unread else 0 if passed else 3


@cli.command()
@click.argument("directory", metavar="DIR")
@click.option("--x", "x_path", metavar="X.npy", help="Input, in the layer's layout.")
@click.option("--w", "w_path", metavar="W.npy", help="Weight (C, M/g, kD, kH, kW), unless compiled in.")
@click.option("--b", "b_path", metavar="B.npy", help="Bias (M,), unless compiled in.")
@click.option("--dy", "dy_path", metavar="DY.npy", help="Of a derivative: the gradient of the layer's output.")
@click.option("--y", "output_path", metavar="Y.npy", help="Of a derivative that needs it: the layer's output.")
@click.option("-o", "--output", "y_path", required=True, metavar="Y.npy", help="Where to write the output.")
@_threads
@_json
def run(
    directory: str,
    x_path: str | None,
    w_path: str | None,
    b_path: str | None,
    dy_path: str | None,
    output_path: str | None,
    y_path: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Run the artifact in DIR on arrays in NumPy files. No compiler is needed: NumPy, apache-tvm-ffi, click and rich.

    A layer takes X, W and B; a derivative dY, and W or X (and Y) as it was compiled.
    """
    from opcompile.runtime import Artifact, load_any
    from opcompile.runtime_cuda import CudaArtifact

    paths = {"dy": dy_path, "x": x_path, "w": w_path, "b": b_path, "y": output_path}
    _require_place(y_path, *filter(None, paths.values()))
    artifact: Any = load_any(_one_artifact(directory), threads=threads)
    arrays: dict[str, Any] = {name: _read_array(path, artifact.spec.dtype) for name, path in paths.items() if path}
    if isinstance(artifact, (Artifact, CudaArtifact)):
        if extra := arrays.keys() & {"dy", "y"}:
            raise CallError(f"--{min(extra)} was given, but {directory} holds the layer, which takes x, w and b")
        if "x" not in arrays:
            raise CallError(f"--x is missing: {directory} holds the layer, which takes x, w and b")
    elif "b" in arrays:
        raise CallError(f"--b was given, but {directory} holds a derivative, which takes no bias; leave it out")
    on_gpu = isinstance(artifact, CudaArtifact)
    try:
        y = artifact.on_host(*map(arrays.get, ("x", "w", "b"))) if on_gpu else artifact(**arrays)
    except CallError as error:
        if " is missing: " in str(error):  # the name of an argument, which is an option here
            raise CallError(f"--{error}") from error
        raise
    _write_array(y_path, y)
    content = {"output": y_path, "shape": y.shape, "dtype": y.dtype.name}
    print_result(as_json, content, lambda: [f"{y_path}: {y.dtype.name} {y.shape}"])


@cli.command()
@click.argument("source", metavar="[SOURCE]", required=False)
@_target
@click.option(
    "--trials", type=click.IntRange(1), default=64, show_default=True, metavar="N", help="Candidates to measure."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="S", help="Decides which candidates, in which order."
)
@click.option("--emit", metavar="DIR", help="For a GPU elsewhere: only build the candidates, for `opcompile measure`.")
@click.option("--absorb", metavar="F.json", help="Instead of SOURCE: record what `opcompile measure` found.")
@click.option("--tracker", metavar="HOST:PORT", help="Measure on the servers of this TVM RPC tracker.")
@click.option("--key", metavar="K", help="The key that those servers have at the tracker.")
@click.option("--work-dir", metavar="D", help="Where to keep journals, one directory a layer, to resume from.")
@_nodes
@_shapes
@_json
def tune(
    source: str | None,
    target: str,
    trials: int,
    seed: int,
    emit: str | None,
    absorb: str | None,
    tracker: str | None,
    key: str | None,
    work_dir: str | None,
    nodes: tuple[str, ...],
    shapes: Shapes,
    as_json: bool,
) -> None:
    """Measure schedules of SOURCE on this machine, or on others, and record the fastest.

    The record goes into your own records, where --plan best finds it. Of an ONNX model it is each layer that `compile`
    and, for a CPU, `replace` compile: a node alone, and with what follows it in its kernel. An interrupted run resumes,
    for a GPU where --work-dir was given. For a GPU that is on another machine: --emit here, `opcompile measure` there,
    --absorb here; or, where it is served by `python -m opcompile.serve`, all at once with --tracker and --key.
    """
    if (source is None) == (absorb is None):
        both = ", not both: the layers are in them" if source else ""
        raise click.UsageError(f"give SOURCE, or --absorb with the results of measuring{both}")
    if emit and (absorb or tracker or key or work_dir):
        raise click.UsageError("--emit takes no --absorb, --tracker, --key or --work-dir; leave it, or them, out")
    if absorb:
        from opcompile.tune_gpu import absorb as absorbed

        _emit_records(absorbed(absorb), as_json)
        return
    from opcompile.source import read

    given = read(str(source), nodes, shapes)
    specs = list(dict.fromkeys(spec for _, spec in given.compilable))
    specs += [spec for spec in _of_replace(given, target, nodes, shapes) if spec not in specs]
    _mention(given)
    if emit:
        _emit_job(specs, target, trials, seed, emit, as_json)
        return
    _emit_records(_tuned(specs, target, trials, seed, tracker, key, work_dir), as_json)


def _of_replace(given: Source, target: str, nodes: Sequence[str], shapes: Shapes) -> list[ConvTranspose3d]:
    """Return the layers that `replace` compiles of an ONNX model for a CPU: what follows a node is in some of them."""
    from opcompile.replace import layers

    if is_gpu(target) or given.kind != "model" or given.text.endswith((".pt2", ".keras")):
        return []
    try:
        return layers(given.text, shapes=[shapes] if shapes else [], nodes=nodes)
    except ModelError as error:
        tell(f"opcompile: only what `compile` compiles is tuned, as `replace` refuses this model: {error}")
        return []


def _tuned(
    specs: Sequence[ConvTranspose3d],
    target: str,
    trials: int,
    seed: int,
    tracker: str | None,
    key: str | None,
    work_dir: str | None,
) -> list[Record]:
    from opcompile import record
    from opcompile import tune as tune_one
    from opcompile.source import brief

    records: list[Record] = []
    with progress("tuning") as show:
        for number, spec in enumerate(specs, 1):
            of = f" ({number} of {len(specs)})" if len(specs) > 1 else ""
            home = Path(work_dir) / record.key(str(spec)) if work_dir else None
            show(0, trials, f"{brief(spec)}{of}")
            records.append(
                tune_one(
                    spec,
                    target,
                    trials,
                    seed=seed,
                    tracker=tracker,
                    key=key,
                    work_dir=home,
                    progress=lambda p: show(p.done, p.total, None, _best(p)),
                )
            )
    return records


def _emit_records(records: Sequence[Record], as_json: bool) -> None:
    content = [{**json.loads(r.to_json()), "path": str(r.path)} for r in records]
    print_result(as_json, {"records": content}, lambda: records_table(records))


def _emit_job(specs: Sequence[ConvTranspose3d], target: str, trials: int, seed: int, into: str, as_json: bool) -> None:
    from opcompile.job import Job
    from opcompile.tune_gpu import emit

    with progress("building") as show:
        show(0, trials, f"candidates for {target}")
        place = emit(specs, target, trials, into=into, seed=seed, progress=lambda p: show(p.done, p.total, None))
    job = Job.read(place)
    candidates = [c for layer in job.layers for c in layer.candidates]
    said = f"{into}: {sum(not c.error for c in candidates)} of {len(candidates)} candidates built"
    then = f"where the GPU is: opcompile measure {into} -o results.json"
    print_result(as_json, {"directory": into, "job": job.to_json()}, lambda: [plain(said), plain(then)])


@cli.command()
@click.argument("directory", metavar="DIR")
@click.option("-o", "--output", required=True, metavar="F.json", help="File to write.")
@_json
def measure(directory: str, output: str, as_json: bool) -> int:
    """Time the candidates in DIR, which `opcompile tune --emit` wrote, on this machine's GPU.

    No compiler is needed; an interrupted run resumes. `opcompile tune --absorb` records the fastest. Where nothing but
    NumPy and apache-tvm-ffi is installed, python -m opcompile.measure does the same. Exit code 1: no candidate of a
    layer could be measured.
    """
    from opcompile.measure import measure as measured

    _require_place(output)
    with progress("measuring") as show:
        show(0, 1, f"candidates in {directory}")
        found = measured(directory, output, progress=lambda p: show(p.done, p.total, None, _best(p)))
    print_result(as_json, found, lambda: measured_table(found, output))
    return 0 if all(layer["finals"] for layer in found["layers"]) else 1


@cli.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1)
@click.option("--tag", "tags", multiple=True, metavar="T", help="Also all cases with this tag (repeatable: with all).")
@click.option(
    "--against",
    metavar="E,E",
    help="Engines: onnxruntime (the default), torch, torch-channels-last, openvino; on a GPU cudnn (the default), "
    "cudnn-channels-last; or all.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Threads for each.")
@click.option("--seconds", type=_Number(0.01), default=2.0, show_default=True, metavar="S", help="For each engine.")
@click.option(
    "--at-least",
    type=_Number(0),
    metavar="R",
    help="Exit code 1 if less than R times as fast as the fastest; 3 if no engine was timed beside a layer.",
)
@click.option("--no-memory", is_flag=True, help="Do not measure each engine's peak memory.")
@click.option("--save", metavar="F.json", help="Write the JSON, all samples included, to a file as well.")
@click.option("--plot", "picture", metavar="F.png|F.svg|F.pdf", help="Draw the roofline and a bar chart.")
@click.option("--markdown", is_flag=True, help="Print a summary of all layers, as a Markdown table.")
@_target
@_plan
@_nodes
@_shapes
@_json
def bench(
    sources: tuple[str, ...],
    tags: tuple[str, ...],
    against: str | None,
    threads: int,
    seconds: float,
    at_least: float | None,
    no_memory: bool,
    save: str | None,
    picture: str | None,
    markdown: bool,
    target: str,
    plan: Any,
    nodes: tuple[str, ...],
    shapes: Shapes,
    as_json: bool,
) -> int:
    """Time each SOURCE side by side with other engines, in one process, taking turns.

    Outputs are compared first: a wrong peer is listed, and not timed. A ratio comes with its 95 % interval. The
    roofline, the least time that the machine's peak rate and bandwidth allow, is measured in the same run. It and
    GFLOP/s count the products that are not cropped; in JSON, `flop` and `gflops` count all. With --target cuda:... it
    is this machine's GPU that is timed, beside cuDNN, and its own clock that times it.
    """
    from opcompile import summary
    from opcompile.plot import plot, require
    from opcompile.record import write_atomically

    if markdown and as_json:
        raise click.UsageError("--markdown and --json are two forms of one result; choose one")
    layers = _layers(sources, tags, nodes, shapes)
    for path in filter(None, (save, picture)):
        _require_place(path, *_files(sources))
    if picture:
        require(picture)
    time_one = _stopwatch(target, against, threads, seconds, plan, memory=not no_memory)
    reports: dict[str, BenchReport] = {}
    content: dict[str, Any] = {"layers": {}}
    with progress("timing") as show:
        for number, (name, spec) in enumerate(layers.items()):
            show(number, len(layers), f"time {name}")
            reports[name] = time_one(spec)
            content["layers"][name] = reports[name].to_json()
            if save:  # each time: a long run that ends early leaves what it has
                write_atomically(Path(save), json.dumps(content, indent=1) + "\n")
        show(len(layers), len(layers), None)
    if picture:
        plot(reports, picture)

    def shown() -> Iterator[RenderableType]:
        if markdown:
            yield plain(summary.markdown(reports))
            return
        for name, report in reports.items():
            if len(reports) > 1:
                yield title(name)
            yield report.table()
        if len(reports) > 1:
            yield summary.table(reports)

    print_result(as_json, content, shown)
    return 0 if at_least is None else _judged(reports, at_least)


def _judged(reports: dict[str, BenchReport], at_least: float) -> int:
    """Return the exit code that --at-least asks for. Raises `EngineError` where it asks about nothing."""
    if any(report.slower_than(at_least) for report in reports.values()):
        return 1
    if alone := [name for name, report in reports.items() if report.best is None]:
        raise EngineError(f"--at-least has nothing to compare with: no engine was timed beside {', '.join(alone)}")
    return 0


def _stopwatch(
    target: str, against: str | None, threads: int, seconds: float, plan: Any, *, memory: bool
) -> Callable[[ConvTranspose3d], BenchReport]:
    """Return what times one layer on ``target``."""
    if is_gpu(target):
        from opcompile.bench_gpu import PEERS as GPU_PEERS
        from opcompile.bench_gpu import bench_gpu

        if threads != 1:
            raise click.UsageError("--threads is for CPUs; leave it out on a GPU")
        on_gpu = _engines(against or GPU_PEERS[0], GPU_PEERS)
        return lambda spec: bench_gpu(spec, target=target, against=on_gpu, plan=plan, seconds=seconds)
    from opcompile.bench import bench as bench_one
    from opcompile.engines import PEERS

    engines = _engines(against or PEERS[0], PEERS)
    return lambda spec: bench_one(
        spec, against=engines, threads=threads, seconds=seconds, target=target, plan=plan, memory=memory
    )


def _engines(against: str, peers: Sequence[str]) -> list[str]:
    return list(peers) if against == "all" else [name.strip() for name in against.split(",") if name.strip()]


def _layers(
    sources: Sequence[str], tags: Sequence[str], nodes: Sequence[str], shapes: Shapes
) -> dict[str, ConvTranspose3d]:
    """Name every layer of ``sources``, and the cases with all ``tags``; where a name is taken, tell where from."""
    from opcompile.source import brief, read

    if not sources and not tags:
        raise click.UsageError("name a SOURCE, or cases by --tag")
    named: dict[str, ConvTranspose3d] = {}
    for given in [read(source, nodes, shapes) for source in sources]:
        _mention(given)
        for layer, spec in given.compilable:
            several = given.kind == "text" and len(sources) + len(tags) > 1
            name = brief(spec) if several else layer.name
            named[f"{given.text}: {name}" if name in named and given.kind == "model" else name] = spec
    return named | ({c.name: c.spec for c in _tagged(tags)} if tags else {})


@cli.command()
@_source
@click.option("-o", "--output", "path", required=True, metavar="F.onnx", help="File to write.")
@click.option(
    "--opset", type=int, metavar="N", help="ONNX opset of the file; by default one that ONNX Runtime reads widely."
)
@_nodes
@_shapes
@_json
def export(source: str, path: str, opset: int | None, nodes: tuple[str, ...], shapes: Shapes, as_json: bool) -> None:
    """Write one layer as an ONNX model that ONNX Runtime runs, with its weights where they are known."""
    from opcompile.graph import DEFAULT_OPSET, export_onnx
    from opcompile.source import read

    opset = DEFAULT_OPSET if opset is None else opset
    layer, spec = read(source, nodes, shapes).only()
    _require_place(path, *_files([source]))
    written = export_onnx(spec, path, opset=opset, weight=layer.weight, bias=layer.bias)
    content = {"output": str(written), "spec": str(spec), "opset": opset}
    print_result(as_json, content, lambda: [f"{written}: {spec}"])


@cli.command()
@click.argument("model", metavar="MODEL.onnx")
@click.option("-o", "--output", "into", required=True, metavar="DIR", help="Directory to write.")
@click.option(
    "--mode",
    type=click.Choice(["rewrite", "override"]),
    default="rewrite",
    show_default=True,
    help="rewrite: a new model names our operators; override: the library takes ONNX's own operator over.",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=NxCxDxHxW",
    help="Compile for this shape of an input with open sizes (repeatable); ONNX Runtime does the others.",
)
@_target
@_plan
@_nodes
@click.option("--all", "everything", is_flag=True, help="Replace the nodes that do not gain, too.")
@click.option("--no-verify", is_flag=True, help="Write the result unchecked.")
@click.option("--no-bench", is_flag=True, help="Measure nothing, and replace every node.")
@click.option("--seconds", type=_Number(0.01), default=0.5, show_default=True, metavar="S", help="For each timing.")
@_json
def replace(
    model: str,
    into: str,
    mode: Any,
    shapes: tuple[str, ...],
    target: str,
    plan: Any,
    nodes: tuple[str, ...],
    everything: bool,
    no_verify: bool,
    no_bench: bool,
    seconds: float,
    as_json: bool,
) -> int:
    """Let MODEL.onnx run our kernels inside ONNX Runtime: write DIR/opcompile_ops.so, and the model that uses it.

    Each kernel runs alone inside ONNX Runtime first, and a node that does not gain stays as it is. Then the
    whole model is verified and timed against the stock one. Exit code 1: an output is wrong, or the whole is slower,
    three times in a row and not for other work on the machine; 2: no node could be compiled; 3: the whole could not be
    run, or not be judged.
    """
    from opcompile.replace import replace as replace_nodes

    with progress("replacing") as show:
        report = replace_nodes(
            model,
            into,
            mode=mode,
            target=target,
            plan=plan,
            shapes=_alternatives(shapes),
            nodes=nodes,
            everything=everything,
            verify=not no_verify,
            measure=not no_bench,
            seconds=seconds,
            progress=show,
        )
    print_result(as_json, report.to_json(), report.renderables)
    if report.wrong or report.slower:
        return 1
    if report.unanswered is not None:
        return 3
    return 2 if all(node.status == "refused" for node in report.nodes) else 0


def _alternatives(shapes: Sequence[str]) -> list[dict[str, tuple[int | str, ...]]]:
    """Read ``name=1x2x8x8x8``: of several for one name each is an alternative; one for a name holds for all."""
    named: dict[str, list[tuple[int | str, ...]]] = {}
    for name, shape in map(_named_shape, shapes):
        named.setdefault(name, []).append(shape)
    count = max(map(len, named.values()), default=0)
    uneven = [name for name, given in named.items() if len(given) not in (1, count)]
    if uneven:
        raise click.UsageError(
            f"--shape is given {len(named[uneven[0]])} times for {uneven[0]}; give it once, or {count} times"
        )
    return [{name: given[i % len(given)] for name, given in named.items()} for i in range(count)]


def _shapes_of(texts: Sequence[str]) -> Shapes:
    """Read ``name=1x2x8x8x8``, once for each input."""
    named: dict[str, tuple[int | str, ...]] = {}
    for name, shape in map(_named_shape, texts):
        if name in named:
            raise click.UsageError(f"--shape is given twice for {name}, and a layer has one shape; choose one")
        named[name] = shape
    return named


def _named_shape(text: str) -> tuple[str, tuple[int | str, ...]]:
    name, equals, sizes = text.rpartition("=")
    parts = sizes.split("x")
    if not equals or not name or not all(_is_size(p) for p in parts):
        raise click.UsageError(f"--shape {text!r} is not of the form NAME=NxCxDxHxW, like x=1x4x32x32x32")
    return name, tuple(int(p) if p.isdecimal() else p for p in parts)


def _is_size(text: str) -> bool:
    """Whether a text is a positive number, or the name of an open size."""
    # more digits than any size has are too many for int
    return len(text) < 20 and int(text) > 0 if text.isdecimal() else text.isidentifier()


@cli.command()
@click.argument("source", metavar="SOURCE|DIR")
@_target
@_plan
@_derivative
@_nodes
@_shapes
@_json
@click.pass_context
def inspect(
    ctx: click.Context,
    source: str,
    target: str,
    plan: Any,
    derivative: Any,
    nodes: tuple[str, ...],
    shapes: Shapes,
    as_json: bool,
) -> int:
    """Show what a layer is and how it would be compiled, or what an artifact holds.

    Of a layer: phases and taps of each axis, work, bytes, workspace, the chosen tiles and why; of its
    derivative the same, without the phases. Of an artifact, for whatever machine it was made: manifest,
    files and report. Exit code 2: a file is missing or was changed, or an artifact is not the one that the
    model's index.json lists.
    """
    from opcompile.describe import describe
    from opcompile.errors import SpecError
    from opcompile.gradients.describe import describe as describe_gradient
    from opcompile.gradients.gradient import Gradient
    from opcompile.index import artifacts
    from opcompile.source import read

    if os.path.isdir(source) and not nodes and not shapes:
        for name in ("target", "plan", "derivative"):
            if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise CallError(
                    f"--{name} was given, but {source} is a directory of what was compiled; leave it out, or name a "
                    "model, a layer's text form or a case"
                )
        return _inspect_artifacts(artifacts(source), as_json)
    given = read(source, nodes, shapes)
    described: dict[str, Description | GradientDescription] = {}
    refused = {layer.name: layer.reason for layer in given.refused}
    for layer, spec in given.compilable:
        try:
            described[layer.name] = (
                describe_gradient(Gradient(spec, derivative), target, plan)
                if derivative
                else describe(spec, target, plan)
            )
        except SpecError as error:  # there is no such derivative
            if len(given.layers) == 1:
                raise
            refused[layer.name] = str(error)
    for name, reason in refused.items():
        tell(f"opcompile: {name} cannot be compiled: {reason}")
    content: dict[str, Any] = {name: d.to_json() for name, d in described.items()}
    content |= {name: {"reason": reason} for name, reason in refused.items()}

    def shown() -> Iterator[RenderableType]:
        for name, description in described.items():
            if len(given.layers) > 1:
                yield title(name)
            yield from description.renderables()

    print_result(as_json, {"layers": content}, shown)
    return 0 if described else 2


def _inspect_artifacts(places: dict[str, Listed], as_json: bool) -> int:
    from opcompile.describe import contents

    held, unread = _each(places, contents, lambda _place, found: found)

    def shown() -> Iterator[RenderableType]:
        for each in held.values():
            yield from each.renderables()
        yield from (plain(f"{name}: {reason}") for name, reason in unread.items())

    whole = not unread and all(each.whole for each in held.values())
    listed = {n: held[n].to_json() if n in held else {"whole": False, "reason": unread[n]} for n in places}
    print_result(as_json, {"whole": whole, "artifacts": listed}, shown)
    return 0 if whole else 2


@cli.command("diff")
@_source
@click.option("--no-measure", is_flag=True, help="Ask no system; say only what each call means.")
@_nodes
@_shapes
@_json
def diff_(source: str, no_measure: bool, nodes: tuple[str, ...], shapes: Shapes, as_json: bool) -> None:
    """Show one layer as every system would say it, and whether shape and values are the same.

    PyTorch, MLX, Rmlx, Lucid, Keras, R keras3, TensorFlow, JAX, ONNX, ONNX Runtime, OpenVINO: the call to
    paste, its output size, where it begins, how W is permuted, and the largest difference from SOURCE,
    measured on a small layer of the same geometry where the system is installed.
    """
    from opcompile.diff import diff
    from opcompile.source import read

    _, spec = read(source, nodes, shapes).only()
    with progress("comparing") as show:
        show(0, 1, "compare the words" if no_measure else "ask every system that is installed")
        found = diff(spec, measure=not no_measure)
    print_result(as_json, found.to_json(), found.renderables)


@cli.command()
@click.option("--tag", "tags", multiple=True, metavar="T", help="Only cases with this tag (repeatable: with all).")
@_json
def cases(tags: tuple[str, ...], as_json: bool) -> None:
    """List the named layers: real ones with their origin, and corners of the operator."""
    found = _tagged(tags)
    content = [{"name": c.name, "spec": str(c.spec), "tags": sorted(c.tags), "origin": c.origin} for c in found]
    print_result(as_json, {"cases": content}, lambda: [cases_table(found)])


def _tagged(tags: Sequence[str]) -> list[Case]:
    from opcompile.cases import CASES, tagged
    from opcompile.errors import SpecError

    found = tagged(*tags)
    if not found:
        known = ", ".join(sorted({tag for c in CASES for tag in c.tags}))
        raise SpecError(f"no case has the tags {', '.join(tags)}; the tags are {known}")
    return found


@cli.command()
@_json
def doctor(as_json: bool) -> int:
    """Check packages, machine, linker and tuned records, and compile a small layer.

    Exit code 3: something needed is missing, or a record cannot be used.
    """
    from dataclasses import asdict

    from opcompile.doctor import doctor as examine
    from opcompile.doctor import table

    with progress("examining") as show:
        show(0, 1, "compile a small layer")
        findings = examine()
    healthy = all(f.fine for f in findings)
    print_result(as_json, {"healthy": healthy, "findings": [asdict(f) for f in findings]}, lambda: [table(findings)])
    return 0 if healthy else 3


# --- arrays and directories that a user names ---


def _each(
    places: dict[str, Listed],
    opened: Callable[[Path], Held],
    of: Callable[[Path, Held], T],
    begin: Callable[[int, str], None] = lambda _number, _name: None,
) -> tuple[dict[str, T], dict[str, str]]:
    """Return what ``of`` gives for each artifact, once it is ``opened``, and why not where it is not the one listed.

    ``begin`` is told before each. Raises `ArtifactError` where there is one artifact only, and that cannot be read, or
    is another.
    """
    from opcompile.manifest import fingerprint

    found: dict[str, T] = {}
    unread: dict[str, str] = {}
    for number, (name, place) in enumerate(places.items()):
        begin(number, name)
        try:
            held = opened(place.directory)
            place.require(fingerprint(held.manifest))
            found[name] = of(place.directory, held)
        except ArtifactError as error:
            if len(places) == 1:
                raise
            unread[name] = str(error)
    return found, unread


def _one_artifact(directory: str) -> Path:
    from opcompile.index import INDEX, artifacts

    places = artifacts(directory)
    if not (Path(directory) / INDEX).is_file():
        return Path(directory)
    names = ", ".join(str(place.directory) for place in places.values())
    raise ArtifactError(f"{directory} holds the artifacts of a model; name one of them: {names}")


def _read_array(path: str, dtype: str) -> NDArray[Any]:
    import numpy as np
    from numpy.lib.format import MAGIC_PREFIX

    from opcompile.paths import open_file

    try:
        with open_file(Path(path)) as file:
            begins = file.read(len(MAGIC_PREFIX))
            file.seek(0)
            # of what begins otherwise NumPy says that it were pickled
            array: NDArray[Any] | None = np.load(file, allow_pickle=False) if begins == MAGIC_PREFIX else None
    except (ValueError, EOFError) as error:
        if "Object arrays" in str(error):
            raise CallError(f"{path} holds Python objects, not numbers; save it again, by astype({dtype!r})") from error
        raise CallError(f"{path} is damaged, not a whole NumPy array file (.npy): {error}") from error
    except OSError as error:
        raise CallError(f"cannot read {path}: {error.strerror or error}; name a .npy file") from error
    if begins.startswith(b"PK"):
        raise CallError(f"{path} is an archive, as of several arrays; save the one with numpy.save")
    if array is None:
        raise CallError(f"{path} is not a NumPy array file (.npy); write one with numpy.save")
    # `numpy.save` keeps the bits of a bfloat16 array, and forgets what they are
    return array.view(bfloat16()) if dtype == "bfloat16" and array.dtype == np.dtype("V2") else array


def _write_array(path: str, array: NDArray[Any]) -> None:
    import numpy as np

    try:
        with open(path, "wb") as file:
            try:
                np.save(file, array, allow_pickle=False)
            except BaseException:
                if Path(path).is_file():
                    Path(path).unlink()  # half of an array is none
                raise
    except OSError as error:
        reason = error.strerror or error  # of a full disk NumPy says how much was written
        raise CallError(f"cannot write {path}: {reason}; name a file in a directory that is yours") from error


def _require_place(path: str, *read: str | Path) -> None:
    """Raise `CallError` where a file that is written after long work could not be, or were one of those ``read``."""
    from opcompile.atomic import require_outside
    from opcompile.paths import require_unread

    if Path(path).is_dir():
        raise CallError(f"cannot write {path}: it is a folder; name a file")
    if not Path(path).parent.is_dir():
        raise CallError(f"cannot write {path}: there is no such folder; name a file in one that exists and is yours")
    if not os.access(path if Path(path).exists() else Path(path).parent, os.W_OK):
        raise CallError(f"cannot write {path}: that is not permitted; name a file in a folder that is yours")
    require_outside(Path(path))
    require_unread(Path(path), read)


def _files(sources: Iterable[str]) -> Iterator[Path]:
    """Yield the files of those ``sources`` that are models, once they were read; with them what lies beside ONNX's."""
    from opcompile.replace.model import Model

    for path in map(Path, filter(os.path.isfile, sources)):
        yield path
        if path.suffix not in (".pt2", ".keras"):
            yield from (path.parent / name for name in Model.read(path).external_files())


# --- what is said beside the result ---


def _store(place: Path, report: Report) -> None:
    from opcompile.artifact import store

    try:
        store(place, report)
    except ArtifactError as error:
        tell(f"opcompile: the report was not stored: {error}")


def _best(progress: TuneProgress) -> str:
    from opcompile.units import duration

    failed = f", {progress.failures} failed" if progress.failures else ""
    return (f"best {duration(progress.best_us)}" if progress.best_us else progress.step) + failed


def _mention(source: Source) -> None:
    """Name the nodes that a command passes over, each with its reason."""
    for layer in source.refused:
        tell(f"opcompile: {layer.name} cannot be compiled: {layer.reason}")


# --- the entry point ---


class _WithoutTorch(MetaPathFinder):
    """Hides PyTorch from TVM, which imports it wherever it is installed, for seconds, to be handed its tensors."""

    def find_spec(self, name: str, *_: object) -> None:
        """Raise `ModuleNotFoundError` for PyTorch while TVM is being imported; find nothing."""
        specs = (getattr(sys.modules.get(package), "__spec__", None) for package in ("tvm_ffi", "tvm"))
        if name == "torch" and any(getattr(spec, "_initializing", False) for spec in specs):
            raise ModuleNotFoundError("it is imported by what asks for it", name=name)


def main() -> NoReturn:
    """Run the command line; the entry point of the package."""
    if sys.argv[1:2] in (["compile"], ["inspect"]):  # which hand it none
        sys.meta_path.insert(0, _WithoutTorch())
    cli.main(prog_name="opcompile")
    raise AssertionError("unreachable")


if __name__ == "__main__":
    main()
