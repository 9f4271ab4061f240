"""Q2_K: 256 weights in 16 groups of 16; codes of 2 bits, a 4-bit scale and minimum a group, two float16 over those.

As Q4_K, but for the numbers, and that in the search for a group's scale and minimum (17 tries) weights count by their
magnitude and errors by theirs. Source: quantize_row_q2_K_ref, make_qkx2_quants (use_mad) and block_q2_K in ggml
(ggml-quants.c, ggml-common.h), without an importance matrix.
"""

from __future__ import annotations

import numpy as np

from lowbit.grid import q4_k
from lowbit.grid._array import as_rows, cast, raw_blocks
from lowbit.grid._layout import halves, put_halves
from lowbit.grid.base import Array, Blocks


class Q2_K(q4_k.Q4_K):
    name = "q2_k"
    ggml_type = 10
    block_bytes = 16 + 64 + 2 + 2  # a byte a group, the codes, float16 scale and minimum
    min_code, max_code = 0, 3
    ladder_group = 16
    first = -0.5
    tries = 16
    by_magnitude = True

    def pack(self, blocks: Blocks) -> np.ndarray:
        codes, scales, mins = (
            np.asarray(part).view(np.uint8) for part in (blocks.codes, blocks.sub_scales, blocks.sub_mins)
        )
        raw = np.empty((*codes.shape[:-1], self.block_bytes), np.uint8)
        raw[..., :16] = scales | mins << 4
        # Of 128 weights each: a byte has one of each 32, the first in the lowest bits.
        quarters = codes.reshape(*codes.shape[:-1], 2, 4, 32)
        packed = quarters[..., 0, :] | quarters[..., 1, :] << 2 | quarters[..., 2, :] << 4 | quarters[..., 3, :] << 6
        raw[..., 16:80] = as_rows(packed)
        put_halves(raw[..., 80:82], blocks.scales)
        put_halves(raw[..., 82:], blocks.mins)
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        packed = raw[..., 16:80].reshape(*raw.shape[:-1], 2, 1, 32)
        codes = packed >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
        return Blocks(
            codes=codes.reshape(*raw.shape[:-1], 256).view(np.int8),
            scales=halves(raw[..., 80:82]),
            mins=halves(raw[..., 82:]),
            sub_scales=(raw[..., :16] & 15).view(np.int8),
            sub_mins=(raw[..., :16] >> 4).view(np.int8),
        )

    def _levels(self, xp: Array, scale: Array, minimum: Array) -> tuple[Array, ...]:
        d, sub_scales = q4_k.levels(xp, scale, 15)
        d_min, sub_mins = q4_k.levels(xp, minimum, 15)
        # A byte holds both: what overflowed in one reaches into the other.
        both = (sub_scales | sub_mins << 4) & 255
        return d, d_min, cast(both & 15, "float32"), cast(both >> 4, "float32")


GRID = Q2_K()
