"""What commands print, and how: the result on stdout, messages and progress on stderr."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

# The width of a table that goes into a file or a pipe, unless COLUMNS says otherwise.
_PIPED_WIDTH = 160


class Gone(Exception):
    """Whoever read the output has gone."""


def tell(message: str) -> None:
    """Say on stderr what goes beside the result; where it takes nothing, the result and its exit code stand."""
    with suppress(OSError):
        click.echo(message, err=True)


def print_result(as_json: bool, content: Any, renderables: Callable[[], Iterable[RenderableType]]) -> None:
    """Print JSON, or what a person reads."""
    if as_json:
        click.echo(json.dumps(content, indent=1, allow_nan=False))
        return
    from rich.text import Text

    console = _console()
    for renderable in renderables():
        # the terminal wraps a text, so that a path in it stays in one piece
        console.print(renderable, soft_wrap=isinstance(renderable, (str, Text)))


def _console() -> Console:
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            # rich would end with 1, which here means a wrong result
            raise Gone

    # of rich's own widths one is 0, where COLUMNS is, and nothing would be printed
    width = shutil.get_terminal_size((_PIPED_WIDTH, 0)).columns
    return Piped(width=width, highlight=False, emoji=False, file=sys.stdout)


@contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """Show how far long work is: a bar on a terminal, otherwise a line for each thing that begins.

    The function takes (done, total, what begins or None, a detail that only the bar shows).
    """
    if not sys.stderr.isatty():
        yield lambda _done, _total, name, _detail="": tell(name) if name else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    name_column, detail_column = (
        TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[detail]")
    )
    columns = (name_column, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), detail_column)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, detail="")

        def show(done: int, total: int, name: str | None, detail: str = "") -> None:
            bar.update(task, completed=done, total=total, description=name or bar.tasks[0].description, detail=detail)

        yield show


def plain(text: str) -> RenderableType:
    """A text without markup: what stands in brackets is no style."""
    from rich.text import Text

    return Text(text)


def title(text: str) -> RenderableType:
    """A line with a text, above what is of one layer."""
    from rich.rule import Rule
    from rich.text import Text

    return Rule(Text(text), align="left")


def new_table(*headings: str, right: Sequence[str] = ()) -> Table:
    """A table with these headings and no rows yet; columns of numbers are flush ``right``."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading in right else "left")
    return table
