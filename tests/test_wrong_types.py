"""An argument of another type than it should be is named, with the rule: Python's own error would name neither."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import opcompile
from opcompile.errors import OpcompileError

LAYER = opcompile.ConvTranspose3d.parse("in=1x2x2x2x2 co=2 k=2")
# all that is looked at before the words beside it
HERE = SimpleNamespace(manifest={})
UNET = Path(__file__).parent / "models" / "unet.onnx"
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "parse": (lambda: opcompile.ConvTranspose3d.parse(None), "read from a str like 'in=1x64.* of type NoneType"),
    "activation": (lambda: opcompile.Activation.parse(3), "read from a str like 'leaky_relu:0.2'.* of type int"),
    "name": (lambda: opcompile.Activation(["relu"]), r"activation \['relu'\] is unknown"),
    "parameters": (lambda: opcompile.Activation("leaky_relu", 0.1), "parameters 0.1, but they must be numbers"),
    "target": (lambda: opcompile.compile(LAYER, target=None), "target is of type NoneType, but must be a str"),
    "into": (lambda: opcompile.compile(LAYER, into=b"x"), "into is of type bytes, but must be a path"),
    "load": (lambda: opcompile.load(3), "path is of type int, but must be a path"),
    "zero": (lambda: opcompile.load("a\0b"), "no path has a zero byte in it"),
    "export": (lambda: opcompile.export_onnx(LAYER, None), "path is of type NoneType, but must be a path"),
    "find": (lambda: opcompile.find(LAYER), "the model is of type ConvTranspose3d, but must be a path"),
    "shapes": (lambda: opcompile.find(UNET, shapes=[1]), r"shapes is \[1\], but must name each input"),
    "sizes": (lambda: opcompile.find(UNET, shapes={"x": (1, 1, 8.0, 8, 8)}), "whole number of at least 1 for each"),
    "above": (lambda: opcompile.find(UNET, shapes={"x": (1, 1, 2**63, 8, 8)}), "whole number of at least 1 for each"),
    "text": (lambda: opcompile.find(UNET, shapes={"x": "1x1x8x8x8"}), "whole number of at least 1 for each"),
    "below": (lambda: opcompile.find(UNET, shapes={"x": (1, 1, 0, 8, 8)}), "whole number of at least 1 for each"),
    "replace": (lambda: opcompile.replace(None, "out"), "model is of type NoneType, but must be a path"),
    "nodes": (lambda: opcompile.replace(UNET, "out", nodes="node"), "nodes is of type str, but must be a list"),
    "threads": (lambda: opcompile.replace(UNET, "out", threads=2), "threads is of type int, but must be a list"),
    "seconds": (lambda: opcompile.replace(UNET, "out", seconds="1"), "seconds is '1', but must be a number"),
    "plan": (lambda: opcompile.replace(UNET, "out", plan="fast"), "plan 'fast' is unknown; use best"),
    "verify": (lambda: opcompile.verify(LAYER), "a ConvTranspose3d cannot be verified; opcompile.compile and load"),
    "engines": (lambda: opcompile.verify(HERE, engines=3), "engines is of type int, but must be a list"),
    "engine": (lambda: opcompile.verify(HERE, engines="reference"), "engines is of type str, but must be a list"),
    "seed": (lambda: opcompile.verify(HERE, seed="one"), "seed is 'one', but must be a whole number of at least 0"),
    "below zero": (lambda: opcompile.replace(UNET, "out", seed=-1), "seed is -1, but must be a whole number"),
    "tuned into": (lambda: opcompile.tune(LAYER, into=3), "into is of type int, but must be a path"),
    "tracker": (lambda: opcompile.tune(LAYER, tracker=3, key="k"), "tracker 3 is not of the form HOST:PORT"),
    "work_dir": (lambda: opcompile.tune(LAYER, work_dir=3), "work_dir is of type int, but must be a path"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_of_another_type_is_named_with_the_rule(name: str) -> None:
    call, words = WRONG[name]
    with pytest.raises(OpcompileError, match=words):
        call()
