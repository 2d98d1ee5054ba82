"""How a GPU kernel is started: what ``launch.json`` says, for whoever has no TVM."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opcompile.errors import ArtifactError

LAUNCH = "launch.json"
# The most thread blocks that CUDA starts at once, and that their number, an int in the text, tells apart.
MOST_BLOCKS = 2**31 - 1
SOURCES = {"cuda": "kernel.cu", "metal": "kernel.metal"}

_POINTER = re.compile(r"\*\s*(?:__restrict__\s+)?(\w+?)_ptr\b")
_SIGNATURES = {
    "cuda": re.compile(r"__launch_bounds__\((?P<threads>\d+)\) (?P<kernel>\w+)\((?P<parameters>[^)]*)\) \{"),
    "metal": re.compile(r"kernel void (?P<kernel>\w+)\((?P<parameters>.*?)\n\) \{", re.S),
}
_SHARED = re.compile(
    r"^\s*(?:alignas\(\d+\) )?(?:__shared__|threadgroup) (?:alignas\(\d+\) )?"
    r"(?P<type>\w+) (?P<name>\w+)\[(?P<count>\d+)\];",
    re.M,
)
_BYTES = {"float": 4, "half": 2, "nv_bfloat16": 2, "double": 8}
_ELEMENT = re.compile(r"(?P<base>float|half|nv_bfloat16|double)(?P<length>[24])?$")


@dataclass(frozen=True, slots=True)
class Launch:
    """The one launch of a layer, or of a derivative.

    ``blocks`` thread blocks, for each image of the batch if ``per_image``, in one dimension, of ``block`` threads
    each: along x, y, z. ``arguments`` are in the kernel's order: ``x``, ``w`` (packed), ``b``, ``y`` (of a derivative
    its operands and ``result``), and ``batch`` (a 64-bit integer) where N is open. A kernel does not take what it does
    not read. ``shared_bytes`` of shared (threadgroup) memory are declared inside the kernel; none are to be added by
    the launch.
    """

    kernel: str
    blocks: int
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[str, ...]
    result: str = "y"
    per_image: bool = True

    @classmethod
    def of(
        cls, source: str, language: str, blocks: int, block: tuple[int, ...], result: str = "y", per_image: bool = True
    ) -> Launch:
        """Read the rest from the emitted text, which must hold exactly one kernel."""
        found = list(_SIGNATURES[language].finditer(source))
        if len(found) != 1:
            raise AssertionError(f"the emitted {language} text has {len(found)} kernels")
        (signature,) = found
        parameters = signature["parameters"]
        # TVM calls each by the name that it was declared with
        arguments = [result if name == "output" else name.lower() for name in _POINTER.findall(parameters)]
        if re.search(r"\bbatch\b|_args_t\b", parameters):
            arguments.append("batch")
        shared = sum(int(a["count"]) * _bytes(a["type"]) for a in shared_arrays(source))
        x, y, z = (*block, 1, 1)[:3]
        return cls(signature["kernel"], blocks, (x, y, z), shared, tuple(arguments), result, per_image)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return math.prod(self.block)

    def grid(self, batch: int) -> int:
        """Thread blocks for ``batch`` images."""
        return self.blocks * batch if self.per_image else self.blocks

    @property
    def most_images(self) -> int | None:
        """Images that one launch can have; None where these make no more blocks."""
        return MOST_BLOCKS // self.blocks if self.per_image else None

    def to_json(self, batch: int | None) -> str:
        """Return the text of ``launch.json``. Where the first grid size is null, it is blocks times the batch."""
        fields = {
            "kernel": self.kernel,
            "grid": [None if batch is None and self.per_image else self.grid(batch or 1), 1, 1],
            "block": list(self.block),
            "blocks_per_image": self.blocks if self.per_image else None,
            "shared_bytes": self.shared_bytes,
            "arguments": list(self.arguments),
            "result": self.result,
        }
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Launch:
        """Read what `to_json` wrote. Raises `ArtifactError`."""
        try:
            fields: Mapping[str, Any] = json.loads(text)
            blocks = fields["blocks_per_image"]
            x, y, z = (int(size) for size in fields["block"])
            return cls(
                str(fields["kernel"]),
                int(fields["grid"][0] if blocks is None else blocks),
                (x, y, z),
                int(fields["shared_bytes"]),
                tuple(str(name) for name in fields["arguments"]),
                str(fields["result"]),
                blocks is not None,
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ArtifactError(f"launch.json cannot be read: {error}; compile the layer again") from None


def _bytes(name: str) -> int:
    """Bytes of an element, a vector perhaps, as the languages name it."""
    found = _ELEMENT.match(name)
    if found is None:
        raise AssertionError(f"the kernel declares shared memory of type {name}")
    return _BYTES[found["base"]] * int(found["length"] or 1)


def shared_arrays(source: str) -> list[re.Match[str]]:
    """Find the declarations of shared memory: groups ``type``, ``name`` and ``count``."""
    return list(_SHARED.finditer(source))
