"""A figure and what it takes to believe it: interval, count, the machine it was measured on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import memory

# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured value with its 95% interval.

    value, low, high: in ``unit``; low == high == value where nothing was estimated (a count, a size)
    n:                how many observations it rests on
    """

    value: float
    low: float
    high: float
    unit: str = ""
    n: int = 1

    def as_json(self) -> dict[str, Any]:
        """{"value", "low", "high", "unit", "n"}"""
        return {"value": self.value, "low": self.low, "high": self.high, "unit": self.unit, "n": self.n}


def exact(value: float, unit: str = "", n: int = 1) -> Figure:
    """A count or a size: nothing to estimate."""
    return Figure(value=value, low=value, high=value, unit=unit, n=n)


def repeated(values: list[float], unit: str) -> Figure:
    """The mean of repeated measurements with Student's t interval, cut at zero. At least two values."""
    mean = float(np.mean(values))
    t = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else 1.96
    half = t * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Figure(value=mean, low=max(0.0, mean - half), high=mean + half, unit=unit, n=len(values))


def as_json(figures: Mapping[str, Figure | None]) -> dict[str, Any]:
    """Figures by name as JSON, None where one is not known."""
    return {name: figure.as_json() if figure else None for name, figure in figures.items()}


def machine() -> dict[str, Any]:
    """Where it was measured: processor, physical cores, memory, operating system, versions of what computed."""
    from lowbit.threads import available_cores

    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory_bytes": memory.total_bytes(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "xllamacpp": metadata.version("xllamacpp"),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
