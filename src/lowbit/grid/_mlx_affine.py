"""MLX's affine quantization: codes of 4 or 8 bits, and a scale and a bias a group of 32 or 64 weights.

value = scale * code + bias. The edge of a group that is farther from zero is met exactly: it is the bias, and the scale
is such that zero is a code too. Computed in float32, whatever the dtype of the weights; scales and biases are then
stored in that dtype. Source: quantize in mlx/backend/cpu/quantized.cpp and affine_quantize in mlx/ops.cpp.

``dequantize`` gives what MLX computes with in float32. On weights of 16 bits the kernels of the CPU
round the product, and then the sum, to 16 bits; Metal's (mlx/backend/metal/kernels/quantized.h) round the sum alone,
before 0.32.1 both.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from lowbit.grid._array import ScaledGrid, as_blocks, as_rows, cast, extremes, raw_blocks, round_to
from lowbit.grid._ladder import LadderGrid
from lowbit.grid._layout import halves, pairs, put_halves, put_pairs
from lowbit.grid.base import Array, Blocks, namespace
from lowbit.grid.q4_0 import Q4_0
from lowbit.grid.q8_0 import Q8_0

_EPSILON = float(np.float32(1e-7))  # the least scale


class _Q4G64(Q4_0):
    block_size = 64


class _Q8G64(Q8_0):
    block_size = 64


_SYMMETRIC: dict[tuple[int, int], ScaledGrid] = {
    (4, 32): Q4_0(), (4, 64): _Q4G64(), (8, 32): Q8_0(), (8, 64): _Q8G64(),
}  # fmt: skip


class MlxAffine(LadderGrid):
    """Codes are uint8, from 0 up; min_code and max_code stay 0, as 255 is no int8."""

    ggml_type = None
    code_dtype = "uint8"
    bits: ClassVar[int]

    @property
    def top(self) -> int:
        """The greatest code."""
        return (1 << self.bits) - 1

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, self.top

    @property
    def zero(self) -> int:
        """The code that stands for 0 where a group is symmetric, that is where its bias is ``-zero`` scales."""
        return 1 << (self.bits - 1)

    @property
    def symmetric(self) -> ScaledGrid:
        """Codes from ``-zero`` up times a scale, in groups of the same size: what a bias of ``-zero`` scales makes."""
        return _SYMMETRIC[self.bits, self.block_size]

    def quantize(self, x: Array, scale_dtype: str = "F16") -> Blocks:
        """MLX's own rounding of ``x`` (..., n) float32; with numbers that ``scale_dtype`` holds, of a tensor of it.

        scale_dtype: 'F16' gives float16 scales and mins, 'BF16' and 'F32' float32 ones that the dtype holds.
        Raises BadFile on NaN or Inf.
        """
        xp = namespace(x)
        blocks = as_blocks(x, self.block_size)
        low, high = extremes(blocks)
        with np.errstate(all="ignore"):  # beyond float32 MLX computes with Inf too
            # By an array: some torch backends divide by a number as a product with its inverse.
            scales = xp.clip((high - low) / xp.full_like(low, float(self.top)), _EPSILON, None)
            from_low = abs(low) > abs(high)
            scales = xp.where(from_low, scales, -scales)
            edges = xp.where(from_low, low, high)
            steps = xp.round(edges / scales)
            moved = steps != 0
            scales = xp.where(moved, edges / steps, scales)
            mins = xp.where(moved, edges, xp.zeros_like(edges))
            q = blocks - mins[..., None]
            q /= scales[..., None]
            xp.round(q, out=q)
            xp.clip(q, 0, self.top, out=q)
        flat = scales == 0  # a group of one huge number: C's cast of 0 / 0 leaves code 0
        if flat.any():
            q[flat] = 0.0
        return Blocks(codes=cast(q, "uint8"), scales=round_to(scales, scale_dtype), mins=round_to(mins, scale_dtype))

    def dequantize(self, blocks: Blocks) -> Array:
        values = cast(blocks.codes, "float32")
        with np.errstate(invalid="ignore", over="ignore"):  # 0 * Inf and Inf - Inf: NaN, as in the runtime
            values *= cast(blocks.scales, "float32")[..., None]
            values += cast(blocks.mins, "float32")[..., None]
        return as_rows(values)

    def ladder(self, blocks: Blocks) -> tuple[Array, Array]:
        return cast(blocks.scales, "float32"), cast(blocks.mins, "float32")

    def pack_codes(self, codes: Array) -> np.ndarray:
        """Codes (..., n_blocks, block_size) as MLX's uint32 words hold them, little endian: (..., n_blocks, bytes)."""
        unsigned = np.asarray(codes)
        if self.bits == 8:
            return np.ascontiguousarray(unsigned)
        raw = np.empty((*unsigned.shape[:-1], unsigned.shape[-1] // 2), np.uint8)
        put_pairs(raw, unsigned)
        return raw

    def unpack_codes(self, raw: np.ndarray) -> np.ndarray:
        """The inverse of ``pack_codes``."""
        return np.ascontiguousarray(raw) if self.bits == 8 else pairs(raw)

    def pack(self, blocks: Blocks) -> np.ndarray:
        """A block's float16 scale, its float16 bias, its codes. MLX keeps the three in tensors of their own."""
        codes = self.pack_codes(blocks.codes)
        raw = np.empty((*codes.shape[:-1], self.block_bytes), np.uint8)
        put_halves(raw[..., :2], blocks.scales)
        put_halves(raw[..., 2:4], blocks.mins)
        raw[..., 4:] = codes
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        return Blocks(codes=self.unpack_codes(raw[..., 4:]), scales=halves(raw[..., :2]), mins=halves(raw[..., 2:4]))
