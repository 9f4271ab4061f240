"""Which scales give a block of values back from its codes: the test by rounding, and the interval a weight allows.

Shapes: w and codes are (block_size, n) float32, a block a column; scales and what is said of a block are (n,).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowbit import grid as grids

_HUGE = 2.0**120  # scales from here on may overflow with their codes
_PROBED = 2  # weights of a block that are looked at before the others
_FIRST = 2  # and before an exact comparison, as those off fail at once
# The low bits of a float32 that BF16 and F16 do not have.
_DROPPED = {"BF16": 16, "F16": 13}
_LEAST_NORMAL = np.float32(2.0**-14)  # of F16: below it has fewer bits


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` float32, finite, as a tensor of ``dtype`` ('BF16', 'F16' or 'F32') holds them; float32 again."""
    if dtype == "F32":
        return values
    grid = grids.get(dtype.lower())
    return grid.dequantize(grid.quantize(values))


def precision(values: np.ndarray, dtype: str) -> str:
    """What ``values`` float32 are rounded to: 'BF16', 'F16' or 'F32', given the dtype that they are stored in.

    A BF16 checkpoint saved again as F32 holds nothing finer than BF16. A quantized source counts as F32.
    """
    if dtype in ("BF16", "F16"):
        return dtype
    if dtype == "F32" and not np.ascontiguousarray(values, "<f4").reshape(-1).view("<u2")[::2].any():
        return "BF16"
    return "F32"


