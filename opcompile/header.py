"""What a C host of a layer includes, and what its run-time half is compiled with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from opcompile.golden import B_AMPLITUDE, B_SALT, W_SALT, X_AMPLITUDE, X_SALT, w_amplitude
from opcompile.packing import Packing
from opcompile.runtime import KERNEL, MOST_THREADS
from opcompile.spec import ConvTranspose3d
from opcompile.tensors import sizes_text

if TYPE_CHECKING:
    from opcompile.gradients.gradient import Gradient

_C_TYPES = {
    "float32": ("float", 2, 32),
    "float16": ("uint16_t /* the bits of an IEEE binary16 */", 2, 16),
    "bfloat16": ("uint16_t /* the bits of a bfloat16 */", 4, 16),
    "float64": ("double", 2, 64),
}
# The pointers of a call in its order, and every tensor that one of them may be, of a layer or of a derivative.
_PLACES = ("FIRST", "SECOND", "THIRD", "RESULT")
_TENSORS = ("X", "W", "B", "Y", "DY", "DX", "DW", "DB")


def header(spec: ConvTranspose3d, packing: Packing) -> str:
    """Return the C header of a layer: what ``layer.c`` is compiled with, and what a C host includes."""
    about = _ABOUT.format(
        spec=spec,
        x=sizes_text(spec.x_shape),
        y=sizes_text(spec.y_shape),
        w=sizes_text(packing.shape),
        w_canonical=sizes_text(spec.w_shape),
        padded=packing.padded,
        view=packing.view,
        order=packing.order,
        layout=spec.layout,
        b=f"({spec.channels_out},)" if spec.bias else "NULL: this layer has no bias",
        batch="any, at least 1" if spec.batch is None else f"always {spec.batch}",
        x_salt=X_SALT,
        w_salt=W_SALT,
        b_salt=B_SALT,
        x_amplitude=X_AMPLITUDE,
        w_amplitude=w_amplitude(spec),
        b_amplitude=B_AMPLITUDE,
    )
    shapes = {"x": spec.x_shape, "w": packing.shape, "b": (spec.channels_out,), "y": spec.y_shape}
    pointers = ("x", "w", "b" if spec.bias else None, "y")
    return about + c_code(spec.dtype, shapes, pointers, KERNEL, useful_threads(spec))


def c_code(
    dtype: str,
    shapes: Mapping[str, Sequence[int | None]],
    pointers: Sequence[str | None],
    kernel: str,
    threads: int,
) -> str:
    """Return the part of a C header that a compiler reads.

    ``shapes`` are those of the tensors by name; ``pointers`` names the four of a call, None where it must be null.
    Headers of several layers go together: what all have in common is said once, and each one's own words replace
    those before.
    """
    c_type, code, bits = _C_TYPES[dtype]
    places = dict(zip(_PLACES, pointers, strict=True))
    macros = {
        "opcompile_element": c_type,
        "OPCOMPILE_DTYPE_CODE": code,
        "OPCOMPILE_DTYPE_BITS": bits,
        **{f"OPCOMPILE_{name}_SHAPE": None for name in _TENSORS},
        **{f"OPCOMPILE_{name.upper()}_SHAPE": _c_shape(shape) for name, shape in shapes.items()},
        **{
            f"OPCOMPILE_{place}_SHAPE": f"OPCOMPILE_{name.upper()}_SHAPE" if name else "{0}"
            for place, name in places.items()
        },
        **{f"OPCOMPILE_HAS_{place}": int(places[place] is not None) for place in ("SECOND", "THIRD")},
        "OPCOMPILE_NULLS": f'"{_nulls(places)}"',
        "OPCOMPILE_KERNEL": kernel,
        "OPCOMPILE_USEFUL_THREADS": threads,
    }
    lines = (
        f"#undef {name}\n" + ("" if value is None else f"#define {name} {value}\n") for name, value in macros.items()
    )
    return _COMMON + "".join(lines)


def _nulls(places: Mapping[str, str | None]) -> str:
    """Say which pointers of a call must not be null, and which must be."""
    *names, last = filter(None, places.values())
    absent = " and ".join(f"the {place.lower()}" for place, name in places.items() if name is None)
    rule = f"{', '.join(names)} and {last} must not be null"
    return rule + (f", and {absent} pointer must be" if absent else "")


def _c_shape(shape: Sequence[int | None]) -> str:
    """Write a shape as C initialises an array, a dynamic batch as 0."""
    return "{" + ", ".join(str(n or 0) for n in shape) + "}"


def useful_threads(work: ConvTranspose3d | Gradient) -> int:
    """Count a thread for each 25 us of work, for one batch element of a dynamic batch: waking one takes about 10.

    The work is estimated at 20 GFLOP/s and 5 GB/s, which a core of any supported machine reaches.
    """
    work_us = work.flops / 20e3 + work.bytes() / 5e3
    return max(1, min(MOST_THREADS, int(work_us / 25)))


_ABOUT = """\
/* A transposed 3-D convolution, compiled:
 *   {spec}
 *
 * The library beside this file needs the C library alone. Load it and call it so:
 *
 *   #include <dlfcn.h>
 *   void *library = dlopen("./conv_transpose3d-....so", RTLD_NOW | RTLD_LOCAL);
 *   opcompile_run_fn run;
 *   opcompile_error_fn error;
 *   *(void **)&run = dlsym(library, "opcompile_run");
 *   *(void **)&error = dlsym(library, "opcompile_error");
 *   if (run(0, batch, x, w, b, y)) fprintf(stderr, "%s\\n", error());
 *
 *   x  {x}, layout {layout}
 *   w  {w}, packed from the canonical {w_canonical}
 *   b  {b}
 *   y  {y}, layout {layout}; shares no memory with the others
 *
 * All are contiguous arrays of opcompile_element, aligned as that type is. batch is N: {batch}.
 * The packed w is the canonical one, filled up with zeros to {padded},
 * seen as {view}, its axes put into the order {order};
 * weights.npz, where it is there, holds it ready.
 *
 * threads is the most that the call may use, the caller among them: 1 to 1024, or 0 for the variable
 * OPCOMPILE_NUM_THREADS (read when the library is loaded), and without that every CPU the process may
 * run on, or as many as a container is granted. Calls may come from several threads at once; a child
 * process may call after a fork.
 * The result is 0, or something else, and then opcompile_error() says why, for the calling thread.
 *
 * The inputs of golden.npz: element i of x is opcompile_golden(i, {x_salt}, {x_amplitude}) / 64.0, of the canonical w
 * opcompile_golden(i, {w_salt}, {w_amplitude}) / 64.0, of b opcompile_golden(i, {b_salt}, {b_amplitude}) / 64.0; where
 * weights.npz holds w or b, those are used instead.
 */
