"""Objects and files of the real systems: modules, layers, models, programs, weights."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import opcompile
from opcompile import load
from opcompile.bounds import compare
from opcompile.cli import cli
from opcompile.errors import EngineError, ModelError, WordsError
from opcompile.importers import files, keras, mlx, torch
from opcompile.importers.imported import Imported
from opcompile.reference import reference
from opcompile.source import read
from opcompile.spec import Activation, ConvTranspose3d, at_batch

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


def holds(layer: Imported, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> None:
    """The layer, with the weights it came with, gives the system's output."""
    assert layer.weight is not None
    ours = layer.to_x(x)
    shape = layer.from_y(np.zeros([n or len(ours) for n in layer.spec.y_shape])).shape
    assert shape == y.shape
    back = {"NCDHW": 1, "NDHWC": -1, "CDHW": 0}
    moved = np.moveaxis(y, back[layer.y_layout], back[layer.spec.layout]) if "N" in layer.y_layout else y[None]
    assert compare(layer.spec, np.ascontiguousarray(moved), ours, layer.weight, layer.bias).passed


def drawn(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def decoder() -> Any:
    """Two transposed convolutions with something between them."""
    real = pytest.importorskip("torch")
    real.manual_seed(0)
    return real.nn.Sequential(
        real.nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        real.nn.Conv3d(6, 4, 3),
        real.nn.ReLU(),
        real.nn.ConvTranspose3d(4, 2, 2, stride=2, bias=False),
    ).eval()


def test_a_pytorch_module() -> None:
    real = pytest.importorskip("torch")
    x, first = drawn(2, 4, 3, 4, 5), decoder()[0]
    with real.no_grad():
        y = first(real.from_numpy(x)).numpy()
        unbatched = first(real.from_numpy(x[0])).numpy()
        odd = first(real.from_numpy(x), output_size=(5, 8, 9)).numpy()
    holds(torch.from_module(first, x), x, y)
    holds(torch.from_module(first, x[0]), x[0], unbatched)
    holds(torch.from_module(first, x.shape, output_size=(5, 8, 9)), x, odd)
    holds(torch.channels_last(torch.from_module(first, x.shape)), x, y)
    for other, name in zip(decoder()[1:3], ("Conv3d", "ReLU"), strict=True):
        with pytest.raises(WordsError, match=f"{name} is not"):
            torch.from_module(other, x)
    holds(torch.from_module(real.compile(first), x), x, y)

    class Own(real.nn.ConvTranspose3d):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return super().forward(x).relu()

    with pytest.raises(WordsError, match="Own has a forward of its own"):
        torch.from_module(Own(4, 6, 3), x)
    with pytest.raises(WordsError, match=r"ConvTranspose2d is not a torch\.nn\.ConvTranspose3d"):
        torch.from_module(real.nn.ConvTranspose2d(4, 6, 3), x)
    with pytest.raises(WordsError, match="on the device meta"):
        torch.from_module(real.nn.ConvTranspose3d(4, 6, 3, device="meta"), x)


def test_a_pytorch_module_whose_weight_or_output_a_hook_makes() -> None:
    """Such a weight is that of the last forward pass, not of the state dict that was loaded since."""
    real = pytest.importorskip("torch")
    x, utils = drawn(1, 4, 3, 4, 5), real.nn.utils

    def layer() -> Any:
        return real.nn.ConvTranspose3d(4, 6, 3, 2)

    made = {"WeightNorm": utils.weight_norm(layer()), "SpectralNorm": utils.spectral_norm(layer()), "twice": layer()}

    def twice(_: Any, __: Any, y: Any) -> Any:
        return 2 * y

    made["twice"].register_forward_hook(twice)
    for name, module in made.items():
        module.load_state_dict({k: 2 * v for k, v in module.state_dict().items()})
        with pytest.raises(WordsError, match=rf"forward hooks \({name}\).*remove them"):
            torch.from_module(module.eval(), x)
    for name, remove in (("WeightNorm", utils.remove_weight_norm), ("SpectralNorm", utils.remove_spectral_norm)):
        module = remove(made[name])
        with real.no_grad():
            holds(torch.from_module(module, x), x, module(real.from_numpy(x)).numpy())
    module = utils.parametrizations.weight_norm(layer())
    module.load_state_dict({k: 2 * v for k, v in module.state_dict().items()})
    with real.no_grad():
        holds(torch.from_module(module, x), x, module(real.from_numpy(x)).numpy())
    module = layer()
    module.forward = made["WeightNorm"].forward
    with pytest.raises(WordsError, match="ConvTranspose3d has a forward of its own"):
        torch.from_module(module, x)
    with pytest.raises(WordsError, match="LazyConvTranspose3d has no weights yet; call it once"):
        torch.from_module(real.nn.LazyConvTranspose3d(6, 3), x)


def test_an_exported_program(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    real = pytest.importorskip("torch")
    model, x = decoder(), drawn(2, 4, 3, 4, 5)
    batch = real.export.Dim("n")
    program = real.export.export(model, (real.from_numpy(x),), dynamic_shapes=({0: batch},))
    real.export.save(program, tmp_path / "m.pt2")
    for source in (program, program.run_decompositions({}), tmp_path / "m.pt2"):
        first, second = torch.find(source)
        assert first.layer is not None
        assert second.layer is not None
        assert first.layer.spec.batch is None
        assert (second.layer.spec.bias, second.layer.spec.channels_out) == (False, 2)
        with real.no_grad():
            holds(first.layer, x, model[0](real.from_numpy(x)).numpy())
    with pytest.raises(ModelError, match=r"torch\.export"):
        torch.find(model)
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    log = logging.getLogger("torch.export")  # which tells no other logger
    log.addHandler(caplog.handler)
    try:
        with pytest.raises(ModelError, match=r"bad\.pt2"):
            torch.find(tmp_path / "bad.pt2")
    finally:
        log.removeHandler(caplog.handler)
    assert not [r for r in caplog.records if r.name == "torch.export"], "a traceback was logged"


def test_an_exported_program_with_graphs_inside() -> None:
    real = pytest.importorskip("torch")
    nn, x = real.nn, drawn(2, 4, 3, 4, 5)

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.ConvTranspose3d(4, 4, 2) for _ in range(3))
            self.register_buffer("fixed", real.ones(4, 1, 2, 2, 2), persistent=False)

        def forward(self, x: Any) -> Any:
            with real.no_grad():
                a = self.first(x)
            b = real.cond(x.sum() > 0, self.second, lambda t: t[..., :1, :1, :1] + a, (x,))
            with real.autocast("cpu", real.bfloat16):
                c = self.third(x)
            return a + b + c + real.conv_transpose3d(x, self.fixed, groups=4)[:, :1]

    model = Nested().eval()
    found = torch.find(real.export.export(model, (real.from_numpy(x),), strict=False))
    assert len({f.name for f in found}) == len(found) == 4
    first, second, third, fixed = found
    assert third.layer is None
    assert third.reason == (
        "it takes torch.float32 and gives torch.bfloat16, as in torch.autocast; export the program with one dtype "
        "instead"
    )
    with real.no_grad():
        for f, layer in ((first, model.first), (second, model.second)):
            assert f.layer is not None
            holds(f.layer, x, layer(real.from_numpy(x)).numpy())
        assert fixed.layer is not None
        holds(fixed.layer, x, real.conv_transpose3d(real.from_numpy(x), model.fixed, groups=4).numpy())


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_a_state_dict(name: str, tmp_path: Path) -> None:
    real = pytest.importorskip("torch")
    model, x = decoder(), drawn(2, 4, 3, 4, 5)
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), tmp_path / name)
    else:
        real.save(model.state_dict() if name == "w.pt" else {"state_dict": model.state_dict()}, tmp_path / name)
    layer = torch.ConvTranspose3d(4, 6, 3, 2, 1, 1, 2, input=x)
    with real.no_grad():
        holds(layer.with_weights(*files.layer_arrays(tmp_path / name, "0")), x, model[0](real.from_numpy(x)).numpy())
    assert files.layer_arrays(tmp_path / name, "3")[1] is None


