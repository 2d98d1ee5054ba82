"""Rows of bfloat16 of two phases, woven while they are float32.

A float32 that is rounded to bfloat16 is its upper half, after something was added. So of two sums that are neighbours
in Y one is shifted down, the other stays where it is, and both are 32 bits of Y: nothing is shuffled, and one vector is
stored instead of two.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

_NAME = "opcompile_halves"


def halves(shuffle: tirx.Shuffle) -> Any:
    """What takes elements of two vectors in turns, after they were cast to bfloat16, by one function for both."""
    casts = [each for each in shuffle.vectors if isinstance(each, tirx.Cast)]
    if len(casts) != 2 or len(shuffle.vectors) != 2 or not str(casts[0].ty.dtype).startswith("bfloat16x"):
        return shuffle
    lanes, size = int(str(casts[0].ty.dtype).removeprefix("bfloat16x")), len(shuffle.indices)
    places = [int(i) % lanes * 2 + int(i) // lanes for i in shuffle.indices]
    if lanes not in _LANES or size == 1 or places != list(range(places[0], places[0] + size)):
        return shuffle
    bits = tirx.call_pure_extern(f"uint16x{2 * lanes}", f"{_NAME}{lanes}", *(cast.value for cast in casts))
    if size < 2 * lanes:
        bits = tirx.Shuffle([bits], [tirx.const(place, "int32") for place in places])
    return tirx.reinterpret(f"bfloat16x{size}", bits)


def _function(lanes: int) -> str:
    """Round to nearest, ties to even: half of what the upper half counts is added, less what makes it odd."""
    floats, words, bits = (f"<{lanes} x float>", f"<{lanes} x i32>", f"<{2 * lanes} x i16>")

    def every(word: int) -> str:
        return f"<{', '.join([f'i32 {word}'] * lanes)}>"

    rounded = "".join(
        f"""
  %{x}_word = bitcast {floats} %{x} to {words}
  %{x}_half = lshr {words} %{x}_word, {every(16)}
  %{x}_odd = and {words} %{x}_half, {every(1)}
  %{x}_more = add {words} %{x}_odd, {every(0x7FFF)}
  %{x}_rounded = add {words} %{x}_word, %{x}_more"""
        for x in ("even", "odd")
    )
    return f"""
define {bits} @{_NAME}{lanes}({floats} %even, {floats} %odd) alwaysinline {{{rounded}
  %low = lshr {words} %even_rounded, {every(16)}
  %high = and {words} %odd_rounded, {every(-0x10000)}
  %both = or {words} %low, %high
  %bits = bitcast {words} %both to {bits}
  ret {bits} %bits
}}
"""


_LANES = (4, 8, 16)
# What LLVM needs for the calls.
FUNCTIONS = "".join(map(_function, _LANES))
