"""A record is found where it was written, and one that should not be used is refused by name."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from opcompile import record
from opcompile.errors import RecordError
from opcompile.gpus import GpuTarget
from opcompile.lower import choose, declaration_hash
from opcompile.lower_gpu import choose as choose_gpu
from opcompile.record import Record, find_record, illegal, path_of, read_in_place, read_record, write_record
from opcompile.spec import ConvTranspose3d
from opcompile.target import Target, any_target, target
from schedules import llvm

SPEC = ConvTranspose3d.parse("in=1x4x3x4x5 co=24 k=2 s=2")
MACHINE = target("llvm:x86-64-v3")
TILES = asdict(llvm.baseline(SPEC, MACHINE.machine).tiles)


@cache
def made(spec: ConvTranspose3d = SPEC, machine: Target = MACHINE) -> Record:
    """A sound record of the baseline's tiles; nothing in it was measured."""
    tiles = llvm.baseline(spec, machine.machine).tiles
    sample = {"tiles": asdict(tiles), "rank": 0, "times_us": [3.0, 2.0, 4.0], "run_us": 3.0, "device": "a test"}
    return Record(
        spec=str(spec),
        target=machine.name,
        declaration=declaration_hash(spec, tiles),
        tiles=asdict(tiles),
        run_us=3.0,
        samples=[sample, {"tiles": asdict(tiles), "rank": 1, "error": "it crashed"}],
        finals=[sample],
        provenance={
            **dict.fromkeys(("opcompile", "tvm", "tvm_ffi", "llvm", "numpy", "device", "date"), "a test"),
            "seed": 0,
            "threads": 1,
        },
    )


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own folder of records, empty."""
    monkeypatch.setenv(record.FOLDER_VARIABLE, str(tmp_path / "own"))
    return tmp_path / "own"


# --- written, found ---


def test_what_was_written_is_read_back_and_used(own: Path) -> None:
    path = write_record(made(), own, SPEC, MACHINE)
    found = find_record(SPEC, MACHINE)
    assert found == made()
    assert found.path == path == path_of(own, SPEC, MACHINE)
    tiles, plan = choose(SPEC, MACHINE, "tuned")
    assert asdict(tiles) == TILES
    assert plan.record == found.key
    assert any("a test" in line for line in plan.why)


def test_no_record_is_none(own: Path) -> None:
    assert find_record(SPEC, MACHINE) is None
    write_record(made(), own, SPEC, MACHINE)
    assert find_record(SPEC, target("llvm:haswell")) is None
    assert find_record(SPEC.with_batch(2), MACHINE) is None


def test_ones_own_record_comes_before_the_shipped_one(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "shipped_folder", lambda: tmp_path / "shipped")
    write_record(replace(made(), run_us=2.0), tmp_path / "shipped", SPEC, MACHINE)
    shipped = find_record(SPEC, MACHINE)
    assert shipped is not None
    assert shipped.run_us == 2.0
    path = write_record(made(), own, SPEC, MACHINE)
    mine = find_record(SPEC, MACHINE)
    assert mine is not None
    assert mine.run_us == 3.0
    path.write_text("{")
    with pytest.raises(RecordError, match="cannot be used"):  # and does not give way to the shipped one
        find_record(SPEC, MACHINE)


def test_where_ones_own_folder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv(record.FOLDER_VARIABLE, raising=False)
    assert record.own_folder() == Path("/home/x/.local/share/opcompile/records")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert record.own_folder() == Path("/data/opcompile/records")
    monkeypatch.setenv(record.FOLDER_VARIABLE, "~/mine")
    assert record.own_folder() == Path("/home/x/mine")
    monkeypatch.setenv(record.FOLDER_VARIABLE, "~nobody-of-this-name/mine")
    assert record.own_folder() == Path("~nobody-of-this-name/mine")


def test_writing_is_atomic(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_record(made(), own, SPEC, MACHINE)
    before = path.read_text()

    def torn(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", torn)
    with pytest.raises(RecordError, match=r"cannot be written: No space left on device; choose"):
        write_record(replace(made(), run_us=1.0), own, SPEC, MACHINE)
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_writing_follows_a_link_and_replaces_no_device(tmp_path: Path) -> None:
    link, pipe = tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to("found.json")
    record.write_atomically(link, "{}")
    assert link.is_symlink()
    assert (tmp_path / "found.json").read_text() == "{}"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    record.write_atomically(pipe, "{}")
    assert pipe.is_fifo()
    assert os.read(reader, 9) == b"{}"
    os.close(reader)


def test_the_shipped_records_are_sound() -> None:
    for path in sorted(record.shipped_folder().glob("*/*.json")):
        content = json.loads(path.read_text())
        spec, machine = ConvTranspose3d.parse(content["spec"]), any_target(content["target"])
        assert read_record(path, spec, machine).path == path_of(record.shipped_folder(), spec, machine)
        plan = choose_gpu if isinstance(machine, GpuTarget) else choose
        _, chosen = plan(spec, machine, "tuned")  # it holds the declaration against this version's
        assert chosen.record == path.stem


# --- refused, by name ---


def refused(own: Path, content: object) -> str:
    """Put ``content`` where the record should be; the refusal's text."""
    path = path_of(own, SPEC, MACHINE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(RecordError) as refusal:
        find_record(SPEC, MACHINE)
    text = str(refusal.value)
    assert str(path) in text  # which file
    assert text.endswith("; delete the file, or tune the layer again")  # the way out
    return text


def fields() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(made().to_json())
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"run_us": NaN}', "NaN is not a number"),
        (b"[]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
        (b"{}", "field format is missing"),
    ],
)
def test_a_corrupt_file_is_refused(own: Path, content: bytes, words: str) -> None:
    assert words in refused(own, content)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("spec", None, "field spec is missing"),
        ("target", 3, "field target is of type int, but must be str"),
        ("spec", "in=1x4", "it names a layer that is none: "),
        ("target", "llvm:pdp-11", "it names a target that is none: .*pdp-11"),
        ("target", "cuda:sm_90", "field provenance.nvcc is missing"),
        ("run_us", 0, "run_us is 0"),
    ],
)
def test_a_file_is_read_without_its_layer(name: str, value: object, words: str, own: Path) -> None:
    path = write_record(made(), own, SPEC, MACHINE)
    assert read_in_place(path, own) == made()
    content = {**fields(), name: value}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(RecordError, match=f"record {path} cannot be used: {words}"):
        read_in_place(path, own)


