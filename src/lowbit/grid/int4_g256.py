"""Symmetric 4-bit integers, groups of 256 weights: the per-layer embeddings of Gemma's mobile schema. See _int4."""

from __future__ import annotations

from lowbit.grid._int4 import Int4


class Int4G256(Int4):
    name = "int4_g256"
    block_size = 256
    block_bytes = 2 + 128  # the scale, then 256 nibbles


GRID = Int4G256()
