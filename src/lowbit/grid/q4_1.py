"""Q4_1: 32 weights on 16 evenly spaced values from the least one up; a float16 scale, a float16 minimum, 4-bit codes.

value = scale * code + minimum: the least weight of a block gets code 0, the greatest one 15. Source:
quantize_row_q4_1_ref and block_q4_1 in ggml (ggml-quants.c, ggml-common.h).
"""

from __future__ import annotations

import numpy as np

from lowbit.grid._array import as_blocks, as_rows, cast, extremes, first_least, inverse_of, raw_blocks
from lowbit.grid._ladder import LadderGrid
from lowbit.grid._layout import halves, nibbles, put_halves, put_nibbles
from lowbit.grid.base import Array, Blocks, namespace


class Q4_1(LadderGrid):
    name = "q4_1"
    ggml_type = 3
    block_size = 32
    block_bytes = 2 + 2 + 16  # the float16 scale, the float16 minimum, then 32 nibbles
    min_code, max_code = 0, 15
    ladder_group = 32

    def quantize(self, x: Array) -> Blocks:
        xp = namespace(x)
        blocks = as_blocks(x, self.block_size)  # (..., n_blocks, 32)
        low, high = extremes(blocks)
        with np.errstate(over="ignore", invalid="ignore"):  # a range beyond float32 is Inf, in ggml too
            spread = high - low
            spread += 0.0  # zeros of two signs: never -0.0
            # By an array: some torch backends divide by a number as a product with its inverse.
            d = spread / xp.full_like(spread, float(self.max_code))  # (..., n_blocks) float32
            inverse = inverse_of(d)
            q = blocks - low[..., None]
            q *= inverse[..., None]
        q += 0.5
        wild = xp.isinf(inverse) | xp.isinf(d)
        if wild.any():  # almost no range, or too much: ggml's cast of Inf and NaN to an integer gives 0
            q[wild] = 0.0
        xp.clip(q, None, self.max_code + 0.5, out=q)
        zero = low == 0
        if zero.any():  # zeros have two signs, and ggml stores the first one's
            low[zero] = first_least(blocks[zero])
        return Blocks(codes=cast(q, "int8"), scales=cast(d, "float16"), mins=cast(low, "float16"))

    def dequantize(self, blocks: Blocks) -> Array:
        values = cast(blocks.codes, "float32")
        with np.errstate(invalid="ignore"):  # 0 * Inf and Inf - Inf, beyond float16: NaN, as in the runtime
            values *= cast(blocks.scales, "float32")[..., None]
            values += cast(blocks.mins, "float32")[..., None]
        return as_rows(values)

    def ladder(self, blocks: Blocks) -> tuple[Array, Array]:
        return cast(blocks.scales, "float32"), cast(blocks.mins, "float32")

    def pack(self, blocks: Blocks) -> np.ndarray:
        codes = np.asarray(blocks.codes).view(np.uint8)
        raw = np.empty((*codes.shape[:-1], self.block_bytes), np.uint8)
        put_halves(raw[..., :2], blocks.scales)
        put_halves(raw[..., 2:4], blocks.mins)
        put_nibbles(raw[..., 4:], codes)
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        codes = nibbles(raw[..., 4:]).view(np.int8)
        return Blocks(codes=codes, scales=halves(raw[..., :2]), mins=halves(raw[..., 2:4]))


GRID = Q4_1()
