"""Matrix instructions for a schedule to tensorize with: a warp multiplies matrices, and sums in float32.

Whatever a device multiplies at once, a schedule sees C = A^T B^T of 16x16 matrices, as a layer has it: A
``(c, channels)`` and B ``(positions, c)`` lie in shared memory, C ``(channels, positions)`` belongs to a warp until it
leaves through S. Three units (`Unit`) do that:

``wmma``
    NVIDIA's 16x16x16, for float16 and bfloat16. TVM comes with such intrinsics for float16 and not for bfloat16, takes
    ten seconds to import them, and has none that reads its left factor transposed.
``tf32``
    NVIDIA's 16x16x8, twice, for float32 whose factors are rounded to TF32 as they are loaded.
``simdgroup``
    Apple's 8x8x8, eight times, for float16 and float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product
from typing import Any, Literal

Unit = Literal["wmma", "tf32", "simdgroup"]

# Scopes of what a warp holds: sums, and the factor on the right.
SCOPES: dict[Unit, tuple[str, str]] = {
    "wmma": ("wmma.accumulator", "wmma.matrix_b"),
    "tf32": ("wmma.accumulator", "wmma.accumulator"),
    "simdgroup": ("metal.simdgroup", "metal.simdgroup"),
}
# Whether shared memory is declared before all loops: Metal's belongs into a kernel's outermost scope.
HOISTED: dict[Unit, bool] = {"wmma": False, "tf32": False, "simdgroup": True}
# How many elements a thread loads or stores at a time, at the most: 16 bytes, but Metal has no vectors of eight.
WIDEST: dict[Unit, int] = {"wmma": 8, "tf32": 4, "simdgroup": 4}


@cache
def intrinsics(unit: Unit, dtype: str) -> dict[str, str]:
    """Register the intrinsics of ``unit`` for factors of ``dtype``. Returns their names.

    ``fill`` C with zeros; ``load`` B^T into F, which is a warp's; ``multiply`` A and F, where A is loaded first, and
    add to C; ``store`` C to S.
    """
    sums, right = SCOPES[unit]
    held, loaded, shared = ("float32", sums), (dtype, right), (dtype, "shared")
    done = _CALLS[unit](dtype)
    every = {
        "fill": ({"C": held}, "C[i, j] = T.float32(0)"),
        "load": ({"B": shared, "F": loaded}, "F[i, j] = B[j, i]"),
        "multiply": (
            {"F": loaded, "A": shared, "C": held},
            "C[i, j] = C[i, j] + T.Cast('float32', F[k, j]) * T.Cast('float32', A[k, i])",
        ),
        "store": ({"C": held, "S": ("float32", "shared")}, "S[i, j] = C[i, j]"),
    }
    from tvm.s_tir import TensorIntrin

    names = {what: f"opcompile_{unit}_{what}_{dtype}" for what in every}
    for what, (buffers, each) in every.items():
        TensorIntrin.register(names[what], *_intrinsic(buffers, each, done[what]), override=True)
    return names


# --- what each unit calls ---


def _wmma(dtype: str) -> dict[str, list[str]]:
    """One fragment is a matrix: 16x16x16."""
    size, sums = "16, 16, 16", f"C.data, {_place('C', 256)}"

    def load(into: str, place: str, out_of: str, order: str) -> str:
        return (
            f"T.tvm_load_matrix_sync({into}.data, {size}, {place}, "
            f"{out_of}.access_ptr('r', ptr_type='{dtype}'), {out_of}_row, '{order}', dtype='void')"
        )

    return {
        "fill": [_fill("C", size)],
        "load": [load("F", _place("F", 256), "B", "col_major")],
        "multiply": [
            f"L = T.alloc_buffer((16, 16), '{dtype}', scope='wmma.matrix_a')",
            load("L", "0", "A", "col_major"),
            f"T.tvm_mma_sync({sums}, L.data, 0, F.data, {_place('F', 256)}, {sums}, dtype='void')",
        ],
        "store": [_store(size)],
    }


def _tf32(dtype: str) -> dict[str, list[str]]:
    """Two fragments are a matrix of factors, eight rows each: 16x16x8. TVM has no words for them, and calls functions.

    What a thread holds of F lies in a fragment for sums, which has as many elements: TVM names that type.
    """
    size = "16, 16, 8"

    def function(name: str, source: str, *arguments: str) -> str:
        return f"T.evaluate(T.cuda.func_call('opcompile_tf32_{name}', {', '.join(arguments)}, source_code={source!r}))"

    def matrix(name: str) -> str:
        return f"{name}.access_ptr('r', ptr_type='{dtype}'), {name}_row"

    held = f"F.data, {_place('F', 256)}"
    return {
        "fill": [_fill("C", size)],
        # TVM learns of the type from this; the compiler drops it
        "load": [_fill("F", size), function("load", _TF32_LOAD, held, matrix("B"))],
        "multiply": [function("multiply", _TF32_MULTIPLY, f"C.data, {_place('C', 256)}", matrix("A"), held)],
        "store": [_store(size)],
    }


# What stands before a kernel that rounds to TF32. A fragment of factors has four elements in each thread, one of sums
# eight; which they are is the same for all fragments of a type.
_TF32_LOAD = """
template <class Sums>
static __device__ __forceinline__ void opcompile_tf32_load(Sums *held, int at, const float *matrix, int row) {
  #pragma unroll
  for (int half = 0; half < 2; half++) {
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 8, nvcuda::wmma::precision::tf32, nvcuda::wmma::col_major> f;
    nvcuda::wmma::load_matrix_sync(f, matrix + 8 * half, row);
    #pragma unroll
    for (int i = 0; i < f.num_elements; i++)
      held[at].x[half * f.num_elements + i] = nvcuda::wmma::__float_to_tf32(f.x[i]);
  }
}
"""
_TF32_MULTIPLY = """
template <class Sums>
static __device__ __forceinline__ void opcompile_tf32_multiply(Sums *sums, int to, const float *matrix, int row,
                                                               const Sums *held, int at) {
  #pragma unroll
  for (int half = 0; half < 2; half++) {
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 8, nvcuda::wmma::precision::tf32, nvcuda::wmma::col_major> a;
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 8, nvcuda::wmma::precision::tf32, nvcuda::wmma::col_major> b;
    nvcuda::wmma::load_matrix_sync(a, matrix + 8 * half * row, row);
    #pragma unroll
    for (int i = 0; i < a.num_elements; i++) a.x[i] = nvcuda::wmma::__float_to_tf32(a.x[i]);
    #pragma unroll
    for (int i = 0; i < b.num_elements; i++) b.x[i] = held[at].x[half * b.num_elements + i];
    nvcuda::wmma::mma_sync(sums[to], a, b, sums[to]);
  }
}
"""


def _simdgroup(dtype: str) -> dict[str, list[str]]:
    """Four matrices of 8x8 are one, row by row."""

    def fours(*calls: str) -> list[str]:
        return [call.format(at=2 * i + j, i=i, j=j) for i, j in _PAIRS for call in calls]

    def load(into: str, out_of: str, first: str, place: str) -> str:
        return (
            f"T.metal.simdgroup_load({into}.data, {first}{{at}}, {out_of}.access_ptr('r', offset={place}, "
            f"ptr_type='{dtype}'), {out_of}_row, 8, 8, T.bool(True))"
        )

    held, factor = f"{_place('C', 64)} + ", f"{_place('F', 64)} + "
    # C[i, j] takes A[k, i] and F[k, j]
    products = [
        f"T.metal.simdgroup_multiply_accumulate(C.data, {held}{2 * i + j}, L.data, {2 * k + i}, "
        f"F.data, {factor}{2 * k + j}, C.data, {held}{2 * i + j})"
        for k in range(2)
        for i, j in _PAIRS
    ]
    return {
        "fill": fours(f"T.metal.make_filled_simdgroup_matrix(C.data, {held}{{at}}, T.float32(0), 8, 8)"),
        "load": fours(load("F", "B", factor, "8 * {j} * B_row + 8 * {i}")),
        "multiply": [
            f"L = T.alloc_buffer((16, 16), '{dtype}', scope='metal.simdgroup')",
            *fours(load("L", "A", "", "8 * {i} * A_row + 8 * {j}")),
            *products,
        ],
        "store": fours(
            f"T.metal.simdgroup_store(C.data, {held}{{at}}, S.access_ptr('w', offset=8 * {{i}} * S_row + 8 * {{j}}, "
            "ptr_type='float32'), S_row, 8, 8, T.bool(False))"
        ),
    }


_PAIRS = tuple(product(range(2), repeat=2))
_CALLS = {"wmma": _wmma, "tf32": _tf32, "simdgroup": _simdgroup}


def _place(fragments: str, elements: int) -> str:
    """Which of an array of fragments, of so many elements each: they lie one after the other."""
    return f"{fragments}.elem_offset // {elements}"


def _fill(fragments: str, size: str) -> str:
    return f"T.tvm_fill_fragment({fragments}.data, {size}, {_place(fragments, 256)}, T.float32(0), dtype='void')"


def _store(size: str) -> str:
    return (
        f"T.tvm_store_matrix_sync(C.data, {size}, {_place('C', 256)}, "
        "S.access_ptr('w', ptr_type='float32'), S_row, 'row_major', dtype='void')"
    )


# --- what they mean ---


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


def _regions(buffers: Iterable[str]) -> str:
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
