"""A compiled derivative as a directory: what `opcompile.artifact` writes for the layer, under other names.

The library and the header are called ``conv_transpose3d_dx`` (``_dw``, ``_db``), as the kernel inside is,
and the manifest says which derivative it is. For a GPU there are the kernel's text and its launch instead of
the header. There are no packed weights: those that are trained change with each call.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opcompile.artifact import (
    C_TYPES,
    archive,
    c_shape,
    publish,
    require_replaceable,
    useful_threads,
    versions,
)
from opcompile.artifact_gpu import gpu_files, library_name
from opcompile.gpus import GpuTarget
from opcompile.gradients.golden import SALTS, amplitude, golden
from opcompile.gradients.gradient import Gradient
from opcompile.link import link
from opcompile.runtime import FORMAT, GOLDEN, STORAGE, VERSION

if TYPE_CHECKING:
    from opcompile.gradients.lower import LoweredGradient
    from opcompile.gradients.lower_gpu import LoweredGpuGradient


def write(lowered: LoweredGradient | LoweredGpuGradient, into: str | os.PathLike[str]) -> Path:
    """Link ``lowered`` and write its artifact, replacing the one that is in ``into``; return the directory.

    Raises `ArtifactError` where ``into`` holds anything but an artifact, `EngineError` when the library
    cannot be linked.
    """
    gradient, place = lowered.gradient, Path(into).resolve()
    require_replaceable(place)
    if isinstance(lowered.target, GpuTarget):
        files, name = gpu_files(lowered, gradient.layer.batch, gradient.kernel)
    else:
        files, name = _cpu_files(lowered)

    def fill(beside: Path) -> dict[str, Any]:
        for file, content in files.items():
            (beside / file).write_bytes(content)
        (beside / GOLDEN).write_bytes(archive(golden(gradient)))
        return _manifest(lowered, name)

    return publish(place, fill)


def _cpu_files(lowered: LoweredGradient) -> tuple[dict[str, bytes], str]:
    """Return the library and its header, and which of them is the library."""
    kernel, text = lowered.gradient.kernel, header(lowered.gradient)
    library = link(lowered.object_code, text, lowered.target, kernel=f"__tvm_ffi_{kernel}")
    name = library_name(library, lowered.target.system, kernel)
    return {name: library, f"{kernel}.h": text.encode()}, name


def _manifest(lowered: LoweredGradient | LoweredGpuGradient, library: str) -> dict[str, Any]:
    gradient = lowered.gradient
    itemsize = STORAGE[gradient.layer.dtype].itemsize
    shapes = {**gradient.operands, gradient.name: gradient.shape}
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": str(gradient.layer),
        "derivative": gradient.wrt,
        "target": lowered.target.fields(),
        "plan": asdict(lowered.plan),
        "packing": {},
        "depth": asdict(lowered.depth),
        "workspace_bytes": lowered.workspace_bytes,
        # of one batch element where the batch is dynamic
        "tensor_bytes": {name: itemsize * math.prod(n or 1 for n in shape) for name, shape in shapes.items()},
        "library": library,
        "weights": [],
        "versions": versions(),
        "files": {},
    }


def header(gradient: Gradient) -> str:
    """Return the C header of a derivative: what ``runtime.c`` is compiled with, and what a C host includes."""
    layer, operands = gradient.layer, gradient.operands
    c_type, code, bits = C_TYPES[layer.dtype]
    factor = next((name for name in operands if name in ("w", "x")), None)
    second, third = (name if name in operands else None for name in (factor, "y"))
    described = [f" *   {name:3} {c_shape(shape, comment=True)}" for name, shape in operands.items()]
    values = [
        f"element i of {name} is opcompile_golden(i, {SALTS[name]}, {amplitude(gradient, name)}) / 64.0"
        for name in operands
    ]
    return _HEADER.format(
        gradient=gradient,
        guard=gradient.name.upper(),
        name=gradient.name,
        layout=layer.layout,
        arguments=", ".join(("dy", second or "NULL", third or "NULL", gradient.name)),
        described="\n".join([*described, f" *   {gradient.name:3} {c_shape(gradient.shape, comment=True)}"]),
        batch="any, at least 1" if layer.batch is None else f"always {layer.batch}",
        c_type=c_type,
        code=code,
        bits=bits,
        first_shape=c_shape(operands["dy"]),
        second_shape=c_shape(operands[second] if second else (1,)),
        third_shape=c_shape(operands[third] if third else (1,)),
        result_shape=c_shape(gradient.shape),
        has_second=int(second is not None),
        has_third=int(third is not None),
        useful_threads=useful_threads(gradient),
        values=",\n * ".join(values),
    )


_HEADER = """\
/* A derivative of a transposed 3-D convolution, compiled:
 *   {gradient}
 *
 * The library beside this file needs the C library alone. Load it and call it so:
 *
 *   #include <dlfcn.h>
 *   void *library = dlopen("./conv_transpose3d_{name}-....so", RTLD_NOW | RTLD_LOCAL);
 *   opcompile_run_fn run = (opcompile_run_fn)dlsym(library, "opcompile_run");
 *   opcompile_error_fn error = (opcompile_error_fn)dlsym(library, "opcompile_error");
 *   if (run(0, batch, {arguments})) fprintf(stderr, "%s\\n", error());
 *
{described}
 *
 * Activations have layout {layout}; w and dw are canonical. The result shares no memory with the others.
 * All are contiguous arrays of opcompile_element, aligned as that type is. batch is N: {batch}.
 *
 * threads is the most that the call may use, the caller among them: 1 to 1024, or 0 for the variable
 * OPCOMPILE_NUM_THREADS (read when the library is loaded), and without that every CPU the process may
 * run on. Calls may come from several threads at once; a child process may call after a fork.
 * The result is 0, or something else, and then opcompile_error() says why, for the calling thread.
 */
