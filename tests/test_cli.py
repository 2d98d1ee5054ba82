"""The command line: every command has help, JSON and its exit code; no mistake of a user shows a traceback."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper
from onnx_engine import model_of, value
from replaced import saved, upsampling
from test_bench import report_of as bench_report
from test_record import made

import opcompile
from opcompile import artifact
from opcompile.cases import tagged
from opcompile.cli import _write_array, cli
from opcompile.describe import _verdict
from opcompile.digest import digest
from opcompile.doctor import Finding
from opcompile.errors import ArtifactError, CallError, EngineError, KernelError, OpcompileError, VerificationError
from opcompile.index import INDEX, artifacts, directory_names, write_index
from opcompile.record import write_record
from opcompile.source import brief, read
from opcompile.spec import ConvTranspose3d
from opcompile.target import target
from opcompile.terminal import progress
from opcompile.verify import verify as check

pytestmark = pytest.mark.usefixtures("as_scheduled")

ROOT = Path(opcompile.__file__).parent.parent
MODELS = Path(__file__).parent / "models"
COMMANDS = sorted(cli.commands)
LAYER = "in=1x4x3x4x5 co=6 k=2 s=2"
# Where it is no matter what is compiled.
SMALL = "in=1x1x1x1x1 co=1 k=1"


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args])


def run_process(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opcompile", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False, **options)


def takes(name: str, option: str) -> bool:
    return any(option in p.opts for p in cli.commands[name].params)


def of_json(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with open weights, one with a dynamic batch, and a compiled model."""
    home = tmp_path_factory.mktemp("cli")
    for name, source in (("layer", LAYER), ("dynamic", "in=Nx2x2x2x2 co=2 k=2 bias=0 dtype=float64")):
        assert invoke("compile", source, "-o", home / name, "--plan", "baseline", "--no-verify").exit_code == 0
    result = invoke("compile", MODELS / "dynunet.onnx", "-o", home / "model", "--plan", "baseline")
    assert result.exit_code == 0, result.output
    return home


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


# --- every command ---


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_command_does(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert f"Usage: cli {name}" in result.output
    command = cli.commands[name]
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts} has no help"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_no_limit_that_is_none(name: str) -> None:
    assert "None" not in invoke(name, "--help").output


def test_the_list_of_commands_says_whole_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = " ".join(invoke("--help").output.split())
    for name in COMMANDS:
        assert f" {name} {sentence(cli.commands[name])}" in said


