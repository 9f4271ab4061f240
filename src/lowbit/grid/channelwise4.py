"""Symmetric 4-bit integers, one scale a row. See _channelwise."""

from __future__ import annotations

from lowbit.grid._channelwise import Channelwise


class Channelwise4(Channelwise):
    name = "channelwise4"
    bits = 4
    block_bytes = 2  # four codes
    min_code, max_code = -8, 7


GRID = Channelwise4()
