"""F16: IEEE half precision, rounded half to even; beyond 65504 it is Inf, as in ggml."""

from __future__ import annotations

import numpy as np

from lowbit.grid._array import cast, check_finite, plain
from lowbit.grid.base import Array, Blocks, Grid


class F16(Grid):
    name = "f16"
    ggml_type = 1
    block_size = 1
    block_bytes = 2

    def quantize(self, x: Array) -> Blocks:
        check_finite(x)
        return Blocks(codes=cast(plain(x), "float16"))

    def dequantize(self, blocks: Blocks) -> Array:
        return cast(blocks.codes, "float32")

    def pack(self, blocks: Blocks) -> np.ndarray:
        return np.ascontiguousarray(blocks.codes, "<f2").view(np.uint8)

    def unpack(self, raw: np.ndarray) -> Blocks:
        return Blocks(codes=np.ascontiguousarray(raw).view("<f2"))


GRID = F16()
