"""A tuned result with its provenance: JSON, one file a layer and target.

A record says which tiles won, and everything needed to doubt it: all samples, versions, device,
seed, date, and the structural hash of the declaration it was measured on. A record that is corrupt,
that was made for another layer, target or declaration, or whose tiles the machine cannot hold, is
refused by name: an unreadable record of one's own never gives way to a shipped one in silence.

Records stand in ``<folder>/<target>/<key>.json``. Two folders are looked into, in this order:

1. one's own: ``$OPCOMPILE_RECORDS``, else ``opcompile/records`` under ``$XDG_DATA_HOME``
   (``~/.local/share``), where `opcompile.tune` writes;
2. the shipped ones, ``schedules/records`` of the installed package.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from opcompile.errors import RecordError, SpecError, TargetError
from opcompile.gpus import BF16, GpuTarget
from opcompile.paths import read_file
from opcompile.spec import ConvTranspose3d
from opcompile.target import Target, any_target
from schedules.division import over, up
from schedules.gpu_tiles import LATER as LATER_ON_GPUS
from schedules.gpu_tiles import GpuTiles, candidates
from schedules.layer import phases_at_once
from schedules.rules import (
    MOST_WOVEN,
    copies_chunks,
    halved,
    reads_in_place,
    streams,
    streams_stretches,
    sums_of_a_vector,
    takes_groups,
    takes_pairs,
    weights_by_taps,
    woven_by_tiles,
)
from schedules.tiles import LATER, Tiles, divided, left_over

FORMAT = 1
FOLDER_VARIABLE = "OPCOMPILE_RECORDS"

# What a provenance always holds, on CPUs and on GPUs; more may stand beside it.
_ORIGIN: dict[str, type] = {
    "opcompile": str,
    "tvm": str,
    "tvm_ffi": str,
    "numpy": str,
    "device": str,
    "date": str,
    "seed": int,
}
PROVENANCE: dict[str, type] = {**_ORIGIN, "llvm": str, "threads": int}
GPU_PROVENANCE: dict[str, type] = {**_ORIGIN, "nvcc": str, "driver": str, "capability": str}
_WAY_OUT = "delete the file, or tune the layer again"


@dataclass(frozen=True, slots=True)
class Record:
    """The winning tiles for one layer on one target, and how they won.

    ``samples`` holds every measured candidate: its ``tiles``, their ``rank`` by arithmetic (0 is the
    baseline), all its times ``times_us`` with their median ``run_us`` in microseconds, or the
    ``error`` that kept it from being measured. ``finals`` holds the same for the few best and the
    baseline, measured again in turns; they decide. ``run_us`` is the winner's median there.
    ``path`` is the file it was read from.
    """

    spec: str
    target: str
    declaration: str
    tiles: dict[str, Any]
    run_us: float
    samples: list[dict[str, Any]]
    finals: list[dict[str, Any]]
    provenance: dict[str, Any]
    format: int = FORMAT
    path: Path | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> str:
        """The file name without its ending."""
        return key(self.spec)

    @property
    def baseline_us(self) -> float | None:
        """The baseline's median in the finals; None where it could not be measured."""
        return next((s["run_us"] for s in self.finals if s.get("rank") == 0), None)

    def why(self) -> tuple[str, ...]:
        """Give the argument in words, one line a fact."""
        measured = [s for s in self.samples if s.get("run_us") is not None]
        lines = [f"the fastest of {len(measured)} measured candidates: {self.run_us:.1f} us, median"]
        if self.baseline_us is not None:
            lines.append(f"the baseline, measured in turns with it: {self.baseline_us:.1f} us")
        lines.append(f"tuned on {self.provenance['device']}, {self.provenance['date']}")
        return tuple(lines)

    def require_declaration(self, declaration: str) -> None:
        """Raise `RecordError` unless the record was tuned on the declaration with this structural hash."""
        if declaration != self.declaration:
            where = self.path or f"{self.key} for {self.spec}"
            raise RecordError(
                f"record {where} was tuned on declaration {self.declaration}, but this version declares "
                f"{declaration}; tune the layer again, or compile with plan baseline"
            )

    def to_json(self) -> str:
        """Return the file's text."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path"}
        return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


# --- where they are ---


def key(spec_text: str) -> str:
    """Return the name a layer's record goes by: the start of the SHA-256 of its text form."""
    return hashlib.sha256(spec_text.encode()).hexdigest()[:16]


