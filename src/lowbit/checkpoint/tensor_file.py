"""What the containers share: a file whose header says where each tensor lies, read at offsets from any thread."""

from __future__ import annotations

import functools
import math
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowbit.errors import BadFile
from lowbit.files import read_at
from lowbit.units import MIB

_AHEAD = 16 * MIB


@dataclass(frozen=True)
class Entry:
    """Where a stored tensor lies: dtype in the container's spelling, row-major shape, absolute start, bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


class TensorFile:
    """One open file of tensors: ``entries`` by name, ``raw`` for a view and ``read`` for a copy of stored bytes.

    ``read`` is for whole models: unlike a mapped page, what it has read does not stay in the process's memory.
    """

    path: Path
    entries: dict[str, Entry]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = open(path, "rb", buffering=0)  # noqa: SIM115 - close() and the finalizer close it
        self.close = weakref.finalize(self, self._handle.close)
        self._asked = 0  # up to which offset the kernel was asked to read

    @functools.cached_property
    def _map(self) -> np.ndarray:
        size = os.fstat(self._handle.fileno()).st_size
        return np.memmap(self._handle, mode="r", dtype=np.uint8) if size else np.zeros(0, np.uint8)

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8, not copied: the file's own pages, read-only."""
        entry = self.entries[name]
        return self._map[entry.start : entry.start + entry.n_bytes]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """The tensor's bytes from ``start`` to ``stop``, a fresh uint8 array. Raises BadFile where the file has been
        shortened since it was opened."""
        entry = self.entries[name]
        if not 0 <= start <= stop <= entry.n_bytes:
            raise ValueError(f"{name}: bytes {start} to {stop} of {entry.n_bytes}")
        out = np.empty(stop - start, np.uint8)
        try:
            done = read_at(self._handle, out.data, entry.start + start)
        except OSError as error:
            where = f"{self.path}: {name}"
            raise BadFile(f"cannot be read: {error.strerror or error}", where=where) from error
        if done < out.size:
            raise BadFile("the file was shortened while it was read", where=f"{self.path}: {name}")
        if out.size >= MIB:
            self._read_ahead(entry.start + stop)
        return out

    def _read_ahead(self, at: int) -> None:
        """Lets the kernel fetch what follows while the caller works on what it has."""
        if not hasattr(os, "posix_fadvise"):  # macOS, Windows
            return
        if not at - _AHEAD <= self._asked <= at + _AHEAD:  # a jump
            self._asked = at
        begin = max(at, self._asked)
        self._asked = at + _AHEAD
        if self._asked > begin:
            os.posix_fadvise(self._handle.fileno(), begin, self._asked - begin, os.POSIX_FADV_WILLNEED)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of the tensor seen as (rows, n), a vector as one row: uint8 (stop - start, row_bytes)."""
        entry = self.entries[name]
        row = entry.n_bytes // max(1, n_rows(entry.shape))
        return self.read(name, start * row, stop * row).reshape(stop - start, row)

    @property
    def identity(self) -> list[object]:
        """JSON that is another when the file is another, or was written since."""
        stat = os.fstat(self._handle.fileno())
        return [self.path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def n_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor seen as (rows, n), all leading dimensions flattened; 1 of a vector."""
    return math.prod(shape[:-1])


def pick_rows(
    order: np.ndarray | None, start: int, stop: int, read: Callable[[int, int], np.ndarray], *, of_vector: bool = False
) -> np.ndarray:
    """Rows ``order[start:stop]``, through ``read(first, last)`` of the range that holds them: within a few heads, as
    orders only move rows within a head. ``order`` None: the rows themselves. of_vector: a vector is one row, and
    ``order`` is of its elements."""
    if order is None or start == stop:
        return read(start, stop)
    if of_vector:
        return read(start, stop)[:, order]
    wanted = order[start:stop]
    first = int(wanted.min())
    return read(first, int(wanted.max()) + 1)[wanted - first]