def test_a_state_dict_inside_of_a_checkpoint(tmp_path: Path) -> None:
    real, model = pytest.importorskip("torch"), decoder()
    real.save({"epoch": 3, "nets": {"up": model.state_dict()}, "state_dict": {}}, tmp_path / "w.pt")
    assert np.array_equal(files.layer_arrays(tmp_path / "w.pt", "nets.up.0")[0], model[0].weight.detach().numpy())
    with pytest.raises(ModelError, match=r"layers with 5-D weights are: nets\.up\.0, nets\.up\.1, nets\.up\.3"):
        files.layer_arrays(tmp_path / "w.pt", "0")
    real.save([model.state_dict()], tmp_path / "list.pt")
    with pytest.raises(ModelError, match=r"list\.pt holds a list, not a state dict; save .*state_dict\(\)"):
        files.layer_arrays(tmp_path / "list.pt", "0")


def test_files_of_pytorch_that_are_of_another_kind(tmp_path: Path) -> None:
    """A module or TorchScript where weights are read, and what torch.save wrote where a program is."""
    real, model = pytest.importorskip("torch"), decoder()
    for ending in ("pt", "pt2"):
        real.save(model, tmp_path / f"module.{ending}")
        real.save(model.state_dict(), tmp_path / f"state.{ending}")
        real.jit.trace(model, real.ones(1, 4, 3, 4, 5)).save(tmp_path / f"script.{ending}")
    for name in ("module.pt", "script.pt"):
        with pytest.raises(ModelError, match=rf"{name} holds more than tensors, .*; save the module's state_dict\(\)$"):
            files.layer_arrays(tmp_path / name, "0")
    words = {"script": "it is TorchScript", "state": "it holds a state dict or a pickled module"}
    for name, said in {**words, "module": words["state"]}.items():
        with pytest.raises(ModelError, match=rf"{name}\.pt2 as a torch.export program: {said}; save .*export\.save"):
            torch.find(tmp_path / f"{name}.pt2")
    with pytest.raises(ModelError, match=r"there is no file '.*none\.pt2'"):
        torch.find(tmp_path / "none.pt2")


