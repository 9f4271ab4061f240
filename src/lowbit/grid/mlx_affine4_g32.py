"""MLX affine, 4 bits, groups of 32 weights. See _mlx_affine."""

from __future__ import annotations

from lowbit.grid._mlx_affine import MlxAffine


class MlxAffine4G32(MlxAffine):
    name = "mlx_affine4_g32"
    bits = 4
    block_size = 32
    block_bytes = 2 + 2 + 16  # the scale, the bias, then 32 codes of 4 bits


GRID = MlxAffine4G32()
