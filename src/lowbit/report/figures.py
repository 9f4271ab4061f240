"""Reading figures out of an untrusted record, and how they print.

A figure is shown with its interval and n, or not at all; so is one whose machine or artifact hash the record lacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

MISSING = "–"


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def number(value: Any) -> float | None:
    """A finite float, or None for anything else that a record may hold in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured value with its 95% interval.

    value, low, high: in the unit shown (a fraction that prints as percent is already times 100)
    n: how many things were measured (scored tokens, or repeats)
    """

    value: float
    low: float
    high: float
    n: int
    suffix: str = ""

    @property
    def digits(self) -> int:
        """Decimals that the interval supports: one significant digit of its half, two if the first is 1, 2 or 3."""
        half = (self.high - self.low) / 2
        if half <= 0:
            return 3 if abs(self.value) < 10 else 1
        exponent = math.floor(math.log10(half))
        return min(6, max(0, -exponent + (half / 10.0**exponent < 3.5)))

    def print(self, value: float) -> str:
        return f"{value:,.{self.digits}f}{self.suffix}"

    @property
    def short(self) -> str:
        return self.print(self.value)

    @property
    def interval(self) -> str:
        between = " to " if self.low < 0 else "–"  # a dash beside a minus is no sign any more
        return f"{self.low:,.{self.digits}f}{between}{self.high:,.{self.digits}f}"


def figure(raw: Any, *, percent: bool = False) -> Figure | None:
    """The figure in ``raw`` = {"value", "low", "high", "n"}, or None if a part of it is missing or makes no sense."""
    fields = mapping(raw)
    value, low, high = (number(fields.get(key)) for key in ("value", "low", "high"))
    count = number(fields.get("n"))
    if value is None or low is None or high is None or count is None or count < 1 or low > high:
        return None
    factor = 100.0 if percent else 1.0
    return Figure(
        value=value * factor,
        low=low * factor,
        high=high * factor,
        n=int(count),
        suffix=" %" if percent else "",
    )
