"""Progress and log lines, on standard error only; ``--quiet`` silences them.

Standard output belongs to results: ``--json -`` prints there and nothing else does.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from lowbit.units import format_duration

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


_LINE_EVERY = 30.0  # seconds, where there is no terminal to draw a bar on


class Progress:
    """A bar with a description, a fraction and free text (loss, time left)."""

    def __init__(self, bar: Any = None, task: Any = None, total: float = 0.0, unit: str = "") -> None:
        self._bar, self._task, self._total, self._unit = bar, task, total, unit
        self._done, self._begun = 0.0, time.monotonic()

    def advance(self, amount: float) -> None:
        """Adds to the completed amount; the note is the rate and the time left."""
        self._done += amount
        rate = max(1e-9, self._done) / max(1e-9, time.monotonic() - self._begun)
        said = f"{rate / 1e6:.0f} million" if rate >= 1e6 else f"{rate:.3g}"
        left = format_duration(max(0.0, self._total - self._done) / rate)
        self.update(self._done, f"{said} {self._unit} a second, {left} left")

    def update(self, completed: float, note: str | None = None) -> None:
        """Sets the completed amount (same unit as the total) and, if given, the note after the bar."""
        if self._bar is not None:
            fields = {"note": note} if note is not None else {}
            self._bar.update(self._task, completed=completed, **fields)


class _Lines(Progress):
    """The same as lines in a log, one now and then."""

    def __init__(self, description: str, total: float, unit: str) -> None:
        super().__init__(total=total, unit=unit)
        self._description, self._last = description, time.monotonic()

    def update(self, completed: float, note: str | None = None) -> None:
        if time.monotonic() - self._last >= _LINE_EVERY:
            self._last = time.monotonic()
            percent = min(100, int(100 * completed / self._total)) if self._total > 0 else 100
            log(f"{self._description}: {percent}%" + (f", {note}" if note else ""))


@contextlib.contextmanager
def progress(description: str, total: float, unit: str = "steps") -> Iterator[Progress]:
    """A progress bar on standard error: live on a terminal; elsewhere a line at the start and one every half minute.

    unit: of ``total``, for ``advance``.
    """
    if _quiet:
        yield Progress()
        return
    if not sys.stderr.isatty():
        log(f"{description} ...")
        yield _Lines(description, total, unit)
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
        yield Progress(bar, bar.add_task(description, total=total, note=""), total, unit)
