"""A file written at offsets, or a folder of files, under a name of its own, which a killed run leaves and the next one
goes on with.

Beside OUT lies OUT.partial, at its full size from the start, and OUT.partial.journal: a line of JSON that says what
was asked of which source, then a line for each part that is whole. A part is named only after an fsync of its bytes, so
what the journal names can be believed after a power cut too. A folder's parts lie one after another in its files, and
their sizes are not known before they are written: its journal says of each where it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from lowbit import files
from lowbit.errors import BadOption

FORMAT = "lowbit-partial/1"
_NOTE_EVERY = 1.0  # seconds between two fsyncs of a folder's files
_LONGEST = 1 << 24  # bytes of a journal's line; of a longer one lowbit is not the author


def journal_of(partial: Path) -> Path:
    """The journal of a partial file."""
    return partial.with_name(partial.name + ".journal")


class Partial:
    """The open file: ``done`` are the parts an earlier run has left, ``write`` and ``finish_part`` add others."""

    def __init__(self, path: Path, handle: BinaryIO, journal: BinaryIO, done: Collection[str]) -> None:
        self.path, self.done = path, frozenset(done)
        self._handle, self._journal = handle, journal
        self._lock, self._whole = threading.Lock(), list[str]()
        # fsync may take long, and nobody has to wait for it but the journal.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lowbit-journal")
        self._noting: Future[None] | None = None

    def write(self, at: int, data: memoryview) -> None:
        """Puts bytes at an offset. Any thread may call it."""
        files.write_at(self._handle, data, at)

    def finish_part(self, name: str) -> None:
        """All bytes of the part have been written; soon the journal says so. One thread calls it."""
        with self._lock:
            self._whole.append(name)
            if self._noting is not None and not self._noting.done():
                return  # it takes this name along
            failed, self._noting = self._noting, self._pool.submit(self._note)
        if failed is not None:
            failed.result()

    def sync(self) -> None:
        """Waits until everything that was written is on the disk."""
        if self._noting is not None:
            self._noting.result()
        self._note()
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        self._pool.shutdown()
        self._handle.close()

    def _note(self) -> None:
        while True:
            with self._lock:
                names, self._whole = self._whole, []
            if not names:
                return
            os.fsync(self._handle.fileno())
            self._journal.write(b"".join(_line({"whole": name}) for name in names))
            self._journal.flush()


@contextlib.contextmanager
def resumable(
    final: Path, size: int, start: Sequence[tuple[int, bytes]], parts: Collection[str], asked: Mapping[str, object]
) -> Iterator[Partial]:
    """The partial file of ``final``, which takes that name when the block ends without an error.

    size: of the whole file, in bytes. start: what every run writes before anything else, with its offsets. parts: the
    names of its parts. asked: JSON, everything that decides about the file's bytes; an earlier run's partial file is
    gone on with only if this is equal, and discarded otherwise. Interrupted or killed, it stays; any error removes it.
    Raises CannotWrite, and BadOption where another process is writing the same file.
    """
    try:
        files.prepare_place(final)
        partial = final.with_name(final.name + ".partial")
        with _claimed(journal_of(partial), final) as journal:
            try:
                file = _begin(partial, size, start, parts, asked, journal)
                with contextlib.closing(file):
                    yield file
                    file.sync()
                partial.replace(final)
            except Exception:
                partial.unlink(missing_ok=True)
                journal_of(partial).unlink(missing_ok=True)
                raise
            journal_of(partial).unlink(missing_ok=True)
    except OSError as error:
        raise files.cannot_write(final, error) from error


class PartialFolder:
    """The open folder at ``path``: ``done`` are the leading parts that an earlier run has left, each with what was told
    of it."""

    def __init__(self, path: Path, journal: BinaryIO, done: Mapping[str, Any]) -> None:
        self.path, self.done = path, dict(done)
        self._journal, self._noted = journal, time.monotonic()
        self._whole: list[bytes] = []

    def finish_part(self, name: str, handle: BinaryIO, told: Any) -> None:
        """The part's bytes are the last in the file ``handle``; soon the journal says so. told: JSON about it."""
        handle.flush()
        stated = os.fstat(handle.fileno())
        where = {"file": Path(handle.name).name, "inode": stated.st_ino, "end": stated.st_size}
        self._whole.append(_line({"whole": name, "told": told, **where}))
        if time.monotonic() - self._noted >= _NOTE_EVERY:
            self.note(handle)

    def note(self, handle: BinaryIO) -> None:
        """Puts what is whole into the journal; before another file is begun."""
        os.fsync(handle.fileno())
        self._journal.write(b"".join(self._whole))
        self._journal.flush()
        self._whole.clear()
        self._noted = time.monotonic()


