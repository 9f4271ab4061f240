"""MLX affine, 8 bits, groups of 32 weights. See _mlx_affine."""

from __future__ import annotations

from lowbit.grid._mlx_affine import MlxAffine


class MlxAffine8G32(MlxAffine):
    name = "mlx_affine8_g32"
    bits = 8
    block_size = 32
    block_bytes = 2 + 2 + 32  # the scale, the bias, then 32 codes of 8 bits


GRID = MlxAffine8G32()
