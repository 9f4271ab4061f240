"""A clock that stands still while neighbours work: training's budget in CPU time of the one thread that it has."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


@contextlib.contextmanager
def cpu_clock() -> Iterator[None]:
    """Within the block ``time.monotonic`` counts this process's CPU time, all its threads together."""
    real = time.monotonic
    time.monotonic = time.process_time
    try:
        yield
    finally:
        time.monotonic = real
