"""This machine in words, for everything that carries numbers away from it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from opcompile.errors import EngineError

Result = TypeVar("Result")


@lru_cache(maxsize=1)
def processor() -> str:
    """Name the processor as its maker does, or the architecture where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        if told:
            return told
    return platform.processor() or platform.machine()


def command_in(variable: str) -> list[str]:
    """Return the words of the command that an environment variable holds, none where it is empty.

    Raises `EngineError` for what a shell could not read.
    """
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise EngineError(f"{variable} is {text!r}, which is no command: {error}; quote it as in a shell") from None


def system() -> str:
    """Name the architecture, the operating system and Python: ``x86_64 Linux, Python 3.12.4``."""
    return f"{platform.machine()} {platform.system()}, Python {platform.python_version()}"


def beside_others(processors: Collection[int], work: Callable[[], Result]) -> tuple[Result, float]:
    """Do ``work`` on ``processors``; return its result, and the share of their time that was not this process's.

    Between 0 and 1; idle time is nobody's. Always 0 where there is no ``/proc/stat``: on any system but Linux.
    """
    busy_s, own_s, began = _busy_s(processors), time.process_time(), time.perf_counter()
    result = work()
    others_s = _busy_s(processors) - busy_s - (time.process_time() - own_s)
    whole_s = max(1, len(processors)) * (time.perf_counter() - began)
    return result, min(max(others_s / whole_s, 0.0), 1.0) if whole_s else 0.0


_STAT = Path("/proc/stat")


def _busy_s(processors: Collection[int]) -> float:
    """Seconds that ``processors`` have worked since they were started, or that another machine had of them."""
    if not _STAT.exists():
        return 0.0
    lines = [line.split() for line in _STAT.read_text().splitlines()]
    counts = {words[0]: [int(n) for n in words[1:9]] for words in lines if words and words[0].startswith("cpu")}
    found = [counts[f"cpu{number}"] for number in processors if f"cpu{number}" in counts]
    # user, nice, system, idle, iowait, irq, softirq, steal: all but the two that wait
    return sum(sum(c) - sum(c[3:5]) for c in found) / os.sysconf("SC_CLK_TCK")
