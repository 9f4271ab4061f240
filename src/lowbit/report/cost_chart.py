"""The plot of a job's cost: dollars for a thousand items against the number of items, both axes logarithmic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup

from lowbit.report import charts
from lowbit.units import format_dollars

# Classes of the style sheet: of the ways to have a machine, in the order that lines are given.
_SERIES = ("model", "naive", "calibrated", "fourth")
_HOSTED = "reference"


def cost_plot(
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    hosted: Sequence[tuple[str, float]],
    crossings: Sequence[tuple[float, float]] = (),
    *,
    width: int = charts.WIDE,
    height: int = 400,
) -> Markup:
    """lines: (name, (items, dollars per thousand)) of the machine. hosted: (name, dollars per thousand), level lines.
    crossings: (items, dollars per thousand) where one becomes cheaper than the other."""
    narrow = width < 600
    longest = max(len(name) for name, _ in [*lines, *hosted])
    left, right, top, bottom = 64, 24 if narrow else min(330, 20 + 8 * longest), 28, height - 48
    xs = [x for _, points in lines for x, _ in points]
    # What lies far above every hosted price says no more than that it does.
    values = [y for _, y in hosted] + [points[-1][1] for _, points in lines]
    low, high = math.floor(math.log10(min(v for v in values if v > 0))), math.ceil(math.log10(max(values))) + 1
    x_low, x_high = math.log10(min(xs)), math.log10(max(xs))
    x_scale, y_scale = (width - left - right) / (x_high - x_low), (bottom - top) / (high - low)

    def at(x: float, y: float) -> tuple[float, float]:
        level = min(max(math.log10(y), low), high) if y > 0 else low
        return left + (math.log10(x) - x_low) * x_scale, bottom - (level - low) * y_scale

    parts = _axes(range(math.ceil(x_low), math.floor(x_high) + 1, 2 if narrow else 1), range(low, high + 1), at,
                  left, width - right, bottom)  # fmt: skip
    ends = []
    for name, value in hosted:
        x, y = at(10**x_high, value)
        parts.append(Markup('<path class="limit" d="M{} {}H{}"/>').format(left, charts.place(y), charts.place(x)))
        ends.append([y, x, name, _HOSTED])
    for (name, points), series in zip(lines, itertools.cycle(_SERIES), strict=False):
        # The flat part above the plot is left out: there, the line only says that it is off the scale.
        seen = [point for point in points if point[1] < 10**high] or list(points[-1:])
        places = [at(x, y) for x, y in seen]
        path = "M" + "L".join(f"{charts.place(x)} {charts.place(y)}" for x, y in places)
        parts.append(Markup('<path class="line s-{}" d="{}"/>').format(series, path))
        x, y = places[-1]
        if narrow or x > width - right - 1:
            ends.append([y, x, name, series])
        else:  # it ends inside the plot, and has its name there
            text = Markup('<text class="name t-{}" text-anchor="middle" x="{}" y="{}">{}</text>')
            parts.append(text.format(series, charts.place(x), charts.place(y + 20), name))
    for x, y in (at(*point) for point in crossings if point[1] < 10**high):
        mark = Markup('<circle class="mark s-model" cx="{}" cy="{}" r="4"/>')
        parts.append(mark.format(charts.place(x), charts.place(y)))
    parts.append(Markup('<text class="axis" x="4" y="14">dollars for a thousand items</text>'))
    parts.append(charts.axis_title("items", left, bottom + 40))
    parts += charts.key_below(ends, left, height) if narrow else charts.end_labels(ends)
    label = "Cost of a thousand items: " + "; ".join(f"{name} {format_dollars(value)}" for name, value in hosted)
    return charts.svg(width, height + (20 * len(ends) if narrow else 0), label, parts)


def _axes(xs, ys, at, left: float, right: float, bottom: float) -> list[Markup]:  # type: ignore[no-untyped-def]
    parts = []
    for power in ys:
        y = charts.place(at(1.0, 10.0**power)[1])
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(left, y, charts.place(right)))
        text = Markup('<text class="tick" text-anchor="end" x="{}" y="{}">{}</text>')
        parts.append(text.format(left - 8, charts.place(float(y) + 4), f"${10.0**power:,.{max(0, -power)}f}"))
    for power in xs:
        text = Markup('<text class="tick" text-anchor="middle" x="{}" y="{}">{}</text>')
        parts.append(text.format(charts.place(at(10.0**power, 1.0)[0]), bottom + 18, _count(power)))
    return parts


def _count(power: int) -> str:
    """10^5 as people say it: '100 k'."""
    unit = ("", " k", " M", " G", " T")[power // 3]
    return f"{10 ** (power % 3)}{unit}"
