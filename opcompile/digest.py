"""The hash that a JSON file holds of itself, so that an edited one is noticed too."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of ``content`` without its field ``sha256``, however the file is indented."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