def own_folder() -> Path:
    """Return where the user's own records are kept; it need not exist. Raises `RecordError` for a file."""
    if own := os.environ.get(FOLDER_VARIABLE):
        folder = Path(os.path.expanduser(own))
        if folder.is_file():
            raise RecordError(f"{FOLDER_VARIABLE} names {folder}, which is a file; records are in a directory")
        return folder
    data = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(data) / "opcompile" / "records"


def shipped_folder() -> Path:
    """Return where the records are that come with the package."""
    return Path(str(resources.files("schedules"))) / "records"


def folders() -> list[Path]:
    """List where records are looked for; the first one found counts."""
    return [own_folder(), shipped_folder()]


def machine_name(target: Target | GpuTarget) -> str:
    """Name the machine that records of ``target`` are for: of several architectures the first chooses the tiles."""
    return target.machine if isinstance(target, GpuTarget) else target.name


def path_of(folder: Path, spec: ConvTranspose3d, target: Target | GpuTarget) -> Path:
    """Return where the record of ``spec`` on ``target`` stands in ``folder``."""
    return folder / machine_name(target).replace(":", "-") / f"{key(str(spec))}.json"


def find_record(spec: ConvTranspose3d, target: Target | GpuTarget) -> Record | None:
    """Return the record of ``spec`` on ``target``, None where there is none. Raises `RecordError` for a bad one."""
    for folder in folders():
        path = path_of(folder, spec, target)
        try:
            there = path.exists()
        except OSError as error:
            _refuse(path, f"looking for it failed: {error.strerror}")
        if there:
            return read_record(path, spec, target)
    return None


# --- writing and reading ---


def write_record(record: Record, folder: Path, spec: ConvTranspose3d, target: Target | GpuTarget) -> Path:
    """Write ``record`` to its place in ``folder`` and return the path.

    Atomic: a reader, or a second writer, sees the old file or the new one, whole. Raises `RecordError`.
    """
    path = path_of(folder, spec, target)
    write_atomically(path, record.to_json())
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, onto the disk, and rename; a link stays one. Raises `RecordError`.

    What is no file, like a pipe or ``/dev/null``, is written to as it is.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text)
            return
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error.strerror}; choose a directory that can") from error


def read_record(path: Path, spec: ConvTranspose3d, target: Target | GpuTarget) -> Record:
    """Read one file and hold it against what it should be for. Raises `RecordError`.

    The declaration is the caller's to compare (`Record.require_declaration`): it takes a compiler to
    make one.
    """
    return checked(path, read_object(path), spec, target)


def read_in_place(path: Path, folder: Path) -> Record:
    """Read a file below ``folder`` as `find_record` does for the layer and the target that it names.

    Raises `RecordError`, also where nothing looks for it.
    """
    content = read_object(path)
    _check_types(path, "", content, {"spec": str, "target": str})
    try:
        spec = ConvTranspose3d.parse(content["spec"])
    except SpecError as error:
        _refuse(path, f"it names a layer that is none: {error}")
    try:
        target = any_target(content["target"])
    except TargetError as error:
        _refuse(path, f"it names a target that is none: {error}")
    record = checked(path, content, spec, target)
    if path != (place := path_of(folder, spec, target)):
        rule = f"nothing looks for it there: the place of {spec} on {record.target} is {place}"
        _refuse(path, rule, way_out="move it there, or delete it")
    return record


def checked(path: Path, content: Mapping[str, Any], spec: ConvTranspose3d, target: Target | GpuTarget) -> Record:
    """Return what ``path`` holds as a record, or is to be made one of. Raises `RecordError`."""
    _check_fields(path, content, GPU_PROVENANCE if isinstance(target, GpuTarget) else PROVENANCE)
    machine = machine_name(target)
    for what, given, wanted in (("layer", content["spec"], str(spec)), ("target", content["target"], machine)):
        if given != wanted:
            _refuse(path, f"it is for {what} {given!r}, not {wanted!r}")
    if complaint := illegal(content["tiles"], spec, target):
        _refuse(path, f"its tiles are not legal for this layer on {target.name}: {complaint}")
    return Record(**content, path=path)


def _refuse(path: Path, rule: str, kind: str = "record", way_out: str = _WAY_OUT) -> NoReturn:
    raise RecordError(f"{kind} {path} cannot be used: {rule}; {way_out}")


