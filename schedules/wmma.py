"""NVIDIA's matrix instructions for a schedule to tensorize with: a warp multiplies 16x16 matrices, and sums in float32.

TVM comes with such intrinsics for float16 and not for bfloat16, takes ten seconds to import them, and has none that
reads its left factor transposed. These compute C = A^T B, as a layer has it: A ``(c, channels)`` and B
``(c, positions)`` lie in shared memory, C ``(channels, positions)`` is a fragment until it leaves through S.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

_SUM = ("float32", "wmma.accumulator")


@cache
def intrinsics(dtype: str) -> dict[str, str]:
    """Register the intrinsics for factors of ``dtype``. Returns their names.

    ``fill`` C with zeros; ``load`` B into a fragment F; ``multiply`` A and F, where A is loaded first, and add to C;
    ``store`` C to S.
    """
    shared, right = (dtype, "shared"), (dtype, "wmma.matrix_b")
    size = "16, 16, 16"
    every = {
        "fill": _intrinsic(
            {"C": _SUM},
            "C[i, j] = T.float32(0)",
            [f"T.tvm_fill_fragment(C.data, {size}, {_place('C')}, T.float32(0), dtype='void')"],
        ),
        "load": _intrinsic(
            {"B": shared, "F": right},
            "F[i, j] = B[i, j]",
            [
                f"T.tvm_load_matrix_sync(F.data, {size}, {_place('F')}, "
                f"B.access_ptr('r', ptr_type='{dtype}'), B_row, 'row_major', dtype='void')"
            ],
        ),
        "multiply": _intrinsic(
            {"F": right, "A": shared, "C": _SUM},
            "C[i, j] = C[i, j] + T.Cast('float32', F[k, j]) * T.Cast('float32', A[k, i])",
            [
                f"L = T.alloc_buffer((16, 16), '{dtype}', scope='wmma.matrix_a')",
                f"T.tvm_load_matrix_sync(L.data, {size}, 0, "
                f"A.access_ptr('r', ptr_type='{dtype}'), A_row, 'col_major', dtype='void')",
                f"T.tvm_mma_sync(C.data, {_place('C')}, L.data, 0, F.data, {_place('F')}, C.data, {_place('C')}, "
                "dtype='void')",
            ],
        ),
        "store": _intrinsic(
            {"C": _SUM, "S": ("float32", "shared")},
            "S[i, j] = C[i, j]",
            [
                f"T.tvm_store_matrix_sync(C.data, {size}, {_place('C')}, "
                "S.access_ptr('w', ptr_type='float32'), S_row, 'row_major', dtype='void')"
            ],
        ),
    }
    from tvm.s_tir import TensorIntrin

    names = {what: f"opcompile_wmma_{what}_{dtype}" for what in every}
    for what, (meant, done) in every.items():
        TensorIntrin.register(names[what], meant, done, override=True)
    return names


def _place(fragments: str) -> str:
    """Which of an array of fragments: they lie one after the other."""
    return f"{fragments}.elem_offset // 256"


def _intrinsic(buffers: dict[str, tuple[str, str]], each: str, calls: Sequence[str]) -> tuple[Any, Any]:
    """Return what is meant, ``each`` for all i, j (and k, a sum), and the ``calls`` that do it.

    The last of ``buffers`` (type and scope by name) is written.
    """
    indices = "ijk" if "k," in each else "ij"
    loops = ", ".join(f"{index}_" for index in indices)
    meant = [
        f"for {loops} in T.grid({', '.join('16' for _ in indices)}):",
        "    with T.sblock('each'):",
        f"        {', '.join(indices)} = T.axis.remap('{'SSR'[: len(indices)]}', [{loops}])",
        f"        {each}",
    ]
    *read, written = buffers
    reads = [written, *read] if "k" in indices else read
    regions = [f"T.reads({_regions(reads)})", f"T.writes({_regions([written])})"]
    return _function(buffers, [*regions, *meant], strides=False), _function(buffers, [*regions, *calls], strides=True)


def _regions(buffers: Sequence[str]) -> str:
    return ", ".join(f"{name}[0:16, 0:16]" for name in buffers)


def _function(buffers: dict[str, tuple[str, str]], body: Sequence[str], *, strides: bool) -> Any:
    from tvm.script import from_source

    lines = ["@T.prim_func(s_tir=True)", f"def main({', '.join(f'{name}_: T.handle' for name in buffers)}):"]
    for name, (dtype, scope) in buffers.items():
        # a fragment is a unit; rows in shared memory begin at multiples of 32 bytes, as the instructions demand
        align = f"align=64, offset_factor={16 if scope == 'shared' else 256}"
        rows = ""
        if strides and scope == "shared":
            lines.append(f"    {name}_row, {name}_one = T.int32(), T.int32()")
            rows = f", strides=[{name}_row, {name}_one]"
        lines.append(f"    {name} = T.match_buffer({name}_, (16, 16), '{dtype}', {align}, scope='{scope}'{rows})")
    lines += ["    with T.sblock('root'):", *(f"        {line}" for line in body)]
    return from_source("\n".join(lines))
