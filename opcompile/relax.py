"""A pass for TVM's own runtime: Relax's ``nn.conv3d_transpose`` becomes our scheduled functions.

A model imported by ``relax.frontend.onnx`` or ``relax.frontend.torch`` becomes one library with our kernels in
it. The bias and the activation behind a layer go into its kernel where nobody else reads what is between them;
constant weights are packed while compiling. TVM's importer of ONNX models ignores ``output_shape``: let
`opcompile.importers.onnx.explicit` write the paddings out first.

    mod = from_onnx(explicit("model.onnx"), keep_params_in_input=False)
    mod = ReplaceConvTranspose3d("llvm")(mod)
    tvm.compile(mod, target=tvm_target("llvm")).export_library("model.so")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from opcompile.elementary import by_exponentials
from opcompile.errors import SpecError
from opcompile.lower import KERNEL, PlanName, choose, packing, scheduled
from opcompile.packing import Packing
from opcompile.spec import DTYPES, Activation, Axis, ConvTranspose3d
from opcompile.target import Target
from opcompile.target import target as named

_OPERATOR = "relax.nn.conv3d_transpose"
_ACTIVATIONS = {
    "relax.nn.relu": "relu",
    "relax.nn.leakyrelu": "leaky_relu",
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.silu": "silu",
    "relax.sigmoid": "sigmoid",
    "relax.tanh": "tanh",
}
# TVM's kind of a function that is not to be fused with others.
_OPAQUE = 8


def tvm_target(name: str = "llvm") -> tvm.target.Target:
    """Return the target to compile the whole module for, by one of our names. Raises `TargetError`."""
    return tvm.target.Target(named(name).tvm())


@tvm.transform.module_pass(opt_level=0, name="ReplaceConvTranspose3d")
class ReplaceConvTranspose3d:
    """Replace every ``nn.conv3d_transpose`` that can be compiled; what cannot, TVM compiles as ever.

    Layouts NCDHW and IODHW; every size but the batch must be known. ``replaced`` holds the specs afterwards,
    ``kept`` the reasons why others stay. Raises `TargetError` for an unknown target.
    """

    def __init__(self, target: str = "llvm", plan: PlanName = "best") -> None:
        """Choose for which machine and by which plan (see `opcompile.lower.lower`) to schedule."""
        self.target, self.plan = named(target), plan
        self.replaced: list[ConvTranspose3d] = []
        self.kept: list[str] = []

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        """Return the module with our functions in it."""
        rewriter = _Rewriter(mod, self.target, self.plan)
        for variable, function in mod.functions_items():
            if isinstance(function, relax.Function):
                rewriter.rewrite(variable, function)
        self.replaced += rewriter.replaced
        self.kept += rewriter.kept
        return relax.transform.DeadCodeElimination()(rewriter.builder_.get())


# --- what is there ---


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """One layer: ``root`` is the last call of it, whose value the kernel computes."""

    root: relax.Call
    spec: ConvTranspose3d
    x: relax.Expr
    w: relax.Expr
    b: relax.Expr | None


def _layers(function: relax.Function, kept: list[str]) -> Iterator[_Layer]:
    """Find the layers of a function, each with what is fused into it."""
    bindings = [b for block in function.body.blocks for b in block.bindings if isinstance(b, relax.VarBinding)]
    values = {b.var: b.value for b in bindings}
    readers: dict[relax.Var, list[tuple[relax.Var, relax.Call]]] = {}
    counts: Counter[relax.Var] = Counter()
    for binding in bindings:
        used: list[relax.Var] = []
        relax.analysis.post_order_visit(binding.value, lambda e, u=used: u.append(e) if isinstance(e, relax.Var) else 0)
        counts.update(used)
        if isinstance(binding.value, relax.Call):
            for variable in set(used):
                readers.setdefault(variable, []).append((binding.var, binding.value))
    if isinstance(function.body.body, relax.Var):
        counts[function.body.body] += 1

    def only_reader(variable: relax.Var) -> tuple[relax.Var, relax.Call] | None:
        return readers[variable][0] if counts[variable] == 1 and variable in readers else None

    for binding in bindings:
        call = binding.value
        if _operator(call) != _OPERATOR:
            continue
        try:
            spec = _spec(call)
        except SpecError as error:
            kept.append(f"{binding.var.name_hint}: {error}")
            continue
        root, last, b = call, binding.var, None
        following = only_reader(last)
        if following and (b := _bias(following[1], last, values, spec)) is not None:
            last, root = following
            spec = replace(spec, bias=True)
            following = only_reader(last)
        if following and _operator(following[1]) in _ACTIVATIONS:
            root = following[1]
            spec = replace(spec, activation=_activation(root))
        yield _Layer(root, spec, call.args[0], call.args[1], b)


def _operator(value: Any) -> str | None:
    return str(value.op.name) if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) else None


def _activation(call: relax.Call) -> Activation:
    name = _ACTIVATIONS[str(call.op.name)]
    return Activation(name, (float(call.attrs.alpha),)) if name == "leaky_relu" else Activation(name)


def _spec(call: relax.Call) -> ConvTranspose3d:
    """Read the layer itself, without bias. Raises `SpecError` with the reason why it stays with TVM."""
    attributes, (x, w) = call.attrs, (argument.ty for argument in call.args)
    layouts = (attributes.data_layout, attributes.kernel_layout, attributes.out_layout or attributes.data_layout)
    if layouts != ("NCDHW", "IODHW", "NCDHW"):
        raise SpecError(f"its layouts are {layouts}, and only NCDHW with IODHW is replaced")
    if x.shape is None or w.shape is None or attributes.out_dtype not in (None, "", "void", str(x.dtype)):
        raise SpecError("its shapes are not known, or its result has another dtype")
    if str(x.dtype) not in DTYPES or str(w.dtype) != str(x.dtype):
        raise SpecError(f"its dtypes are {x.dtype} and {w.dtype}")
    (batch, channels, *sizes), (_, per_group, *kernel) = (tuple(map(_size, t.shape)) for t in (x, w))
    if channels is None or per_group is None or None in (*sizes, *kernel):
        raise SpecError("only its batch may be open")
    begin, end = list(attributes.padding)[:3], list(attributes.padding)[3:]
    rows = zip(
        sizes, kernel, attributes.strides, attributes.dilation, begin, end, attributes.output_padding, strict=True
    )
    axes = [Axis(n, k, int(s), int(d), (int(p), int(q)), int(o)) for n, k, s, d, p, q, o in rows]
    groups = int(attributes.groups)
    return ConvTranspose3d(
        batch, channels, per_group * groups, (axes[0], axes[1], axes[2]), groups, False, dtype=str(x.dtype)
    )


def _size(size: Any) -> int | None:
    return int(size) if isinstance(size, tvm.tirx.IntImm) else None


def _bias(
    call: relax.Call, layer: relax.Var, values: dict[relax.Var, relax.Expr], spec: ConvTranspose3d
) -> relax.Expr | None:
    """Return ``(M,)`` values that ``call`` adds to the layer's channels; None where it does anything else."""
    if _operator(call) != "relax.add":
        return None
    others = [argument for argument in call.args if not argument.same_as(layer)]
    if len(others) != 1:
        return None
    (other,) = others
    shape = other.ty.shape
    if shape is None or [_size(n) for n in shape] not in (
        [1, spec.channels_out, 1, 1, 1],
        [spec.channels_out, 1, 1, 1],
    ):
        return None
    if str(other.ty.dtype) != spec.dtype:
        return None
    if isinstance(other, tvm.ir.GenericConst):
        return relax.const(other.value.numpy().reshape(-1), spec.dtype)
    made = values.get(other)
    if (
        made is not None
        and _operator(made) == "relax.reshape"
        and [_size(n) for n in made.args[0].ty.shape] == [spec.channels_out]
    ):
        return made.args[0]
    return relax.op.reshape(other, (spec.channels_out,))