def test_a_tensor_that_has_no_plain_values_is_refused() -> None:
    real = pytest.importorskip("torch")
    layer, w = torch.ConvTranspose3d(2, 3, 2, bias=False, input=(1, 2, 2, 2, 2)), real.ones(2, 3, 2, 2, 2)
    quantised = real.quantize_per_tensor(w, 0.1, 0, real.qint8)
    for tensor in (w.to_sparse(), quantised, w.to("meta")):
        with pytest.raises(WordsError, match=r"no array.*to_dense\(\).*dequantize\(\)"):
            layer.with_weights(tensor)


def test_bfloat16_in_a_file_that_is_read_first_of_all(tmp_path: Path) -> None:
    real, numpy = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    path = tmp_path / "w.safetensors"
    numpy.save_file({"up.weight": real.ones(4, 6, 2, 2, 2).bfloat16()}, path)
    read = "from opcompile.importers.files import layer_arrays; print(layer_arrays(sys.argv[1], 'up')[0].dtype)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {read}", str(path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.stdout == "bfloat16\n", done.stderr


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors"])
def test_an_mlx_module_and_its_weights(name: str, tmp_path: Path) -> None:
    mx, nn = pytest.importorskip("mlx.core"), pytest.importorskip("mlx.nn")
    x = drawn(2, 3, 4, 5, 4)
    module = nn.ConvTranspose3d(4, 6, (3, 2, 3), 2, 1, 1, 1)
    module.bias = mx.array(drawn(6))
    y = np.array(module(mx.array(x)))
    holds(mlx.from_module(module, x), x, y)
    module.save_weights(str(tmp_path / name))
    layer = mlx.ConvTranspose3d(4, 6, (3, 2, 3), 2, 1, 1, 1, input=x)
    holds(layer.with_weights(*files.layer_arrays(tmp_path / name)), x, y)
    half = nn.ConvTranspose3d(4, 6, 3)
    half.set_dtype(mx.bfloat16)
    assert mlx.from_module(half, x.shape).spec.dtype == "bfloat16"


def test_a_keras_model_and_its_files(tmp_path: Path) -> None:
    real = pytest.importorskip("keras")
    first = real.layers.Conv3DTranspose(6, 3, 2, padding="same", activation="relu", bias_initializer="ones", name="up")
    inside = real.Sequential([real.layers.Conv3DTranspose(2, 2, 2, activation="softmax", name="last")])
    x = drawn(2, 3, 4, 5, 4)
    given = real.Input(x.shape[1:])
    model = real.Model(given, inside(first(given)))
    y = real.ops.convert_to_numpy(first(x))
    holds(keras.from_layer(first), x, y)
    model.save(tmp_path / "m.keras")
    up, last = keras.find(tmp_path / "m.keras")
    assert up.layer is not None
    assert (up.spec, up.weight, up.bias) == (up.layer.spec, up.layer.weight, up.layer.bias)
    assert (last.spec, last.weight, last.bias) == (None, None, None)
    assert up.layer is not None
    assert up.layer.spec.batch is None
    holds(up.layer, x, y)
    assert last.layer is None
    assert last.reason is not None
    assert "softmax" in last.reason
    model.save_weights(tmp_path / "m.weights.h5")
    layer = keras.Conv3DTranspose(6, 3, 2, padding="same", activation="relu", input=x)
    for name in ("m.keras", "m.weights.h5"):
        arrays = files.layer_arrays(tmp_path / name, "layers/conv3d_transpose")
        holds(layer.with_weights(*arrays), x, y)
    (tmp_path / "bad.keras").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"bad\.keras"):
        keras.find(tmp_path / "bad.keras")
    with pytest.raises(ModelError, match=r"there is no file '.*none\.keras'"):
        keras.find(tmp_path / "none.keras")
    with pytest.raises(ModelError, match="is not a Keras model"):
        keras.find(first)


