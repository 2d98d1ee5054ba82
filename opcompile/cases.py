"""One table of named, tagged layers: it feeds tests, tuner, benchmark and documentation.

Tags: ``real`` (a layer of a published network, each with its origin), ``corner`` (a rule of the
operator at its edge, small enough for every test), ``k2s2`` / ``k3s2`` / ``k4s2`` / ``depthwise``
(the families that real layers fall into), ``large`` (above 10 GFLOP or 300 MiB: not for a quick look).
A bug becomes a new row.
"""

from __future__ import annotations

from dataclasses import dataclass

from opcompile.errors import SpecError
from opcompile.spec import ACTIVATIONS, ConvTranspose3d


@dataclass(frozen=True, slots=True)
class Case:
    """A named layer and where it comes from."""

    name: str
    spec: ConvTranspose3d
    tags: frozenset[str]
    origin: str


def _case(name: str, text: str, tags: str, origin: str) -> Case:
    return Case(name, ConvTranspose3d.parse(text), frozenset(tags.split()), origin)


_REAL = [
    ("L01-nnunet-up1", "in=1x320x4x4x4 co=320 k=2 s=2", "k2s2", "nnU-Net v2 3d_fullres 128^3, deepest upsampling"),
    ("L02-nnunet-up2", "in=1x320x8x8x8 co=256 k=2 s=2", "k2s2", "nnU-Net v2 3d_fullres 128^3"),
    ("L03-nnunet-up3", "in=1x256x16x16x16 co=128 k=2 s=2", "k2s2", "nnU-Net v2 3d_fullres 128^3"),
    ("L04-nnunet-up4", "in=1x128x32x32x32 co=64 k=2 s=2", "k2s2", "nnU-Net v2 3d_fullres 128^3"),
    ("L05-nnunet-up5", "in=1x64x64x64x64 co=32 k=2 s=2", "k2s2 large", "nnU-Net v2 3d_fullres 128^3, last"),
    ("L06-nnunet-anisotropic", "in=1x320x5x5x5 co=320 k=1x2x2 s=1x2x2", "k2s2", "nnU-Net ResEnc 160x320x320, deepest"),
    ("L08-monai-unet-up3", "in=1x64x24x24x24 co=16 k=3 s=2 p=1 op=1", "k3s2", "MONAI UNet 96^3"),
    ("L09-monai-unet-last", "in=1x32x48x48x48 co=2 k=3 s=2 p=1 op=1", "k3s2", "MONAI UNet 96^3, two classes out"),
    ("L11-basicunet-last", "in=1x32x48x48x48 co=32 k=2 s=2", "k2s2", "MONAI BasicUNet 96^3"),
    ("L13-swinunetr-dec5", "in=1x768x3x3x3 co=384 k=2 s=2", "k2s2", "SwinUNETR-48 96^3"),
    ("L14-swinunetr-dec1", "in=1x48x48x48x48 co=48 k=2 s=2", "k2s2", "SwinUNETR-48 96^3"),
    ("L15-segresnet-up1", "in=1x768x8x8x8 co=384 k=3 s=2 p=1 op=1", "k3s2", "SegResNetDS2-48 (VISTA3D) 128^3"),
    ("L16-segresnet-up4", "in=1x96x64x64x64 co=48 k=3 s=2 p=1 op=1", "k3s2 large", "SegResNetDS2-48 (VISTA3D) 128^3"),
    ("L17-vnet-up256", "in=1x256x8x8x4 co=128 k=2 s=2", "k2s2", "V-Net 128x128x64"),
    ("L18-3dgan-layer1", "in=1x200x1x1x1 co=512 k=4 s=2", "k4s2", "3D-GAN generator"),
    ("L19-3dgan-layer2", "in=1x512x4x4x4 co=256 k=4 s=2 p=1", "k4s2", "3D-GAN generator"),
    (
        "L21-videogpt-convt1",
        "in=1x240x6x34x34 co=240 k=4 s=2 p=3",
        "k4s2 large",
        "VideoGPT VQ-VAE, input padded before",
    ),
    ("L22-videogpt-convt2", "in=1x240x10x66x66 co=3 k=4 s=2 p=3", "k4s2", "VideoGPT VQ-VAE, three colours out"),
    ("L24-psmnet-conv5", "in=1x64x12x16x32 co=64 k=3 s=2 p=1 op=1", "k3s2", "PSMNet hourglass, 256x512"),
    ("L25-psmnet-conv6", "in=1x64x24x32x64 co=32 k=3 s=2 p=1 op=1", "k3s2", "PSMNet hourglass, 256x512"),
    (
        "L27-gcnet-last",
        "in=1x32x97x128x256 co=1 k=3 s=2 p=1:1x0:1x0:1",
        "k3s2 large",
        "GC-Net in TensorFlow: asymmetric pads",
    ),
    ("L29-v2v-up1", "in=1x64x22x22x22 co=32 k=2 s=2", "k2s2", "V2V-PoseNet"),
    ("L30-monoscene-kitti", "in=1x64x128x128x16 co=32 k=3 s=2 p=1 op=1", "k3s2 large", "MonoScene KITTI"),
    ("L31-monoscene-nyu", "in=1x400x30x18x30 co=200 k=3 s=2 p=1 op=1", "k3s2 large", "MonoScene NYU"),
    ("L33-surroundocc-deblock", "in=1x64x100x100x8 co=64 k=2 s=2", "k2s2", "SurroundOcc"),
    ("L34-mednext-up0", "in=1x512x8x8x8 co=512 k=3 s=2 p=1 g=512", "k3s2 depthwise", "MedNeXt-S"),
    ("L35-mednext-up3", "in=1x64x64x64x64 co=64 k=3 s=2 p=1 g=64", "k3s2 depthwise large", "MedNeXt-S"),
    ("L37-mlx-4341", "in=1x60x32x64x64 co=60 k=2 s=2", "k2s2", "reproducer of mlx issue 4341"),
    ("L39-burn-5792", "in=1x128x32x40x48 co=64 k=2 s=2", "k2s2", "reproducer of burn issue 5792"),
]

