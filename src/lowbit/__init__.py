"""lowbit: take an open-weight language model to the low-bit artifact that will ship, and prove it.

Every verb of the command line is a function here, imported when first used, so that ``import lowbit`` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_VERBS = (
    "ship", "train", "reference", "calibrate", "pack", "imatrix", "inspect", "plan", "measure", "check", "report",
    "batch",
)  # fmt: skip

__all__ = ["__version__", *_VERBS]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    return importlib.import_module(f"lowbit.{name}")
