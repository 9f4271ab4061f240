"""Q5_K: 256 weights in 8 groups of 32; codes of 5 bits, a 6-bit scale and minimum a group, two float16 over those.

Q4_K's rule with one bit more, and with 17 tries to a group. Source: quantize_row_q5_K_ref, make_qkx2_quants and
block_q5_K in ggml (ggml-quants.c, ggml-common.h), without an importance matrix.
"""

from __future__ import annotations

import numpy as np

from lowbit.grid import q4_k
from lowbit.grid._array import as_rows, raw_blocks
from lowbit.grid._layout import fifth_bits, from_fifth_bits
from lowbit.grid.base import Blocks


class Q5_K(q4_k.Q4_K):
    name = "q5_k"
    ggml_type = 13
    block_bytes = 2 + 2 + 12 + 32 + 128  # Q4_K's, with the codes' fifth bits before the nibbles
    min_code, max_code = 0, 31
    first = -0.5
    tries = 16

    def pack(self, blocks: Blocks) -> np.ndarray:
        codes = np.asarray(blocks.codes).view(np.uint8)
        raw = np.empty((*codes.shape[:-1], self.block_bytes), np.uint8)
        q4_k.put_head(raw[..., :16], blocks)
        # A byte has the fifth bits of one weight of each group.
        raw[..., 16:48] = fifth_bits(codes.reshape(*codes.shape[:-1], 8, 32), axis=-2)[..., 0, :]
        raw[..., 48:] = q4_k.pack_nibbles(codes & 15)
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        high = as_rows(from_fifth_bits(raw[..., None, 16:48], axis=-2))
        return q4_k.unpack_head(raw[..., :16], q4_k.unpack_nibbles(raw[..., 48:]) | high)


GRID = Q5_K()
