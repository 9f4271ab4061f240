"""What the formats share whose groups have a step and an offset each: value = code * step + offset."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from lowbit.grid._array import cast, inverse_of, plain
from lowbit.grid.base import Array, Blocks, Grid, namespace


class LadderGrid(Grid):
    """Evenly spaced codes in groups of ``ladder_group`` weights; subclasses tell steps and offsets by ``ladder``."""

    code_dtype: ClassVar[str] = "int8"

    @property
    def has_scales(self) -> bool:
        return False  # a block is not its scale alone: there is a second level of them, or a minimum beside it

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def group(self) -> int:
        """Weights that share a step and an offset."""
        return self.ladder_group or self.block_size

    def encode_on(self, x: Array, frame: Blocks) -> Blocks:
        xp = namespace(x)
        steps, offsets = self.ladder(frame)
        inner = (*x.shape[:-1], x.shape[-1] // self.group)
        q = plain(x).reshape(*inner, self.group) - offsets.reshape(inner)[..., None]
        with np.errstate(invalid="ignore"):  # 0 * Inf, where a step is that small
            q *= inverse_of(steps.reshape(inner))[..., None]
        xp.round(q, out=q)
        xp.clip(q, *self.code_range, out=q)
        codes = cast(q, self.code_dtype)
        return replace(frame, codes=codes.reshape(*x.shape[:-1], x.shape[-1] // self.block_size, self.block_size))