def test_half_a_file_is_refused(own: Path) -> None:
    text = made().to_json().encode()
    assert "not JSON" in refused(own, text[: len(text) // 2])


@pytest.mark.parametrize("name", list(json.loads(made().to_json())))
def test_a_missing_field_is_refused(own: Path, name: str) -> None:
    content = fields()
    del content[name]
    assert f"field {name} is missing" in refused(own, content)


@pytest.mark.parametrize("name", list(record.PROVENANCE))
def test_a_missing_provenance_is_refused(own: Path, name: str) -> None:
    content = fields()
    del content["provenance"][name]
    assert f"field provenance.{name} is missing" in refused(own, content)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("spec", 3, "field spec is of type int, but must be str"),
        ("target", None, "field target is of type NoneType"),
        ("declaration", 7, "field declaration is of type int"),
        ("tiles", [], "field tiles is of type list, but must be dict"),
        ("run_us", "3", "field run_us is of type str"),
        ("run_us", True, "field run_us is of type bool"),
        ("run_us", 0.0, "run_us is 0.0, but must be a time"),
        ("run_us", 10**400, "run_us is 1000"),
        ("run_us", -1, "run_us is -1, but must be a time"),
        ("run_us", float("1e999"), "Infinity is not a number"),
        ("samples", {}, "field samples is of type dict"),
        ("samples", [{}], "samples[0] is not an object with tiles"),
        ("samples", [{"tiles": TILES}], "samples[0] has neither an error nor times_us"),
        ("samples", [{"tiles": TILES, "times_us": [1.0, "2"], "run_us": 1.0}], "samples[0] has neither"),
        ("finals", [], "its tiles are not among its finals"),
        ("samples", [], "its samples are none"),
        ("provenance", "me", "field provenance is of type str"),
        ("format", "1", "field format is of type str"),
        ("format", True, "field format is of type bool"),
        ("format", 2, "it is of format 2, and this version reads format 1"),
        ("surplus", 1, "unknown field 'surplus'"),
    ],
)
def test_a_wrong_field_is_refused(own: Path, name: str, value: object, words: str) -> None:
    assert words in refused(own, fields() | {name: value})


