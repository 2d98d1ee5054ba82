"""Matrix instructions for a schedule to tensorize with: a warp multiplies matrices, and sums in float32.

Whatever a device multiplies at once, a schedule sees C = A^T B^T of 16x16 matrices, as a layer has it: A
``(c, channels)`` and B ``(positions, c)`` lie in shared memory, C ``(channels, positions)`` belongs to a warp until it
leaves through S. Three units (`Unit`) do that:

``mma``
    NVIDIA's 16x8x16, twice, for float16 and bfloat16, as PTX has it. Of `wmma`, its interface in C++, bfloat16 is
    loaded in eight instructions a matrix and more, and float16 at addresses that are computed anew for each chunk.
``tf32``
    NVIDIA's 16x16x8, twice, for float32 whose factors are rounded to TF32 as they are loaded.
``simdgroup``
    Apple's 8x8x8, eight times, for float16 and float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from typing import Any, Literal

Unit = Literal["mma", "tf32", "simdgroup"]

# Scope of what a warp holds: sums, and the factor on the right.
SCOPE: dict[Unit, str] = {"mma": "wmma.accumulator", "tf32": "wmma.accumulator", "simdgroup": "metal.simdgroup"}
# The type of what a warp holds of F, where it is not that of the factors.
HELD_AS: dict[Unit, str] = {"mma": "float32"}
# Whether shared memory is declared before all loops: Metal's belongs into a kernel's outermost scope.
HOISTED: dict[Unit, bool] = {"mma": False, "tf32": False, "simdgroup": True}
# How many elements a thread loads or stores at a time, at the most: 16 bytes, but Metal has no vectors of eight.
WIDEST: dict[Unit, int] = {"mma": 8, "tf32": 4, "simdgroup": 4}


@cache
def intrinsics(unit: Unit, dtype: str, across: int) -> dict[str, str]:
    """Register the intrinsics of ``unit`` for factors of ``dtype``. Returns their names.

    ``fill`` C with zeros; ``load`` B^T into F, which is a warp's; ``multiply`` A, which is loaded first, and
    ``across`` of the F side by side, and add to as many C; ``store`` C to S.
    """
    held, loaded, shared = ("float32", SCOPE[unit]), (HELD_AS.get(unit, dtype), SCOPE[unit]), (dtype, "shared")
    done, q = _CALLS[unit](dtype, across), "q" if across > 1 else ""
    every = {
        "fill": ({"C": (*held, "ij")}, "{C} = T.float32(0)"),
        "load": ({"B": (*shared, "ji"), "F": (*loaded, "ij")}, f"{{F}} = T.Cast('{loaded[0]}', {{B}})"),
        "multiply": (
            {"F": (*loaded, f"{q}kj"), "A": (*shared, "ki"), "C": (*held, f"{q}ij")},
            f"{{C}} = {{C}} + T.Cast('float32', T.Cast('{dtype}', {{F}})) * T.Cast('float32', {{A}})",
        ),
        "store": ({"C": (*held, "ij"), "S": ("float32", "shared", "ij")}, "{S} = {C}"),
    }
    from tvm.s_tir import TensorIntrin

    names = {what: f"opcompile_{unit}_{what}_{dtype}_{across}" for what in every}
    for what, (buffers, each) in every.items():
        TensorIntrin.register(names[what], *_intrinsic(buffers, each, done[what], across), override=True)
    return names


# --- what each unit calls ---


def _mma(dtype: str, across: int) -> dict[str, list[str]]:
    """Functions around PTX, whose manual says which thread has which elements: 16x8x16, twice.

    A thread has eight elements of a matrix, as many as of a fragment of sums in `wmma`: both lie in such, for TVM has
    no words for them; of F in the first half, as pairs.
    """
    words = {"float16": ("half", "f16"), "bfloat16": ("nv_bfloat16", "bf16")}[dtype]
    size, called = "16, 16, 16", partial(_called, "mma", {name: _worded(text, *words) for name, text in _MMA.items()})
    return {
        "fill": [_fill("C", size)],
        "load": [_fill("F", size), called("load", _HELD, _matrix("B", dtype))],
        "multiply": [called("multiply", _SUMS, _matrix("A", dtype), _HELD, str(across))],
        "store": [called("store", "S.access_ptr('w', ptr_type='float32'), S_row", _SUMS)],
    }


def _tf32(dtype: str, across: int) -> dict[str, list[str]]:
    """Two fragments are a matrix of factors, eight rows each: 16x16x8. TVM has no words for them, and calls functions.

    What a thread holds of F lies in a fragment for sums, which has as many elements: TVM names that type.
    """
    size, called = "16, 16, 8", partial(_called, "tf32", _TF32)
    return {
        "fill": [_fill("C", size)],
        "load": [_fill("F", size), called("load", _HELD, _matrix("B", dtype))],
        "multiply": [called("multiply", _SUMS, _matrix("A", dtype), _HELD, str(across))],
        "store": [_store(size)],
    }


# What stands before a kernel that multiplies by PTX, each function once. Rows of A and B are read in halves of eight
# elements, 8x8 at a time; A's are turned, so that a thread has neighbours in k of both.
_MMA = {
    "load": """
