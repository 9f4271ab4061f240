"""Lattice recovery: the codes and float16 scales that give the values of a quantization-aware checkpoint back exactly.

A checkpoint trained under simulated 4 bit holds w = round(code * scale) in BF16, F16 or F32 and neither the codes nor
the scales. Which code the extremum of a block got depends on who trained it (-8, 7, or any where groups are larger
than the format's block or scales are free), so every one is tried. For a guess of it the other codes follow, and each
weight then allows an interval of scales (``scale_range``): those whose product rounds to it. A float16 number in all 32
intervals is a scale that loses nothing; that it does is checked by rounding back, never inferred.

Shapes: values are (rows, n) float32, exactly what the source stores; inside, w is (block_size, n), a block a column, so
that numpy works on many blocks with one instruction.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from lowbit import grid as grids
from lowbit.grid.base import Blocks, Grid
from lowbit.pack import scale_range
from lowbit.pack.scale_range import least_squares, precision, reproduces, round_to

__all__ = [
    "EXACT",
    "OFF_LATTICE",
    "WITHIN_SCALE_ROUNDING",
    "judge",
    "least_squares",
    "precision",
    "recover",
    "round_to",
]

# What is proved of a block, from the least on.
OFF_LATTICE, WITHIN_SCALE_ROUNDING, EXACT = 0, 1, 2

# How far w / scale may lie from a whole number, relative to it: the two roundings of w and of the extremum, each a half
# of 2^-7, 2^-10 and 2^-23, and some room.
_TOLERANCE = {"BF16": 1.5 * 2.0**-7, "F16": 1.5 * 2.0**-10, "F32": 2.0**-21}
_SLICE = 4096  # blocks at a time: fewer would fit in a nearer cache, and pay numpy's calls more often
_PROBED = 4  # weights of a block that a guess must fit before the others are looked at
_LIKELIEST = 4  # codes of the extremum that a scale is guessed for
_GUESSED = 4  # and before a guess of the scale itself is tried on the whole block
_LEAST = 2.0**-26  # an extremum below has no float16 scale but 0
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
    grids.check_finite(values)
    shape = (values.shape[0], values.shape[1] // grid.block_size)
    rows = values.reshape(-1, grid.block_size)
    codes, scales = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float16)
    status = np.empty(len(rows), np.uint8)
    # Blocks that overflow or underflow are no error: they fail the check.
    with np.errstate(all="ignore"):
        for part in _slices(len(rows)):
            status[part] = EXACT * _guess(_columns(rows[part]), dtype, grid, codes[part], scales[part])
        rest = np.flatnonzero(status != EXACT)
        for start in range(0, len(rest), _SLICE):  # a few blocks take as long as a full slice, so not as they come
            index = rest[start : start + _SLICE]
            picked = slice(index[0], index[-1] + 1) if index[-1] - index[0] == len(index) - 1 else index
            found = _Search(rows[picked], dtype, grid)
            status[picked] = found.run()
            codes[picked], scales[picked] = found.codes, found.scales
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
            columns, its_codes = _columns(w[part]), _columns(codes[part]).astype(np.float32)
            exact = reproduces(columns, its_codes, scales[part], dtype)
            status[part] = _with_the_rest(exact, columns, its_codes, scales[part], dtype)
    return status.reshape(blocks.scales.shape)


def _slices(n: int) -> Iterator[slice]:
    return (slice(start, start + _SLICE) for start in range(0, n, _SLICE))


def _columns(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.T)


def _guess(w: np.ndarray, dtype: str, grid: Grid, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Fills in codes (n, block_size) int8 and scales (n,) float16 of the blocks that they give back exactly: (n,) bool.

    For the likeliest codes of the extremum the likeliest scale: the BF16 number nearest to what the extremum says. Most
    blocks of a lattice with BF16 scales are found so, without a look at intervals.
    """
    extreme, target = _extreme(w), scale_range.target(w, dtype)
    missing = np.abs(extreme) >= _LEAST
    found = np.zeros(len(missing), bool)
    guesses = _likely_scales(extreme, _extremum_codes(dtype, grid)[:_LIKELIEST], dtype)
    inverses = np.float32(1) / guesses
    first = _nearest(w[:_GUESSED, None], inverses, grid)
    likely = scale_range.hits(target[:_GUESSED, None], first, guesses, dtype)
    likely &= guesses == guesses.astype(np.float16)
    for guess, inverse, hopeful in zip(guesses, inverses, likely, strict=True):
        hopeful &= missing
        index = np.flatnonzero(hopeful)
        if not index.size:
            continue
        if 2 * len(index) > len(missing):  # picking the blocks out would cost more than trying all
            its_codes = _nearest(w, inverse, grid)
            hopeful &= scale_range.hits(target, its_codes, guess, dtype)
            _put_where(hopeful, _columns(its_codes.astype(np.int8)), codes)
        else:
            its_codes = _nearest(w.take(index, 1), inverse[index], grid)
            fits = scale_range.hits(target.take(index, 1), its_codes, guess[index], dtype)
            codes[index[fits]] = _columns(its_codes.astype(np.int8))[fits]
            hopeful[index] = fits
        np.copyto(scales, guess, where=hopeful, casting="same_kind")
        found |= hopeful
        missing &= ~hopeful
    return found