#ifndef OPCOMPILE_CONV_TRANSPOSE3D_{guard}_H
#define OPCOMPILE_CONV_TRANSPOSE3D_{guard}_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

typedef {c_type} opcompile_element;

/* DLPack's description of the element type */
#define OPCOMPILE_DTYPE_CODE {code}
#define OPCOMPILE_DTYPE_BITS {bits}

/* of the four pointers, in the order of a call; a 0 is a batch that the call gives */
#define OPCOMPILE_X_SHAPE {first_shape}
#define OPCOMPILE_W_SHAPE {second_shape}
#define OPCOMPILE_B_SHAPE {third_shape}
#define OPCOMPILE_Y_SHAPE {result_shape}
#define OPCOMPILE_HAS_W {has_second}
#define OPCOMPILE_HAS_BIAS {has_third}
#define OPCOMPILE_NULLS "the pointers must be {arguments}, and null exactly where it says so"
#define OPCOMPILE_KERNEL __tvm_ffi_conv_transpose3d_{name}

/* More threads than this, for each batch element where N is open, would cost more than they bring. */
#define OPCOMPILE_USEFUL_THREADS {useful_threads}

#define OPCOMPILE_API __attribute__((visibility("default")))
OPCOMPILE_API int opcompile_run(int threads, int64_t batch, const void *first, const void *second, const void *third,
                                void *result);
OPCOMPILE_API const char *opcompile_error(void);
typedef int (*opcompile_run_fn)(int, int64_t, const void *, const void *, const void *, void *);
typedef const char *(*opcompile_error_fn)(void);

/* The operands of golden.npz:
 * {values}. */
static inline int32_t opcompile_golden(uint32_t i, uint32_t salt, uint32_t amplitude) {{
  uint32_t h = i + salt * 0x9E3779B9u;
  h ^= h >> 16;
  h *= 0x7FEB352Du;
  h ^= h >> 15;
  h *= 0x846CA68Bu;
  h ^= h >> 16;
  return (int32_t)(h % (2 * amplitude + 1)) - (int32_t)amplitude;
}}

#ifdef __cplusplus
}}
#endif
#endif
"""
