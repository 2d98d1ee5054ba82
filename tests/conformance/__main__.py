"""``python -m conformance with_torch``: run one system's suites here, and print their results as JSON."""

from __future__ import annotations

import json
import sys
from importlib import import_module


def main() -> None:
    module = import_module(f"conformance.{sys.argv[1]}")
    print(json.dumps([result.to_json() for result in module.suites()]))


if __name__ == "__main__":
    main()