def _put_where(mask: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
    """Copies the rows of int8 (n, block_size) that ``mask`` (n,) names, eight codes at a time."""
    np.copyto(out.view(np.int64), codes.view(np.int64), where=mask[:, None])


def _likely_scales(extreme: np.ndarray, codes: Sequence[int], dtype: str) -> np.ndarray:
    """For each code that the extremum may have: the scales (codes, n) float32."""
    scales = extreme / -np.array(codes, np.float32)[:, None]
    if dtype == "F32":  # the extremum tells the scale itself, and that may be finer
        return scales.astype(np.float16).astype(np.float32)
    bits = scales.view(np.uint32)
    bits += np.uint32(0x8000)  # the nearest BF16
    bits &= np.uint32(0xFFFF0000)
    return scales


def _nearest(w: np.ndarray, inverse: np.ndarray, grid: Grid) -> np.ndarray:
    """The codes on scales whose ``grid.inverse`` is given, float32."""
    codes = w * inverse
    np.rint(codes, out=codes)
    return np.clip(codes, grid.min_code, grid.max_code, out=codes)


class _Search:
    """Blocks that a guess has not found, and what has been found of them so far: codes (n, block_size) int8, the others
    (n,). w: (block_size, n)."""

    def __init__(self, rows: np.ndarray, dtype: str, grid: Grid) -> None:
        self.rows, self.w, self.dtype, self.grid = rows, _columns(rows), dtype, grid
        self.codes, self.scales = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float16)
        # 0 is exact, Inf is off the lattice, and between them lies the squared error of the best float16 scale.
        self.error = np.full(len(rows), np.inf)

    def run(self) -> np.ndarray:
        """Finds codes and scales; gives the statuses, uint8 (n,)."""
        self._search()
        self._round()
        if -self.grid.min_code <= _REFITTED:
            self._refit()
        codes = _columns(self.codes).astype(np.float32)
        return _with_the_rest(self.error == 0, self.w, codes, self.scales, self.dtype)

    def _search(self) -> None:
        """Codes and the best scale of every block that lies on a lattice."""
        extreme = _extreme(self.w)
        missing = np.abs(extreme) >= _LEAST
        for code in _extremum_codes(self.dtype, self.grid):
            index = np.flatnonzero(missing & _fits_at_first(self.w[:_PROBED], extreme, code, self.dtype))
            if not index.size:
                continue
            possible, codes, scales, error = _try(_pick(self.w, index), extreme[index], code, self.dtype, self.grid)
            index = index[possible]
            better = np.flatnonzero(error < self.error[index])
            self._put(index[better], _pick(codes, better), scales[better], error[better])
            missing[index] = self.error[index] > 0
            if not missing.any():
                break

    def _round(self) -> None:
        """The grid's own rule, where nothing was found, and where it comes upon a lattice."""
        rest = np.flatnonzero(self.error > 0)
        if not rest.size:
            return
        own = self.grid.quantize(self.rows if len(rest) == len(self.rows) else self.rows[rest])
        assert own.scales is not None
        codes, scales = own.codes[:, 0], own.scales[:, 0]
        exact = reproduces(_pick(self.w, rest), _columns(codes).astype(np.float32), scales, self.dtype)
        taken = exact | np.isinf(self.error[rest])
        if taken.all():
            taken = slice(None)
        index = rest[taken]
        self.codes[index], self.scales[index] = codes[taken], scales[taken]
        self.error[index] = np.where(exact, 0, np.inf)[taken]

    def _refit(self) -> None:
        """Off the lattice, a scale that least squares fits to the codes, and the codes to it, if the error is less."""
        off = np.flatnonzero(np.isinf(self.error))
        if not off.size:
            return
        w, best, scales = _pick(self.w, off), self.codes[off], self.scales[off]
        codes = _columns(best).astype(np.float32)
        error, fitted = scale_range.squared_error(w, codes, scales), scales
        for _ in range(_REFITS):
            full = least_squares(w, codes).astype(np.float16)
            fitted = np.where(np.isfinite(full), full, fitted)
            codes = _nearest(w, self.grid.inverse(fitted), self.grid)
            its_error = scale_range.squared_error(w, codes, fitted)
            better = its_error < error
            _put_where(better, _columns(codes.astype(np.int8)), best)
            scales, error = np.where(better, fitted, scales), np.where(better, its_error, error)
        self.codes[off], self.scales[off] = best, scales
        exact = reproduces(w, _columns(best).astype(np.float32), scales, self.dtype)
        self.error[off[exact]] = 0  # that may have come upon one

    def _put(self, index: np.ndarray, codes: np.ndarray, scales: np.ndarray, error: np.ndarray) -> None:
        self.codes[index], self.scales[index], self.error[index] = _columns(codes.astype(np.int8)), scales, error