@pytest.mark.parametrize("ending", ["m.keras", "m.weights.h5"])
def test_a_layer_of_keras_s_files_by_its_own_name(ending: str, tmp_path: Path) -> None:
    """The groups count the layers of a class, so that a group may have the name of another layer."""
    layers, path = pytest.importorskip("keras").layers, tmp_path / ending
    names = ("conv3d_transpose_1", "up_1", "conv3d_transpose")
    kernels = [layers.Conv3DTranspose(m, 2, name=name) for m, name in zip((5, 6, 7), names, strict=True)]
    inside = pytest.importorskip("keras").Sequential([layers.Conv3DTranspose(3, 2, name="up_1")], name="inside")
    model = pytest.importorskip("keras").Sequential([layers.Input((2, 2, 2, 3)), *kernels, inside])
    model.save_weights(path) if ending.endswith("h5") else model.save(path)
    for m, name in ((5, "conv3d_transpose_1"), (6, "layers/up_1"), (7, "layers/conv3d_transpose_2")):
        weight, bias = files.layer_arrays(path, name)
        assert (weight.shape[3], bias.shape) == (m, (m,))  # type: ignore[union-attr]
    both = r"up_1 \(layers/conv3d_transpose_1\)"
    with pytest.raises(
        ModelError, match=rf"may mean 2 layers .*conv3d_transpose_1 \(layers/conv3d_tr.*\), {both}; say"
    ):
        files.layer_arrays(path, "layers/conv3d_transpose_1")
    with pytest.raises(ModelError, match=rf"may mean 2 layers .*{both}, up_1 \(layers/sequential/layers/conv3d_tr"):
        files.layer_arrays(path, "up_1")
    with pytest.raises(ModelError, match=rf"has no layer 'up'; layers with 5-D weights are: conv3d_.*{both}, conv3d_"):
        files.layer_arrays(path, "up")