def test_a_record_for_something_else_is_refused(own: Path) -> None:
    other = SPEC.with_batch(2)
    assert f"it is for layer {str(other)!r}, not {str(SPEC)!r}" in refused(own, fields() | {"spec": str(other)})
    text = refused(own, fields() | {"target": "llvm:haswell"})
    assert "it is for target 'llvm:haswell', not 'llvm:x86-64-v3'" in text


def test_a_record_for_another_declaration_is_refused(own: Path) -> None:
    write_record(replace(made(), declaration="0123456789abcdef"), own, SPEC, MACHINE)
    for plan in ("best", "tuned"):
        with pytest.raises(RecordError, match=r"tuned on declaration 0123456789abcdef.* tune .*again"):
            choose(SPEC, MACHINE, plan)  # type: ignore[arg-type]
    assert choose(SPEC, MACHINE, "baseline")[1].record is None
    found = find_record(SPEC, MACHINE)
    assert found is not None
    found.require_declaration("0123456789abcdef")
    with pytest.raises(RecordError, match=rf"{found.key}\.json was tuned on declaration 0123456789abcdef, but"):
        found.require_declaration("fedcba9876543210")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lanes": 16}, "lanes is 16, but a vector of llvm:x86-64-v3 has 32 bytes, 8 sums"),
        ({"lanes": 0}, "lanes is 0, but must be a whole number of at least 1"),
        ({"rows": 1.0}, "rows is 1.0, but must be a whole number"),
        ({"rows": True}, "rows is True, but must be a whole number"),
        ({"vector": "columns"}, "vector is 'columns', but must be 'channels', 'groups', 'row', 'line', 'taps' or"),
        ({"vectors": 6, "scalars": 6}, "registers, but llvm:x86-64-v3 has 16"),
        (
            {"vectors": 2, "task": 24},
            "task is 24, but must be a multiple of the register",
        ),
        ({"vector": "line"}, "rows is 2, but the rows of a task form one line: it must be 1"),
        ({"vectors": 1, "task": 32}, "task is 32, but a group has 24 channels"),
        ({"depth": 4}, "depth is 4, but the layer has 3 planes of positions"),
        ({"height": 3}, "height is 3, but must be a multiple of the register tile's 2 rows"),
        ({"height": 6}, "height is 6, but must be"),
        ({"chunk": 3}, "chunk is 3, but must divide the 4 input channels of a group"),
        ({"depth": 1, "bands_d": 2}, "bands_d is 2, but must divide the 3 bands that cover the 3 planes"),
        ({"height": 2, "bands_h": 3}, "bands_h is 3, but must divide the 2 bands that cover the 4 rows"),
        ({"bands_m": 2}, "bands_m is 2, but must divide the 1 bands that cover the 24 channels of a group"),
        ({"copy": "twice"}, "copy is 'twice', but must be 'task', 'chunk', 'whole' or 'none'"),
        (
            {"copy": "none"},
            "copy is 'none', but that is for float32, tiles that write rows of Y, few output",
        ),
        ({"copy": "chunk"}, "copy is 'chunk', but that is for vectors of elements of X, and vector is 'channels'"),
        ({"colour": 1}, "their fields are bands_d, bands_h, bands_m, chunk, colour, copy, depth"),
    ],
)
def test_tiles_that_the_machine_cannot_hold_are_refused(own: Path, change: dict[str, object], words: str) -> None:
    tile = {"vector": "channels", "lanes": 8, "vectors": 3, "scalars": 1, "rows": 2}
    sound = {**tile, "task": 24, "depth": 3, "height": 4, "chunk": 2, "copy": "task"}
    sound |= {"bands_d": 1, "bands_h": 1, "bands_m": 1}
    assert illegal(sound, SPEC, MACHINE) is None
    assert words in refused(
        own,
        fields()
        | {"tiles": sound | change, "finals": [{"tiles": sound | change, "rank": 0, "times_us": [3.0], "run_us": 3.0}]},
    )


