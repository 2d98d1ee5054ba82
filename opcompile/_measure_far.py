"""The process of one session with a server that has a GPU: `main` uploads candidates, and lets it time them.

`opcompile.measure` starts it; the server is that of `opcompile.serve`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from opcompile.farm import in_session
from opcompile.serve import MEASURE
from opcompile.trials import answer


def main() -> None:
    """Answer the job on standard input."""
    # candidates run in a process of their own there: what goes wrong in the session is none's fault
    answer(lambda job: in_session(job, lambda session: _measured(job, session), "machine"))


def _measured(job: dict[str, Any], session: Any) -> dict[str, Any]:
    try:
        measured = session.get_function(MEASURE)
    except AttributeError:
        return {
            "failed": "machine",
            "error": "the server was not started by opcompile, whose function it lacks; end it, and start one with "
            "`python -m opcompile.serve` on the machine that has the GPU",
        }
    archives = [f"{number}.zip" for number in range(len(job["directories"]))]
    with tempfile.TemporaryDirectory(prefix="opcompile-") as folder:
        for archive, directory in zip(archives, job["directories"], strict=True):
            packed = shutil.make_archive(str(Path(folder, archive).with_suffix("")), "zip", directory)
            session.upload(packed, archive)
    request = {"archives": archives, "samples": job["samples"], "measure_s": job["measure_s"]}
    found: dict[str, Any] = json.loads(measured(json.dumps(request)))
    return found
