"""Lattice recovery: the codes and float16 scales that give the values of a quantization-aware checkpoint back exactly.

A checkpoint trained under simulated 4 bit holds w = round(code * scale) in BF16, F16 or F32 and neither the codes nor
the scales. Which code the extremum of a block got depends on who trained it (-8, 7, or any where groups are larger
than the format's block or scales are free), so every one is tried. For a guess of it the other codes follow, and each
weight then allows an interval of scales: those whose product rounds to it. A float16 number in all 32 intervals is
a scale that loses nothing; that it does is checked by rounding back, never inferred.

Shapes: values are (rows, n) float32, exactly what the source stores; inside, w is (n, block_size), a block a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lowbit import grid as grids
from lowbit.grid.base import Blocks, Grid

# What is proved of a block, from the least on.
OFF_LATTICE, WITHIN_SCALE_ROUNDING, EXACT = 0, 1, 2

# How far w / scale may lie from a whole number, relative to it: the two roundings of w and of the extremum, each a half
# of 2^-7, 2^-10 and 2^-23, and some room.
_TOLERANCE = {"BF16": 1.5 * 2.0**-7, "F16": 1.5 * 2.0**-10, "F32": 2.0**-21}
_SLICE = 4096  # blocks at a time, so that the work stays in the cache
_PROBED = 8  # weights of a block that a guess must fit before the others are looked at
_LEAST = 2.0**-26  # an extremum below has no float16 scale but 0
_HUGE = 2.0**120  # scales from here on may overflow with their codes
_ROOM = 1 + 2.0**-18  # the ends of an interval are computed with an error of 2^-23; the check that follows has none
_REFITS = 2  # of a scale to its codes, off the lattice
_REFITTED = 8  # grids up to this code; with the 127 of Q8_0 nothing is gained worth leaving ggml's rule for


def recover(values: np.ndarray, dtype: str, grid: Grid) -> tuple[Blocks, np.ndarray]:
    """Codes and scales of ``grid`` for ``values`` (rows, n) float32, and what is proved of each block.

    dtype: what the values are rounded to, 'BF16', 'F16' or 'F32' (see ``precision``). grid: one with scales.
    Returns Blocks and a status (rows, n / block_size) uint8, the same that ``judge`` gives for them. Blocks off the
    lattice get the grid's own rounding; in 4 bits, a scale fitted to it by least squares where that is nearer.
    Raises BadFile on NaN or Inf.
    """
    shape = (values.shape[0], values.shape[1] // grid.block_size)
    w = values.reshape(-1, grid.block_size)
    codes, scales = np.empty(w.shape, np.int8), np.empty(len(w), np.float16)
    status = np.empty(len(w), np.uint8)
    for part in _slices(len(w)):
        # Blocks that overflow or underflow are no error: they fail the check.
        with np.errstate(all="ignore"):
            codes[part], scales[part], status[part] = _recover(w[part], dtype, grid)
    blocks = Blocks(codes=codes.reshape(*shape, grid.block_size), scales=scales.reshape(shape))
    return blocks, status.reshape(shape)


def judge(values: np.ndarray, blocks: Blocks, dtype: str) -> np.ndarray:
    """What is proved of each block of a format with one float16 scale a block: (rows, n_blocks) uint8.

    EXACT: every code * scale, computed in float32 as the runtime does and rounded to ``dtype``, is the value, bit for
    bit (-0.0 counts as 0.0). WITHIN_SCALE_ROUNDING: it is with a float32 scale, so the codes are the right ones, and
    with the stored scale each weight is off by at most its code times half a step of float16, and its own rounding
    to ``dtype``. OFF_LATTICE: anything else.

    values: (rows, n) float32. blocks: codes (rows, n_blocks, block_size) int8, scales (rows, n_blocks) float16.
    """
    assert blocks.scales is not None
    size = blocks.codes.shape[-1]
    w, codes, scales = values.reshape(-1, size), blocks.codes.reshape(-1, size), blocks.scales.reshape(-1)
    status = np.empty(len(w), np.uint8)
    for part in _slices(len(w)):
        with np.errstate(all="ignore"):
            exact = _reproduces(w[part], codes[part], scales[part], dtype)
            status[part] = _with_the_rest(exact, w[part], codes[part], scales[part], dtype)
    return status.reshape(blocks.scales.shape)


def precision(values: np.ndarray, dtype: str) -> str:
    """What ``values`` float32 are rounded to: 'BF16', 'F16' or 'F32', given the dtype that they are stored in.

    A BF16 checkpoint saved again as F32 holds nothing finer than BF16. A quantized source counts as F32.
    """
    if dtype in ("BF16", "F16"):
        return dtype
    if dtype == "F32" and not np.ascontiguousarray(values, "<f4").reshape(-1).view("<u2")[::2].any():
        return "BF16"
    return "F32"


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` float32, finite, as a tensor of ``dtype`` holds them; float32 again."""
    if dtype == "F32":
        return values
    grid = grids.get(dtype.lower())
    return grid.dequantize(grid.quantize(values))


