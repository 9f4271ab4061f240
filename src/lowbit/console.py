"""Progress and log lines, on standard error only; ``--quiet`` silences them.

Standard output belongs to results: ``--json -`` prints there and nothing else does.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Switches log lines and progress bars off (or on again) for this process."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    return _quiet


def log(message: str) -> None:
    """One line to standard error, unless quiet."""
    if not _quiet:
        print(message, file=sys.stderr, flush=True)


class Progress:
    """A bar with a description, a fraction and free text (loss, time left)."""

    def __init__(self, bar: Any = None, task: Any = None) -> None:
        self._bar, self._task = bar, task

    def update(self, completed: float, note: str | None = None) -> None:
        """Sets the completed amount (same unit as the total) and, if given, the note after the bar."""
        if self._bar is not None:
            fields = {"note": note} if note is not None else {}
            self._bar.update(self._task, completed=completed, **fields)


@contextlib.contextmanager
def progress(description: str, total: float) -> Iterator[Progress]:
    """A progress bar on standard error: live on a terminal, one line at start and end elsewhere."""
    if _quiet:
        yield Progress()
        return
    if not sys.stderr.isatty():
        log(f"{description} ...")
        plain = Progress()
        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=False) as bar:
        yield Progress(bar, bar.add_task(description, total=total, note=""))
