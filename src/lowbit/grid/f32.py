"""F32: as it is."""

from __future__ import annotations

import numpy as np

from lowbit.grid._array import check_finite, plain
from lowbit.grid.base import Array, Blocks, Grid


class F32(Grid):
    name = "f32"
    ggml_type = 0
    block_size = 1
    block_bytes = 4

    def quantize(self, x: Array) -> Blocks:
        check_finite(x)
        return Blocks(codes=plain(x))

    def dequantize(self, blocks: Blocks) -> Array:
        return blocks.codes

    def pack(self, blocks: Blocks) -> np.ndarray:
        return np.ascontiguousarray(blocks.codes, "<f4").view(np.uint8)

    def unpack(self, raw: np.ndarray) -> Blocks:
        return Blocks(codes=np.ascontiguousarray(raw).view("<f4"))


GRID = F32()
