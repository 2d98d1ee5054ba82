"""ONNX Runtime as `replace` asks it: sessions with and without our library, and inputs for a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.errors import EngineError, first_line

Tensor = NDArray[Any]
Feeds = Mapping[str, Tensor]


def version() -> str:
    """Return ONNX Runtime's version. Raises `EngineError` where it is not installed."""
    return str(_onnxruntime().__version__)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(f"the package onnxruntime is not installed ({error}); pip install onnxruntime") from error
    return onnxruntime


class Session:
    """A model on the CPU, its file or its bytes; with ``library`` our operators are known to it.

    Raises `EngineError`, with ONNX Runtime's own words, for what it refuses.
    """

    def __init__(self, model: Path | bytes, library: Path | None = None, threads: int = 1) -> None:
        """Load and prepare the model."""
        onnxruntime = _onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        # its waiting threads may spin during a call, but not into the turns of others
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._value = onnxruntime.OrtValue
        try:
            if library is not None:
                options.register_custom_ops_library(str(library))
            given = model if isinstance(model, bytes) else str(model)
            self._session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # they share no base, and each is a refusal
            raise EngineError(first_line(error)) from error
        self.inputs = {i.name: (i.type, tuple(i.shape)) for i in self._session.get_inputs()}
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def __call__(self, feeds: Feeds) -> dict[str, Tensor]:
        """Run the model. Raises `EngineError`."""
        try:
            answers = self._session.run(None, {name: feeds[name] for name in self.inputs})
        except Exception as error:  # as above
            raise EngineError(first_line(error)) from error
        named = dict(zip(self.outputs, answers, strict=True))
        for name, answer in named.items():
            if isinstance(answer, (list, dict)):
                raise EngineError(f"output {name} is a {type(answer).__name__}, and only tensors are compared")
        return {name: np.asarray(answer) for name, answer in named.items()}

    def runner(self, feeds: Feeds, again: bool = True) -> Callable[[], None]:
        """Return a function that runs the model on inputs that stay where they are.

        It writes into the same outputs ``again``, or into new ones each time.
        """
        binding = self._session.io_binding()
        for name in self.inputs:
            binding.bind_ortvalue_input(name, self._value.ortvalue_from_numpy(np.ascontiguousarray(feeds[name])))

        def bind() -> None:
            for name in self.outputs:
                binding.bind_output(name)

        def run_into_new() -> None:
            bind()
            self._session.run_with_iobinding(binding)

        bind()
        return (lambda: self._session.run_with_iobinding(binding)) if again else run_into_new

    def writes_again(self, feeds: Feeds) -> bool:
        """Whether the model runs into outputs that it has written; not where it declares another shape for them.

        Raises `EngineError` where it does not run at all.
        """
        run = self.runner(feeds)
        try:
            run()
        except Exception as error:  # as above
            raise EngineError(first_line(error)) from error
        try:
            run()
        except Exception:  # noqa: BLE001 - as above
            return False
        return True


# --- inputs of a whole model ---


@dataclass(frozen=True, slots=True)
class InputSet:
    """Inputs of a model, and what they are called; whether the model leaves sizes ``open`` that were chosen for it."""

    name: str
    feeds: Feeds
    open: bool = False


def input_sets(session: Session, shapes: Sequence[Mapping[str, Sequence[int | str]]], seed: int) -> list[InputSet]:
    """Draw inputs of every kind for each of ``shapes`` of the inputs; an open size counts as 1, then as 2.

    Raises `EngineError` for an input that is no tensor of numbers.
    """
    sets = []
    for number, shape in enumerate(shapes or [{}]):
        of_file = {name: shape.get(name, given) for name, (_, given) in session.inputs.items()}
        is_open = any(not isinstance(size, int) for sizes in of_file.values() for size in sizes)
        for size in (1, 2) if is_open else (1,):
            rng = np.random.default_rng([seed, number, size])
            sizes = {name: [n if isinstance(n, int) else size for n in of_file[name]] for name in of_file}
            label = f", open sizes {size}" if is_open else ""
            label += f", shape {number + 1}" if len(shapes) > 1 else ""
            for kind, draw in _KINDS.items():
                feeds = {
                    name: _drawn(name, of_type, sizes[name], draw, rng) for name, (of_type, _) in session.inputs.items()
                }
                sets.append(InputSet(kind + label, feeds, is_open))
    return sets


def _drawn(name: str, of_type: str, shape: Sequence[int], draw: Any, rng: np.random.Generator) -> Tensor:
    kind = of_type.removeprefix("tensor(").removesuffix(")")
    if kind in ("float", "double", "float16"):
        dtype = {"float": np.float32, "double": np.float64, "float16": np.float16}[kind]
        return np.ascontiguousarray(draw(rng, tuple(shape)), dtype)
    if kind == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if kind.removeprefix("u") in ("int8", "int16", "int32", "int64"):
        return rng.integers(0, 2, shape).astype(kind)
    raise EngineError(f"input {name} is a {of_type}, and inputs are drawn for tensors of numbers only")


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return rng.standard_normal(shape, np.float32)


def _ones(_: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return np.ones(shape, np.float32)


def _impulse(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    x = np.zeros(shape, np.float32)
    if x.size:
        x.reshape(-1)[rng.integers(x.size)] = 1
    return x


def _alternating(_: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Neighbours of opposite signs: what instance norms and strided layers see at their worst."""
    return np.asarray(1 - 2 * (np.indices(shape).sum(axis=0) % 2), np.float32)


def _wide(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Numbers of every size between a thousandth and a thousand: what reaches the clamps and epsilons of a model."""
    return np.asarray(np.ldexp(rng.standard_normal(shape, np.float32), rng.integers(-10, 11, shape)), np.float32)


_KINDS = {"normal": _normal, "ones": _ones, "impulse": _impulse, "alternating": _alternating, "wide": _wide}