def test_tasks_that_straddle_groups_are_illegal() -> None:
    grouped = ConvTranspose3d.parse("in=1x6x3x4x5 co=18 k=2 s=2 g=3")
    tile = {"vector": "row", "lanes": 8, "vectors": 1, "scalars": 2, "rows": 1}
    tiles = {**tile, "task": 4, "depth": 1, "height": 1, "chunk": 2, "copy": "whole"}
    tiles |= {"bands_d": 1, "bands_h": 1, "bands_m": 1}
    assert "must divide the 6 channels of a group" in str(illegal(tiles, grouped, MACHINE))
    assert illegal(tiles | {"task": 2}, grouped, MACHINE) is None
    wider = ConvTranspose3d.parse("in=1x6x3x4x5 co=24 k=2 s=2 g=3")
    assert "bands_m is 2, but must be 1, or cover" in str(illegal(tiles | {"task": 2, "bands_m": 2}, wider, MACHINE))
    assert illegal(tiles | {"task": 2, "bands_m": 4}, wider, MACHINE) is None


@pytest.mark.parametrize(
    "text",
    [
        "in=1x6x3x4x5 co=4 k=2 s=2 layout=NDHWC",
        "in=1x6x3x4x5 co=4 k=4 s=4",  # 64 phases
        "in=1x6x1x1x1 co=4 k=1 s=2 p=1:0 op=1",  # every tap beyond Y
    ],
)
def test_chunks_are_for_phases_that_have_sums_and_channels_first(text: str) -> None:
    spec = ConvTranspose3d.parse("in=1x6x3x4x5 co=4 k=2 s=2")
    tiles = asdict(llvm.Tiles("row", 8, 1, 2, 1, 2, 1, 1, 2, "chunk"))
    assert illegal(tiles, spec, MACHINE) is None
    assert "that is for one product at a time" in str(illegal(tiles | {"products": 2}, spec, MACHINE))
    complaint = illegal(tiles | {"task": 4}, ConvTranspose3d.parse(text), MACHINE)
    assert "that is for channels first, and phases that are few" in str(complaint)


@pytest.mark.parametrize("machine", ["llvm:x86-64-v2", "llvm:x86-64-v3", "llvm:x86-64-v4", "llvm:apple-m1"])
@pytest.mark.parametrize(
    "text",
    [
        "in=1x320x4x4x4 co=320 k=2 s=2",
        "in=1x64x12x16x32 co=64 k=3 s=2 p=1 op=1",
        "in=1x6x3x4x5 co=9 k=3 s=2 p=1 op=1 g=3",
        "in=1x4x3x4x5 co=6 k=3 s=2 p=1 op=1 dtype=float64",
    ],
)
def test_every_candidate_is_legal(text: str, machine: str) -> None:
    spec, on = ConvTranspose3d.parse(text), target(machine)
    for estimate in llvm.candidates(spec, on.machine):
        assert illegal(asdict(estimate.tiles), spec, on) is None
