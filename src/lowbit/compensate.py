"""Error-compensated rounding: codes and scales that keep what a matrix computes, not each weight by itself.

The loss of a row with errors e = w - q is e H e, H the second moments of what flows in. Column by column each weight
is rounded so as to take back what the columns before it did wrong (GPTQ, Frantar et al. 2023; LDLQ, Chee et al. 2023):
with H = V V^T and V upper triangular the loss is |e V|^2, and its part j depends on the errors up to j alone. A block
of a format has one scale, so scales are tried and each is rounded to the end of the block before the best is kept.
Sweeps over the blocks follow: each is rounded again, all others as they are, until little is gained.

Rows too can be told of each other's errors. The KLD that all of them cause is, to second order, half of tr(G E H E^T),
G the second moments of the loss's gradients at the matrix's outputs (Kronecker factors of the Fisher information,
Martens and Grosse 2015; for rounding Tseng et al. 2025, YAQA). With G = C C^T and C lower triangular, groups of rows
are rounded from the last to the first, each towards its weights plus what the errors of those after it pull it by.

Inside, arrays are (..., columns of a block, rows), so that numpy works on many rows with one instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from lowbit import ggml
from lowbit.grid.base import Blocks, Grid

DAMPING = 0.01  # of the mean diagonal, added to the diagonal: directions that few tokens had are not free
SWEEPS = 2
SLOPE_DAMPING = 0.05  # of G likewise
# Rows that do not wait for each other: a sixth of a matrix, spread over it as neighbours are the most alike, but enough
# for numpy. Of 1,536 rows 64 at a time leave 2% less and take three times as long (dev/LOG.md).
_PARTS, _TOGETHER = 6, 64
_WIDTH = 32  # columns rounded together where the format's groups are not
# Where the extreme weight of a block may land, in parts of the lowest code; beyond 1 it is clipped on one side.
_REACHES = (0.75, 0.8125, 0.875, 0.9375, 1.0, 1.0625)
_STRETCHES = (0.9, 0.95, 1.0, 1.05, 1.1)  # of a block's scale, tried in a sweep


@dataclass(frozen=True)
class Moments:
    """H of a matrix, damped, and its factor: both (n, n) float32, ``upper`` with H = upper @ upper.T."""

    values: np.ndarray
    upper: np.ndarray


def moments_of(second: np.ndarray, damping: float = DAMPING) -> Moments:
    """From the mean of x x^T, (n, n) float32, finite and symmetric."""
    damped: np.ndarray = second.astype(np.float64 if len(second) <= 4096 else np.float32)
    damped.flat[:: len(damped) + 1] += max(damping * float(damped.diagonal().mean()), 1e-30)
    # The factor of the matrix read backwards is lower triangular, and read backwards again upper.
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return Moments(damped.astype(np.float32), np.ascontiguousarray(upper, np.float32))


def can_compensate(grid: Grid) -> bool:
    """Whether ``compensate`` knows the format: GGUF's with codes times a float16 scale, with or without minimums."""
    return grid.ggml_type is not None and (grid.has_scales or grid.ladder_group > 0)


def compensate(values: np.ndarray, moments: Moments, grid: Grid, *, sweeps: int = SWEEPS) -> Blocks:
    """Codes and scales for (rows, n) float32 with least loss under ``moments``; rows do not depend on each other.

    sweeps: times that every block is rounded again, all others as they are.
    Formats with one scale a block have it searched; those with scales and minimums of groups keep what ggml's own
    search chooses under the diagonal of H, and have their codes chosen.
    """
    work = _Searched(values, moments, grid) if grid.has_scales else _Laddered(values, moments, grid)
    work.forward()
    for _ in range(sweeps):
        work.sweep()
    return work.blocks()


