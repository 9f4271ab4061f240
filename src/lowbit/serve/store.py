"""What /v1/files and /v1/batches keep: an SQLite file with a record of each, and the contents beside it.

The folder is made with the first upload. One process has it at a time. An id is made here and never taken from a
request: a name that was not given out is not there, so none leads out of the folder.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from lowbit import files
from lowbit.harness import HarnessError

Json = dict[str, Any]
_ID = re.compile(r"(file-|batch_)[0-9a-f]{24}\Z")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS batches (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, record TEXT NOT NULL);
"""


class Store:
    """folder: where all is. For any thread. Methods raise HarnessError (503) where the folder cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: IO[Any] | None = None

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def exists(self) -> bool:
        return (self.folder / "index.sqlite").is_file()

    def open(self) -> None:
        """Makes the folder, or takes the one that is there."""
        if self._lock is not None:
            return
        try:
            (self.folder / "files").mkdir(parents=True, exist_ok=True)
            handle = (self.folder / "lock").open("a")
        except OSError as error:
            message = f"files cannot be kept in {self.folder}: {error.strerror}"
            raise HarnessError(message, status=503, code="files_unavailable") from None
        if not files.lock(handle):
            handle.close()
            message = f"another process has {self.folder}; --files names another folder"
            raise HarnessError(message, status=503, code="files_unavailable")
        self._lock = handle
        for left in (self.folder / "files").glob("*.partial"):  # of an upload that was cut off
            left.unlink(missing_ok=True)
        with self._db() as db:
            db.executescript(_SCHEMA)

    @contextlib.contextmanager
    def _db(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.folder / "index.sqlite", timeout=30, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode=WAL")
                yield db
        except sqlite3.Error as error:
            message = f"the index of files cannot be used: {error}"
            raise HarnessError(message, status=503, code="files_unavailable") from None

    # Records

    def add(self, kind: str, record: Json) -> Json:
        with self._db() as db:
            db.execute(f"INSERT INTO {kind} (id, record) VALUES (?, ?)", (record["id"], json.dumps(record)))
        return record

    def get(self, kind: str, id: str) -> Json:
        """Raises HarnessError (404)."""
        if _ID.match(id) and self.exists:
            with self._db() as db:
                row = db.execute(f"SELECT record FROM {kind} WHERE id = ?", (id,)).fetchone()
            if row is not None:
                found: Json = json.loads(row[0])
                return found
        what = {"files": "file", "batches": "batch"}[kind]
        raise HarnessError(f"there is no {what} {id[:60]}", status=404, code=f"{what}_not_found", param="id")

    def change(self, kind: str, id: str, **keys: Any) -> Json:
        """Changes a record's keys, others' changes meanwhile kept."""
        with self._db() as db:
            db.execute("BEGIN IMMEDIATE")
            row = db.execute(f"SELECT record FROM {kind} WHERE id = ?", (id,)).fetchone()
            record: Json = json.loads(row[0]) | keys
            db.execute(f"UPDATE {kind} SET record = ? WHERE id = ?", (json.dumps(record), id))
            db.execute("COMMIT")
        return record

    def listed(
        self, kind: str, *, after: str | None, limit: int, oldest_first: bool, **having: Any
    ) -> tuple[list[Json], bool]:
        """Records with these values, and whether there are more. Raises HarnessError (404) where ``after`` is none."""
        if not self.exists:
            return [], False
        order, beyond = ("ASC", ">") if oldest_first else ("DESC", "<")
        where, values = [f"json_extract(record, '$.{name}') = ?" for name in having], list(having.values())
        if after is not None:
            self.get(kind, after)
            where.append(f"seq {beyond} (SELECT seq FROM {kind} WHERE id = ?)")
            values.append(after)
        clause = f"WHERE {' AND '.join(where)}" if where else ""
        with self._db() as db:
            sql = f"SELECT record FROM {kind} {clause} ORDER BY seq {order} LIMIT ?"
            rows = db.execute(sql, (*values, limit + 1)).fetchall()
        return [json.loads(row[0]) for row in rows[:limit]], len(rows) > limit

    # Contents

    def path(self, id: str) -> Path:
        """Where a file's bytes are."""
        assert _ID.match(id), id
        return self.folder / "files" / id

    def batch_folder(self, id: str) -> Path:
        """Where a batch's journal is."""
        assert _ID.match(id), id
        return self.folder / "batches" / id

    def bytes_kept(self) -> int:
        with self._db() as db:
            sql = "SELECT coalesce(sum(json_extract(record, '$.bytes')), 0) FROM files"
            return int(db.execute(sql).fetchone()[0])

    def add_file(self, id: str, name: str, purpose: str) -> Json:
        """The record of a file whose bytes are there; the same again where there is one already."""
        record = {
            "id": id, "object": "file", "bytes": self.path(id).stat().st_size, "created_at": int(time.time()),
            "filename": name, "purpose": purpose, "status": "processed", "status_details": None, "expires_at": None,
        }  # fmt: skip
        with self._db() as db:
            sql = "INSERT INTO files (id, record) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record"
            db.execute(sql, (id, json.dumps(record)))
        return record

    def remove_file(self, id: str) -> None:
        with self._db() as db:
            db.execute("DELETE FROM files WHERE id = ?", (id,))
        self.path(id).unlink(missing_ok=True)


def new_id(kind: str) -> str:
    """kind: "file-" or "batch_"."""
    return kind + secrets.token_hex(12)
