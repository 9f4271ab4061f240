"""Which lattice a tensor sits on: how its scales were chosen, what they are rounded to, how many weights share one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowbit import grid as grids
from lowbit.grid.base import Blocks
from lowbit.pack import lattice

NONE = "none"
_ENOUGH = 0.9  # of the blocks must fit for the tensor to sit on a lattice, of the groups for their size
_ALWAYS, _ALL = 0.95, 0.999
_FIRST = 64  # blocks that are tried before the rest
_GROUPS = (256, 128, 64)
# How far two blocks' estimates of one scale may lie apart, relative to it.
_APART = {"BF16": 2.0**-7, "F16": 2.0**-9, "F32": 2.0**-9}


@dataclass(frozen=True, kw_only=True)
class Lattice:
    """What a tensor's values tell of the grid that training used.

    grid: whose codes they are ('q4_0'). rule: 'extremum/-8', 'absmax/7', 'absmax/7.5' or 'free scales'. scales: 'bf16',
    'f16' or 'f32', the coarsest that explains the values. group_size: weights a scale; None is a whole row. share: of
    the blocks that are not all zero, how many fit.
    """

    grid: str
    rule: str
    scales: str
    group_size: int | None
    share: float

    def __str__(self) -> str:
        group = "a scale a row" if self.group_size is None else f"group {self.group_size}"
        part = "" if self.share == 1 else f", {100 * self.share:.1f}% of blocks"
        return f"{self.grid} {self.rule}, {self.scales} scales, {group}{part}"


def describe(values: np.ndarray, dtype: str) -> str:
    """``identify`` in words: 'q4_0 extremum/-8, bf16 scales, group 32', or 'none'."""
    found = identify(values, dtype)
    return NONE if found is None else str(found)


def sample(n_rows: int, n: int, weights: int = 1 << 16) -> np.ndarray:
    """Indices of rows to look at, spread evenly over (n_rows, n): about ``weights`` weights, and at least 16 rows."""
    count = min(n_rows, max(16, -(-weights // n)))
    return np.unique(np.linspace(0, n_rows - 1, count).astype(np.int64))


def identify(values: np.ndarray, dtype: str) -> Lattice | None:
    """The 4-bit lattice of ``values`` (rows, n) float32, or None. n is a multiple of 32 where there is one.

    dtype: what the values are stored in, 'BF16', 'F16' or 'F32'. Of absmax/7.5 and absmax/8 with clipping the values
    are the same, so the first stands for both.
    """
    grid = grids.get("q4_0")
    if values.ndim != 2 or not values.size or values.shape[1] % grid.block_size or not np.isfinite(values).all():
        return None
    dtype = lattice.precision(values, dtype)
    w = values.reshape(-1, grid.block_size)
    nonzero = np.flatnonzero(w.any(-1))
    if not nonzero.size:
        return None
    first = nonzero[:: max(1, len(nonzero) // _FIRST)]
    if (lattice.recover(w[first], dtype, grid)[1] == lattice.OFF_LATTICE).mean() > 0.5:
        return None
    blocks, status = lattice.recover(values, dtype, grid)
    fits = (status != lattice.OFF_LATTICE) & w.any(-1).reshape(status.shape)
    share = float(fits.sum() / len(nonzero))
    if share < _ENOUGH:
        return None
    units = _units(values, blocks, fits)
    group_size = _group_size(units[0], fits, _APART[dtype])
    rule = _rule(values, *units, fits, group_size, _APART[dtype])
    scales = _scales_dtype(blocks, status, fits)
    whole_row = group_size == values.shape[1] and group_size > grid.block_size
    return Lattice(grid=grid.name, rule=rule, scales=scales, group_size=None if whole_row else group_size, share=share)


def _units(values: np.ndarray, blocks: Blocks, fits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each block's coarsest scale (rows, n_blocks) float64 > 0, and its extremum's code on it.

    Recovery may have found twice the codes on half the scale; the codes' common divisor is taken out.
    """
    codes = blocks.codes.reshape(-1, blocks.codes.shape[-1])
    divisor = np.gcd.reduce(codes.astype(np.int64), axis=-1)
    w = values.reshape(codes.shape).T
    scale = np.abs(lattice.least_squares(w, codes.T.astype(np.float32))).astype(np.float64)
    largest = np.abs(codes.astype(np.int64)).max(-1) // np.maximum(divisor, 1)
    unit = np.where(fits.reshape(-1), scale * divisor, np.inf)
    return unit.reshape(fits.shape), largest.reshape(fits.shape)


def _grouped(unit: np.ndarray, size: int, apart: float) -> tuple[np.ndarray, np.ndarray]:
    """For groups of ``size`` blocks: each block's scale as a multiple of the group's, (rows, n_groups, size), and
    whether all of a group's are whole multiples (rows, n_groups)."""
    unit = unit.reshape(len(unit), -1, size)
    base = unit.min(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        ratio = np.where(np.isfinite(unit), unit / base, 1.0)  # a block without scale agrees with any
    multiple = np.rint(ratio)
    agrees = (np.abs(ratio - multiple) <= apart * ratio) & (multiple <= 8)
    return multiple, agrees.all(-1)


def _group_size(unit: np.ndarray, fits: np.ndarray, apart: float) -> int:
    """Weights that share a scale: the largest group whose blocks agree."""
    n_blocks = unit.shape[1]
    for size in (n_blocks, *(group // 32 for group in _GROUPS)):
        if size < 2 or n_blocks % size:
            continue
        telling = fits.reshape(len(fits), -1, size).sum(-1) > 1
        agrees = _grouped(unit, size, apart)[1]
        if telling.any() and agrees[telling].mean() >= _ENOUGH:
            return size * 32
    return 32


def _rule(
    values: np.ndarray, unit: np.ndarray, largest: np.ndarray, fits: np.ndarray, group_size: int, apart: float
) -> str:
    """How the scale follows from the group, told by the code that its extremum got."""
    size = group_size // 32
    multiple, agrees = _grouped(unit, size, apart)
    used = agrees & fits.reshape(len(fits), -1, size).any(-1)
    held = np.where(fits, largest, 0).reshape(multiple.shape)
    code = (held * multiple).max(-1)[used]  # of each group's extremum
    groups = values.reshape(len(values), -1, group_size)
    negative = (-groups.min(-1) > groups.max(-1))[used]
    on_8, on_7 = code == 8, code == 7
    if on_8.mean() >= _ALWAYS:
        return "extremum/-8"
    if on_7.mean() >= _ALWAYS:
        return "absmax/7"
    # A positive scale may put a negative extremum on -8; a positive one, for which there is no 8, stops at 7.
    if (on_8 | on_7).mean() >= _ALWAYS and negative[on_8].mean() >= _ALWAYS:
        return "absmax/7.5"
    return "free scales"


def _scales_dtype(blocks: Blocks, status: np.ndarray, fits: np.ndarray) -> str:
    """The coarsest dtype whose numbers give the values back."""
    assert blocks.scales is not None
    exact = status[fits] == lattice.EXACT
    scales = blocks.scales[fits].astype(np.float32)
    if (exact & (lattice.round_to(scales, "BF16") == scales)).mean() >= _ALL:
        return "bf16"
    return "f16" if exact.mean() >= _ALL else "f32"
