"""Models that nobody would export: a clear refusal, or what ONNX Runtime computes. Never a crash."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import opcompile
from opcompile.errors import OpcompileError
from opcompile.replace.sessions import Session
from tests.onnx_engine import integers, model_of, value
from tests.replaced import run, saved, upsampling

# the heavy part of the checks asks for more
pytestmark = pytest.mark.heavy

EXAMPLES = int(os.environ.get("OPCOMPILE_TEST_EXAMPLES", "60"))

# from here on it refuses all of what is `unsound`
HARDENED = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Replace a small model in both modes."""
    place = tmp_path_factory.mktemp("fuzz")
    path = saved(upsampling(), place)
    for mode in ("override", "rewrite"):
        opcompile.replace(path, place / mode, mode=mode, plan="baseline", verify=False, measure=False)  # type: ignore[arg-type]
    return place


def answer(model: onnx.ModelProto, x: np.ndarray, library: Path | None = None) -> np.ndarray | None:
    """Return the output; None where ONNX Runtime refuses."""
    try:
        return run(model, x, library)
    except OpcompileError:
        return None


def unsound(model: onnx.ModelProto, x: np.ndarray) -> bool:
    """Whether ONNX Runtime, before it was hardened, reads past the end of something: its answer is then chance.

    These are lists of another length than X has axes, a bias that has not one value a channel, sizes below one,
    and in 2-D an output that ends a stride or more behind the last tap: the kernel there works back from the
    output to how many columns it reads. In 1-D and 3-D it goes by X.
    """
    (node,) = model.graph.node
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    axes, kernel, group = x.ndim - 2, shapes["w"][2:], attributes["group"]

    def of(name: str, otherwise: int) -> list[int]:
        return list(attributes.get(name, [otherwise] * axes))

    counts = dict.fromkeys(("strides", "dilations", "output_padding", "kernel_shape"), (axes,))
    counts |= {"pads": (2 * axes,), "output_shape": (axes, axes + 2)}
    if any(len(attributes[name]) not in right for name, right in counts.items() if name in attributes):
        return True
    if shapes.get("b", (shapes["w"][1] * group,)) != (shapes["w"][1] * group,):
        return True
    strides, dilations, padding = of("strides", 1), of("dilations", 1), of("output_padding", 0)
    if min(*strides, *dilations, group) < 1 or min(padding) < 0:
        return True
    for size, k, stride, dilation, more, out in zip(
        x.shape[2:], kernel, strides, dilations, padding, of("output_shape", 0)[-axes:], strict=True
    ):
        behind_last_tap = (size - 1) * stride + dilation * (k - 1) + 1
        if axes == 2 and max(behind_last_tap + more, out) - behind_last_tap >= stride:
            return True
    return False


def lists(least: int, most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(least, most), min_size=2, max_size=4)


@st.composite
def nodes(draw: Any) -> tuple[onnx.ModelProto, np.ndarray]:
    """Draw a node whose attributes may contradict each other, its input and its weight; some begin as `upsampling`."""
    axes = draw(st.sampled_from([1, 2, 3, 3, 3]))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    size = [draw(st.integers(1, 4)) for _ in range(axes)]
    channels, group = draw(st.sampled_from([(4, 1), (4, 2), (4, 3), (3, 3)]))
    x, w = (1, channels, *size), (draw(st.sampled_from([channels, channels, 5])), 2, *kernel)
    attributes: dict[str, Any] = {}
    if draw(st.sampled_from([True, False, False])):
        axes, kernel, group, attributes = 3, [2, 2, 2], 1, {"strides": [2, 2, 2]}
        x, w = (1, 4, 3, 4, 5), (4, 6, 2, 2, 2)

    def right(values: st.SearchStrategy[int], count: int = axes) -> st.SearchStrategy[list[int]]:
        return st.lists(values, min_size=count, max_size=count)

    choices: dict[str, st.SearchStrategy[Any]] = {
        "strides": right(st.integers(1, 3)) | lists(0, 3),
        "dilations": right(st.integers(1, 2)) | lists(0, 2),
        "pads": right(st.integers(0, 2), 2 * axes) | lists(0, 2),
        "output_padding": right(st.integers(0, 2)) | lists(-1, 2),
        "output_shape": right(st.integers(1, 9)) | lists(1, 9),
        "kernel_shape": st.just(kernel) | right(st.integers(1, 3)),
        "auto_pad": st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER", "SOME"]),
        "group": st.just(group),
    }
    names = draw(st.sets(st.sampled_from(sorted(set(choices) - {"group"}))))
    attributes |= {name: draw(choices[name]) for name in [*sorted(names), "group"]}
    bias = draw(st.sampled_from([None, w[1] * group, 1]))
    held = {"w": integers(w, 1)} | ({} if bias is None else {"b": integers((bias,), 2)})
    node = helper.make_node("ConvTranspose", ["x", *held], ["y"], **attributes)
    initializers = [numpy_helper.from_array(array, name) for name, array in held.items()]
    shape = x if draw(st.booleans()) else [f"d{i}" for i in range(len(x))]
    model = model_of([node], [value("x", shape)], [value("y", None)], initializers=initializers, opset=17)
    return model, integers(x)


