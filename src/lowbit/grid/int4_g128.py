"""Symmetric 4-bit integers of compressed-tensors, groups of 128 weights. See _int4."""

from __future__ import annotations

from lowbit.grid._int4 import Int4


class Int4G128(Int4):
    name = "int4_g128"
    block_size = 128
    block_bytes = 2 + 64  # the scale, then 128 nibbles


GRID = Int4G128()
