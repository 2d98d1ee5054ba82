"""Serve this machine's GPU under a TVM RPC tracker, for `opcompile tune --tracker`.

``python -m opcompile.serve --tracker HOST:PORT --key K`` starts TVM's own RPC server, which here has one function
more: `measured`. So it needs apache-tvm (a runtime for CUDA is not needed) beside what `opcompile.measure` needs.
Sessions are served one after the other: candidates do not share the GPU. TVM's protocol has no authentication, and lets
a client store files and load code: whoever reaches the port can do all that the user who serves can.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opcompile.cuda_driver import device
from opcompile.errors import EngineError, OpcompileError, TargetError, UnknownTargetError
from opcompile.farm import address, listed
from opcompile.measure import machine_words
from opcompile.trials import apart, failed, last_line

# The name of `measured` at a server.
MEASURE = "opcompile.serve.measured"


def measured(request: str) -> str:
    """Answer ``request``, both being JSON: time the candidates whose files were uploaded before.

    ``archives`` are their names in the session's directory, where TVM keeps uploaded files until the session ends: zip
    files of artifacts, unpacked beside themselves. ``samples`` of each are taken in turns, by a process of its own
    within ``measure_s`` seconds, as `opcompile.measure` does. The answer is that of the process, or whose fault it is
    that there is none, and what the ``device`` and the ``machine`` are.
    """
    job = json.loads(request)
    directories = [str(Path(archive).absolute().with_suffix("")) for archive in job["archives"]]
    try:
        gpu = device()
        for archive, directory in zip(job["archives"], directories, strict=True):
            if Path(archive).name != archive:
                raise TargetError(f"{archive!r} is not the name of an uploaded file")
            shutil.unpack_archive(archive, directory, "zip")
    except (OpcompileError, OSError) as error:
        return json.dumps(failed("machine", error))
    here = {"device": asdict(gpu), "machine": machine_words(gpu)}
    if not directories:
        return json.dumps(here)
    task = {"directories": directories, "samples": job["samples"], "limit_s": job["measure_s"]}
    return json.dumps({**here, **apart(task, "opcompile._measure_gpu", "candidate", {})})


def _register() -> None:
    """Let the server's process know `measured`: TVM calls this there."""
    from tvm import register_global_func

    register_global_func(MEASURE, measured, override=True)


def serve(tracker: str, key: str, host: str = "0.0.0.0", port: int = 9090, custom_addr: str | None = None) -> Any:  # noqa: S104 (as TVM's servers do)
    """Start a server for ``key`` and return it (``tvm.rpc.Server``).

    It takes a free one of the 110 ports from ``port`` on. ``custom_addr`` is the address that the tracker tells others,
    where it is not the one that it sees.

    Raises `UnknownTargetError` for a tracker or a key of another form; `TargetError` where this machine has no GPU, the
    tracker does not answer, or ``host`` has no such free port; `EngineError` where TVM, or what it needs to serve, is
    missing.
    """
    device()
    at = address(tracker)
    if key.split() != [key]:
        raise UnknownTargetError(f"key {key!r} must be one word, without blanks")
    try:
        import psutil  # noqa: F401 (without it TVM leaves what a session started)
        from tvm import rpc

        listed(*at)
        return rpc.Server(
            host,
            port,
            port + 110,
            tracker_addr=at,
            key=key,
            custom_addr=custom_addr,
            server_init_callback=_register,
        )
    except ImportError as error:
        raise EngineError(f"serving needs a package that is missing: {error}; pip install 'opcompile[tune]'") from error
    except (OSError, OverflowError, ValueError) as error:
        raise TargetError(
            f"cannot listen at {host}, on a port from {port} on: {last_line(str(error))}; give an address of this "
            "machine as --host, and another --port"
        ) from error


def main() -> int:
    """Run as a program; the exit codes are those of `opcompile`."""
    parser = argparse.ArgumentParser(
        prog="python -m opcompile.serve",
        description=(__doc__ or "").split("\n")[0],
        epilog="There is no authentication: whoever reaches the port can run code here. Serve in a network you trust.",
    )
    parser.add_argument("--tracker", required=True, metavar="HOST:PORT", help="The tracker to serve under.")
    parser.add_argument("--key", required=True, metavar="K", help="The key to serve under.")
    parser.add_argument("--host", default="0.0.0.0", help="The address to listen at (all).")  # noqa: S104
    parser.add_argument("--port", type=int, default=9090, help="The first port to try (9090).")
    parser.add_argument("--custom-addr", metavar="A", help="The address that the tracker tells others.")
    given = parser.parse_args()
    try:
        server = serve(given.tracker, given.key, given.host, given.port, given.custom_addr)
    except OpcompileError as error:
        print(f"opcompile: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{device().name}: serving at port {server.port} for key {given.key}", file=sys.stderr)
    # TVM's process would serve on
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.proc.join()
    except KeyboardInterrupt:
        return 130
    finally:
        server.terminate()
    print("opcompile: the server's process has ended", file=sys.stderr)
    return 3


if __name__ == "__main__":
    # as the module that TVM's process imports, not as this program
    from opcompile.serve import main as as_module

    sys.exit(as_module())