static __device__ __forceinline__ void opcompile_ldmatrix(unsigned *to, const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"((unsigned)__cvta_generic_to_shared(row)));
}
template <class Sums>
static __device__ __forceinline__ void opcompile_mma_load(Sums *held, int at, const TYPE *matrix, int row) {
  int lane = threadIdx.x;
  unsigned b[4];
  opcompile_ldmatrix(b, matrix + (lane % 8 + lane / 16 * 8) * row + lane / 8 % 2 * 8);
  #pragma unroll
  for (int i = 0; i < 4; i++) held[at].x[i] = __uint_as_float(b[i]);
}
""",
    "multiply": """
static __device__ __forceinline__ void opcompile_ldmatrix_trans(unsigned *to, const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"((unsigned)__cvta_generic_to_shared(row)));
}
static __device__ __forceinline__ void opcompile_mma_SHORT(float *sums, const unsigned *a, const unsigned *b) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.SHORT.SHORT.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};" : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  #pragma unroll
  for (int i = 0; i < 2; i++)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.SHORT.SHORT.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
                 "{%0, %1, %2, %3};" : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}
template <class Sums>
static __device__ __forceinline__ void opcompile_mma_multiply(Sums *sums, int to, const TYPE *matrix, int row,
                                                              const Sums *held, int at, int across) {
  int lane = threadIdx.x;
  unsigned a[4];
  opcompile_ldmatrix_trans(a, matrix + (lane % 8 + lane / 16 * 8) * row + lane / 8 % 2 * 8);
  #pragma unroll
  for (int q = 0; q < across; q++) {
    #pragma unroll
    for (int side = 0; side < 2; side++) {
      unsigned b[2] = {__float_as_uint(held[at + q].x[2 * side]), __float_as_uint(held[at + q].x[2 * side + 1])};
      opcompile_mma_SHORT(sums[to + q].x + 4 * side, a, b);
    }
  }
}
""",
    "store": """
template <class Sums>
static __device__ __forceinline__ void opcompile_mma_store(float *matrix, int row, const Sums *sums, int at) {
  int lane = threadIdx.x;
  #pragma unroll
  for (int i = 0; i < 4; i++) {
    const float *x = sums[at].x + 2 * i;
    *(float2 *)(matrix + (lane / 4 + i % 2 * 8) * row + i / 2 * 8 + lane % 4 * 2) = make_float2(x[0], x[1]);
  }
}
""",
}


def _worded(text: str, dtype: str, short: str) -> str:
    """Name the type of the factors, in C and in PTX."""
    return text.replace("TYPE", dtype).replace("SHORT", short)


# The same of one that rounds to TF32. A fragment of factors has four elements in each thread, one of sums eight; which
# they are is the same for all fragments of a type.
_TF32 = {
    "load": """
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
""",
    "multiply": """
