"""Symmetric 8-bit integers, one scale a row. See _channelwise."""

from __future__ import annotations

from lowbit.grid._channelwise import Channelwise


class Channelwise8(Channelwise):
    name = "channelwise8"
    bits = 8
    block_bytes = 4  # four codes
    min_code, max_code = -128, 127


GRID = Channelwise8()
