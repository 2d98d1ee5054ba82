"""The spec: two inverse spellings, the phases of an axis, and a refusal for everything else."""

from __future__ import annotations

import math
from dataclasses import replace
from enum import Enum
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import arrays, axes, illegal_spec_texts, specs

from opcompile.cases import CASES
from opcompile.errors import OpcompileError, SpecError
from opcompile.reference import linear
from opcompile.spec import Activation, Axis, ConvTranspose3d, Phase

# --- the text form ---


@given(specs())
def test_parse_reads_back_what_str_wrote(spec: ConvTranspose3d) -> None:
    assert ConvTranspose3d.parse(str(spec)) == spec


@given(specs())
def test_str_writes_what_parse_read(spec: ConvTranspose3d) -> None:
    text = str(spec)
    assert str(ConvTranspose3d.parse(text)) == text


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case_survives_its_text(case) -> None:
    assert ConvTranspose3d.parse(str(case.spec)) == case.spec


def test_defaults_are_those_of_the_documentation() -> None:
    short = ConvTranspose3d.parse("in=1x64x12x16x32 co=64 k=3 s=2 p=1 op=1")
    long = "in=1x64x12x16x32 co=64 k=3 s=2 p=1 op=1 d=1 g=1 bias=1 act=none dtype=float32 layout=NCDHW"
    assert str(short) == long
    assert str(ConvTranspose3d.parse("in=1x2x3x4x5 co=6 k=2")) == (
        "in=1x2x3x4x5 co=6 k=2 s=1 p=0 op=0 d=1 g=1 bias=1 act=none dtype=float32 layout=NCDHW"
    )


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("k=3x3x3", "k=3"),
        ("k=03", "k=3"),
        ("p=1:1", "p=1"),
        ("p=1:0x0:1x1", "p=1:0x0:1x1:1"),
        ("p=1x2x3", "p=1x2x3"),
        ("act=leaky_relu:0.01", "act=leaky_relu"),
        ("act=selu:1", "act=selu:1.0:1.0507009873554805"),
    ],
)
def test_one_spelling_for_each_meaning(field: str, expected: str) -> None:
    key = field.split("=")[0]
    words = [w for w in ["in=Nx2x9x9x9", "co=2", "k=3", field] if w == field or not w.startswith(f"{key}=")]
    assert expected in str(ConvTranspose3d.parse(" ".join(words))).split()


def test_fields_may_come_in_any_order() -> None:
    assert ConvTranspose3d.parse("k=2 co=6 in=1x2x3x4x5") == ConvTranspose3d.parse("in=1x2x3x4x5 co=6 k=2")


# --- what is refused ---


@given(illegal_spec_texts())
def test_an_illegal_text_names_its_field(spoiled: tuple[str, list[str]]) -> None:
    text, words = spoiled
    with pytest.raises(SpecError) as error:
        ConvTranspose3d.parse(text)
    assert all(word in str(error.value) for word in words), str(error.value)


@settings(max_examples=30)
@given(st.text(max_size=60))
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    with pytest.raises(SpecError):
        ConvTranspose3d.parse(text)


