"""Finished items on disk, so that a killed run goes on: one JSON line each, in a file per set and model.

The files lie in the user's cache folder ($XDG_CACHE_HOME/lowbit/tasks) under a hash of everything an outcome depends
on, and go when the whole result is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

from lowbit import console, files

_LONGEST = 1 << 20


def cache_folder() -> Path:
    """Where unfinished measurements of this user lie."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowbit" / "tasks"


class Journal:
    """Outcomes by item. A context manager; ``done`` holds what an earlier run finished.

    parts: what the outcomes depend on. Where the file cannot be written or another process has it, the run goes on
    without.
    """

    def __init__(self, *parts: str, folder: Path | None = None) -> None:
        name = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
        self.path = (folder or cache_folder()) / f"{name}.jsonl"
        self.done: dict[str, dict[str, Any]] = {}
        self.listener: Callable[[int], None] = lambda n: None  # told how many outcomes there are
        self._handle: IO[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = open(self.path, "a+b")
        except OSError as error:
            console.log(f"{self.path}: {error.strerror}; a killed run will begin anew")
            return self
        if not files.lock(handle):
            handle.close()
            console.log(f"{self.path}: in use by another run; this one keeps no journal")
            return self
        handle.seek(0)
        whole = 0
        while line := handle.readline(_LONGEST):
            entry = _entry(line)
            if entry is None:
                break  # torn by the kill: written again
            self.done[entry[0]] = entry[1]
            whole = handle.tell()
        handle.truncate(whole)
        self._handle = handle
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def add(self, item: str, outcome: dict[str, Any]) -> None:
        """Keeps an outcome; it is safe from a kill when this returns."""
        self.done[item] = outcome
        self.listener(len(self.done))
        if self._handle is not None:
            line = json.dumps([item, outcome], ensure_ascii=False) + "\n"
            try:
                self._handle.seek(0, os.SEEK_END)
                self._handle.write(line.encode("utf-8", "surrogatepass"))
                self._handle.flush()
            except OSError as error:
                console.log(f"{self.path}: {error.strerror}; a killed run will begin anew")
                self._handle = None

    def remove(self) -> None:
        """Forgets it: the result is somewhere else now."""
        with contextlib.suppress(OSError):
            self.path.unlink()


def _entry(line: bytes) -> tuple[str, dict[str, Any]] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        item, outcome = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    usable = isinstance(item, str) and isinstance(outcome, dict) and isinstance(outcome.get("scores"), dict)
    return (item, outcome) if usable else None
