"""Keras on the backend that KERAS_BACKEND names: its layer, its activations, its own tests and their oracle."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from conformance.suite import Case, Result, described, run
from opcompile.importers import keras as words

BACKEND = os.environ.get("KERAS_BACKEND", "?")
SYSTEM, VERSION = f"Keras ({BACKEND})", keras.__version__


def suites() -> Iterator[Result]:
    yield run("keras", SYSTEM, VERSION, "grid of Conv3DTranspose", grid())
    yield run("keras-wrong", SYSTEM, VERSION, "wrong and odd calls", wrong())
    yield run("keras-activations", SYSTEM, VERSION, "every fused activation, and those that are not", activations())
    yield run("keras-own", SYSTEM, VERSION, "its own 3-D tests (6), and its NumPy oracle on the grid", own())


def of_layer(name: str, x: tuple[int, ...], words_of: dict[str, Any], theirs: Any = None, **more: Any) -> Case:
    """One layer: its words, and Keras's own layer or ``theirs``."""
    kernel, filters = words_of["kernel_size"], words_of["filters"]
    shape = kernel if isinstance(kernel, tuple) else (kernel,) * 3
    channels = x[1] if words_of.get("data_format") == "channels_first" else x[-1]
    return Case(
        name,
        lambda: words.Conv3DTranspose(**words_of, input=x),
        theirs or _layer(words_of),
        x,
        (*(shape if all(isinstance(n, int) for n in shape) else (1, 1, 1)), filters or 1, channels),
        filters if words_of.get("use_bias", True) else 0,
        **more,
    )


def _layer(words_of: dict[str, Any]) -> Any:
    def theirs(x: Any, w: Any, b: Any) -> np.ndarray:
        layer = keras.layers.Conv3DTranspose(**words_of)
        layer.build(x.shape)
        layer.kernel.assign(w)
        if b is not None:
            layer.bias.assign(b)
        return keras.ops.convert_to_numpy(layer(x))

    return theirs


def combinations() -> Iterator[dict[str, Any]]:
    """A grid of 107: kernels 1 to 5, strides 1 to 3, output paddings, dilations, and 6 that Keras refuses."""
    for kernel, stride, padding, extra in itertools.product(range(1, 6), (1, 2, 3), ("valid", "same"), (None, 0, 1)):
        if extra is None or extra < stride:
            yield {"kernel_size": kernel, "strides": stride, "padding": padding, "output_padding": extra}
    for kernel, padding in itertools.product((2, 3, 5), ("valid", "same")):
        yield {"kernel_size": kernel, "strides": 1, "padding": padding, "dilation_rate": 2}
    for stride in (2, 3):
        for padding in ("valid", "SAME"):
            yield {"kernel_size": 3, "strides": stride, "padding": padding, "dilation_rate": 2}
    yield {"kernel_size": 3, "strides": (2, 1, 1), "dilation_rate": (1, 2, 1)}
    for kernel, stride in itertools.product(((1, 2, 3), (3, 2, 4)), ((1, 2, 3), (3, 1, 2))):
        for padding in ("Same", "Valid"):
            yield {"kernel_size": kernel, "strides": stride, "padding": padding}


def grid() -> Iterator[Case]:
    for at, geometry in enumerate(combinations()):
        for data_format in ("channels_last", "channels_first") if at % 6 == 0 else ("channels_last",):
            bias = at % 2 == 0
            x = (1, 3, 2, 4, 2) if data_format == "channels_last" else (1, 2, 3, 2, 4)
            given = {"filters": 3, **geometry, "use_bias": bias, "data_format": data_format}
            yield of_layer(described(**given), x, given)


def wrong() -> Iterator[Case]:
    x = (1, 3, 3, 3, 4)
    for given in (
        {"strides": 2, "output_padding": 2},
        {"strides": 2, "dilation_rate": 2},
        {"filters": 0},
        {"kernel_size": 0},
        {"strides": 0},
        {"padding": "full"},
        {"padding": "causal"},
        {"output_padding": -1},
        {"data_format": "NDHWC"},
        {"kernel_size": (3, 3)},
        {"kernel_size": 3.0},
        {"dilation_rate": 0},
        {"activation": "foo"},
    ):
        yield of_layer(described(**given), x, {"filters": 2, "kernel_size": 3, **given})
    for padding in (1, (1, 1, 1)):  # Keras fails on these without words of its own
        yield of_layer(f"{padding=}", x, {"filters": 2, "kernel_size": 3, "padding": padding}, wordless=True)
    numpys = {"filters": np.int64(2), "kernel_size": (2, 2, 2), "strides": (np.int64(2),) * 3}
    yield of_layer("NumPy's integers", x, numpys)
    yield of_layer("4-D", x[1:], {"filters": 2, "kernel_size": 3})
    empty = {"filters": 2, "kernel_size": 2, "padding": "same", "output_padding": 0}
    yield of_layer("an empty output", (1, 1, 1, 1, 4), empty, uncomputed="its output is empty")


