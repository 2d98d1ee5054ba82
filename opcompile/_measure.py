"""The measuring process: `main` reads one job, measures it, answers, ends; `opcompile.tune` starts it.

A job and its answer are JSON on the standard streams. The process measures one library, or several
in turns: a sample of each, then the next sample of each, so that a busy machine is busy for all. It
needs TVM's runtime alone, here or on a server of an RPC tracker, and ends itself at its time limit,
whoever started it being gone or not.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from pathlib import Path
from typing import Any

from opcompile.trials import answer, failed

KERNEL = "conv_transpose3d"


def ask_tracker(address: tuple[str, int], message: list[Any], connect_s: float, answer_s: float) -> Any:
    """Send one message to a TVM RPC tracker and return what it answers. Raises OSError, TimeoutError included.

    TVM's own `TrackerSession` waits a minute for the connection, and for the answer without limit.
    """
    from tvm.rpc import base

    with socket.create_connection(address, timeout=connect_s) as connection:
        connection.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
        if struct.unpack("<i", base.recvall(connection, 4))[0] != base.RPC_TRACKER_MAGIC:
            raise OSError("it is not a TVM RPC tracker")
        connection.settimeout(answer_s)
        base.sendjson(connection, message)
        code, value = base.recvjson(connection)
    if code != base.TrackerCode.SUCCESS:
        raise OSError(f"the tracker answered with code {code}")
    return value


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
    from tvm import rpc
    from tvm.rpc import base

    host, port, key = job["tracker"]
    request = [base.TrackerCode.REQUEST, key, "", 1]
    try:
        server_host, server_port, match_key = ask_tracker((host, port), request, job["queue_s"], job["queue_s"])
    except (OSError, ValueError) as error:
        return failed("queue", error)
    session = None
    try:
        session = rpc.connect(server_host, server_port, match_key, session_timeout=job["session_s"])
        session.get_function("runtime.config_threadpool")(1, job["threads"])
        device = _remote_device(session)
        libraries = [_uploaded(session, path, i) for i, path in enumerate(job["libraries"])]
        return {"times_us": _in_turns(job, libraries, session.cpu()), "device": device}
    except Exception as error:  # noqa: BLE001 (the next lines find out whose it is)
        expired = "RPCSessionTimeoutError" in str(error)
        return failed("candidate" if expired or _alive(session) else "connection", error)


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


def _alive(session: Any) -> bool:
    """Whether the server still answers."""
    try:
        session.get_function("runtime.NumThreads")()
    except Exception:  # noqa: BLE001 (a broken connection has many names)
        return False
    return True


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
