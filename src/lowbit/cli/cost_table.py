"""What a job cost in the terminal: the machine against hosted models, and from how many items on it is cheaper."""

from __future__ import annotations

from typing import IO

from rich import box
from rich.table import Table

from lowbit.batch.break_even import BreakEven, by_model
from lowbit.batch.cost import Cost
from lowbit.cli.tables import console_for, plain
from lowbit.measure.record import Figure
from lowbit.units import format_dollars, format_duration, format_span

_WIDE = 100  # columns: in fewer, online prices and times are left out


def show(cost: Cost, stream: IO[str], machine: str = "") -> None:
    """machine: what computed, for people; said with the figures that were measured on it."""
    console = console_for(stream)
    work = cost.work
    failed = f", {work.failed:,} without an answer" if work.failed else ""
    tokens = f"{work.prompt_tokens:,} prompt and {work.completion_tokens:,} completion tokens"
    console.print(plain(f"{work.items:,} items answered{failed}; {tokens}; {format_duration(work.seconds)}"))
    if work.per_item is not None:
        console.print(plain(f"{_seconds(work.per_item)} an item{f' on {machine}' if machine else ''}"))
    if work.items:
        console.print(_table(cost, console.width >= _WIDE))
        if cost.dollars is not None and cost.hosted:
            console.print(_break_even(cost, console.width >= _WIDE))
        elif cost.dollars is None:
            console.print(
                plain("--machine-price (dollars an hour), or --kwh-price with --watts, says what it cost here")
            )
    for note in cost.notes:
        console.print(plain(note))


def _table(cost: Cost, wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("where", overflow="fold")
    table.add_column("this job", justify="right")
    if wide:
        table.add_column("online", justify="right")
    table.add_column("a thousand items", justify="right")
    table.add_column("against here", justify="right")
    here = cost.per_thousand
    if cost.dollars is not None and here is not None:
        cells = [format_dollars(cost.dollars), *([""] if wide else []), _thousand(here), ""]
        table.add_row("this machine", *cells, style="bold")
    for found in cost.hosted:
        mark = "" if found.price.said else "*"
        name = f"{found.price.name}{mark}" + (f" ({found.price.provider})" if found.price.provider else "")
        online = [format_dollars(found.online)] if wide else []
        times = f"{found.batch_per_thousand.value / here.value:.2g}x" if here is not None and here.value else ""
        table.add_row(plain(name), format_dollars(found.batch), *online, _thousand(found.batch_per_thousand), times)
    table.caption = f"hosted: as a batch, prices of {cost.prices.dated} ({cost.prices.path.name})"
    table.caption_justify = "left"
    return table


def _break_even(cost: Cost, wide: bool) -> Table:
    """Of each hosted model, from how many items on the machine is cheaper, for each way to have it."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    columns, rows = by_model(cost)
    table.add_column("cheaper than", overflow="fold")
    for way in columns:
        table.add_column(way.name, justify="right")
    for model, entries in rows:
        table.add_row(plain(model), *(_items(entry, wide) for entry in entries))
    sums = (f"{w.name}: {format_dollars(w.fixed)} and {format_dollars(1000 * w.each)} a thousand" for w in columns)
    said = "from that many items on" + (", and the work until then" if wide else "")
    table.caption = f"{said}. {'; '.join(sums)}"
    table.caption_justify = "left"
    return table


def _items(entry: BreakEven, wide: bool) -> str:
    if entry.items is None:
        return "never"
    if entry.items < 1:
        return "at once"
    return f"{entry.items:,.0f}" + (f" ({format_span(entry.seconds or 0.0)})" if wide else "")


def _thousand(figure: Figure) -> str:
    if figure.low == figure.high:
        return format_dollars(figure.value)
    return f"{format_dollars(figure.value)} [{format_dollars(figure.low)}, {format_dollars(figure.high)}]"


def _seconds(figure: Figure) -> str:
    return f"{figure.value:.3g} s [{figure.low:.3g}, {figure.high:.3g}] (95%, n = {figure.n})"