@given(
    st.lists(
        st.sampled_from(
            [
                "in=1x1x1x1x1",
                "co=1",
                "k=1",
                "k=",
                "=",
                "in=NxNxNxNxN",
                "p=:",
                "g=1",
                "act=:",
                "act=elu::1",
                "op=1",
                "s=1x",
            ]
        )
    )
)
def test_any_words_are_a_spec_or_a_spec_error(words: list[str]) -> None:
    try:
        spec = ConvTranspose3d.parse(" ".join(words))
    except SpecError:
        return
    assert ConvTranspose3d.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Axis(3, 3, stride=2.0), "float"),
        (lambda: Axis(3, True), "bool"),
        (lambda: Axis(3, 3, pad=(1, 1, 1)), "pair"),
        (lambda: Axis(3, 3, pad=(0, 5)), "output size"),
        (lambda: Axis(3, 3, output_pad=2**31), "larger"),
        (lambda: ConvTranspose3d(1, 2, 2, (Axis(3, 3),) * 2), "three Axis"),
        (lambda: ConvTranspose3d(1, 2, 2, ((3, 3, 1),) * 3), "three Axis"),
        (lambda: ConvTranspose3d(1, 2, 2, (Axis(3, 3),) * 3, bias=1), "bias"),
        (lambda: ConvTranspose3d(1, 2, 2, (Axis(3, 3),) * 3, groups=2.0), "groups"),
        (lambda: ConvTranspose3d(1, 2, 3, (Axis(3, 3),) * 3, groups=2), "channels out"),
        (lambda: ConvTranspose3d(1, 3, 2, (Axis(3, 3),) * 3, groups=2), "channels in"),
        (lambda: ConvTranspose3d("N", 3, 2, (Axis(3, 3),) * 3), "batch"),
        (lambda: ConvTranspose3d(1, 2, 2, [Axis(3, 3)] * 3), "tuple of three Axis"),
        (lambda: ConvTranspose3d(1, 2, 2, (Axis(3, 3),) * 3, activation="relu"), r"Activation\.parse"),
        (lambda: Activation("elu", (float("inf"),)), "finite"),
        (lambda: Activation("selu", (1.0, 0.0)), "gamma=0 is one number"),
        (lambda: Activation("hard_sigmoid", (0,)), "alpha=0 is one number"),
    ],
)
def test_an_illegal_value_is_refused_by_name(build, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        build()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("stride=2", "did you mean s=2?"),
        ("strides=2x2x1", "did you mean s=2x2x1?"),
        ("S=2", "did you mean s=2?"),
        ("output_padding=1", "did you mean op=1?"),
        ("activation=relu", "did you mean act=relu?"),
        ("zebra=1", "form key=value; the keys are in co k s"),
        ("relu", "form key=value; the keys are in co k s"),
        ("p=1,1,1", "'p=1,1,1' has a comma; put blanks between fields, and x between sizes"),
        ("dtype=fp16", "did you mean float16?"),
        ("dtype=half", "did you mean float16?"),
        ("dtype=bf16", "did you mean bfloat16?"),
        ("dtype=Float32", "did you mean float32?"),
        ("dtype=int8", "'int8' is not supported; use one of float32"),
        ("layout=channels_last", "did you mean NDHWC?"),
        ("layout=NCHW", "did you mean NCDHW?"),
        ("act=LeakyReLU", "did you mean leaky_relu?"),
        ("act=swish", "did you mean silu?"),
        ("act=leaky_relu=0.2", "did you mean leaky_relu? .* after colons, like leaky_relu:0.2"),
        ("act=softmax", "activation 'softmax' is unknown"),
        ("act=elu:1e39", "at most 3.4e38"),
        ("act=elu:nan", "finite numbers"),
        ("act=elu:1_0", "'1_0' is not a number, like 0.01"),
        ("act=elu:\N{ARABIC-INDIC DIGIT ONE}", "is not a number, like 0.01"),
        ("act=selu:1e-44:1e38", "must be of at least 1.2e-38: .*; use a larger one, or 0"),
        ("act=selu:1e30:-1e9", r"alpha\*gamma=-1e+39, .* at most 3.4e38"),
        ("act=leaky_relu:-1.1e-38", "must be of at least 1.2e-38"),
        ("bias=true", "write bias=1 for a layer with a bias, bias=0 without"),
    ],
)
def test_a_mistake_in_the_text_names_the_way_out(given: str, words: str) -> None:
    with pytest.raises(SpecError, match=words.replace("?", r"\?").replace("+", r"\+")):
        ConvTranspose3d.parse(f"in=1x1x1x1x1 co=1 k=1 {given}")


def test_a_batch_is_a_number_or_n() -> None:
    with pytest.raises(SpecError, match="begins with 'n', but must begin with a number, or N for any batch"):
        ConvTranspose3d.parse("in=nx1x1x1x1 co=1 k=1")


