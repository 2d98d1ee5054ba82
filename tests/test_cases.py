"""The table of cases: every real layer with its published cost, and every corner of the operator."""

from __future__ import annotations

from math import gcd

import pytest

from opcompile.cases import CASES, Case, case, tagged
from opcompile.errors import SpecError
from opcompile.spec import ACTIVATIONS, DTYPES, LAYOUTS, ConvTranspose3d

# GFLOP and MiB (X, W and Y in float32) of the layers as published, without the bias
PUBLISHED = {
    "L01": (0.10, 3.8),
    "L02": (0.67, 7.1),
    "L03": (2.15, 21.0),
    "L04": (4.29, 80.2),
    "L05": (8.59, 320.1),
    "L06": (0.10, 2.3),
    "L08": (0.76, 10.2),
    "L09": (0.38, 20.3),
    "L11": (1.81, 121.5),
    "L13": (0.13, 9.4),
    "L14": (4.08, 182.3),
    "L15": (8.15, 37.9),
    "L16": (65.23, 480.5),
    "L17": (0.13, 2.2),
    "L18": (0.01, 25.1),
    "L19": (1.07, 32.6),
    "L21": (51.14, 50.4),
    "L22": (4.01, 43.1),
    "L24": (1.36, 13.9),
    "L25": (5.44, 60.2),
    "L27": (5.49, 484.5),
    "L29": (0.35, 13.1),
    "L30": (28.99, 320.2),
    "L31": (69.98, 131.8),
    "L33": (5.24, 175.9),
    "L34": (0.01, 7.6),
    "L35": (0.91, 564.1),
    "L37": (7.55, 270.1),
    "L39": (8.05, 150.2),
}


def test_names_are_unique() -> None:
    names = [c.name for c in CASES]
    assert len(set(names)) == len(names)


def test_specs_of_corners_are_unique() -> None:
    texts = [str(c.spec) for c in tagged("corner")]
    assert sorted({t for t in texts if texts.count(t) > 1}) == []


def test_every_real_layer_is_there_with_its_cost() -> None:
    real = {c.name.split("-")[0]: c for c in tagged("real")}
    assert sorted(real) == sorted(PUBLISHED)
    for name, (gflop, mib) in PUBLISHED.items():
        spec = real[name].spec
        assert round(spec.flops / 1e9, 2) == pytest.approx(gflop, abs=0.0101), name
        bias_bytes = 4 * spec.channels_out if spec.bias else 0
        assert (spec.bytes() - bias_bytes) / 2**20 == pytest.approx(mib, abs=0.0501), name


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("L01-nnunet-up1", (8, 8, 8)),
        ("L06-nnunet-anisotropic", (5, 10, 10)),
        ("L18-3dgan-layer1", (4, 4, 4)),
        ("L21-videogpt-convt1", (8, 64, 64)),
        ("L22-videogpt-convt2", (16, 128, 128)),
        ("L24-psmnet-conv5", (24, 32, 64)),
        ("L27-gcnet-last", (193, 256, 512)),
        ("L34-mednext-up0", (15, 15, 15)),
    ],
)
def test_published_output_sizes(name: str, sizes: tuple[int, int, int]) -> None:
    assert tuple(a.out for a in case(name).spec.axes) == sizes


def test_families_are_what_they_say() -> None:
    for family in ("k2s2", "k3s2", "k4s2"):
        k, s = int(family[1]), int(family[3])
        assert tagged("real", family)
        for c in tagged(family):
            assert {a.kernel for a in c.spec.axes} <= {1, k}, c.name
            assert {a.stride for a in c.spec.axes} <= {1, s}, c.name
    for c in tagged("depthwise"):
        assert c.spec.groups == c.spec.channels_in
    for c in tagged("real"):
        assert ("large" in c.tags) == (c.spec.flops > 10e9 or c.spec.bytes() > 300 * 2**20), c.name


def some_axis(test):
    return lambda spec: any(test(a) for a in spec.axes)


CORNERS = {
    "anisotropic kernel": lambda s: len({a.kernel for a in s.axes}) == 3,
    "anisotropic stride": lambda s: len({a.stride for a in s.axes}) == 3,
    "k < s": some_axis(lambda a: a.kernel < a.stride),
    "k > s": some_axis(lambda a: a.kernel > a.stride > 1),
    "dilation sharing a factor with the stride": some_axis(lambda a: a.dilation > 1 and gcd(a.dilation, a.stride) > 1),
    "dilation without a factor in common": some_axis(
        lambda a: a.dilation > 1 and a.stride > 1 and gcd(a.dilation, a.stride) == 1
    ),
    "asymmetric pads": some_axis(lambda a: a.pad[0] != a.pad[1]),
    "pads beyond the kernel": some_axis(lambda a: max(a.pad) > a.dilation * (a.kernel - 1)),
    "output_pad in [stride, dilation)": some_axis(lambda a: a.stride <= a.output_pad < a.dilation),
    "output_pad beyond both": some_axis(lambda a: a.output_pad >= max(a.stride, a.dilation)),
    "groups": lambda s: 1 < s.groups < s.channels_in,
    "depthwise": lambda s: s.groups == s.channels_in == s.channels_out > 1,
    "depthwise with a multiplier": lambda s: s.groups == s.channels_in and s.channels_out > s.groups > 1,
    "one-element axis": some_axis(lambda a: a.size == 1),
    "batch > 1": lambda s: s.batch is not None and s.batch > 1,
    "dynamic batch": lambda s: s.batch is None,
    "prime sizes": lambda s: all(a.size in (3, 5, 7, 11, 13) for a in s.axes) and s.channels_in in (7, 13),
    "one channel": lambda s: s.channels_in == s.channels_out == 1,
    "stride 4": some_axis(lambda a: a.stride == 4),
    "one voxel out": lambda s: all(a.out == 1 for a in s.axes),
    "hundreds of phases": lambda s: s.axes[0].stride * s.axes[1].stride * s.axes[2].stride >= 200,
    "an empty phase": some_axis(lambda a: any(p.taps == 0 for p in a.phases)),
    "no bias": lambda s: not s.bias,
    **{f"dtype {d}": (lambda s, d=d: s.dtype == d) for d in DTYPES},
    **{f"layout {d}": (lambda s, d=d: s.layout == d) for d in LAYOUTS},
    **{f"activation {n}": (lambda s, n=n: s.activation.name == n) for n in ACTIVATIONS},
    "a parameter of its own": lambda s: ":" in str(s.activation),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_every_corner_has_a_small_case(corner: str) -> None:
    found = [c for c in tagged("corner") if CORNERS[corner](c.spec)]
    assert found
    assert min(c.spec.flops for c in found) < 1e8


def test_lookup() -> None:
    assert case("k3-s2").spec == ConvTranspose3d.parse("in=1x4x3x4x5 co=6 k=3 s=2 p=1 op=1")
    assert isinstance(case("k3-s2"), Case)
    with pytest.raises(SpecError, match="L24-psmnet-conv5"):
        case("psmnet")
    with pytest.raises(SpecError, match="opcompile cases"):
        case("nothing like it")


def test_every_case_says_where_it_comes_from() -> None:
    assert all(c.origin and ("real" in c.tags) != ("corner" in c.tags) for c in CASES)
