"""Symmetric 2-bit integers, one scale a row. See _channelwise."""

from __future__ import annotations

from lowbit.grid._channelwise import Channelwise


class Channelwise2(Channelwise):
    name = "channelwise2"
    bits = 2
    block_bytes = 1  # four codes
    min_code, max_code = -2, 1


GRID = Channelwise2()