@settings(max_examples=EXAMPLES)
@given(nodes())
def test_override_answers_as_onnxruntime_or_refuses_as_it_does(folder: Path, drawn: Any) -> None:
    model, x = drawn
    ours = answer(model, x, folder / "override" / "opcompile_ops.so")
    if unsound(model, x):
        assert ours is None
        assert not HARDENED or answer(model, x) is None
        return
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "output_shape":  # N and C before the sizes: once allowed, now refused, never by ours
            attribute.ints[:] = attribute.ints[2 - x.ndim :]
    right = answer(model, x)
    assert (right is None) == (ours is None)
    assert right is None or np.array_equal(right, ours)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_rewritten_models_that_were_damaged(folder: Path, data: Any) -> None:
    model = onnx.load(folder / "rewrite" / "model.onnx")
    library = folder / "rewrite" / "opcompile_ops.so"
    x = integers((1, 4, 3, 4, 5))
    right = answer(model, x, library)
    node = next(n for n in model.graph.node if n.domain.startswith("opcompile"))
    damaged = node.input[data.draw(st.sampled_from([1, 2]))]
    tensor = next(t for t in model.graph.initializer if t.name == damaged)
    match data.draw(st.sampled_from(["data", "sizes", "type", "inputs", "attributes", "input"])):
        case "data":
            tensor.raw_data = tensor.raw_data[: data.draw(st.integers(0, len(tensor.raw_data)))]
        case "sizes":
            tensor.dims[:] = data.draw(st.permutations(list(tensor.dims)))
        case "type":
            tensor.data_type = data.draw(st.sampled_from([onnx.TensorProto.INT32, onnx.TensorProto.DOUBLE]))
        case "inputs":
            node.input[:] = data.draw(st.lists(st.sampled_from([*node.input, ""]), max_size=5))
        case "attributes":
            del node.attribute[:]
        case "input":
            x = integers(tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))))
            model.graph.input[0].CopyFrom(value("x", None))
    y = answer(model, x, library)
    assert y is None or x.shape != (1, 4, 3, 4, 5) or np.array_equal(y, right)


@settings(max_examples=max(3, EXAMPLES // 20))
@given(nodes())
def test_replacing_refuses_or_is_right(drawn: Any) -> None:
    """On integers the two must be equal to the bit."""
    model, x = drawn
    with tempfile.TemporaryDirectory() as name:
        path = saved(model, Path(name))
        try:
            report = opcompile.replace(path, Path(name) / "out", plan="baseline", verify=False, measure=False)
        except OpcompileError:
            return
        if unsound(model, x) and not HARDENED:
            assert not report.replaced
            return
        right = answer(model, x)
        library = Path(name) / "out" / "opcompile_ops.so"
        edited = Path(name) / "out" / "model.onnx"
        try:
            y = Session(edited, library if report.library else None)({"x": x})["y"]
        except OpcompileError:
            assert right is None
            return
        # what ONNX Runtime refuses (output_padding from the stride on) a kernel may well compute
        assert right is None or np.array_equal(y, right)
