"""A job: IN, the journal beside it, and whether they still belong together.

The journal is in the folder IN.lowbit-batch. What it was begun with stays: the same IN (to whose end lines may be
added), the same model, the same options. Anything else is refused, unless the batch is to begin anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from lowbit import console
from lowbit.batch.items import Item, NoItem, Place, Reader, read_place
from lowbit.batch.journal import CANCELLED, FAILED, Journal, Lease
from lowbit.errors import BadFile, BadOption, NotFound
from lowbit.files import cannot_write
from lowbit.units import MIB

SUFFIX = ".lowbit-batch"
_DATABASE = "journal.sqlite"
_FLAGS = {"layers": "--without", "required": "--require"}  # where another than the setting's name


def folder_of(source: Path) -> Path:
    """Where a job's journal is unless it is said otherwise."""
    return source.with_name(source.name + SUFFIX)


class Job:
    """An open job. A context manager. source: IN, which ``reader`` reads. grows: whether lines may be added to it.
    Raises BadFile, CannotWrite."""

    def __init__(self, source: Path, folder: Path, reader: Reader | None = None, *, grows: bool = True) -> None:
        self.source, self.folder, self._grows, self._reader = source, folder, grows, reader
        self.journal = Journal(folder / _DATABASE)
        self._stat: tuple[int, int, int] | None = None

    @classmethod
    def existing(cls, source: Path, folder: Path | None = None) -> Job:
        """One that was begun before. Raises NotFound."""
        folder = folder or folder_of(source)
        if not (folder / _DATABASE).is_file():
            raise NotFound("no batch of this file was begun", where=source, expected=str(folder),
                           hint=f"lowbit batch run {source} -o OUT.jsonl --model MODEL begins one")  # fmt: skip
        return cls(source, folder)

    @property
    def reader(self) -> Reader:
        """Of IN's items, as the job was begun. Raises BadFile, BadOption."""
        if self._reader is None:
            from lowbit.batch.sources import opened

            self._reader = opened(self.source, self.folder, self.journal.get("reading"))
        return self._reader

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()

    def begin(self, settings: Mapping[str, Any], *, strict: bool = False, reading: Any = None) -> None:
        """Takes IN's items into the journal, or sees that they are there and that the settings are the same. reading:
        how IN is read, for ``opened``.

        Raises BadFile (IN is no batch, or another than it was), BadOption (other settings).
        """
        if self.journal.get("state") == "cancelled":
            hint = f"`lowbit batch resume {self.source}` takes it up again; --restart begins it anew"
            raise BadOption("this batch was cancelled", where=self.source, hint=hint)
        before = self.journal.get("settings")
        if before is None:
            self._take_in(dict(settings), strict, reading)
        else:
            self._check_settings(before, settings)
            self._check_source(strict)

    def item(self, lease: Lease) -> Item:
        """Reads a leased item from IN. Raises NoItem, BadFile."""
        self._same_source()
        place = lease.place
        raw = read_place(self.reader.path, place.offset, place.length)
        return self.reader.item(raw, place.custom_id or "")

    # IN

    def _take_in(self, settings: dict[str, Any], strict: bool, reading: Any) -> None:
        with self.journal.transaction():
            if self.journal.get("settings") is not None:  # another process was quicker
                return
            seen = self._look()
            count, bad, first = self.journal.add(_watched(self.reader.places(0, 1), strict, self.source))
            if count == 0:
                raise BadFile("no items", where=self.source, expected="a request in each line")
            if bad == count and first is not None:
                raise BadFile("not a batch: no line is a request", where=self.source,
                              found=f"line {first.line}: {first.problem}", hint=_FORM)  # fmt: skip
            self.journal.set("schema", self._schema())
            self.journal.set("reading", reading)
            self.journal.set("source", seen)
            self.journal.set("created", time.time())
            self.journal.set("state", "running")
            self.journal.set("settings", settings)
        _tell_bad(count, bad, first)

    def _schema(self) -> Any:
        """The schema that the first item's answer is to follow, or None."""
        sql = "SELECT offset, length, custom_id FROM items WHERE state = 0 ORDER BY number LIMIT 1"
        offset, length, custom_id = next(self.journal.query(sql))
        try:
            body = self.reader.item(read_place(self.reader.path, offset, length), custom_id).body
        except NoItem:
            return None
        form = body.get("response_format")
        inner = form.get("json_schema") if isinstance(form, dict) else None
        return inner.get("schema") if isinstance(inner, dict) else None

    def _look(self) -> dict[str, Any]:
        """What IN is: size, time, inode, and the hash of so many bytes."""
        size, when, inode = _stat(self.source)
        self._stat = (size, when, inode)
        return {"size": size, "mtime": when, "inode": inode, "sha256": _hash(self.source, size)}

    def _same_source(self) -> None:
        """Raises BadFile where IN is no longer what it was; lines may have been added."""
        if self._stat is not None and _stat(self.source) == self._stat:
            return
        known = self.journal.get("source") or {}
        seen = _stat(self.source)
        if seen != (known.get("size"), known.get("mtime"), known.get("inode")) and (
            seen[0] < known.get("size", 0)
            or (seen[0] > known.get("size", 0) and not self._grows)
            or _hash(self.source, known["size"]) != known.get("sha256")
        ):
            raise BadFile("not the file that this batch was begun with", where=self.source,
                          hint="Put it back as it was (lines may be added to the end of a text), give this one another "
                          "name, or begin anew with --restart")  # fmt: skip
        self._stat = seen

    def _check_source(self, strict: bool) -> None:
        self._same_source()
        known = self.journal.get("source")
        if _stat(self.source)[0] == known["size"]:
            return
        with self.journal.transaction():
            known = self.journal.get("source")
            seen = self._look()
            if seen["size"] == known["size"]:
                return
            last = next(self.journal.query("SELECT line, offset + length FROM items ORDER BY number DESC LIMIT 1"))
            tail = read_place(self.source, known["size"] - 1, 2)
            if b"\n" not in tail:
                raise BadFile("the last line is another than it was", where=self.source, found=f"line {last[0]}",
                              hint="Lines may be added at the end; --restart begins anew")  # fmt: skip
            begin = known["size"] if tail[:1] == b"\n" else known["size"] + 1
            number = last[0] + 1 + _newlines(self.source, last[1], begin)
            count, bad, first = self.journal.add(_watched(self.reader.places(begin, number), strict, self.source))
            self.journal.set("source", seen)
        console.log(f"{count:,} new lines at the end of {self.source} were taken in")
        _tell_bad(count, bad, first)

    # Settings

    def _check_settings(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in (*before, *(name for name in now if name not in before)):
            was, found = before.get(name), now.get(name)
            if was == found or (name == "endpoint_model" and None in (was, found)):
                continue
            short = name.rpartition(".")[2]
            flag = _FLAGS.get(short, "--" + short.replace("_", "-"))
            plain = type(was) in (int, float, bool) or (isinstance(was, str) and was.isidentifier())
            said = f"{flag} {was}" if plain else f"the {flag} that it was begun with"
            raise BadOption(
                f"this batch was begun with another {short.replace('_', ' ')}", where=self.source,
                found=_short(found), expected=_short(was),
                hint=f"Give it {said}, or add --restart to do all of it anew",
            )  # fmt: skip


def restart(source: Path, folder: Path) -> None:
    """Removes what was done. Raises BadOption where a process is at it, CannotWrite."""
    path = folder / _DATABASE
    if not path.exists():
        return
    with contextlib.suppress(BadFile), contextlib.closing(Journal(path)) as journal:
        if alive := [owner.pid for owner in journal.owners() if owner.alive()]:
            raise BadOption("a process works on this batch", where=source, found=f"pid {alive[0]}",
                            hint=f"`lowbit batch cancel {source}` ends it")  # fmt: skip
    try:
        for file in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None


def take_up(job: Job) -> int:
    """Takes up items that were cancelled; how many."""
    return job.journal.revive(CANCELLED)


def retry_failed(job: Job) -> int:
    """Takes up items that had failed; how many."""
    return job.journal.revive(FAILED)


_FORM = (
    'A line is {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}; rows want --template'
)


def _watched(places: Any, strict: bool, source: Path) -> Any:
    for place in places:
        if strict and place.problem is not None:
            raise BadFile("not a request", where=f"{source}, line {place.line}", found=place.problem)
        yield place


def _tell_bad(count: int, bad: int, first: Place | None) -> None:
    if bad and first is not None:
        console.log(f"{bad:,} of {count:,} lines are no request and end as errors; --strict refuses them. "
                    f"The first is line {first.line}: {first.problem}")  # fmt: skip


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise BadFile(f"cannot be read: {error.strerror}", where=path) from None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _hash(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as handle:
            while size and (piece := handle.read(min(4 * MIB, size))):
                digest.update(piece)
                size -= len(piece)
    except OSError as error:
        raise BadFile(f"cannot be read: {error.strerror}", where=path) from None
    return digest.hexdigest()


def _newlines(path: Path, begin: int, end: int) -> int:
    """Line ends between the last item's end and what was added: blank lines count too."""
    return read_place(path, begin, end - begin).count(b"\n") if end > begin else 0


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 100 else text[:97] + "..."