_CORNER = [
    ("plain", "in=1x2x3x4x5 co=3 k=3", "no stride, no padding"),
    ("pointwise", "in=1x5x3x4x5 co=7 k=1", "a matrix product"),
    ("k2-s2", "in=1x4x3x4x5 co=6 k=2 s=2", "taps never overlap"),
    ("k3-s2", "in=1x4x3x4x5 co=6 k=3 s=2 p=1 op=1", "doubles each size"),
    ("k4-s2", "in=1x4x3x4x5 co=6 k=4 s=2 p=1", "doubles each size, two taps a phase"),
    ("k5-s3", "in=1x3x4x3x5 co=4 k=5 s=3 p=2 op=1", "27 phases of unequal tap counts"),
    ("k4-s4", "in=1x3x3x2x4 co=5 k=4 s=4", "64 phases"),
    ("k7-s4-d3", "in=1x2x4x4x4 co=3 k=7 s=4 d=3 p=4 op=2", "64 phases, dilated"),
    ("huge-stride", "in=1x3x2x3x2 co=4 k=3 s=7", "343 phases, most of them empty"),
    ("huge-stride-k", "in=1x3x2x2x2 co=2 k=9 s=7 p=2", "343 phases, none empty"),
    ("anisotropic-kernel", "in=1x3x4x5x6 co=4 k=1x2x3 p=0x0x1", "each axis its own kernel"),
    ("anisotropic-stride", "in=1x3x4x5x6 co=4 k=3 s=1x2x3 p=1 op=0x1x2", "each axis its own stride"),
    ("anisotropic-unet", "in=1x20x5x6x6 co=18 k=1x2x2 s=1x2x2", "as in anisotropic nnU-Net plans"),
    ("k-below-s", "in=1x3x3x4x3 co=4 k=1 s=2", "phases without a tap hold the bias alone"),
    ("k-below-s-mixed", "in=1x3x3x4x3 co=4 k=2 s=3x2x1 op=1x0x0", "empty phases on one axis only"),
    ("dilated-gcd2", "in=1x3x4x4x4 co=4 k=3 s=2 d=2 p=1", "stride and dilation share a factor: odd outputs are empty"),
    ("dilated-gcd2-of-4", "in=1x2x4x3x4 co=3 k=4 s=4 d=2 p=2", "stride 4, dilation 2"),
    ("dilated-gcd3-of-6", "in=1x2x3x3x3 co=2 k=5 s=6x3x2 d=3 p=1", "216-fold stride, dilation 3"),
    ("dilated-coprime", "in=1x3x4x5x4 co=4 k=3 s=2 d=3 p=2 op=1", "taps step backwards through the input"),
    ("dilated-s1", "in=1x3x4x5x6 co=4 k=3 d=2x1x3 p=1", "no stride"),
    (
        "output-pad-in-dilation",
        "in=1x3x4x4x4 co=4 k=3 d=2 op=1",
        "output_pad in [stride, dilation): legal, refused by some",
    ),
    ("output-pad-opinfo", "in=1x2x4x4x4 co=2 k=3x2x3 s=3x2x1 d=4 p=2x1x3 op=2x3x1 g=2", "as in PyTorch's own samples"),
    ("output-pad-beyond", "in=1x2x3x3x3 co=3 k=2 s=2 op=5x0x3", "output beyond `full` is the bias alone"),
    ("asymmetric-pads", "in=1x3x4x5x6 co=4 k=3 s=2 p=1:0x0:1x2:1", "begin and end differ"),
    ("pads-beyond-kernel", "in=1x3x6x6x6 co=4 k=3 s=1 p=4:0x0:4x3:3", "whole input planes are cropped away"),
    ("pads-beyond-kernel-s2", "in=1x3x5x6x7 co=4 k=3 s=2 p=5:1x1:5x4:4", "the same, strided"),
    ("groups", "in=1x6x3x4x5 co=9 k=3 s=2 p=1 op=1 g=3", "three groups"),
    ("groups-pointwise", "in=2x2x1x1x1 co=4 k=1 g=2 bias=0", "groups narrower than a vector, one voxel"),
    ("groups-wide", "in=1x64x3x3x4 co=64 k=3 s=2 p=1 op=1 g=4", "four groups of sixteen channels"),
    ("depthwise", "in=1x8x4x5x6 co=8 k=3 s=2 p=1 g=8", "one channel a group"),
    ("depthwise-multiplier", "in=1x4x3x4x5 co=12 k=4 s=2 p=1 g=4", "three outputs a channel"),
    ("one-element-axes", "in=1x3x1x1x1 co=4 k=3 s=2 p=1 op=1", "the smallest input"),
    ("one-element-depth", "in=1x3x1x5x6 co=4 k=1x3x3 s=1x2x2 p=0x1x1 op=0x1x1", "a 2-D layer, lifted"),
    ("one-voxel-out", "in=1x3x1x1x1 co=4 k=3 p=1", "the smallest output"),
    ("one-voxel-crop", "in=1x3x4x4x4 co=2 k=3 s=2 p=4", "one voxel, by cropping"),
    ("one-channel", "in=1x1x4x5x6 co=1 k=3 s=2 p=1", "no channels to speak of"),
    ("batch", "in=3x4x3x4x5 co=6 k=3 s=2 p=1 op=1", "three images"),
    ("batch-dynamic", "in=Nx4x3x4x5 co=6 k=3 s=2 p=1 op=1", "batch known at run time only"),
    ("batch-dynamic-groups", "in=Nx8x3x3x3 co=8 k=2 s=2 g=2", "the same, grouped"),
    ("prime-sizes", "in=1x7x5x11x13 co=17 k=3 s=2 p=1 op=1", "nothing divides anything"),
    ("prime-k2-s2", "in=1x13x3x7x11 co=19 k=2 s=2", "the same, for the common family"),
    ("wide-row", "in=1x3x2x3x67 co=2 k=3 s=2 p=1 op=1", "few channels, long rows"),
    ("wide-channels", "in=1x37x2x2x2 co=67 k=2 s=2", "many channels, short rows"),
    ("no-bias", "in=1x4x3x4x5 co=6 k=2 s=2 bias=0", "the sum alone"),
    ("channels-last", "in=1x4x3x4x5 co=6 k=3 s=2 p=1 op=1 layout=NDHWC", "X and Y with channels last"),
    ("channels-last-groups", "in=2x6x3x4x5 co=9 k=2 s=2 g=3 layout=NDHWC", "the same, grouped"),
    ("channels-last-wide", "in=1x20x4x5x6 co=35 k=4 s=2 p=1 layout=NDHWC act=relu", "the same, many channels"),
    ("float64", "in=1x4x3x4x5 co=6 k=3 s=2 p=1 op=1 dtype=float64", "sums in double precision"),
    ("float16", "in=1x20x3x4x5 co=18 k=3 s=2 p=1 op=1 dtype=float16", "half-precision storage, single-precision sums"),
    ("bfloat16", "in=1x20x3x4x5 co=18 k=3 s=2 p=1 op=1 dtype=bfloat16", "the same for bfloat16"),
    (
        "float16-channels-last",
        "in=1x8x3x4x5 co=6 k=2 s=2 dtype=float16 layout=NDHWC act=silu",
        "two axes of choice at once",
    ),
    ("keras-example", "in=4x128x10x8x12 co=32 k=2 s=2 act=relu layout=NDHWC", "the example of Keras' documentation"),
]

