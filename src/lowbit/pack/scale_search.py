"""The best float16 scale and codes of each block by error weighted with an importance matrix.

Where the extreme weight of a block lands is tried out for a number of codes, of both signs. Each guess gives codes, and
for codes the best scale follows by weighted least squares; the guess whose codes leave the least error is then refined
by turns: codes for the scale, a scale for the codes. A block is never worse than by the format's own rule.

Shapes: inside, w and importance are (block_size, n) float32, a block a column, so that numpy works on many blocks with
one instruction.
"""

from __future__ import annotations

import numpy as np

from lowbit.grid.base import Blocks, Grid

# Where the extreme weight of a block may land, in codes of 4 bits: beyond the range it is clipped, inside it the range
# is unused.
_REACHES = (5.0, 5.5, 6.0, 6.5, 7.0, 7.25, 7.5, 7.75, 8.0, 8.5, 9.0)
_REFITS = 3
_SLICE = 2048  # blocks at a time, so that the work stays in the cache


def search(values: np.ndarray, importance: np.ndarray, grid: Grid, start: Blocks, where: np.ndarray) -> Blocks:
    """Codes and scales with the least error weighted by ``importance``, of the blocks that ``where`` names.

    values: (rows, n) float32. importance: (n,) float32, from 0 on. grid: one with scales. start: Blocks for all of
    them; where False they stay. where: (rows, n / block_size) bool. A block gets whichever has the least weighted
    error of the start's, the grid's own rounding's and what the search finds; the first of equals.
    """
    assert start.scales is not None
    codes, scales = start.codes.reshape(-1, grid.block_size).copy(), start.scales.reshape(-1).copy()
    blocks, columns = values.reshape(-1, grid.block_size), importance.reshape(-1, grid.block_size)
    index = np.flatnonzero(where)
    with np.errstate(all="ignore"):  # scales that overflow or vanish have no finite error, and lose
        for at in range(0, len(index), _SLICE):
            part = index[at : at + _SLICE]
            found = _Blocks(blocks[part], columns[part % len(columns)], grid, codes[part], scales[part])
            found.run()
            codes[part], scales[part] = found.codes, found.scales
    return Blocks(codes=codes.reshape(start.codes.shape), scales=scales.reshape(start.scales.shape))


class _Blocks:
    """Blocks at work, and the best that was found of them: codes (n, block_size) int8, scales and error (n,)."""

    def __init__(
        self, rows: np.ndarray, importance: np.ndarray, grid: Grid, codes: np.ndarray, scales: np.ndarray
    ) -> None:
        self.rows, self.grid, self.codes, self.scales = rows, grid, codes, scales
        self.w, self.importance = np.ascontiguousarray(rows.T), np.ascontiguousarray(importance.T)
        # Only the ratios within a block count, and a number far from 1 may vanish or overflow when it is multiplied.
        most = self.importance.max(0)
        self.importance /= np.where(most > 0, most, np.float32(1))
        self.weighted = self.w * self.importance
        self.work = np.empty_like(self.w)
        self.error = self._error(np.ascontiguousarray(codes.T).astype(np.float32), scales)

    def run(self) -> None:
        own = self.grid.quantize(self.rows)
        assert own.scales is not None
        self._keep_better(np.ascontiguousarray(own.codes[:, 0].T).astype(np.float32), own.scales[:, 0])
        scales = self._best_guess()
        for _ in range(_REFITS):
            scales = scales.astype(np.float16)
            codes = self._nearest(self.grid.inverse(scales))
            self._keep_better(codes, scales)
            gain, norm = self._fit(codes)
            scales = np.where(norm > 0, gain / norm, np.float32(0))

    def _best_guess(self) -> np.ndarray:
        """The scales (n,) float32 that fit the best of the guessed codes."""
        largest = np.abs(self.w).max(0)
        most, best = np.zeros_like(largest), largest / np.float32(-self.grid.min_code)
        for reach in _REACHES:
            inverse = np.float32(reach * self.grid.min_code / -8) / largest
            inverse[largest == 0] = 0
            for sign in (1, -1):
                gain, norm = self._fit(self._nearest(inverse * np.float32(sign)))
                # Of codes c with their best scale g/n, the error is the sum of i w^2 less g^2/n.
                explained = gain * gain / norm
                better = explained > most
                np.copyto(most, explained, where=better)
                np.copyto(best, gain / norm, where=better)
        return best

    def _nearest(self, inverse: np.ndarray) -> np.ndarray:
        """The codes (block_size, n) float32 for inverse scales (n,), in the one array for it."""
        np.multiply(self.w, inverse, out=self.work)
        np.rint(self.work, out=self.work)
        return np.clip(self.work, self.grid.min_code, self.grid.max_code, out=self.work)

    def _fit(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The two sums whose quotient is the best scale for these codes: (n,) float32 each."""
        return np.einsum("ij,ij->j", codes, self.weighted), np.einsum("ij,ij,ij->j", codes, codes, self.importance)

    def _error(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        difference = codes * scales.astype(np.float32)
        difference -= self.w
        error = np.einsum("ij,ij,ij->j", difference, difference, self.importance)
        return np.where(np.isnan(error), np.float32(np.inf), error)

    def _keep_better(self, codes: np.ndarray, scales: np.ndarray) -> None:
        error = self._error(codes, scales)
        better = error < self.error
        self.error[better], self.scales[better] = error[better], scales[better]
        self.codes[better] = codes.T[better]
