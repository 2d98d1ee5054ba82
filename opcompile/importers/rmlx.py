"""Rmlx's words: ``mlx_conv_transpose3d`` of the R package, by the same names and defaults from Python.

The operator is MLX's. R's numbers may be whole floats (``2`` is a double there), a vector of length one stands
for three, and an array may lie in memory column by column: its shape is what counts. An array of doubles is
computed in float32, as Rmlx stores all of R's numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from opcompile.errors import WordsError
from opcompile.importers import mlx
from opcompile.importers.imported import Imported, Rules, whole

SYSTEM = "Rmlx"

# The targets that R's two devices stand for: this machine, and Apple's GPU.
DEVICES = {"cpu": "llvm", "gpu": "metal:apple-m1"}


def mlx_conv_transpose3d(
    input: Any,
    weight: Any,
    stride: Any = (1, 1, 1),
    padding: Any = (0, 0, 0),
    dilation: Any = (1, 1, 1),
    output_padding: Any = (0, 0, 0),
    groups: Any = 1,
    device: str = "cpu",
    *,
    dtype: str | None = None,
    strict: bool = True,
) -> Imported:
    """Read a call of Rmlx's ``mlx_conv_transpose3d``; arrays may be given by their shapes.

    ``device`` is "cpu" or "gpu", and becomes the layer's ``target``. (R's default is the session's own
    device.) Raises `WordsError` where Rmlx, or MLX below it, refuses.
    """
    if not isinstance(device, str) or device not in DEVICES:
        raise WordsError(f"{SYSTEM} refuses this: device is {device!r}, but must be 'cpu' or 'gpu'")
    rules = Rules(SYSTEM, strict)
    words = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
    recycled: dict[str, Any] = {name: _recycled(rules, name, value) for name, value in words.items()}
    rules.must(np.ndim(groups) == 0 or len(groups) == 1, f"groups is {groups!r}, but must be one whole number")
    count = _recycled(rules, "groups", groups)[0]
    try:
        read = mlx.conv_transpose3d(input, weight, **recycled, groups=count, dtype=dtype, strict=strict)
    except WordsError as error:
        raise WordsError(str(error).replace(mlx.SYSTEM, SYSTEM, 1)) from None
    return replace(read, system=SYSTEM, target=DEVICES[device])


def _recycled(rules: Rules, name: str, value: Any) -> tuple[int, ...]:
    """Return R's vector as three whole numbers; as.integer cuts off decimals there, so they are refused here."""
    given = list(value) if isinstance(value, (tuple, list, np.ndarray)) and np.ndim(value) == 1 else [value]
    rules.must(
        len(given) in (1, 3) and all(whole(n) is not None or (isinstance(n, float) and n.is_integer()) for n in given),
        f"{name} is {value!r}, but must be a scalar or a length-3 vector of whole numbers",
    )
    return tuple(int(n) for n in (given * 3 if len(given) == 1 else given))
