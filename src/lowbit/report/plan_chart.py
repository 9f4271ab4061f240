"""The plot of a plan: memory against context, a line for each KV type or model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from markupsafe import Markup

from lowbit.report import charts

# Classes of the style sheet, in the order that lines are given.
_SERIES = ("model", "naive", "calibrated", "fourth", "reference")


def memory_plot(
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    limit: tuple[float, str] | None = None,
    *,
    width: int = charts.WIDE,
    height: int = 320,
) -> Markup:
    """GiB against thousands of tokens of context. lines: (label, points); limit: a level in GiB and its name."""
    narrow = width < 600
    longest = max(len(name) for name, _ in lines)
    left, right, top, bottom = 46, min(280, 20 + 8 * longest) if not narrow else 24, 28, height - 48
    x_most = max(x for _, points in lines for x, _ in points)
    highest = max([*(y for _, points in lines for _, y in points), limit[0] * 1.05 if limit else 0.0])
    x_marks = [x_most * i / 4 for i in range(5)]
    y_marks = charts.ticks(highest, 5)
    x_scale, y_scale = (width - left - right) / x_most, (bottom - top) / y_marks[-1]

    parts = [charts.x_axis(x_marks, x_scale, left, top, bottom, lines=False, label=lambda x: f"{x:.4g}k" if x else "0")]
    parts += [_level(mark, left, width - right, bottom - mark * y_scale) for mark in y_marks]
    parts += [
        Markup('<text class="axis" x="4" y="14">GiB in all</text>'),
        charts.axis_title("tokens of context", left, bottom + 40),
    ]
    if limit:
        y = charts.place(bottom - limit[0] * y_scale)
        parts.append(Markup('<path class="limit" d="M{} {}H{}"/>').format(left, y, width - right))
        above = charts.place(bottom - limit[0] * y_scale - 6)
        parts.append(Markup('<text class="axis" x="{}" y="{}">{}</text>').format(left + 6, above, limit[1]))
    ends = []
    for (name, points), series in zip(lines, itertools.cycle(_SERIES), strict=False):
        places = [(left + x * x_scale, bottom - y * y_scale) for x, y in points]
        path = "M" + "L".join(f"{charts.place(x)} {charts.place(y)}" for x, y in places)
        parts.append(Markup('<path class="line s-{}" d="{}"/>').format(series, path))
        ends.append([places[-1][1], places[-1][0], name, series])
    parts += charts.key_below(ends, left, height) if narrow else charts.end_labels(ends)
    return charts.svg(width, height + (20 * len(ends) if narrow else 0), "Memory against context", parts)


def _level(mark: float, left: float, right: float, y: float) -> Markup:
    """A line across the plot at a value of the vertical axis, and the value."""
    line = Markup('<path class="grid" d="M{} {}H{}"/>').format(left, charts.place(y), right)
    text = Markup('<text class="tick" text-anchor="end" x="{}" y="{}">{}</text>')
    return line + text.format(left - 8, charts.place(y + 4), charts.tick_label(mark))
