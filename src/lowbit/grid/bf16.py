"""BF16: the upper 16 bits of a float32, rounded half to even.

Source: ggml_compute_fp32_to_bf16 in ggml (ggml-impl.h).
"""

from __future__ import annotations

import numpy as np

from lowbit.grid._array import bf16_bits, bitcast, cast, check_finite, plain
from lowbit.grid.base import Array, Blocks, Grid


class BF16(Grid):
    name = "bf16"
    ggml_type = 30
    block_size = 1
    block_bytes = 2

    def quantize(self, x: Array) -> Blocks:
        check_finite(x)
        return Blocks(codes=bitcast(cast(bf16_bits(plain(x)), "int16"), "uint16"))

    def dequantize(self, blocks: Blocks) -> Array:
        bits = cast(bitcast(blocks.codes, "int16"), "int32")
        return bitcast(bits << 16, "float32")

    def pack(self, blocks: Blocks) -> np.ndarray:
        return np.ascontiguousarray(blocks.codes, "<u2").view(np.uint8)

    def unpack(self, raw: np.ndarray) -> Blocks:
        return Blocks(codes=np.ascontiguousarray(raw).view("<u2"))


GRID = BF16()
