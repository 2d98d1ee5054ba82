"""Named machines: what they promise, and that code is really made for them."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from tvm.target import codegen

from opcompile import lower
from opcompile import target as module
from opcompile.errors import TargetError, UnknownTargetError
from opcompile.spec import ConvTranspose3d
from opcompile.target import any_target, names, target

SMALL = ConvTranspose3d.parse("in=1x4x2x2x6 co=5 k=2 s=2 act=relu")
X86_64, AARCH64, MACH_O_ARM64 = 62, 183, 0x0100000C


def architecture(code: bytes) -> int:
    """The machine an ELF or Mach-O object is for."""
    if code[:4] == b"\x7fELF":
        return int(struct.unpack_from("<H", code, 18)[0])
    assert code[:4] == b"\xcf\xfa\xed\xfe"
    return int(struct.unpack_from("<I", code, 4)[0])


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("llvm:x86-64-v2", X86_64),
        ("llvm:x86-64-v3", X86_64),
        ("llvm:sapphirerapids", X86_64),
        ("llvm:cortex-a76", AARCH64),
        ("llvm:apple-m1", MACH_O_ARM64),
    ],
)
def test_code_is_made_for_the_named_machine_wherever_it_is(name: str, machine: int) -> None:
    assert architecture(lower.lower(SMALL, target(name), "baseline").object_code) == machine


@pytest.mark.parametrize("name", names())
def test_every_name_is_a_processor_that_llvm_knows(name: str) -> None:
    found = target(name)
    config = {"kind": "llvm", "mtriple": found.triple, "mcpu": found.mcpu}
    assert codegen.llvm_is_valid_cpu(found.mcpu, found.triple), config
    assert found.machine.vector_bytes * 8 in (128, 256, 512)


def test_this_machine_has_a_name_and_runs_its_own_code() -> None:
    here = target("llvm")
    assert here.name.startswith("llvm:")
    assert here.name in names()
    assert here.native
    assert replace(here, machine=target(here.name).machine) == target(here.name)


@pytest.mark.parametrize(
    ("vendor", "family", "units"), [("AuthenticAMD", "25", 1), ("AuthenticAMD", "26", 2), ("GenuineIntel", "6", 2)]
)
def test_this_machine_knows_that_zen_4_halves_wide_vectors(
    monkeypatch: pytest.MonkeyPatch, vendor: str, family: str, units: int
) -> None:
    said = {"vendor_id": vendor, "cpu family": family}
    monkeypatch.setattr(module, "_here", lambda: "x86-64-v4")
    monkeypatch.setattr(module, "_cpuinfo", lambda name: said.get(name, ""))
    here = target("llvm")
    assert (here.name, here.machine.fma_units) == ("llvm:x86-64-v4", units)


def test_a_feature_that_is_missing_is_named() -> None:
    wanting = replace(target("llvm"), features=("warp_drive",))
    assert not wanting.native
    assert wanting.missing_features() == ("warp_drive",)


@pytest.mark.parametrize("name", ["llvm:pentium", "gpu", "cuda:sm_90", "metal:apple-m1", "", "llvm:"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(TargetError, match="llvm:x86-64-v3"):
        target(name)


def test_an_unsupported_machine_asks_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "riscv64")
    with pytest.raises(TargetError, match=r"riscv64.*llvm:cortex-a76"):
        target("llvm")


def test_wide_vectors_are_used_where_the_machine_has_them() -> None:
    lanes = {
        name: lower.choose(SMALL, target(f"llvm:{name}"), "baseline")[0].lanes for name in ("x86-64-v2", "x86-64-v4")
    }
    assert lanes == {"x86-64-v2": 4, "x86-64-v4": 16}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("sm_90", "did you mean cuda:sm_90? use one of llvm"),
        ("cuda:SM90", "did you mean cuda:sm_90?"),
        ("cuda:h100", "did you mean cuda:sm_90?"),
        ("RTX4090", "did you mean cuda:sm_89?"),
        ("apple-m1", "did you mean llvm:apple-m1 or metal:apple-m1?"),
        ("x86-64-v3", "did you mean llvm:x86-64-v3?"),
        ("llvm:skylake", "did you mean llvm:skylake-avx512?"),
        ("cpu", "did you mean llvm?"),
        ("cuda", "'cuda' is unknown; use one of cuda:sm_75"),
        ("llvm:pdp-11", "'llvm:pdp-11' is unknown; use one of llvm"),
        ("vax", "'vax' is unknown; use one of llvm"),
    ],
)
def test_a_name_that_stands_for_no_target_is_bad_input_and_near_ones_are_named(given: str, words: str) -> None:
    with pytest.raises(UnknownTargetError) as error:
        any_target(given)
    assert words in str(error.value)
    assert error.value.exit_code == 2