def activations() -> Iterator[Case]:
    x, plain = (1, 2, 3, 2, 4), {"filters": 3, "kernel_size": 2}
    for name in words.ACTIVATIONS:
        yield of_layer(name, x, {**plain, "activation": name})
        yield of_layer(f"keras.activations.{name}", x, {**plain, "activation": keras.activations.get(name)})
    for layer in (
        keras.layers.LeakyReLU(0.3),
        keras.layers.LeakyReLU(negative_slope=0.1),
        keras.layers.ELU(0.7),
        keras.layers.ReLU(),
        keras.layers.ReLU(max_value=6.0),
        keras.layers.ReLU(negative_slope=0.2),
        keras.layers.Activation("tanh"),
    ):
        yield of_layer(f"{type(layer).__name__} {layer.get_config()}", x, {**plain, "activation": layer})
    for name in (*words.NOT_ELEMENTWISE, *words.NOT_FUSED):
        # two of them fail in Keras without words of their own: glu on 3 channels, threshold without parameters
        given = {**plain, "activation": name}
        yield of_layer(name, x, given, uncomputed="an activation that is not fused", wordless=True)


def own() -> Iterator[Case]:
    """Its tests' parameters; the three basic ones ask for shapes, the three others for its oracle's values."""
    from keras.src.layers.convolutional.conv_transpose_test import np_conv3d_transpose

    tests = [
        {"filters": 5, "kernel_size": 2, "strides": 2, "padding": "valid", "output_padding": None, "dilation_rate": 1},
        {
            "filters": 6,
            "kernel_size": 2,
            "strides": 3,
            "padding": "same",
            "output_padding": 2,
            "dilation_rate": (1, 1, 1),
        },
        {
            "filters": 6,
            "kernel_size": (2, 2, 3),
            "strides": (2, 1, 2),
            "padding": "valid",
            "output_padding": None,
            "dilation_rate": (1, 1, 1),
        },
    ]
    shapes = [(2, 16, 16, 16, 5), (2, 23, 23, 23, 6), (2, 16, 9, 17, 6)]
    for given, shape in zip(tests, shapes, strict=True):
        given = {**given, "data_format": "channels_last"}
        yield of_layer(f"basic {described(**given)}", (2, 8, 8, 8, 4), given, _of_shape(given, shape))
    for given in tests:
        given = {**given, "data_format": "channels_last"}
        yield of_layer(f"oracle {described(**given)}", (2, 8, 8, 8, 4), given, _oracle(np_conv3d_transpose, given))
    for given in combinations():
        full = {"filters": 3, "output_padding": None, "dilation_rate": 1, **given}
        if max(np.atleast_1d(full["strides"])) > 1 and max(np.atleast_1d(full["dilation_rate"])) > 1:
            continue  # the oracle has no rules
        if np.max(full["dilation_rate"]) > 1:
            continue  # it sizes a dilated kernel as if it were not, unlike the layer
        yield of_layer(f"oracle {described(**full)}", (1, 3, 2, 4, 2), full, _oracle(np_conv3d_transpose, full))


def _of_shape(given: dict[str, Any], shape: tuple[int, ...]) -> Any:
    def theirs(x: Any, w: Any, b: Any) -> np.ndarray:
        y = _layer(given)(x, w, b)
        if y.shape != shape:
            raise AssertionError(f"Keras gave {y.shape}, not {shape}")
        return y

    return theirs


def _oracle(function: Any, given: dict[str, Any]) -> Any:
    def theirs(x: Any, w: Any, b: Any) -> np.ndarray:
        words_of = [given[key] for key in ("strides", "padding", "output_padding")]
        dilation = given["dilation_rate"]
        return function(x, w, b, *words_of, "channels_last", dilation)

    return theirs
