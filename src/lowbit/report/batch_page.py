"""What a batch cost and how far it can be trusted, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit.batch.agreement import Agreement
from lowbit.batch.break_even import BreakEven, break_even, by_model, volumes, ways
from lowbit.batch.costs import Cost
from lowbit.files import replacing
from lowbit.measure.record import Figure
from lowbit.report import charts, cost_chart
from lowbit.report.figures import Figure as Shown
from lowbit.units import format_dollars, format_duration, format_span

_MOST_SAMPLES = 20
_WIDTHS = (("wide", charts.WIDE), ("narrow", charts.NARROW))


def write(
    path: Path, title: str, cost: Cost, agreement: Agreement | None = None, machine: Mapping[str, Any] | None = None
) -> None:
    """title: the job's name. machine: what measure.record.machine says. Raises CannotWrite."""
    page = render(title, cost, agreement, machine)
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")


def render(title: str, cost: Cost, agreement: Agreement | None = None, machine: Mapping[str, Any] | None = None) -> str:
    """The page as text."""
    from lowbit.report import environment, style

    entries = break_even(cost) if cost.dollars is not None else ()
    return str(
        environment()
        .get_template("batch.html")
        .render(
            title=title,
            cost=cost,
            ways=ways(cost) if cost.dollars is not None else (),
            break_even=by_model(cost)[1] if cost.dollars is not None else (),
            plot=_plots(cost, entries),
            agreement=agreement,
            samples=agreement.samples[:_MOST_SAMPLES] if agreement else (),
            agreement_plot=_agreement_plots(agreement) if agreement else None,
            machine=machine,
            dollars=format_dollars,
            duration=format_duration,
            span=format_span,
            style=style(),
        )
    )


def _plots(cost: Cost, entries: Sequence[BreakEven]) -> dict[str, Any] | None:
    """For wide and for narrow screens; None where there is nothing to compare."""
    if cost.dollars is None or not cost.hosted or not cost.work.items:
        return None
    at = volumes(cost)
    lines = []
    for way in ways(cost):
        most = way.capacity
        points = [(n, way.per_thousand(n)) for n in at if most is None or n <= most]
        if most is not None and most > at[0]:
            points.append((min(most, at[-1]), way.per_thousand(min(most, at[-1]))))
        if points:
            lines.append((way.name, points))
    hosted = [(found.price.name, found.batch_per_thousand.value) for found in cost.hosted]
    levels = dict(hosted)
    crossings = [(e.items, levels[e.model]) for e in entries if e.items is not None and e.items > at[0]]
    if not lines or not any(value > 0 for _, value in hosted):
        return None
    return {name: cost_chart.cost_plot(lines, hosted, crossings, width=width) for name, width in _WIDTHS}


def _agreement_plots(agreement: Agreement) -> dict[str, Any] | None:
    rows = [charts.Row(label=name, series="model", figure=_percent(f)) for name, f in agreement.shares()]
    axis = "items that agree with the reference, percent"
    return {name: charts.interval_plot(rows, axis, width=width) for name, width in _WIDTHS} if rows else None


def _percent(share: Figure) -> Shown:
    return Shown(value=100 * share.value, low=100 * share.low, high=100 * share.high, n=share.n, suffix="%")
