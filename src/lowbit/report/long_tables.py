"""Tables of the long measurements: KV caches, and a heat map of what was found again in long texts."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from lowbit.report.figures import MISSING, Figure
from lowbit.report.long_view import KvFile, LongView, RetrievalFile, SpeedFile
from lowbit.report.tables import cell, new_table, plain

_NARROW = 110


def show(console: Console, seen: LongView) -> None:
    """Prints what there is."""
    for of_file in seen.kv:
        _show_kv(console, of_file, seen)
    for found in seen.retrieval:
        _show_retrieval(console, found)
    for timed in seen.speed:
        _show_speed(console, timed)


def _show_kv(console: Console, found: KvFile, seen: LongView) -> None:
    wide = console.width >= _NARROW
    extra = ("KLD", "added to KLD") if wide else ()
    grid = new_table("KV cache", "tokens", "size", *extra, "KLD to f16", "same top-1", "verdict")
    for row in found.rows:
        figures = (row.kld, row.added) if wide else ()
        cells = [cell(figure) for figure in (*figures, row.to_f16, row.top1)]
        if row.type == "f16":  # compared with itself
            cells[-2:] = [Text(MISSING), Text(MISSING)]
            cells[1:-2] = [Text(MISSING)] if wide else []
        said = "" if row.type == "f16" else _verdict(row.verdict, wide)
        grid.add_row(plain(row.type), f"{row.context:,}", row.size or MISSING, *cells, Text(said))
    console.print(plain(f"KV caches of {found.file}"), style="bold")
    console.print(grid)
    if found.recommended:
        console.print(plain(f"recommended KV cache: {found.recommended}"))
    for line in found.why:
        console.print(plain(f"  {line}"))
    counts = {row.context: (row.sequences, row.to_f16.n) for row in found.rows if row.to_f16}
    scored = "; ".join(f"{n:,} positions in {k} of {context:,}" for context, (k, n) in counts.items())
    console.print(plain(f"nats a token, 95% intervals; scored: {scored} tokens"), style="dim")
    console.print()


def _show_retrieval(console: Console, found: RetrievalFile) -> None:
    console.print(
        plain(f"Facts found again by {found.file}: probability of the right answer of eight (chance {found.chance})"),
        style="bold",
    )
    wide = console.width >= _NARROW
    depths = (f"at {depth:.0f} %" if wide else f"{depth:.0f} %" for depth in found.depths)
    grid = new_table("KV cache", "tokens", *depths, "all", "greedy", *(["vs f16"] if wide else []))
    for row in found.rows:
        at = {place.depth: place.probability or place.choice for place in row.places}
        cells = [_heat(at.get(depth)) for depth in found.depths]
        said = [Text("" if row.type == "f16" else _verdict(row.verdict, wide))] if wide else []
        overall = _heat(row.probability or row.choice)
        grid.add_row(plain(row.type), f"{row.length:,}", *cells, overall, _heat(row.greedy), *said)
    console.print(grid)
    console.print(plain(f"95% intervals; {found.asked} facts at each place"), style="dim")
    console.print()


def _show_speed(console: Console, found: SpeedFile) -> None:
    console.print(plain(f"Speed of {found.file} behind a context, all slots together"), style="bold")
    wide = console.width >= _NARROW
    more = (["cold, s"] if wide else []) + (["J/token"] if found.joules else [])
    names = ("prompt, t/s", "generation, t/s", "first token, s") if wide else ("prompt", "generation", "first, s")
    grid = new_table("KV cache", "depth", "slots", *names, *more)
    for row in found.rows:
        figures = [row.prompt, row.generation, row.first_token, *([row.cold] if wide else [])]
        figures += [row.joules] if found.joules else []
        grid.add_row(plain(row.type), f"{row.depth:,}", str(row.slots), *(cell(figure) for figure in figures))
    console.print(grid)
    said = f"prompt and generation in tokens a second; first token: of a prompt of {found.prompt} tokens a slot"
    console.print(plain(f"95% intervals of {found.repeats} fresh processes; {said}"), style="dim")
    console.print()


def _verdict(said: str, wide: bool) -> str:
    if wide:
        return said.replace(" difference", "\ndifference")
    return said.replace("no measurable difference", "same").replace(" the limit", "")


def _heat(found: Figure | None) -> Text:
    """A figure in percent on a ground from dark (0) to bright (100)."""
    if found is None:
        return Text(MISSING)
    level = min(1.0, max(0.0, found.value / 100))
    red, green, blue = (round(a + (b - a) * level) for a, b in ((24, 120), (32, 200), (64, 255)))
    style = f"{'black' if level > 0.45 else 'white'} on rgb({red},{green},{blue})"
    return Text(f"{found.value:.0f} %\n{found.low:.0f}–{found.high:.0f}", style=style)
