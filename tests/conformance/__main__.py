"""``python -m conformance with_torch``: run one system's suites here; exit code 1 where a case failed.

With ``--json`` the results are printed as JSON and nothing else. ``python -m conformance write`` runs every
system whose environment is there, and writes ``docs/conformance.md``; ``write with_torch`` runs that one anew.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module


def main(name: str, *flags: str) -> int:
    if name == "write":
        from conformance.page import write

        return write(*flags)
    results = list(import_module(f"conformance.{name}").suites())
    if "--json" in flags:
        print(json.dumps([result.to_json() for result in results]))
        return 0
    for r in results:
        numbers = f"{r.cases} cases, {r.passed} passed, {r.refused} refused by both, {sum(r.not_run.values())} not run"
        print(f"{r.system} {r.version}, {r.what}: {numbers}, {len(r.failed)} failed")
        for line in r.failed:
            print(f"  FAILED {line}")
    return int(any(r.failed for r in results))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