def sentence(command: click.Command) -> str:
    """The first one of a command's help."""
    return " ".join((command.help or "").split("\n\n")[0].split()).partition(". ")[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json(name: str) -> None:
    flags = [p for p in cli.commands[name].params if "--json" in p.opts]
    assert len(flags) == 1
    assert isinstance(flags[0], click.Option)
    assert flags[0].is_flag


# A user's mistake for each command: the arguments, the exit code, words of the message.
MISTAKES: dict[str, list[tuple[list[str], int, list[str]]]] = {
    "compile": [
        (["no-such.onnx", "-o", "{tmp}/a"], 2, ["no-such.onnx", "no file"]),
        (["in=1x4x3x4x5 co=6", "-o", "{tmp}/a"], 2, ["k= is missing"]),
        (["k3", "-o", "{tmp}/a"], 2, ["k3", "did you mean"]),
        (["{tmp}", "-o", "{tmp}/a"], 2, ["is a directory"]),
        (["{tmp}/text.onnx", "-o", "{tmp}/a"], 2, ["text.onnx"]),
        ([LAYER, "-o", "{tmp}/a", "--target", "llvm:pdp-11"], 2, ["pdp-11", "use one of"]),
        ([LAYER, "-o", "{tmp}/a", "--plan", "tuned"], 2, ["no tuned record", "opcompile tune"]),
        ([LAYER, "-o", "{tmp}/a", "--plan", "fast"], 2, ["--plan"]),
        ([LAYER, "-o", "{tmp}/text.onnx"], 2, ["is a file"]),
        ([LAYER, "-o", "{tmp}"], 2, ["empty it"]),
        ([LAYER, "-o", "{model}"], 2, ["holds the artifacts of a model", "name another"]),
        ([LAYER, "-o", "/proc/nowhere/a"], 2, ["/proc/nowhere/a"]),
        ([LAYER, "-o", "{tmp}/a", "--node", "n"], 2, ["not a model file"]),
        ([LAYER, "-o", "{tmp}/a", "--shape", "x=1x4x3x4x5"], 2, ["a shape was given", "not a model file"]),
        (["{models}/unet.onnx", "-o", "{tmp}/a", "--shape", "x=1x1x8x8x8"], 2, ["fixed sizes", "only open sizes"]),
        (["{models}/unet.onnx", "-o", "{tmp}/a", "--shape", "y=1x1x8x8x8"], 2, ["no input 'y'; it has: x\n"]),
        (["{models}/unet.onnx", "-o", "{tmp}/a", "--shape", "8x8x8"], 2, ["--shape '8x8x8'", "NAME=NxCxDxHxW"]),
        (
            ["{models}/unet.onnx", "-o", "{tmp}/a", *("--shape", "x=1x1x8x8x8") * 2],
            2,
            ["--shape is given twice for x"],
        ),
        (
            ["{models}/unet.onnx", "-o", "{tmp}/a", "--node", "n"],
            2,
            ["no 3-D transposed convolution 'n'", "node_convolution"],
        ),
        (["{models}/unet.onnx", "-o", "{tmp}"], 2, ["not among the nodes"]),
        ([LAYER], 2, ["--output"]),
    ],
    "verify": [
        (["{tmp}/none"], 2, ["does not exist"]),
        (["{tmp}"], 2, ["manifest.json"]),
        (["{tmp}/text.onnx"], 2, ["text.onnx"]),
    ],
    "run": [
        (["{tmp}", "--x", "{tmp}/x.npy", "-o", "{tmp}/y.npy"], 2, ["manifest.json"]),
        (["{layer}", "--x", "{tmp}/none.npy", "-o", "{tmp}/y.npy"], 2, ["none.npy"]),
        (
            ["{layer}", "--x", "{tmp}/text.onnx", "-o", "{tmp}/y.npy"],
            2,
            ["text.onnx is not a NumPy array file (.npy); write"],
        ),
        (["{layer}", "--x", "{tmp}", "-o", "{tmp}/y.npy"], 2, ["{tmp}"]),
        (
            ["{layer}", "--x", "{tmp}/pipe", "-o", "{tmp}/y.npy"],
            2,
            ["cannot read {tmp}/pipe: not a regular file; name"],
        ),
        (["{layer}", "--x", "{tmp}/pickled.npy", "-o", "{tmp}/y.npy"], 2, ["pickled.npy holds Python objects, not"]),
        (["{layer}", "--x", "{tmp}/cut.npy", "-o", "{tmp}/y.npy"], 2, ["cut.npy is damaged, not a whole NumPy array"]),
        (["{layer}", "--x", "{tmp}/cut.npz", "-o", "{tmp}/y.npy"], 2, ["cut.npz is an archive"]),
        (["{layer}", "--x", "{tmp}/many.npz", "-o", "{tmp}/y.npy"], 2, ["several arrays"]),
        (["{layer}", "--x", "{tmp}/none.npy", "-o", "{tmp}/none/y.npy"], 2, ["cannot write {tmp}/none/y.npy"]),
        (["{layer}", "--x", "{tmp}/x.npy", "-o", "{tmp}/y.npy"], 2, ["opcompile: --w is missing"]),
        (
            ["{layer}", "--x", "{tmp}/x.npy", "-o", "{tmp}/x.npy"],
            2,
            ["cannot write {tmp}/x.npy: {tmp}/x.npy is read, and would be lost; name another"],
        ),
        (["{layer}", "--x", "{tmp}/x.npy", "-o", "{tmp}/link.npy"], 2, ["link.npy: {tmp}/x.npy is read"]),
        (["{layer}", "--x", "{tmp}/x.npy", "-o", "{layer}/manifest.json"], 2, ["inside of the artifact", "beside it"]),
        (["{layer}", "--x", "{tmp}/wrong.npy", "-o", "{tmp}/y.npy"], 2, ["x has shape"]),
        (["{layer}", "--x", "{tmp}/x.npy", "-o", "{tmp}/y.npy", "--threads", "0"], 2, ["--threads"]),
        (["{model}", "--x", "{tmp}/x.npy", "-o", "{tmp}/y.npy"], 2, ["artifacts of a model", "node_convolution_1"]),
    ],
    "tune": [
        (["no-such-case"], 2, ["no-such-case"]),
        ([LAYER, "--trials", "0"], 2, ["--trials"]),
        ([LAYER, "--tracker", "localhost:1"], 2, ["key"]),
        ([], 2, ["SOURCE", "--absorb"]),
        ([LAYER, "--absorb", "{tmp}/r.json"], 2, ["SOURCE", "--absorb", "not both"]),
        (["--absorb", "{tmp}/r.json", "--emit", "{tmp}/job"], 2, ["--emit"]),
        (["--absorb", "{tmp}/none.json"], 2, ["none.json"]),
        (["--absorb", "{tmp}/pipe"], 2, ["pipe", "not a regular file"]),
        (["--absorb", "{tmp}/text.onnx"], 2, ["text.onnx", "not JSON"]),
        ([LAYER, "--emit", "{tmp}/job"], 3, ["'llvm' is no GPU"]),
        ([LAYER, "--emit", "{tmp}/job", "--target", "metal:apple-m1"], 3, ["metal:apple-m1 cannot be timed"]),
        ([LAYER, "--emit", "{tmp}/job", "--target", "cuda:sm_90", "--key", "k"], 2, ["--emit", "--key"]),
        (
            [LAYER, "--target", "cuda:sm_90", "--tracker", "localhost:1", "--key", "k"],
            3,
            ["localhost:1 does not answer"],
        ),
    ],
    "measure": [
        (["{tmp}/none", "-o", "{tmp}/r.json"], 2, ["none", "job.json", "--emit"]),
        (["{tmp}"], 2, ["--output"]),
        (["{tmp}/none", "-o", "{tmp}/none/r.json"], 2, ["cannot write {tmp}/none/r.json", "no such folder"]),
    ],
    "bench": [
        (["no-such-case"], 2, ["no-such-case"]),
        ([LAYER, "--against", "abacus"], 2, ["abacus", "onnxruntime"]),
        ([LAYER, "--threads", "1000"], 2, ["threads is 1000"]),
        ([LAYER, "--threads", "none"], 2, ["--threads"]),
        ([], 2, ["SOURCE", "--tag"]),
        (["--tag", "nothing"], 2, ["nothing", "the tags are"]),
        ([LAYER, "--plot", "{tmp}/f.bmp"], 2, ["f.bmp", ".png"]),
        ([LAYER, "--markdown", "--json"], 2, ["--markdown", "--json"]),
        ([LAYER, "--seconds", "nan"], 2, ["--seconds", "finite"]),
        ([LAYER, "--seconds", "inf"], 2, ["--seconds", "finite"]),
        ([LAYER, "--at-least", "nan"], 2, ["--at-least", "finite"]),
        ([LAYER, "--save", "{tmp}/none/f.json"], 2, ["cannot write {tmp}/none/f.json", "no such folder"]),
        ([LAYER, "--save", "{tmp}"], 2, ["cannot write {tmp}", "is a folder"]),
        ([LAYER, "--save", "{layer}/report.json"], 2, ["inside of the artifact"]),
        (["{tmp}/held.onnx", "--save", "{tmp}/held.onnx"], 2, ["{tmp}/held.onnx is read"]),
        (["{tmp}/held.onnx", "--save", "{tmp}/held.data"], 2, ["{tmp}/held.data is read"]),
        ([LAYER, "--plot", "{tmp}/none/f.svg"], 2, ["cannot write {tmp}/none/f.svg", "no such folder"]),
    ],
    "export": [
        (["no-such-case", "-o", "{tmp}/a.onnx"], 2, ["no-such-case"]),
        ([LAYER, "-o", "{tmp}/none/a.onnx"], 2, ["none/a.onnx"]),
        ([LAYER, "-o", "{tmp}/a.onnx", "--opset", "3"], 2, ["opset 3"]),
        (["{tmp}/held.onnx", "-o", "{tmp}/held.onnx"], 2, ["{tmp}/held.onnx is read"]),
        (["{tmp}/held.onnx", "-o", "{tmp}/held.data"], 2, ["{tmp}/held.data is read"]),
        ([LAYER, "-o", "{layer}/model.onnx"], 2, ["inside of the artifact"]),
        ([LAYER, "-o", "{tmp}/a.onnx", "--opset", "0"], 2, ["opset 0"]),
        (["{models}/unet.onnx", "-o", "{tmp}/a.onnx"], 2, ["has 2 such nodes", "--node"]),
    ],
    "replace": [
        (["{tmp}/none.onnx", "-o", "{tmp}/out"], 2, ["none.onnx", "name an ONNX file"]),
        (["{tmp}/pipe", "-o", "{tmp}/out"], 2, ["cannot read {tmp}/pipe: not a regular file; name an ONNX file"]),
        (["{models}/unet.onnx", "-o", "{tmp}/out", "--shape", "x"], 2, ["--shape", "NAME=NxCxDxHxW"]),
        (["{models}/unet.onnx", "-o", "{tmp}/out", "--shape", f"x=1x{'9' * 5000}"], 2, ["NAME=NxCxDxHxW"]),
        (["{models}/unet.onnx", "-o", "{tmp}/out", "--node", "nothing"], 2, ["nothing", "it has: node_convolution"]),
        (["{models}/unet.onnx", "-o", "{tmp}/out", "--shape", "y=1x1x8x8x8"], 2, ["no input 'y'; it has: x\n"]),
        (["{models}/unet.onnx", "-o", "{tmp}/out", "--seconds", "nan"], 2, ["--seconds", "finite"]),
        (["{models}/unet.onnx", "-o", "{tmp}/out", "--target", "cuda:sm_90"], 3, ["cuda:sm_90", "works for CPUs"]),
    ],
    "inspect": [
        (["no-such-case"], 2, ["no-such-case"]),
        (["{tmp}"], 2, ["manifest.json"]),
        ([LAYER, "--target", "vax"], 2, ["vax"]),
        ([LAYER, "--target", "sm_90"], 2, ["did you mean cuda:sm_90?"]),
        ([LAYER, "--target", "cuda:sm90"], 2, ["did you mean cuda:sm_90?"]),
        ([LAYER, "--derivative", "y"], 2, ["--derivative"]),
        ([f"{LAYER} bias=0", "--derivative", "b"], 2, ["the layer has no bias", "use x or w"]),
        ([LAYER, "--derivative", "x", "--plan", "tuned"], 2, ["derivatives are not tuned", "use plan best"]),
    ],
    "diff": [
        (["no-such-case"], 2, ["no-such-case"]),
        (["{models}/unet.onnx"], 2, ["has 2 such nodes", "--node"]),
    ],
    "cases": [(["--tag", "nothing"], 2, ["nothing", "the tags are"])],
    "doctor": [(["--nothing"], 2, ["--nothing"])],
}


def test_every_command_has_its_mistakes() -> None:
    assert sorted(MISTAKES) == COMMANDS


@pytest.mark.parametrize(
    ("name", "args", "code", "words"),
    [pytest.param(name, *mistake, id=f"{name}-{i}") for name in COMMANDS for i, mistake in enumerate(MISTAKES[name])],
)
def test_a_mistake_has_a_code_and_a_message_and_no_traceback(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    args: list[str],
    code: int,
    words: list[str],
) -> None:
    monkeypatch.setenv("OPCOMPILE_RECORDS", str(tmp_path / "records"))
    (tmp_path / "text.onnx").write_text("this is no model\n" * 40)
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 3, 4, 5), np.float32))
    np.save(tmp_path / "wrong.npy", np.zeros(3, np.float32))
    np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:200])
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    np.savez(tmp_path / "many.npz", a=np.zeros(1))
    (tmp_path / "link.npy").symlink_to(tmp_path / "x.npy")
    os.mkfifo(tmp_path / "pipe")
    onnx.save(upsampling(), tmp_path / "held.onnx", save_as_external_data=True, location="held.data", size_threshold=0)
    places = {"tmp": tmp_path, "models": MODELS, "layer": folder / "layer", "model": folder / "model"}
    filled = [arg.format(**places) for arg in args]
    # JSON or not, stdout stays empty
    result = invoke(name, *filled, *(["--json"] if len(filled) % 2 else []))
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    for word in words:
        assert word.format(**places) in result.stderr
    assert "Traceback" not in result.stderr
    assert "mistake in opcompile" not in result.stderr


# --- exit codes ---


