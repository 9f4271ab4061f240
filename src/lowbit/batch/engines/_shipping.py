"""A model's files on machines that may not have them: found there by their path, or sent in pieces to a cache.

A cached file is in a folder named by its SHA-256, which is checked each time that it is to be used, and before a file
that came gets its name. So it does not matter who sent it, nor whether somebody was killed on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lowbit.batch.engines.base import ends
from lowbit.checkpoint.resolve import cache_folder
from lowbit.errors import BadFile, CannotWrite
from lowbit.files import cannot_write, sha256
from lowbit.units import MIB, format_bytes

PIECE = 8 * MIB
_AHEAD = 4  # pieces of a file that are kept for others who need them at the same time
_MARGIN = 1 << 28  # bytes of the disk left to others


@dataclass(frozen=True)
class Needed:
    """A file of the one who sends. path: there. name: what it must be called. ends: hash of its first and last MiB."""

    path: str
    name: str
    size: int
    ends: str

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> Needed:
        return cls(str(path.absolute()), name or path.name, path.stat().st_size, ends(path))

    def here(self) -> bool:
        """Whether this machine has it by its path (a shared disk, a copy), as far as its size and ends tell."""
        path = Path(self.path)
        with contextlib.suppress(OSError):
            return path.is_file() and path.stat().st_size == self.size and ends(path) == self.ends
        return False


def place(needed: Needed, digest: str) -> Path:
    """Where it is in the cache of this machine."""
    return cache_folder() / "shipped" / digest / Path(needed.name).name


def cached(needed: Needed, digest: str) -> bool:
    """Whether the cache has it, bit for bit; what is there and is not it is removed."""
    path = place(needed, digest)
    if not path.is_file():
        return False
    if path.stat().st_size == needed.size and sha256(path) == digest:
        return True
    path.unlink(missing_ok=True)
    return False


def as_folder(files: Iterable[tuple[str, Path]]) -> Path:
    """A folder of links to cached files by the names they have in it, made once."""
    files = sorted(files)
    key = hashlib.sha256("\n".join(f"{name}\0{path}" for name, path in files).encode()).hexdigest()
    folder = cache_folder() / "shipped" / f"folder-{key}"
    for name, path in files:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink() or link.readlink() != path:
            beside = link.with_name(f"{link.name}.{secrets.token_hex(4)}")
            beside.symlink_to(path)
            beside.replace(link)
    return folder


class Receiving:
    """A file on its way into the cache. Raises CannotWrite: the disk has no room for it."""

    def __init__(self, needed: Needed, digest: str) -> None:
        self._needed, self._expected, self._at = needed, digest, 0
        self._final = place(needed, digest)
        self._partial = self._final.with_name(f"{self._final.name}.{secrets.token_hex(8)}.partial")
        self._hash = hashlib.sha256()
        try:
            self._final.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._final.parent).free
            if free < needed.size + _MARGIN:
                raise CannotWrite("no room for the model", where=self._final.parent, found=f"{format_bytes(free)} free",
                                  expected=format_bytes(needed.size + _MARGIN))  # fmt: skip
            self._handle: BinaryIO = open(self._partial, "wb")  # noqa: SIM115
        except OSError as error:
            raise cannot_write(self._final, error) from error

    def write(self, piece: bytes) -> None:
        """The next bytes of it. Raises CannotWrite."""
        try:
            self._handle.write(piece)
        except OSError as error:
            self.drop()
            raise cannot_write(self._final, error) from error
        self._hash.update(piece)
        self._at += len(piece)

    def finish(self) -> None:
        """Gives it its name. Raises BadFile where it is not what was promised, CannotWrite."""
        found = self._hash.hexdigest()
        if found != self._expected or self._at != self._needed.size:
            self.drop()
            raise BadFile("another file came than was announced", where=self._needed.name,
                          found=f"{self._at} bytes, {found}", expected=f"{self._needed.size} bytes, {self._expected}",
                          hint="Did it change while the batch was running?")  # fmt: skip
        try:
            self._handle.flush()
            os.fsync(self._handle.fileno())
            self._handle.close()
            self._partial.replace(self._final)
        except OSError as error:
            self.drop()
            raise cannot_write(self._final, error) from error

    def drop(self) -> None:
        """Leaves nothing of it."""
        self._handle.close()
        self._partial.unlink(missing_ok=True)


class Sending:
    """A file that others may need, in pieces. put: keeps bytes where they can be fetched from, and gives what names
    them (ray.put)."""

    def __init__(self, needed: Needed, put: Callable[[bytes], Any]) -> None:
        self.needed, self._put = needed, put
        self._digest: asyncio.Future[str] | None = None
        self._kept: OrderedDict[int, asyncio.Future[Any]] = OrderedDict()

    async def digest(self) -> str:
        """SHA-256 of all of it; read once. Raises OSError."""
        if self._digest is None:
            self._digest = asyncio.ensure_future(asyncio.to_thread(sha256, self.needed.path))
        return await asyncio.shield(self._digest)

    async def to(self, take: Callable[[Any], Awaitable[Any]]) -> None:
        """Calls ``take`` with one piece after the other. Those who are at the same place share the pieces; more than a
        few are never kept, so that a file of any size passes through a small object store."""
        for offset in range(0, self.needed.size, PIECE):
            await take(await self._piece(offset))

    async def _piece(self, offset: int) -> Any:
        if offset not in self._kept:
            self._kept[offset] = asyncio.ensure_future(asyncio.to_thread(self._read, offset))
            while len(self._kept) > _AHEAD:
                self._kept.popitem(last=False)
        return await asyncio.shield(self._kept[offset])

    def _read(self, offset: int) -> Any:
        with open(self.needed.path, "rb") as handle:
            handle.seek(offset)
            return self._put(handle.read(PIECE))