template <class Sums>
static __device__ __forceinline__ void opcompile_tf32_multiply(Sums *sums, int to, const float *matrix, int row,
                                                               const Sums *held, int at, int across) {
  #pragma unroll
  for (int half = 0; half < 2; half++) {
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 8, nvcuda::wmma::precision::tf32, nvcuda::wmma::col_major> a;
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 8, nvcuda::wmma::precision::tf32, nvcuda::wmma::col_major> b;
    nvcuda::wmma::load_matrix_sync(a, matrix + 8 * half * row, row);
    #pragma unroll
    for (int i = 0; i < a.num_elements; i++) a.x[i] = nvcuda::wmma::__float_to_tf32(a.x[i]);
    #pragma unroll
    for (int q = 0; q < across; q++) {
      #pragma unroll
      for (int i = 0; i < b.num_elements; i++) b.x[i] = held[at + q].x[half * b.num_elements + i];
      nvcuda::wmma::mma_sync(sums[to + q], a, b, sums[to + q]);
    }
  }
}
""",
}


def _simdgroup(dtype: str, across: int) -> dict[str, list[str]]:
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
        f"T.metal.simdgroup_multiply_accumulate(C.data, {held}{4 * q + 2 * i + j}, L.data, {2 * k + i}, "
        f"F.data, {factor}{4 * q + 2 * k + j}, C.data, {held}{4 * q + 2 * i + j})"
        for q in range(across)
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
_CALLS = {"mma": _mma, "tf32": _tf32, "simdgroup": _simdgroup}


def _place(fragments: str, elements: int) -> str:
    """Which of an array of fragments, of so many elements each: they lie one after the other."""
    return f"{fragments}.elem_offset // {elements}"


# The sums and the factor that a warp holds, as our functions take them.
_SUMS, _HELD = (f"{name}.data, {_place(name, 256)}" for name in "CF")


def _matrix(name: str, dtype: str) -> str:
    """A matrix in shared memory, and the length of its rows."""
    return f"{name}.access_ptr('r', ptr_type='{dtype}'), {name}_row"


def _called(unit: str, sources: dict[str, str], name: str, *arguments: str) -> str:
    """Call a function, whose source then stands before the kernel."""
    call = ", ".join([f"'opcompile_{unit}_{name}'", *arguments])
    return f"T.evaluate(T.cuda.func_call({call}, source_code={sources[name]!r}))"


def _fill(fragments: str, size: str) -> str:
    """Fill with zeros. Of F, for TVM to learn of its type: the compiler drops it."""
    return f"T.tvm_fill_fragment({fragments}.data, {size}, {_place(fragments, 256)}, T.float32(0), dtype='void')"


def _store(size: str) -> str:
    return (
        f"T.tvm_store_matrix_sync(C.data, {size}, {_place('C', 256)}, "
        "S.access_ptr('w', ptr_type='float32'), S_row, 'row_major', dtype='void')"
    )


# --- what they mean ---


def _intrinsic(
    buffers: dict[str, tuple[str, str, str]], each: str, calls: Sequence[str], across: int
) -> tuple[Any, Any]:
    """Return what is meant, ``each`` for all its indices, and the ``calls`` that do it.

    ``buffers`` are type, scope and indices by name, of which the last is written: what it lacks is summed. An index has
    16 values; where ``across`` matrices are told apart by ``q``, ``j`` goes through the columns of all.
    """
    *read, written = buffers
    spatial = buffers[written][2].replace("q", "")
    indices = spatial + "".join(sorted({i for _, _, of in buffers.values() for i in of} - {*spatial, "q"}))
    kinds = "".join("S" if i in spatial else "R" for i in indices)
    several = any("q" in of for _, _, of in buffers.values())
    extents = [16 * across if several and i == "j" else 16 for i in indices]
    loops = ", ".join(f"{i}_" for i in indices)
    meant = [
        f"for {loops} in T.grid({', '.join(map(str, extents))}):",
        "    with T.sblock('each'):",
        f"        {', '.join(indices)} = T.axis.remap('{kinds}', [{loops}])",
        f"        {each.format(**{name: _element(name, of) for name, (_, _, of) in buffers.items()})}",
    ]
    reads = [written, *read] if "R" in kinds else read
    whole = {n: ", ".join(f"0:{size}" for size in _sizes(of, across)) for n, (_, _, of) in buffers.items()}
    regions = [
        f"T.{does}({', '.join(f'{name}[{whole[name]}]' for name in names)})"
        for does, names in (("reads", reads), ("writes", [written]))
    ]
    return (
        _function(buffers, [*regions, *meant], across, strides=False),
        _function(buffers, [*regions, *calls], across, strides=True),
    )


def _element(name: str, indices: str) -> str:
    column = {"q": "j // 16", "j": "j % 16"} if "q" in indices else {}
    return f"{name}[{', '.join(column.get(i, i) for i in indices)}]"


def _sizes(indices: str, across: int) -> tuple[int, ...]:
    return tuple(across if index == "q" else 16 for index in indices)


def _function(buffers: dict[str, tuple[str, str, str]], body: Sequence[str], across: int, *, strides: bool) -> Any:
    from tvm.script import from_source

    lines = ["@T.prim_func(s_tir=True)", f"def main({', '.join(f'{name}_: T.handle' for name in buffers)}):"]
    for name, (dtype, scope, indices) in buffers.items():
        # a fragment is a unit; a matrix in shared memory begins at a multiple of 32 bytes, as `wmma` demands
        align = f"align=64, offset_factor={16 if scope == 'shared' else 256}"
        rows = ""
        if strides and scope == "shared":
            lines.append(f"    {name}_row, {name}_one = T.int32(), T.int32()")
            rows = f", strides=[{name}_row, {name}_one]"
        sizes = _sizes(indices, across)
        lines.append(f"    {name} = T.match_buffer({name}_, {sizes}, '{dtype}', {align}, scope='{scope}'{rows})")
    lines += ["    with T.sblock('root'):", *(f"        {line}" for line in body)]
    return from_source("\n".join(lines))
