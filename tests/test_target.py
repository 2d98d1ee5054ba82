"""Named machines: what they promise, and that code is really made for them."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from tvm.target import codegen

from opcompile import lower
from opcompile import target as module
from opcompile.errors import TargetError, UnknownTargetError
from opcompile.gpus import FLAGS, gpu_names, gpu_target, runs_on
from opcompile.spec import ConvTranspose3d
from opcompile.target import any_target, names, target

SMALL = ConvTranspose3d.parse("in=1x4x2x2x6 co=5 k=1x1x2 s=1x1x2 act=relu")
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
    ("level", "vendor", "family", "own"),
    [
        ("x86-64-v3", "AuthenticAMD", "25", "znver3"),
        ("x86-64-v4", "AuthenticAMD", "25", "znver4"),
        ("x86-64-v4", "AuthenticAMD", "26", "znver5"),
        ("x86-64-v3", "GenuineIntel", "25", "x86-64-v3"),
        ("x86-64-v4", "GenuineIntel", "6", "x86-64-v4"),
        ("x86-64-v4", "AuthenticAMD", "99", "x86-64-v4"),
    ],
)
def test_this_machine_has_the_numbers_of_its_own_processor(
    monkeypatch: pytest.MonkeyPatch, level: str, vendor: str, family: str, own: str
) -> None:
    said = {"vendor_id": vendor, "cpu family": family}
    monkeypatch.setattr(module, "_here", lambda: level)
    monkeypatch.setattr(module, "_cpuinfo", lambda name: said.get(name, ""))
    here = target("llvm")
    assert (here.name, here.machine) == (f"llvm:{level}", target(f"llvm:{own}").machine)


def test_zen_4_alone_halves_wide_vectors() -> None:
    halving = [name for name in names()[1:] if target(name).machine.halved is not None]
    assert halving == ["llvm:znver4"]


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
        ("sm_80+tf32", "did you mean cuda:sm_80+tf32? use one of llvm"),
        ("A100+tf32", "did you mean cuda:sm_80+tf32?"),
        ("apple-m2+simdgroup", "did you mean metal:apple-m2+simdgroup? use"),
        ("cuda:sm_87", "did you mean cuda:sm_86?"),
        ("cuda:sm_103a", "did you mean cuda:sm_100?"),
        ("sm_87+tf32", "did you mean cuda:sm_86+tf32?"),
        ("cuda:sm_80+sm_99", "did you mean cuda:sm_90?"),
        ("cuda:sm_70", "is unknown; none runs on a GPU that is earlier than compute capability 7.5; use one of"),
        ("sm_60", "none runs on a GPU that is earlier than compute capability 7.5"),
        ("cuda:sm_90+bf16", "'cuda:sm_90+bf16': +bf16 is for llvm targets alone; leave it out"),
        ("metal:apple-m1+apple-m2", "for Metal is for one GPU, and apple-m1 and apple-m2 are 2; compile for each"),
        ("llvm+tf32", "'llvm+tf32': +tf32 is for cuda targets alone; leave it out"),
        ("llvm:znver4+simdgroup", "+simdgroup is for metal targets alone"),
        ("cuda:sm_80+TF32", "'cuda:sm_80+TF32' is unknown; did you mean tf32? use one of cuda:sm_75"),
        ("cuda:sm_75+TF32", "'cuda:sm_75+TF32' is unknown; did you mean tf32?"),
        ("cuda:A100+tf32", "did you mean cuda:sm_80?"),
        ("metal:apple-m2+simdgroups", "did you mean simdgroup?"),
        ("cuda:sm_80+", "did you mean cuda:sm_80?"),
        ("cuda", "'cuda' is unknown; use one of cuda:sm_75"),
        ("llvm:pdp-11", "'llvm:pdp-11' is unknown; use one of llvm"),
        ("znver4+bf16", "did you mean llvm:znver4+bf16?"),
        ("llvm:znver4+BF16", "did you mean llvm:znver4+bf16?"),
        (
            "llvm:zen4+bf16",
            "with a flag llvm:x86-64-v4+bf16, llvm:sapphirerapids+bf16, llvm:znver4+bf16, llvm:znver5+bf16",
        ),
        ("llvm:znver4+fp16", "unknown"),
        ("llvm:znver4+", "unknown"),
        ("cuda:sm_80+bf16", "+bf16 is for llvm targets alone"),
        ("vax", "'vax' is unknown; use one of llvm"),
    ],
)
def test_a_name_that_stands_for_no_target_is_bad_input_and_near_ones_are_named(given: str, words: str) -> None:
    with pytest.raises(UnknownTargetError) as error:
        any_target(given)
    assert words in str(error.value)
    assert error.value.exit_code == 2


# --- flags of GPUs ---


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("cuda:sm_80+tf32", "cuda:sm_80+tf32"),
        ("cuda:tf32+sm_90+tf32+sm_80", "cuda:sm_90+sm_80+tf32"),
        ("cuda:sm_90+sm_80+sm_90", "cuda:sm_90+sm_80"),
        ("metal:simdgroup+apple-m2", "metal:apple-m2+simdgroup"),
    ],
)
def test_a_flag_has_one_place_in_a_name_and_nothing_is_in_it_twice(given: str, canonical: str) -> None:
    found = gpu_target(given)
    assert found.name == canonical
    assert found.fields()["name"] == canonical
    assert gpu_target(canonical) == found


def test_a_flag_is_no_architecture() -> None:
    found = gpu_target("cuda:sm_80+sm_90+tf32")
    assert found.archs == ("sm_80", "sm_90")
    assert found.fields()["archs"] == ["sm_80", "sm_90"]
    assert found.fields()["features"] == ["tf32"]
    assert found.machine == "cuda:sm_80+tf32"
    assert runs_on(found.archs, (9, 0))
    assert not runs_on(found.archs, (7, 5))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda:sm_75+tf32", r"\+tf32 needs compute capability 8\.0 or later, and sm_75 is earlier"),
        ("cuda:sm_90+sm_75+tf32", "sm_75 is earlier"),
        ("metal:apple-m1+tf32", r"\+tf32 is for cuda targets alone"),
        ("cuda:sm_90+simdgroup", r"\+simdgroup is for metal targets alone"),
        ("cuda:tf32", r"unknown.*\+tf32 \(cuda\)"),
        ("cuda:sm_80+fast", "unknown"),
        ("metal:apple-m1+apple-m2+simdgroup", "for one GPU"),
        ("cuda:", "unknown"),
    ],
)
def test_a_flag_that_does_not_fit_names_the_rule(name: str, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        gpu_target(name)


@pytest.mark.parametrize("name", gpu_names())
def test_no_flag_is_a_default(name: str) -> None:
    found = gpu_target(name)
    assert found.flags == ()
    assert found.fields()["features"] == []
    assert "float32" not in found.gpu.matrix_types
    for flag, rule in FLAGS.items():
        if rule.language == found.language and name != "cuda:sm_75":
            assert set(rule.dtypes) <= set(gpu_target(f"{name}+{flag}").gpu.matrix_types)