CASES: tuple[Case, ...] = (
    *(_case(name, text, f"real {tags}", origin) for name, text, tags, origin in _REAL),
    *(_case(name, text, "corner", origin) for name, text, origin in _CORNER),
    *(
        _case(f"act-{name}", f"in=1x3x3x4x5 co=4 k=3 s=2 p=1 op=1 act={name}", "corner activation", f"{name}, fused")
        for name in ACTIVATIONS
        if name != "none"
    ),
    _case("act-leaky-slope", "in=1x3x3x4x5 co=4 k=2 s=2 act=leaky_relu:0.2", "corner activation", "a slope of its own"),
    _case("act-elu-alpha", "in=1x3x3x4x5 co=4 k=2 s=2 act=elu:0.5", "corner activation", "a parameter of its own"),
    _case(
        "act-hard-sigmoid", "in=1x3x3x4x5 co=4 k=2 s=2 act=hard_sigmoid:0.2:0.5", "corner activation", "ONNX's defaults"
    ),
)

_BY_NAME = {c.name: c for c in CASES}


def case(name: str) -> Case:
    """Look a case up by its name. Raises `SpecError` with the closest names."""
    if not isinstance(name, str):
        raise SpecError(f"a case is named by a str, and this is of type {type(name).__name__}; see opcompile.CASES")
    if name not in _BY_NAME:
        near = [n for n in _BY_NAME if name.lower() in n.lower()]
        hint = f"did you mean {', '.join(near[:5])}?" if near else "`opcompile cases` lists them"
        raise SpecError(f"no case is named {name!r}; {hint}")
    return _BY_NAME[name]


def tagged(*tags: str) -> list[Case]:
    """The cases that carry all of ``tags``, in table order."""
    return [c for c in CASES if c.tags.issuperset(tags)]
