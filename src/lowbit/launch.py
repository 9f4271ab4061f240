"""How this process was started: alone, or as one of several by torchrun or ``accelerate launch``."""

from __future__ import annotations

import os
import sys


def rank() -> int:
    """This process among all, from 0."""
    return _number("RANK", 0)


def local_rank() -> int:
    """This process among those of its machine, from 0."""
    return _number("LOCAL_RANK", 0)


def size() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return max(1, _number("WORLD_SIZE", 1))


def speaks() -> bool:
    """Whether what ends all processes is this one's to say: of several that fail together, one does."""
    if size() == 1:
        return True
    world = sys.modules.get("lowbit.train.world")  # not there: they all fail alike, before they meet
    return bool(world.is_first_to_speak()) if world is not None else rank() == 0


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else otherwise
