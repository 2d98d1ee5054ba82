"""Write ``docs/cli.md`` from the registry of commands: ``python tests/cli_page.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from opcompile.cli import cli

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"

_HEAD = """\
<!-- written by tests/cli_page.py; change the commands, not this page -->
# Command line

`opcompile` or `python -m opcompile`. Results go to stdout, with `--json` as JSON and nothing else; messages and
progress go to stderr.

`SOURCE` is one of

- an ONNX file: all its 5-D ConvTranspose nodes, or those that `--node` names; `--shape` gives the sizes that the file
  leaves open;
- a `torch.export` program (`.pt2`) or a Keras model (`.keras`), in the sizes that it has, where PyTorch or Keras is
  installed;
- a layer as text, like `"in=1x64x12x16x32 co=64 k=3 s=2 p=1 op=1"` ([the fields](index.md#a-layer));
- the name of a case, of `opcompile cases`.

| Exit code | Meaning |
|---|---|
| 0 | fine |
| 1 | verification failed, or slower than asked |
| 2 | bad input: the message names what was given, the rule, and the way out |
| 3 | a target, package or program that is needed is not available |
| 70 | a mistake of ours; `OPCOMPILE_DEBUG=1` shows where |
| 130 | interrupted (143: by SIGTERM) |
| 141 | whoever read the output has gone |

| Variable | Meaning |
|---|---|
| `OPCOMPILE_NUM_THREADS` | the most threads that a call uses, where it does not say itself |
| `OPCOMPILE_RECORDS` | where your own tuned records are ([tuning](tuning.md#records)) |
| `OPCOMPILE_DEBUG` | show the traceback of a mistake of ours |
| `CC` | the C compiler that links for this machine |
| `CXX` | the C++ compiler that compiles GPU code for its simulation |
| `NVCC` | the compiler for CUDA ([where it is looked for](gpus.md#cuda)) |
| `COLUMNS`, `NO_COLOR` | width and colour of tables; into a file or a pipe they are 160 columns wide |
"""


def page() -> str:
    """Return the page: a section for each command, as its `--help` says it."""
    return "\n".join([_HEAD, *(line for name in sorted(cli.commands) for line in _section(name))])


def _section(name: str) -> Iterator[str]:
    command = cli.commands[name]
    context = click.Context(command, info_name=name, parent=click.Context(cli, info_name="opcompile"))
    yield f"## {name}\n"
    yield "```"
    yield f"opcompile {name} {' '.join(command.collect_usage_pieces(context))}"
    yield "```\n"
    paragraphs = (command.help or "").split("\n\n")
    yield "\n\n".join(" ".join(line.strip() for line in text.strip().splitlines()) for text in paragraphs)
    yield "\n| Option | Meaning |\n|---|---|"
    yield from (_row(option) for option in command.params if isinstance(option, click.Option))
    yield ""


def _row(option: click.Option) -> str:
    """Return one line of the table; put together here, for the wording of click's own differs between versions."""
    choices = "|".join(option.type.choices) if isinstance(option.type, click.Choice) else ""
    words = " ".join([", ".join(option.opts), *filter(None, [option.metavar or choices])]).replace("|", "\\|")
    notes = ["required"] if option.required else []
    if option.show_default and option.default is not None:
        notes.append(f"default: {option.default}")
    return f"| `{words}` | {option.help} {'(' + ', '.join(notes) + ')' if notes else ''}".rstrip() + " |"


if __name__ == "__main__":
    PAGE.write_text(page())
