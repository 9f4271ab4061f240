"""What fits, in the terminal: KV type by slots for one model, models by formats for a family."""

from __future__ import annotations

from typing import IO

from rich import box
from rich.table import Table
from rich.text import Text

from lowbit.cli.tables import console_for, plain
from lowbit.plan import Best, Fit
from lowbit.units import format_bytes


def show(fit: Fit, stream: IO[str]) -> None:
    console = console_for(stream)
    memory = "GPU memory" if fit.gpu else "memory"
    asked = "the longest context that fits" if fit.is_family else "the longest context of each slot"
    console.print(plain(f"{fit.name} in {fit.runtime}, {format_bytes(fit.room_bytes)} of {memory}: {asked}"))
    console.print(_of_family(fit) if fit.is_family else _of_model(fit))
    console.print(plain(f"{format_bytes(fit.margin_bytes)} stay free: {fit.margin_why}. --margin sets it"))
    for line in fit.notes:
        console.print(plain(line))


def _of_model(fit: Fit) -> Table:
    """A row for each KV type, a column for each number of slots: tokens a slot, and what that takes in all."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    slots = list(dict.fromkeys(best.slots for best in fit.best))
    table.add_column("KV type", no_wrap=True)
    for n in slots:
        table.add_column("1 slot " if n == 1 else f"{n} slots ", justify="right")
    for kv_type in dict.fromkeys(best.kv_type for best in fit.best):
        cells = {best.slots: best for best in fit.best if best.kv_type == kv_type}
        table.add_row(plain(kv_type), *(_cell(cells[n], size=True) for n in slots))
    return table


def _of_family(fit: Fit) -> Table:
    """A row for each model and format, a column for each KV type."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    kv_types = list(dict.fromkeys((best.kv_type, best.slots) for best in fit.best))
    table.add_column("model", overflow="fold")
    table.add_column("format", overflow="fold")
    table.add_column("weights", justify="right", no_wrap=True)
    for kv_type, n in kv_types:
        table.add_column(plain(f"{kv_type} " if n == 1 else f"{kv_type}, {n} slots "), justify="right")
    for model, recipe in dict.fromkeys((best.model, best.recipe) for best in fit.best):
        cells = {(b.kv_type, b.slots): b for b in fit.best if (b.model, b.recipe) == (model, recipe)}
        weights = next((b.weights_bytes for b in cells.values() if b.weights_bytes), 0)
        size = format_bytes(weights) if weights else ""
        table.add_row(plain(model), plain(recipe or ""), size, *(_cell(cells[kind]) for kind in kv_types))
    return table


def _cell(best: Best, *, size: bool = False) -> Text:
    if not best.context_per_slot:
        return Text("– " if best.least_bytes else "no ", style="dim")
    said = Text(f"{best.context_per_slot:,}" + ("*" if best.limit == "training" else " "))
    return said.append(f"\n{format_bytes(best.total_bytes)} ", style="dim") if size else said
