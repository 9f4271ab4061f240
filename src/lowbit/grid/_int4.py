"""compressed-tensors' symmetric 4-bit integers (w4a16): codes from -8 to 7 times one scale a group.

The scale is the largest magnitude over 7.5, in the weights' own dtype, and so is the quotient that is rounded to a
code: on BF16 weights some codes differ from the nearest ones. Source: calculate_qparams in
compressed_tensors/quantization/utils/helpers.py, _quantize in quantization/lifecycle/forward_helpers.py, and
compressors/pack_quantized for the order of codes in a word.

``dequantize`` is code times scale in float32; the library rounds it once to the dtype of the scales.
"""

from __future__ import annotations

import numpy as np

from lowbit.grid._array import ScaledGrid, as_blocks, as_rows, cast, extremes, raw_blocks, round_to
from lowbit.grid._layout import halves, pairs, put_halves, put_pairs
from lowbit.grid.base import Array, Blocks, namespace

_EPSILON = {"F16": 2.0**-10, "BF16": 2.0**-7, "F32": 2.0**-23}  # torch.finfo's: the scale of a group of zeros


def symmetric(blocks: Array, min_code: int, max_code: int, scale_dtype: str) -> Blocks:
    """compressed-tensors' symmetric rounding of (..., n_blocks, weights) float32 to codes of any number of bits."""
    xp = namespace(blocks)
    low, high = extremes(blocks)
    magnitude = xp.maximum(abs(low), abs(high))
    # By an array: some torch backends divide by a number as a product with its inverse.
    scales = round_to(magnitude / xp.full_like(magnitude, (max_code - min_code) / 2), scale_dtype)
    scales[scales == 0] = _EPSILON[scale_dtype]
    q = cast(round_to(blocks / cast(scales, "float32")[..., None], scale_dtype), "float32")
    q = xp.round(xp.clip(q, min_code, max_code))
    return Blocks(codes=cast(q, "int8"), scales=scales)


class Int4(ScaledGrid):
    ggml_type = None
    min_code, max_code = -8, 7

    def quantize(self, x: Array, scale_dtype: str = "F16") -> Blocks:
        """compressed-tensors' own rounding of ``x`` (..., n) float32; with numbers that ``scale_dtype`` holds, of a
        tensor of it.

        scale_dtype: 'F16' gives float16 scales, 'BF16' and 'F32' float32 ones that the dtype holds.
        Raises BadFile on NaN or Inf.
        """
        return symmetric(as_blocks(x, self.block_size), self.min_code, self.max_code, scale_dtype)

    def pack_codes(self, codes: Array) -> np.ndarray:
        """Codes (..., n_blocks, block_size) as weight_packed's int32 words hold them, little endian:
        (..., n_blocks, block_size / 2) uint8."""
        unsigned = (np.asarray(codes) + np.int8(8)).view(np.uint8)
        raw = np.empty((*unsigned.shape[:-1], unsigned.shape[-1] // 2), np.uint8)
        put_pairs(raw, unsigned)
        return raw

    def unpack_codes(self, raw: np.ndarray) -> np.ndarray:
        """The inverse of ``pack_codes``."""
        codes = pairs(raw).view(np.int8)
        codes -= 8
        return codes

    def pack(self, blocks: Blocks) -> np.ndarray:
        """A block's float16 scale, then its codes. compressed-tensors keeps the two in tensors of their own."""
        codes = self.pack_codes(blocks.codes)
        raw = np.empty((*codes.shape[:-1], self.block_bytes), np.uint8)
        put_halves(raw[..., :2], blocks.scales)
        raw[..., 2:] = codes
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        return Blocks(codes=self.unpack_codes(raw[..., 2:]), scales=halves(raw[..., :2]))
