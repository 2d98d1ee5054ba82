"""Models in TVM's own runtime with our functions in them compute what ONNX Runtime computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import helper, numpy_helper
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

from opcompile.importers.onnx import explicit
from opcompile.lower import choose
from opcompile.relax import ReplaceConvTranspose3d, tvm_target
from opcompile.target import target
from tests.onnx_engine import integers, model_of, value
from tests.replaced import MODELS, run, saved, upsampling


def built(model: onnx.ModelProto, folder: Path) -> tuple[ReplaceConvTranspose3d, Any]:
    """Import, replace, compile, export and load; return the pass and the model's function."""
    replacing = ReplaceConvTranspose3d("llvm", "baseline")
    module = replacing(from_onnx(model, keep_params_in_input=False))
    tvm.compile(module, target=tvm_target()).export_library(str(folder / "model.so"))
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(folder / "model.so")), tvm.cpu())

    def call(x: np.ndarray) -> list[np.ndarray]:
        y = machine["main"](tvm.runtime.tensor(x))
        return [part.numpy() for part in (y if hasattr(y, "__len__") and not hasattr(y, "numpy") else [y])]

    return replacing, call


def specs(replacing: ReplaceConvTranspose3d) -> list[str]:
    return [str(spec) for spec in replacing.replaced]


def test_a_small_model_with_everything(tmp_path: Path) -> None:
    """A bias and an activation are fused, an output_shape is kept, integers are equal to the bit."""
    after = [helper.make_node("Relu", ["up"], ["r"]),
             helper.make_node("ConvTranspose", ["r", "v"], ["s"], strides=[2, 2, 2], output_shape=[11, 16, 19]),
             helper.make_node("Abs", ["s"], ["t"]), helper.make_node("Add", ["s", "t"], ["y"])]  # fmt: skip
    model = upsampling(after=after, constants={"v": integers((6, 2, 2, 2, 2), 5)})
    model.graph.output[0].CopyFrom(value("y", (1, 2, 11, 16, 19)))
    path = saved(model, tmp_path)
    replacing, call = built(explicit(path), tmp_path)
    assert [text.split(" d=")[1] for text in specs(replacing)] == [
        "1 g=1 bias=1 act=relu dtype=float32 layout=NCDHW",
        "1 g=1 bias=0 act=none dtype=float32 layout=NCDHW",
    ]
    assert replacing.kept == []
    x = integers((1, 4, 3, 4, 5))
    assert np.array_equal(call(x)[0], run(path, x))


def test_weights_that_arrive_at_run_time(tmp_path: Path) -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2, 2])
    held = [helper.make_node("Add", ["v", "v"], ["w"]), node]
    v = integers((4, 5, 3, 3, 3))
    model = model_of(held, [value("x", (1, 4, 3, 4, 5)), value("v", v.shape)], [value("y", (1, 5, 7, 9, 11))], opset=20)
    replacing = ReplaceConvTranspose3d("llvm", "baseline")
    module = replacing(from_onnx(model))
    assert len(replacing.replaced) == 1
    machine = relax.VirtualMachine(tvm.compile(module, target=tvm_target()), tvm.cpu())
    x = integers((1, 4, 3, 4, 5), 1)
    y = machine["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(v)).numpy()
    constant = model_of([node], [value("x", x.shape)], [value("y", None)], opset=20,
                        initializers=[numpy_helper.from_array(v + v, "w")])  # fmt: skip
    assert np.array_equal(y, run(constant, x))


def test_a_large_y_is_streamed(tmp_path: Path) -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2, 2])
    x = integers((1, 1, 32, 128, 128), 1)
    model = model_of([node], [value("x", x.shape)], [value("y", (1, 2, 64, 256, 256))], opset=20,
                     initializers=[numpy_helper.from_array(integers((1, 2, 2, 2, 2), 5), "w")])  # fmt: skip
    path = saved(model, tmp_path)
    replacing, call = built(explicit(path), tmp_path)
    (spec,) = replacing.replaced
    assert choose(spec, target("llvm"), "baseline")[0].store == "streamed"
    assert np.array_equal(call(x)[0], run(path, x))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["dynunet", "dynunet_dynamic_batch", "unet", "vqvae"])
def test_real_models(name: str, tmp_path: Path) -> None:
    """Hold the model in TVM against ONNX Runtime; how far two right answers may be apart, a perturbation says."""
    from opcompile.replace.prove import _distance
    from opcompile.replace.rewrite import perturbed
    from opcompile.replace.sessions import Session
    from opcompile.replace.survey import survey

    path = MODELS / f"{name}.onnx"
    replacing, call = built(explicit(path), tmp_path)
    stock = Session(path)
    assert len(replacing.replaced) == len(survey(path)[1])
    model, nodes = survey(path)
    perturbed(model, nodes)
    spread = Session(model.proto.SerializeToString())
    shape = [n if isinstance(n, int) else 1 for n in stock.inputs["x"][1]]
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    right, moved = stock({"x": x}), spread({"x": x})
    for y, output in zip(call(x), stock.outputs, strict=True):
        # every other operator is TVM's here, with errors of its own: of the order of ours, or of the last place
        bound = 2 * _distance(moved[output], right[output]) + 2**-18 * float(np.abs(right[output]).max())
        assert _distance(y, right[output]) <= bound
