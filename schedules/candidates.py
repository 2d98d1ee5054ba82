"""Which tiles a CPU schedule may use, the sensible ones, ranked by what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, get_args

from schedules.cost import Estimate, estimate
from schedules.division import largest_divisor, over, up
from schedules.layer import Layer
from schedules.rules import (
    LEAST_WOVEN_LAST,
    MOST_TAPS,
    SELECTIONS,
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
from schedules.tiles import CACHE_LINE, OF_CHANNELS, Tiles, Vector, elements_of_stretch, factors, left_over

if TYPE_CHECKING:
    from opcompile.spec import ConvTranspose3d
    from opcompile.target import Machine
    from schedules.tiles import Copy, Store

# Workspaces of a task are so many times smaller than X and Y, or than the second cache; than that, sums by taps of an X
# that is copied before.
_SMALL = 10
_PART_OF_SECOND = 8
_PART_FOR_TAPS = 2
# Of fewer channels at a time, putting sums down and taking them up again costs more than a cache gives back.
_LEAST_CHUNK = 8
# So few channels do not go by chunks through lines of padded rows: that gains nothing.
_FEW_CHANNELS = 63
# With fewer, a register tile of several phases has too few sums: 12 with AVX2, with several input channels up to a half
# slower than bands.
_MANY_REGISTERS = 32
# Where each phase has one tap, bands are up to 15 % faster than tiles that write Y of fewer output channels and more
# input channels; and where an activation is more than a few selections.
_FEW_BY_TILES = 4
# Who may copy X, whatever the layer.
_COPIES: tuple[Copy, ...] = ("task", "whole")
# Into how many lines a plane may be cut.
_PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128)


def candidates(spec: ConvTranspose3d, machine: Machine) -> list[Estimate]:
    """Every sensible choice of tiles, best first by estimated cycles; never empty.

    Deterministic: the order depends on ``spec`` and ``machine`` alone.
    """
    whole, *pairs = [Layer.of(spec, products) for products in ((1, 2) if takes_pairs(spec, machine) else (1,))]
    stores = {vector: _store(spec, vector, machine) for vector in get_args(Vector)}
    choices = [(layer, machine, tiles) for layer in (whole, *pairs) for tiles in _sensible(layer, machine, stores)]
    if takes_groups(spec) and spec.groups >= sums_of_a_vector(spec, machine):  # in pieces, vectors are slower than rows
        own = Layer.of(spec, 1, own=True)
        choices += [(own, machine, tiles) for tiles in _sensible(own, machine, stores)]
    choices += [(whole, machine, tiles) for tiles in _by_taps(spec, whole, machine, stores)]
    choices += [(whole, machine, tiles) for tiles in _by_tiles(spec, whole, machine, stores)]
    if woven_by_tiles(spec, of_channels=True):
        choices += [
            (layer, on, replace(t, woven="tile"))
            for layer, on, t in choices
            if t.of_channels and t.products == 1 and not left_over(spec, t)[0] and _returns_soon(spec, t)
        ]
    if (half := halved(spec, machine)) is not None:
        choices += [(whole, half, tiles) for tiles in _sensible(whole, half, stores) if tiles.vector == "channels"]
    estimates = [estimate(layer, on, tiles) for layer, on, tiles in choices]
    return sorted(estimates, key=lambda e: (e.cycles, -e.tiles.depth, -e.tiles.height, e.tiles))


@lru_cache(maxsize=256)
def baseline(spec: ConvTranspose3d, machine: Machine) -> Estimate:
    """The tiles to use where nothing was measured."""
    return candidates(spec, machine)[0]


def _store(spec: ConvTranspose3d, vector: str, machine: Machine) -> Store:
    return "streamed" if streams(spec, vector, machine) else "cached"


def _sensible(layer: Layer, machine: Machine, stores: Mapping[str, Store]) -> Iterator[Tiles]:
    lanes = machine.vector_bytes // layer.itemsize
    of_few_rows = [*product(range(1, 7), range(1, machine.registers), range(1, min(4, layer.height) + 1))]
    of_more_rows = product(range(1, 7), (1,), range(5, min(8, layer.height) + 1))
    shapes: dict[Vector, list[tuple[int, int, int]]] = {
        "channels": of_few_rows,
        "row": [*of_few_rows, *of_more_rows],
        "line": [*product(range(1, 9), range(1, 17), (1,))],
    }
    if layer.own:
        shapes = {"groups": of_few_rows}
    for vector, (vectors, scalars, rows) in ((v, shape) for v, those in shapes.items() for shape in those):
        # beside the sums: the factors of one side, and one of the other at a time
        if vectors * scalars * rows + min(factors(vector, vectors, scalars, rows)) + 1 > machine.registers:
            continue
        of_channels = vector in OF_CHANNELS
        channels, columns = (vectors * lanes, scalars) if of_channels else (scalars, vectors * lanes)
        if channels >= layer.m + (lanes if of_channels else 1):
            continue
        if vector != "line" and columns >= layer.width + (1 if of_channels else lanes):
            continue
        chunk = layer.products * _chunk(layer, machine, vector, rows, columns)
        for (depth, height), copy in product(_spans(layer, vector, rows), _COPIES):
            tiles = Tiles(
                vector=vector,
                lanes=lanes,
                vectors=vectors,
                scalars=scalars,
                rows=rows,
                task=channels,
                depth=depth,
                height=height,
                chunk=chunk,
                copy=copy,
                products=layer.products,
                store=stores[vector],
            )
            if vector == "line" and columns >= layer.joined(tiles) * height * layer.reach[2] + lanes:
                continue
            task = _task(layer, machine, tiles)
            whole = replace(tiles, task=task) if task > channels else tiles
            if (depth, height) == (1, rows) or _worthwhile(layer, machine, whole):
                yield whole
            yield from (t for t in _in_bands(layer, machine, tiles) if _worthwhile(layer, machine, t))


def _by_taps(spec: ConvTranspose3d, layer: Layer, machine: Machine, stores: Mapping[str, Store]) -> Iterator[Tiles]:
    """Each tap summed by itself, so that a vector of X is loaded once for many: where output channels are few."""
    lanes = machine.vector_bytes // layer.itemsize
    weights = {vector: weights_by_taps(spec, vector) for vector in MOST_TAPS}
    if not any(weights.values()) or (spec.layout == "NDHWC" and lanes < LEAST_WOVEN_LAST):
        return
    spans: list[tuple[Vector, int, int]] = [("taps", *span) for span in _spans(layer, "line", 1)]
    spans += [("plane", depth, layer.height) for depth in sorted({over(layer.depth, n) for n in _PARTS})]
    for vectors in range(1, 7):
        fits = machine.l1_bytes // 3 // (vectors * machine.vector_bytes + CACHE_LINE)
        ways: list[tuple[Copy, int]] = [("task", layer.c), ("whole", layer.c)]
        ways += [("chunk", chunk) for chunk in _chunks_of_taps(layer, fits)]
        for (vector, depth, height), (copy, chunk) in product(spans, ways):
            if (copy, vector) == ("chunk", "taps") and layer.c <= max(fits, _FEW_CHANNELS):
                continue
            several = (1, 2, 4) if copy != "whole" and (vector == "plane" or depth == 1) else (1,)
            for scalars, bands in product(weights[vector], several):
                if vectors * scalars + min(vectors, scalars) + 1 > machine.registers:
                    continue
                tiles = Tiles(
                    vector=vector,
                    lanes=lanes,
                    vectors=vectors,
                    scalars=scalars,
                    rows=1,
                    task=layer.m,
                    depth=depth,
                    height=height,
                    chunk=chunk,
                    copy=copy,
                    bands_d=bands,
                    store=stores[vector],
                )
                # no task is smaller than a plane, nor than a vector
                least = vector == "plane" and (depth * bands == 1 or math.prod(layer.sizes[1:]) < lanes)
                worthwhile = _fits if least else _worthwhile
                if over(layer.depth, depth) % bands == 0 and worthwhile(layer, machine, tiles):
                    yield tiles


def _by_tiles(spec: ConvTranspose3d, layer: Layer, machine: Machine, stores: Mapping[str, Store]) -> Iterator[Tiles]:
    """Register tiles that write rows of Y, each channel in a band of its own or all in one."""
    one_tap = layer.most_taps == (1, 1, 1)
    few_registers = machine.registers < _MANY_REGISTERS and (one_tap or layer.c > 1)
    if few_registers or not woven_by_tiles(spec, of_channels=False):
        return
    copying_is_slower = one_tap and (layer.m < _FEW_BY_TILES < layer.c or spec.activation.name not in SELECTIONS)
    lanes, put_together = machine.vector_bytes // layer.itemsize, streams_stretches(spec, machine)
    planes = (1, 2, 4) if layer.most_taps[0] > 1 else (1,)
    of_rows = (range(1, 7), range(1, machine.registers // 2), range(1, min(8, layer.height) + 1))
    for vectors, scalars, rows in product(*of_rows):
        weights = layer.phases_of_row * scalars
        many = weights * vectors * rows + min(weights, vectors * rows) >= machine.registers
        if many or layer.m % scalars or vectors * lanes >= layer.width + lanes:
            continue
        plane, chunk = up(layer.height, rows), _chunk(layer, machine, "row", rows, vectors * lanes)
        parts = (1, 2, 4, 8, 16) if put_together else (1, 2, 4)
        for height in sorted({min(rows * n, plane) for n in parts} | {plane}):
            of_plane = over(layer.height, height)
            tasks = sorted({scalars, layer.m})
            ways: list[tuple[Copy, int, int, int]] = [("none", 1, 1, task) for task in tasks]
            if not copying_is_slower:
                bands = product(planes, sorted({1, 2, 4, 8, 16, of_plane}), tasks)
                ways += [("whole", 1, 1, scalars), *(("task", *way) for way in bands)]
            for copy, bands_d, bands_h, task in ways:
                if layer.depth % bands_d or of_plane % bands_h:
                    continue
                tiles = Tiles(
                    vector="row",
                    lanes=lanes,
                    vectors=vectors,
                    scalars=scalars,
                    rows=rows,
                    task=task,
                    depth=1,
                    height=height,
                    chunk=chunk,
                    copy=copy,
                    bands_d=bands_d,
                    bands_h=bands_h,
                    bands_m=layer.m // task,
                    store=stores["row"],
                    woven="tile",
                )
                if copy == "none" and not reads_in_place(spec, tiles):
                    continue
                stretch = elements_of_stretch(spec, tiles) * layer.itemsize
                if put_together and machine.stretch <= stretch <= machine.l1_bytes // 2 // task:
                    tiles = replace(tiles, store="streamed")
                if _worthwhile(layer, machine, tiles):
                    yield tiles


def _returns_soon(spec: ConvTranspose3d, t: Tiles) -> bool:
    """Whether tiles that write some channels of a row soon write the others.

    Of groups, which have few products for each element of Y, they are else up to twice as slow as bands.
    """
    return t.vector == "channels" or t.channels >= spec.channels_out or (t.depth, t.height) == (1, 1)


def _chunks_of_taps(layer: Layer, fits: int) -> list[int]:
    """Channels that a task may copy at a time, where the first cache holds what a tile reads of ``fits`` of them."""
    chunks = sorted({largest_divisor(layer.c, fits // parts) for parts in (1, 2, 4)})
    return [chunk for chunk in chunks if layer.in_chunks and _LEAST_CHUNK <= chunk < layer.c]


def _in_bands(layer: Layer, machine: Machine, t: Tiles) -> Iterator[Tiles]:
    """Tasks of several bands, each a tile of channels wide, whose phases stay in the first cache."""
    tiles = over(layer.m, t.channels)
    if t.copy == "whole" or t.depth > layer.joined(t) or layer.held(t) > machine.l1_bytes:
        return
    if tiles > 1 and layer.whole_groups(t):
        return
    of_plane, planes = over(layer.height, t.height), (1, 2, 4) if layer.most_taps[0] > 1 else (1,)
    for bands_d, bands_h in product(planes, sorted({1, 2, 4, 8, of_plane})):
        if bands_d * bands_h * tiles > 1 and of_plane % bands_h == 0 and layer.depth % bands_d == 0:
            banded = replace(t, bands_d=bands_d, bands_h=bands_h, bands_m=tiles)
            yield banded
            yield from (replace(banded, copy="chunk", chunk=chunk) for chunk in _chunks(layer, machine, banded))


def _chunks(layer: Layer, machine: Machine, t: Tiles) -> Iterator[int]:
    """Channels that a task may copy at a time, a chunk or half of one, where the second cache does not hold all."""
    if t.chunk == layer.c or layer.products > 1 or not layer.in_chunks:
        return
    if t.scalars == 1 or 2 * layer.window(t) <= machine.l2_bytes:  # with a single weight a chunk has few products
        return
    for chunk in (t.chunk, largest_divisor(t.chunk, t.chunk // 2)):
        if chunk >= _LEAST_CHUNK:
            yield chunk


def _worthwhile(layer: Layer, machine: Machine, t: Tiles) -> bool:
    """Whether tasks of more than a row are enough for all cores, in cache, and small."""
    return layer.tasks(t) >= machine.cores and _fits(layer, machine, t)


def _fits(layer: Layer, machine: Machine, t: Tiles) -> bool:
    """Whether what a task holds fits into the second cache, and is small."""
    held = layer.held(t)
    part = _PART_FOR_TAPS if t.by_taps and t.copy == "whole" else _PART_OF_SECOND
    return held <= machine.l2_bytes and held + layer.widening(t) + layer.copied(t) <= _small(layer, machine, part)


def _small(layer: Layer, machine: Machine, part: int = _PART_OF_SECOND) -> int:
    """Bytes that a task may take: few beside X and Y, or beside what a core has near."""
    return max(layer.tensors // _SMALL, machine.l2_bytes // part)


def _spans(layer: Layer, vector: str, rows: int) -> list[tuple[int, int]]:
    """Planes and rows that a task may cover: a register tile's rows, twice as many, all; of lines, any even part."""
    if vector == "line":
        heights = {over(layer.height, parts) for parts in _PARTS if parts < layer.height or parts == 1}
    else:
        plane = up(layer.height, rows)
        heights = {rows, min(2 * rows, plane), plane}
    spans = set(product((1, min(2, layer.depth), layer.depth), heights))
    if vector == "line" and layer.flat:
        spans |= {(over(layer.depth, parts), layer.height) for parts in _PARTS if parts < layer.depth}
    return sorted(spans)


