"""Frames: all of a format's blocks but the codes. Training holds on to a frame and moves weights between its codes.

Here are the gradients by which a frame's own numbers are learned, where the format leaves them free (LSQ, Esser et al.
2020, extended to offsets as in LSQ+, Bhalgat et al. 2020). A frame on the CPU or elsewhere is a ``Blocks`` of tensors
whose codes are None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from lowbit.grid._array import cast, round_to
from lowbit.grid._ladder import LadderGrid
from lowbit.grid.base import Blocks, Grid

_PARTS = tuple(field.name for field in fields(Blocks) if field.name != "codes")
_SLICE = 1 << 18  # weights at a time: float32 values and scratch stay in a core's second-level cache


def rows_of(frame: Blocks, part: slice) -> Blocks:
    """The frame of some rows."""
    return Blocks(codes=None, **{name: _maybe(getattr(frame, name), part) for name in _PARTS})


def without_codes(blocks: Blocks) -> Blocks:
    return replace(blocks, codes=None)


def stored(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Learned scales or minimums, float32, as the format stores them."""
    rounded: torch.Tensor = round_to(x.detach(), grid.scale_dtype)
    return rounded


def of_arrays(blocks: Blocks, device: torch.device) -> Blocks:
    """Tensors of numpy arrays."""
    parts = {name: getattr(blocks, name) for name in ("codes", *_PARTS)}
    return Blocks(**{k: None if v is None else torch.from_numpy(v.copy()).to(device) for k, v in parts.items()})


def to_tensors(frame: Blocks, name: str, which: int = 0) -> dict[str, torch.Tensor]:
    """What a file holds of the frame of the tensor ``name``, by 'scales:NAME' and so on. which: of several recipes."""
    found = {part: getattr(frame, part) for part in _PARTS}
    prefix = f"{which}/" if which else ""
    return {f"{prefix}{part}:{name}": v.cpu().contiguous() for part, v in found.items() if v is not None}


def from_tensors(found: Mapping[str, torch.Tensor], device: torch.device, which: int = 0) -> dict[str, Blocks]:
    """The frames in a file, by tensor name: the inverse of ``to_tensors``."""
    parts: dict[str, dict[str, Any]] = {}
    prefix = f"{which}/" if which else ""
    for key, values in found.items():
        part, _, name = key.removeprefix(prefix).partition(":")
        if key.startswith(prefix) and part in _PARTS:
            parts.setdefault(name, {})[part] = values.to(device)
    return {name: Blocks(codes=None, **of_one) for name, of_one in parts.items()}


def row_slices(weight: torch.Tensor) -> list[slice]:
    """Slices of a weight's first dimension, each about as much as fits in a cache."""
    each = max(1, _SLICE // max(1, weight.numel() // max(1, weight.shape[0])))
    return [slice(start, start + each) for start in range(0, weight.shape[0], each)]


def values_on(grid: Grid, weight: torch.Tensor, frame: Blocks, dtype: torch.dtype) -> torch.Tensor:
    """The values on the grid that are nearest to ``weight``, bit for bit what the file will hold, as ``dtype``."""
    values = torch.empty_like(weight, dtype=dtype)
    for part in row_slices(weight):
        if grid.has_scales:
            values[part] = grid.nearest_values(weight[part], frame.scales[part])  # type: ignore[index]
        else:
            values[part] = grid.dequantize(grid.encode_on(weight[part], rows_of(frame, part)))
    return values


def gradients(
    grid: Grid, weight: torch.Tensor, frame: Blocks, codes: torch.Tensor | None, slope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss's gradients by the frame's scales and its minimums (None where it has none), float32 of their shapes.

    weight: the masters. codes: those that stay whatever the frame, or None where each weight takes the nearest. slope:
    the loss's gradient by the values. Of value = step * code + offset the derivative by the step is the code, less
    (weight - offset) / step where the weight is inside of the range of codes; by the offset it is 1 outside, 0 inside.
    """
    assert frame.scales is not None
    for_scales = torch.empty_like(frame.scales, dtype=torch.float32)
    for_mins = None if frame.mins is None else torch.empty_like(frame.mins, dtype=torch.float32)
    for part in row_slices(weight):
        some = rows_of(frame, part)
        fixed = None if codes is None else codes[part]
        by_step, by_offset = _by_group(grid, weight[part], some, fixed, slope[part].float())
        for_scales[part] = _chained(by_step, some.sub_scales, some.scales)
        if for_mins is not None:
            sub_mins = None if some.sub_mins is None else -some.sub_mins
            for_mins[part] = _chained(by_offset, sub_mins, some.mins)
    return for_scales, for_mins


def _by_group(
    grid: Grid, weight: torch.Tensor, frame: Blocks, codes: torch.Tensor | None, slope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by each group's step and offset: (..., groups) both."""
    each, offsets = steps(grid, frame)
    shape = (*each.shape, -1)
    slope = slope.reshape(shape)
    if codes is not None:
        return (slope * codes.reshape(shape)).sum(-1), slope.sum(-1)
    code = grid.encode_on(weight, frame).codes.reshape(shape).float()
    ratio = weight.reshape(shape) - offsets[..., None]
    ratio *= torch.where(each == 0, 0.0, 1.0 / each)[..., None]
    low, high = grid.code_range
    inside = (ratio >= low - 0.5) & (ratio <= high + 0.5)
    by_step = (slope * torch.where(inside, code - ratio, code)).sum(-1)
    return by_step, (slope * ~inside).sum(-1)


def steps(grid: Grid, frame: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """The step of each group's codes, and where its code 0 lies: float32, rows first."""
    if isinstance(grid, LadderGrid):
        return grid.ladder(frame)
    found = cast(frame.scales, "float32")
    return found, torch.zeros_like(found)


def _chained(by_group: torch.Tensor, sub: torch.Tensor | None, like: Any) -> torch.Tensor:
    """From the groups' own numbers to those that they are multiples of."""
    if sub is not None:
        by_group = (by_group.reshape(sub.shape) * sub).sum(-1)
    return by_group.reshape(like.shape)


def _maybe(x: Any, part: slice) -> Any:
    return None if x is None else x[part]
