"""MLX affine, 8 bits, groups of 64 weights. See _mlx_affine."""

from __future__ import annotations

from lowbit.grid._mlx_affine import MlxAffine


class MlxAffine8G64(MlxAffine):
    name = "mlx_affine8_g64"
    bits = 8
    block_size = 64
    block_bytes = 2 + 2 + 64  # the scale, the bias, then 64 codes of 8 bits


GRID = MlxAffine8G64()