@contextlib.contextmanager
def resumable_folder(
    final: Path, parts: Sequence[str], asked: Mapping[str, object], *, marker: str
) -> Iterator[PartialFolder]:
    """``resumable`` for a folder whose ``parts`` are written in this order. A folder that has the name already is
    replaced if it is empty or has a file called ``marker`` (see ``files.check_replaceable``)."""
    try:
        files.check_replaceable(final, marker)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(final.name + ".partial")
        with _claimed(journal_of(partial), final) as journal:
            try:
                yield _begin_folder(partial, parts, asked, journal)
                files.replace_folder(partial, final)
            except Exception:
                shutil.rmtree(partial, ignore_errors=True)
                journal_of(partial).unlink(missing_ok=True)
                raise
            journal_of(partial).unlink(missing_ok=True)
    except OSError as error:
        raise files.cannot_write(final, error) from error


def _begin_folder(partial: Path, parts: Sequence[str], asked: Mapping[str, object], journal: BinaryIO) -> PartialFolder:
    head: dict[str, object] = {"format": FORMAT, "asked": asked}
    is_folder = partial.is_dir() and not partial.is_symlink()
    if is_folder:
        found = _read_folder(journal, head | {"inode": partial.stat().st_ino}, partial, parts)
        if found is not None:
            kept = {told["file"] for told in found.values()}
            for path in partial.iterdir():
                if path.name not in kept:  # whole or half, it is written again
                    path.unlink()
            return PartialFolder(partial, journal, {name: told["told"] for name, told in found.items()})
    journal.truncate(0)
    os.fsync(journal.fileno())
    if is_folder:
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)
    partial.mkdir()
    journal.write(_line(head | {"inode": partial.stat().st_ino}))
    journal.flush()
    os.fsync(journal.fileno())
    return PartialFolder(partial, journal, {})


def _read_folder(
    journal: BinaryIO, head: Mapping[str, object], partial: Path, parts: Sequence[str]
) -> dict[str, Any] | None:
    """The leading parts that the journal calls whole and whose bytes are there, with their lines; cuts off the rest.
    None where the journal is of another folder."""
    journal.seek(0)
    line = journal.readline(_LONGEST)
    if not line.endswith(b"\n") or line != _line(head):
        return None
    done: dict[str, Any] = {}
    for name in parts:
        end, line = journal.tell(), journal.readline(_LONGEST)
        told = _told(line, partial, name)
        if told is None:
            journal.truncate(end)
            journal.seek(end)
            break
        done[name] = told
    return done


def _told(line: bytes, partial: Path, name: str) -> dict[str, Any] | None:
    """A line about the part ``name`` whose bytes are there; None where it is any other line."""
    try:
        told = json.loads(line) if line.endswith(b"\n") else {}
        stated = (partial / told["file"]).stat()
        whole = (told["whole"], told["inode"]) == (name, stated.st_ino) and told["end"] <= stated.st_size
        return told if whole and "told" in told else None
    except (ValueError, KeyError, TypeError, OSError):
        return None


@contextlib.contextmanager
def _claimed(path: Path, final: Path) -> Iterator[BinaryIO]:
    """The open journal, held by this process alone."""
    while True:
        with open(path, "a+b") as journal:
            if not files.lock(journal):
                hint = "Wait for it, or choose another --out"
                raise BadOption("another run is writing this file", where=final, hint=hint)
            # Its last owner may have removed it between the two lines above.
            if _is_at(path, journal):
                yield journal
                return


def _is_at(path: Path, handle: BinaryIO) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(handle.fileno()))
    return False


def _begin(
    partial: Path,
    size: int,
    start: Sequence[tuple[int, bytes]],
    parts: Collection[str],
    asked: Mapping[str, object],
    journal: BinaryIO,
) -> Partial:
    head = {"format": FORMAT, "size": size, "asked": asked}
    with contextlib.suppress(FileNotFoundError):
        handle = open(partial, "r+b", buffering=0)  # noqa: SIM115 - Partial closes it
        stated = os.fstat(handle.fileno())
        done = _read(journal, head | {"inode": stated.st_ino}, parts) if stated.st_size == size else None
        if done is not None:
            return Partial(partial, handle, journal, done)
        handle.close()
    # Whatever is killed from here on leaves no journal that names its file.
    journal.truncate(0)
    os.fsync(journal.fileno())
    handle = open(partial, "w+b", buffering=0)  # noqa: SIM115
    with contextlib.ExitStack() as failed:
        failed.callback(handle.close)
        handle.truncate(size)
        for at, data in start:
            files.write_at(handle, memoryview(data), at)
        os.fsync(handle.fileno())
        journal.write(_line(head | {"inode": os.fstat(handle.fileno()).st_ino}))
        journal.flush()
        os.fsync(journal.fileno())
        failed.pop_all()
    return Partial(partial, handle, journal, ())


def _read(journal: BinaryIO, head: Mapping[str, object], parts: Collection[str]) -> set[str] | None:
    """The parts that the journal calls whole, and cuts off a line that was not; None where it is of another file."""
    journal.seek(0)
    line = journal.readline(_LONGEST)
    if not line.endswith(b"\n") or line != _line(head):
        return None
    done, known = set(), {_line({"whole": name}): name for name in parts}
    while (end := journal.tell()) >= 0 and (line := journal.readline(_LONGEST)):
        if line not in known:
            break
        done.add(known[line])
    journal.truncate(end)
    return done


def _line(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
