"""Other systems' words, read without them: documented examples, wrong calls, orders of weights, files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import arrays, specs

from opcompile.errors import ModelError, OpcompileError, SpecError, WordsError
from opcompile.importers import files, jax, keras, lucid, mlx, rmlx, tensorflow, torch
from opcompile.importers import onnx as onnx_words
from opcompile.importers.imported import Found, Imported, WeightOrder, array
from opcompile.reference import reference
from opcompile.spec import Activation, ConvTranspose3d, at_batch

# --- documented examples ---

X, V, W = (1, 4, 8, 8, 8), (1, 8, 8, 8, 4), (4, 2, 3, 3, 3)
DOCUMENTED: list[tuple[str, Callable[[], Imported], tuple[int, ...]]] = [
    (
        "PyTorch's functional page",
        lambda: torch.conv_transpose3d((20, 16, 50, 10, 20), (16, 33, 3, 3, 3)),
        (20, 33, 52, 12, 22),
    ),
    (
        "PyTorch's module page, square",
        lambda: torch.ConvTranspose3d(16, 33, 3, stride=2, input=(20, 16, 10, 50, 100)),
        (20, 33, 21, 101, 201),
    ),
    (
        "PyTorch's module page, not square",
        lambda: torch.ConvTranspose3d(16, 33, (3, 5, 2), (2, 1, 1), (0, 4, 2), input=(20, 16, 10, 50, 100)),
        (20, 33, 21, 46, 97),
    ),
    (
        "PyTorch's output_size",
        lambda: torch.ConvTranspose3d(16, 16, 3, 2, 1, input=(1, 16, 6, 6, 6), output_size=(12, 12, 12)),
        (1, 16, 12, 12, 12),
    ),
    (
        "Keras's example",
        lambda: keras.Conv3DTranspose(32, 2, 2, activation="relu", input=(4, 10, 8, 12, 128)),
        (4, 20, 16, 24, 32),
    ),
    (
        "R keras3's example",
        lambda: keras.layer_conv_3d_transpose((4, 10, 8, 12, 128), 32.0, 2.0, 2.0, activation="relu"),
        (4, 20, 16, 24, 32),
    ),
    ("Rmlx's test", lambda: rmlx.mlx_conv_transpose3d((1, 2, 2, 2, 3), (4, 2, 2, 2, 3)), (1, 3, 3, 3, 4)),
    (
        "Rmlx's test, stride",
        lambda: rmlx.mlx_conv_transpose3d((1, 2, 2, 2, 3), (4, 2, 2, 2, 3), stride=[2.0, 2.0, 2.0]),
        (1, 4, 4, 4, 4),
    ),
    (
        "Rmlx's test, output_padding beyond the stride",
        lambda: rmlx.mlx_conv_transpose3d((1, 2, 2, 2, 3), (4, 2, 2, 2, 3), output_padding=[1, 1, 1]),
        (1, 4, 4, 4, 4),
    ),
    ("Lucid's upsampling", lambda: lucid.ConvTranspose3d(4, 2, 3, 2, 1, 1, input=X), (1, 2, 16, 16, 16)),
    ("Lucid's decoder", lambda: lucid.ConvTranspose3d(8, 4, 4, 2, 1, input=(2, 8, 4, 4, 4)), (2, 4, 8, 8, 8)),
    ("Lucid's functional", lambda: lucid.conv_transpose3d((1,) * 5, (1, 1, 2, 2, 2), (1,)), (1, 1, 2, 2, 2)),
    # its page says (1, 1, 3, 3, 3), against its own formula and its code
    ("Lucid's stride", lambda: lucid.conv_transpose3d((1,) * 5, (1, 1, 2, 2, 2), (1,), 2), (1, 1, 2, 2, 2)),
    (
        "Lucid's groups",
        lambda: lucid.conv_transpose3d((1, 2, 1, 1, 1), (2, 1, 1, 1, 1), (2,), groups=2),
        (1, 2, 1, 1, 1),
    ),
    ("Lucid 2's same", lambda: lucid.ConvTranspose3d(4, 2, 3, 2, "same", input=X), (1, 2, 15, 15, 15)),
    ("Lucid 2's same, k4", lambda: lucid.ConvTranspose3d(4, 2, 4, 2, "same", input=X), (1, 2, 16, 16, 16)),
    ("Lucid 2's same, d2", lambda: lucid.ConvTranspose3d(4, 2, 3, 1, "same", 0, 2, input=X), (1, 2, 8, 8, 8)),
    ("Lucid 2's valid", lambda: lucid.ConvTranspose3d(4, 2, 3, 2, "valid", input=X), (1, 2, 17, 17, 17)),
    (
        "TensorFlow, SAME",
        lambda: tensorflow.conv3d_transpose((1, 3, 3, 3, 4), (3, 3, 3, 2, 4), (1, 6, 5, 6, 2), 2),
        (1, 6, 5, 6, 2),
    ),
    ("JAX, SAME", lambda: jax.conv_transpose((1, 3, 4, 5, 4), (3, 3, 3, 4, 2), (2, 2, 2), "SAME"), (1, 6, 8, 10, 2)),
    ("MLX's module", lambda: mlx.ConvTranspose3d(4, 2, 3, 2, 1, 1, 1, input=(1, 3, 3, 3, 4)), (1, 6, 6, 6, 2)),
]


@pytest.mark.parametrize(("read", "shape"), [row[1:] for row in DOCUMENTED], ids=[row[0] for row in DOCUMENTED])
def test_a_documented_example_gives_its_shape(read: Callable[[], Imported], shape: tuple[int, ...]) -> None:
    layer = read()
    y = layer.from_y(np.zeros(at_batch(layer.spec.y_shape, 1)))
    assert y.shape == shape


PLACES = [
    # the two traps: Keras and TensorFlow begin one voxel before PyTorch; even kernels agree
    (lambda: keras.Conv3DTranspose(2, 3, 2, "same", input=V), 0, 16),
    (lambda: torch.conv_transpose3d(X, W, stride=2, padding=1, output_padding=1), 1, 16),
    (lambda: keras.Conv3DTranspose(2, 4, 2, "same", input=V), 1, 16),
    (lambda: keras.Conv3DTranspose(2, 4, 1, "same", input=V), 1, 8),
    (lambda: tensorflow.conv3d_transpose(V, (5, 5, 5, 2, 4), (1, 16, 16, 16, 2), 2), 1, 16),
    (lambda: tensorflow.conv3d_transpose(V, (5, 5, 5, 2, 4), (1, 15, 15, 15, 2), 2), 2, 15),
    (lambda: jax.conv_transpose(V, (5, 5, 5, 4, 2), (3, 3, 3), "SAME"), 1, 24),
    (lambda: jax.conv_transpose(V, (5, 5, 5, 4, 2), (3, 3, 3), "VALID"), 0, 26),
    (lambda: jax.conv_transpose(V, (5, 5, 5, 4, 2), (3, 3, 3), [(1, 2)] * 3, use_consistent_padding=True), 1, 23),
    # MLX slices its input where its padding exceeds dilation*(kernel-1)
    (lambda: mlx.conv_transpose3d(V, (2, 1, 1, 1, 4), 3, 1), 3, 16),
]


@pytest.mark.parametrize(("read", "begin", "out"), PLACES)
def test_where_an_output_begins(read: Callable[[], Imported], begin: int, out: int) -> None:
    assert read().place == ((begin,) * 3, (out,) * 3)


def test_an_unbatched_input_gives_an_unbatched_output() -> None:
    layer = torch.conv_transpose3d((4, 3, 3, 3), W)
    assert layer.spec.batch == 1
    assert layer.to_x(np.zeros((4, 3, 3, 3))).shape == (1, 4, 3, 3, 3)
    assert layer.from_y(np.zeros((1, 2, 5, 5, 5))).shape == (2, 5, 5, 5)


def test_channels_last_3d_is_ndhwc_in_memory() -> None:
    layer = torch.channels_last(torch.conv_transpose3d((None, 4, 3, 3, 3), W))
    assert layer.spec.layout == "NDHWC"
    assert layer.spec.x_shape == (None, 3, 3, 3, 4)
    assert layer.to_x(np.zeros((2, 4, 3, 3, 3))).shape == (2, 3, 3, 3, 4)
    assert layer.from_y(np.zeros((2, 5, 5, 5, 2))).shape == (2, 2, 5, 5, 5)


def test_the_device_of_rmlx_is_a_target() -> None:
    x, w = (1, 2, 2, 2, 3), (4, 2, 2, 2, 3)
    assert rmlx.mlx_conv_transpose3d(x, w).target == "llvm"
    assert rmlx.mlx_conv_transpose3d(x, w, device="gpu").target.startswith("metal")


def test_a_column_major_array_is_taken_by_its_shape() -> None:
    layer = rmlx.mlx_conv_transpose3d((1, 2, 3, 2, 3), (4, 2, 2, 2, 3))
    x = np.arange(36.0).reshape(1, 2, 3, 2, 3)
    np.testing.assert_array_equal(layer.to_x(np.asfortranarray(x)), layer.to_x(x))


@pytest.mark.parametrize("given", [None, "x", [[1.0], [1.0, 2.0]], np.array(["x"])])
def test_what_holds_no_numbers_is_no_input_and_no_output(given: object) -> None:
    layer = torch.ConvTranspose3d(4, 2, 3, input=X)
    for translate in (layer.to_x, layer.from_y, layer.to_w, layer.to_b):
        with pytest.raises(WordsError, match="array of numbers"):
            translate(given)


def test_inputs_and_outputs_of_another_rank_are_named() -> None:
    layer = torch.ConvTranspose3d(4, 2, 3, input=(4, 3, 3, 3))
    with pytest.raises(WordsError, match=r"the input has shape \(2,\), but must have 4 axes, in the order CDHW"):
        layer.to_x(np.zeros(2))
    with pytest.raises(WordsError, match=r"the output has shape \(2,\), but must have 5 axes, in the order NCDHW"):
        layer.from_y(np.zeros(2))


def test_the_data_format_of_keras_json_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert keras.Conv3DTranspose(2, 3, input=(1, 2, 3, 4, 5)).spec.layout == "NDHWC"
    (tmp_path / "keras.json").write_text('{"image_data_format": "channels_first"}')
    assert keras.Conv3DTranspose(2, 3, input=(1, 2, 3, 4, 5)).spec.x_shape == (1, 2, 3, 4, 5)
    (tmp_path / "keras.json").write_text("{")
    with pytest.raises(WordsError, match=r"keras\.json"):
        keras.Conv3DTranspose(2, 3, input=(1, 2, 3, 4, 5))


def test_keras_json_of_a_user_without_a_home_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert keras.Conv3DTranspose(2, 3, input=(1, 2, 3, 4, 5)).spec.layout == "NDHWC"


def test_training_arguments_are_remarked() -> None:
    layer = keras.Conv3DTranspose(2, 3, kernel_regularizer="l2", bias_constraint="non_neg", input=(1, 2, 3, 4, 5))
    assert [remark.split()[0] for remark in layer.remarks] == ["kernel_regularizer", "bias_constraint"]


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        ({"class_name": "LeakyReLU", "config": {"negative_slope": 0.25}}, Activation("leaky_relu", (0.25,))),
        ({"class_name": "ReLU", "config": {"max_value": 6.0, "negative_slope": 0.0}}, Activation("relu6")),
        ({"class_name": "function", "config": "gelu"}, Activation("gelu")),
        ("hard_swish", Activation("hard_silu")),
    ],
)
def test_activations_are_read_from_names_and_configurations(config: Any, ours: Activation) -> None:
    assert keras.Conv3DTranspose(2, 3, activation=config, input=(1, 2, 3, 4, 5)).spec.activation == ours


@pytest.mark.parametrize("name", [*keras.NOT_ELEMENTWISE, *keras.NOT_FUSED])
def test_activations_that_are_not_fused_are_refused_by_name(name: str) -> None:
    with pytest.raises(WordsError, match=rf"{name} .* apply it to the output"):
        keras.Conv3DTranspose(2, 3, activation=name, input=(1, 2, 3, 4, 5))


def test_every_activation_of_keras_is_one_of_ours() -> None:
    for text in keras.ACTIVATIONS.values():
        assert str(Activation.parse(text)) == text


# --- wrong calls: the real messages are compared in `tests/conformance`, here their presence ---

REFUSED: list[tuple[Callable[..., Imported], dict[str, Any], str]] = [
    (torch.conv_transpose3d, {"input": X, "weight": W, "output_padding": 1}, "output padding must be smaller"),
    (mlx.ConvTranspose3d, {"in_channels": 4, "out_channels": 2, "kernel_size": 3, "stride": 0, "input": V}, "positive"),
    (rmlx.mlx_conv_transpose3d, {"input": V, "weight": (2, 3, 3, 3, 4), "groups": 2}, "Rmlx refuses .* groups != 1"),
    (rmlx.mlx_conv_transpose3d, {"input": V, "weight": (2, 3, 3, 3, 4), "stride": (1, 2)}, "length-3 vector"),
    (rmlx.mlx_conv_transpose3d, {"input": V, "weight": (2, 3, 3, 3, 4), "device": "npu"}, "'cpu' or 'gpu'"),
    (lucid.conv_transpose3d, {"input_": X, "weight": W, "output_padding": 1}, r"must be in range \[0, 1\)"),
    (lucid.conv_transpose3d, {"input_": X, "weight": W, "dilation": 2, "version": 3}, "dilation=1 only"),
    (
        lucid.ConvTranspose3d,
        {"in_channels": 4, "out_channels": 2, "kernel_size": 3, "padding": "same", "input": X, "version": 3},
        "string padding is not supported",
    ),
    (
        keras.Conv3DTranspose,
        {"filters": 2, "kernel_size": 3, "strides": 2, "dilation_rate": 2, "input": V},
        "not supported in conjunction",
    ),
    (
        tensorflow.conv3d_transpose,
        {"input": V, "filters": (3, 3, 3, 2, 4), "output_shape": (1, 17, 17, 17, 2), "strides": 2},
        "Size of out_backprop doesn't match",
    ),
    (jax.conv_transpose, {"lhs": V, "rhs": (3, 3, 3, 4, 2), "strides": 2, "padding": "SAME"}, "no len"),
]


@pytest.mark.parametrize(("read", "words", "message"), REFUSED)
def test_a_wrong_call_is_refused_in_that_systems_words(
    read: Callable[..., Imported], words: dict[str, Any], message: str
) -> None:
    with pytest.raises(WordsError, match=message):
        read(**words)


LENIENT = [
    (torch.conv_transpose3d, {"input": X, "weight": W, "output_padding": 5}, (15, 15, 15)),
    (torch.conv_transpose3d, {"input": X, "weight": W, "padding": -1}, (12, 12, 12)),
    (mlx.conv_transpose3d, ((1, 8, 8, 8, 4), (2, 3, 3, 3, 2), 1, 0, 1, 0, 2), (10, 10, 10)),
    (lucid.conv_transpose3d, {"input_": X, "weight": W, "output_padding": 1}, (11, 11, 11)),
    (
        keras.Conv3DTranspose,
        {"filters": 2, "kernel_size": 3, "strides": 2, "dilation_rate": 2, "input": V},
        (19, 19, 19),
    ),
    (
        tensorflow.conv3d_transpose,
        {"input": V, "filters": (3, 3, 3, 2, 4), "output_shape": (1, 17, 17, 17, 2), "strides": 2},
        (17, 17, 17),
    ),
]


@pytest.mark.parametrize(("read", "words", "outs"), LENIENT)
def test_what_only_that_system_refuses_is_computed_when_asked(
    read: Callable[..., Imported], words: Any, outs: tuple[int, ...]
) -> None:
    args, kwargs = ((), words) if isinstance(words, dict) else (words, {})
    with pytest.raises(WordsError, match="strict=False"):
        read(*args, **kwargs)
    assert tuple(a.out for a in read(*args, **kwargs, strict=False).spec.axes) == outs


ODD = [None, "a", b"x", 2.0, 2.5, (), (1,), (1, 2), (1,) * 4, (1, None, 1), ("a",) * 3, [[1]], {}, -1, 10**20, object()]
ODD += [float("nan"), range(1, 4), np.array(2), np.array([1, 2, 1]), np.array(["a"])]
GEOMETRY = ["stride", "padding", "output_padding", "dilation", "groups"]
CALLS: list[tuple[Callable[..., Imported], dict[str, Any], list[str]]] = [
    (torch.conv_transpose3d, {"input": X, "weight": W}, [*GEOMETRY, "input", "weight", "bias"]),
    (
        torch.ConvTranspose3d,
        {"in_channels": 4, "out_channels": 2, "kernel_size": 3, "input": X},
        [*GEOMETRY, "in_channels", "out_channels", "kernel_size", "output_size"],
    ),
    (partial(mlx.conv_transpose3d, V, (2, 3, 3, 3, 4)), {}, GEOMETRY),
    (
        mlx.ConvTranspose3d,
        {"in_channels": 4, "out_channels": 2, "kernel_size": 3, "input": V},
        [*GEOMETRY[:4], "in_channels", "out_channels", "kernel_size", "input"],
    ),
    (
        rmlx.mlx_conv_transpose3d,
        {"input": V, "weight": (2, 3, 3, 3, 4)},
        [*GEOMETRY, "input", "weight", "device"],
    ),
    (lucid.conv_transpose3d, {"input_": X, "weight": W}, [*GEOMETRY, "input_", "weight", "bias"]),
    (
        lucid.ConvTranspose3d,
        {"in_channels": 4, "out_channels": 2, "kernel_size": 3, "input": X},
        [*GEOMETRY, "in_channels", "out_channels", "kernel_size"],
    ),
    (
        keras.Conv3DTranspose,
        {"filters": 2, "kernel_size": 3, "input": V},
        [
            "filters",
            "kernel_size",
            "strides",
            "padding",
            "output_padding",
            "dilation_rate",
            "data_format",
            "activation",
        ],
    ),
    (
        tensorflow.conv3d_transpose,
        {"input": V, "filters": (3, 3, 3, 2, 4), "output_shape": (1, 8, 8, 8, 2), "strides": 1},
        ["input", "filters", "output_shape", "strides", "padding", "data_format", "dilations"],
    ),
    (
        jax.conv_transpose,
        {"lhs": V, "rhs": (3, 3, 3, 4, 2), "strides": (1, 1, 1), "padding": "SAME"},
        ["lhs", "rhs", "strides", "padding", "rhs_dilation", "dimension_numbers"],
    ),
]


@pytest.mark.parametrize(
    ("read", "words", "name"), [(read, words, name) for read, words, names in CALLS for name in names]
)
def test_whatever_an_argument_is_only_errors_of_ours_come(
    read: Callable[..., Imported], words: dict[str, Any], name: str
) -> None:
    for value in ODD:
        with suppress(OpcompileError):
            assert read(**{**words, name: value}).spec.y_shape


def test_numpys_integers_are_whole_numbers() -> None:
    two, triple = np.int64(2), np.array([2, 2, 2])
    seventeen = (17, 17, 17)
    for layer in (
        torch.conv_transpose3d(X, W, stride=tuple(triple), groups=np.int32(1)),
        mlx.conv_transpose3d(V, (2, 3, 3, 3, 4), triple, groups=np.int64(1)),
        rmlx.mlx_conv_transpose3d(V, (2, 3, 3, 3, 4), stride=triple.astype(float)),
        lucid.conv_transpose3d(X, W, stride=tuple(triple)),
        keras.Conv3DTranspose(two, 3, tuple(triple), input=V),
        tensorflow.conv3d_transpose(V, (3, 3, 3, 2, 4), np.array((1, 17, 17, 17, 2)), triple, "VALID"),
        jax.conv_transpose(V, (3, 3, 3, 4, 2), triple, "VALID"),
    ):
        assert layer.place[1] == seventeen, layer.system


@pytest.mark.parametrize("groups", [0, 3])
def test_what_nobody_could_compute_stays_refused(groups: int) -> None:
    with pytest.raises(WordsError):
        torch.conv_transpose3d(X, W, groups=groups, strict=False)


def test_dynamic_sizes_are_refused_but_for_the_batch() -> None:
    assert keras.Conv3DTranspose(2, 3, input=(None, 3, 3, 3, 4)).spec.batch is None
    with pytest.raises(
        SpecError, match=r"only the batch .*keras\.from_layer\(layer, input\), to all by a keras\.Input"
    ):
        keras.Conv3DTranspose(2, 3, input=(None, None, 3, 3, 4))


@pytest.mark.parametrize("config", [{"filters": 2}, {"filters": 2, "kernel_size": 3, "rank": 3}, None, [1]])
def test_a_configuration_that_is_none(config: Any) -> None:
    with pytest.raises(WordsError, match=r"config is .*; give layer\.get_config\(\)"):
        keras.from_config(config, (1, 3, 3, 3, 4))


# --- values ---


@settings(max_examples=60)
@given(
    st.permutations("CMDHW"),
    st.sampled_from("CM"),
    st.booleans(),
    st.integers(1, 3),
    st.tuples(*[st.integers(1, 3)] * 5),
)
def test_an_order_of_weights_and_its_inverse(
    axes: list[str], shared: str, flipped: bool, groups: int, sizes: tuple[int, ...]
) -> None:
    order = WeightOrder("".join(axes), shared, flipped)
    c, m, *kernel = sizes
    w = np.random.default_rng(0).standard_normal((c * groups, m, *kernel))
    own = order.own(w, groups)
    spec = ConvTranspose3d.parse(f"in=1x{c * groups}x1x1x1 co={m * groups} g={groups} k={'x'.join(map(str, kernel))}")
    assert own.shape == order.shape(spec, kernel)
    assert order.sizes(own.shape, groups) == (c * groups, m * groups, tuple(kernel))
    np.testing.assert_array_equal(order.canonical(own, groups), w)


def test_leading_zeros_are_zero_taps() -> None:
    """JAX pads so much that the output begins before the full one: W gets zeros in front, Y stays exact."""
    w = np.arange(1.0, 3.0).reshape(2, 1, 1, 1, 1)
    layer = jax.conv_transpose((1, 2, 1, 1, 1), w, (2, 1, 1), ((4, 1), (0, 0), (0, 0)), rhs_dilation=(2, 1, 1))
    assert layer.zero_taps == (1, 0, 0)
    assert layer.place == ((-2, 0, 0), (6, 1, 1))
    assert layer.weight is not None
    y = reference(layer.spec, layer.to_x(np.array([3.0, 5.0]).reshape(1, 2, 1, 1, 1)), layer.weight)
    # W backwards is (2, 1): 3 lands at 0 and 2, 5 at 2 and 4, and two zeros come before
    np.testing.assert_array_equal(y.ravel(), [0, 0, 6, 0, 13, 0])


@settings(max_examples=40)
@given(specs(dtypes=("float64",), layouts=("NCDHW",)))
def test_pytorchs_module_text_says_the_layer(spec: ConvTranspose3d) -> None:
    """Where it can be said at all, its own reader gives the layer back."""
    from types import SimpleNamespace

    spec = replace(spec, activation=Activation())
    try:
        text = torch.words(spec)
    except WordsError:
        assert any(not 0 <= a.out - (a.full - 2 * a.begin) < max(a.stride, a.dilation) for a in spec.axes)
        return
    reader = SimpleNamespace(ConvTranspose3d=lambda *a, **k: torch.ConvTranspose3d(*a, **k, input=spec.x_shape))
    read = eval(text, {"torch": SimpleNamespace(nn=reader, float64="float64")})  # noqa: S307
    x, w, b = arrays(spec, integers=4)
    np.testing.assert_array_equal(reference(read.spec, x, w, b), reference(spec, x, w, b))
    assert (read.spec.groups, read.spec.bias, read.spec.batch) == (spec.groups, spec.bias, spec.batch)


def test_keras_says_what_same_and_valid_mean() -> None:
    spec = ConvTranspose3d.parse("in=1x4x3x3x3 co=6 k=3 s=2 p=0:1 act=leaky_relu:0.2 layout=NDHWC bias=0")
    expected = "keras.layers.Conv3DTranspose(6, 3, strides=2, padding='same', use_bias=False, activation='leaky_relu')"
    assert keras.words(spec) == expected
    with pytest.raises(WordsError, match="Cropping3D"):
        keras.words(ConvTranspose3d.parse("in=1x4x3x3x3 co=6 k=3 s=2 p=1 op=1"))
    with pytest.raises(WordsError, match="groups"):
        keras.words(ConvTranspose3d.parse("in=1x4x3x3x3 co=6 k=3 g=2"))


def test_weights_of_another_shape_are_refused() -> None:
    layer = mlx.conv_transpose3d((1, 2, 2, 2, 4), (2, 3, 3, 3, 4))
    assert layer.with_weights(np.zeros((2, 3, 3, 3, 4))).spec.bias is False
    with pytest.raises(WordsError, match=r"\(2, 3, 3, 3, 4\)"):
        layer.with_weights(np.zeros((4, 2, 3, 3, 3)))
    with pytest.raises(WordsError, match="bias"):
        mlx.ConvTranspose3d(4, 2, 3, input=V).with_weights(np.zeros((2, 3, 3, 3, 4)), np.zeros(3))


def test_a_bias_that_one_has_and_the_other_lacks_is_refused() -> None:
    with pytest.raises(WordsError, match="has a bias, but its values are missing"):
        torch.ConvTranspose3d(4, 2, 3, input=X).with_weights(np.zeros(W))
    with pytest.raises(WordsError, match="has no bias, but values of one were given"):
        torch.ConvTranspose3d(4, 2, 3, bias=False, input=X).with_weights(np.zeros(W), np.zeros(2))


def test_a_bias_that_was_given_by_its_shape_is_not_zero_but_unknown() -> None:
    layer = torch.conv_transpose3d(X, np.ones(W, np.float32), (2,))
    assert layer.spec.bias
    assert layer.weight is not None
    assert layer.bias is None


def test_arrays_bring_their_dtype() -> None:
    layer = torch.conv_transpose3d(np.zeros((1, 4, 2, 2, 2)), np.zeros(W))
    assert layer.spec.dtype == "float64"
    assert layer.weight is not None
    with pytest.raises(WordsError, match="expected scalar type Double but found Float"):
        torch.conv_transpose3d(np.zeros((1, 4, 2, 2, 2)), np.zeros(W, np.float32))
    half = np.zeros(W, ml_dtypes.bfloat16)
    assert torch.conv_transpose3d(X, half).spec.dtype == "bfloat16"
    assert array(half).dtype == half.dtype
    with pytest.raises(SpecError, match="int64"):
        torch.conv_transpose3d(np.zeros((1, 4, 2, 2, 2), np.int64), np.zeros(W, np.int64))


def test_a_system_converts_dtypes_as_it_does() -> None:
    """The conversions of each were seen in the system itself; the weights come in the dtype of the spec."""
    x, w = np.zeros(V), np.zeros((2, 3, 3, 3, 4))
    half, single = np.float16, np.float32
    dtypes = [
        (mlx.conv_transpose3d(x, w), "float32"),  # mx.array(x) is float32
        (mlx.conv_transpose3d(x.astype(half), w.astype(half)), "float16"),
        (mlx.conv_transpose3d(x.astype(half), w.astype(single)), "float32"),
        (mlx.conv_transpose3d(x.astype(half), w.astype(ml_dtypes.bfloat16)), "float32"),
        (rmlx.mlx_conv_transpose3d(x, w), "float32"),  # as_mlx(x) is float32
        (lucid.conv_transpose3d(np.zeros(X), np.zeros(W, single)), "float64"),
        (lucid.ConvTranspose3d(4, 2, 3, input=np.zeros(X)), "float64"),
        (keras.Conv3DTranspose(2, 3, input=x), "float32"),
        (keras.Conv3DTranspose(2, 3, input=x, dtype="mixed_float16"), "float16"),
        (tensorflow.conv3d_transpose(x, np.zeros((3, 3, 3, 2, 4), single), (*V[:4], 2), 1), "float32"),
        (jax.conv_transpose(x, np.zeros((3, 3, 3, 4, 2)), (1, 1, 1), "SAME"), "float32"),  # without x64
    ]
    for layer, dtype in dtypes:
        if layer.weight is None:
            layer = layer.with_weights(np.zeros(layer.w_shape, half), np.zeros(2, half))
        assert layer.spec.dtype == dtype, layer.system
        assert layer.weight is not None
        assert layer.weight.dtype == dtype, layer.system
        assert layer.bias is None or layer.bias.dtype == dtype
        assert layer.to_x(np.zeros(X if layer.x_layout == "NCDHW" else V)).dtype == dtype
    with pytest.raises(WordsError, match="same dtypes, got float16, float32"):
        jax.conv_transpose(x.astype(half), np.zeros((3, 3, 3, 4, 2)), (1, 1, 1), "SAME")
    with pytest.raises(WordsError, match="expected scalar type Double but found Float"):
        torch.ConvTranspose3d(4, 2, 3, input=np.zeros(X))


def test_an_output_of_another_dtype_than_jaxs_inputs_is_refused() -> None:
    """300 * 300 * 4 is 360000, which float16 does not hold."""
    x, w, half = np.full(V, 300, np.float16), np.full((1, 1, 1, 4, 2), 300, np.float16), ml_dtypes.bfloat16

    def read(dtype: Any, preferred: Any) -> Any:
        return jax.conv_transpose(x.astype(dtype), w.astype(dtype), (1, 1, 1), "SAME", preferred_element_type=preferred)

    for same in ("float16", np.float16, np.dtype("float16")):
        assert read("float16", same).spec.dtype == "float16"
        assert not read("float16", same).remarks
    with pytest.raises(WordsError, match=r"an output of float32.*cast x and w to float32 first, which is exact"):
        read("float16", np.float32)
    for narrower in (np.float16, half):
        with pytest.raises(WordsError, match="compute in float32, and cast the output"):
            read("float32", narrower)
    assert read("float32", np.float32).spec.dtype == "float32"


def test_floatx_of_keras_json_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "keras.json").write_text('{"floatx": "float16"}')
    assert keras.Conv3DTranspose(2, 3, input=V).spec.dtype == "float16"
    assert keras.Conv3DTranspose(2, 3, input=V, dtype="float32").spec.dtype == "float32"


# --- files ---


@pytest.mark.parametrize("system", [torch, lucid])
def test_a_bias_is_kept_where_the_weight_is_a_shape(system: Any) -> None:
    layer = system.conv_transpose3d(X, W, np.arange(2.0, dtype=np.float32))
    assert layer.weight is None
    assert layer.bias is not None
    assert layer.bias.tolist() == [0, 1]


def test_bfloat16_in_an_npz_file_is_known(tmp_path: Path) -> None:
    """NumPy and MLX write it as two bytes that have no type."""
    w = np.arange(4 * 8 * 2).reshape(4, 2, 2, 2, 2).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "w.npz", weight=w)
    layer = mlx.ConvTranspose3d(2, 4, 2, bias=False, input=(1, 2, 2, 2, 2), dtype="bfloat16")
    layer = layer.with_weights(*files.layer_arrays(tmp_path / "w.npz"))
    assert layer.weight is not None
    assert layer.weight.dtype == w.dtype
    assert np.array_equal(layer.weight, layer.to_w(w))


def test_npz_files_are_read(tmp_path: Path) -> None:
    w, b = np.arange(4 * 27 * 2, dtype=np.float32).reshape(4, 3, 3, 3, 2), np.ones(4, np.float32)
    np.savez(tmp_path / "w.npz", **{"up.weight": w, "up.bias": b})
    layer = mlx.ConvTranspose3d(2, 4, 3, input=(1, 2, 2, 2, 2))
    layer = layer.with_weights(*files.layer_arrays(tmp_path / "w.npz", "up"))
    assert layer.weight is not None
    np.testing.assert_array_equal(layer.weight[1, 2, 0, 1, 2], w[2, 0, 1, 2, 1])
    with pytest.raises(ModelError, match="layers with 5-D weights are: up"):
        files.layer_arrays(tmp_path / "w.npz", "down")


def test_arrays_that_are_no_layer_s_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", kernel=np.ones((1, 2, 2, 2, 1)), offset=np.ones(1))
    for name in ("", "kernel"):
        with pytest.raises(ModelError, match=r"weights are: none; its arrays are: kernel, offset; .*read_arrays"):
            files.layer_arrays(tmp_path / "w.npz", name)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\.safetensors"):
        files.read_arrays(tmp_path / "w.bin")
    (tmp_path / "w.npz").write_bytes(b"PK no archive")
    with pytest.raises(ModelError, match="cannot read"):
        files.read_arrays(tmp_path / "w.npz")
    for name in ("absent.npz", "absent.pt", "absent.keras"):
        with pytest.raises(ModelError, match=rf"there is no file '.*{name}'; name one of "):
            files.read_arrays(tmp_path / name)
    np.savez(tmp_path / "pickled.npz", weight=np.array([{}], dtype=object))
    with pytest.raises(ModelError, match="allow_pickle"):
        files.read_arrays(tmp_path / "pickled.npz")


def test_what_was_found_reads_as_a_node_of_onnx_does_and_is_shown_without_its_weights() -> None:
    w = np.full((4, 2, 3, 3, 3), 0.625, np.float32)
    found = Found("up", torch.conv_transpose3d(X, w, np.full(2, 0.375, np.float32)))
    assert found.layer is not None
    assert found.spec is found.layer.spec
    assert found.weight is found.layer.weight
    assert found.bias is found.layer.bias
    assert "0.625" not in repr(found)
    assert "0.375" not in repr(found)
    none = Found("up", None, "no layer")
    assert (none.spec, none.weight, none.bias) == (None, None, None)
    node = onnx_words.Found("up", found.spec, found.weight, found.bias, None, "y")
    assert "0.625" not in repr(node)
    assert "0.375" not in repr(node)
