"""Real models with replaced nodes are the same models, and keep all else that they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

import opcompile
from opcompile.target import cores
from tests.replaced import MODELS, operators

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("mode", ["rewrite", "override"])
@pytest.mark.parametrize("name", ["dynunet", "dynunet_dynamic_batch", "unet", "vqvae"])
def test_real_models(name: str, mode: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = opcompile.replace(MODELS / f"{name}.onnx", into=out, mode=mode, plan="baseline", measure=False)
    assert report.passed
    assert [node.status for node in report.nodes] == ["replaced"] * len(report.nodes)
    assert len(report.nodes) >= 2
    assert {proof.check.criterion for kernel in report.kernels for proof in kernel.proofs} >= {"bits", "bound"}
    assert len(report.checks) >= 4 * min(2, cores())  # four input sets, on one thread and on two where there are
    assert all(check.error < check.bound for check in report.checks if check.bound)
    if mode == "rewrite":
        original = onnx.load(MODELS / f"{name}.onnx")
        edited = onnx.load(out / f"{name}.onnx")
        assert operators(out / f"{name}.onnx").count("ConvTranspose3d") == len(report.nodes)
        for field in ("producer_name", "producer_version", "doc_string", "metadata_props", "ir_version"):
            assert getattr(edited, field) == getattr(original, field)
        assert (edited.graph.input, edited.graph.output) == (original.graph.input, original.graph.output)
        # weights are held packed, and only so
        assert len(edited.graph.initializer) == len(original.graph.initializer)
    else:
        assert sorted(path.name for path in out.iterdir()) == ["opcompile_ops.so", "report.json"]
