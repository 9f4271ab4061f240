"""A plan, or what fits, as one self-contained HTML page with a plot of memory against context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit.files import replacing
from lowbit.plan import Best, Fit, Plan, PlanOptions, curves, open_listed, open_model, runtimes
from lowbit.plan.catalogue import find
from lowbit.plan.curve import Curve
from lowbit.report import charts, plan_chart
from lowbit.units import GIB, format_bytes

_MOST_LINES = 5


def write(model: str, options: PlanOptions, found: Plan | Fit, path: Path) -> None:
    """Writes the page of what ``lowbit plan`` found. Raises CannotWrite."""
    page = render(found, curves_of(model, options, found))
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")


def curves_of(model: str, options: PlanOptions, found: Plan | Fit) -> tuple[Curve, ...]:
    """Lines of memory against context: of one model one for each KV type; of a family one for each model that fits,
    in its best-fitting choice."""
    if isinstance(found, Plan) or not found.is_family:
        gpu = isinstance(found, Fit) and found.gpu
        with open_model(model) as opened:
            return curves(opened, options, gpu=gpu)
    lines = []
    for best in _best_of_each(found)[:_MOST_LINES]:
        [listed] = find(best.model)
        with open_listed(listed) as opened:
            settings = replace(options, recipe=best.recipe, slots=best.slots)
            [line] = curves(opened, settings, gpu=found.gpu, kv_types=(best.kv_type,))
        lines.append(replace(line, label=f"{best.model} {best.recipe}"))
    return tuple(lines)


def _best_of_each(found: Fit) -> list[Best]:
    """Of each model that fits the first choice with the longest context."""
    fitting: dict[str, Best] = {}
    for best in found.best:
        if best.context_per_slot > fitting.get(best.model, best).context_per_slot or best.model not in fitting:
            fitting[best.model] = best
    return [best for best in fitting.values() if best.context_per_slot]


def plots(lines: Sequence[Curve], room: int | None = None) -> dict[str, Any]:
    """The plot for wide and for narrow screens; empty where there is nothing to draw."""
    drawn = [(line.label, [(x / 1024, y / GIB) for x, y in line.points]) for line in lines if len(line.points) > 1]
    if not drawn:
        return {}
    limit = None if room is None else (room / GIB, f"{format_bytes(room)} usable")
    return {
        name: plan_chart.memory_plot(drawn, limit, width=width)
        for name, width in (("wide", charts.WIDE), ("narrow", charts.NARROW))
    }


def render(found: Plan | Fit, lines: Sequence[Curve]) -> str:
    """The page as text."""
    from lowbit.report import environment, style

    fit = found if isinstance(found, Fit) else None
    return (
        environment()
        .get_template("plan.html")
        .render(
            plan=found if isinstance(found, Plan) else None,
            fit=fit,
            at_once=_at_once(found) if isinstance(found, Plan) else 0,
            choices=_choices(fit) if fit else None,
            plot=plots(lines, fit.usable_bytes if fit else None),
            size=format_bytes,
            style=style(),
        )
    )


def _at_once(found: Plan) -> int:
    """What of a plan must be in memory at once, where that is less than all of it; else 0."""
    size = sum(row.bytes for row in runtimes.get(found.runtime).resident(found, gpu=False))
    return size if size < found.total_bytes else 0


def _choices(fit: Fit) -> dict[str, Any]:
    """The table of what fits: its columns, and of each row its head and cells."""
    by_model = fit.is_family
    key = (lambda b: (b.model, b.recipe or "as it is")) if by_model else (lambda b: (b.kv_type,))
    column = (lambda b: b.kv_type) if by_model else (lambda b: "1 slot" if b.slots == 1 else f"{b.slots} slots")
    columns = list(dict.fromkeys(column(best) for best in fit.best))
    rows: dict[tuple[str, ...], dict[str, Best]] = {}
    for best in fit.best:
        rows.setdefault(key(best), {})[column(best)] = best
    return {
        "head": ("model", "format") if by_model else ("KV type",),
        "columns": columns,
        "rows": [(head, [(name, _cell(cells[name])) for name in columns]) for head, cells in rows.items()],
    }


def _cell(best: Best) -> tuple[str, str]:
    if not best.context_per_slot:
        return ("–" if best.least_bytes else "no"), ""
    return f"{best.context_per_slot:,}" + ("*" if best.limit == "training" else ""), format_bytes(best.total_bytes)
