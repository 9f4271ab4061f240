"""Plots as inline SVG. Every label passes through markupsafe; colours and fonts come from the page's style sheet.

A plot is drawn for a given width in CSS pixels and never scaled up, so that its text keeps its size: the page holds
one for wide and one for narrow screens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lowbit.report.figures import Figure

WIDE, NARROW = 880, 320
_LETTER = 8.4  # CSS pixels of a name's letter
_LETTERS = 32  # of a name, at most

# A series of an interval plot has a shape as well as a colour, so that it can be told without seeing the colour.
SERIES = {
    "model": '<circle class="mark s-model" cx="{x}" cy="{y}" r="5"/>',
    "naive": '<rect class="mark s-naive" x="{x0}" y="{y0}" width="9" height="9"/>',
    "calibrated": '<path class="mark s-calibrated" d="M{x} {ya}L{xb} {y}L{x} {yb}L{xa} {y}Z"/>',
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of an interval plot: a label, a series (naive, calibrated, model) and its figure."""

    label: str
    series: str
    figure: Figure


def ticks(high: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to the first one at or above ``high``, in steps of 1, 2 or 5 times a power of ten."""
    if high <= 0:
        return [0.0, 1.0]
    raw = high / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def tick_label(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".") if abs(value) < 1e6 else f"{value:.0e}"


def interval_plot(rows: Sequence[Row], axis: str, *, width: int = WIDE) -> Markup:
    """Values with their 95% intervals on a common axis from 0, labelled in place."""
    narrow = width < 600
    left, right, top, row_height = (8, 60, 4, 52) if narrow else (_room([row.label for row in rows]), 90, 8, 38)
    marks = ticks(max(row.figure.high for row in rows), 4 if narrow else 6)
    bottom = top + row_height * len(rows)
    scale = (width - left - right) / marks[-1]

    parts = [x_axis(marks, scale, left, top, bottom), axis_title(axis, left, bottom + 40)]
    for index, row in enumerate(rows):
        y = top + row_height * index + (36 if narrow else row_height / 2)
        parts.append(_interval_row(row, left, scale, y, label_above=narrow))
    label = axis + ": " + "; ".join(f"{r.label} {r.figure.short} ({r.figure.interval})" for r in rows)
    return svg(width, bottom + 48, label, parts)


def _room(names: Sequence[str]) -> int:
    """Where the plot begins that these stand to the left of."""
    return max(150, 14 + math.ceil(_LETTER * max(len(_shortened(name)) for name in names)))


def _shortened(name: str) -> str:
    """Its beginning and its end, which says the format."""
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS // 2 - 1]}…{name[-_LETTERS // 2 :]}"


def _interval_row(row: Row, left: float, scale: float, y: float, *, label_above: bool) -> Markup:
    figure, series = row.figure, row.series if row.series in SERIES else "model"
    low, x, high = (left + max(0.0, v) * scale for v in (figure.low, figure.value, figure.high))
    name = (
        Markup('<text class="name" x="{}" y="{}">{}</text>').format(left, place(y - 16), _shortened(row.label))
        if label_above
        else Markup('<text class="name" text-anchor="end" x="{}" y="{}">{}</text>').format(
            left - 14, place(y + 5), _shortened(row.label)
        )
    )
    # A line from low to high with a cap at each end, so that a narrow interval still shows beside its mark.
    caps = Markup("M{0} {2}V{3}M{0} {1}H{4}M{4} {2}V{3}").format(
        place(low), place(y), place(y - 9), place(y + 9), place(high)
    )
    line = Markup('<path class="range s-{}" d="{}"/>').format(series, caps)
    value = Markup('<text class="value" x="{}" y="{}">{}</text>').format(place(high + 12), place(y + 5), figure.short)
    return name + line + _mark(series, x, y) + value


def _mark(series: str, x: float, y: float) -> Markup:
    return Markup(SERIES[series]).format(
        x=place(x),
        y=place(y),
        x0=place(x - 4.5),
        y0=place(y - 4.5),
        xa=place(x - 6),
        xb=place(x + 6),
        ya=place(y - 6),
        yb=place(y + 6),
    )


def bar_plot(rows: Sequence[tuple[str, str, float, str]], axis: str, *, width: int = WIDE) -> Markup:
    """Horizontal bars from 0. Each row: label, series, value, and the value as printed."""
    narrow = width < 600
    left, right, top, row_height = (8, 92, 4, 50) if narrow else (_room([name for name, *_ in rows]), 90, 8, 34)
    scale = (width - left - right) / (max(value for _, _, value, _ in rows) or 1.0)
    parts = []
    for index, (name, series, value, printed) in enumerate(rows):
        y = top + row_height * index + (36 if narrow else row_height / 2)
        anchor, x, y_name = ("start", left, y - 15) if narrow else ("end", left - 14, y + 5)
        length = max(1.0, value * scale)
        parts += [
            Markup('<text class="name" text-anchor="{}" x="{}" y="{}">{}</text>').format(
                anchor, x, place(y_name), _shortened(name)
            ),
            Markup('<rect class="bar s-{}" x="{}" y="{}" width="{}" height="16" rx="2"/>').format(
                series, left, place(y - 8), place(length)
            ),
            Markup('<text class="value" x="{}" y="{}">{}</text>').format(
                place(left + length + 8), place(y + 5), printed
            ),
        ]
    label = axis + ": " + "; ".join(f"{name} {printed}" for name, _, _, printed in rows)
    return svg(width, top + row_height * len(rows) + 6, label, parts)


def curve_plot(
    loss: Sequence[tuple[float, float]], kld: Sequence[tuple[float, float]], *, width: int = WIDE, height: int = 300
) -> Markup:
    """Loss and KLD against minutes, both in nats per token. Points are (minutes, nats)."""
    left, right, top, bottom = 52, 96, 28, height - 48
    x_marks = ticks(max(x for x, _ in [*loss, *kld]), 6 if width >= 600 else 3)
    y_marks = ticks(max(y for _, y in [*loss, *kld]), 5)
    x_scale, y_scale = (width - left - right) / x_marks[-1], (bottom - top) / y_marks[-1]

    parts = [x_axis(x_marks, x_scale, left, top, bottom, lines=False)]
    for mark in y_marks:
        y = bottom - mark * y_scale
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(left, place(y), width - right))
        parts.append(
            Markup('<text class="tick" text-anchor="end" x="{}" y="{}">{}</text>').format(
                left - 8, place(y + 4), tick_label(mark)
            )
        )
    parts.append(Markup('<text class="axis" x="4" y="14">nats per token</text>'))
    parts.append(axis_title("minutes of training", left, bottom + 40))

    ends = []
    for name, series, points in (("loss", "loss", loss), ("KLD, held out", "model", kld)):
        if not points:
            continue
        places = [(left + x * x_scale, bottom - max(0.0, y) * y_scale) for x, y in points]
        path = "M" + "L".join(f"{place(x)} {place(y)}" for x, y in places)
        parts.append(Markup('<path class="line s-{}" d="{}"/>').format(series, path))
        if series == "model" and len(places) <= 40:
            parts += [
                Markup('<circle class="mark s-model" cx="{}" cy="{}" r="3.5"/>').format(place(x), place(y))
                for x, y in places
            ]
        ends.append([places[-1][1], places[-1][0], name, series])
    parts += end_labels(ends)
    return svg(width, height, "Training loss and KLD against minutes", parts)


def end_labels(ends: list[list[Any]], lowest: float = math.inf) -> list[Markup]:
    """Each line's name at its right end, pushed apart if they would touch, and none below ``lowest``."""
    ends.sort()
    for above, below in itertools.pairwise(ends):
        below[0] = max(below[0], above[0] + 17)
    for below in reversed(ends):
        below[0] = min(below[0], lowest)
        lowest = below[0] - 17
    return [
        Markup('<text class="name t-{}" x="{}" y="{}">{}</text>').format(series, place(x + 8), place(y + 4), name)
        for y, x, name, series in ends
    ]


def key_below(ends: list[list[Any]], left: float, top: float) -> list[Markup]:
    """The lines' names below the plot, the highest line first, where there is no room beside it."""
    found = []
    for i, (_, _, name, series) in enumerate(sorted(ends)):
        y = top + 20 * i + 8
        found.append(Markup('<path class="line s-{}" d="M{} {}H{}"/>').format(series, left, place(y), left + 22))
        found.append(Markup('<text class="name" x="{}" y="{}">{}</text>').format(left + 30, place(y + 4), name))
    return found


def x_axis(
    marks: Sequence[float],
    scale: float,
    left: float,
    top: float,
    bottom: float,
    *,
    lines: bool = True,
    label: Callable[[float], str] = tick_label,
) -> Markup:
    out = Markup("")
    for mark in marks:
        x = place(left + mark * scale)
        if lines:
            out += Markup('<path class="grid" d="M{} {}V{}"/>').format(x, top, bottom)
        anchor = "start" if mark == marks[0] and left < 20 else "middle"
        out += Markup('<text class="tick" text-anchor="{}" x="{}" y="{}">{}</text>').format(
            anchor, x, bottom + 18, label(mark)
        )
    return out


def axis_title(title: str, x: float, y: float) -> Markup:
    return Markup('<text class="axis" x="{}" y="{}">{}</text>').format(place(x), place(y), title)


def svg(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}" width="{}" height="{}">{}</svg>').format(
        label, width, place(height), width, place(height), Markup("").join(parts)
    )


def place(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
