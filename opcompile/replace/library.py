"""Compiled kernels -> the custom-operator library that ONNX Runtime loads: ``ops.c`` and a table beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import opcompile
from opcompile.header import useful_threads
from opcompile.link import link_library
from opcompile.packing import Packing
from opcompile.spec import ConvTranspose3d
from opcompile.target import Target

if TYPE_CHECKING:
    from opcompile.lower import Lowered, PlanName

EXPORTS = ("RegisterCustomOps", "opcompile_calls")

# ONNX's number of the element type, and DLPack's code and bits.
_TYPES = {"float32": (1, 2, 32), "float16": (10, 2, 16), "float64": (11, 2, 64), "bfloat16": (16, 4, 16)}
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """One layer, compiled for one shape of X; ``key`` names the spec, the target and the plan it has."""

    key: str
    lowered: Lowered

    @property
    def spec(self) -> ConvTranspose3d:
        """What it computes."""
        return self.lowered.spec

    @property
    def symbol(self) -> str:
        """Its function in the object code."""
        return f"__tvm_ffi_{_name(self.key)}"


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """What a model's nodes name: one packed kernel, or open ones for a shape each (see ``ops.c``)."""

    domain: str
    name: str
    packed: bool
    kernels: tuple[Kernel, ...]

    @classmethod
    def of(cls, kernels: Sequence[Kernel], *, packed: bool) -> Operator:
        """Return a new operator for rewritten models, named by what it computes and how."""
        kind = "" if packed else "Open"
        key = kernels[0].key if packed else _digest("+".join(kernel.key for kernel in kernels))
        return cls("opcompile", f"ConvTranspose3d{kind}_{key}", packed, tuple(kernels))

    @classmethod
    def override(cls, kernels: Sequence[Kernel]) -> Operator:
        """Return the one that takes ONNX's own operator over."""
        return cls("", "ConvTranspose", False, tuple(kernels))


def in_one_domain(operators: Sequence[Operator]) -> list[Operator]:
    """Return different ``operators`` in a domain of their library's own: a session knows each domain once."""
    distinct = {operator.name: operator for operator in operators}
    domain = f"opcompile.{_digest('+'.join(distinct))[:8]}"
    return [replace(operator, domain=domain) for operator in distinct.values()]


def compiled(spec: ConvTranspose3d, target: Target, plan: PlanName) -> Kernel:
    """Compile a layer, once in this process for each choice of tiles. Raises what `opcompile.lower` raises."""
    from opcompile.lower import choose  # on use: it brings the compiler

    _, chosen = choose(spec, target, plan)  # each time: there may be another record by now
    parts = (opcompile.__version__, str(spec), target.name, json.dumps(asdict(chosen), sort_keys=True))
    return _kernel(_digest("\n".join(parts)), spec, target, plan)


@lru_cache(maxsize=256)
def _kernel(key: str, spec: ConvTranspose3d, target: Target, plan: PlanName) -> Kernel:
    """Compile the kernel that goes by ``key``."""
    from opcompile.lower import lower

    return Kernel(key, lower(spec, target, plan, symbol=_name(key)))


def build(operators: Sequence[Operator], target: Target) -> bytes:
    """Return the library that holds ``operators`` and their kernels. Raises `EngineError` where it cannot be linked."""
    # the kernels of an operator stand in a row; one that several operators call stands there for each
    objects = {kernel.symbol: kernel.lowered.object_code for operator in operators for kernel in operator.kernels}
    host = [_HERE / name for name in ("ops.c", "ort.h", "table.h")]
    return link_library(host, {"table.c": table(operators)}, list(objects.values()), EXPORTS, target)


def table(operators: Sequence[Operator]) -> str:
    """Return ``table.c``: every kernel and operator as C sees them."""
    rows = [kernel for operator in operators for kernel in operator.kernels]
    lines = [
        "/* Generated: the kernels that are linked in, and the operators that call them. */",
        '#include "table.h"',
        f"const int kernel_count = {len(rows)}, operator_count = {len(operators)};",
        f"_Atomic uint64_t calls[{len(rows) + 1}];",
    ]
    for symbol in dict.fromkeys(kernel.symbol for kernel in rows):
        lines.append(f"int {symbol}(void *, const struct value *, int32_t, struct value *);")
    lines.append("const struct kernel kernels[] = {")
    lines += [_kernel_row(kernel) for kernel in rows]
    lines += ["};", "const struct operator operators[] = {"]
    first = 0
    for operator in operators:
        inputs = 2 + operator.kernels[0].spec.bias if operator.packed else 3
        fields = (_quoted(operator.domain), _quoted(operator.name), int(operator.packed), inputs, first)
        lines.append(f"  {_braced((*fields, len(operator.kernels)))},")
        first += len(operator.kernels)
    return "\n".join([*lines, "};", ""])


def _kernel_row(kernel: Kernel) -> str:
    spec = kernel.spec
    element_type, code, bits = _TYPES[spec.dtype]
    axes = _braced(_braced((a.size, a.kernel, a.stride, a.dilation, a.begin, a.out)) for a in spec.axes)
    numbers = (int(spec.bias), useful_threads(spec), spec.batch or 0, spec.channels_in, spec.channels_out, spec.groups)
    fields = (_quoted(str(spec)), kernel.symbol, element_type, code, bits, *numbers, axes)
    return f"  {_braced((*fields, _packing(kernel.lowered.packing)))},"


def _packing(packing: Packing) -> str:
    return _braced((_braced(packing.padded), _braced(packing.view), len(packing.order), _braced(packing.order)))


def _braced(fields: Iterable[object]) -> str:
    return "{" + ", ".join(str(field) for field in fields) + "}"


def _quoted(text: str) -> str:
    return json.dumps(text)


def _name(key: str) -> str:
    return f"conv_transpose3d_{key}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
