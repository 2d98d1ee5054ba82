"""The measuring process: `main` reads one job, measures it, answers, ends; `opcompile.tune` starts it.

A job and its answer are JSON on the standard streams. The process measures one library, or several
in turns: a sample of each, then the next sample of each, so that a busy machine is busy for all. It
needs TVM's runtime alone, here or on a server of an RPC tracker, and ends itself at its time limit,
whoever started it being gone or not.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from opcompile.farm import in_session
from opcompile.trials import answer, failed

KERNEL = "conv_transpose3d"


def main() -> None:
    """Answer the job on standard input."""
    answer(lambda job: _here(job) if job["tracker"] is None else _remotely(job))


def _here(job: dict[str, Any]) -> dict[str, Any]:
    import tvm

    try:
        libraries = [tvm.runtime.load_module(path) for path in job["libraries"]]
        return {"times_us": _in_turns(job, libraries, tvm.cpu()), "device": None}
    except Exception as error:  # noqa: BLE001 (whatever it is, it is the candidate's result)
        return failed("candidate", error)


def _remotely(job: dict[str, Any]) -> dict[str, Any]:
    def answered(session: Any) -> dict[str, Any]:
        session.get_function("runtime.config_threadpool")(1, job["threads"])
        device = _remote_device(session)
        libraries = [_uploaded(session, path, i) for i, path in enumerate(job["libraries"])]
        return {"times_us": _in_turns(job, libraries, session.cpu()), "device": device}

    return in_session(job, answered)


def _uploaded(session: Any, path: str, number: int) -> Any:
    name = f"{number}{Path(path).suffix}"
    session.upload(path, name)
    return session.load_module(name)


def _remote_device(session: Any) -> str:
    """Ask a server for its processor, which one that has TVM's runtime alone cannot name."""
    try:
        return str(session.get_function("target.llvm_get_system_cpu")())
    except AttributeError:
        return "a processor that its server cannot name"


def _in_turns(job: dict[str, Any], libraries: list[Any], device: Any) -> list[list[float]]:
    """Take samples of each library in microseconds, each the mean over calls that fill ``sample_ms``."""
    tensors: dict[str, Any] = {}
    timed = []
    for library, arguments in zip(libraries, job["arguments"], strict=True):
        for argument in arguments:
            if (name := json.dumps(argument)) not in tensors:
                tensors[name] = _tensor(argument, device)
        given = [tensors[json.dumps(argument)] for argument in arguments]
        # the first call, and the calls that find out how many fill a sample, are the warm-up
        warm_up = library.time_evaluator(KERNEL, device, number=1, repeat=1, min_repeat_ms=job["sample_ms"])
        calls = max(1, math.ceil(job["sample_ms"] / 1e3 / warm_up(*given).mean))
        timed.append((library.time_evaluator(KERNEL, device, number=calls, repeat=1), given))
    times: list[list[float]] = [[] for _ in libraries]
    for _ in range(job["samples"]):
        for of_library, (evaluator, given) in zip(times, timed, strict=True):
            of_library.append(round(evaluator(*given).mean * 1e6, 4))
    return times


def _tensor(argument: list[Any], device: Any) -> Any:
    """Make a tensor for ``[name, dtype, shape]``, of small numbers around zero: their sums stay ordinary numbers."""
    import numpy as np
    import tvm

    _, dtype, shape = argument
    values = np.random.default_rng(0).random(shape, dtype=np.float32) - np.float32(0.5)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)
    return tvm.runtime.empty(tuple(shape), dtype, device).copyfrom(stored)
