"""A plan in the terminal: the rows with their reasons, and the sums."""

from __future__ import annotations

from typing import IO

from rich import box
from rich.table import Table

from lowbit.cli.tables import console_for, plain
from lowbit.plan import Plan
from lowbit.units import format_bytes

_WIDE = 110  # columns: in fewer, how a number was found stands behind why


def show(plan: Plan, stream: IO[str]) -> None:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_footer=True)
    table.add_column("takes memory", footer="total", overflow="fold")
    table.add_column("size", footer=format_bytes(plan.total_bytes), justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    console = console_for(stream)
    wide = console.width >= _WIDE
    if wide:
        table.add_column("found by", overflow="fold")
    for row in plan.rows:
        why = [plain(row.why), plain(row.found)] if wide else [plain(f"{row.why} ({row.found})")]
        table.add_row(plain(row.what), format_bytes(row.bytes), *why)
    said = plan.settings
    head = f"{plan.model} ({plan.architecture}) in {plan.runtime}: context {said['context']:,}, {said['slots']} slots"
    console.print(plain(f"{head} of {said['context_per_slot']:,}"))
    console.print(table)
    for note in plan.notes:
        console.print(plain(note))