def read_object(path: Path, kind: str = "record", way_out: str = _WAY_OUT) -> dict[str, Any]:
    """Return the object in a JSON file, a ``kind`` of one. Raises `RecordError`."""
    try:
        content = json.loads(read_file(path).decode(), parse_constant=_no_constant)
    except OSError as error:
        _refuse(path, f"reading it failed: {error.strerror}", kind, way_out)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError among them
        _refuse(path, f"it is not JSON: {error}", kind, way_out)
    if not isinstance(content, dict):
        _refuse(path, f"it holds a {type(content).__name__}, not an object", kind, way_out)
    return content


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


_FIELDS: dict[str, type] = {
    "format": int,
    "spec": str,
    "target": str,
    "declaration": str,
    "tiles": dict,
    "run_us": float,
    "samples": list,
    "finals": list,
    "provenance": dict,
}


def _check_fields(path: Path, content: Mapping[str, Any], provenance: Mapping[str, type]) -> None:
    """Refuse what has not the fields of a `Record` and of its ``provenance``, each of its type."""
    if type(content.get("format")) is int and content["format"] != FORMAT:
        _refuse(path, f"it is of format {content['format']}, and this version reads format {FORMAT}")
    _check_types(path, "", content, _FIELDS)
    if unknown := sorted(content.keys() - _FIELDS.keys()):
        _refuse(path, f"it has an unknown field {unknown[0]!r}")
    _check_types(path, "provenance.", content["provenance"], provenance)
    if not _is_time(content["run_us"]):
        _refuse(path, f"run_us is {content['run_us']!r}, but must be a time in microseconds above 0")
    for name in ("samples", "finals"):
        for i, sample in enumerate(content[name]):
            if complaint := unsound(sample):
                _refuse(path, f"{name}[{i}] {complaint}")
    if not content["samples"]:
        _refuse(path, "its samples are none")
    if not any(sample["tiles"] == content["tiles"] for sample in content["finals"]):
        _refuse(path, "its tiles are not among its finals")


def _check_types(path: Path, prefix: str, content: Mapping[str, Any], types: Mapping[str, type]) -> None:
    for name, kind in types.items():
        if name not in content:
            _refuse(path, f"field {prefix}{name} is missing")
        given = content[name]
        if not _is(given, kind):
            _refuse(path, f"field {prefix}{name} is of type {type(given).__name__}, but must be {kind.__name__}")


def _is(value: object, kind: type) -> bool:
    # a bool is an int to `isinstance`, and a whole number of microseconds is an int to `json`
    return type(value) is kind or (kind is float and type(value) is int)


def _is_time(value: object) -> bool:
    # an int of JSON may be larger than any float
    return _is(value, float) and 0 < value <= sys.float_info.max  # type: ignore[operator]


def unsound(sample: object) -> str | None:
    """Say what keeps ``sample`` from being a measurement or a failed one; None where nothing does."""
    if not isinstance(sample, dict) or not isinstance(sample.get("tiles"), dict):
        return "is not an object with tiles"
    if isinstance(sample.get("error"), str):
        return None
    times = sample.get("times_us")
    if not isinstance(times, list) or not times or not all(map(_is_time, times)) or not _is_time(sample.get("run_us")):
        return "has neither an error nor times_us and run_us, in microseconds above 0"
    return None


# --- what a machine can hold ---


def illegal(tiles: Mapping[str, Any], spec: ConvTranspose3d, target: Target | GpuTarget) -> str | None:
    """Say why these tiles cannot be scheduled for ``spec`` on ``target``; None where they can.

    The same rules as `schedules.llvm.candidates` follows, except for what it merely thinks slow. On a GPU they are
    legal where they are candidates.
    """
    if isinstance(target, GpuTarget):
        return _illegal_on_gpu(tiles, spec, target)
    return _no_tiles(tiles) or next(_broken(Tiles(**tiles), spec, target), None)


def _no_tiles(tiles: Mapping[str, Any]) -> str | None:
    """Say why the fields, or their values, are none that tiles have."""
    names = [f.name for f in fields(Tiles) if f.name not in LATER or f.name in tiles]
    if complaint := _other_fields(tiles, names):
        return complaint
    words = {name: get_args(kind) for name, kind in get_type_hints(Tiles).items() if kind is not int}
    for name in names:
        value = tiles[name]
        if name in words and value not in words[name]:
            *others, last = map(repr, words[name])
            return f"{name} is {value!r}, but must be {', '.join(others)} or {last}"
        if name not in words and (type(value) is not int or value < 1):
            return f"{name} is {value!r}, but must be a whole number of at least 1"
    return None