def compensate_together(
    values: np.ndarray, moments: Moments, slopes: np.ndarray, grid: Grid, *, sweeps: int = SWEEPS
) -> Blocks:
    """The same of a whole matrix whose rows depend on each other.

    slopes: (rows, rows) float32, finite and symmetric: the second moments of the gradients at its outputs, in any unit.
    """
    rows = len(values)
    damped = slopes.astype(np.float64)
    damped.flat[:: rows + 1] += max(SLOPE_DAMPING * float(damped.diagonal().mean()), 1e-30)
    together = max(_TOGETHER, rows // _PARTS)
    groups = max(1, rows // together)
    order = np.concatenate([np.arange(i, rows, groups) for i in range(groups)])
    lower = np.linalg.cholesky(damped[np.ix_(order, order)])
    ordered, errors = values[order], np.zeros(values.shape, np.float32)
    found: list[Blocks] = []
    for start in reversed(range(0, rows, together)):
        part, after = slice(start, start + together), slice(start + together, rows)
        share = np.linalg.solve(lower[part, part].T, lower[after, part].T).astype(np.float32)
        found.insert(0, compensate(ordered[part] + share @ errors[after], moments, grid, sweeps=sweeps))
        errors[part] = ordered[part] - grid.dequantize(found[0])
    back = np.argsort(order)
    return Blocks(**{name: None if part is None else part[back] for name, part in vars(joined(found)).items()})


def joined(parts: Sequence[Blocks]) -> Blocks:
    """Blocks of rows one below the other."""
    whole = {field.name: [getattr(blocks, field.name) for blocks in parts] for field in fields(Blocks)}
    return Blocks(**{name: None if each[0] is None else np.concatenate(each) for name, each in whole.items()})


def loss(values: np.ndarray, rounded: np.ndarray, moments: Moments) -> np.ndarray:
    """e H e of each row: (rows,) float64."""
    errors = values - rounded
    return np.einsum("ij,ij->i", errors @ moments.values, errors, dtype=np.float64)


class _Rounding:
    """What both kinds share: the two passes over the blocks of a few rows."""

    def __init__(self, values: np.ndarray, moments: Moments, grid: Grid) -> None:
        self.values, self.moments, self.grid = values, moments, grid
        self.codes = np.zeros(values.shape, np.int8)
        self.rounded = np.empty_like(values)
        self.width = grid.block_size if grid.has_scales else _WIDTH

    def parts(self) -> list[slice]:
        n = self.values.shape[1]
        return [slice(start, start + self.width) for start in range(0, n, self.width)]

    def forward(self) -> None:
        """Every block in turn, with the errors of those before it."""
        upper = self.moments.upper
        errors = np.zeros_like(self.values)
        for part in self.parts():
            before = (
                errors[:, : part.start] @ upper[: part.start, part] if part.start else np.zeros_like(errors[:, part])
            )
            self.choose(part, _columns(self.values[:, part]), _columns(before), upper[part, part])
            errors[:, part] = self.values[:, part] - self.rounded[:, part]

    def sweep(self) -> None:
        """Every block again: where its weights would best be, all others as they are, and what is nearest to that."""
        matrix = self.moments.values
        pull = (self.values - self.rounded) @ matrix  # half of the loss's slope, (rows, n)
        for part in self.parts():
            own = matrix[part, part].astype(np.float64)
            upper = np.linalg.cholesky(own[::-1, ::-1])[::-1, ::-1].astype(np.float32)
            old = self.rounded[:, part].copy()
            wanted = old + pull[:, part] @ np.linalg.inv(own).astype(np.float32)
            self.choose(part, _columns(wanted), np.zeros((self.width, len(old)), np.float32), upper, keep=True)
            pull += (old - self.rounded[:, part]) @ matrix[part]

    def choose(self, part: slice, x: np.ndarray, before: np.ndarray, upper: np.ndarray, *, keep: bool = False) -> None:
        """Rounds x (width, rows); before: the loss's parts so far, same shape. keep: only where it gets better."""
        raise NotImplementedError

    def blocks(self) -> Blocks:
        raise NotImplementedError


class _Searched(_Rounding):
    """Formats whose block is codes times one float16 scale."""

    def __init__(self, values: np.ndarray, moments: Moments, grid: Grid) -> None:
        super().__init__(values, moments, grid)
        self.scales = np.zeros((len(values), values.shape[1] // grid.block_size), np.float16)

    def choose(self, part: slice, x: np.ndarray, before: np.ndarray, upper: np.ndarray, *, keep: bool = False) -> None:
        block = part.start // self.width
        scales = self._candidates(x, self.scales[:, block] if keep else None)
        codes, least = self._best(x, before, upper, scales)
        index = least.argmin(0)
        rows = np.arange(x.shape[1])
        chosen, loss, scale = codes[index, :, rows].T, least[index, rows], scales[index, rows]
        # The best scale of these codes, and the best codes of that scale.
        fitted = _fit(x, before, upper, chosen, scale)
        again, its_loss = self._best(x, before, upper, fitted[None])
        better = its_loss[0] < loss
        chosen = np.where(better, again[0], chosen)
        scale, loss = np.where(better, fitted, scale), np.where(better, its_loss[0], loss)
        if keep:
            current = upper.T @ (x - _columns(self.rounded[:, part]))
            better = loss < np.square(current).sum(0)
            chosen = np.where(better, chosen, self.codes[:, part].T)
            scale = np.where(better, scale, self.scales[:, block])
        self.codes[:, part], self.scales[:, block] = chosen.T, scale
        self.rounded[:, part] = (chosen * scale).T

    def _candidates(self, x: np.ndarray, current: np.ndarray | None) -> np.ndarray:
        """(candidates, rows) float32 that float16 holds."""
        if current is not None:
            tried = [current.astype(np.float32) * np.float32(by) for by in _STRETCHES]
        else:
            extreme = np.abs(x).max(0)
            tried = [
                extreme * np.float32(sign / (reach * -self.grid.min_code)) for sign in (1, -1) for reach in _REACHES
            ]
        return _storable(np.stack(tried))

    def _best(
        self, x: np.ndarray, before: np.ndarray, upper: np.ndarray, scales: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes (candidates, width, rows) of each scale, rounded one after the other, and their loss."""
        with np.errstate(divide="ignore"):
            inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
        low, high = self.grid.min_code, self.grid.max_code
        return _one_by_one(x, before, upper, scales[:, None], inverse[:, None], None, low, high)

    def blocks(self) -> Blocks:
        shape = (*self.scales.shape, self.width)
        return Blocks(codes=self.codes.reshape(shape), scales=self.scales)


class _Laddered(_Rounding):
    """Formats with scales, and minimums, of groups: ggml chooses them, and only the codes are searched."""

    def __init__(self, values: np.ndarray, moments: Moments, grid: Grid) -> None:
        super().__init__(values, moments, grid)
        importance = np.ascontiguousarray(moments.values.diagonal())
        self.start = grid.unpack(ggml.quantize(values, ggml.type_of(grid), importance))
        steps, offsets = grid.ladder(self.start)
        group = grid.ladder_group
        # (n, rows): of every column its step and where its code 0 lies
        self.steps = np.repeat(_columns(steps.reshape(len(values), -1)), group, axis=0)
        self.offsets = np.repeat(_columns(offsets.reshape(len(values), -1)), group, axis=0)
        with np.errstate(divide="ignore"):
            self.inverse = np.where(self.steps == 0, np.float32(0), np.float32(1) / self.steps)

    def choose(self, part: slice, x: np.ndarray, before: np.ndarray, upper: np.ndarray, *, keep: bool = False) -> None:
        steps, offsets = self.steps[part], self.offsets[part]
        low, high = self.grid.min_code, self.grid.max_code
        codes, loss = _one_by_one(x, before, upper, steps[None], self.inverse[part][None], offsets[None], low, high)
        chosen = codes[0]
        if keep:
            current = upper.T @ (x - _columns(self.rounded[:, part]))
            chosen = np.where(loss[0] < np.square(current).sum(0), chosen, self.codes[:, part].T)
        self.codes[:, part] = chosen.T
        self.rounded[:, part] = (chosen * steps + offsets).T

    def blocks(self) -> Blocks:
        return replace(self.start, codes=self.codes.reshape(self.start.codes.shape))


def _one_by_one(
    x: np.ndarray,
    before: np.ndarray,
    upper: np.ndarray,
    steps: np.ndarray,
    inverse: np.ndarray,
    offsets: np.ndarray | None,
    low: int,
    high: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds the columns of a block in turn, each with the errors before it.

    x, before: (width, rows). steps, inverse, offsets: (candidates, 1 or width, rows). Returns codes (candidates, width,
    rows) float32 and the loss (candidates, rows).
    """
    width = len(x)
    carried = np.broadcast_to(before, (len(steps), *before.shape)).copy()  # sum of e_i V_ij over the columns done
    codes = np.empty_like(carried)
    loss = np.zeros((len(steps), x.shape[1]), np.float32)
    spare = np.empty_like(carried)
    for j in range(width):
        k = j if steps.shape[1] > 1 else 0
        target = carried[:, j] / upper[j, j]
        target += x[j]
        if offsets is not None:
            target -= offsets[:, k]
        code = codes[:, j]
        np.multiply(target, inverse[:, k], out=code)
        np.rint(code, out=code)
        np.clip(code, low, high, out=code)
        error = x[j] - code * steps[:, k]
        if offsets is not None:
            error -= offsets[:, k]
        part = carried[:, j] + error * upper[j, j]
        loss += part * part
        if j + 1 < width:
            np.multiply(upper[j, j + 1 :, None], error[:, None], out=spare[:, j + 1 :])
            carried[:, j + 1 :] += spare[:, j + 1 :]
    return codes, loss


def _fit(x: np.ndarray, before: np.ndarray, upper: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The scale (rows,) with the least loss for codes (width, rows), as float16 holds it; ``scale`` where all are 0."""
    without = before + upper.T @ x
    each = upper.T @ codes
    norm = np.square(each).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _storable(np.where(norm > 0, (without * each).sum(0) / norm, scale))


def _storable(scales: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = scales.astype(np.float16).astype(np.float32)
    return np.where(np.isfinite(stored), stored, np.float32(0))


def _columns(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.T)
