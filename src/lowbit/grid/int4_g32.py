"""Symmetric 4-bit integers of compressed-tensors, groups of 32 weights. See _int4."""

from __future__ import annotations

from lowbit.grid._int4 import Int4


class Int4G32(Int4):
    name = "int4_g32"
    block_size = 32
    block_bytes = 2 + 16  # the scale, then 32 nibbles


GRID = Int4G32()