def _other_fields(tiles: Mapping[str, Any], names: Sequence[str]) -> str | None:
    if sorted(tiles) == sorted(names):
        return None
    return f"their fields are {', '.join(sorted(map(str, tiles)))}, but must be {', '.join(sorted(names))}"


def _broken(t: Tiles, spec: ConvTranspose3d, target: Target) -> Iterator[str]:
    """Yield the rules that tiles break; each holds where those before it do."""
    yield from _broken_by_registers(t, spec, target)
    if t.vector == "groups" and not takes_groups(spec):
        yield "vector is 'groups', but that is for channels last, and groups of one input and one output channel"
    yield from _broken_by_channels(t, spec)
    if t.by_taps:
        yield from _broken_by_taps(t, spec)
    yield from _broken_by_bands(t, spec)
    if t.copy == "chunk":
        yield from _broken_by_chunks(t, spec)
    if t.copy == "none" and not reads_in_place(spec, t):
        yield (
            "copy is 'none', but that is for float32, tiles that write rows of Y, few output channels in a group, and "
            "no taps or tiles that reach beyond X"
        )
    together = t.woven == "tile" and t.depth == 1 and streams_stretches(spec, target.machine)
    if t.store == "streamed" and not (streams(spec, t.vector, target.machine) or together):
        yield (
            f"store is 'streamed', but on {target.name} that is for large Y written in whole cache lines"
            + (", or plane by plane by tiles of rows" if target.machine.stretch else "")
        )
    if t.woven == "tile":
        yield from _broken_by_weaving(t, spec, target)
    if t.products > 1:
        yield from _broken_by_pairs(t, spec, target)


def _broken_by_registers(t: Tiles, spec: ConvTranspose3d, target: Target) -> Iterator[str]:
    machine = target.machine
    half = halved(spec, machine) if t.vector == "channels" and t.products == 1 else None
    lanes = sums_of_a_vector(spec, machine)
    if t.lanes not in (lanes, lanes if half is None else sums_of_a_vector(spec, half)):
        yield f"lanes is {t.lanes}, but a vector of {target.name} has {machine.vector_bytes} bytes, {lanes} sums"
    sums = t.vectors * t.scalars * t.rows
    if sums >= machine.registers:
        yield f"the {sums} sums of the register tile fill all registers, but {target.name} has {machine.registers}"


def _broken_by_channels(t: Tiles, spec: ConvTranspose3d) -> Iterator[str]:
    groups, m = divided(spec, t)
    whole = up(m, t.channels)
    if t.task % t.channels:
        yield f"task is {t.task}, but must be a multiple of the register tile's {t.channels} channels"
    if t.task > whole:
        yield f"task is {t.task}, but a group has {m} channels, {whole} with its last tile"
    if (groups > 1 or t.vector == "groups") and t.task != whole and m % t.task:
        yield f"task is {t.task}, but must divide the {m} channels of a group, or cover them"
    if groups > 1 and spec.layout == "NDHWC" and t.task != whole:
        yield f"task is {t.task}, but must cover the {m} channels of a group where channels come last"
    if spec.c_in % t.chunk:
        yield f"chunk is {t.chunk}, but must divide the {spec.c_in} input channels of a group"


def _broken_by_chunks(t: Tiles, spec: ConvTranspose3d) -> Iterator[str]:
    if t.of_channels:
        yield f"copy is 'chunk', but that is for vectors of elements of X, and vector is {t.vector!r}"
    if t.products > 1:
        yield f"copy is 'chunk', but that is for one product at a time, and products is {t.products}"
    if not copies_chunks(spec):
        yield "copy is 'chunk', but that is for channels first, and phases that are few and have taps"