def least_squares(w: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The scales, float32, that are best for given codes; NaN where all are 0."""
    with np.errstate(invalid="ignore", over="ignore"):  # near the end of float32: a scale that fits nothing
        return (w * codes).sum(0) / (codes * codes).sum(0)


def squared_error(w: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The sum of (code * scale - w)^2 over each block, float32."""
    difference = codes * scales.astype(np.float32)
    difference -= w
    difference *= difference
    return np.asarray(difference.sum(0))


def reproduces(w: np.ndarray, codes: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Whether code * scale in float32, rounded to ``dtype``, is w in every weight of a block; 0.0 is -0.0. bool.

    scales: float16, or float32 of such a size; products that only BF16 rounds to zero, below 2^-133, are missed.
    """
    scales = scales.astype(np.float32, copy=False)
    if dtype != "F16":
        index = np.flatnonzero(hits(target(w[:_FIRST], dtype), codes[:_FIRST], scales, dtype))
        if 2 * len(index) < w.shape[1]:
            same = np.zeros(w.shape[1], bool)
            same[index] = hits(target(w.take(index, 1), dtype), codes.take(index, 1), scales[index], dtype)
            return same
    same = hits(target(w, dtype), codes, scales, dtype)
    if dtype != "F16" or same.all():
        return same
    # Below its normal numbers F16 has fewer bits than ``hits`` compares.
    rest = np.flatnonzero(~same & (np.abs(scales) < np.float32(_HUGE)))
    values, wanted = codes.take(rest, 1) * scales[rest], w.take(rest, 1)
    tiny = np.flatnonzero(((np.abs(values) < _LEAST_NORMAL) & (values != 0)).any(0))
    same[rest[tiny]] = (round_to(values.take(tiny, 1), dtype) == wanted.take(tiny, 1)).all(0)
    return same


def target(w: np.ndarray, dtype: str) -> np.ndarray:
    """What ``hits`` compares with, of any shape."""
    if dtype == "F32":
        return w
    # + 0.0 makes 0.0 of -0.0.
    return (w + np.float32(0)).view(np.uint32) - np.uint32((1 << _DROPPED[dtype] - 1) - 1)


def hits(target: np.ndarray, codes: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """``reproduces``, but that it misses F16's subnormal numbers; of shapes (block_size, ...) that broadcast.

    Rounding half to even keeps, of a float32's bits, those above the ``_DROPPED`` after half is added, less one, and
    once more one where the last bit kept is 1. They are w's if that sum is one of the 2^dropped numbers from w on.
    """
    usable = np.abs(scales) < np.float32(_HUGE)
    values = codes * (scales if usable.all() else np.where(usable, scales, np.float32(0)))
    if dtype == "F32":
        return np.asarray(usable & (values == target).all(0))
    values += np.float32(0)
    bits, dropped = values.view(np.uint32), np.uint32(_DROPPED[dtype])
    sums = bits >> dropped
    sums &= np.uint32(1)
    sums += bits
    sums -= target
    return np.asarray(usable & (sums.max(0) < np.uint32(1) << dropped))


def first_fit(
    w: np.ndarray, codes: np.ndarray, guesses: Sequence[np.ndarray], dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """The first of the guessed scales that reproduces a block, and whether one does."""
    scales, found = np.zeros_like(guesses[0]), np.zeros(w.shape[1], bool)
    rest = np.arange(w.shape[1])
    for guess in guesses:
        fits = reproduces(w, codes, guess[rest], dtype)
        taken = rest[fits]
        scales[taken], found[taken] = guess[taken], True
        if len(taken) == len(rest):
            break
        left = np.flatnonzero(~fits)
        rest, w, codes = rest[left], w.take(left, 1), codes.take(left, 1)
    return scales, found


def full_scales(
    w: np.ndarray, codes: np.ndarray, sign: np.ndarray, low: np.ndarray, high: np.ndarray, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Float32 scales that reproduce the blocks, and whether there is one. low, high: of ``scale_range``."""
    guesses = (middle(low, high), low, high)
    return first_fit(w, codes, [np.copysign(g.astype(np.float32), sign) for g in guesses], dtype)


def scale_range(w: np.ndarray, codes: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest magnitude of scale that a block allows; there is none if they are reversed."""
    low, high = _rounding_range(np.abs(w), dtype)
    steps = np.abs(codes).astype(low.dtype, copy=False)
    inverse = 1 / np.maximum(steps, 1)
    low *= inverse
    high *= inverse
    high[steps == 0] = np.inf  # a code of 0 allows any scale
    return low.max(0), high.min(0)


def _rounding_range(magnitude: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest number that rounds to each ``magnitude`` >= 0, exact: float32, for F32 float64."""
    if dtype == "F16":
        bits16, one = magnitude.astype(np.float16).view(np.uint16), np.uint16(1)
        below = (np.maximum(bits16, one) - one).view(np.float16).astype(np.float32)
        above = np.minimum((bits16 + one).view(np.float16).astype(np.float32), np.float32(65536))
        return (below + magnitude) / 2, (magnitude + above) / 2
    # Between neighbours the bits of a float32 count evenly, so half a step of BF16 is half of 2^16.
    bits, step = magnitude.view(np.uint32), np.uint32(0x8000 if dtype == "BF16" else 1)
    below, above = (np.maximum(bits, step) - step).view(np.float32), (bits + step).view(np.float32)
    if dtype == "BF16":
        return below, above
    wide = magnitude.astype(np.float64)
    return (below + wide) / 2, (wide + above) / 2


def middle(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Of an interval of scales, in their dtype; a usable number also where there is no end."""
    return np.minimum(low + (high - low) / 2, low.dtype.type(_HUGE))


def is_within(w: np.ndarray, codes: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Whether a block that is not exact is within the rounding of its float16 scale: bool."""
    result = np.zeros(w.shape[1], bool)
    # A scale that float16 has flushed to 0 took the whole block with it: nobody should call that rounding.
    rest = np.flatnonzero(_is_bounded(w[:_PROBED], codes[:_PROBED], scales, dtype) & (scales != 0))
    if not rest.size:
        return result
    w, codes, scales = w.take(rest, 1), codes.take(rest, 1), scales[rest]
    bounded = _is_bounded(w, codes, scales, dtype)
    if bounded.any():
        w, codes, sign = w[:, bounded], codes[:, bounded], scales[bounded].astype(np.float32)
        low, high = scale_range(w, codes, dtype)
        result[rest[bounded]] = full_scales(w, codes, sign, low, high, dtype)[1]
    return result


def _is_bounded(w: np.ndarray, codes: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Whether each weight is off by at most its code times half a step of float16, and its own rounding: bool."""
    scales = scales.astype(np.float64)
    # By hand, as numpy's spacing takes the step below a negative power of two, and Inf at the largest number.
    half_step = np.ldexp(1.0, np.maximum(np.frexp(scales)[1], -13) - 12)
    magnitude = np.abs(w)
    allowed = _rounding_range(magnitude, dtype)[1] - magnitude
    allowed = allowed + np.abs(codes) * half_step
    return np.asarray((np.abs(w - codes * scales) <= allowed).all(0))


def best_float16(w: np.ndarray, codes: np.ndarray, full: np.ndarray, dtype: str) -> np.ndarray:
    """The float16 scales of least squared error for the codes; that nearest to ``full`` if it breaks the bound."""
    best = least_squares(w, codes).astype(np.float16)
    broken = ~_is_bounded(w, codes, best, dtype)
    best[broken] = full[broken].astype(np.float16)
    return best
