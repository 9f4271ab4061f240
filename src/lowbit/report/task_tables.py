"""The tasks of a measurement in the terminal: scores, what changed between two models, and the items that flipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowbit.report import task_view
from lowbit.report.figures import MISSING, Figure

_FLIPS = 5  # listed a pair; the rest is in the JSON


def show(console: Console, measured: dict[str, Any]) -> None:
    """One block a set."""
    for task in task_view.build(measured):
        console.print(Text.assemble((f"\n{_plain(task.name)}", "bold"), f"  {_plain(task.about)}; {_said(task.ways)}"))
        _print_scores(console, task)
        if task.pairs:
            _print_pairs(console, task)
        for pair in task.pairs:
            _print_flips(console, pair)


def _print_scores(console: Console, task: task_view.TaskView) -> None:
    """A line a metric and a column a model; where they do not fit the width, half of the models at a time."""
    columns = list(range(len(task.models)))
    table = _score_table(task, columns)
    wide = console.measure(table, options=console.options.update(width=1000)).maximum > console.width
    if wide and len(columns) > 1:
        half = (len(columns) + 1) // 2
        for part in (columns[:half], columns[half:]):
            console.print(_score_table(task, part))
    else:
        console.print(table)


def _score_table(task: task_view.TaskView, columns: list[int]) -> Table:
    table = _table("", *(task.models[i] for i in columns))
    for row in task.rows:
        table.add_row(_plain(row.label), *(_cell(row.figures[i]) for i in columns))
    if task.groups and task.rows:
        table.add_section()
        for name, figures in task.groups:
            table.add_row(f"  {_plain(name) or MISSING}", *(_cell(figures[i], brief=True) for i in columns))
    return table


def _print_pairs(console: Console, task: task_view.TaskView) -> None:
    table = _table("against each other", "change", "verdict", "p", "detectable")
    for pair in task.pairs:
        for d in pair.differences:
            name = Text(f"{_plain(d.label)}\n").append(f"{_plain(d.baseline)} → {_plain(d.artifact)}", style="dim")
            table.add_row(name, _cell(d.change, signed=True), _plain(d.verdict), d.p_value, d.smallest)
    console.print(table)


def _print_flips(console: Console, pair: task_view.Pair) -> None:
    if not pair.total and not pair.changed:
        return
    console.print(
        _plain(
            f"{pair.baseline} → {pair.artifact}: {pair.total} flipped between right and wrong, "
            f"{pair.changed} answered otherwise"
        )
    )
    for flip in pair.flips[:_FLIPS]:
        question = " ".join(flip.question.split())
        question = question if len(question) <= 70 else question[:69] + "…"
        style = "green" if flip.turned == "right" else "red"
        line = Text.assemble(
            (f"  now {flip.turned}  ", style), f"{_plain(question)}  ",
            (f"{_brief(flip.before)} → {_brief(flip.after)}", "dim"),
        )  # fmt: skip
        console.print(line)
    if len(pair.flips) > _FLIPS:
        console.print(f"  … {pair.total - _FLIPS} more; --json lists them")


def _brief(answer: str) -> str:
    said = _plain(" ".join(answer.split()))
    return said if len(said) <= 40 else said[:39] + "…"


def _cell(figure: Figure | None, *, brief: bool = False, signed: bool = False) -> Text:
    if figure is None:
        return Text(MISSING)
    value = figure.print(figure.value)
    cell = Text(f"+{value}" if signed and figure.value > 0 else value, style="" if brief else "bold")
    said = f"{' ' if brief else chr(10)}{figure.interval}, n {figure.n:,}"
    return cell.append(said, style="not bold dim")


def _said(ways: Iterable[str]) -> str:
    return _plain(" / ".join(ways))


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(Text(_plain(name)), justify="right", overflow="fold")
    return table


def _plain(value: str) -> str:
    return "".join(c if c.isprintable() else " " for c in value)