def _pick(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Some columns, in their order; not copied if they are all."""
    return x if len(index) == x.shape[1] else x.take(index, 1)


def _extreme(w: np.ndarray) -> np.ndarray:
    """The element of largest magnitude of each block, with its sign; of equal ones the first."""
    low, high = w.min(0), w.max(0)
    extreme = np.where(-low > high, low, high)
    tied = np.flatnonzero(-low == high)
    extreme[tied] = w[np.abs(w[:, tied]).argmax(0), tied]
    return extreme


def _with_the_rest(exact: np.ndarray, w: np.ndarray, codes: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Statuses (n,) uint8 where ``exact`` (n,) is known and the rest is not."""
    status = np.where(exact, EXACT, OFF_LATTICE).astype(np.uint8)
    rest = np.flatnonzero(~exact)
    if rest.size:
        within = scale_range.is_within(_pick(w, rest), _pick(codes, rest), scales[rest], dtype)
        status[rest[within]] = WITHIN_SCALE_ROUNDING
    return status


@functools.cache
def _extremum_codes(dtype: str, grid: Grid) -> tuple[int, ...]:
    """The magnitudes of the extremum's code to try, the likeliest first: the grid's last one, and all of 4 bits.

    Q8_0 holds any lattice of 4 bits too. Where the roundings leave a code in doubt (127 in BF16) there is no use in it.
    """
    last = -grid.min_code
    codes = dict.fromkeys((last, *range(8, 0, -1)))
    return tuple(code for code in codes if code <= last and code * _TOLERANCE[dtype] < 0.4)


def _fits_at_first(w: np.ndarray, extreme: np.ndarray, code: int, dtype: str) -> np.ndarray:
    """Whether these first weights of each block may lie on the lattice: (n,) bool. Passes every block that does."""
    inverse = np.float32(-code) / extreme
    rest = w * inverse
    codes = np.rint(rest)
    rest -= codes
    np.abs(codes, out=codes)
    codes *= np.float32(_TOLERANCE[dtype])
    if dtype == "F16":  # its subnormals round by half of 2^-24, however small they are
        codes += np.abs(inverse) * np.float32(2.0**-24)
    np.abs(rest, out=rest)
    return np.asarray((rest <= codes).all(0))


def _try(
    w: np.ndarray, extreme: np.ndarray, code: int, dtype: str, grid: Grid
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Blocks whose extremum may have ``-code``: their index (m,), codes (size, m), float16 scales, error as above."""
    codes = w * (np.float32(-code) / extreme)
    np.rint(codes, out=codes)
    np.clip(codes, grid.min_code, grid.max_code, out=codes)
    low, high = scale_range.scale_range(w, codes, dtype)
    possible = low <= high * _ROOM
    index = np.flatnonzero(possible)
    if len(index) < len(possible):
        w, codes, low, high, extreme = w.take(index, 1), codes.take(index, 1), low[index], high[index], extreme[index]
    middle = scale_range.middle(low, high)
    # Training scales are mostly BF16, so such a number comes first. The nearest to the middle is in the interval if
    # any is; the ends are for intervals that hold nothing but an end.
    guesses = (round_to(middle.astype(np.float32), "BF16"), middle, low, high)
    sign = -extreme
    scales, exact = scale_range.first_fit(w, codes, [np.copysign(g, sign).astype(np.float16) for g in guesses], dtype)
    error = np.where(exact, 0.0, np.inf)
    others = np.flatnonzero(~exact)
    if others.size:
        w, codes_of = w.take(others, 1), codes.take(others, 1)
        full, fits = scale_range.full_scales(w, codes_of, sign[others], low[others], high[others], dtype)
        others, full, w, codes_of = others[fits], full[fits], w[:, fits], codes_of[:, fits]
        scales[others] = scale_range.best_float16(w, codes_of, full, dtype)
        error[others] = np.maximum(scale_range.squared_error(w, codes_of, scales[others]), np.finfo(float).tiny)
    return index, codes, scales, error