def test_every_error_has_an_exit_code_and_one_root() -> None:
    assert issubclass(SpecError, OpcompileError)
    assert issubclass(SpecError, ValueError)
    assert SpecError.exit_code == 2
    assert {e.exit_code for e in OpcompileError.__subclasses__()} == {1, 2, 3}


# --- derived facts ---


@given(axes())
def test_sizes_are_those_of_the_scatter(axis: Axis) -> None:
    landings = {i * axis.stride + t * axis.dilation for i in range(axis.size) for t in range(axis.kernel)}
    assert axis.full == max(landings) + 1
    assert axis.out == axis.full - sum(axis.pad) + axis.output_pad
    assert axis.positions == len({o // axis.stride for o in range(axis.out)})


@given(axes(largest=9))
def test_phases_are_the_scatter_read_backwards(axis: Axis) -> None:
    scattered = {
        (i * axis.stride + t * axis.dilation - axis.begin, t, i)
        for i in range(axis.size)
        for t in range(axis.kernel)
        if 0 <= i * axis.stride + t * axis.dilation - axis.begin < axis.out
    }
    gathered = set()
    for o in range(axis.out):
        phase, q = axis.phases[o % axis.stride], o // axis.stride
        assert phase.index == o % axis.stride
        assert len(phase.offsets()) == phase.taps
        for j, offset in enumerate(phase.offsets()):
            tap = phase.first_tap + j * phase.tap_step
            assert 0 <= tap < axis.kernel
            assert offset == phase.first_offset - j * phase.offset_step == axis.offset(tap)
            if 0 <= q + offset < axis.size:
                gathered.add((o, tap, q + offset))
    assert gathered == scattered


@given(axes(largest=9))
def test_every_tap_belongs_to_one_phase(axis: Axis) -> None:
    whole = [axis.phase(index) for index in range(axis.stride)]
    taps = [p.first_tap + j * p.tap_step for p in whole for j in range(p.taps)]
    assert sorted(taps) == list(range(axis.kernel))


def test_a_phase_by_hand() -> None:
    # k3 s2 p1: even outputs meet tap 1 at their own position, odd ones taps 0 and 2 at the two neighbours
    even, odd = Axis(4, 3, stride=2, pad=(1, 1), output_pad=1).phases
    assert even == Phase(0, taps=1, first_tap=1, tap_step=2, first_offset=0, offset_step=1)
    assert odd == Phase(1, taps=2, first_tap=0, tap_step=2, first_offset=1, offset_step=1)
    assert list(odd.offsets()) == [1, 0]


@given(specs(dtypes=("float64",)))
def test_terms_bounds_the_products_of_every_output(spec: ConvTranspose3d) -> None:
    x, w, _ = arrays(spec)
    counts = linear(spec, x * 0 + 1, w * 0 + 1)
    assert counts.max() <= spec.terms


@pytest.mark.parametrize(
    "text", ["in=1x5x6x6x6 co=4 k=3 s=2 p=1 op=1", "in=1x6x6x6x6 co=4 k=4x3x1 s=2x1x3 d=1x2x1 g=2"]
)
def test_terms_is_reached(text: str) -> None:
    spec = ConvTranspose3d.parse(text)
    x, w, _ = arrays(spec)
    assert linear(spec, x * 0 + 1, w * 0 + 1).max() == spec.terms


def test_counts_by_hand() -> None:
    spec = ConvTranspose3d.parse("in=2x6x3x4x5 co=9 k=2 s=3 g=3 dtype=float16 layout=NDHWC")
    assert spec.x_shape == (2, 3, 4, 5, 6)
    assert spec.w_shape == (6, 3, 2, 2, 2)
    assert spec.y_shape == (2, 8, 11, 14, 9)
    assert spec.flops == 2 * 2 * 6 * 3 * 8 * 60
    assert spec.bytes() == 2 * (2 * 360 + 144 + 2 * 8 * 11 * 14 * 9 + 9)
    assert spec.sum_dtype == "float32"
    dynamic = spec.with_batch(None)
    assert dynamic.x_shape[0] is None
    assert dynamic.y_shape[0] is None
    assert dynamic.with_batch(2) == spec
    assert dynamic.flops * 2 == spec.flops


@pytest.mark.parametrize(
    "text",
    [
        "in=2x3x4x5x6 co=4 k=2 s=2",
        "in=1x2x4x5x6 co=2 k=4 s=2 p=3",
        "in=1x4x3x4x5 co=6 k=3x5x2 s=2x1x3 d=1x2x1 p=0:1x3:0x1:1 op=1x0x2 g=2",
        "in=1x3x4x4x4 co=2 k=3 s=2 p=4",
        "in=1x1x2x2x2 co=1 k=1 s=3 op=5",
    ],
)
def test_needed_work_counts_the_products_that_reach_the_output(text: str) -> None:
    spec = ConvTranspose3d.parse(text)
    x, w, _ = arrays(spec)
    assert spec.needed_flops == 2 * linear(spec, x * 0 + 1, w * 0 + 1).sum()
    assert spec.needed_flops <= spec.flops


@pytest.mark.parametrize(
    ("stride", "dilation", "kernel", "begin"), list(product((1, 2, 3, 4), (1, 2, 3), (1, 2, 4), (0, 1)))
)
def test_phases_numbered_by_their_taps_cover_the_output_once(
    stride: int, dilation: int, kernel: int, begin: int
) -> None:
    axis = Axis(3, kernel, stride, dilation, pad=(begin, 0), output_pad=1)
    g = math.gcd(stride, dilation)
    outputs = [stride * q + f // g * dilation + f % g - begin for f, span in enumerate(axis.spans) for q in span]
    assert sorted(outputs) == list(range(axis.out))
    counts = {phase.taps for phase in axis.phases}
    assert axis.even_taps <= (len(counts) == 1 and 0 not in counts)


class Word(str, Enum):
    """Each is equal to its text, and shown as another."""

    FLOAT32 = "float32"
    NCDHW = "NCDHW"
    RELU = "relu"


@pytest.mark.parametrize(
    "words",
    [
        {"dtype": np.dtype("float32")},
        {"dtype": np.float32},
    ],
)
def test_what_only_equals_a_word_is_refused(words: dict[str, Any]) -> None:
    spec = ConvTranspose3d.parse("in=1x2x3x4x5 co=6 k=2")
    with pytest.raises(SpecError, match=r"is not supported; .*use one of"):
        replace(spec, **words)


@pytest.mark.parametrize("word", [np.str_, Word])
def test_a_word_of_a_type_of_its_own_is_kept_as_a_str(word: type[str]) -> None:
    spec = ConvTranspose3d.parse("in=1x2x3x4x5 co=6 k=2 act=relu")
    same = replace(spec, dtype=word("float32"), layout=word("NCDHW"), activation=Activation(word("relu")))
    assert (same, hash(same), str(same)) == (spec, hash(spec), str(spec))
    assert {type(name) for name in (same.dtype, same.layout, same.activation.name)} == {str}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            "in=1x4x3x3x3 co=4 k=2 s=1x1x20000000",
            "axis W: stride is 20000000, but must be at most 4096.*; no layer that is known has more",
        ),
        ("in=1x4x3x3x3 co=4 k=1x1x20000000", "axis W: kernel is 20000000, but must be at most 4096"),
        ("in=1x4x3x3x3 co=4 k=2 op=1000000", "Y would have the shape .* less than 2\\^63 bytes; choose smaller sizes"),
        ("in=1x2147483647x1x1x1 co=2147483647 k=1", "W would have the shape .* less than 2\\^63 bytes"),
    ],
)
def test_what_no_machine_holds_or_nobody_plans_is_refused(text: str, rule: str) -> None:
    with pytest.raises(SpecError, match=rule):
        ConvTranspose3d.parse(text)


def test_phases_of_the_largest_axis_are_counted_at_once() -> None:
    axis = Axis(2, 4096, stride=4095, dilation=4097)
    assert sum(phase.taps for phase in axis.phases) == 4096