def test_a_backend_that_keras_does_not_know() -> None:
    pytest.importorskip("keras")
    command = [sys.executable, "-c", "from opcompile.importers import keras\nkeras.find('m.keras')"]
    environment = {**os.environ, "KERAS_BACKEND": "unknown", "PYTHONPATH": str(Path(opcompile.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    *_, said = done.stderr.splitlines()
    assert said.startswith("opcompile.errors.EngineError: the package keras is not usable")
    assert said.endswith("set KERAS_BACKEND to one that is installed, torch or jax")


@pytest.mark.parametrize("name", ["w.npz", "w.weights.h5"])
def test_bfloat16_in_files_that_know_no_such_type(name: str, tmp_path: Path) -> None:
    if name.endswith(".npz"):
        mx = pytest.importorskip("mlx.core")
        right = mx.array(drawn(6, 2, 2, 2, 4)).astype(mx.bfloat16)
        mx.savez(str(tmp_path / name), weight=right)
        weight, _ = files.layer_arrays(tmp_path / name)
        right = np.array(right.astype(mx.float32))
    else:
        real = pytest.importorskip("keras")
        model = real.Sequential([real.Input((2, 2, 2, 4)), real.layers.Conv3DTranspose(6, 2, dtype="bfloat16")])
        model.save_weights(tmp_path / name)
        weight, _ = files.layer_arrays(tmp_path / name, "layers/conv3d_transpose")
        right = real.ops.convert_to_numpy(real.ops.cast(model.layers[0].kernel, "float32"))
    assert weight.dtype.name == "bfloat16"
    assert np.array_equal(weight.astype(np.float32), right)


def test_layers_inside_of_others_are_found() -> None:
    """Shared, wrapped, derived, nested, inside of a layer of one's own; N is dynamic whatever they were built with."""
    real = pytest.importorskip("keras")
    kind, zeros = real.layers.Conv3DTranspose, {"kernel_initializer": "zeros"}  # random ones take JAX long

    class Derived(kind):  # type: ignore[misc, valid-type]
        pass

    class Twice(kind):  # type: ignore[misc, valid-type]
        def call(self, x: Any) -> Any:
            return 2 * super().call(x)

    class Block(real.layers.Layer):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.up = kind(3, 2, 2, name="inside", **zeros)

        def call(self, x: Any) -> Any:
            return real.ops.relu(self.up(x))

    given, shared = real.Input((2, 2, 3, 4)), kind(4, 2, padding="same", name="shared", **zeros)
    y = Derived(2, 2, name="derived", **zeros)(Block()(shared(shared(given))))
    y = real.Sequential([kind(2, 2, name="nested", **zeros)])(y)
    found = {f.name: f for f in keras.find(real.Model(given, Twice(2, 2, name="twice", **zeros)(y)))}
    assert list(found) == ["shared", "inside", "derived", "nested", "twice"]
    assert {name for name, f in found.items() if f.layer and f.layer.spec.batch is None} == found.keys() - {"twice"}
    assert "call of its own" in (found["twice"].reason or "")
    wrapped = real.Sequential(
        [real.Input((2, 3, 4, 5, 4)), real.layers.TimeDistributed(kind(2, 2, name="wrapped", **zeros))]
    )
    assert [f.name for f in keras.find(wrapped)] == ["wrapped"]


def test_a_layer_has_the_shapes_that_the_model_calls_it_with() -> None:
    """Not those it was built with, nor those of another model; once each, under names of their own."""
    real = pytest.importorskip("keras")
    layer = real.layers.Conv3DTranspose(2, 2, name="up", kernel_initializer="zeros")
    layer.build((None, 9, 9, 9, 4))
    small, large, other = (real.Input((n, n, n, 4)) for n in (2, 3, 5))
    real.Model(other, layer(other))
    found = keras.find(real.Model([small, large], [layer(small), layer(large), layer(small)]))
    assert [f.name for f in found] == ["up", "up_2"]
    assert [f.layer.spec.x_shape[1:4] for f in found if f.layer] == [(2, 2, 2), (3, 3, 3)]
    assert not any(f.layer.remarks for f in found if f.layer)
    inner = real.Sequential([real.Input((2, 2, 2, 4)), layer])
    (nested,) = keras.find(real.Sequential([inner]))
    assert nested.layer is not None
    assert nested.layer.spec.x_shape[1:4] == (2, 2, 2)


def test_a_layer_whose_calls_keras_does_not_note_says_so() -> None:
    real = pytest.importorskip("keras")
    up = real.layers.Conv3DTranspose(2, 2, kernel_initializer="zeros")
    (found,) = keras.find(real.Sequential([real.Input((2, 3, 4, 5, 4)), real.layers.TimeDistributed(up)]))
    assert found.layer is not None
    assert found.layer.spec.x_shape == (None, 3, 4, 5, 4)
    assert any("that this one was built with" in remark for remark in found.layer.remarks)


def test_a_mixed_policy_computes_in_its_half() -> None:
    real = pytest.importorskip("keras")
    layer, x = real.layers.Conv3DTranspose(2, 2, dtype="mixed_float16"), drawn(1, 2, 2, 2, 4)
    y = real.ops.convert_to_numpy(layer(x))
    read = keras.from_layer(layer)
    assert read.weight is not None
    assert read.spec.dtype == read.weight.dtype == read.to_x(x).dtype == y.dtype == "float16"


def test_a_function_is_not_taken_for_keras_s_by_its_name() -> None:
    real = pytest.importorskip("keras")

    def gelu(x: Any) -> Any:
        return 2 * x

    for own in (gelu, real.ops.gelu):
        layer = real.layers.Conv3DTranspose(2, 2, activation=own)
        layer.build((1, 2, 2, 2, 4))
        with pytest.raises(WordsError, match=r"the activation gelu is a function of your own, or of another module"):
            keras.from_layer(layer)
        with pytest.raises(WordsError, match=r"the activation gelu is a function of your own, or of another module"):
            keras.Conv3DTranspose(2, 2, activation=own, input=(1, 2, 2, 2, 4))
    right = real.layers.Conv3DTranspose(2, 2, activation=real.activations.gelu)
    assert keras.from_layer(right, (1, 2, 2, 2, 4)).spec.activation == Activation("gelu")


def test_a_layer_of_the_same_name_is_not_taken_for_theirs() -> None:
    real, nn, layers = pytest.importorskip("torch"), pytest.importorskip("mlx.nn"), pytest.importorskip("keras").layers

    class ConvTranspose3d(real.nn.ConvTranspose3d):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return super().forward(x).relu()

    with pytest.raises(WordsError, match="ConvTranspose3d has a forward of its own"):
        torch.from_module(ConvTranspose3d(4, 6, 3), (1, 4, 3, 3, 3))

    class Conv3DTranspose(layers.Conv3DTranspose):  # type: ignore[misc, name-defined]
        def call(self, x: Any) -> Any:
            return 2 * super().call(x)

    with pytest.raises(WordsError, match="Conv3DTranspose has a call of its own"):
        keras.from_layer(Conv3DTranspose(6, 3), (1, 3, 3, 3, 4))
    plain = nn.ConvTranspose3d(4, 6, 3)

    class ConvTranspose3d(nn.ConvTranspose3d):  # type: ignore[misc, name-defined, no-redef]
        def __call__(self, x: Any) -> Any:
            return 2 * super().__call__(x)

    with pytest.raises(WordsError, match=r"ConvTranspose3d is not an mlx\.nn\.ConvTranspose3d"):
        mlx.from_module(ConvTranspose3d(4, 6, 3), (1, 3, 3, 3, 4))
    with pytest.raises(WordsError, match=r"ConvTranspose3d is not a torch\.nn\.ConvTranspose3d"):
        torch.from_module(plain, (1, 4, 3, 3, 3))
    with pytest.raises(WordsError, match=r"is not an mlx\.nn\.ConvTranspose3d"):
        mlx.from_module(real.nn.ConvTranspose3d(4, 6, 3), (1, 4, 3, 3, 3))
    with pytest.raises(WordsError, match=r"quantized\.\S+ConvTranspose3d is not a torch\.nn\.ConvTranspose3d"):
        torch.from_module(real.ao.nn.quantized.ConvTranspose3d(4, 6, 3), (1, 4, 3, 3, 3))


@pytest.mark.parametrize("system", ["mlx", "keras"])
def test_another_layer_is_refused(system: str) -> None:
    if system == "mlx":
        real = pytest.importorskip("mlx.nn")
        with pytest.raises(WordsError, match=r"Conv3d is not an mlx\.nn\.ConvTranspose3d"):
            mlx.from_module(real.Conv3d(2, 3, 3), (1, 4, 4, 4, 2))
    else:
        real = pytest.importorskip("keras")
        with pytest.raises(WordsError, match=r"Conv3D is not a keras\.layers\.Conv3DTranspose"):
            keras.from_layer(real.layers.Conv3D(2, 3), (1, 4, 4, 4, 2))
        with pytest.raises(WordsError, match="function of your own"):
            keras.Conv3DTranspose(2, 3, activation=lambda v: v, input=(1, 2, 2, 2, 4))
        with pytest.raises(WordsError, match="Could not interpret initializer identifier: foo"):
            keras.Conv3DTranspose(2, 3, kernel_initializer="foo", input=(1, 2, 2, 2, 4), initialize=True)


@pytest.mark.parametrize("kind", ["pt2", "keras"])
def test_a_file_of_such_a_model_is_a_source(kind: str, tmp_path: Path) -> None:
    """The command line compiles what can be compiled of it, with its weights, and names what cannot."""
    path, x = tmp_path / f"model.{kind}", drawn(1, 4, 3, 4, 5)
    if kind == "pt2":
        real = pytest.importorskip("torch")
        model = decoder()
        real.export.save(real.export.export(model, (real.from_numpy(x),)), path)
        with real.no_grad():
            names, y = ["conv_transpose3d", "conv_transpose3d_1"], model[0](real.from_numpy(x)).numpy()
    else:
        real, x = pytest.importorskip("keras"), np.moveaxis(x, 1, -1)
        up = real.layers.Conv3DTranspose(6, 3, 2, padding="same", name="up")
        last = real.layers.Conv3DTranspose(2, 2, activation="softmax", name="last")
        real.Sequential([real.Input(x.shape[1:]), up, last]).save(path)
        names, y = ["up", "last"], real.ops.convert_to_numpy(up(x))
    found = read(path)
    assert [layer.name for layer in found.layers] == names
    done = CliRunner().invoke(cli, ["compile", str(path), "-o", str(tmp_path / "out"), "--no-verify"])
    assert done.exit_code == 0, done.output
    layer = found.layers[0]
    assert layer.spec is not None
    assert layer.weight is not None
    assert compare(layer.spec, load(tmp_path / "out" / names[0])(x), x, layer.weight, layer.bias).passed
    assert compare(layer.spec, y, x, layer.weight, layer.bias).passed
    assert kind == "pt2" or "softmax" in done.output
    with pytest.raises(ModelError, match=f"no 3-D transposed convolution 'other'; it has: {names[0]}"):
        read(path, ["other"])
    with pytest.raises(ModelError, match="there is no file"):
        read(tmp_path / f"absent.{kind}")


def test_keras_without_its_backend_is_told_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "keras"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent("tensorflow"), *sys.meta_path])
    with pytest.raises(EngineError, match="set KERAS_BACKEND"):
        keras.find("model.keras")


class Absent:
    """A finder for which Keras lacks its backend."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "keras":
            raise ModuleNotFoundError(f"No module named {self.name!r}", name=self.name)


def test_initializers_build_weights() -> None:
    pytest.importorskip("keras")
    words = {"kernel_initializer": "ones", "bias_initializer": "zeros", "input": (1, 2, 2, 2, 4)}
    layer = keras.Conv3DTranspose(3, 2, **words, initialize=True)
    assert layer.weight is not None
    assert layer.bias is not None
    assert (layer.weight.shape, layer.weight.min(), layer.bias.max()) == ((4, 3, 2, 2, 2), 1, 0)


# --- the other way ---


@pytest.mark.parametrize("act", ["leaky_relu:0.3", "elu:0.5"])
def test_a_keras_layer_s_activation_computes_in_the_layer_s_dtype(act: str) -> None:
    real = pytest.importorskip("keras")
    spec = ConvTranspose3d.parse(f"in=1x2x3x3x3 co=3 k=2 s=2 bias=0 act={act} dtype=float16 layout=NDHWC")
    x, w = drawn(1, 3, 3, 3, 2).astype(np.float16), drawn(*spec.w_shape).astype(np.float16)
    y = real.ops.convert_to_numpy(keras.layer(spec, w)(x))
    assert y.dtype == np.float16
    assert np.abs(y - reference(spec, x, w)).max() < 0.02
    with pytest.raises(WordsError, match="negative slope"):
        keras.words(ConvTranspose3d.parse("in=1x2x3x3x3 co=3 k=2 s=2 act=leaky_relu:-0.5"))


SAID = [
    "in=2x4x3x4x5 co=6 k=3x2x3 s=2x1x3 p=1 op=1x0x2 g=2",
    "in=2x4x3x4x5 co=6 k=4 s=2 p=1 bias=0 act=leaky_relu:0.2",
    "in=2x4x3x4x5 co=6 k=3 s=2 p=0:1 act=gelu layout=NDHWC",
    "in=2x4x3x4x5 co=6 k=2 s=3 op=1 act=hard_silu layout=NDHWC",
    "in=2x4x3x4x5 co=6 k=3 d=2 p=2 act=elu:0.5",
    "in=2x4x3x4x5 co=6 k=3 s=2 p=0:1 act=elu:0.5 layout=NDHWC",
    "in=2x4x3x4x5 co=6 k=2 s=2 act=leaky_relu:0.01 layout=NDHWC",
    "in=2x4x3x4x5 co=6 k=2 s=2 act=log_sigmoid",
    "in=2x4x3x4x5 co=6 k=2 s=2 act=soft_shrink",
    "in=2x4x3x4x5 co=6 k=2 s=2 act=hard_shrink",
]


@pytest.mark.parametrize("text", SAID)
def test_a_spec_becomes_a_layer_of_theirs(text: str) -> None:
    """PyTorch's and Keras's layer compute what the spec does, where they can say it; somebody always can."""
    real, real_keras = pytest.importorskip("torch"), pytest.importorskip("keras")
    spec = ConvTranspose3d.parse(text)
    x, w = drawn(*at_batch(spec.x_shape, 1)), drawn(*spec.w_shape)
    b = drawn(6) if spec.bias else None
    said = 0
    for system in ("torch", "keras"):
        try:
            if system == "torch":
                with real.no_grad():
                    y = torch.module(spec, w, b)(real.from_numpy(x)).numpy()
            else:
                y = real_keras.ops.convert_to_numpy(keras.layer(spec, w, b)(x))
        except WordsError:
            continue
        said += 1
        assert compare(spec, y, x, w, b).passed, system
    assert said


@pytest.mark.parametrize("make", [torch.module, keras.layer])
def test_values_of_another_shape_fill_no_module(make: Any) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("keras")
    with_bias, without = (ConvTranspose3d.parse(f"in=1x2x2x2x2 co=2 k=2 bias={bias}") for bias in "10")
    w, b = drawn(2, 2, 2, 2, 2), drawn(2)
    make(with_bias, w, b)
    for weight in (np.float32(3), np.zeros(2), np.zeros((1, 1, 2, 2, 2))):
        with pytest.raises(WordsError, match=r"the weight has shape .*, but opcompile stores this layer's as"):
            make(with_bias, weight, b)
    for bias in (np.float32(3), np.zeros(1), np.zeros(3)):
        with pytest.raises(WordsError, match=r"the bias has shape .*, but the layer gives 2 channels"):
            make(with_bias, w, bias)
    with pytest.raises(WordsError, match="the layer has no bias, but values of one were given"):
        make(without, w, b)
    with pytest.raises(WordsError, match="of type str was given, but it must be an array of numbers"):
        make(with_bias, "x")
