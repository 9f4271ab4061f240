"""The report in the terminal: the same view of the record, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowbit.report import long_tables, long_view, task_tables, verdicts, view
from lowbit.report.figures import MISSING, mapping, number, sequence, text
from lowbit.report.tables import cell as _cell
from lowbit.report.tables import new_table as _table
from lowbit.report.tables import plain as _plain
from lowbit.units import format_bytes


def show(record: Mapping[str, Any], stream: IO[str]) -> None:
    """What ``ship`` prints when it is done: fidelity and cost of each file, then the phases."""
    console = _console(stream)
    seen = view.build(dict(record), Path())
    _print_artifacts(console, seen.artifacts)
    if seen.phases:
        table = _table("phase", "KLD", "time", "tokens")
        for phase in seen.phases:
            table.add_row(_plain(phase.name), _cell(phase.kld), phase.duration or MISSING, phase.tokens or MISSING)
        console.print(table)
    if seen.ratio:
        line = f"mean KLD: {seen.ratio.short} of naive Q4_0's (95% {seen.ratio.interval}, n = {seen.ratio.n:,})"
        console.print(_plain(line))
    if seen.proved:
        console.print(_plain(f"certificate: {seen.proved} blocks are what training ended on, bit for bit"))
    for line in seen.left_out:
        console.print(_plain(line))
    long_tables.show(console, seen.long)


def show_measurement(measured: Mapping[str, Any], stream: IO[str]) -> None:
    """The table of `lowbit measure`; files appear under their names."""
    console = _console(stream)
    _print_artifacts(console, view.measured_artifacts(dict(measured)), by_file=True)
    _print_verdicts(console, verdicts.of(dict(measured)))
    for line in [*view.not_measured(dict(measured)), *verdicts.of_cache(dict(measured))]:
        console.print(_plain(line))
    long_tables.show(console, long_view.build(measured))
    task_tables.show(console, dict(measured))


def show_inspection(found: Mapping[str, Any], stream: IO[str]) -> None:
    """The table of `lowbit inspect`: the facts, then how many tensors have which type."""
    console = _console(stream)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in found.items():
        shown = _fact(key, value)
        if shown:
            facts.add_row(_plain(key.replace("_bytes", "").replace("_", " ")), _plain(shown))
    console.print(facts)
    counts: dict[str, int] = {}
    for tensor in map(mapping, sequence(found.get("tensors"))):
        kind = text(tensor.get("type")) or text(tensor.get("dtype"))
        counts[kind] = counts.get(kind, 0) + 1
    if counts:
        table = _table("type", "tensors")
        for kind, count in sorted(counts.items(), key=lambda item: -item[1]):
            table.add_row(_plain(kind), str(count))
        console.print(table)


def _fact(key: str, value: Any) -> str:
    amount = number(value)
    if amount is not None:
        if key.endswith("_bytes"):
            return format_bytes(amount)
        return f"{amount:,.0f}" if amount == int(amount) else f"{amount:.4g}"
    if key == "projectors" and isinstance(value, Mapping):
        return ", ".join(f"{name} ({kind})" for kind, name in value.items())
    return value if isinstance(value, str) else ""


def _print_artifacts(console: Console, artifacts: list[view.Artifact], *, by_file: bool = False) -> None:
    """One table, or several below each other where the terminal is too narrow for all the columns."""
    if not artifacts:
        return
    table = _artifact_table(artifacts, by_file=by_file)
    whole = console.measure(table, options=console.options.update(width=1000)).maximum
    if whole > console.width and len(artifacts) > 1:
        half = (len(artifacts) + 1) // 2
        _print_artifacts(console, artifacts[:half], by_file=by_file)
        _print_artifacts(console, artifacts[half:], by_file=by_file)
    else:
        console.print(table)


def _artifact_table(artifacts: list[view.Artifact], *, by_file: bool = False) -> Table:
    table = _table("", *(a.file if by_file else a.title for a in artifacts))
    if any(a.runtime for a in artifacts):
        table.add_row("Runtime", *(_plain(a.runtime or MISSING) for a in artifacts))
    for key, (name, _, _) in view.METRICS.items():
        if any(key in a.fidelity for a in artifacts):
            table.add_row(name, *(_cell(a.fidelity.get(key)) for a in artifacts))
    table.add_row("Size", *(a.size or MISSING for a in artifacts))
    bits = (a.bits_per_weight for a in artifacts)
    table.add_row("Bits per weight", *(f"{b:.2f}" if b is not None else MISSING for b in bits))
    if any(a.memory for a in artifacts):
        table.add_row("Peak memory", *(a.memory or MISSING for a in artifacts))
    for key, name in view.SPEEDS.items():
        if any(key in a.speed for a in artifacts):
            table.add_row(name, *(_cell(a.speed.get(key)) for a in artifacts))
    return table


def _print_verdicts(console: Console, listed: list[verdicts.Compared]) -> None:
    for compared in listed:
        console.print(_plain(f"{compared.artifact} against {compared.baseline}"), style="bold")
        table = _table("", "difference", "verdict", "would have seen")
        for v in compared.verdicts:
            difference = Text(v.value).append(f"\n{v.interval}", style="dim")
            style = "dim" if v.verdict == verdicts.NO_DIFFERENCE else "bold"
            table.add_row(v.what, difference, Text(v.verdict, style=style), v.smallest or MISSING)
        console.print(table)


def _console(stream: IO[str]) -> Console:
    # Where there is no terminal (a log), 80 columns would be a guess, and too narrow for four files.
    return Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else 120)
