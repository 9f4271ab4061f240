"""The scales and minimums that training starts from: those with the least error weighted by what flows in.

A format's own search is used where the C library has one that takes weights (K-quants, Q4_1, IQ4_NL); one float16 a
block is searched for (``calibrate.search_scales``); and here are the searches for one scale a row, for MLX's scale and
bias, and for a power of two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lowbit import ggml
from lowbit.errors import Unsupported
from lowbit.grid._ladder import LadderGrid
from lowbit.grid.base import Blocks, Grid
from lowbit.train import calibrate, frames

# Where a row's largest magnitude may land, in parts of the lowest code: 2 bits leave most of what is large clipped.
_ROW_REACHES = tuple(1.17**i for i in range(-2, 15))
_FITS = 3
_REFITS = 2
_STRETCHES = (0.8, 0.9, 1.0, 1.1)  # of a group's range of MLX's


@torch.no_grad()
def search(weight: torch.Tensor, importance: torch.Tensor, grid: Grid) -> Blocks:
    """The best frame found for (rows, n) float32. importance: (n,) float32, the mean square of each input."""
    if grid.whole_rows:
        return Blocks(codes=None, scales=_row_scales(weight, importance, grid))
    if grid.has_scales:
        return Blocks(codes=None, scales=calibrate.search_scales(weight, importance, grid))
    if grid.ggml_type is not None and not grid.name.startswith("mxfp"):
        return _of_ggml(weight, importance, grid)
    if isinstance(grid, LadderGrid):
        return _affine(weight, importance, grid)
    return _exponents(weight, importance, grid)


def can_compensate(grid: Grid) -> bool:
    """Whether ``calibrate.compensate`` knows the format: evenly spaced codes."""
    return grid.has_scales or isinstance(grid, LadderGrid)


@torch.no_grad()
def compensated(weight: torch.Tensor, moments: torch.Tensor, grid: Grid, damping: float) -> tuple[Blocks, torch.Tensor]:
    """A frame, and weights (rows, n) float32 whose nearest codes on it disturb what the matrix computes least.

    moments: (n, n) float32. One scale a row is chosen anew once the codes are: the best for the row's whole output, not
    the sum of its weights' errors. Each row keeps whichever of the two has the smaller loss.
    """
    frame = search(weight, moments.diagonal().contiguous(), grid)
    moved = calibrate.compensate(weight, frame, moments, grid, damping)
    if not grid.whole_rows:
        return frame, moved
    least = _loss(weight, moved, frame, moments, grid)
    for _ in range(_REFITS):
        refitted = _refitted(weight, moved, frame, moments, grid)
        again = calibrate.compensate(weight, refitted, moments, grid, damping)
        loss = _loss(weight, again, refitted, moments, grid)
        better = (loss < least)[:, None]
        moved, least = torch.where(better, again, moved), torch.minimum(loss, least)
        frame = Blocks(codes=None, scales=_chosen(better, refitted, frame, "scales"))
    return frame, moved


def _loss(weight: torch.Tensor, moved: torch.Tensor, frame: Blocks, moments: torch.Tensor, grid: Grid) -> torch.Tensor:
    """e H e of each row's errors: (rows,)."""
    errors = frames.values_on(grid, moved, frame, torch.float32).sub_(weight)
    return ((errors @ moments) * errors).sum(-1)


def _refitted(weight: torch.Tensor, moved: torch.Tensor, frame: Blocks, moments: torch.Tensor, grid: Grid) -> Blocks:
    """One scale a row by least squares under the moments, for the codes that compensation chose."""
    codes = grid.encode_on(moved, frame).codes[:, 0].float()
    pulled = codes @ moments
    norm = (pulled * codes).sum(-1, keepdim=True)
    fitted = (pulled * weight).sum(-1, keepdim=True) / norm
    old: Any = frame.scales
    return Blocks(codes=None, scales=frames.stored(torch.where((norm > 0) & (fitted > 0), fitted, old), grid))


def _error(weight: torch.Tensor, importance: torch.Tensor, frame: Blocks, grid: Grid, group: int) -> torch.Tensor:
    """Weighted squared error of each group: (rows, n / group)."""
    difference = frames.values_on(grid, weight, frame, torch.float32).sub_(weight)
    return difference.square_().mul_(importance).reshape(len(weight), -1, group).sum(-1)


