"""The plan in a run's record as the report shows it. The record is untrusted: what is not a plan is not shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.plan.curve import Curve
from lowbit.report.figures import mapping, number, sequence, text
from lowbit.units import format_bytes

_MOST_BYTES = float(1 << 60)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What the product takes: runtime, settings and total as text, rows of (what, size, why), and curves to plot."""

    runtime: str
    settings: str
    total: str
    rows: list[tuple[str, str, str]]
    lines: list[Curve]


def read(raw: Any) -> Planned | None:
    """None where the record has no plan, or half of one."""
    plan = mapping(raw)
    rows = [row for row in map(_row, sequence(plan.get("rows"))) if row]
    total, runtime, settings = _bytes(plan.get("total_bytes")), text(plan.get("runtime")), mapping(plan.get("settings"))
    if not rows or total is None or not runtime:
        return None
    slots, per_slot = number(settings.get("slots")), number(settings.get("context_per_slot"))
    said = f"{slots:,.0f} slots of up to {per_slot:,.0f} tokens" if slots and per_slot else ""
    lines = [line for line in map(_line, sequence(plan.get("curves"))) if line]
    return Planned(runtime=runtime, settings=said, total=format_bytes(total), rows=rows, lines=lines)


def _row(raw: Any) -> tuple[str, str, str] | None:
    row = mapping(raw)
    size, what = _bytes(row.get("bytes")), text(row.get("what"))
    return (what, format_bytes(size), text(row.get("why"))) if size is not None and what else None


def _line(raw: Any) -> Curve | None:
    line, points = mapping(raw), []
    for pair in sequence(mapping(raw).get("points")):
        x, y = (number(value) for value in [*sequence(pair), None, None][:2])
        if x is None or y is None or not 0 < x < _MOST_BYTES or not 0 <= y < _MOST_BYTES:
            return None
        points.append((int(x), int(y)))
    label = text(line.get("label"))
    return Curve(label=label[:40], points=tuple(points)) if label and len(points) > 1 else None


def _bytes(value: Any) -> float | None:
    size = number(value)
    return size if size is not None and 0 <= size < _MOST_BYTES else None
