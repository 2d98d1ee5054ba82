"""What is written is true: pages in step with the code, examples that run, commands and links that exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import onnx
import pytest
import targets_page
from cli_page import PAGE, page
from onnx_engine import value
from replaced import upsampling

import opcompile
from opcompile import cli as opcompile_cli
from opcompile.artifact import write
from opcompile.cli import cli
from opcompile.errors import OpcompileError
from opcompile.lower import lower
from opcompile.spec import ACTIVATIONS, ConvTranspose3d
from opcompile.target import flagged, names, target

pytestmark = pytest.mark.usefixtures("as_scheduled")

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Their Python is run as it stands. Tuning takes minutes: its own tests run it.
RUNNING = ["README.md", "docs/index.md", "docs/artifact.md", "docs/gradients.md", "docs/numerics.md", "docs/words.md"]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fenced(text: str, language: str) -> list[str]:
    """The fenced blocks of one language; "" for those that name none."""
    return [code for found, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if found == language]


# --- the command line ---


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_rows_of_a_table_have_one_number_of_columns(page: Path) -> None:
    """A bar ends a column unless it is escaped, in code, too."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_the_page_of_the_command_line_is_in_step() -> None:
    assert page() == PAGE.read_text(), "run: python tests/cli_page.py"


def test_the_page_names_every_variable_that_chooses_a_program() -> None:
    sources = [path.read_text() for path in (ROOT / "opcompile").rglob("*.py")]
    used = {
        name for text in sources for name in re.findall(r"(?:environ\[|environ\.get\(|command_in\()\"(\w+)\"", text)
    }
    assert {"CC", "CXX", "NVCC"} <= used
    missing = {name for name in used if f"`{name}`" not in PAGE.read_text()}
    assert missing <= {"CUDA_HOME", "CUDA_PATH", "KERAS_HOME", "TVM_NUM_THREADS", "XDG_CACHE_HOME", "XDG_DATA_HOME"}


def command_lines(text: str) -> Iterator[list[str]]:
    """Every ``opcompile ...`` in a block or between backquotes, as words."""
    lines = [line for block in fenced(text, "") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    for line in lines:
        words = shlex.split(line, comments=True) if line.startswith("opcompile ") else []
        if len(words) > 1:
            yield words[1:]


@pytest.mark.parametrize("path", [p for p in PAGES if p != PAGE], ids=named)
def test_every_command_and_option_that_is_named_exists(path: Path) -> None:
    for name, *words in command_lines(path.read_text()):
        if name.startswith("-"):
            assert any(name in parameter.opts for parameter in cli.get_params(click.Context(cli)))
            continue
        assert name in cli.commands, f"{path.name}: opcompile {name}"
        known = {option for parameter in cli.commands[name].params for option in parameter.opts}
        assert {w for w in words if re.fullmatch(r"--?[a-z][a-z-]*", w)} <= known, f"{path.name}: opcompile {name}"


def test_the_readme_shows_a_command_line() -> None:
    assert {name for name, *_ in command_lines((ROOT / "README.md").read_text())} >= {
        "compile",
        "verify",
        "run",
        "bench",
    }


# --- Python ---


@pytest.mark.parametrize("name", RUNNING)
def test_the_python_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "tests" / "models" / "unet.onnx", "model.onnx")
    blocks = fenced((ROOT / name).read_text(), "python")
    assert blocks
    for number, code in enumerate(blocks):
        exec(compile(code, f"{name}, example {number}", "exec"), {"__name__": "example"})  # noqa: S102 (our own page)
    if name == "README.md":
        assert (tmp_path / "decoder" / "manifest.json").exists()


