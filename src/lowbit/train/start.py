"""The start of distillation: every matrix rounded so that the model's output changes least.

``importance`` collects the second moments of each matrix's inputs, every token weighted by the gradient of the loss,
and ``lowbit.compensate`` rounds under them, as ``lowbit pack --calibration`` does: to second order what is made small
is the KLD itself, with the rows of a matrix told of each other's errors where the file says how. What that leaves out,
how the errors of different matrices add up, is for distillation.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from threadpoolctl import threadpool_limits

from lowbit.compensate import DAMPING, SWEEPS, can_compensate, compensate, compensate_together, joined, moments_of
from lowbit.grid.base import Blocks, Grid
from lowbit.threads import in_order
from lowbit.train import frame_search, frames
from lowbit.train.moments import EMBEDDING

_ROWS = 1024  # of a matrix rounded together: enough for numpy, and a few MB of candidates
# Wider, a block is a channel: too many columns to round them once for every scale that is tried.
_WIDEST = 256
# A weight starts where it was, but no further from its code than this part of a step. At the edge of its cell, where
# compensation leaves those it moved to another code, the first steps' noise would push half of them back (dev/LOG.md).
_INSIDE = 0.25


def rounded(
    model: Any, grids: Mapping[str, tuple[Grid, ...]], moments: Path, threads: int, in_time: Callable[[float], bool]
) -> Iterator[tuple[str, torch.Tensor, tuple[Blocks | None, ...]]]:
    """(name, weights, frames) of every matrix in ``grids``, in their order.

    grids: that of each recipe. Weights that serve several stay as they are, as what is moved to fit one grid is in the
    way of another; each has its own frame searched, or None where it is not trainable. moments: the file of
    ``importance``; an embedding, and what the file lacks, has its frame searched and no more.
    weights: (rows, n) float32 whose nearest codes on the frame are those chosen.
    threads: matrices at work at a time. in_time: asked before each matrix, with the part of all weights in those before
    it; where it says no the matrix goes without the sweeps, which take two thirds of the time.
    """
    with safetensors.safe_open(moments, "pt") as stored:
        known = set(stored.keys())
        sizes = {name: model.get_parameter(name).numel() for name in grids}
        total = sum(sizes.values())
        begun = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))

        def importance(name: str, n: int) -> torch.Tensor:
            if name == EMBEDDING:  # what is looked up is no product: each column counts by its gradient
                return stored.get_tensor(f"{name}.gradients")
            if f"{name}.inputs" not in known:
                return torch.ones(n)
            return stored.get_tensor(f"{name}.inputs").diagonal().contiguous()

        def job(name: str) -> tuple[str, torch.Tensor, tuple[Blocks | None, ...]]:
            weight, (grid, *others) = model.get_parameter(name).detach().float().cpu(), grids[name]
            is_product = name != EMBEDDING and f"{name}.inputs" in known
            if others or not is_product or not (is_blockwise(grid) or frame_search.can_compensate(grid)):
                counts = importance(name, weight.shape[-1])
                each = (frame_search.search(weight, counts, g) if g.is_trainable else None for g in (grid, *others))
                return name, weight, tuple(each)
            second = stored.get_tensor(f"{name}.inputs")
            if is_blockwise(grid):
                slopes = stored.get_tensor(f"{name}.slopes").numpy() if f"{name}.slopes" in known else None
                sweeps = SWEEPS if in_time(begun[name] / total) else 0
                weight, frame = _blockwise(weight, second, slopes, grid, sweeps)
            else:
                frame, weight = frame_search.compensated(weight, second, grid, DAMPING)
            return name, weight, (frame,)

        with threadpool_limits(1, "blas"):  # the matrices are what runs side by side
            yield from in_order((functools.partial(job, name) for name in grids), threads)


def is_blockwise(grid: Grid) -> bool:
    """Whether scales and codes are chosen together; elsewhere the frame is searched first, then the codes on it."""
    is_scaled = grid.has_scales and not grid.whole_rows and grid.scale_dtype == "F16" and grid.block_size <= _WIDEST
    return is_scaled or can_compensate(grid)


def _blockwise(
    weight: torch.Tensor, second: torch.Tensor, slopes: np.ndarray | None, grid: Grid, sweeps: int
) -> tuple[torch.Tensor, Blocks]:
    values, moments = weight.numpy(), moments_of(second.numpy())
    if slopes is not None:
        found = compensate_together(values, moments, slopes, grid, sweeps=sweeps)
    else:
        rows = (np.ascontiguousarray(values[at : at + _ROWS]) for at in range(0, len(values), _ROWS))
        found = joined([compensate(part, moments, grid, sweeps=sweeps) for part in rows])
    blocks = frames.of_arrays(found, weight.device)
    return _in_cells(weight, blocks, grid), frames.without_codes(blocks)


def _in_cells(weight: torch.Tensor, blocks: Blocks, grid: Grid) -> torch.Tensor:
    """The weights, each moved into the cell of its code as far as it lies outside."""
    steps, offsets = (part.reshape(len(weight), -1, 1) for part in frames.steps(grid, blocks))  # (rows, groups, 1)
    codes = blocks.codes.reshape(len(weight), steps.shape[1], -1).float()
    ratio = (weight.reshape(codes.shape) - offsets) / torch.where(steps == 0, torch.ones_like(steps), steps)
    ratio = codes + (ratio - codes).clamp_(-_INSIDE, _INSIDE)
    return (ratio * steps + offsets).reshape(weight.shape)
