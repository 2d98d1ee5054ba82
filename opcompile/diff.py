"""One layer as every system would say and compute it: whether shapes and values are the same.

A call is written by `say` and read back by that system's importer, so that what the table claims of a call
is what was proved of the importer. Where the system is installed, `ask` runs the very text as well, on a
small layer of the same geometry, and the largest difference from the spec is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from opcompile import ask
from opcompile.errors import EngineError, SpecError, WordsError
from opcompile.importers import jax, keras, lucid, mlx, rmlx, tensorflow, torch
from opcompile.importers.imported import Axes, Imported, Tensor, Triple, WeightOrder, cropped
from opcompile.reference import reference
from opcompile.say import SYSTEMS, System, onnx_call, openvino_call, openvino_weight
from opcompile.source import brief
from opcompile.spec import AXIS_NAMES, Activation, ConvTranspose3d, require_layer
from opcompile.units import binary

if TYPE_CHECKING:
    from rich.table import Table

EXACT, CROPPED, SHIFTED, OTHER, REFUSED = "same", "same, cropped", "shifted", "other shape", "cannot say it"
Pairs = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
_UNCROPPED: Pairs = ((0, 0), (0, 0), (0, 0))
_MEASURED_SIZE = 3
_LABEL = 26
_MEASURED_CHANNELS = 2
# Beyond this some systems take minutes, or end the process.
_MEASURED_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Row:
    """One way to say the layer.

    ``out`` and ``begin`` are what the ``call`` computes: its size, and how many elements of the full output it
    crops at the low side. ``shift`` is begin less the spec's: positive where the call begins later. ``difference``
    is the largest |call - spec| that was measured, where the shapes agree; ``own_difference`` the largest
    |call - what this row says it computes|; both None with the reason in ``not_measured``.
    """

    system: str
    verdict: str
    why: str
    call: str | None = None
    out: Triple | None = None
    begin: Triple | None = None
    shift: Triple | None = None
    x_layout: str | None = None
    weight: str | None = None
    version: str | None = None
    difference: float | None = None
    own_difference: float | None = None
    not_measured: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows for one layer; ``measured_on`` is the small layer that stood for it."""

    spec: ConvTranspose3d
    measured_on: ConvTranspose3d
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        place = {"out": _outs(self.spec.axes), "begin": _begins(self.spec.axes)}
        rows = [asdict(row) for row in self.rows]
        return {
            "spec": str(self.spec),
            **place,
            "left_aside": list(self.left_aside),
            "measured_on": str(self.measured_on),
            "systems": rows,
        }

    @property
    def left_aside(self) -> tuple[str, ...]:
        """What of the spec the calls leave out, and no verdict is about."""
        spec = self.spec
        said = {
            f"the activation {spec.activation}": spec.activation != Activation(),
            f"the dtype {spec.dtype} (differences are float32's)": spec.dtype != "float32",
            "the dynamic batch (where a call says N, it is 1)": spec.batch is None,
        }
        return tuple(text for text, holds in said.items() if holds)

    def renderables(self) -> Iterator[Any]:
        """Yield what a terminal shows."""
        yield from _shown(self)


def diff(spec: ConvTranspose3d, *, measure: bool = True) -> Comparison:
    """Compare every system's way to say ``spec``; its activation is left aside, for it follows the sum in all.

    `Comparison.left_aside` names that, and a dtype and a batch that the calls do not say.
    With ``measure``, systems that are installed compute a small layer of the same geometry, unless that is too large.
    """
    require_layer(spec)
    layer = replace(spec, activation=Activation(), dtype="float32", batch=spec.batch or 1)
    small = _small(layer)
    rows: list[Row] = []
    for system in SYSTEMS:
        ways = _ways(system, layer)
        rows += _answered(ways, _ways(system, small) if measure else [], layer, small)
    rows += _answered(_onnx_ways(layer), _onnx_ways(small) if measure else [], layer, small)
    return Comparison(spec, small, tuple(rows))


