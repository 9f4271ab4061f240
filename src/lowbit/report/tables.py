"""The pieces that the report's terminal tables are made of."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from lowbit.report.figures import MISSING, Figure


def cell(figure: Figure | None) -> Text:
    if figure is None:
        return Text(MISSING)
    return Text(figure.short, style="bold").append(f"\n{figure.interval}", style="not bold dim")


def new_table(first: str, *others: str) -> Table:
    made = Table(box=box.SIMPLE_HEAD, header_style="bold")
    made.add_column(plain(first), no_wrap=bool(others[1:]))
    for name in others:
        made.add_column(plain(name), justify="right", no_wrap=True)
    return made


def plain(value: str) -> Text:
    """Text from a record: no markup, and no control characters to steer the terminal with."""
    return Text("".join(c if c.isprintable() else " " for c in value))