def _row_scales(weight: torch.Tensor, importance: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(rows, 1): the best of several reaches, each fitted by least squares, codes and scale in turn."""
    n = weight.shape[1]
    largest = weight.abs().amax(-1, keepdim=True)
    start: Any = grid.quantize(weight).scales
    best = frames.stored(start, grid)
    least = _error(weight, importance, Blocks(codes=None, scales=best), grid, n)
    for reach in _ROW_REACHES:
        scales = frames.stored(largest / (-grid.min_code * reach), grid)
        for _ in range(_FITS):
            codes = grid.encode(weight, scales).codes[:, 0].float()
            weighted = codes * importance
            norm = (weighted * codes).sum(-1, keepdim=True)
            fitted = torch.where(norm > 0, (weighted * weight).sum(-1, keepdim=True) / norm, scales)
            scales = frames.stored(fitted, grid)
        error = _error(weight, importance, Blocks(codes=None, scales=scales), grid, n)
        # Below zero least squares puts a scale only where most of a row's codes are wrong; runtimes want it above.
        better = (error < least) & torch.isfinite(scales) & (scales > 0)
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def _of_ggml(weight: torch.Tensor, importance: torch.Tensor, grid: Grid) -> Blocks:
    """ggml's own search under the importance, where the library is installed; else without it."""
    if not ggml.is_installed():
        return frames.without_codes(grid.quantize(weight))
    counts = importance.float().clamp_min(1e-12).cpu().numpy()
    raw = ggml.quantize(weight.cpu().numpy(), ggml.type_of(grid), counts)
    found = frames.of_arrays(grid.unpack(raw), weight.device)
    return frames.without_codes(found)


def _affine(weight: torch.Tensor, importance: torch.Tensor, grid: LadderGrid) -> Blocks:
    """Scale and bias of each group: stretches of the library's own choice, fitted by weighted least squares in turn."""
    size = grid.group
    blocks = weight.reshape(len(weight), -1, size)
    counts = importance.reshape(1, -1, size).expand(len(weight), -1, -1)
    best = frames.without_codes(grid.quantize(weight))
    least = _error(weight, importance, best, grid, size)
    low, high = blocks.amin(-1), blocks.amax(-1)
    middle, top = (low + high) / 2, grid.code_range[1]
    for stretch in _STRETCHES:
        step = (high - low) * (stretch / top)
        frame = _rounded(step, middle - step * (top / 2), best, grid)
        for _ in range(_FITS):
            codes = grid.encode_on(weight, frame).codes.float().reshape(blocks.shape)
            frame = _rounded(*_line(codes, blocks, counts, frame), best, grid)
        error = _error(weight, importance, frame, grid, size)
        better = (error < least) & torch.isfinite(frame.scales) & torch.isfinite(frame.mins)  # type: ignore[arg-type]
        best = replace(best, **{part: _chosen(better, frame, best, part) for part in ("scales", "mins")})
        least = torch.where(better, error, least)
    return best


def _chosen(better: torch.Tensor, new: Any, old: Any, part: str) -> torch.Tensor:
    return torch.where(better, getattr(new, part), getattr(old, part))


def _line(codes: torch.Tensor, x: torch.Tensor, w: torch.Tensor, frame: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted least-squares line through codes and weights: its slope and where it meets code 0."""
    total, of_codes, of_x = w.sum(-1), (w * codes).sum(-1), (w * x).sum(-1)
    determinant = total * (w * codes * codes).sum(-1) - of_codes * of_codes
    slope = (total * (w * codes * x).sum(-1) - of_codes * of_x) / determinant
    ok = (determinant > 0) & torch.isfinite(slope)
    slope = torch.where(ok, slope, frame.scales.float())  # type: ignore[union-attr]
    start = torch.where(ok, (of_x - slope * of_codes) / total.clamp_min(1e-30), frame.mins.float())  # type: ignore[union-attr]
    return slope, start


def _rounded(scales: torch.Tensor, mins: torch.Tensor, like: Blocks, grid: Grid) -> Blocks:
    return replace(like, scales=frames.stored(scales, grid), mins=frames.stored(mins, grid))


def _exponents(weight: torch.Tensor, importance: torch.Tensor, grid: Grid) -> Blocks:
    """The library's power of two, or one of its neighbours."""
    best: Any = grid.quantize(weight).scales
    if not isinstance(best, torch.Tensor) or best.dtype != torch.uint8:
        raise Unsupported("no search for the scales of this format", found=grid.name)
    start, least = best.int(), None
    for offset in (0, -1, 1):
        scales = (start + offset).clamp(0, 254).to(torch.uint8)
        error = _error(weight, importance, Blocks(codes=None, scales=scales), grid, grid.block_size)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        best = torch.where(better, scales, best)
        least = error if least is None else torch.where(better, error, least)
    return Blocks(codes=None, scales=best)