def test_the_python_examples_have_the_right_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    for name in RUNNING:
        for number, code in enumerate(fenced((ROOT / name).read_text(), "python")):
            (tmp_path / f"{Path(name).stem}_{number}.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *sorted(tmp_path.glob("*.py"))],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_session_of_onnx_runtime_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    opcompile.replace(shutil.copy(ROOT / "tests" / "models" / "unet.onnx", "."), "out", verify=False, measure=False)
    code, *_ = fenced((ROOT / "docs" / "onnxruntime.md").read_text(), "python")
    exec(code, {"__name__": "example"})  # noqa: S102 (our own page)


def test_the_pass_for_tvm_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = upsampling()
    model.graph.output[0].CopyFrom(value("y", (1, 6, 6, 8, 10)))
    onnx.save(model, "unet.onnx")
    *_, code = fenced((ROOT / "docs" / "onnxruntime.md").read_text(), "python")
    exec(code, {"__name__": "example"})  # noqa: S102 (our own page)
    assert (tmp_path / "unet.so").exists()


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_every_python_example_is_python(path: Path) -> None:
    for code in fenced(path.read_text(), "python"):
        compile(code, path.name, "exec")


# --- facts ---


def test_every_target_is_on_the_page_and_no_other() -> None:
    table = "\n".join(line for line in (ROOT / "docs" / "targets.md").read_text().splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(llvm[^`]*)`", table)) == {*names(), *flagged()}


def test_the_tables_of_the_page_are_those_of_the_code() -> None:
    """After a change, ``python tests/targets_page.py`` writes them anew."""
    assert targets_page.PAGE.read_text() == targets_page.page()


def test_every_file_and_field_of_an_artifact_is_on_its_page(tmp_path: Path) -> None:
    spec = ConvTranspose3d.parse("in=1x1x1x1x1 co=1 k=1")
    write(lower(spec, target("llvm"), "baseline"), tmp_path / "a")
    manifest = opcompile.load(tmp_path / "a").manifest
    text = (ROOT / "docs" / "artifact.md").read_text()
    words = set(re.findall(r"`([^`\n]+)`", text))
    assert set(manifest) <= words
    assert {name for name in manifest["files"] if name != manifest["library"]} <= words


def test_every_error_has_an_exit_code_of_the_page() -> None:
    kinds = [OpcompileError, *OpcompileError.__subclasses__()]
    assert {kind.exit_code for kind in kinds} == {1, 2, 3}
    assert re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.M) == ["0", "1", "2", "3", "70", "130", "141"]
    assert re.findall(r"^(\d+) {3}", opcompile_cli.__doc__ or "", re.M) == ["0", "1", "2", "3", "70", "130", "141"]


def test_the_number_of_activations_is_right() -> None:
    for name in ("README.md", "docs/changelog.md"):
        (number,) = re.findall(r"(\d+) (?:fused )?activations", (ROOT / name).read_text())
        assert int(number) == len(ACTIVATIONS) - 1


def test_the_changelog_begins_with_this_version() -> None:
    assert re.findall(r"^## (.+)$", (ROOT / "docs" / "changelog.md").read_text(), re.M)[0] == opcompile.__version__


def test_every_variable_that_is_read_is_on_the_page() -> None:
    sources = "\n".join(
        path.read_text() for path in sorted((ROOT / "opcompile").rglob("*.[cp]*")) if path.suffix != ".pyc"
    )
    assert set(re.findall(r"OPCOMPILE_[A-Z_]+", sources)) & set(re.findall(r"`([A-Z_]+)`", PAGE.read_text())) == {
        "OPCOMPILE_NUM_THREADS",
        "OPCOMPILE_RECORDS",
        "OPCOMPILE_DEBUG",
    }
    read = set(re.findall(r"""(?:environ\.get\(|environ\[|getenv\(|VARIABLE = )"(OPCOMPILE_\w+)""", sources))
    assert read <= set(re.findall(r"`([A-Z_]+)`", PAGE.read_text()))


# --- links ---


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("http"):
            continue
        place, _, anchor = link.partition("#")
        goal = (path.parent / place).resolve() if place else path
        assert goal.is_file(), f"{path.name}: {link}"
        headings = re.findall(r"^#+ (.+)$", goal.read_text(), re.M)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, f"{path.name}: {link}"


def test_the_readme_leads_to_every_page() -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in PAGES if path.parent.name == "docs"}
    text = (ROOT / "README.md").read_text()
    assert {f"docs/{name}" for name in re.findall(r"\(docs/([a-z]+\.md)\)", text)} == pages


def test_the_index_of_decisions_is_complete() -> None:
    folder = ROOT / "docs" / "decisions"
    text = (folder / "index.md").read_text()
    for path in sorted(folder.glob("0*.md")):
        title = path.read_text().splitlines()[0].lstrip("# ")
        number, words = title.split(". ", 1)
        assert f"{number}. [{words}]({path.name})" in text
        assert len(path.read_text().split()) < 500, f"{path.name} is longer than a page"


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md"])
def test_every_test_that_is_named_exists(name: str) -> None:
    found = re.findall(r"`(tests/[\w.]+)`", (ROOT / name).read_text())
    assert found
    for path in found:
        assert (ROOT / path).is_file(), path


def test_the_makefile_has_what_the_readme_promises() -> None:
    made = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    pages = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/architecture.md"))
    for words in re.findall(r"^make ([a-z -]+?)(?:  |$)|`make ([a-z -]+)`", pages, re.M):
        assert set("".join(words).split()) <= made