def _answered(
    ways: Sequence[Way], smaller: Sequence[Way], spec: ConvTranspose3d, small: ConvTranspose3d
) -> Iterator[Row]:
    """Yield a row for each way, measured where the ``smaller`` layer is said in the same way."""
    for at, way in enumerate(ways):
        row = _row(way, spec)
        alike = at < len(smaller) and _row(smaller[at], small).verdict == row.verdict
        yield _measured(row, smaller[at], small) if alike else row


def _small(spec: ConvTranspose3d) -> ConvTranspose3d:
    """Return the layer with few channels and the smallest input, from 3 on, that has an output."""
    axes = []
    for axis in spec.axes:
        cropped_away = sum(axis.pad) - axis.output_pad - axis.dilation * (axis.kernel - 1)
        least = 1 + max(0, -(-cropped_away // axis.stride))
        axes.append(replace(axis, size=max(least, min(_MEASURED_SIZE, axis.size))))
    groups = min(spec.groups, _MEASURED_CHANNELS)
    c, m = (min(n, _MEASURED_CHANNELS) * groups for n in (spec.c_in, spec.m_out))
    return replace(spec, batch=1, channels_in=c, channels_out=m, groups=groups, axes=(axes[0], axes[1], axes[2]))


# --- what a text means: the importers in the place of their systems ---


def _vector(*values: int) -> tuple[int, ...]:
    return values


def _keras_layer(*args: Any, **words: Any) -> Callable[[Any], Imported]:
    return lambda x: keras.Conv3DTranspose(*args, **words, input=x)


def _of_lucid(version: int) -> SimpleNamespace:
    def conv_transpose3d(*args: Any, **words: Any) -> Imported:
        return lucid.conv_transpose3d(*args, **words, version=version)

    return SimpleNamespace(conv_transpose3d=conv_transpose3d)


_READERS: Mapping[str, dict[str, Any]] = {
    "PyTorch": {"F": torch},
    "MLX": {"mx": mlx},
    "Rmlx": {"mlx_conv_transpose3d": rmlx.mlx_conv_transpose3d, "c": _vector},
    "Lucid 2": {"F": _of_lucid(2)},
    "Lucid 3": {"F": _of_lucid(3)},
    "Keras": {"keras": SimpleNamespace(layers=SimpleNamespace(Conv3DTranspose=_keras_layer))},
    "R keras3": {"layer_conv_3d_transpose": keras.layer_conv_3d_transpose, "c": _vector, "FALSE": False},
    "TensorFlow": {"tf": SimpleNamespace(nn=tensorflow)},
    "JAX": {"lax": jax},
}


def read(system: System, call: str, spec: ConvTranspose3d) -> Imported:
    """Give a text of `say` to the system's importer. Raises what that raises."""
    sizes = dict(zip(AXIS_NAMES, (a.size for a in spec.axes), strict=True))
    by_letter = {"N": spec.batch, "C": spec.channels_in, **sizes}
    x = tuple(by_letter[letter] for letter in system.layout or spec.layout)
    order = WeightOrder(system.order, "C" if system.order == "MDHWC" else "M")
    names = {"x": x, "w": order.shape(spec, [a.kernel for a in spec.axes]), "b": (spec.channels_out,)}
    found = eval(call, {"__builtins__": {}}, {**_READERS[system.name], **names})  # noqa: S307 (a text of our own)
    if not isinstance(found, Imported):
        raise TypeError(f"{call} gave {found!r}, which is no layer")
    return found


# --- the ways of one system ---


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """A ``call`` with what it means, cropped where it gives more than the spec; or the ``reason`` why there is none."""

    system: str
    call: str = ""
    layer: Imported | None = None
    crop: Pairs | None = None
    adds_bias: bool = False
    reason: str = ""

    @property
    def place(self) -> tuple[Triple, Triple]:
        """Where the output begins in the full one, and its size."""
        if self.layer is None:
            raise TypeError(f"{self.system} has no call")
        begins, outs = self.layer.place
        low = [pair[0] for pair in self.crop or _UNCROPPED]
        both = [sum(pair) for pair in self.crop or _UNCROPPED]
        a, b, c = (begin + n for begin, n in zip(begins, low, strict=True))
        d, e, f = (out - n for out, n in zip(outs, both, strict=True))
        return (a, b, c), (d, e, f)


def _ways(system: System, spec: ConvTranspose3d) -> list[Way]:
    """Return the exact call; or the nearest one, and the one that is exact when it is cropped."""
    said, reason = _said(system, spec)
    if not said:
        return [Way(system.name, reason=reason)]
    wanted = _begins(spec.axes), _outs(spec.axes)
    exact = [way for way in said if way.place == wanted]
    if exact:
        return exact[:1]
    alike = [way for way in said if way.place[1] == wanted[1]]
    larger = [replace(way, crop=crop) for way in said if (crop := _crop(way.place, wanted)) is not None]
    return [*(alike or ([] if larger else said))[:1], *larger[:1]]


def _said(system: System, spec: ConvTranspose3d) -> tuple[list[Way], str]:
    """Return the calls that the system takes, with what they mean, and why it refuses the first of the others."""
    said, reasons = [], []
    try:
        for call in dict.fromkeys(system.calls(spec)):
            try:
                said.append(Way(system.name, call, read(system, call, spec), adds_bias=system.adds_bias and spec.bias))
            except (WordsError, SpecError) as error:
                rule = str(error).partition("; opcompile computes")[0]
                reasons.append(rule.partition("refuses this: ")[2] or rule)
    except WordsError as error:
        reasons.append(str(error))
    return said, reasons[0] if reasons else ""


def _outs(axes: Axes) -> Triple:
    a, b, c = (axis.out for axis in axes)
    return a, b, c


def _begins(axes: Axes) -> Triple:
    a, b, c = (axis.begin for axis in axes)
    return a, b, c


def _crop(have: tuple[Triple, Triple], want: tuple[Triple, Triple]) -> Pairs | None:
    """Return what to take off at both sides of each axis; None where something would be missing."""
    pairs = [
        (wanted - begin, begin + out - wanted - size) for begin, out, wanted, size in zip(*have, *want, strict=True)
    ]
    return (pairs[0], pairs[1], pairs[2]) if min(min(pair) for pair in pairs) >= 0 else None


# --- ONNX's ways ---


def _onnx_ways(spec: ConvTranspose3d) -> list[Way]:
    """Return explicit pads, which say any layer, and the auto_pads that give its shape.

    ONNX 1 and 11 place an odd SAME_* padding differently, and ONNX Runtime pads no kernel below the stride:
    these stand apart where they differ.
    """
    ways = [Way("ONNX", onnx_call(spec), _placed(spec, spec.axes)), _runtime(spec)]
    if any(a.out != a.size * a.stride for a in spec.axes):
        return [*ways, _openvino(spec)]
    for auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        by_place: dict[tuple[Triple, Triple], list[str]] = {}
        for who in ("ONNX 1", "ONNX 11+", "ONNX Runtime"):
            by_place.setdefault(_same(spec, auto_pad, who), []).append(who)
        for place, names in by_place.items():
            layer = _placed(spec, cropped(*_geometry(spec), *place)[0])
            ways.append(Way(f"{', '.join(names)} {auto_pad}", onnx_call(spec, auto_pad), layer))
    return [*ways, _openvino(spec)]


def _runtime(spec: ConvTranspose3d) -> Way:
    if any(a.output_pad >= a.stride for a in spec.axes):
        reason = "output_padding must be less than the stride; `opcompile export` writes it otherwise"
        return Way("ONNX Runtime", reason=reason)
    return Way("ONNX Runtime", onnx_call(spec), _placed(spec, spec.axes))


def _openvino(spec: ConvTranspose3d) -> Way:
    return Way("OpenVINO", openvino_call(spec), _placed(spec, spec.axes), adds_bias=spec.bias)


def _same(spec: ConvTranspose3d, auto_pad: str, who: str) -> tuple[Triple, Triple]:
    begins, outs = [], []
    for axis in spec.axes:
        out = min(axis.size * axis.stride, axis.full) if who == "ONNX Runtime" else axis.size * axis.stride
        total = max(0, axis.full - out)
        smaller_half_first = (auto_pad == "SAME_UPPER") != (who == "ONNX 1")
        begins.append(total // 2 if smaller_half_first else total - total // 2)
        outs.append(out)
    return (begins[0], begins[1], begins[2]), (outs[0], outs[1], outs[2])


def _geometry(spec: ConvTranspose3d) -> tuple[list[int], list[int], list[int], list[int]]:
    sizes, kernels = [a.size for a in spec.axes], [a.kernel for a in spec.axes]
    return sizes, kernels, [a.stride for a in spec.axes], [a.dilation for a in spec.axes]


def _placed(spec: ConvTranspose3d, axes: Axes) -> Imported:
    return Imported("ONNX", replace(spec, axes=axes, layout="NCDHW"))


# --- rows ---


def _row(way: Way, spec: ConvTranspose3d) -> Row:
    if way.layer is None:
        return Row(way.system, REFUSED, way.reason)
    begin, out = way.place
    a, b, c = (theirs - ours.begin for theirs, ours in zip(begin, spec.axes, strict=True))
    verdict, why = _verdict(spec, begin, out, cropped_too=way.crop is not None)
    return Row(
        system=way.system,
        verdict=verdict,
        why=why,
        call=_written(way),
        out=out,
        begin=begin,
        shift=(a, b, c),
        x_layout=way.layer.x_layout,
        weight=openvino_weight(spec) if way.system == "OpenVINO" else str(way.layer.order),
    )


def _verdict(spec: ConvTranspose3d, begin: Triple, out: Triple, *, cropped_too: bool) -> tuple[str, str]:
    if (begin, out) == (_begins(spec.axes), _outs(spec.axes)):
        return (CROPPED, "the same when cropped") if cropped_too else (EXACT, "")
    if out != _outs(spec.axes):
        return OTHER, f"it gives {out}"
    shifts = {theirs - ours.begin for theirs, ours in zip(begin, spec.axes, strict=True)}
    if shifts in ({1}, {-1}):
        return SHIFTED, "same shape, shifted by one voxel"
    each = "x".join(str(abs(theirs - ours.begin)) for theirs, ours in zip(begin, spec.axes, strict=True))
    return SHIFTED, f"same shape, shifted by {each} voxels"


def _written(way: Way) -> str:
    """Write the call with what follows it: a crop, and the bias that the call itself cannot add."""
    if way.layer is None:
        return ""
    call, layout = way.call, way.layer.y_layout
    if way.crop is not None:
        call = _cropped_call(way, call)
    if way.adds_bias:
        call += " + b" if layout == "NDHWC" else " + b[:, None, None, None]"
    return call


def _cropped_call(way: Way, call: str) -> str:
    if way.layer is None or way.crop is None:
        return call
    layout = way.layer.y_layout
    if way.system == "Keras":
        return f"keras.layers.Cropping3D({way.crop})({call})"
    if way.system == "R keras3":
        pairs = ", ".join(f"c({low}, {high})" for low, high in way.crop)
        return f"{call} |> layer_cropping_3d(list({pairs}))"
    slices = [f"{low or ''}:{-high or ''}" for low, high in way.crop]
    if way.system == "Rmlx":
        outs = way.layer.place[1]
        slices = [f"{low + 1}:{out - high}" for (low, high), out in zip(way.crop, outs, strict=True)]
        return f"{call}[, {', '.join(slices)}, ]"
    return f"{call}[:, {', '.join([':', *slices] if layout == 'NCDHW' else [*slices, ':'])}]"


# --- what is measured ---


def _measured(row: Row, way: Way, small: ConvTranspose3d) -> Row:
    """Return the row with what the system computed on the ``small`` layer, said in the same ``way``."""
    if way.layer is None:
        return row
    if (size := _bytes(small)) > _MEASURED_BYTES:
        too_large = f"{brief(small)} would take {binary(size)}, and at most {binary(_MEASURED_BYTES)} are measured"
        return replace(row, not_measured=too_large)
    x, w, b = _inputs(small)
    try:
        version, y = ask.ask(way.system, way.call, way.layer, x, w, b)
    except EngineError as error:
        return replace(row, not_measured=str(error))
    y = _sliced(y, way.crop)
    begin, out = way.place
    axes, zeros = cropped(*_geometry(small), begin, out)
    theirs = replace(small, axes=axes, layout="NCDHW")
    wide = np.pad(w, [(0, 0), (0, 0), *((n, 0) for n in zeros)])
    own = float(np.abs(y - reference(theirs, x, wide, b)).max())
    right = reference(replace(small, layout="NCDHW"), x, w, b)
    difference = float(np.abs(y - right).max()) if y.shape == right.shape else None
    return replace(row, version=version, difference=difference, own_difference=own)


def _bytes(spec: ConvTranspose3d) -> int:
    """Return what the layer takes before its output is cropped."""
    full = spec.channels_out * math.prod(max(a.full, a.out) for a in spec.axes)
    return spec.bytes() + spec.itemsize * full


def _inputs(spec: ConvTranspose3d) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw x (N, C, D, H, W), canonical w and b."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, spec.channels_in, *(a.size for a in spec.axes))).astype(np.float32)
    w = rng.standard_normal(spec.w_shape).astype(np.float32)
    return x, w, rng.standard_normal(spec.channels_out).astype(np.float32) if spec.bias else None


def _sliced(y: Tensor, crop: Pairs | None) -> Tensor:
    for axis, (low, high) in enumerate(crop or (), start=2):
        y = np.take(y, range(low, y.shape[axis] - high), axis)
    return y


# --- what a terminal shows ---


def _shown(found: Comparison) -> Iterator[Any]:
    from rich.text import Text

    outs, begins = _outs(found.spec.axes), _begins(found.spec.axes)
    yield Text(f"{brief(found.spec)}: out {_x(outs)}, begins at {_x(begins)} of the full output")
    yield _table(found.rows)
    calls = _together((row.call, row.system) for row in found.rows if row.call)
    yield Text("\n".join(_labelled(names, call) for call, names in calls.items()))
    refused = _together((row.why, row.system) for row in found.rows if row.verdict == REFUSED)
    silent = _together((row.not_measured, row.system) for row in found.rows if row.not_measured)
    lines = [f"{names} cannot say it: {why}" for why, names in refused.items()]
    if found.left_aside:
        lines.append(f"Left aside, for the table is about the sum: {', '.join(found.left_aside)}.")
    if any(row.own_difference is not None for row in found.rows):
        lines.append(f"Differences were measured on {brief(found.measured_on)}.")
    lines += [f"Not measured: {names}: {why}" for why, names in silent.items()]
    yield Text("\n".join(lines))


def _labelled(names: str, call: str) -> str:
    return f"{names:<{_LABEL}}{call}" if len(names) < _LABEL else f"{names}:\n{'':{_LABEL}}{call}"


def _together(pairs: Iterable[tuple[str | None, str]]) -> dict[str, str]:
    """Return what is said of several systems once, with their names."""
    said: dict[str, list[str]] = {}
    for words, name in pairs:
        said.setdefault(words or "", []).append(name)
    return {words: ", ".join(dict.fromkeys(names)) for words, names in said.items()}


def _table(rows: Sequence[Row]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("system", "same values?", "out", "begins at", "x, y", "w from ours", "largest difference"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "largest difference" else "left")
    for row in rows:
        if row.out is None or row.begin is None:
            table.add_row(row.system, f"[yellow]{row.verdict}[/]", "-", "-", "-", "-", "-")
            continue
        colour = {EXACT: "green", CROPPED: "green", SHIFTED: "red"}.get(row.verdict, "yellow")
        said = f"[{colour}]{row.why or row.verdict}[/]"
        far = "-" if row.difference is None else f"{row.difference:.2g}"
        w = "as it is" if row.weight == "w" else row.weight or "-"
        table.add_row(row.system, said, _x(row.out), _x(row.begin), row.x_layout, w, far)
    return table


def _x(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(str(n) for n in values)
