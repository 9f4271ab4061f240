"""Rounding in two steps, for formats whose codes ``lowbit.compensate`` does not choose together with their scales.

``search_scales`` tries scales of both signs for each block, each refitted by least squares, and keeps the one with the
smallest error weighted by the mean square of each input (what llama.cpp's imatrix holds). ``compensate`` then rounds
column by column and moves the error of each column onto those not yet rounded, by the inverse of the inputs' second
moments (GPTQ, Frantar et al. 2023), on the scales that the search found.
"""

from __future__ import annotations

import torch

from lowbit.grid.base import Blocks, Grid
from lowbit.train import frames

# Where the extreme weight of a block may land, in codes: beyond the range it is clipped, inside it the range is unused.
_REACHES = (5.0, 5.5, 6.0, 6.5, 7.0, 7.25, 7.5, 7.75, 8.0, 8.5, 9.0)
_COLUMNS = 64  # columns rounded before the rest of the matrix is told of their error


@torch.no_grad()
def search_scales(weight: torch.Tensor, importance: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The best float16 scale of each block by error weighted with ``importance``.

    weight: (rows, n) float32. importance: (n,) float32, the mean square of each input. Returns (rows, n / block_size)
    float16; a scale may be negative, for the code range has one more value below zero than above.
    """
    blocks = weight.reshape(weight.shape[0], -1, grid.block_size)  # (rows, n_blocks, block_size)
    weighted = importance.reshape(1, -1, grid.block_size)

    def error_of(scales: torch.Tensor) -> torch.Tensor:
        values = grid.nearest_values(weight, scales).view_as(blocks)
        return values.sub_(blocks).square_().mul_(weighted).sum(-1)

    largest = blocks.abs().amax(-1)
    best: torch.Tensor = grid.quantize(weight).scales  # type: ignore[assignment]  # the format's own choice, so that no block ends up worse
    least = error_of(best)
    reaches = [reach * grid.min_code / -8 for reach in _REACHES]
    for sign in (1.0, -1.0):
        for reach in reaches:
            scales = (largest * (sign / reach)).half()
            codes = grid.encode(weight, scales).codes.float()
            weighted_codes = codes * weighted
            norm = (weighted_codes * codes).sum(-1)
            fitted = torch.where(norm > 0, (weighted_codes * blocks).sum(-1) / norm, scales.float())
            scales = fitted.half()
            error = error_of(scales)
            better = (error < least) & torch.isfinite(scales)
            least = torch.where(better, error, least)
            best = torch.where(better, scales, best)
    return best


@torch.no_grad()
def compensate(weight: torch.Tensor, frame: Blocks, moments: torch.Tensor, grid: Grid, damping: float) -> torch.Tensor:
    """Weights (rows, n) float32 whose nearest codes on ``frame`` are GPTQ's. Formats of evenly spaced codes only.

    moments: (n, n) float32. damping: part of the mean diagonal that is added to the diagonal. What comes back is each
    weight with the error of the columns before it moved onto it.
    """
    n = weight.shape[1]
    damped = moments.clone()
    damped.diagonal().add_(damping * moments.diagonal().mean().clamp_min(1e-12))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    steps, offsets = frames.steps(grid, frame)
    d, zero = (part.reshape(len(weight), -1) for part in (steps, offsets))  # (rows, groups)
    inverse = torch.where(d == 0, 0.0, 1.0 / d)
    group, (low, high) = n // d.shape[1], grid.code_range
    rest = weight.clone()
    moved = torch.empty_like(weight)
    for start in range(0, n, _COLUMNS):
        end = min(n, start + _COLUMNS)
        columns = rest[:, start:end].T.contiguous()  # (columns, rows)
        errors = torch.empty_like(columns)
        local = upper[start:end, start:end]
        for c in range(end - start):
            g = (start + c) // group
            codes = ((columns[c] - zero[:, g]) * inverse[:, g]).round_().clamp_(low, high)
            values = codes.mul_(d[:, g]).add_(zero[:, g])
            moved[:, start + c] = columns[c]
            errors[c] = (columns[c] - values) / local[c, c]
            columns[c + 1 :].addr_(local[c, c + 1 :], errors[c], alpha=-1)
        rest[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)
    return moved
