"""What each layer of the harness is worth, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowbit.report.figures import MISSING, mapping, number, sequence, text
from lowbit.report.tables import new_table, plain


def show(measured: Mapping[str, Any], stream: IO[str]) -> None:
    """A block a model: its sets of layers, its groups of questions, and the damage of a noisy one."""
    console = Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else 120)
    for model in map(mapping, sequence(measured.get("models"))):
        left_out = number(model.get("left_out")) or 0
        cut = f"; {left_out:,.0f} left out by the budget" if left_out else ""
        console.print(Text.assemble((f"\n{text(model.get('name'))}", "bold"), f"  {_count(model)} questions{cut}"))
        variants = [mapping(v) for v in sequence(model.get("variants"))]
        if not variants:
            continue
        console.print(_layers(variants, wide=console.width >= 110))
        console.print(_parts("questions", mapping(model.get("groups")), variants))
        if faults := mapping(model.get("faults")):
            console.print(_parts("first damage", faults, variants))
    machine = mapping(measured.get("machine"))
    console.print(plain(
        "valid: something was said, and calls and JSON follow their schemas. right: by BFCL's rules. unsafe: handed on "
        "and not valid. The change is from the whole harness, question by question; * where McNemar's test, corrected "
        f"for the rows, finds one at 5%. 95% intervals. {text(machine.get('cpu'))}, {text(machine.get('os'))}"
    ))  # fmt: skip


def _layers(variants: list[dict[str, Any]], *, wide: bool) -> Table:
    more = ("errors", "tries", "tokens", "seconds") if wide else ("errors", "tries")
    table = new_table("", "valid", "right", "change", "unsafe", *more)
    for variant in variants:
        errors = sum(int(number(n) or 0) for n in mapping(variant.get("errors")).values())
        cells = {"errors": Text(f"{errors:,}")}
        cells |= {name: _mean(mapping(variant.get(name))) for name in ("tries", "tokens", "seconds")}
        change = _change(mapping(mapping(variant.get("against")).get("right")))
        shares = {name: _share(mapping(variant.get(name)), "\n") for name in ("valid", "right", "unsafe")}
        shown = (shares["valid"], shares["right"], change, shares["unsafe"], *(cells[name] for name in more))
        table.add_row(plain(text(variant.get("name"))), *shown)
    return table


def _parts(first: str, parts: Mapping[str, Any], variants: list[dict[str, Any]]) -> Table:
    """Right answers of each part: with the whole harness and with none."""
    ends = [text(variants[0].get("name")), text(variants[-1].get("name"))]
    table = new_table(first, "n", *(f"right, {name}" for name in ends))
    for name, part in parts.items():
        found = mapping(mapping(part).get("variants"))
        figures = [mapping(mapping(found.get(end)).get("right")) for end in ends]
        table.add_row(plain(name), f"{number(mapping(part).get('n')) or 0:,.0f}", *map(_share, figures))
    return table


def _share(figure: Mapping[str, Any], between: str = "  ") -> Text:
    value, low, high = (number(figure.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return Text(MISSING)
    return Text(f"{value:.1%}", style="bold").append(f"{between}{100 * low:.1f}–{100 * high:.1f}", style="not bold dim")


def _change(figure: Mapping[str, Any]) -> Text:
    value, low, high = (number(figure.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return Text(MISSING)
    seen = figure.get("verdict") in ("better", "worse")
    shown = Text(f"{100 * value:+.1f}{'*' if seen else ' '}", style="bold" if seen else "dim")
    return shown.append(f"\n{100 * low:+.1f} to {100 * high:+.1f}", style="not bold dim")


def _mean(figure: Mapping[str, Any]) -> Text:
    value, low, high = (number(figure.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return Text(MISSING)
    digits = 0 if value >= 100 else 2
    return Text(f"{value:,.{digits}f}").append(f"\n{low:,.{digits}f}–{high:,.{digits}f}", style="dim")


def _count(model: Mapping[str, Any]) -> str:
    return f"{number(model.get('questions')) or 0:,.0f}"
