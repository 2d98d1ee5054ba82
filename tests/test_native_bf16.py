"""bfloat16 by an instruction of its own, where the target asks for it: what it computes, and what is said of it."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from kernels import dtype_of, integers, kernel, reals
from tvm import relax, tirx
from tvm_ffi import structural_map

import opcompile
from opcompile import lower
from opcompile.bounds import PAIRS, bounds, compare
from opcompile.cases import CASES, case
from opcompile.compiled import compiled
from opcompile.describe import describe
from opcompile.errors import TargetError, UnknownTargetError
from opcompile.gradients import lower as gradients
from opcompile.gradients.gradient import Gradient
from opcompile.record import illegal
from opcompile.reference import reference
from opcompile.relax import ReplaceConvTranspose3d, tvm_target
from opcompile.spec import ConvTranspose3d
from opcompile.target import flagged, names, processor_flags, target
from schedules import llvm
from schedules.llvm import Tiles

FLAGGED = target("llvm:znver4+bf16")
here = pytest.mark.skipif(
    "avx512_bf16" not in processor_flags(), reason="this processor lists no avx512_bf16, which the kernels need"
)

LAYERS = {
    "k2 s2": "in=1x16x3x4x5 co=20 k=2 s=2",
    "k3 s2": "in=1x16x4x5x7 co=9 k=3 s=2 p=1 op=1",
    "k4 s2, long rows": "in=1x8x3x4x37 co=5 k=4 s=2 p=1",
    "k3 s1": "in=1x6x4x5x17 co=3 k=3 p=1",
    "no output of zeros": "in=2x4x5x6x11 co=7 k=3 s=2 d=2 p=2 bias=0",
    "groups": "in=2x24x3x4x5 co=36 k=3 s=2 g=3",
    "channels last": "in=1x16x4x5x7 co=33 k=3 s=2 p=1 act=relu layout=NDHWC",
    "groups, channels last": "in=1x12x3x4x18 co=6 k=3x2x5 s=1x2x3 g=2 layout=NDHWC",
    "dynamic batch": "in=Nx16x4x5x7 co=33 k=3 s=2 p=1 act=relu6",
    "two channels": "in=1x2x3x4x18 co=6 k=2 s=2",
    "phases as axes": "in=1x8x4x5x20 co=4 k=5 s=4 p=1 op=2",
    "flat": "in=1x8x2x16x16 co=3 k=1x2x2 s=1x2x2",
}


def spec_of(layer: str) -> ConvTranspose3d:
    return ConvTranspose3d.parse(f"{LAYERS.get(layer, layer)} dtype=bfloat16")


candidates = lru_cache(llvm.candidates)


def in_pairs(spec: ConvTranspose3d) -> list[Tiles]:
    return [e.tiles for e in candidates(spec, FLAGGED.machine) if e.tiles.products == 2]


def of_each_kind(spec: ConvTranspose3d) -> list[Tiles]:
    """The best tiles of each kind of vector, of copy, of one band and of several."""
    kinds = {(t.vector, t.copy, t.bands_d * t.bands_h * t.bands_m > 1): t for t in reversed(in_pairs(spec))}
    return list(kinds.values())


# --- what it computes ---


@here
@pytest.mark.parametrize("layer", LAYERS)
def test_integers_are_exact_and_reals_within_the_bound(layer: str) -> None:
    spec = spec_of(layer)
    kinds = of_each_kind(spec)
    assert {t.vector for t in kinds} >= {"channels", "row"}
    for tiles in kinds:
        run = kernel(spec, tiles, optimised=False, on=FLAGGED)
        x, w, b = integers(spec)
        compare(spec, run(x, w, b), x, w, b, computed_in=PAIRS, exact=True).require()
        x, w, b = reals(spec)
        y = run(x, w, b)
        compare(spec, y, x, w, b, computed_in=PAIRS).require()
        assert not compare(spec, 1.02 * y.astype("float64") + 0.02, x, w, b, computed_in=PAIRS).passed


@here
@pytest.mark.parametrize("name", [c.name for c in CASES if "corner" in c.tags and c.spec.c_in % 2 == 0])
def test_corner_cases_in_bfloat16(name: str) -> None:
    spec = replace(case(name).spec, dtype="bfloat16")
    found = in_pairs(spec)
    for tiles in (found[0], found[len(found) // 2]):
        run = kernel(spec, tiles, optimised=False, on=FLAGGED)
        x, w, b = integers(spec)
        compare(spec, run(x, w, b), x, w, b, computed_in=PAIRS, exact=True).require()


@here
def test_an_optimised_kernel_is_right_too() -> None:
    for layer in ("k3 s2", "groups", "channels last"):
        spec = spec_of(layer)
        for tiles in of_each_kind(spec)[::3]:
            x, w, b = integers(spec)
            y = kernel(spec, tiles, on=FLAGGED)(x, w, b)
            compare(spec, y, x, w, b, computed_in=PAIRS, exact=True).require()


def one_output(x: list[float], w: list[float]) -> tuple[ConvTranspose3d, Any, Any]:
    spec = ConvTranspose3d.parse(f"in=1x{len(x)}x1x1x1 co=1 k=1 bias=0 dtype=bfloat16")
    return spec, *(np.array(v, ml_dtypes.bfloat16).reshape(s) for v, s in ((x, spec.x_shape), (w, spec.w_shape)))


HALF = 2.0**-24  # of the last bit of 1: added to 1, it is lost


@here
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1, 0, HALF, HALF, -1, 0], 0.0),  # both added at once would stay
        ([1, 0, -1, HALF], 0.0),  # 1 + HALF, then - 1
        ([1, 0, HALF, -1], HALF),  # 1 - 1, then + HALF
    ],
)
def test_the_second_of_a_pair_is_added_first_and_each_sum_is_rounded(x: list[float], y: float) -> None:
    spec, given, w = one_output(x, [1.0] * len(x))
    found = kernel(spec, in_pairs(spec)[0], on=FLAGGED)(given, w)
    assert float(found.reshape(())) == y
    compare(spec, found, given, w, computed_in=PAIRS).require()


@here
@pytest.mark.parametrize(
    ("x", "w"), [(2.0**-127, 2.0**100), (2.0**100, 2.0**-127), (2.0**-70, 2.0**-60)], ids=["x", "w", "their product"]
)
def test_what_is_below_the_normal_range_is_lost_and_the_bound_knows(x: float, w: float) -> None:
    spec, x_given, w_given = one_output([x, 0.0], [w, 0.0])
    y = kernel(spec, in_pairs(spec)[0], on=FLAGGED)(x_given, w_given)
    assert float(y.reshape(())) == 0.0
    compare(spec, y, x_given, w_given, computed_in=PAIRS).require()
    lost, allowed = x * w, bounds(spec, x_given, w_given, computed_in=PAIRS).item()
    assert 0 < lost <= allowed, "more than rounding would lose, and no more than the bound"
    assert not compare(spec, y + 2 * np.float32(allowed), x_given, w_given, computed_in=PAIRS).passed
    kept = kernel(spec, None, on=target("llvm:znver4"))(x_given, w_given)
    assert float(kept.reshape(())) == lost, "without the flag nothing is"


# --- what is compiled ---


def assembly(spec: ConvTranspose3d, name: str, tiles: Tiles | None = None) -> str:
    machine = target(name)
    tiles = tiles or lower.choose(spec, machine, "baseline")[0]
    return str(compiled(lower.scheduled(spec, tiles), machine.tvm()).mod.inspect_source("asm"))


def inner_loops(text: str) -> list[list[str]]:
    """The innermost loops of the assembly that multiply pairs."""
    loops, label, lines = [], "", []
    for line in text.splitlines():
        if found := re.match(r"(\.LBB\w+):", line):
            label, lines = found.group(1), []
        elif (jump := re.match(r"\s+j\w+\s+(\.LBB\w+)", line)) and jump.group(1) == label:
            loops.append(lines)
            label, lines = "", []
        else:
            lines.append(line.split("#")[0].strip())
    return [loop for loop in loops if any("vdpbf16ps" in line for line in loop)]


@pytest.mark.parametrize("name", flagged())
@pytest.mark.parametrize("vector", ["channels", "row", "line"])
def test_the_inner_loop_multiplies_pairs_in_registers(name: str, vector: str) -> None:
    spec = spec_of("in=1x256x8x16x32 co=64 k=3x1x3 s=2x1x2 p=1x0x1 op=1x0x1")
    found = candidates(spec, target(name).machine)
    # of 24 sums LLVM keeps two on the stack where vectors are channels, in float32 as well; and where a task copies X,
    # the loop has a test within
    few = [t for t in (e.tiles for e in found) if t.vectors * t.scalars * t.rows <= 16 and t.copy == "whole"]
    tiles = next(t for t in few if t.products == 2 and t.vector == vector)
    loops = inner_loops(assembly(spec, name, tiles))
    assert len(loops) >= 4
    for loop in loops:
        assert all("zmm" in line for line in loop if "vdpbf16ps" in line)
        assert not any("fmadd" in line or "vpmovzx" in line or "call" in line for line in loop)
        assert not any(re.search(r"zmm\d+, .*\(%r[sb]p\)", line) for line in loop), "a sum leaves its register"
    sums = tiles.vectors * tiles.scalars * tiles.rows
    assert max(sum("vdpbf16ps" in line for line in loop) for loop in loops) >= sums


@pytest.mark.parametrize("vector", ["channels", "row"])
def test_y_is_rounded_by_one_instruction(vector: str) -> None:
    spec = spec_of("in=1x8x4x8x32 co=16 k=1x1x2 s=1x1x2")
    tiles = next(t for t in in_pairs(spec) if t.vector == vector)
    text = assembly(spec, FLAGGED.name, tiles)
    assert "vcvtneps2bf16" in text
    assert not re.search(r"vpsrld\s+\$16", text), "rounded by whole numbers"


@pytest.mark.parametrize("name", [n for n in names() if n.startswith("llvm:")])
def test_without_the_flag_nothing_changes(name: str) -> None:
    spec = spec_of("in=1x4x2x2x16 co=16 k=1x1x2 s=1x1x2")
    machine = target(name)
    assert not machine.machine.pairs
    assert all(e.tiles.products == 1 for e in llvm.candidates(spec, machine.machine))
    if name in ("llvm:znver4", "llvm:sapphirerapids"):
        assert "vdpbf16ps" not in assembly(spec, name)


@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC"])
def test_columns_are_copied_pair_by_pair_in_vectors(layout: str) -> None:
    spec = spec_of(f"in=1x16x4x6x40 co=16 k=2 s=2 layout={layout}")
    module = lower.scheduled(spec, next(t for t in in_pairs(spec) if t.vector == "row"))
    woven: list[int] = []

    def seen(store: Any) -> Any:
        if store.buffer.name == "pad":
            woven.append(len(store.value.indices) if isinstance(store.value, tirx.Shuffle) else 1)
        return store

    structural_map(module[lower.KERNEL], (tirx.BufferStore, seen))
    assert sorted(woven, reverse=True)[:2] == ([32, 16] if layout == "NCDHW" else [1])


@pytest.mark.parametrize("layer", ["k3 s2", "groups", "k4 s2, long rows"])
def test_the_two_weights_of_a_pair_lie_together(layer: str) -> None:
    spec = spec_of(layer)
    for tiles in of_each_kind(spec):
        pack = lower.packing(spec, tiles)
        w = np.arange(np.prod(spec.w_shape), dtype="float32").reshape(spec.w_shape) + 1
        pairs = pack(w).reshape(-1, 2)
        per_channel = w[0].size
        real = pairs[pairs.any(axis=1)]
        assert len(real) == w.size // 2
        np.testing.assert_array_equal(real[:, 1] - real[:, 0], per_channel)
        assert set(real[:, 0] // per_channel % 2) <= {0.0, 1.0}


# --- what is said of it ---


def test_the_plan_says_what_multiplies_and_a_description_what_sums() -> None:
    spec = replace(case("L24-psmnet-conv5").spec, dtype="bfloat16")
    found = describe(spec, FLAGGED.name, "baseline")
    assert found.target == "llvm:znver4+bf16"
    assert found.to_json()["summed_in"] == PAIRS
    assert found.plan.tiles["products"] == 2
    assert any("two products of bfloat16 by one instruction" in line for line in found.plan.why)
    without = describe(spec, "llvm:znver4", "baseline")
    assert without.to_json()["summed_in"] == "float32"
    assert "products" not in without.plan.tiles


@pytest.mark.parametrize(
    ("name", "machine"),
    list(zip(["L01-nnunet-up1", "L08-monai-unet-up3", "L15-segresnet-up1", "L25-psmnet-conv6"], cycle(flagged()))),
)
def test_real_layers_use_what_the_flag_allows(name: str, machine: str) -> None:
    spec = replace(case(name).spec, dtype="bfloat16")
    assert lower.choose(spec, target(machine), "baseline")[0].products == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("in=1x16x4x4x4 co=4 k=2 s=2 dtype=float32", "it is for bfloat16, and this layer has float32"),
        ("in=1x16x4x4x4 co=4 k=2 s=2 dtype=float16", "it is for bfloat16, and this layer has float16"),
        ("in=1x16x4x4x4 co=4 k=2 s=2 dtype=float64", "it is for bfloat16, and this layer has float64"),
        ("in=1x16x4x4x4 co=16 k=2 s=2 g=16 dtype=bfloat16", "channels are taken in pairs, and a group has 1"),
        ("in=1x9x4x4x4 co=4 k=2 s=2 dtype=bfloat16", "channels are taken in pairs, and a group has 9"),
    ],
)
def test_where_the_flag_changes_nothing_the_reason_is_said(text: str, reason: str) -> None:
    spec = ConvTranspose3d.parse(text)
    tiles, plan = lower.choose(spec, FLAGGED, "baseline")
    assert tiles == lower.choose(spec, target("llvm:znver4"), "baseline")[0]
    assert plan.why[-1].startswith("+bf16 changes nothing")
    assert plan.why[-1].endswith(reason)
    assert describe(spec, FLAGGED.name, "baseline").summed_in == spec.sum_dtype


def test_derivatives_have_no_pairs_and_say_so() -> None:
    spec = replace(case("k3-s2").spec, dtype="bfloat16")
    _, plan = gradients.choose(Gradient(spec, "x"), FLAGGED, "baseline")
    assert plan.why[-1] == "+bf16 changes nothing: derivatives multiply in the type of their sums"
    _, plan = gradients.choose(Gradient(spec, "x"), target("llvm:znver4"), "baseline")
    assert not any("bf16" in line for line in plan.why)


@here
def test_an_artifact_says_what_was_asked_for_and_is_judged_by_it(tmp_path: Path) -> None:
    spec = spec_of("in=1x32x4x6x7 co=24 k=3 s=2 p=1 op=1 act=silu")
    artifact = opcompile.compile(spec, "llvm+bf16", "baseline", tmp_path / "a")
    manifest = artifact.manifest
    assert manifest["target"]["name"].endswith("+bf16")
    assert "avx512_bf16" in manifest["target"]["features"]
    assert manifest["plan"]["tiles"]["products"] == 2
    report = opcompile.verify(artifact)
    assert report.passed
    ours = {row.check.computed_in for row in report.rows if row.answer.startswith("opcompile")}
    assert PAIRS in ours
    loaded = opcompile.load(tmp_path / "a")
    x, w, b = reals(spec)
    y = loaded(*(v.astype(dtype_of(spec)) for v in (x, w, b)))
    compare(spec, y, x, w, b, computed_in=PAIRS).require()


@here
def test_two_layers_of_a_module_of_tvm_have_it_together() -> None:
    shapes = {"x": (1, 6, 3, 4, 5), "v": (6, 8, 3, 3, 3), "w": (8, 4, 2, 2, 2)}
    x, v, w = (relax.Var(name, relax.TensorType(shape, "bfloat16")) for name, shape in shapes.items())
    builder = relax.BlockBuilder()
    with builder.function("main", [x, v, w]):
        with builder.dataflow():
            between = builder.emit(relax.op.nn.conv3d_transpose(x, v, strides=2, padding=1))
            y = builder.emit_output(relax.op.nn.conv3d_transpose(between, w, strides=2))
        builder.emit_func_output(y)
    replacing = ReplaceConvTranspose3d("llvm+bf16", "baseline")
    module = tvm.compile(replacing(builder.get()), target=tvm_target("llvm+bf16"))
    assert len(replacing.replaced) == 2
    rng = np.random.default_rng(0)
    given = [rng.integers(-1, 2, shape).astype(ml_dtypes.bfloat16) for shape in shapes.values()]
    tensors = [tvm.runtime.empty(array.shape, "bfloat16").copyfrom(array) for array in given]
    found = relax.VirtualMachine(module, tvm.cpu())["main"](*tensors).numpy().view(ml_dtypes.bfloat16)
    first, second = replacing.replaced
    middle = reference(first, *given[:2], None).astype(ml_dtypes.bfloat16)
    compare(second, found, middle, given[2], exact=True).require()


# --- names ---


def test_which_targets_take_the_flag() -> None:
    assert flagged() == ["llvm:x86-64-v4+bf16", "llvm:sapphirerapids+bf16", "llvm:znver4+bf16", "llvm:znver5+bf16"]
    for name in flagged():
        found = target(name)
        assert found.name == found.fields()["name"] == name
        assert found.flags == ("bf16",)
        assert "avx512_bf16" in found.features
        plain = target(name.removesuffix("+bf16"))
        assert replace(found.machine, pairs=False) == plain.machine
        assert found.mcpu == plain.mcpu
    assert target("llvm:znver4+bf16+bf16") == target("llvm:znver4+bf16")


@pytest.mark.parametrize("name", ["llvm:icelake-server", "llvm:x86-64-v3", "llvm:neoverse-n1", "llvm:apple-m4"])
def test_a_target_without_the_instruction_refuses_and_names_those_that_have_it(name: str) -> None:
    with pytest.raises(UnknownTargetError) as error:
        target(f"{name}+bf16")
    assert f"+bf16 needs AVX512-BF16, and {name} lacks it" in str(error.value)
    assert "llvm:x86-64-v4+bf16, llvm:sapphirerapids+bf16, llvm:znver4+bf16, llvm:znver5+bf16" in str(error.value)


def test_this_machine_takes_the_flag_where_its_processor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    present = frozenset(target("llvm:znver4").features)
    monkeypatch.setattr("opcompile.target.processor_flags", lambda: present)
    monkeypatch.setattr("opcompile.target.host", lambda: ("x86_64", "linux"))
    assert target("llvm+bf16").name == "llvm:x86-64-v4+bf16"
    assert target("llvm+bf16").native
    monkeypatch.setattr("opcompile.target.processor_flags", lambda: present - {"avx512_bf16"})
    with pytest.raises(TargetError, match="this processor does not list avx512_bf16") as error:
        target("llvm+bf16")
    assert error.value.exit_code == 3
    monkeypatch.setattr("opcompile.target.processor_flags", lambda: present - {"avx512f"})
    with pytest.raises(TargetError, match="needs AVX512-BF16, and this processor, llvm:x86-64-v3, lacks it"):
        target("llvm+bf16")


# --- records ---


def test_tiles_of_records_from_before_are_legal_and_pairs_need_the_flag() -> None:
    spec = spec_of("in=1x16x4x6x40 co=16 k=2 s=2")
    single = lower.choose(spec, target("llvm:znver4"), "baseline")[0]
    assert "products" not in single.fields()
    assert Tiles(**single.fields()) == single  # type: ignore[arg-type]
    for machine in (FLAGGED, target("llvm:znver4")):
        assert illegal(single.fields(), spec, machine) is None
        assert illegal(asdict(single), spec, machine) is None
    pairs = in_pairs(spec)[0].fields()
    assert pairs["products"] == 2
    assert illegal(pairs, spec, FLAGGED) is None
    needs = "that needs its flag +bf16, bfloat16 and an even number of channels"
    assert needs in str(illegal(pairs, spec, target("llvm:znver4")))
    assert needs in str(illegal(pairs, replace(spec, dtype="float16"), FLAGGED))
    assert needs in str(illegal({**pairs, "chunk": 1}, replace(spec, channels_in=17), FLAGGED))
    assert "must be even" in str(illegal({**pairs, "chunk": 1}, spec, FLAGGED))
    assert "must be 1, or 2" in str(illegal({**pairs, "products": 4}, spec, FLAGGED))


def test_every_candidate_is_a_legal_record() -> None:
    for layer in LAYERS:
        spec = spec_of(layer)
        for tiles in in_pairs(spec):
            assert illegal(tiles.fields(), spec, FLAGGED) is None
