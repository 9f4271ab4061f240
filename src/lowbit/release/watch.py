"""Watches a folder: checks again when a file changes, and only what the change can have touched."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.release.release_set import open_release
from lowbit.release.runner import Seen, run_checks
from lowbit.release.walk import every_file


def watch(
    path: Path,
    wanted: Collection[str],
    describe: Callable[..., dict[str, Any]],
    *,
    quick: bool,
    every: float = 1.0,
    tell: Callable[[str], None] = lambda name: None,
) -> Iterator[dict[str, Any]]:
    """Results, one now and one after each change, without end. A release that cannot be opened gives {"error"}.

    describe: from (release, verdicts, ran) to a result. every: seconds between looks; a file that is still being
    written is waited for, until two looks find the same.
    """
    seen: Seen = {}
    before: object = None
    while True:
        now = _snapshot(path)
        if now != before:
            time.sleep(every if before is not None else 0)
            if before is not None and _snapshot(path) != now:
                continue
            before = now
            ran: list[str] = []

            def told(name: str, ran: list[str] = ran) -> None:
                ran.append(name)
                tell(name)

            try:
                release = open_release(path)
                yield describe(release, run_checks(release, wanted, quick=quick, seen=seen, tell=told), ran)
            except LowbitError as error:
                yield {"error": str(error), "checks": [], "passed": False}
        time.sleep(every)


def _snapshot(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Names, sizes and times of all files; () where the folder is gone."""
    root = path if path.is_dir() else path.parent
    found = []
    try:
        for file in every_file(root):
            try:
                stat = file.stat()
            except OSError:
                continue
            found.append((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    except (OSError, LowbitError):
        return ()
    return tuple(found)
