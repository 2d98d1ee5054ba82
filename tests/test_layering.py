"""The two walls and the arrows, read from the import statements, those inside functions included."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import opcompile
import schedules

PACKAGES = [Path(opcompile.__file__).parent, Path(schedules.__file__).parent]
MODULES = {
    ".".join([package.name, *path.relative_to(package).with_suffix("").parts]): path
    for package in PACKAGES
    for path in sorted(package.rglob("*.py"))
}

# What a module of ours may import of ours, where design says so: everything below it, and no more.
BELOW = {
    "opcompile.errors": set(),
    "opcompile.digest": set(),
    "opcompile.meant": set(),
    "opcompile.paths": {"opcompile.errors"},
    "opcompile.arguments": {"opcompile.errors"},
    "opcompile.needed": {"opcompile.errors"},
    "opcompile.spec": {"opcompile.errors", "opcompile.meant"},
    "opcompile.cases": {"opcompile.errors", "opcompile.spec"},
    "opcompile.reference": {"opcompile.errors", "opcompile.spec"},
    "opcompile.bounds": {"opcompile.errors", "opcompile.spec", "opcompile.reference"},
    "opcompile.packing": {"opcompile.errors"},
    "opcompile.gpus": {"opcompile.errors", "opcompile.meant"},
    "opcompile.target": {"opcompile.errors", "opcompile.gpus", "opcompile.meant"},
    "opcompile.launch": {"opcompile.errors"},
    "opcompile.nvcc": {"opcompile.errors", "opcompile.gpus", "opcompile.machine", "opcompile.paths"},
    "opcompile.cuda_driver": {"opcompile.errors", "opcompile.gpus"},
    "opcompile.trials": set(),
    "opcompile.farm": {"opcompile.errors", "opcompile.trials"},
    "opcompile.job": {"opcompile.errors", "opcompile.record"},
    "opcompile.compiled": {
        "opcompile.elementary",
        "opcompile.paths",
        "opcompile.target",
        "schedules.imported",
        "schedules.statements",
    },
    "opcompile.elementary": set(),
    "opcompile.activations": {"opcompile.elementary", "opcompile.spec"},
    "opcompile.positions": {"opcompile.spec"},
    "opcompile.declare": {"opcompile.activations", "opcompile.positions", "opcompile.spec"},
    "opcompile.graph": {"opcompile.errors", "opcompile.paths", "opcompile.spec"},
    "opcompile.tensors": {"opcompile.errors", "opcompile.needed", "opcompile.spec"},
    "opcompile.engines": {
        "opcompile.bounds",
        "opcompile.errors",
        "opcompile.manifest",
        "opcompile.runtime",
        "opcompile.spec",
        "opcompile.tensors",
    },
    "opcompile.say": {"opcompile.errors", "opcompile.spec"},
    "opcompile.importers.imported": {"opcompile.errors", "opcompile.needed", "opcompile.spec"},
    "opcompile.ask": {"opcompile.errors", "opcompile.importers.imported", "opcompile.say"},
    **{
        f"opcompile.importers.{system}": {
            "opcompile.errors",
            "opcompile.importers.imported",
            "opcompile.importers.mlx",
            "opcompile.needed",
            "opcompile.paths",
            "opcompile.say",
            "opcompile.spec",
        }
        for system in ("files", "jax", "keras", "lucid", "mlx", "rmlx", "tensorflow", "torch")
    },
    "opcompile.gradients.gradient": {"opcompile.errors", "opcompile.spec"},
    "opcompile.gradients.reference": {"opcompile.gradients.gradient", "opcompile.reference", "opcompile.spec"},
    "opcompile.gradients.bounds": {
        "opcompile.bounds",
        "opcompile.errors",
        "opcompile.gradients.gradient",
        "opcompile.gradients.reference",
        "opcompile.reference",
        "opcompile.spec",
    },
    "opcompile.gradients.declare": {
        "opcompile.declare",
        "opcompile.elementary",
        "opcompile.gradients.gradient",
        "opcompile.positions",
        "opcompile.spec",
    },
    "opcompile.roofline": set(),
    "opcompile.probes": {
        "opcompile.bounds",
        "opcompile.roofline",
        "opcompile.target",
        "schedules.imported",
        "schedules.pairs",
    },
}
# Nobody below the command line knows of it.
TOP = "opcompile.cli"


class _Imports(ast.NodeVisitor):
    """Collect imported modules; what stands under ``if TYPE_CHECKING`` is never imported at run time."""

    def __init__(self, package: str, *, types_too: bool) -> None:
        self.package, self.types_too, self.found = package, types_too, set()

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test) and not self.types_too:
            nodes = node.orelse
        else:
            nodes = [*node.body, *node.orelse]
        for child in nodes:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            base = ".".join([*self.package.split(".")[: len(self.package.split(".")) - node.level + 1], base]).strip(
                "."
            )
        # `from opcompile import artifact` imports a module, `from opcompile.spec import Axis` a name
        self.found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}

    def visit_Call(self, node: ast.Call) -> None:
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            self.found.add(str(first.value))
        self.generic_visit(node)


def imports(module: str, source: str, *, types_too: bool = False) -> set[str]:
    visitor = _Imports(module.rpartition(".")[0], types_too=types_too)
    visitor.visit(ast.parse(source))
    return visitor.found


@cache
def imports_of(module: str, *, types_too: bool = False) -> set[str]:
    return imports(module, MODULES[module].read_text(), types_too=types_too)


def roots(found: set[str]) -> set[str]:
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_both_tvm_and_onnx(module: str) -> None:
    found = roots(imports_of(module, types_too=True))
    assert not ("tvm" in found and found & {"onnx", "onnxruntime"})


JUDGES = [
    f"gradients.{name}" for name in ("gradient", "reference", "bounds", "golden", "verify", "runtime", "simulate")
]


RUNNERS = ["runtime", "tensors", "manifest", "golden"]


TIMERS = ["runtime_cuda", "cuda_driver", "trials", "job", "measure", "_measure_gpu"]


@pytest.mark.parametrize(
    "module", ["reference", "bounds", "verify", *RUNNERS, "packing", "spec", "cases", "errors", *JUDGES, *TIMERS]
)
def test_these_import_neither(module: str) -> None:
    found = roots(imports_of(f"opcompile.{module}", types_too=True))
    assert not found & {"tvm", "onnx"}


@pytest.mark.parametrize(
    "module", ["reference", "bounds", "spec", "cases", "errors", "packing", "say", "importers.rmlx", "importers.jax"]
)
def test_these_need_numpy_at_most(module: str) -> None:
    import sys

    found = roots(imports_of(f"opcompile.{module}"))
    assert found <= {*sys.stdlib_module_names, "numpy", "opcompile"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("schedules")])
def test_schedules_know_the_spec_as_a_type_only(module: str) -> None:
    assert "opcompile" not in roots(imports_of(module))


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("schedules") or "importers" in m])
def test_these_do_not_reach_across(module: str) -> None:
    found = roots(imports_of(module, types_too=True))
    assert not found & ({"onnx", "onnxruntime"} if module.startswith("schedules") else {"tvm", "schedules"})


@pytest.mark.parametrize("module", BELOW)
def test_arrows_point_down(module: str) -> None:
    found = {name for name in imports_of(module) if name.startswith(("opcompile", "schedules"))}
    assert found <= BELOW[module]


def test_nothing_imports_the_command_line() -> None:
    importers = [m for m in MODULES if TOP in imports_of(m) and not m.endswith("__main__")]
    assert importers == []


def test_run_time_imports_have_no_cycle() -> None:
    """At the top of modules, that is; an import inside a function may point anywhere that the walls allow."""
    edges = {}
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        found = imports(module, ast.unparse(tree)) - {module}
        edges[module.removesuffix(".__init__")] = {name for name in found if name in MODULES}
    done: set[str] = set()
    while len(done) < len(edges):
        ready = {m for m in edges if m not in done and edges[m] <= done}
        assert ready, {m: edges[m] - done for m in edges if m not in done}
        done |= ready


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import tvm.ir as i", {"tvm.ir"}),
        ("def f():\n    from onnx import helper", {"onnx"}),
        ("from opcompile import reference", {"opcompile.reference"}),
        ("from .spec import Axis", {"opcompile.spec"}),
        ("from . import spec", {"opcompile.spec"}),
        ("import importlib\nimportlib.import_module('tvm')", {"importlib", "tvm"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tvm", {"typing"}),
    ],
)
def test_the_reader_of_imports_sees_them(source: str, found: set[str]) -> None:
    assert imports("opcompile.example", source) == found
