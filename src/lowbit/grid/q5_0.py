"""Q5_0: 32 weights on 32 evenly spaced values; a float16 scale, and codes of 5 bits.

Q4_0's rule with one bit more: the largest weight of a block, sign included, gets code -16. Source:
quantize_row_q5_0_ref and block_q5_0 in ggml (ggml-quants.c, ggml-common.h).
"""

from __future__ import annotations

import numpy as np

from lowbit.grid._array import as_rows, raw_blocks
from lowbit.grid._layout import fifth_bits, from_fifth_bits, halves, nibbles, put_halves, put_nibbles
from lowbit.grid.base import Blocks
from lowbit.grid.q4_0 import Q4_0


class Q5_0(Q4_0):
    name = "q5_0"
    ggml_type = 6
    block_bytes = 2 + 4 + 16  # the float16 scale, the fifth bits, then 32 nibbles
    min_code, max_code = -16, 15

    def pack(self, blocks: Blocks) -> np.ndarray:
        unsigned = (np.asarray(blocks.codes) + np.int8(16)).view(np.uint8)
        raw = np.empty((*unsigned.shape[:-1], self.block_bytes), np.uint8)
        put_halves(raw[..., :2], blocks.scales)
        raw[..., 2:6] = fifth_bits(unsigned)
        put_nibbles(raw[..., 6:], unsigned & 15)
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        unsigned = nibbles(raw[..., 6:]) | from_fifth_bits(raw[..., 2:6])
        return Blocks(codes=unsigned.view(np.int8) - np.int8(16), scales=halves(raw[..., :2]))


GRID = Q5_0()
