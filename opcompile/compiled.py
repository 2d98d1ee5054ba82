"""From a scheduled module to machine code of a CPU: TVM's own passes, and three that memory asks for.

TVM would take the sums of register tiles from the heap, where LLVM may keep them in registers only as long as nothing
else in the loop may touch memory; it would allocate a thread's workspaces anew for each task; and what LLVM puts on the
stack would begin anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.instrument import PassInstrument, pass_instrument
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline
from tvm_ffi import structural_map

from opcompile.elementary import by_polynomials
from opcompile.paths import scratch
from opcompile.target import Target
from schedules.imported import WITHOUT_LSR, importing
from schedules.statements import every, in_turn, with_turns

# All registers of AVX-512 hold half as much; derivatives have local rows of any length, which stay on the heap.
_MOST_ON_STACK = 4096
_PIPELINE = "opcompile"
# Where it is called, LLVM lays the whole frame at a cache line.
_ALIGNED_STACK = """
define void @opcompile_aligned_stack() alwaysinline {
  %line = alloca [64 x i8], align 64
  call void asm sideeffect "", "r"(ptr %line)
  ret void
}
"""


def compiled(
    module: tvm.IRModule, target: Mapping[str, Any], watching: Sequence[PassInstrument] = ()
) -> tvm.runtime.Executable:
    """Compile a module that is ready to be; its indices stay as wide as declared, where TVM would narrow them.

    What expressions have in common LLVM finds; TVM, looking for it before, took up to a third of the time.
    """
    if any(WITHOUT_LSR in (function.attrs or {}) for function in module.functions.values()):
        target = {**target, "cl-opt": [*target["cl-opt"], "-disable-lsr:bool=true"]}
    config = {**tvm.transform.PassContext.current().config, "tirx.disable_cse_tir": True}
    as_declared = tvm.transform.PassContext(
        config=config, disabled_pass=["tirx.NarrowDataType"], instruments=list(watching)
    )
    with as_declared, tvm.target.Target(target) as tvm_target:
        return tvm.compile(module, target=tvm_target, tir_pipeline=_PIPELINE)


def object_code(module: tvm.IRModule, target: Target) -> tuple[bytes, int]:
    """One relocatable object of one function for ``target``, and how many bytes a call allocates with one thread."""
    allocated = _Allocated()
    executable = compiled(module, target.tvm(), [allocated])
    with scratch() as folder:
        path = folder / "kernel.o"
        executable.mod.write_to_file(str(path), "o")
        return path.read_bytes(), allocated.count


def allocated_bytes(module: tvm.IRModule) -> int:
    """Bytes that the one function of ``module`` allocates with one thread, its buffers being compact."""
    (function,) = module.functions.values()
    allocations = every(tirx.AllocBuffer, function.body)
    return sum(_bytes(each.buffer) for each in allocations if each.buffer.scope() == "global")


def _bytes(buffer: tirx.Buffer) -> int:
    """Bytes of a buffer, with what its strides leave between two rows; 0 where an open batch is one of its sizes."""
    if not all(isinstance(n, tirx.IntImm) for n in buffer.shape):
        return 0
    shape, strides = ([int(n) for n in sizes] for sizes in (buffer.shape, buffer.strides))
    elements = shape[0] * strides[0] if strides else math.prod(shape)
    return elements * int(tvm.DataType(buffer.dtype).itemsize)


@pass_instrument
class _Allocated:
    """Counts `allocated_bytes` on the way: the pass that makes buffers compact is the longest of all."""

    count = 0

    def run_after_pass(self, module: tvm.IRModule, info: Any) -> None:
        if info.name == "s_tir.LowerOpaqueBlock":
            self.count = allocated_bytes(module)


def _sums_on_stack(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    def placed(allocation: tirx.AllocBuffer) -> tirx.AllocBuffer:
        buffer = allocation.buffer
        if buffer.scope() != "local":
            return allocation
        if math.prod(int(n) for n in buffer.shape) * tvm.DataType(buffer.dtype).itemsize > _MOST_ON_STACK:
            return allocation
        on_stack = {**allocation.annotations, "disable_lower_builtin": tirx.const(1, "int32")}
        return tirx.AllocBuffer(allocation.buffer, on_stack)

    return function.with_body(structural_map(function.body, (tirx.AllocBuffer, placed)))


def _workspaces_of_threads(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """Let a thread allocate before its first task what each of its tasks would allocate."""
    zero = tirx.const(0, "int32")

    def hoisted(loop: tirx.For) -> tirx.Stmt:
        if loop.kind != tirx.ForKind.PARALLEL or not isinstance(loop.body, tirx.SeqStmt):
            return loop
        workspaces = [i for i, each in enumerate(loop.body.seq) if _is_workspace(each)]
        if not workspaces:
            return loop
        of_task = [each for i, each in enumerate(loop.body.seq) if i not in workspaces]
        tasks = with_turns(loop, in_turn(of_task))
        of_thread = in_turn([*(loop.body.seq[i] for i in workspaces), tasks])
        return tirx.AttrStmt(zero, "pragma_parallel_launch_point", zero, of_thread)

    return function.with_body(structural_map(function.body, (tirx.For, hoisted)))


def _aligned_stack(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """Lay what a thread has on the stack at a cache line.

    The stack of a thread begins at any multiple of 16 bytes, and LLVM finds too late that it keeps vectors there: three
    of four processes would have each of them in two cache lines.
    """

    def aligned(loop: tirx.For) -> tirx.For:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        call = tirx.Evaluate(tirx.call_extern("void", "opcompile_aligned_stack"))
        return with_turns(loop, tirx.SeqStmt([call, loop.body]))

    return function.with_body(importing(structural_map(function.body, (tirx.For, aligned)), _ALIGNED_STACK))


def _is_workspace(statement: tirx.Stmt) -> bool:
    return isinstance(statement, tirx.AllocBuffer) and statement.buffer.scope() == "global"


def _pipeline() -> tuple[Any, Any, Any]:
    passes, of_host, of_device = get_tir_pipeline("s_tir")
    ours = (_sums_on_stack, _workspaces_of_threads, _aligned_stack, by_polynomials)
    after = [tirx.transform.prim_func_pass(each, opt_level=0) for each in ours]
    return tvm.transform.Sequential([passes, *after]), of_host, of_device


register_tir_pipeline(_PIPELINE, _pipeline)
