"""The weighing process: `main` reads one job, runs one engine, answers how much memory it took, ends.

`weigh` starts it. A job and its answer are JSON on the standard streams. What is told is how far the peak
of the resident memory rises above what it was when the engine's package was imported, X lay in memory and
everything else was still to be made; less the size of Y. So weights count in whatever form an engine
keeps them, and so do the pages of its libraries that it touches for the first time. W waits in a file
that is mapped, and occupies memory once it is read.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.engines import Job, in_its_order, package, prepare
from opcompile.errors import EngineError, OpcompileError
from opcompile.needed import bfloat16
from opcompile.spec import ConvTranspose3d
from opcompile.tensors import STORAGE

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# The second call is the one to look at where the first one prepares something.
_CALLS = 2
_LIMIT_S = 600.0


def weigh(name: str, job: Job) -> int:
    """Return the bytes that an engine takes beside X and Y, at its peak, in a process of its own.

    Raises `EngineError` where the system does not tell (Linux does), or the process fails.
    """
    if not _RESET.exists():
        raise EngineError("this system cannot tell the peak of a part of a process")
    with tempfile.TemporaryDirectory(prefix="opcompile-") as folder:
        for argument, array in (("x", job.x), ("w", job.w), ("b", job.b)):
            if array is not None:
                np.save(Path(folder) / f"{argument}.npy", array.view(STORAGE[job.spec.dtype]))
        content = {"engine": name, "spec": str(job.spec), "threads": job.threads}
        content |= {"directory": str(job.directory), "arrays": folder}
        return _asked(content)


def _asked(content: dict[str, Any]) -> int:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "opcompile._memory"],
            input=json.dumps(content),
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"the weighing process was still running after {_LIMIT_S:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise EngineError(f"the weighing process ended with status {done.returncode}: {last}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise EngineError(answer["error"])
    return int(answer["bytes"])


def main() -> None:
    """Answer the job on standard input."""
    # what an engine prints must not get into the answer
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    content = json.load(sys.stdin)
    with answer:
        try:
            json.dump({"bytes": _weighed(content)}, answer)
        except OpcompileError as error:
            json.dump({"error": str(error)}, answer)


def _weighed(content: dict[str, Any]) -> int:
    name, spec = content["engine"], ConvTranspose3d.parse(content["spec"])
    arrays = Path(content["arrays"])
    package(name)
    x = in_its_order(name, _array(arrays / "x.npy", spec), spec)
    w = _array(arrays / "w.npy", spec, mapped=True)
    b = _array(arrays / "b.npy", spec) if spec.bias else None
    job = Job(spec, Path(content["directory"]), x, w, b, content["threads"])
    _RESET.write_text("5")  # the peak becomes what is resident now: proc(5)
    before = _peak()
    engine = prepare(name, job)
    for _ in range(_CALLS):
        engine.run()
    return max(0, _peak() - before - engine.y().nbytes)


def _array(path: Path, spec: ConvTranspose3d, *, mapped: bool = False) -> NDArray[Any]:
    # copy on write: some engines insist on writable memory, and none writes
    stored: NDArray[Any] = np.load(path, mmap_mode="c" if mapped else None)
    return stored.view(bfloat16()) if spec.dtype == "bfloat16" else stored


def _peak() -> int:
    """Return the peak of the resident memory of this process in bytes, since it was reset."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.M)
    if found is None:
        raise EngineError("this system does not tell the peak of the resident memory")
    return int(found[1]) << 10


if __name__ == "__main__":
    main()