# --- what becomes of it ---


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]
    """Put calls of our functions where the layers were."""

    def __init__(self, mod: tvm.IRModule, target: Target, plan: PlanName) -> None:
        super().__init__(mod)
        self.target, self.plan = target, plan
        self.layers: list[_Layer] = []
        self.replaced: list[ConvTranspose3d] = []
        self.kept: list[str] = []
        self.functions: dict[ConvTranspose3d, tuple[Any, Packing]] = {}

    def rewrite(self, variable: Any, function: relax.Function) -> None:
        """Rewrite one function of the module."""
        self.layers = list(_layers(function, self.kept))
        if self.layers:
            self.builder_.update_func(variable, self.visit_expr(function))

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        """Return a call of our function for the last call of a layer."""
        layer = next((layer for layer in self.layers if layer.root.same_as(call)), None)
        if layer is None:
            return super().visit_call_(call)
        spec = layer.spec
        function, packed = self._function(spec)
        x, w = self.visit_expr(layer.x), self._packed(self.visit_expr(layer.w), spec, packed)
        given = [x, w] if layer.b is None else [x, w, self.builder_.emit(self.visit_expr(layer.b))]
        y = [layer.x.ty.shape[0], *spec.y_shape[1:]]
        self.replaced.append(spec)
        return relax.call_tir(function, given, out_ty=relax.TensorType(y, spec.dtype))

    def _function(self, spec: ConvTranspose3d) -> tuple[Any, Packing]:
        if spec not in self.functions:
            tiles, _ = choose(spec, self.target, self.plan)
            function = scheduled(spec, tiles)[KERNEL].without_attr("global_symbol")
            function = function.with_body(by_exponentials(function.body))
            function = function.with_attr({"tirx.is_scheduled": True, "op_pattern": _OPAQUE})
            self.functions[spec] = self.builder_.add_func(function, f"opcompile_{KERNEL}"), packing(spec, tiles)
        return self.functions[spec]

    def _packed(self, w: relax.Expr, spec: ConvTranspose3d, packed: Packing) -> relax.Expr:
        """Pack a constant now, and anything else where the model runs."""
        if isinstance(w, tvm.ir.GenericConst):
            return relax.const(packed(np.asarray(w.value.numpy())), spec.dtype)
        missing = [n for size, whole in zip(spec.w_shape, packed.padded, strict=True) for n in (0, whole - size)]
        if any(missing):
            w = self.builder_.emit(relax.op.nn.pad(w, missing))
        w = self.builder_.emit(relax.op.reshape(w, packed.view))
        return self.builder_.emit(relax.op.permute_dims(w, packed.order))