def least_squares(w: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The scale (n,) float32 that is best for given float32 codes (n, block_size); NaN where all are 0."""
    with np.errstate(invalid="ignore"):
        return np.einsum("ij,ij->i", w, codes) / np.einsum("ij,ij->i", codes, codes)


def _slices(n: int) -> Iterator[slice]:
    return (slice(start, start + _SLICE) for start in range(0, n, _SLICE))


def _recover(w: np.ndarray, dtype: str, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # The grid's own rule is the quickest guess; on a lattice with the extremum on -8 it finds every block.
    own = grid.quantize(w)
    assert own.scales is not None
    codes, scales = own.codes[:, 0], own.scales[:, 0]
    exact = _reproduces(w, codes, scales, dtype)
    rest = np.flatnonzero(~exact)
    if not rest.size:
        return codes, scales, _with_the_rest(exact, w, codes, scales, dtype)
    found, its_scales, error = _search(w[rest], dtype, grid)
    hit = np.isfinite(error)
    codes[rest[hit]], scales[rest[hit]] = found[hit], its_scales[hit]
    exact[rest] = error == 0
    off = rest[~hit]
    if off.size and -grid.min_code <= _REFITTED:
        codes[off], scales[off] = _nearer(w[off], codes[off], scales[off], grid)
        exact[off] = _reproduces(w[off], codes[off], scales[off], dtype)  # that may have come upon one
    return codes, scales, _with_the_rest(exact, w, codes, scales, dtype)


def _with_the_rest(exact: np.ndarray, w: np.ndarray, codes: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Statuses (n,) uint8 where ``exact`` (n,) is known and the rest is not."""
    status = np.where(exact, EXACT, OFF_LATTICE).astype(np.uint8)
    rest = np.flatnonzero(~exact)
    if rest.size:
        status[rest[_is_within(w[rest], codes[rest], scales[rest], dtype)]] = WITHIN_SCALE_ROUNDING
    return status


def _search(w: np.ndarray, dtype: str, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (n, size) int8, scales (n,) float16 and error (n,): 0 is exact, Inf is off the lattice, and between them
    lies the squared error of the best float16 scale."""
    codes, scales = np.zeros(w.shape, np.int8), np.zeros(len(w), np.float16)
    error = np.full(len(w), np.inf)
    extreme = np.take_along_axis(w, np.abs(w).argmax(-1)[:, None], -1)[:, 0]
    rest = np.flatnonzero(np.abs(extreme) >= _LEAST)
    for code in _extremum_codes(dtype, grid):
        if not rest.size:
            break
        index = rest[_fits_at_first(w[:, :_PROBED][rest], extreme[rest], code, dtype)]
        if not index.size:
            continue
        possible, its_codes, its_scales, its_error = _try(w[index], extreme[index], code, dtype, grid)
        index = index[possible]
        better = its_error < error[index]
        index = index[better]
        codes[index], scales[index], error[index] = its_codes[better], its_scales[better], its_error[better]
        rest = rest[error[rest] > 0]
    return codes, scales, error


def _extremum_codes(dtype: str, grid: Grid) -> list[int]:
    """The magnitudes of the extremum's code to try, the likeliest first: the grid's last one, and all of 4 bits.

    Q8_0 holds any lattice of 4 bits too. Where the roundings leave a code in doubt (127 in BF16) there is no use in it.
    """
    last = -grid.min_code
    return [code for code in dict.fromkeys((last, *range(8, 0, -1))) if code <= last and code * _TOLERANCE[dtype] < 0.4]


def _fits_at_first(w: np.ndarray, extreme: np.ndarray, code: int, dtype: str) -> np.ndarray:
    """Whether these first weights of each block may lie on the lattice: (n,) bool. Passes every block that does."""
    inverse = (np.float32(-code) / extreme)[:, None]
    rest = w * inverse
    codes = np.rint(rest)
    rest -= codes
    allowed = np.abs(codes) * np.float32(_TOLERANCE[dtype])
    if dtype == "F16":  # its subnormals round by half of 2^-24, however small they are
        allowed += np.abs(inverse) * np.float32(2.0**-24)
    np.abs(rest, out=rest)
    return np.asarray((rest <= allowed).all(-1))


def _try(
    w: np.ndarray, extreme: np.ndarray, code: int, dtype: str, grid: Grid
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Blocks whose extremum may have ``-code``: their index (m,), codes (m, size), float16 scales, error as above."""
    codes = np.rint(w * (np.float32(-code) / extreme)[:, None])
    np.clip(codes, grid.min_code, grid.max_code, out=codes)
    low, high = _scale_range(w, codes, dtype)
    index = np.flatnonzero(low <= high * _ROOM)
    w, codes, low, high, sign = w[index], codes[index], low[index], high[index], -extreme[index]
    middle = _middle(low, high)
    # Training scales are mostly BF16, so such a number comes first. The nearest to the middle is in the interval if
    # any is; the ends are for intervals that hold nothing but an end.
    guesses = (round_to(middle.astype(np.float32), "BF16"), middle, low, high)
    scales, exact = _first_fit(w, codes, [np.copysign(g, sign).astype(np.float16) for g in guesses], dtype)
    error = np.where(exact, 0.0, np.inf)
    others = np.flatnonzero(~exact)
    if others.size:
        full, fits = _full_scales(w[others], codes[others], sign[others], low[others], high[others], dtype)
        others, full = others[fits], full[fits]
        scales[others] = _best_float16(w[others], codes[others], full, dtype)
        error[others] = np.maximum(_squared_error(w[others], codes[others], scales[others]), np.finfo(float).tiny)
    return index, codes.astype(np.int8), scales, error


def _reproduces(w: np.ndarray, codes: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Whether code * scale in float32, rounded to ``dtype``, is w in every weight of a block: (n,) bool."""
    scales = scales.astype(np.float32)
    usable = np.abs(scales) < np.float32(_HUGE)
    values = codes.astype(np.float32)
    values *= np.where(usable, scales, np.float32(0))[:, None]
    same: np.ndarray = (round_to(values, dtype) == w).all(-1)
    same &= usable
    return same


def _first_fit(
    w: np.ndarray, codes: np.ndarray, guesses: Sequence[np.ndarray], dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """The first of the guessed scales, each (n,), that reproduces a block: scales (n,), and whether one does (n,)."""
    scales, found = np.zeros_like(guesses[0]), np.zeros(len(w), bool)
    rest = np.arange(len(w))
    for guess in guesses:
        if not rest.size:
            break
        fits = _reproduces(w[rest], codes[rest], guess[rest], dtype)
        taken = rest[fits]
        scales[taken], found[taken] = guess[taken], True
        rest = rest[~fits]
    return scales, found


def _full_scales(
    w: np.ndarray, codes: np.ndarray, sign: np.ndarray, low: np.ndarray, high: np.ndarray, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Float32 scales (n,) that reproduce the blocks, and whether there is one."""
    guesses = (_middle(low, high), low, high)
    return _first_fit(w, codes, [np.copysign(g.astype(np.float32), sign) for g in guesses], dtype)


def _scale_range(w: np.ndarray, codes: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest magnitude of scale (n,) that a block allows; there is none if they are reversed."""
    low, high = _rounding_range(np.abs(w), dtype)
    steps = np.abs(codes).astype(low.dtype)
    inverse = 1 / np.maximum(steps, 1)
    low = low * inverse
    high = np.where(steps == 0, low.dtype.type(np.inf), high * inverse)  # a code of 0 allows any scale
    return low.max(-1), high.min(-1)


def _rounding_range(magnitude: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest number that rounds to each ``magnitude`` >= 0, exact: float32, for F32 float64."""
    if dtype == "BF16":
        # Between neighbours the bits of a float32 count evenly, so half a step of BF16 is half of 2^16.
        bits, half = magnitude.view(np.uint32), np.uint32(0x8000)
        return (np.maximum(bits, half) - half).view(np.float32), (bits + half).view(np.float32)
    if dtype == "F16":
        bits16, one = magnitude.astype(np.float16).view(np.uint16), np.uint16(1)
        below = (np.maximum(bits16, one) - one).view(np.float16).astype(np.float32)
        above = np.minimum((bits16 + one).view(np.float16).astype(np.float32), np.float32(65536))
        return (below + magnitude) / 2, (magnitude + above) / 2
    wide = magnitude.astype(np.float64)
    below = np.nextafter(magnitude, np.float32(0))
    above = np.nextafter(magnitude, np.float32(np.inf))
    return (below + wide) / 2, (wide + above) / 2


def _middle(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.minimum(low + (high - low) / 2, low.dtype.type(_HUGE))


def _is_within(w: np.ndarray, codes: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Whether a block that is not exact is within the rounding of its scale: (n,) bool."""
    result = np.zeros(len(w), bool)
    # A scale that float16 has flushed to 0 took the whole block with it: nobody should call that rounding.
    rest = np.flatnonzero(_is_bounded(w[:, :_PROBED], codes[:, :_PROBED], scales, dtype) & (scales != 0))
    rest = rest[_is_bounded(w[rest], codes[rest], scales[rest], dtype)]
    if rest.size:
        w, codes, sign = w[rest], codes[rest], scales[rest].astype(np.float32)
        low, high = _scale_range(w, codes, dtype)
        result[rest] = _full_scales(w, codes, sign, low, high, dtype)[1]
    return result


def _is_bounded(w: np.ndarray, codes: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Whether each weight is off by at most its code times half a step of float16, and its own rounding: (n,) bool."""
    scales = scales.astype(np.float64)[:, None]
    # By hand, as numpy's spacing takes the step below a negative power of two, and Inf at the largest number.
    half_step = np.ldexp(1.0, np.maximum(np.frexp(scales)[1], -13) - 12)
    magnitude = np.abs(w)
    own = _rounding_range(magnitude, dtype)[1] - magnitude
    steps = codes.astype(np.float64)
    return (np.abs(w - steps * scales) <= np.abs(steps) * half_step + own).all(-1)


def _best_float16(w: np.ndarray, codes: np.ndarray, full: np.ndarray, dtype: str) -> np.ndarray:
    """The float16 scale (n,) of least squared error for the codes; that nearest to ``full`` if it breaks the bound."""
    best = least_squares(w, codes).astype(np.float16)
    broken = ~_is_bounded(w, codes, best, dtype)
    best[broken] = full[broken].astype(np.float16)
    return best


def _nearer(w: np.ndarray, codes: np.ndarray, scales: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The blocks given, or those on a scale that least squares fits to their codes where its error is smaller."""
    error = _squared_error(w, codes, scales)
    for _ in range(_REFITS):
        fitted = least_squares(w, codes.astype(np.float32)).astype(np.float16)
        fitted = np.where(np.isfinite(fitted), fitted, scales)
        again = grid.encode(w, fitted[:, None]).codes[:, 0]
        its_error = _squared_error(w, again, fitted)
        better = its_error < error
        codes, scales = np.where(better[:, None], again, codes), np.where(better, fitted, scales)
        error = np.where(better, its_error, error)
    return codes, scales


def _squared_error(w: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    difference = codes.astype(np.float32)
    difference *= scales.astype(np.float32)[:, None]
    difference -= w
    return np.einsum("ij,ij->i", difference, difference).astype(np.float64)