"""

_COMMON = """\
#ifndef OPCOMPILE_H /* what the headers of all layers have in common */
#define OPCOMPILE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define OPCOMPILE_API __attribute__((visibility("default")))
OPCOMPILE_API int opcompile_run(int threads, int64_t batch, const void *first, const void *second, const void *third,
                                void *result);
OPCOMPILE_API const char *opcompile_error(void);
typedef int (*opcompile_run_fn)(int, int64_t, const void *, const void *, const void *, void *);
typedef const char *(*opcompile_error_fn)(void);

static inline int32_t opcompile_golden(uint32_t i, uint32_t salt, uint32_t amplitude) {
  uint32_t h = i + salt * 0x9E3779B9u;
  h ^= h >> 16;
  h *= 0x7FEB352Du;
  h ^= h >> 15;
  h *= 0x846CA68Bu;
  h ^= h >> 16;
  return (int32_t)(h % (2 * amplitude + 1)) - (int32_t)amplitude;
}

#ifdef __cplusplus
}
#endif
#endif

/* What follows is of the library beside this file. Where a file includes the headers of several, it is of the last one.
 *
 * element: of every array. DTYPE: DLPack's description of it. SHAPE: of the tensors that are named above, and again
 * of the four pointers of a call in its order, FIRST, SECOND, THIRD and RESULT; a 0 is a batch that the call gives.
 * HAS: 0 where that pointer must be null, which has no shape. USEFUL_THREADS: more of them, for each batch element
 * where N is open, would cost more than they bring. */
"""
