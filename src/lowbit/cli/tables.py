"""Tables of results that name tensors: those of one kind in all layers are a line, so that a model fits the screen."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowbit.units import format_bytes, format_share

_COUNTS = ("blocks", "exact", "within_scale_rounding", "off_lattice")
_WIDTH = 180  # where there is no terminal to ask


def show_certificate(certificate: Mapping[str, Any], stream: IO[str]) -> None:
    """What is proved of each kind of tensor, then of the whole file. ``certificate``: Certificate.to_json()."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_footer=True)
    totals = certificate["totals"]
    table.add_column("tensors", footer="total", overflow="fold")
    table.add_column("type")
    table.add_column("source's lattice", overflow="fold")
    for key, name in zip(_COUNTS, ("blocks", "exact", "scale rounding", "off lattice"), strict=True):
        table.add_column(name, footer=_count(totals[key], totals["blocks"], key), justify="right")
    table.add_column("max error", justify="right")
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for tensor in certificate["tensors"]:
        said = tensor["note"] or tensor["grid"] or ""
        groups.setdefault((kind_of(tensor["name"]), tensor["type"], said), []).append(tensor)
    for (kind, stored, said), tensors in groups.items():
        sums = {key: sum(tensor[key] for tensor in tensors) for key in _COUNTS}
        times = f"{len(tensors)} × " if len(tensors) > 1 else ""
        counts = (_count(sums[key], sums["blocks"], key) for key in _COUNTS)
        largest = max(tensor["max_error"] for tensor in tensors)
        table.add_row(plain(times + kind), plain(stored), plain(said), *counts, f"{largest:.3g}" if largest else "0")
    console = console_for(stream)
    console.print(table)
    share = format_share(totals["exact"], totals["blocks"])
    line = f"{certificate['artifact']}: {share} of {totals['blocks']:,} blocks give the source back, bit for bit"
    uncompared = sum(tensor["note"] is not None for tensor in certificate["tensors"])
    if uncompared:
        line += f"; {uncompared} tensor{'s' if uncompared > 1 else ''} could not be compared"
    console.print(plain(line))


def show_mix(rows: Iterable[Mapping[str, Any]], stream: IO[str]) -> None:
    """What a budget was spent on: of each kind of tensor the types chosen, and what they cost the output. ``rows``:
    Mix.table()."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_footer=True)
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(kind_of(row["name"]), []).append(row)
    every = [row for group in kinds.values() for row in group]
    size, cost = sum(row["bytes"] for row in every), sum(row["cost"] for row in every)
    table.add_column("tensors", footer="total", overflow="fold")
    table.add_column("types", overflow="fold")
    table.add_column("size", footer=format_bytes(size), justify="right")
    table.add_column("nats a token", footer=f"{cost:.2g}", justify="right")
    for kind, group in kinds.items():
        types = collections.Counter(row["type"] for row in group)
        said = ", ".join(f"{count} × {name}" if len(group) > 1 else name for name, count in sorted(types.items()))
        size, cost = sum(row["bytes"] for row in group), sum(row["cost"] for row in group)
        times = f"{len(group)} × " if len(group) > 1 else ""
        table.add_row(plain(times + kind), said, format_bytes(size), f"{cost:.2g}")
    console_for(stream).print(table)


def show_lattices(tensors: Iterable[Mapping[str, Any]], stream: IO[str]) -> None:
    """Which lattice the tensors of an inspection sit on; nothing where none was looked at."""
    found: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        if "lattice" in tensor:
            kinds = found.setdefault(tensor["lattice"], {})
            kinds[kind_of(tensor["name"])] = kinds.get(kind_of(tensor["name"]), 0) + 1
    if not found:
        return
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("lattice (of sampled rows)", overflow="fold")
    table.add_column("tensors", justify="right")
    table.add_column("which", overflow="fold")
    for name, kinds in sorted(found.items(), key=lambda item: -sum(item[1].values())):
        table.add_row(plain(name), str(sum(kinds.values())), plain(", ".join(kinds)))
    console_for(stream).print(table)


def kind_of(name: str) -> str:
    """A tensor's name without the number of its layer: 'model.layers.*.mlp.up_proj.weight'."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _count(value: int, blocks: int, key: str) -> str:
    return f"{value:,}" if key == "blocks" else format_share(value, blocks)


def plain(value: str) -> Text:
    """Text from a file: no markup, and no control characters to steer the terminal with."""
    return Text("".join(c if c.isprintable() else " " for c in value))


def console_for(stream: IO[str]) -> Console:
    return Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else _WIDTH)