def _task(layer: Layer, machine: Machine, t: Tiles) -> int:
    """Channels a task covers: as many tiles as leave its phases and weights in the second cache, and work for all.

    Whole tasks only, where the tiles divide the channels: a ragged last task costs a test for each
    output element, and in a grouped layer it would straddle two groups, for which the packed
    weight has no place. ``t.task`` is the channels of one tile.
    """
    tiles = over(layer.m, t.channels)
    if tiles == 1 or layer.whole_groups(t):
        return t.channels * tiles
    held = layer.held(t)
    fits = machine.l2_bytes // 2 // (held + layer.together * layer.weights(t.channels))
    small = (_small(layer, machine) - layer.copied(t)) // (held + layer.widening(t))
    spread = layer.spans(t.depth, t.height) * tiles // machine.cores
    most = max(1, min(fits, small, spread))
    return t.channels * largest_divisor(tiles, most)


def _chunk(layer: Layer, machine: Machine, vector: str, rows: int, columns: int) -> int:
    """Input channels that go through the taps of a plane together: what all taps read of them fits the first cache.

    So many for all planes, though a plane at a time is read: twice as many gained nothing on most layers measured.
    """
    taps_d, taps_h, taps_w = layer.most_taps
    if vector in OF_CHANNELS or taps_d * taps_h * taps_w == 1:
        return layer.c
    fits = max(1, machine.l1_bytes // (taps_d * (rows + taps_h - 1) * (columns * layer.itemsize + CACHE_LINE)))
    return largest_divisor(layer.c, fits)
