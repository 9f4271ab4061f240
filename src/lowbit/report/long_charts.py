"""Plots of the long measurements: lines with intervals, and the heat map of what was found again."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from lowbit.report import charts
from lowbit.report.long_view import Curve, LongView, RetrievalFile

# Classes of the style sheet, in the order that lines are given.
_SERIES = ("model", "naive", "calibrated", "fourth", "reference", "loss")
_HEIGHT = 300


def plots(seen: LongView, width: int) -> dict[str, Markup]:
    """name -> plot, as long.html asks for them; one without data is absent."""
    made = {}
    for i, kv in enumerate(seen.kv, 1):
        if kv.curves:
            made[f"kv{i}"] = line_plot(kv.curves, "position, tokens", "KLD to the f16 cache, nats", width=width)
    for i, found in enumerate(seen.retrieval, 1):
        if found.depths:
            made[f"retrieval{i}"] = heat_map(found, width=width)
    for i, speed in enumerate(seen.speed, 1):
        for what in ("generation", "prompt"):
            if curves := speed.curves(what):
                made[f"{what}{i}"] = line_plot(curves, "tokens in the cache", f"{what}, tokens/s", width=width)
    return made


def line_plot(lines: Sequence[Curve], x_title: str, y_title: str, *, width: int = charts.WIDE) -> Markup:
    """Lines on common axes from 0, each point with its 95% interval, each line named at its end."""
    left, right, top, bottom = 56, 108, 28, _HEIGHT - 48
    x_marks = charts.ticks(max(x for line in lines for x, _ in line.points), 6 if width >= 600 else 3)
    y_marks = charts.ticks(max(figure.high for line in lines for _, figure in line.points), 5)
    x_scale, y_scale = (width - left - right) / x_marks[-1], (bottom - top) / y_marks[-1]
    parts = [charts.x_axis(x_marks, x_scale, left, top, bottom, lines=False)]
    for mark in y_marks:
        y = bottom - mark * y_scale
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(left, charts.place(y), width - right))
        parts.append(
            Markup('<text class="tick" text-anchor="end" x="{}" y="{}">{}</text>').format(
                left - 8, charts.place(y + 4), charts.tick_label(mark)
            )
        )
    parts.append(Markup('<text class="axis" x="4" y="14">{}</text>').format(y_title))
    parts.append(charts.axis_title(x_title, left, bottom + 40))
    ends = []
    for i, line in enumerate(lines):
        series = _SERIES[i % len(_SERIES)]
        places = [(left + x * x_scale, bottom - max(0.0, f.value) * y_scale) for x, f in line.points]
        bars = Markup("").join(
            Markup("M{} {}V{}").format(
                charts.place(x),
                charts.place(bottom - max(0.0, f.low) * y_scale),
                charts.place(bottom - max(0.0, f.high) * y_scale),
            )
            for (x, _), (_, f) in zip(places, line.points, strict=True)
        )
        path = "M" + "L".join(f"{charts.place(x)} {charts.place(y)}" for x, y in places)
        parts.append(Markup('<path class="range thin s-{}" d="{}"/>').format(series, bars))
        parts.append(Markup('<path class="line s-{}" d="{}"/>').format(series, path))
        parts += [
            Markup('<circle class="mark s-{}" cx="{}" cy="{}" r="3.5"/>').format(
                series, charts.place(x), charts.place(y)
            )
            for x, y in places
        ]
        ends.append([places[-1][1], places[-1][0], line.name, series])
    parts += charts.end_labels(ends, bottom - 4)
    said = "; ".join(f"{line.name}: {line.points[-1][1].short} at {line.points[-1][0]:,.0f}" for line in lines)
    return charts.svg(width, _HEIGHT, f"{y_title} against {x_title}. {said}", parts)


def heat_map(found: RetrievalFile, *, width: int = charts.WIDE) -> Markup:
    """A row a cache and length, a column a depth; the brighter, the more was found."""
    narrow = width < 600
    left, top, row_height = (104 if narrow else 190), 44, (34 if narrow else 38)
    column = (width - left) / max(1, len(found.depths))
    parts = [
        Markup('<text class="axis" x="{}" y="14">{}</text>').format(left, "where the fact stands, % of the text"),
        Markup('<text class="axis" x="0" y="36">{}</text>').format("cache, tokens" if narrow else "KV cache, tokens"),
    ]
    for i, depth in enumerate(found.depths):
        x = charts.place(left + column * (i + 0.5))
        parts.append(
            Markup('<text class="tick" text-anchor="middle" x="{}" y="36">{}</text>').format(x, f"{depth:.0f}")
        )
    for r, row in enumerate(found.rows):
        y = top + r * row_height
        label = f"{row.type} {row.length:,}" if narrow else f"{row.type}, {row.length:,}"
        parts.append(
            Markup('<text class="name" x="0" y="{}">{}</text>').format(charts.place(y + row_height / 2 + 4), label)
        )
        at = {place.depth: place.probability or place.choice for place in row.places}
        for i, depth in enumerate(found.depths):
            if (figure := at.get(depth)) is None:
                continue
            begin, level = left + column * i, min(1.0, max(0.0, figure.value / 100))
            # Never so strong that the figure on it could not be read.
            parts.append(
                Markup('<rect class="heat" x="{}" y="{}" width="{}" height="{}" rx="3" fill-opacity="{}"/>').format(
                    charts.place(begin + 1.5), charts.place(y + 1.5), charts.place(column - 3), row_height - 3,
                    f"{0.03 + 0.47 * level:.2f}",
                )
            )  # fmt: skip
            parts.append(
                Markup('<text class="tick" text-anchor="middle" x="{}" y="{}">{}</text>').format(
                    charts.place(begin + column / 2), charts.place(y + row_height / 2 + 4), f"{figure.value:.0f}"
                )
            )
    said = f"Probability of the right answer in percent, {found.file}"
    return charts.svg(width, top + row_height * len(found.rows) + 4, said, parts)
