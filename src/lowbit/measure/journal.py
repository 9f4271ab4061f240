"""What a long measurement has finished, so that the same command goes on after a kill.

One file of JSON lines: the first says what is measured (a hash of files, texts, options and processor), each other one
is a finished cell. A line is written at once and flushed to the disk; a torn last line is cut off. A file of another
measurement, or one whose lines are not whole, is begun anew: nothing in it is worth more than the time it saves.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from lowbit import console
from lowbit.errors import CannotWrite
from lowbit.files import cannot_write, lock
from lowbit.units import MIB

_FORMAT = "lowbit-measure-work/1"
_LARGEST = 1024 * MIB


class Journal:
    """The cells of one measurement; with ``path`` None they are only held in memory.

    path: the work file
    what: what identifies the measurement; must be JSON

    Raises CannotWrite, also where another process is at work on the same file.
    """

    def __init__(self, path: Path | None, what: Mapping[str, Any]) -> None:
        self.path = path
        self._cells: dict[str, tuple[float, Any]] = {}
        self._file: IO[bytes] | None = None
        if path is None:
            return
        key = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise cannot_write(path, error) from error
        if not lock(self._file):
            self._file.close()
            raise CannotWrite("another process measures into this file", where=path)
        whole = self._read(self._file, key)
        self._file.truncate(whole)
        if not whole:
            self._append({"format": _FORMAT, "key": key})
        elif self._cells:
            console.log(f"Going on from {len(self._cells)} finished parts in {path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def cell(self, name: str, compute: Callable[[], Any]) -> Any:
        """The value of a finished cell, or what ``compute`` gives, which must be JSON, kept before it is returned."""
        if name not in self._cells:
            begin = time.monotonic()
            value = compute()
            self._cells[name] = time.monotonic() - begin, value
            self._append({"cell": name, "seconds": self._cells[name][0], "value": value})
        return self._cells[name][1]

    def has(self, name: str) -> bool:
        return name in self._cells

    def forget(self, name: str) -> None:
        """Leaves out a cell that does not make sense, so that it is measured again."""
        self._cells.pop(name, None)

    def seconds(self, prefix: str) -> float:
        """Time spent on the cells whose names begin so, in earlier runs too."""
        return sum(seconds for name, (seconds, _) in self._cells.items() if name.startswith(prefix))

    def close(self) -> None:
        """Lets go of the file; it stays for the next run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Removes the file: the result is written."""
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, file: IO[bytes], key: str) -> int:
        """Takes the whole cells of the file and gives the bytes that they and the first line take; 0: begin anew."""
        file.seek(0)
        if os.fstat(file.fileno()).st_size > _LARGEST or _parsed(file.readline()) != {"format": _FORMAT, "key": key}:
            return 0
        whole = file.tell()
        for line in file:
            entry = _parsed(line)
            name, seconds = entry.get("cell"), _time(entry.get("seconds"))
            if not isinstance(name, str) or seconds is None or "value" not in entry:
                break
            self._cells[name] = seconds, entry["value"]
            whole += len(line)
        return whole

    def _append(self, entry: dict[str, Any]) -> None:
        if self._file is None or self.path is None:
            return
        try:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error


def pack(values: np.ndarray) -> str:
    """An array as base64 of float64, for a cell; its shape is the reader's to know."""
    return base64.b64encode(np.ascontiguousarray(values, "<f8").tobytes()).decode()


def unpack(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """What ``pack`` took, or None where ``value`` is not an array of that shape of finite numbers."""
    if not isinstance(value, str) or len(value) != 4 * -(-8 * math.prod(shape) // 3):
        return None
    try:
        found = np.frombuffer(base64.b64decode(value, validate=True), "<f8").reshape(shape)
    except (binascii.Error, ValueError):
        return None
    return found if np.isfinite(found).all() else None


def _parsed(line: bytes) -> dict[str, Any]:
    """A line's object; {} where it is torn or something else."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        entry = None
    return entry if isinstance(entry, dict) else {}


def _time(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
        return float(value)
    return None
