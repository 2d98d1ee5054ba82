"""What is said of one thing is said of one: no `1 CPUs`, no `row(s)`."""

from __future__ import annotations

import os
import re

import pytest

from opcompile import doctor
from opcompile.cases import Case, tagged
from opcompile.target import cores, target
from opcompile.tune import _this_device
from opcompile.verify import here
from schedules import llvm
from schedules.counted import counted

_WRONG = re.compile(r"\b1 (?!s\b|x\b|ms\b|us\b)[a-z]+s\b|\(s\)", re.IGNORECASE)


def test_one_thing_and_several() -> None:
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in tagged("corner")])
def test_why_tiles_were_chosen(case: Case) -> None:
    lines = llvm.baseline(case.spec, target("llvm:x86-64-v3").machine).why()
    assert not [line for line in lines if _WRONG.search(line)]


def test_a_machine_with_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert cores() == 1
    found = {each.what: each.found for each in doctor.doctor(build=False)}
    assert found["threads"].startswith("1 CPU usable")
    assert "1 multiply-adds" not in found["target llvm"]
    assert "1 CPU, Python" in here()
    assert _this_device().endswith(", 1 core")
