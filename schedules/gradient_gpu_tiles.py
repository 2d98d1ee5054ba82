"""Which numbers the GPU schedules of the derivatives use, decided by arithmetic over the layer and the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import TYPE_CHECKING, Literal

from schedules.gpu_tiles import Family, GpuEstimate, GpuTiles, Sums, ranked, sensible

if TYPE_CHECKING:
    from opcompile.gpus import Gpu
    from opcompile.gradients.gradient import Gradient

# Bytes that memory delivers at least.
_SECTOR = 32
# Elements that each thread of dB should have to sum, before more threads share them.
_WORTH_A_THREAD = 8


def gpu_candidates(gradient: Gradient, gpu: Gpu) -> list[GpuEstimate]:
    """Every sensible choice of tiles within the limits of ``gpu``, best first; never empty, and deterministic."""
    sums = _sums(gradient)
    choose: dict[str, Callable[[Gradient, Sums], Iterator[GpuTiles]]] = {
        "x": lambda _, sums: sensible(sums, ahead=False),
        "w": _of_weight,
        "b": _of_bias,
    }
    return ranked(sums, gpu, choose[gradient.wrt](gradient, sums))


def why(estimate: GpuEstimate) -> tuple[str, ...]:
    """The argument in words, one line a fact."""
    e, t = estimate, estimate.tiles
    lines = [
        f"{e.blocks} blocks of {t.threads} threads; each computes {t.channels} rows x {t.positions} columns "
        f"of a product of matrices",
        f"a thread sums {t.tile_m} rows x {t.tile_q} columns; about {e.registers} registers",
    ]
    if t.chunk:
        lines.append(f"{t.chunk} terms at a time through shared memory")
    if t.split > 1:
        lines.append(f"{t.split} groups of threads share the terms, and add up at the end")
    lines.append(f"{e.shared} bytes of shared memory at most")
    return (*lines, f"estimated cycles: {e.computing:.3g} computing, {e.moving:.3g} moving bytes")


def _sums(gradient: Gradient) -> Sums:
    layer, wrt = gradient.layer, gradient.wrt
    c, m = layer.c_in, layer.m_out
    taps, sizes, outs = (math.prod(n) for n in zip(*((a.kernel, a.size, a.out) for a in layer.axes), strict=True))
    images = layer.batch or 1
    rows, terms, grid, columns = {
        "x": (c, m, images * layer.groups, sizes),
        "w": (c, images * sizes, layer.groups, m * taps),
        "b": (1, images * outs, 1, layer.channels_out),
    }[wrt]
    return Sums(
        itemsize=layer.itemsize,
        held=layer.sum_itemsize,
        sum_bytes=layer.sum_itemsize,
        gathered=True,
        m=rows,
        c=terms,
        images=grid,
        positions=columns,
        together=columns,
        phases=1,
        with_taps=1,
        taps=taps if wrt == "x" else 1,
        most_taps=taps if wrt == "x" else 1,
        alike=False,
        many=False,
        gaps=False,
        row_stride=1,
        channels_last=layer.layout == "NDHWC",
        x_bytes=sum(map(layer.bytes_of, gradient.operands.values())),
        w_bytes=0,
        y_bytes=layer.bytes_of(gradient.shape),
    )


def _of_weight(gradient: Gradient, sums: Sums) -> Iterator[GpuTiles]:
    """Yield tiles of dW, powers of two: groups of threads share what is staged, and add up at the end.

    One group has nothing to add up. Neighbouring threads copy what lies side by side: positions, or channels.
    """
    lanes = _lanes(gradient)
    for threads_m, threads_q, tile_m, tile_q in product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32), *[(1, 2, 4, 8)] * 2):
        if threads_m * tile_m >= 2 * sums.m or threads_q * tile_q >= 2 * sums.positions:
            continue
        for chunk, split in product((8, 16, 32), (1, 2, 4, 8, 16, 32)):
            if split <= chunk and 32 <= threads_m * threads_q * split <= 512:
                family: Family = "split" if split > 1 else "staged"
                yield GpuTiles(family, lanes, threads_m, threads_q, tile_m, tile_q, chunk, split, False)


def _of_bias(gradient: Gradient, sums: Sums) -> Iterator[GpuTiles]:
    """Yield the tiles of dB: a block sums a channel, or as many as lie side by side in a sector, by many threads."""
    lanes = _lanes(gradient)
    beside = 1 if lanes == "terms" else min(_SECTOR // sums.itemsize, _power(sums.positions))
    groups = min(1024, max(32, _power(sums.c * beside // _WORTH_A_THREAD))) // beside
    yield GpuTiles("split", lanes, 1, beside, 1, 1, 0, groups, False)


def _lanes(gradient: Gradient) -> Literal["positions", "terms"]:
    return "terms" if gradient.layer.layout == "NCDHW" else "positions"


def _power(most: int) -> int:
    """The largest power of two up to ``most``, at least 1."""
    return 1 << max(0, most.bit_length() - 1)