def raising(error: BaseException) -> Callable[..., None]:
    def tagged(*_: str) -> None:
        raise error

    return tagged


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OpcompileError("plain"), 1, "opcompile: plain\n"),
        (VerificationError("beyond"), 1, "opcompile: beyond\n"),
        (PermissionError(13, "Permission denied", "/there"), 2, "opcompile: /there: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 141, ""),
        (MemoryError("8 EiB"), 3, "out of memory: 8 EiB"),
        # installed without what it depends on, to run artifacts alone
        (
            ModuleNotFoundError("No module named 'tvm'", name="tvm"),
            3,
            "the package apache-tvm, which is missing: pip install apache-tvm,",
        ),
        (ModuleNotFoundError("No module named", name="opcompile.no"), 70, "This is a mistake in opcompile"),
        (ZeroDivisionError("oops"), 70, "ZeroDivisionError: oops\nThis is a mistake in opcompile"),
    ],
)
def test_whatever_comes_out_has_its_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    monkeypatch.delenv("OPCOMPILE_DEBUG", raising=False)
    monkeypatch.setattr("opcompile.cases.tagged", raising(error))
    result = invoke("cases")
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPCOMPILE_DEBUG", "1")
    monkeypatch.setattr("opcompile.cases.tagged", raising(ZeroDivisionError("oops")))
    assert isinstance(invoke("cases").exception, ZeroDivisionError)


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def two_steps() -> None:
        with progress("working") as show:
            show(0, 2, "first [thing]")
            show(1, 2, None)
            show(2, 2, "last", "[so far]")

    two_steps()
    assert capsys.readouterr() == ("", "first [thing]\nlast\n")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    two_steps()
    assert "last" in terminal.getvalue()
    assert "[so far]" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as in the foreground: a shell has its background jobs ignore it, and their children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_in_disguise_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_tvm_does(*_: str) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError from None

    monkeypatch.setenv("OPCOMPILE_DEBUG", "1")
    monkeypatch.setattr("opcompile.cases.tagged", as_tvm_does)
    before = signal.getsignal(signal.SIGINT)
    result = invoke("cases")
    assert (result.exit_code, result.stderr) == (130, "opcompile: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_lets_what_the_first_ends_tidy_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tidy = []

    def interrupted(*_: str) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            tidy.append(True)

    monkeypatch.setattr("opcompile.cases.tagged", interrupted)
    result = invoke("cases")
    assert tidy
    assert (result.exit_code, result.stderr.strip()) == (130, "opcompile: interrupted")


def test_a_third_signal_waits_for_nothing() -> None:
    program = (
        "import signal\nimport opcompile.cases\nfrom opcompile.cli import cli\n"
        "def interrupted(*_):\n    try:\n        signal.raise_signal(signal.SIGTERM)\n    finally:\n"
        "        signal.raise_signal(signal.SIGTERM)\n        signal.raise_signal(signal.SIGTERM)\n"
        "        print('late', flush=True)\n"
        "opcompile.cases.tagged = interrupted\ncli(['cases'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False, timeout=600)
    assert (done.returncode, done.stdout) == (143, b"")


def test_version_and_help_are_light() -> None:
    program = (
        "import sys\nfrom opcompile.cli import cli\n"
        "for words in ['--version'], ['--help'], ['compile', '--help']:\n"
        "    cli.main(words, standalone_mode=False)\n"
        "heavy = {'tvm', 'tvm_ffi', 'onnx', 'onnxruntime', 'rich', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_pytorch_is_imported_by_what_asks_for_it_alone(tmp_path: Path) -> None:
    """And not by TVM's runtime, which takes it wherever it is."""
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch was imported')")
    program = (
        "import sys\nfrom opcompile.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end\nimport tvm, torch"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, "-c", program, "inspect", LAYER, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert json.loads(done.stdout)["layers"]
    assert (done.returncode, done.stderr) == (1, "PyTorch was imported\n")


def test_the_version_is_the_packages() -> None:
    done = run_process("--version")
    assert (done.returncode, done.stdout) == (0, f"opcompile {opcompile.__version__}\n")


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_a_closed_pipe_is_no_traceback(form: list[str]) -> None:
    command = [sys.executable, "-m", "opcompile", "cases", *form]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_a_closed_pipe_is_so_before_a_command_too(word: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "opcompile", word], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("columns", ["0", "-1", "wide"])
def test_a_width_that_is_none_cuts_nothing(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert LAYER.split()[0] in invoke("inspect", LAYER).stdout


def test_numbers_are_whole_where_the_terminal_is_narrow(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shutil.copytree(folder / "layer", tmp_path / "layer")
    report = invoke("verify", place)
    monkeypatch.setenv("COLUMNS", "40")
    narrow = invoke("verify", place).stdout
    assert sorted(re.findall(r"\d+\.\d%", narrow)) == sorted(re.findall(r"\d+\.\d%", report.stdout)) != []
    assert "\N{HORIZONTAL ELLIPSIS}" not in narrow


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_stderr_changes_no_result(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m opcompile compile '{SMALL}' --no-verify --json -o {tmp_path / 'a'} 2>/dev/full"
    done = subprocess.run(["/bin/sh", "-c", command], stdout=subprocess.PIPE, check=False)
    assert (done.returncode, json.loads(done.stdout)["layers"][0]["status"]) == (0, "not verified")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("word", ["no-such-command", "inspect no-such-case"])
def test_the_exit_code_tells_what_stderr_cannot(word: str) -> None:
    command = f"exec {sys.executable} -m opcompile {word} 2>/dev/full"
    assert subprocess.run(["/bin/sh", "-c", command], check=False).returncode == 2


@pytest.mark.parametrize(
    "closed", ["<&-", ">&- 2>&-", *(pytest.param(each, marks=pytest.mark.heavy) for each in (">&-", "2>&-"))]
)
def test_streams_that_are_closed_are_no_mistake(tmp_path: Path, closed: str) -> None:
    command = f"exec {sys.executable} -m opcompile compile '{SMALL}' -o {tmp_path / 'a'} {closed}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "report.json").is_file()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_is_no_traceback_and_nothing_stays_behind(
    tmp_path: Path, number: signal.Signals, code: int, said: str
) -> None:
    command = [sys.executable, "-m", "opcompile", "compile", LAYER, "-o", str(tmp_path / "a")]
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"compile layer\n"  # it is at work
        time.sleep(0.2)
        process.send_signal(number)
        rest = process.stderr.read().decode()
        assert process.wait() == code
    assert "Traceback" not in rest
    assert rest.endswith(f"opcompile: {said}\n")
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def test_without_click_the_command_says_what_it_needs() -> None:
    program = (
        "import sys\nsys.modules['click'] = None\n"
        "from opcompile.__main__ import main\nsys.argv[1:] = ['--help']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    needed = "the command line needs the package click, which is missing: pip install click rich"
    assert done.stderr == f"opcompile: {needed}\n"


# --- compile ---


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system takes UTF-8 alone")
def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    place = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    result = invoke("compile", LAYER, "-o", place)
    assert result.exit_code == 0, result.output
    assert not json.loads((Path(place) / "report.json").read_text())["not_asked"]


def test_compile_a_real_model(folder: Path) -> None:
    index = json.loads((folder / "model" / INDEX).read_text())
    assert index["source"] == "dynunet.onnx"
    assert index["source_sha256"] == hashlib.sha256((MODELS / "dynunet.onnx").read_bytes()).hexdigest()
    assert index["sha256"] == digest(index)
    for found, (name, listed) in zip(
        read(MODELS / "dynunet.onnx").layers, artifacts(folder / "model").items(), strict=True
    ):
        assert found.name == name
        place = listed.directory
        loaded = opcompile.load(place)
        assert loaded.spec == found.spec
        report = json.loads((place / "report.json").read_text())
        assert report["passed"]
        assert {row["against"] for row in report["rows"]} == {"reference", "onnxruntime"}
        held = [tensor.name for tensor in onnx.load(place / "model.onnx").graph.initializer]
        assert held == ["W", "B"][: 1 + loaded.spec.bias]


@pytest.mark.parametrize("name", [name for name in COMMANDS if takes(name, "--node")])
def test_open_sizes_can_be_given_wherever_a_model_can(name: str) -> None:
    assert takes(name, "--shape")


def test_a_model_with_open_sizes(tmp_path: Path) -> None:
    path = saved(upsampling(("n", 4, "d", "h", "w")), tmp_path)
    result = invoke("compile", path, "-o", tmp_path / "out")
    assert (result.exit_code, "--shape x=Nx4x?x?x?," in " ".join(result.stdout.split())) == (2, True)
    sizes = ["--shape", "x=Nx4x3x4x5"]
    (built,) = of_json(invoke("compile", path, "-o", tmp_path / "out", *sizes, "--json"))["layers"]
    assert (built["status"], built["spec"]) == ("verified", str(ConvTranspose3d.parse(LAYER.replace("in=1", "in=N"))))
    assert json.loads((tmp_path / "out" / INDEX).read_text())["shapes"] == {"x": ["N", 4, 3, 4, 5]}
    sizes[1] = "x=1x4x3x4x5"
    described = of_json(invoke("inspect", path, *sizes, "--json"))["layers"]["up"]
    exported = of_json(invoke("export", path, "-o", tmp_path / "up.onnx", *sizes, "--json"))
    assert {described["spec"], exported["spec"]} == {str(ConvTranspose3d.parse(LAYER))}
    assert invoke("diff", path, *sizes, "--no-measure").exit_code == 0
    timed = of_json(invoke("bench", path, *sizes, "--seconds", "0.01", "--no-memory", "--json"))
    assert list(timed["layers"]) == ["up"]


def test_what_cannot_be_compiled_is_listed_and_the_others_go_on(tmp_path: Path) -> None:
    result = invoke("compile", mixed_model(tmp_path), "-o", tmp_path / "out", "--plan", "baseline", "--json")
    layers = of_json(result)["layers"]
    assert [(layer["name"], layer["status"]) for layer in layers] == [
        ("good", "verified"),
        ("dynamic", "not compiled"),
        ("up/two", "verified"),
    ]
    assert "dynamic spatial sizes" in layers[1]["reason"]
    assert layers[2]["directory"] == "up_two"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good", INDEX, "up_two"]
    # the same again, as text, over the old one
    result = invoke("compile", tmp_path / "mixed.onnx", "-o", tmp_path / "out", "--plan", "baseline", "--no-verify")
    assert result.exit_code == 0
    assert "dynamic: not compiled: X (U)" in result.stdout
    assert "2 of 3 compiled, 0 verified" in result.stdout


def two_layers(folder: Path, seed: int) -> Path:
    """A model of two layers, with weights of their own."""
    rng = np.random.default_rng(seed)
    held = [numpy_helper.from_array(rng.standard_normal((4, 4, 2, 2, 2), np.float32), name) for name in ("V", "W")]
    nodes = [
        helper.make_node("ConvTranspose", ["x", "V"], ["a"], "first"),
        helper.make_node("ConvTranspose", ["a", "W"], ["y"], "second"),
    ]
    x, y = value("x", (1, 4, 2, 2, 2)), value("y", (1, 4, 4, 4, 4))
    return saved(model_of(nodes, [x], [y], initializers=held), folder)


def test_a_model_that_was_not_compiled_to_its_end_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its nodes is new, and the other of the model that was there before."""
    out = tmp_path / "out"
    words = ["--plan", "baseline", "--no-verify"]
    assert invoke("compile", two_layers(tmp_path, 0), "-o", out, *words).exit_code == 0
    first = (out / "first" / "weights.npz").read_bytes()
    write, written = artifact.write, []

    def interrupted(*given: Any, **named: Any) -> Path:
        written.append(given)
        if len(written) == 2:
            raise KeyboardInterrupt
        return write(*given, **named)

    monkeypatch.setattr("opcompile.artifact.write", interrupted)
    assert invoke("compile", two_layers(tmp_path, 1), "-o", out, *words).exit_code == 130
    assert (out / "first" / "weights.npz").read_bytes() != first
    for command in ("verify", "inspect"):
        result = invoke(command, out)
        assert (result.exit_code, "was not compiled to its end; compile it again" in result.stderr) == (2, True)
    monkeypatch.undo()
    assert invoke("compile", tmp_path / "model.onnx", "-o", out, *words).exit_code == 0
    assert set(artifacts(out)) == {"first", "second"}


@pytest.mark.parametrize(
    ("variable", "value", "code"), [("OPCOMPILE_RECORDS", __file__, 2), ("CC", "/nonexistent/cc", 3)]
)
def test_what_fails_before_anything_is_replaced_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, code: int
) -> None:
    out, path = tmp_path / "out", two_layers(tmp_path, 0)
    assert invoke("compile", path, "-o", out, "--no-verify").exit_code == 0
    before = {place: place.read_bytes() for place in out.rglob("*") if place.is_file() and place.name != INDEX}
    monkeypatch.setenv(variable, value)
    assert invoke("compile", two_layers(tmp_path, 1), "-o", out, "--no-verify").exit_code == code
    assert {place: place.read_bytes() for place in out.rglob("*") if place.is_file() and place.name != INDEX} == before
    if code == 3:
        assert invoke("verify", out).exit_code == 0


def test_an_older_artifact_of_a_node_that_is_not_compiled_is_said(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["-o", out, "--plan", "baseline", "--no-verify"]
    path = saved(upsampling(), tmp_path)
    assert invoke("compile", path, *words).exit_code == 0
    saved(upsampling(("n", 4, "d", "h", "w")), tmp_path)
    result = invoke("compile", path, *words)
    assert (result.exit_code, f"{out / 'up'} is from an earlier time" in result.stdout) == (2, True)
    assert (out / "up" / "manifest.json").is_file()
    assert "lists no artifact" in invoke("verify", out).stderr


def test_an_artifact_whose_report_does_not_fit_is_there_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("opcompile.artifact.add_report", raising(full))
    out = tmp_path / "out"
    result = invoke("compile", saved(upsampling(), tmp_path), "-o", out, "--plan", "baseline")
    assert (result.exit_code, "takes no report: No space left on device" in result.stdout) == (0, True)
    assert set(artifacts(out)) == {"up"}


def test_what_a_killed_writer_left_is_in_nobodys_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    left = [".DS_Store", *(f".{name}.{'0f' * 16}" for name in ("up", "index.json"))]
    for name in left:
        (out / name).mkdir(parents=True)
    model = saved(upsampling(), tmp_path)
    assert invoke("compile", model, "-o", out, "--no-verify").exit_code == 0
    assert {path.name for path in out.iterdir()} == {*left, "index.json", "up"}
    (out / ".another.0f").mkdir()
    assert "holds .another.0f, not" in invoke("compile", model, "-o", out).stderr


def test_nothing_compiled_is_bad_input(tmp_path: Path) -> None:
    path, out = mixed_model(tmp_path), tmp_path / "out"
    result = invoke("compile", path, "-o", out, "--node", "dynamic", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["layers"][0]["status"] == "not compiled"
    assert invoke("verify", out).exit_code == 2
    for command in ("inspect", "bench", "tune"):
        assert "no node of" in invoke(command, path, "--node", "dynamic").stderr


def mixed_model(folder: Path) -> Path:
    """Two nodes that compile (one with its weight at run time only), and one whose sizes are dynamic."""
    weight = numpy_helper.from_array(np.ones((2, 2, 2, 2, 2), np.float32), "K")
    nodes = [
        helper.make_node("ConvTranspose", ["X", "K"], ["Y"], name="good", strides=[2, 2, 2]),
        helper.make_node("ConvTranspose", ["U", "K"], ["V"], name="dynamic"),
        helper.make_node("ConvTranspose", ["X", "W"], ["Z"], name="up/two", strides=[2, 2, 2]),
    ]
    inputs = [value("X", (1, 2, 2, 2, 2)), value("U", (1, 2, "d", 2, 2)), value("W", (2, 2, 2, 2, 2))]
    outputs = [value(name, None) for name in ("Y", "V", "Z")]
    path = folder / "mixed.onnx"
    onnx.save(model_of(nodes, inputs, outputs, initializers=[weight]), path)
    return path


def test_weights_that_are_not_finite_are_compiled_and_not_verified(tmp_path: Path) -> None:
    model, out = onnx.load(mixed_model(tmp_path)), tmp_path / "out"
    weight = np.ones((2, 2, 2, 2, 2), np.float32)
    weight[0, 0, 0, 0] = np.inf, np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "K"))
    onnx.save(model, tmp_path / "mixed.onnx")
    result = invoke("compile", tmp_path / "mixed.onnx", "-o", out, "--plan", "baseline", "--json")
    good = json.loads(result.stdout)["layers"][0]
    reason = "its weights hold infinities or NaN, for which there is no bound"
    assert (result.exit_code, good["status"], good["directory"]) == (3, "not verified", "good")
    assert good["reason"] == reason
    assert good["worst_share_of_bound"]["reference"] is None
    shown = invoke("inspect", out / "good")
    assert f"verified   not verified: {reason}; with other weights passed" in shown.stdout
    report = json.loads((out / "good" / "report.json").read_text())
    report["rows"][0]["check"]["passed"] = False
    assert _verdict(report).startswith("FAILED, ")
    result = invoke("verify", out / "good", "--json")
    assert result.exit_code == 3
    report = json.loads(result.stdout)["artifacts"]["good"]
    assert (report["passed"], report["unverified"]) == (False, reason)
    assert {row["weights"] for row in report["rows"]} == {"caller"}
    assert "opcompile with the weights compiled in" in {each["what"] for each in report["not_asked"]}
    for place in (out, out / "good"):
        assert f"not verified: {reason}\n" in invoke("verify", place).stdout
    with pytest.raises(VerificationError, match=f"nothing was verified of .*: {reason}"):
        check(opcompile.load(out / "good")).require()


@pytest.mark.parametrize("source", [LAYER, "{models}/unet.onnx"])
@pytest.mark.parametrize("place", ["/proc/nowhere/a", "{tmp}/file/a", "{tmp}/full"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    source: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opcompile import build

    def work(*_: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(build, "lower", work)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "of mine").touch()
    place = place.format(tmp=tmp_path)
    result = invoke("compile", source.format(models=MODELS), "-o", place)
    assert (result.exit_code, result.stdout) == (2, "")
    assert place in result.stderr
    with pytest.raises(ArtifactError):
        build.write(ConvTranspose3d.parse(LAYER), "llvm", "baseline", place)


@pytest.mark.parametrize("command", ["compile", "replace"])
def test_links_that_lead_back_are_no_place(command: str, tmp_path: Path) -> None:
    (tmp_path / "there").symlink_to("back")
    (tmp_path / "back").symlink_to("there")
    result = invoke(command, MODELS / "unet.onnx", "-o", tmp_path / "there")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "links that lead back to themselves" in result.stderr


@pytest.mark.parametrize("words", [["replace", "{tmp}/none.onnx"], ["compile", LAYER, "--plan", "tuned"]])
def test_what_fails_leaves_no_folder(words: list[str], tmp_path: Path) -> None:
    place = tmp_path / "new" / "place"
    assert invoke(*(word.format(tmp=tmp_path) for word in words), "-o", place).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_ones_own_may_lie_in_one_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is compiled into it: nothing is written beside it."""
    place = tmp_path / "mine"
    place.mkdir()
    make = Path.mkdir

    def permitted(path: Path, *rest: Any, **words: Any) -> None:
        if path.parent == tmp_path and path != place:
            raise PermissionError(13, "Permission denied")
        make(path, *rest, **words)

    model = saved(upsampling(), tmp_path)
    monkeypatch.setattr(Path, "mkdir", permitted)
    assert invoke("compile", model, "-o", place, "--no-verify").exit_code == 0
    result = invoke("compile", model, "-o", tmp_path / "theirs")
    assert (result.exit_code, "Permission denied" in result.stderr) == (2, True)


def test_a_whole_disk_is_not_walked_through() -> None:
    result = invoke("replace", MODELS / "unet.onnx", "-o", "/")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "which replace has not written" in result.stderr


def test_what_no_node_could_do_without_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opcompile.artifact.link", raising(EngineError("no C compiler")))
    result = invoke("compile", MODELS / "unet.onnx", "-o", tmp_path / "out", "--plan", "baseline")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "no C compiler" in result.stderr


def test_a_kernel_that_a_compiler_refuses_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opcompile.artifact.link", raising(KernelError("too much shared memory")))
    result = invoke("compile", MODELS / "unet.onnx", "-o", tmp_path / "out", "--plan", "baseline", "--json")
    assert result.exit_code == 2
    assert {b["reason"] for b in json.loads(result.stdout)["layers"]} == {"too much shared memory"}


def test_equal_layers_are_lowered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opcompile import build

    lowered = []

    def counting(spec: ConvTranspose3d, *rest: Any) -> Any:
        lowered.append(spec)
        return lower(spec, *rest)

    lower = build.lower
    monkeypatch.setattr(build, "lower", counting)
    built = build.compile_all(mixed_model(tmp_path), tmp_path / "out", plan="baseline", verify=False)
    assert [b.status for b in built] == ["not verified", "not compiled", "not verified"]
    assert built[0].spec == built[2].spec
    assert len(lowered) == 1


def test_wrong_outputs_exit_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opcompile import bounds

    monkeypatch.setattr(bounds, "linear", lambda *args: reference_linear(*args) + 1e-3)
    reference_linear = __import__("opcompile.reference", fromlist=["linear"]).linear
    result = invoke("compile", LAYER, "-o", tmp_path / "a", "--plan", "baseline")
    assert result.exit_code == 1
    assert "wrong" in result.stdout
    result = invoke("verify", tmp_path / "a")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout


def test_what_cannot_be_asked_is_not_verified_and_not_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    result = invoke("compile", LAYER, "-o", tmp_path / "a", "--target", "metal:apple-m1")
    assert result.exit_code == 3
    assert "layer: not verified: the compiler '/nowhere/c++' cannot be started" in result.stdout
    assert "wrong" not in result.stdout
    result = invoke("verify", tmp_path / "a", "--simulate")
    assert result.exit_code == 3
    assert "the compiler '/nowhere/c++' cannot be started" in " ".join(result.stdout.split())


def test_a_target_that_is_not_here_is_written_and_not_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise EngineError("nobody emulates it")

    monkeypatch.setattr("opcompile.artifact.link", lambda *_: b"a library")
    monkeypatch.setattr("opcompile.build.require_emulated", refuse)
    away = "llvm:cortex-a72" if os.uname().machine == "x86_64" else "llvm:x86-64-v3"
    result = invoke("compile", LAYER, "-o", tmp_path / "a", "--target", away, "--json")
    (layer,) = of_json(result)["layers"]
    reason = f"code for {away} does not run on this machine, and nobody emulates it"
    assert (layer["status"], layer["reason"]) == ("not verified", reason)
    assert of_json(invoke("inspect", tmp_path / "a", "--json"))["artifacts"]["a"]["manifest"]["target"]["name"] == away
    assert invoke("verify", tmp_path / "a").exit_code == 3


# --- the other commands ---


def test_verify_names_every_artifact_that_is_gone_and_asks_the_others(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(folder / "model", out)
    gone, changed, whole = artifacts(out)
    shutil.rmtree(out / gone)
    (out / changed / "golden.npz").write_bytes(b"")
    result = invoke("verify", out, "--json")
    assert result.exit_code == 2
    listed = json.loads(result.stdout)["artifacts"]
    assert [listed[name]["passed"] for name in (gone, changed, whole)] == [False, False, True]
    result = invoke("verify", out)
    assert result.exit_code == 2
    assert f"{gone}: not verified: {out / gone} does not exist" in result.stdout
    assert f"{changed}: not verified: {out / changed / 'golden.npz'}" in result.stdout


def test_inspect_names_every_artifact_that_is_gone_and_shows_the_others(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(folder / "model", out)
    gone, *others = artifacts(out)
    shutil.rmtree(out / gone)
    result = invoke("inspect", out, "--json")
    assert result.exit_code == 2
    content = json.loads(result.stdout)
    assert not content["whole"]
    assert {name for name, held in content["artifacts"].items() if "reason" not in held} == set(others)
    assert f"{gone}: {out / gone} does not exist" in invoke("inspect", out).stdout


def swap(one: Path, other: Path, aside: Path) -> None:
    for source, into in ((one, aside), (other, one), (aside, other)):
        source.rename(into)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled model, ``out``, of two layers that differ in their weights alone."""
    home = tmp_path_factory.mktemp("twins")
    model = mixed_model(home)
    graph = onnx.load(model)
    graph.graph.initializer.append(numpy_helper.from_array(np.full((2, 2, 2, 2, 2), 3, np.float32), "L"))
    graph.graph.node[2].input[1] = "L"
    onnx.save(graph, model)
    assert invoke("compile", model, "-o", home / "out", "--plan", "baseline", "--no-verify").exit_code == 0
    return home / "out"


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_an_artifact_of_another_layer_is_not_the_model_s(twins: Path, tmp_path: Path, command: str) -> None:
    out = shutil.copytree(twins, tmp_path / "out")
    layer = ["in=1x2x2x2x2 co=2 k=2 s=2", "--plan", "baseline", "--no-verify"]
    assert invoke("compile", *layer, "-o", out / "good").exit_code == 0
    refused = f"good: {'not verified: ' if command == 'verify' else ''}{out / 'good'} holds another artifact than"
    result = invoke(command, out)
    assert (result.exit_code, f"{refused} index.json lists" in result.stdout) == (2, True)
    listed = json.loads(invoke(command, out, "--json").stdout)
    assert "holds another artifact" in str(listed)
    # by its own name it is what it is
    assert invoke(command, out / "good").exit_code == 0


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_artifacts_that_changed_places_are_not_the_model_s(twins: Path, tmp_path: Path, command: str) -> None:
    out = shutil.copytree(twins, tmp_path / "out")
    swap(out / "good", out / "up_two", tmp_path / "aside")
    result = invoke(command, out)
    assert (result.exit_code, result.stdout.count("holds another artifact than index.json lists")) == (2, 2)
    swap(out / "good", out / "up_two", tmp_path / "aside")
    assert invoke(command, out).exit_code == 0


def test_the_only_artifact_of_a_model_is_not_another(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("compile", saved(upsampling(), tmp_path), "-o", out, "--no-verify").exit_code == 0
    assert invoke("compile", SMALL, "-o", out / "up", "--no-verify").exit_code == 0
    for command in ("verify", "inspect"):
        result = invoke(command, out)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"{out / 'up'} holds another artifact than index.json lists; compile the model again" in result.stderr


def _other_spec(layers: list[dict[str, Any]]) -> None:
    layers[0]["spec"] = "nonsense"


def _other_reason(layers: list[dict[str, Any]]) -> None:
    layers[1]["reason"] = "out of luck"


@pytest.mark.parametrize("change", [_other_spec, _other_reason, list.pop, list.reverse])
@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_an_index_that_was_changed_is_refused(
    twins: Path, tmp_path: Path, command: str, change: Callable[[list[dict[str, Any]]], object]
) -> None:
    out = shutil.copytree(twins, tmp_path / "out")
    index = json.loads((out / INDEX).read_text())
    (out / INDEX).write_text(json.dumps(index))
    assert invoke(command, out).exit_code == 0  # however it is indented
    change(index["layers"])
    (out / INDEX).write_text(json.dumps(index))
    result = invoke(command, out)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{out / INDEX} was changed after it was written; compile the model again" in result.stderr


def test_the_index_says_nothing_that_verifying_would_make_wrong(tmp_path: Path) -> None:
    """Verified later, elsewhere, one by one, or where nothing can be written: the reports say it, no copy of them."""
    out, words = tmp_path / "out", [mixed_model(tmp_path), "--plan", "baseline", "-o"]
    assert invoke("compile", *words, out, "--no-verify").exit_code == 0
    assert invoke("compile", *words, tmp_path / "verified").exit_code == 0
    index = (out / INDEX).read_bytes()
    assert index == (tmp_path / "verified" / INDEX).read_bytes()
    assert b"verified" not in index
    good, dynamic, _ = json.loads(index)["layers"]
    assert (good["directory"], good["reason"], len(good["fingerprint"])) == ("good", None, 64)
    assert (dynamic["directory"], dynamic["fingerprint"]) == (None, None)
    assert "dynamic spatial sizes" in dynamic["reason"]
    assert invoke("verify", out).exit_code == 0
    assert (out / INDEX).read_bytes() == index
    assert invoke("verify", out).exit_code == 0


def test_verify_stores_its_report_where_it_can(folder: Path) -> None:
    assert not (folder / "layer" / "report.json").exists()
    content = of_json(invoke("verify", folder / "layer", "--json"))
    assert content["passed"]
    assert json.loads((folder / "layer" / "report.json").read_text()) == content["artifacts"]["layer"]
    result = invoke("verify", folder / "model")
    assert result.exit_code == 0
    assert result.stdout.count("verified") == 3


def test_a_report_that_cannot_be_stored_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opcompile.artifact.add_report", raising(PermissionError(13, "Permission denied", "/there")))
    result = invoke("verify", folder / "dynamic")
    assert result.exit_code == 0
    assert f"the report was not stored: {folder / 'dynamic'} takes no report: Permission denied" in result.stderr


def test_a_report_without_answers_leaves_the_one_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "it"
    given = ["compile", SMALL, "-o", place, "--target", "metal:apple-m1"]
    monkeypatch.setenv("CXX", "/nonexistent")
    assert invoke(*given).exit_code == 3
    assert "not yet" in invoke("inspect", place).stdout
    monkeypatch.delenv("CXX")
    assert invoke(*given).exit_code == 0
    report = (place / "report.json").read_bytes()
    monkeypatch.setenv("CXX", "/nonexistent")
    assert invoke("verify", place, "--simulate").exit_code == 3
    assert (place / "report.json").read_bytes() == report


def test_run_leaves_no_half_of_an_array(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CallError, match=r"cannot write .*y\.npy: .* written; name a file"):
            _write_array(str(tmp_path / "y.npy"), np.ones(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_run_is_the_artifact_called(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 4, 3, 4, 5), "w": (4, 6, 2, 2, 2), "b": (6,)}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    given = [word for name in shapes for word in (f"--{name}", tmp_path / f"{name}.npy")]
    # a name of one's own, without .npy
    result = invoke("run", folder / "layer", *given, "-o", tmp_path / "y", "--threads", "1", "--json")
    assert of_json(result) == {"output": str(tmp_path / "y"), "shape": [1, 6, 6, 8, 10], "dtype": "float32"}
    assert np.array_equal(np.load(tmp_path / "y"), opcompile.load(folder / "layer")(*arrays.values()))
    result = invoke("run", folder / "layer", *given, "-o", tmp_path / "none" / "y.npy")
    assert result.exit_code == 2
    assert "cannot write" in result.stderr


def test_run_and_verify_need_no_compiler(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 2, 2, 2, 2)))
    np.save(tmp_path / "w.npy", np.ones((2, 2, 2, 2, 2)))
    program = (
        "import json, sys\nsys.modules['tvm'] = sys.modules['onnx'] = None\nfrom opcompile.cli import cli\n"
        "sys.exit(any([cli.main(words, standalone_mode=False) for words in json.loads(sys.argv[1])]))"
    )
    files = ["--x", tmp_path / "x.npy", "--w", tmp_path / "w.npy", "-o", tmp_path / "y.npy"]
    place = folder / "dynamic"
    lines = [list(map(str, words)) for words in (["run", place, *files], ["verify", place], ["inspect", place])]
    command = [sys.executable, "-c", program, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "y.npy").shape == (3, 2, 3, 3, 3)


def test_run_knows_bfloat16_files(tmp_path: Path) -> None:
    import ml_dtypes

    layer = "in=1x2x2x2x2 co=2 k=1 bias=0 dtype=bfloat16"
    assert invoke("compile", layer, "-o", tmp_path / "a", "--plan", "baseline", "--no-verify").exit_code == 0
    np.save(tmp_path / "x.npy", np.ones((1, 2, 2, 2, 2), ml_dtypes.bfloat16))
    np.save(tmp_path / "w.npy", np.ones((2, 2, 1, 1, 1), ml_dtypes.bfloat16))
    files = ["--x", tmp_path / "x.npy", "--w", tmp_path / "w.npy", "-o", tmp_path / "y.npy"]
    assert invoke("run", tmp_path / "a", *files).exit_code == 0
    assert (np.load(tmp_path / "y.npy").view(ml_dtypes.bfloat16) == 2).all()


def test_export_writes_what_onnx_accepts(tmp_path: Path) -> None:
    path = tmp_path / "f.onnx"
    content = of_json(
        invoke("export", MODELS / "unet.onnx", "--node", "node_convolution", "-o", path, "--opset", "17", "--json")
    )
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == content["opset"] == 17
    assert [tensor.name for tensor in model.graph.initializer] == ["W", "B"]


def test_inspect_a_layer_tells_phases_work_and_why() -> None:
    args = ("inspect", "in=1x4x3x4x5 co=6 k=3x2x1 s=2 p=1x0x0 op=1x0x0", "--plan", "baseline")
    layer = of_json(invoke(*args, "--json"))["layers"]["layer"]
    assert layer["axes"]["D"]["phases"] == [
        {"phase": 0, "taps": [1], "reads": [0]},
        {"phase": 1, "taps": [0, 2], "reads": [1, 0]},
    ]
    assert layer["axes"]["W"]["phases"][1]["taps"] == []
    assert layer["flop"] == 2 * 4 * 6 * 6 * 60
    assert layer["bytes"] == 4 * (4 * 60 + 4 * 6 * 6 + 6 + 6 * 6 * 8 * 9)
    assert layer["workspace_bytes"] > 0
    text = invoke(*args).stdout
    for words in ("1: 0,2 @ +1,0", "1: no taps", "FLOP/byte", "baseline, ", *layer["plan"]["why"]):
        assert words in text


@pytest.mark.parametrize("name", ["cuda:sm_90", "metal:apple-m1"])
def test_inspect_a_layer_for_a_gpu(name: str) -> None:
    layer = of_json(invoke("inspect", "L15-segresnet-up1", "--target", name, "--json"))["layers"]["L15-segresnet-up1"]
    assert layer["target"] == name
    assert layer["workspace_bytes"] == 0
    assert any("threads" in line for line in layer["plan"]["why"])


@pytest.mark.parametrize("words", [["--node", "up"], ["--shape", "x=1x4x3x4x5"]])
def test_an_artifact_has_no_nodes_and_no_open_sizes(folder: Path, words: list[str]) -> None:
    result = invoke("inspect", folder, *words)
    assert (result.exit_code, "is not a model file" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("batch", "target"), [(None, "llvm"), (2, "llvm"), (None, "cuda:sm_90"), (2, "metal:apple-m1")]
)
@pytest.mark.parametrize("wrt", ["x", "w", "b"])
def test_inspect_a_derivative_says_what_compiling_it_gives(
    tmp_path: Path, wrt: str, batch: int | None, target: str
) -> None:
    words = [f"in={batch or 'N'}x4x3x4x5 co=6 k=3x2x1 s=2 act=relu", "--derivative", wrt, "--target", target]
    layer = of_json(invoke("inspect", *words, "--json"))["layers"]["layer"]
    assert invoke("compile", *words, "-o", tmp_path / "it", "--no-verify").exit_code == 0
    held = of_json(invoke("inspect", tmp_path / "it", "--json"))["artifacts"]["it"]["manifest"]
    assert {name: layer[name] for name in ("spec", "derivative", "workspace_bytes", "plan")} == {
        name: held[name] for name in ("spec", "derivative", "workspace_bytes", "plan")
    }
    assert layer["target"] == held["target"]["name"]
    shapes = {
        "dy": [batch, 6, 7, 8, 9],
        **{"x": {"w": [4, 6, 3, 2, 1]}, "w": {"x": [batch, 4, 3, 4, 5]}, "b": {}}[wrt],
        "y": [batch, 6, 7, 8, 9],
        f"d{wrt}": {"x": [batch, 4, 3, 4, 5], "w": [4, 6, 3, 2, 1], "b": [6]}[wrt],
    }
    assert {name: layer[name] for name in shapes} == shapes
    assert layer["bytes"] == sum(held["tensor_bytes"].values())
    text = invoke("inspect", *words).stdout
    operands = ", ".join({"dy": "dY"}.get(name, name.upper()) for name in list(shapes)[:-1])
    for said in (f"its derivative d{wrt}", f"{operands} -> d{wrt.upper()}", "FLOP/byte", *layer["plan"]["why"]):
        assert said in text


def test_inspect_lists_the_nodes_that_have_no_such_derivative(tmp_path: Path) -> None:
    dynunet = MODELS / "dynunet.onnx"
    assert set(of_json(invoke("inspect", dynunet, "--derivative", "w", "--json"))["layers"]) == {
        layer.name for layer in read(dynunet).layers
    }
    model = onnx.load(mixed_model(tmp_path))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "bias"))
    model.graph.node[0].input.append("bias")
    onnx.save(model, tmp_path / "mixed.onnx")
    result = invoke("inspect", tmp_path / "mixed.onnx", "--derivative", "b", "--json")
    layers = of_json(result)["layers"]
    assert layers["good"]["db"] == [2]
    assert layers["up/two"]["reason"].startswith("the layer has no bias (bias=0)")
    assert "up/two cannot be compiled: the layer has no bias" in result.stderr
    for nodes in (["--node", "up/two"], ["--node", "up/two", "--node", "dynamic"]):
        result = invoke("inspect", tmp_path / "mixed.onnx", "--derivative", "b", *nodes)
        assert (result.exit_code, "the layer has no bias (bias=0)" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    "words", [["--target", "nonsense"], ["--target", "llvm"], ["--plan", "best"], ["--derivative", "x"]]
)
def test_an_artifact_was_compiled_for_its_target_by_its_plan(folder: Path, words: list[str]) -> None:
    for place in (folder / "layer", folder / "model"):
        result = invoke("inspect", place, *words)
        assert (result.exit_code, result.stdout) == (2, "")
        said = f"{words[0]} was given, but {place} is a directory of what was compiled; leave it out, or name a model"
        assert said in result.stderr


def test_what_replace_wrote_is_no_artifact(tmp_path: Path) -> None:
    place = tmp_path / "replaced"
    words = ["--no-verify", "--no-bench"]
    assert invoke("replace", saved(upsampling(), tmp_path), "-o", place, *words).exit_code == 0
    for command, given in (("inspect", []), ("verify", []), ("run", ["--x", "x.npy", "-o", "y.npy"])):
        result = invoke(command, place, *given)
        assert (result.exit_code, result.stdout) == (2, ""), command
        assert "replace wrote" in result.stderr
        assert "report.json" in result.stderr


def test_inspect_an_artifact_tells_what_was_changed(folder: Path, tmp_path: Path) -> None:
    content = of_json(invoke("inspect", folder / "model", "--json"))
    assert content["whole"]
    held = content["artifacts"]
    assert list(held) == ["node_convolution", "node_convolution_1", "node_convolution_2"]
    assert all(contents["whole"] and contents["report"]["passed"] for contents in held.values())
    place = tmp_path / "a"
    assert invoke("compile", LAYER, "-o", place, "--plan", "baseline", "--no-verify").exit_code == 0
    (place / "conv_transpose3d.h").write_text("/* mine */")
    (place / "model.onnx").unlink()
    result = invoke("inspect", place)
    assert result.exit_code == 2
    assert not json.loads(invoke("inspect", place, "--json").stdout)["whole"]
    assert [line.split()[-1] for line in result.stdout.splitlines() if ".h " in line or ".onnx" in line] == [
        "changed",
        "missing",
    ]


def test_cases_are_the_table() -> None:
    content = of_json(invoke("cases", "--tag", "real", "--tag", "depthwise", "--json"))
    assert [case["name"] for case in content["cases"]] == ["L34-mednext-up0", "L35-mednext-up3"]
    assert "L34-mednext-up0" in invoke("cases", "--tag", "depthwise").stdout


def test_tune_writes_a_record_that_best_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opcompile.record import key

    monkeypatch.setenv("OPCOMPILE_RECORDS", str(tmp_path / "records"))
    args = ("tune", LAYER, "--trials", "1", "--work-dir", tmp_path / "work", "--json")
    (record,) = of_json(invoke(*args))["records"]
    assert record["spec"] == str(ConvTranspose3d.parse(LAYER))
    assert Path(record["path"]).is_relative_to(tmp_path / "records")
    assert [path.name for path in (tmp_path / "work").iterdir()] == [key(record["spec"])]
    layer = of_json(invoke("inspect", LAYER, "--json"))["layers"]["layer"]
    assert layer["plan"]["name"] == "tuned"


def test_what_was_tuned_of_a_model_is_what_replace_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer with the BatchNormalization and the activation behind it has another text, and so another record."""
    monkeypatch.setenv("OPCOMPILE_RECORDS", str(tmp_path / "records"))
    statistics = dict.fromkeys(("scale", "shift", "mean", "variance"), np.ones(6, np.float32))
    after = [
        helper.make_node("BatchNormalization", ["up", *statistics], ["n"]),
        helper.make_node("LeakyRelu", ["n"], ["y"]),
    ]
    model = saved(upsampling(bias=False, after=after, constants=statistics), tmp_path)
    args = ("tune", model, "--trials", "1", "--work-dir", tmp_path / "work", "--json")
    assert [" ".join(r["spec"].split()[-4:-2]) for r in of_json(invoke(*args))["records"]] == [
        "bias=0 act=none",
        "bias=1 act=leaky_relu",
    ]
    args = ("replace", model, "--plan", "tuned", "--no-bench", "--no-verify", "-o")
    (node,) = of_json(invoke(*args, tmp_path / "rewritten", "--json"))["nodes"]
    assert (node["status"], node["fused"], node["reason"]) == ("replaced", ["BatchNormalization", "LeakyRelu"], None)
    content = of_json(invoke(*args, tmp_path / "override", "--mode", "override", "--json"))
    assert [kernel["plan"].split(",")[0] for kernel in content["kernels"]] == ["tuned"]


def test_a_model_that_replace_refuses_is_tuned_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPCOMPILE_RECORDS", str(tmp_path / "records"))
    after = [helper.make_node("Add", ["up", "other"], ["y"])]
    model = upsampling(after=after, constants={"other": np.ones((6, 1, 1, 1), np.float32)})
    (tensor,) = (each for each in model.graph.initializer if each.name == "other")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="missing.bin")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    result = invoke("tune", tmp_path / "model.onnx", "--trials", "1", "--work-dir", tmp_path / "work", "--json")
    assert [record["spec"].split()[0] for record in of_json(result)["records"]] == ["in=1x4x3x4x5"]
    assert (
        f"only what `compile` compiles is tuned, as `replace` refuses this model: {tmp_path}/missing.bin"
        in result.stderr
    )


def test_bench_prints_and_saves(tmp_path: Path) -> None:
    args = ("bench", LAYER, "--plan", "baseline", "--seconds", "0.01", "--save", tmp_path / "f.json")
    result = invoke(*args, "--at-least", "0.0001")
    assert result.exit_code == 0
    assert "times as fast as onnxruntime" in result.stdout
    saved = json.loads((tmp_path / "f.json").read_text())["layers"]["layer"]
    assert [timing["engine"] for timing in saved["timings"]] == ["opcompile", "onnxruntime"]


def test_bench_takes_several_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed: list[ConvTranspose3d] = []

    def noted(spec: ConvTranspose3d, **_: Any) -> Any:
        timed.append(spec)
        return bench_report({"opcompile": [1.0] * 20, "onnxruntime": [2.0] * 20})

    monkeypatch.setattr("opcompile.bench.bench", noted)
    other = "in=1x1x1x1x1 co=1 k=1"
    args = ("bench", LAYER, other, "plain", MODELS / "unet.onnx", "--tag", "depthwise", "--save", tmp_path / "f.json")
    result = invoke(*args)
    assert result.exit_code == 0
    names = list(json.loads((tmp_path / "f.json").read_text())["layers"])
    assert names[:3] == [brief(ConvTranspose3d.parse(LAYER)), other, "plain"]
    assert len(names) == len(timed) == 5 + len(tagged("depthwise"))
    assert f"geometric mean of {len(names)}; faster {len(names)}" in result.stdout
    assert all(f"{name} ─" in result.stdout for name in names)
    assert invoke("bench", LAYER, "plain", "--markdown").stdout.startswith("| layer | time |")


def test_a_long_benchmark_that_ends_early_leaves_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(spec: ConvTranspose3d, **_: Any) -> Any:
        if spec.channels_in == 1:
            raise VerificationError("it is wrong")
        return bench_report({"opcompile": [1.0] * 20})

    monkeypatch.setattr("opcompile.bench.bench", wrong)
    result = invoke("bench", "plain", "in=1x1x1x1x1 co=1 k=1", "--save", tmp_path / "f.json")
    assert result.exit_code == 1
    assert list(json.loads((tmp_path / "f.json").read_text())["layers"]) == ["plain"]


@pytest.mark.parametrize("option", ["--save", "--plot"])
def test_a_file_that_may_not_be_written_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr("opcompile.bench.bench", lambda *_, **__: pytest.fail("it was timed"))
    result = invoke("bench", LAYER, option, tmp_path / "f.svg")
    assert result.exit_code == 2
    assert f"cannot write {tmp_path / 'f.svg'}: that is not permitted" in result.stderr


def test_a_disk_that_fills_takes_no_earlier_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("opcompile.bench.bench", lambda *_, **__: bench_report({"opcompile": [1.0] * 20}))
    kept = tmp_path / "bench.json"
    kept.write_text("before")
    monkeypatch.setattr("os.fsync", full)
    result = invoke("bench", LAYER, "--save", kept)
    assert result.exit_code == 2
    assert f"{kept} cannot be written: No space left on device" in result.stderr
    assert [kept.read_text(), list(tmp_path.iterdir())] == ["before", [kept]]


@pytest.mark.parametrize(("ratio", "asked", "code"), [(1.9, 1.5, 0), (1.9, 2.5, 1), (1.9, None, 0)])
def test_slower_than_asked_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, ratio: float, asked: float | None, code: int
) -> None:
    report = bench_report({"opcompile": [1.0] * 20, "onnxruntime": [ratio] * 20})
    monkeypatch.setattr("opcompile.bench.bench", lambda *_, **__: report)
    assert invoke("bench", LAYER, *(["--at-least", asked] if asked else [])).exit_code == code


def test_as_fast_as_asked_is_nothing_that_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opcompile.bench.bench", lambda *_, **__: bench_report({"opcompile": [1.0] * 20}))
    result = invoke("bench", LAYER, "--at-least", "2")
    assert result.exit_code == 3
    assert "no engine was timed beside layer" in result.stderr
    assert invoke("bench", LAYER).exit_code == 0


def test_doctor_says_what_is_wrong_with_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPCOMPILE_RECORDS", __file__)
    monkeypatch.setattr("opcompile.doctor._small_layer", lambda: Finding("a small layer", "ok", ""))
    result = invoke("doctor", "--json")
    assert result.exit_code == 3
    found = {each["what"]: each for each in json.loads(result.stdout)["findings"]}
    assert found["tuned records"]["state"] == "unusable"
    assert "which is a file" in found["tuned records"]["found"]


def test_doctor_reads_records_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the compiler then, and no record that only the compiler could refuse."""
    monkeypatch.setenv("OPCOMPILE_RECORDS", str(tmp_path))
    spec = ConvTranspose3d.parse("in=1x4x3x4x5 co=24 k=2 s=2")
    place = write_record(changed(made(spec), declaration="0" * 16), tmp_path, spec, target("llvm:x86-64-v3"))
    place.with_name("cut.json").write_text("{")
    program = (
        "import json, sys\nsys.modules['tvm'] = None\nfrom opcompile.doctor import doctor\n"
        "print(*(f'{f.state}: {f.found}' for f in doctor(build=False) if f.what.startswith('tuned record')), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    bad, counted = done.stdout.splitlines()
    assert bad.startswith(f"unusable: record {tmp_path}/llvm-x86-64-v3/cut.json cannot be used: it is not JSON")
    assert counted.startswith(f"ok: 1 of your own in {tmp_path}, ")


def test_doctor_names_the_records_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes every compilation of its layer fail; a sound one beside them, and those that are shipped, are fine."""
    monkeypatch.setenv("OPCOMPILE_RECORDS", str(tmp_path))
    sound, cut, other = (made(ConvTranspose3d.parse(f"in=1x4x3x4x{w} co=24 k=2 s=2")) for w in (5, 6, 7))
    for each in (sound, cut, other):
        write_record(each, tmp_path, ConvTranspose3d.parse(each.spec), target(each.target))
    folder = tmp_path / "llvm-x86-64-v3"
    monkeypatch.setattr("opcompile.doctor._small_layer", lambda: Finding("a small layer", "ok", ""))
    assert of_json(invoke("doctor", "--json"))["healthy"]
    (folder / f"{cut.key}.json").write_text("{")
    write_record(
        changed(other, declaration="0" * 16), tmp_path, ConvTranspose3d.parse(other.spec), target(other.target)
    )
    shutil.copy(folder / f"{sound.key}.json", folder / "copy.json")
    result = invoke("doctor", "--json")
    assert result.exit_code == 3
    content = json.loads(result.stdout)
    assert not content["healthy"]
    said = [f["found"] for f in content["findings"] if f["what"] == "tuned record" and f["state"] == "unusable"]
    assert len(said) == 3
    for name, words in (
        (cut.key, "it is not JSON: .*; delete the file, or tune the layer again$"),
        (other.key, "declaration 0{16}, but this version declares .*; tune the layer again"),
        (
            "copy",
            f"nothing looks for it there: .* is {re.escape(str(folder))}/{sound.key}.json; move it there, or delete",
        ),
    ):
        assert any(f"{folder}/{name}.json" in line and re.search(words, line) for line in said), words
    (rest,) = [f for f in content["findings"] if f["what"] == "tuned records"]
    assert (rest["state"], rest["found"].split(" in ")[0]) == ("ok", "1 of your own")
    assert re.search(r"^unusable  tuned record +record ", invoke("doctor").stdout, re.M)


def test_doctor_finds_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    content = of_json(invoke("doctor", "--json"))
    assert content["healthy"]
    findings = {f["what"]: f for f in content["findings"]}
    assert findings["a small layer"]["state"] == "ok"
    assert findings["target llvm"]["found"].startswith("llvm:")
    monkeypatch.setattr("opcompile.doctor._REQUIRED", {"no-such-package": ("nothing", "pip install it")})
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("opcompile.doctor._small_layer", lambda: Finding("a small layer", "ok", ""))
    result = invoke("doctor")
    assert result.exit_code == 3
    assert "missing  linker" in result.stdout
    assert "missing  no-such-package" in result.stdout
    assert "-> pip install it" in result.stdout
    assert "install a C compiler" in result.stdout


# --- what stands behind ---


@pytest.mark.parametrize("spec", [case.spec for case in opcompile.CASES], ids=brief)
def test_the_brief_text_reads_back(spec: ConvTranspose3d) -> None:
    assert ConvTranspose3d.parse(brief(spec)) == spec
    assert len(brief(spec)) < len(str(spec))


def test_directory_names_are_safe_and_unique() -> None:
    nodes = [
        "/up/0/ConvTranspose",
        "up_0_ConvTranspose",
        "UP_0_convtranspose",
        "..",
        "",
        "index.json",
        "ä" * 9,
        "x" * 500,
    ]
    names = directory_names(nodes)
    assert names[:5] == ["up_0_ConvTranspose", "up_0_ConvTranspose_2", "UP_0_convtranspose_3", "node", "node_2"]
    assert names[5] == "index.json_2"
    assert len({name.lower() for name in names}) == len(nodes)
    assert all(len(name) <= 90 and "/" not in name for name in names)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other", "version": 1, "layers": []}'])
def test_a_corrupt_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    result = invoke("verify", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.count(INDEX) == 1


@pytest.mark.parametrize("directory", ["../elsewhere", "..", "a\0b", 3, ["a"], {"a": 1}])
@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_an_index_reaches_no_further_than_its_directory(command: str, directory: object, tmp_path: Path) -> None:
    write_index(tmp_path, {}, [{"name": "a", "directory": directory, "fingerprint": ""}])
    result = invoke(command, tmp_path)
    assert result.exit_code == 2
    assert f"lists {directory!r}, which is not a directory beside it" in result.stderr


@pytest.mark.parametrize("words", [("compile", "in=1x1x1x1x1 co=1 k=1", "-o", ""), ("verify", "")])
def test_an_empty_path_is_not_the_current_directory(words: tuple[str, ...]) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert "is empty, but must name a path; the current directory is '.'" in result.stderr


def test_a_file_wins_over_a_text_and_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("plain").kind == "case"
    for name in ("plain", "lr=0.1"):
        (tmp_path / name).write_bytes((MODELS / "unet.onnx").read_bytes())
        assert read(name).kind == "model"
