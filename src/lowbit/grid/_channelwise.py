"""Symmetric integers of 2, 4 or 8 bits with one scale a row: an output channel of a matrix, a token of an embedding.

What Gemma's checkpoints for phones store, and transformers and LiteRT execute: value = code * scale, no zero point. A
scale is float32; training keeps to scales that BF16 holds, so that float16 holds every value of 2 and 4 bits. Codes are
in bytes from the lowest bits up, plus 2 or 8, or as they are (8 bits). Source: _unpack_int2, _unpack_int4 and
QuantizedLinear in transformers/integrations/gemma_quant.py. It does not round; the rounding here is compressed-tensors'
(see _int4) with the strategy ``channel``.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from lowbit.errors import Unsupported
from lowbit.grid._array import ScaledGrid, cast, plain
from lowbit.grid._int4 import symmetric
from lowbit.grid.base import Array, Blocks


class Channelwise(ScaledGrid):
    ggml_type = None
    bits: ClassVar[int]
    block_size = 4  # what a row is a multiple of
    whole_rows = True
    scale_bytes = 4
    scale_dtype = "BF16"

    def quantize(self, x: Array, scale_dtype: str = "F32") -> Blocks:
        """compressed-tensors' own rounding of ``x`` (..., n) float32; with numbers that ``scale_dtype`` holds, of a
        tensor of it. Scales are float32 numbers, float16 for 'F16'. Raises BadFile on NaN or Inf."""
        return symmetric(self._as_blocks(x), self.min_code, self.max_code, scale_dtype)

    def pack_codes(self, codes: Array) -> np.ndarray:
        """Codes (..., n) int8 as the runtime stores them: (..., n * bits / 8) uint8."""
        codes = np.asarray(codes)
        if self.bits == 8:
            return np.ascontiguousarray(codes).view(np.uint8)
        unsigned = (codes - np.int8(self.min_code)).view(np.uint8)
        raw = np.zeros((*codes.shape[:-1], codes.shape[-1] * self.bits // 8), np.uint8)
        for i in range(8 // self.bits):
            raw |= unsigned[..., i :: 8 // self.bits] << np.uint8(i * self.bits)
        return raw

    def unpack_codes(self, raw: np.ndarray) -> np.ndarray:
        """The inverse of ``pack_codes``."""
        if self.bits == 8:
            return np.ascontiguousarray(raw).view(np.int8)
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
        codes = (raw[..., None] >> shifts & np.uint8((1 << self.bits) - 1)).view(np.int8)
        codes += np.int8(self.min_code)
        return codes.reshape(*raw.shape[:-1], raw.shape[-1] * 8 // self.bits)

    def pack(self, blocks: Blocks) -> np.ndarray:
        """A row's float32 scale, then its codes. The runtimes keep the two in tensors of their own."""
        codes = self.pack_codes(np.asarray(blocks.codes)[..., 0, :])
        scales = np.ascontiguousarray(cast(blocks.scales, "float32"), "<f4").view(np.uint8)
        return np.concatenate([scales, codes], axis=-1)

    def unpack(self, raw: np.ndarray) -> Blocks:
        scales = np.ascontiguousarray(raw[..., : self.scale_bytes]).view("<f4")
        return Blocks(codes=self.unpack_codes(raw[..., self.scale_bytes :])[..., None, :], scales=scales)

    def _as_blocks(self, x: Array) -> Array:
        if x.shape[-1] % self.block_size:
            found, expected = f"rows of {x.shape[-1]}", f"a multiple of {self.block_size}"
            raise Unsupported("the rows are not whole bytes", found=found, expected=expected)
        return plain(x)[..., None, :]
