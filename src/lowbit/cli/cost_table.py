"""What a job cost in the terminal: the machine against hosted models, and from how many items on it is cheaper."""

from __future__ import annotations

from typing import IO

from rich import box
from rich.table import Table

from lowbit.batch.agreement import Agreement
from lowbit.batch.break_even import BreakEven, by_model
from lowbit.batch.costs import Cost
from lowbit.batch.estimation import Estimate
from lowbit.cli.tables import console_for, plain
from lowbit.harness.prices import PriceFile
from lowbit.measure.record import Figure
from lowbit.units import format_dollars, format_duration, format_span

_WIDE = 100  # columns: in fewer, online prices and times are left out
_SAMPLES = 5  # answers that differ


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


def show_agreement(agreement: Agreement, stream: IO[str]) -> None:
    """How often the answers are those of the reference, and where they are not."""
    console = console_for(stream)
    failed = f", which did not answer {agreement.failed} more" if agreement.failed else ""
    drawn = f"{agreement.exact.n:,} of {agreement.population:,} items, drawn at random (seed {agreement.seed})"
    console.print(plain(f"Agreement with {agreement.reference}{failed}: {drawn}"))
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("what is compared", overflow="fold")
    table.add_column("agree", justify="right")
    table.add_column("95%", justify="right")
    for name, figure in agreement.shares():
        table.add_row(plain(name), _percent(figure.value), f"{_percent(figure.low)} to {_percent(figure.high)}")
    console.print(table)
    for sample in agreement.samples[:_SAMPLES]:
        fields = f" ({', '.join(sample.fields)})" if sample.fields else ""
        console.print(plain(f"{sample.custom_id}{fields}: {_short(sample.ours)} | {_short(sample.reference)}"))
    if len(agreement.samples) > _SAMPLES:
        console.print(plain(f"... and {len(agreement.samples) - _SAMPLES} more that differ, in --json and --html"))


def show_estimate(found: Estimate, costs: Cost | None, prices: PriceFile, stream: IO[str], machine: str) -> None:
    """What a batch will take. costs: with a probe, what it will cost."""
    console = console_for(stream)
    bad = f"; {found.bad:,} lines are none, the first: {found.first_problem}" if found.bad else ""
    console.print(plain(f"{found.items:,} requests{bad}"))
    for name, figure in (("prompt tokens", found.prompt), ("completion tokens", found.completion)):
        if figure is not None:
            said = f"{_interval(figure, found.items)} in all; {_interval(figure)} an item"
            console.print(plain(f"{name}: {said}, {_counted(figure, found.items)}"))
    if found.completion is None:
        limit = f"at most {found.items * found.limit:,.0f}, by max_tokens" if found.limit else "without a limit"
        console.print(plain(f"completion tokens: {limit}; --probe N measures them, and the time"))
    if found.seconds is not None:
        time = format_span(found.loading + found.items * found.seconds.value)
        failed = f", {found.probe_failed} of them without an answer" if found.probe_failed else ""
        console.print(plain(f"time: {time}, by a probe of {found.probed} items{failed}, on {machine}"))
    if costs is not None:
        show(costs, stream, machine)
    elif found.prompt is not None and found.limit is not None:
        console.print(plain(_at_most(found.items, found.prompt.value, found.limit, prices)))


def _at_most(items: int, prompt: float, limit: float, prices: PriceFile) -> str:
    tokens = round(items * prompt), round(items * limit)
    most = sorted((hosted.batch.of(*tokens) / 1e6, name) for name, hosted in prices.hosted.items())
    said = ", ".join(f"{format_dollars(amount)} ({name})" for amount, name in most[:3])
    return f"hosted, as a batch, at most: {said}; prices of {prices.dated}"


def _interval(figure: Figure, times: int = 1) -> str:
    digits = 1 if figure.value * times < 1000 else 0
    low, value, high = (f"{times * part:,.{digits}f}" for part in (figure.low, figure.value, figure.high))
    return value if figure.low == figure.high else f"{value} [{low}, {high}]"


def _counted(figure: Figure, items: int) -> str:
    return "all counted" if figure.low == figure.high and figure.n == items else f"n = {figure.n}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= 100 else one_line[:99] + "…"


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
