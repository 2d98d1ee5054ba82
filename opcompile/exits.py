"""The way out of the command line: every exception has its exit code, and no mistake of the user shows a traceback."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import click

from opcompile import interrupts
from opcompile.errors import OpcompileError
from opcompile.needed import missing
from opcompile.terminal import Gone, tell

BUG, INTERRUPTED, GONE = 70, 130, 141


class Command(click.Command):
    """A command whose first sentence stands whole in the list of commands: the list wraps, click would cut it."""

    def get_short_help_str(self, limit: int = 0) -> str:  # noqa: ARG002 (click's own word)
        """Return the first sentence, however long."""
        return super().get_short_help_str(sys.maxsize)


class CommandGroup(click.Group):
    """A group that turns exceptions into exit codes; commands return theirs, None for 0."""

    command_class = Command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and end the process with its exit code, or return its result outside of standalone mode."""

        def command() -> Any:
            return super(CommandGroup, self).main(args, prog_name, complete_var, standalone_mode=False, **extra)

        if not standalone_mode:
            return command()
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # it was closed when the process began
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a path may be anything
        sys.exit(_exit_code(command))

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Read the words before a command, of which some print and end."""
        with _pipe_named():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with _pipe_named():
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result


@contextmanager
def _pipe_named() -> Iterator[None]:
    """Let a closed pipe keep its own name, for click would end with 1."""
    try:
        yield
    except BrokenPipeError as error:
        raise Gone from error


def _exit_code(command: Callable[[], Any]) -> int:
    """Run ``command``, say what is to be said, and return the exit code."""
    with _interrupts() as seen:
        code, message = _outcome(command, seen)
    if seen:
        # whatever a compiler or a linker made of it
        code, message = 128 + seen[0], "interrupted" if seen[0] == signal.SIGINT else "terminated"
    if message:
        tell(f"opcompile: {message}")
    return code


def _outcome(command: Callable[[], Any], seen: list[int]) -> tuple[int, str]:
    """Run ``command`` and turn what comes out of it into an exit code and a message."""
    try:
        code = command()
        return code if isinstance(code, int) else 0, ""
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        return error.exit_code, ""
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    except OpcompileError as error:
        return error.exit_code, str(error)
    except Gone:
        with suppress(OSError):  # a stdout that is no file
            # Python flushes it once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return GONE, ""
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return 2, f"{where}{error.strerror or error}"
    except MemoryError as error:
        return 3, f"out of memory: {error}"
    except Exception as error:  # the border: what arrives here is a bug, and is called one
        if named := missing(error):
            return named.exit_code, str(named)
        if os.environ.get("OPCOMPILE_DEBUG") and not seen:
            raise
        kind = type(error).__name__
        return BUG, f"{kind}: {error}\nThis is a mistake in opcompile; OPCOMPILE_DEBUG=1 shows where"


# What each signal finds where nobody else waits for it.
_ENDING = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

# Two may be one wish: `timeout` sends its signal to the command and to its group.
_PATIENCE = 2


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Remember Ctrl-C and SIGTERM, and raise `KeyboardInterrupt`, so that nothing temporary stays behind.

    TVM turns that into an error without a name. Who sends a third does not want to wait for that.
    """
    seen = interrupts.seen
    seen.clear()

    def note(number: int, _frame: object) -> None:
        if len(seen) == _PATIENCE:
            os._exit(128 + seen[0])
        interrupts.note(number)

    here = threading.current_thread() is threading.main_thread()
    # a host with a handler of its own, or a shell that runs us in the background, keeps what it has
    ours = {number: before for number, before in _ENDING.items() if here and signal.getsignal(number) is before}
    for number in ours:
        signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, before in ours.items():
            signal.signal(number, before)
