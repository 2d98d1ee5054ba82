"""The grids of `tests/conformance`, each in a process of its own, and the page that they wrote."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
from conformance.page import HERE, PAGE, Environment, results

PACKAGES = {"with_torch": ["torch", "expecttest"], "with_keras": ["keras", "torch", "jax"], "with_mlx": ["mlx"]}


@pytest.mark.peers
@pytest.mark.parametrize("environment", HERE, ids=lambda e: e.system)
def test_the_real_system_computes_what_its_words_mean_to_us(environment: Environment) -> None:
    package = environment.module.removeprefix("with_")
    for name in PACKAGES.get(environment.module, [package]):
        if not find_spec(name):
            pytest.skip(f"{name} is not installed")
    suites = results(environment)
    assert [f"{r['suite']}: {line}" for r in suites for line in r["failed"]] == []
    assert sum(r["cases"] for r in suites) >= 100
    for r in suites:
        assert r["cases"] == r["passed"] + r["refused"] + sum(r["not_run"].values())
    assert sum(r["compiled"] for r in suites) >= 1


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[1:]]


def test_the_page_shows_no_failing_case() -> None:
    assert rows()
    for system, *_, failed, why in rows():
        assert failed == "0", system
        assert why


@pytest.mark.parametrize(
    "system",
    ["PyTorch", "MLX", "Keras (jax)", "Keras (torch)", "JAX", "TensorFlow", "Lucid", "OpenVINO", "TVM topi.testing"],
)
def test_the_page_has_a_hundred_cases_of_each_system(system: str) -> None:
    assert sum(int(row[3]) for row in rows() if row[0] == system) >= 100


def test_the_page_adds_up() -> None:
    for _, _, _, cases, passed, _, refused, failed, why in rows():
        not_run = sum(int(count) for count in re.findall(r"(?:^|; )(\d+): ", why))
        assert int(cases) == int(passed) + int(refused) + int(failed) + not_run
