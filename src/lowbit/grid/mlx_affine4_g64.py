"""MLX affine, 4 bits, groups of 64 weights. See _mlx_affine."""

from __future__ import annotations

from lowbit.grid._mlx_affine import MlxAffine


class MlxAffine4G64(MlxAffine):
    name = "mlx_affine4_g64"
    bits = 4
    block_size = 64
    block_bytes = 2 + 2 + 32  # the scale, the bias, then 64 codes of 4 bits


GRID = MlxAffine4G64()
