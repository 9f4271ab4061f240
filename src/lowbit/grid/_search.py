"""What the formats share that search for a block's scale: sums in C's order, ggml's rounding, slices of blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lowbit.grid._array import bitcast, cast
from lowbit.grid.base import Array, namespace


def in_slices(function: Callable[[Array, Array], tuple[Array, ...]], blocks: Array, size: int) -> tuple[Array, ...]:
    """``function(xp, part)`` of ``size`` blocks at a time, so that its scratch stays in the cache; its results joined.

    blocks: (n, ...) float32. ggml computes with Inf and NaN where sums overflow; so may ``function``, without warnings.
    """
    xp = namespace(blocks)
    with np.errstate(all="ignore"):
        parts = [function(xp, blocks[start : start + size]) for start in range(0, max(1, blocks.shape[0]), size)]
    return tuple(xp.concatenate(results) for results in zip(*parts, strict=True))


def sum_in_order(xp: Array, x: Array) -> Array:
    """Over the first axis, one after another: float32 sums depend on the order."""
    total = xp.zeros_like(x[0])
    for row in x:
        total += row
    return total


def square_root(xp: Array, x: Array) -> Array:
    """Of float32, rounded correctly, as C's sqrtf: torch's own is off by one bit in every sixth number."""
    return cast(xp.sqrt(cast(x, "float64")), "float32")


def nearest_int(x: Array) -> Array:
    """ggml's nearest_int, bit for bit: int32, halves to even. ``x`` float32 is overwritten.

    It reads the rounded integer from the mantissa of x + 1.5 * 2^23. Beyond 2^22, at Inf and at NaN that reads other
    numbers, which the file then holds.
    """
    x += 12582912.0
    bits = bitcast(x, "int32")
    bits &= 0x007FFFFF
    bits -= 0x00400000
    return bits
