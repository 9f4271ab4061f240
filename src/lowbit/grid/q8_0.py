"""Q8_0: 32 weights on 255 evenly spaced values; a float16 scale, and codes of 8 bits.

The largest magnitude of a block gets code 127 or -127. Source: quantize_row_q8_0_ref and block_q8_0 in ggml
(ggml-quants.c, ggml-common.h).
"""

from __future__ import annotations

import numpy as np

from lowbit.grid._array import ScaledGrid, as_blocks, as_rows, cast, extremes, inverse_of, raw_blocks
from lowbit.grid.base import Array, Blocks, namespace


class Q8_0(ScaledGrid):
    name = "q8_0"
    ggml_type = 8
    block_size = 32
    block_bytes = 2 + 32  # the float16 scale, then 32 signed bytes
    min_code, max_code = -127, 127

    def quantize(self, x: Array) -> Blocks:
        xp = namespace(x)
        blocks = as_blocks(x, self.block_size)  # (..., n_blocks, 32)
        low, high = extremes(blocks)
        magnitude = abs(xp.maximum(-low, high))
        # By an array: some torch backends divide by a number as a product with its inverse.
        d = magnitude / xp.full_like(magnitude, 127.0)  # (..., n_blocks) float32
        inverse = inverse_of(d)
        inverse[xp.isinf(inverse)] = 0.0  # a block this close to zero: ggml's cast of Inf and NaN to int8 gives 0
        q = blocks * inverse[..., None]
        # C's roundf, halves away from zero: the whole part, and once more the whole part of twice the rest (exact).
        codes = cast(q, "int8")
        q -= codes
        q *= 2.0
        codes += cast(q, "int8")
        return Blocks(codes=codes, scales=cast(d, "float16"))

    def pack(self, blocks: Blocks) -> np.ndarray:
        codes = np.asarray(blocks.codes)
        raw = np.empty((*codes.shape[:-1], self.block_bytes), np.uint8)
        raw[..., :2] = np.ascontiguousarray(blocks.scales, "<f2")[..., None].view(np.uint8)
        raw[..., 2:] = codes.view(np.uint8)
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        scales = np.ascontiguousarray(raw[..., :2]).view("<f2")[..., 0]
        return Blocks(codes=np.ascontiguousarray(raw[..., 2:]).view(np.int8), scales=scales)


GRID = Q8_0()
