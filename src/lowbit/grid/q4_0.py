"""Q4_0: 32 weights on 16 evenly spaced values; a float16 scale, and codes of 4 bits.

The largest weight of a block, sign included, gets code -8. Source: quantize_row_q4_0_ref and block_q4_0 in ggml
(ggml-quants.c, ggml-common.h).
"""

from __future__ import annotations

import numpy as np

from lowbit.grid._array import ScaledGrid, as_blocks, as_rows, cast, extremes, first_extreme, inverse_of, raw_blocks
from lowbit.grid._layout import halves, nibbles, put_halves, put_nibbles
from lowbit.grid.base import Array, Blocks, namespace


class Q4_0(ScaledGrid):
    name = "q4_0"
    ggml_type = 2
    block_size = 32
    block_bytes = 2 + 16  # the float16 scale, then 32 nibbles
    min_code, max_code = -8, 7

    def quantize(self, x: Array) -> Blocks:
        xp = namespace(x)
        blocks = as_blocks(x, self.block_size)  # (..., n_blocks, 32)
        # (..., n_blocks) float32; -0.0 for a block of zeros, as in ggml
        d = _signed_extreme(xp, blocks) / float(self.min_code)
        inverse = inverse_of(d)
        overflows = xp.isinf(inverse)
        inverse[overflows] = 0.0
        q = blocks * inverse[..., None]
        q += 0.5 - self.min_code
        xp.clip(q, None, self.max_code - self.min_code + 0.5, out=q)
        codes = cast(q, "int8")  # truncates; q is above zero
        codes += self.min_code
        if overflows.any():  # a block this close to zero: ggml's cast of Inf and NaN to int8 gives 0, the lowest code
            codes[overflows] = self.min_code
        return Blocks(codes=codes, scales=cast(d, "float16"))

    def pack(self, blocks: Blocks) -> np.ndarray:
        unsigned = (np.asarray(blocks.codes) + np.int8(8)).view(np.uint8)
        raw = np.empty((*unsigned.shape[:-1], self.block_bytes), np.uint8)
        put_halves(raw[..., :2], blocks.scales)
        put_nibbles(raw[..., 2:], unsigned)
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        codes = nibbles(raw[..., 2:]).view(np.int8)
        codes -= 8
        return Blocks(codes=codes, scales=halves(raw[..., :2]))


def _signed_extreme(xp: Array, blocks: Array) -> Array:
    """The first element of largest magnitude, with its sign: (..., n_blocks)."""
    low, high = extremes(blocks)
    extreme = xp.where(-low > high, low, high)
    tied = -low == high
    if tied.any():  # both signs reach the magnitude: the first of them counts; rare, so the search pays only here
        extreme[tied] = first_extreme(blocks[tied]) + 0.0  # a block of zeros: never -0.0
    return extreme


GRID = Q4_0()
