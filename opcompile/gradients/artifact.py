"""A compiled derivative as a directory: what `opcompile.artifact` writes for the layer, under other names.

The library and the header are called ``conv_transpose3d_dx`` (``_dw``, ``_db``), as the kernel inside is,
and the manifest says which derivative it is. For a GPU there are the kernel's text and its launch instead of
the header. There are no packed weights: those that are trained change with each call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opcompile.artifact import archive, manifest_of, publish
from opcompile.artifact_gpu import gpu_files, library_name
from opcompile.atomic import require_replaceable
from opcompile.gpus import GpuTarget
from opcompile.gradients.golden import SALTS, amplitude, golden
from opcompile.gradients.gradient import Gradient
from opcompile.header import c_code, useful_threads
from opcompile.link import link
from opcompile.manifest import GOLDEN
from opcompile.tensors import sizes_text

if TYPE_CHECKING:
    from opcompile.gradients.lower import LoweredGradient
    from opcompile.gradients.lower_gpu import LoweredGpuGradient


def write(
    lowered: LoweredGradient | LoweredGpuGradient,
    into: str | os.PathLike[str],
    *,
    replacing: Callable[[], None] | None = None,
) -> Path:
    """Link ``lowered`` and write its artifact, replacing the one that is in ``into``; return the directory.

    ``replacing`` is called when all is written, before it takes its place. Raises `ArtifactError` where ``into``
    holds anything but an artifact, `EngineError` when the library cannot be linked.
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
        shapes = {**gradient.operands, gradient.name: gradient.shape}
        depth = asdict(lowered.depth)
        return manifest_of(lowered, gradient.layer, shapes, name, derivative=gradient.wrt, depth=depth)

    return publish(place, fill, replacing)


def _cpu_files(lowered: LoweredGradient) -> tuple[dict[str, bytes], str]:
    """Return the library and its header, and which of them is the library."""
    kernel, text = lowered.gradient.kernel, header(lowered.gradient)
    library = link(lowered.object_code, text, lowered.target, kernel=f"__tvm_ffi_{kernel}")
    name = library_name(library, lowered.target.system, kernel)
    return {name: library, f"{kernel}.h": text.encode()}, name


def header(gradient: Gradient) -> str:
    """Return the C header of a derivative: what ``layer.c`` is compiled with, and what a C host includes."""
    layer, operands = gradient.layer, gradient.operands
    pointers = (*gradient.pointers, gradient.name)
    described = [f" *   {name:3} {sizes_text(shape)}" for name, shape in operands.items()]
    values = [
        f"element i of {name} is opcompile_golden(i, {SALTS[name]}, {amplitude(gradient, name)}) / 64.0"
        for name in operands
    ]
    about = _ABOUT.format(
        gradient=gradient,
        name=gradient.name,
        layout=layer.layout,
        arguments=", ".join(name or "NULL" for name in pointers),
        described="\n".join([*described, f" *   {gradient.name:3} {sizes_text(gradient.shape)}"]),
        batch="any, at least 1" if layer.batch is None else f"always {layer.batch}",
        values=",\n * ".join(values),
    )
    shapes = {**operands, gradient.name: gradient.shape}
    kernel = f"__tvm_ffi_{gradient.kernel}"
    return about + c_code(layer.dtype, shapes, pointers, kernel, useful_threads(gradient))


_ABOUT = """\
/* A derivative of a transposed 3-D convolution, compiled:
 *   {gradient}
 *
 * The library beside this file needs the C library alone. Load it and call it so:
 *
 *   #include <dlfcn.h>
 *   void *library = dlopen("./conv_transpose3d_{name}-....so", RTLD_NOW | RTLD_LOCAL);
 *   opcompile_run_fn run;
 *   opcompile_error_fn error;
 *   *(void **)&run = dlsym(library, "opcompile_run");
 *   *(void **)&error = dlsym(library, "opcompile_error");
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
 *
 * The operands of golden.npz:
 * {values}.
 */
"""