def _broken_by_weaving(t: Tiles, spec: ConvTranspose3d, target: Target) -> Iterator[str]:
    if t.vector != "row" and not t.of_channels:
        yield f"woven is 'tile', but that is for vectors along a row or channels, and vector is {t.vector!r}"
    if not woven_by_tiles(spec, t.of_channels):
        where = (
            "channels last, and phases that all have taps"
            if t.of_channels
            else f"channels first, phases that all have taps, {MOST_WOVEN} along W at most"
        )
        yield f"woven is 'tile', but for vector {t.vector!r} that is for {where}, and not for float64"
    if t.copy == "chunk":
        yield "woven is 'tile', but that is for a copy of all channels, and copy is 'chunk'"
    if t.of_channels and left_over(spec, t)[0]:
        yield "woven is 'tile', but with vectors of channels tasks must divide those of a group, and leave some over"
    phases = phases_at_once(spec, t)
    sums = t.vectors * t.scalars * t.rows * phases
    if sums >= target.machine.registers:
        yield (
            f"woven is 'tile', but the {sums} sums of the {phases} phases of a row fill all registers, and "
            f"{target.name} has {target.machine.registers}"
        )


def _broken_by_taps(t: Tiles, spec: ConvTranspose3d) -> Iterator[str]:
    m, weights = spec.m_out, weights_by_taps(spec, t.vector)
    if not weights:
        yield (
            f"vector is {t.vector!r}, but for sums by taps the layer has too many channels, taps or phases, or its "
            "rows are not woven"
        )
    if t.scalars not in weights:
        yield f"scalars is {t.scalars}, but must be one of {', '.join(map(str, weights))}, whole rows of taps"
    if t.task != m:
        yield f"task is {t.task}, but must be the {m} channels of a group for sums by taps"
    if t.copy != "chunk" and t.chunk != spec.c_in:
        yield f"chunk is {t.chunk}, but must be all input channels of a group for sums by taps that copy no chunks"
    if t.vector == "plane" and t.height != spec.axes[1].positions:
        yield f"height is {t.height}, but must be all {spec.axes[1].positions} rows where vector is 'plane'"


def _broken_by_bands(t: Tiles, spec: ConvTranspose3d) -> Iterator[str]:
    _, m = divided(spec, t)
    planes, rows, _ = (axis.positions for axis in spec.axes)
    if t.depth > planes:
        yield f"depth is {t.depth}, but the layer has {planes} planes of positions"
    if t.line and t.rows > 1:
        yield f"rows is {t.rows}, but the rows of a task form one line: it must be 1"
    if t.height % t.rows or t.height >= rows + t.rows:
        yield (
            f"height is {t.height}, but must be a multiple of the register tile's {t.rows} rows, "
            f"and cover {rows} at most"
        )
    for name, several, bands, what in (
        ("bands_d", t.bands_d, over(planes, t.depth), f"{planes} planes"),
        ("bands_h", t.bands_h, over(rows, t.height), f"{rows} rows"),
        ("bands_m", t.bands_m, over(m, t.task), f"{m} channels of a group"),
    ):
        if bands % several:
            yield f"{name} is {several}, but must divide the {bands} bands that cover the {what}"
    if spec.groups > 1 and 1 < t.bands_m < over(m, t.task):
        yield f"bands_m is {t.bands_m}, but must be 1, or cover the {m} channels of a group, where there are several"


def _broken_by_pairs(t: Tiles, spec: ConvTranspose3d, target: Target) -> Iterator[str]:
    if t.by_taps:
        yield f"products is {t.products}, but must be 1 for sums by taps"
    if t.products > 2:
        yield f"products is {t.products}, but must be 1, or 2 for pairs of bfloat16"
    if not takes_pairs(spec, target.machine):
        yield (
            f"products is 2, but {target.name} multiplies no pairs of channels here: that needs its flag +{BF16}, "
            "bfloat16 and an even number of channels in a group"
        )
    if t.chunk % 2:
        yield f"chunk is {t.chunk}, but must be even for pairs of channels"


def _illegal_on_gpu(tiles: Mapping[str, Any], spec: ConvTranspose3d, target: GpuTarget) -> str | None:
    names = [f.name for f in fields(GpuTiles) if f.name not in LATER_ON_GPUS or f.name in tiles]
    if complaint := _other_fields(tiles, names):
        return complaint
    known = candidates(spec, target.gpu)
    if not any(_same(asdict(estimate.tiles), {**LATER_ON_GPUS, **tiles}) for estimate in known):
        return f"they are none of the {len(known)} choices that keep to the limits of {target.name}"
    return None


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    # 1, 1.0 and True are equal, and not the same number in a kernel's text
    return one == other and all(type(one[name]) is type(other[name]) for name in one)
