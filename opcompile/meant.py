"""A word that names nothing -> the names that it may stand for, as the beginning of the way out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

_NONE: Mapping[str, str] = {}


def meant(word: str, names: Iterable[str], others: Mapping[str, str] = _NONE, after: str = "") -> str:
    """Return ``did you mean NAME? ``, or nothing where no name is near; ``after`` follows each name.

    Near is what differs in case, in punctuation or in what stands before a colon (``sm_90`` for ``cuda:sm_90``), a word
    of ``others``, which say how else a name is called, and else the one that is spelled most alike.
    """
    found: dict[str, list[str]] = {}
    for said, name in [*((name, name) for name in names), *others.items()]:
        found.setdefault(_plain(said), []).append(name)
    alike = get_close_matches(_plain(word), found, 1, 0.7)  # the same, where there is the same
    near = dict.fromkeys(found[alike[0]]) if alike else ()
    return f"did you mean {' or '.join(name + after for name in near)}? " if near else ""


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower().rpartition(":")[2])
