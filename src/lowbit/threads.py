"""How threads wait for each other."""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Call before the first library that brings OpenMP (torch, llama.cpp) is loaded; what the user set stays.

    Threads that spin while they wait stall a run next to a busy neighbour; OpenMP reads these when it loads.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
