"""How a talk looks: in columns on a wide terminal, one below the other on a narrow one, as plain text in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from lowbit.chat.speaker import Turn

_NARROW = 100  # columns of a terminal below which two answers do not stand side by side
_MARGIN = 30  # columns of the harness's notes


def plain(text: str) -> str:
    """Text without what could steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)


class PipedScreen:
    """One answer streams as it is; of two, each is printed when it is whole, under its name."""

    def __init__(self, names: Sequence[str], out: TextIO, notes: TextIO) -> None:
        self._names, self._out, self._notes = names, out, notes
        self._written = 0

    def show(self, turns: Sequence[Turn], *, whole: bool) -> None:
        if len(turns) == 1:
            print(plain(turns[0].text[self._written :]), end="", file=self._out, flush=True)
            self._written = len(turns[0].text)
        if not whole:
            return
        self._written = 0
        for name, turn in zip(self._names, turns, strict=True):
            if len(turns) > 1:
                print(f"[{name}]\n{plain(turn.text)}", file=self._out)
            for note in turn.notes:
                print(f"lowbit: {name}: {plain(note)}", file=self._notes)
        print(file=self._out, flush=True)


class TerminalScreen:
    """The turns of one question, redrawn as they grow, with the harness's notes in the margin."""

    def __init__(self, names: Sequence[str]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._names, self._console = names, Console()
        self._live: Live | None = None

    def show(self, turns: Sequence[Turn], *, whole: bool) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="visible")
            self._live.start()
        self._live.update(self._drawn(turns), refresh=True)
        if whole:
            self._live.stop()
            self._live = None

    def _drawn(self, turns: Sequence[Turn]) -> Any:
        from rich.console import Group

        if len(turns) > 1 and self._console.width >= _NARROW:
            return self._columns(turns)
        parts = [self._one(name if len(turns) > 1 else "", turn) for name, turn in zip(self._names, turns, strict=True)]
        return Group(*parts)

    def _columns(self, turns: Sequence[Turn]) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(box=box.MINIMAL, expand=True, show_edge=False, pad_edge=False)
        for name in self._names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(self._words(turn) for turn in turns))
        if any(turn.notes for turn in turns):
            table.add_row(*(self._margin(turn) for turn in turns))
        return table

    def _one(self, name: str, turn: Turn) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        if not turn.notes or self._console.width < 2 * _MARGIN + 20:
            body: Any = Group(self._words(turn), *([self._margin(turn)] if turn.notes else []))
        else:
            body = Table.grid(expand=True, padding=(0, 2, 0, 0))
            body.add_column(ratio=1, overflow="fold")
            body.add_column(width=_MARGIN, overflow="fold")
            body.add_row(self._words(turn), self._margin(turn))
        return Group(Text(name, style="bold"), body) if name else body

    def _words(self, turn: Turn) -> Any:
        from rich.text import Text

        words = Text()
        if turn.thoughts:
            words.append(plain(turn.thoughts).strip() + "\n", style="dim italic")
        words.append(plain(turn.text).strip() or ("no answer" if turn.failed else "..."))
        return words

    def _margin(self, turn: Turn) -> Any:
        from rich.text import Text

        return Text("\n".join(plain(note) for note in turn.notes), style="red" if turn.failed else "dim")


def screen(names: Sequence[str]) -> PipedScreen | TerminalScreen:
    """The one that suits standard output."""
    return TerminalScreen(names) if sys.stdout.isatty() else PipedScreen(names, sys.stdout, sys.stderr)
