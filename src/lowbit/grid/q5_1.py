"""Q5_1: 32 weights on 32 evenly spaced values from the least one up; a float16 scale, a float16 minimum, 5-bit codes.

Q4_1's rule with one bit more: the least weight of a block gets code 0, the greatest one 31. Source:
quantize_row_q5_1_ref and block_q5_1 in ggml (ggml-quants.c, ggml-common.h).
"""

from __future__ import annotations

import numpy as np

from lowbit.grid._array import as_rows, raw_blocks
from lowbit.grid._layout import fifth_bits, from_fifth_bits, halves, nibbles, put_halves, put_nibbles
from lowbit.grid.base import Blocks
from lowbit.grid.q4_1 import Q4_1


class Q5_1(Q4_1):
    name = "q5_1"
    ggml_type = 7
    block_bytes = 2 + 2 + 4 + 16  # the float16 scale, the float16 minimum, the fifth bits, then 32 nibbles
    min_code, max_code = 0, 31

    def pack(self, blocks: Blocks) -> np.ndarray:
        codes = np.asarray(blocks.codes).view(np.uint8)
        raw = np.empty((*codes.shape[:-1], self.block_bytes), np.uint8)
        put_halves(raw[..., :2], blocks.scales)
        put_halves(raw[..., 2:4], blocks.mins)
        raw[..., 4:8] = fifth_bits(codes)
        put_nibbles(raw[..., 8:], codes & 15)
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        codes = nibbles(raw[..., 8:]) | from_fifth_bits(raw[..., 4:8])
        return Blocks(codes=codes.view(np.int8), scales=halves(raw[..., :2]), mins=halves(raw[..., 2:4]))


GRID = Q5_1()
