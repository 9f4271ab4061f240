"""What a batch has done, in an SQLite file beside the job: kill -9 at any moment and nothing is lost.

Several processes on one machine may work on one journal. An item is waiting, or leased to one of them, or ended; a
result, once committed, is never asked for again. The owner of a lease is a process that is alive (host, pid, start
time) and has been heard of; what a dead or silent one had goes back to the others.

An item that was under way when the model's server or a runner died may be why. It gets points for it; from SUSPECT on
it goes last, and alone; at CONDEMNED it ends as a failure. A death that it was alone with is no proof, since servers
are killed by others too: three are taken for one, and between them other suspects have their turns, so that the three
lie apart. A runner's death, or a whole machine's, counts half: people and schedulers end those.

WAL with synchronous=NORMAL: a killed process loses nothing, a power cut the last moments at most.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.batch import owners
from lowbit.batch.items import Place
from lowbit.errors import BadFile, CannotWrite, LowbitError

WAITING, LEASED, DONE, FAILED, CANCELLED = range(5)
SUSPECT, CONDEMNED = 4, 10  # points
SERVER_DIED, RUNNER_DIED = 2, 1  # a server dies five times of a request, three of them alone with it; a runner ten
NO_REQUEST = "invalid_line"  # the kind of what was never one
_FORMAT = "lowbit-batch/1"
_BUSY = 60.0  # seconds to wait for another process's transaction
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owners (
  id INTEGER PRIMARY KEY AUTOINCREMENT, host TEXT NOT NULL, pid INTEGER NOT NULL, start TEXT NOT NULL,
  begun REAL NOT NULL, heard REAL NOT NULL, beat REAL NOT NULL);
CREATE TABLE IF NOT EXISTS items (
  number INTEGER PRIMARY KEY, line INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
  custom_id TEXT UNIQUE, state INTEGER NOT NULL, sent INTEGER NOT NULL DEFAULT 0, tries INTEGER NOT NULL DEFAULT 0,
  strikes INTEGER NOT NULL DEFAULT 0, points INTEGER NOT NULL DEFAULT 0, owner INTEGER);
CREATE INDEX IF NOT EXISTS items_waiting ON items (points >= 4, number) WHERE state = 0;
CREATE INDEX IF NOT EXISTS items_leased ON items (owner) WHERE state = 1;
CREATE TABLE IF NOT EXISTS results (
  seq INTEGER PRIMARY KEY, number INTEGER NOT NULL UNIQUE, status INTEGER NOT NULL, kind TEXT, seconds REAL NOT NULL,
  finished REAL NOT NULL, tries INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
  body BLOB NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Lease:
    """An item that this process has. tries: how often it was sent before; strikes: of those, how often the request
    itself went wrong; suspect: whether it has to go alone."""

    number: int
    place: Place
    tries: int
    strikes: int
    suspect: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How an item ended. status: HTTP's, 0 where nothing was sent. kind: a word for what went wrong, None where it went
    well. body: JSON: the response, or {"error", "lowbit"}. seconds: it took, all tries of this process together."""

    number: int
    status: int
    kind: str | None
    body: bytes
    seconds: float = 0.0
    tries: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Journal:
    """The open journal. seconds: spent in it by this process. Raises BadFile, CannotWrite."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds, self._owner = path, 0.0, 0
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=_BUSY, isolation_level=None)
            try:
                self._write_ahead()
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute("PRAGMA cache_size=-8000")
                self._db.executescript(_SCHEMA)
                self._set_once("format", _FORMAT)
                if (found := self.get("format")) != _FORMAT:
                    raise BadFile("another version of lowbit's batch wrote it", where=path, found=found,
                                  expected=_FORMAT, hint="--restart begins anew")  # fmt: skip
            except BaseException:
                self._db.close()
                raise

    def _write_ahead(self) -> None:
        """WAL. SQLite's own patience does not cover the change to it: two processes may begin a job at once."""
        deadline = time.monotonic() + _BUSY
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def close(self) -> None:
        """Gives back what this process had, and closes the file; it stays."""
        with contextlib.suppress(LowbitError):  # on a full disk the others find the owner dead
            self._leave()
        self._db.close()

    # What the job is

    def get(self, key: str) -> Any:
        """A fact of the job, None where it is not there."""
        with self._told():
            row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set(self, key: str, value: Any) -> None:
        with self._told():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def facts(self, prefix: str) -> dict[str, Any]:
        """All facts whose keys begin so."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        rows = self.query("SELECT key, value FROM meta WHERE key >= ? AND key < ?", prefix, end)
        return {key: json.loads(value) for key, value in rows}

    def _set_once(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing of what the block does, and one process at a time."""
        with self._told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def add(self, places: Iterable[Place]) -> tuple[int, int, Place | None]:
        """Takes items in, within a transaction of the caller's; how many, how many of them are none and which is the
        first of those, with its problem. A second item of one custom_id is none."""
        number = self._one("SELECT coalesce(max(number), -1) FROM items") + 1
        count, bad, first = 0, 0, None
        for place in places:
            problem, custom_id = place.problem, place.custom_id
            if custom_id is not None:
                other = self._db.execute("SELECT line FROM items WHERE custom_id = ?", (custom_id,)).fetchone()
                if other is not None:
                    problem, custom_id = f"custom_id {custom_id[:60]!r} is line {other[0]}'s too", None
            row = (number, place.line, place.offset, place.length, custom_id, WAITING if problem is None else FAILED)
            self._db.execute(
                "INSERT INTO items (number, line, offset, length, custom_id, state) VALUES (?, ?, ?, ?, ?, ?)", row
            )
            if problem is not None:
                bad += 1
                first = first or Place(place.line, place.offset, place.length, place.custom_id, problem)
                self._insert(_no_request(number, place, problem))
            number, count = number + 1, count + 1
        return count, bad, first

    # Whose an item is

    def enter(self) -> None:
        """Makes this process an owner."""
        host, pid, start = owners.own()
        with self._told():
            now = time.time()
            found = self._db.execute(
                "INSERT INTO owners (host, pid, start, begun, heard, beat) VALUES (?, ?, ?, ?, ?, ?)",
                (host, pid, start, now, now, time.monotonic()),
            )
        self._owner = found.lastrowid or 0

    def beat(self) -> None:
        """Says that this process is alive."""
        with self._told():
            now = time.time(), time.monotonic()
            self._db.execute("UPDATE owners SET heard = ?, beat = ? WHERE id = ?", (*now, self._owner))

    def owners(self) -> list[owners.Owner]:
        """Those who have entered and not left, dead ones too."""
        with self._told():
            rows = self._db.execute(
                "SELECT id, host, pid, start, begun, heard, beat FROM owners ORDER BY id"
            ).fetchall()
        return [owners.Owner(*row) for row in rows]

    def take_over(self) -> int:
        """Gives back what dead or silent processes had; how many items that were."""
        gone = [owner for owner in self.owners() if owner.id != self._owner and not owner.alive()]
        if not gone:
            return 0
        count = 0
        with self.transaction():
            for owner in gone:
                count += self._release(owner.id, RUNNER_DIED)
                self._db.execute("DELETE FROM owners WHERE id = ?", (owner.id,))
        return count

    def _leave(self) -> None:
        if self._owner:
            with self.transaction():
                self._release(self._owner, 0)
                self._db.execute("DELETE FROM owners WHERE id = ?", (self._owner,))
            self._owner = 0

    def _release(self, owner: int, points: int) -> int:
        return self._db.execute(
            "UPDATE items SET state = ?, owner = NULL, points = points + CASE WHEN sent THEN ? ELSE 0 END, sent = 0"
            " WHERE state = ? AND owner = ?",
            (WAITING, points, LEASED, owner),
        ).rowcount

    # The work

    def longest(self) -> int:
        """Bytes of the longest item."""
        return self._one("SELECT coalesce(max(length), 0) FROM items")

    def lease(self, most: int, largest: int = 1 << 62) -> list[Lease]:
        """Up to so many waiting items and bytes of IN, but one; suspects only when there are no others, and then
        one."""
        with self.transaction():
            found = self._waiting("(points >= 4) = 0 ORDER BY number", most)
            found = found or self._waiting("(points >= 4) = 1 ORDER BY points, number", 1)
            sizes = itertools.accumulate(lease.place.length for lease in found)
            found = [lease for lease, size in zip(found, sizes, strict=True) if size <= largest] or found[:1]
            self._db.executemany(
                "UPDATE items SET state = ?, owner = ?, sent = 0 WHERE number = ?",
                [(LEASED, self._owner, lease.number) for lease in found],
            )
        return found

    def _waiting(self, which: str, most: int) -> list[Lease]:
        columns = "number, line, offset, length, custom_id, tries, strikes, points >= 4"
        rows = self._db.execute(f"SELECT {columns} FROM items WHERE state = 0 AND {which} LIMIT ?", (most,))
        return [Lease(row[0], Place(*row[1:5]), row[5], row[6], bool(row[7])) for row in rows]

    def commit(
        self,
        results: Sequence[Result] = (),
        *,
        sent: Sequence[int] = (),
        back: Sequence[int] = (),
        struck: Sequence[int] = (),
        died: Sequence[int] = (),
        orphaned: Sequence[int] = (),
    ) -> None:
        """One transaction. results: of items that ended. sent: items whose request goes out now. Back to the waiting
        go: back, with nothing held against them; struck, whose request went wrong; died, which the model's server did
        not survive; orphaned, whose machine was lost, or the process there that looked after the server."""
        with self.transaction():
            for result in results:
                state = DONE if result.kind is None else FAILED
                # What was taken over from this process and ended elsewhere has its result; what is still under way
                # elsewhere will find this one.
                changed = self._db.execute(
                    "UPDATE items SET state = ?, owner = NULL, sent = 0, tries = ? WHERE number = ? AND state < ?",
                    (state, result.tries, result.number, DONE),
                )
                if changed.rowcount:
                    self._insert(result)
            self._db.executemany(
                "UPDATE items SET sent = 1, tries = tries + 1 WHERE number = ? AND owner = ?",
                [(number, self._owner) for number in sent],
            )
            fates = (back, 0, 0), (struck, 1, 0), (died, 0, SERVER_DIED), (orphaned, 0, RUNNER_DIED)
            for numbers, strikes, points in fates:
                self._db.executemany(
                    "UPDATE items SET state = ?, owner = NULL, sent = 0, strikes = strikes + ?, points = points + ?"
                    " WHERE number = ? AND owner = ? AND state = ?",
                    [(WAITING, strikes, points, number, self._owner, LEASED) for number in numbers],
                )

    def condemned(self) -> list[tuple[int, int]]:
        """(number, tries) of waiting items that have too many points."""
        with self._told():
            return self._db.execute(
                "SELECT number, tries FROM items WHERE state = 0 AND points >= 4 AND points >= ?", (CONDEMNED,)
            ).fetchall()

    def cancel(self) -> None:
        """Ends all items that wait."""
        with self.transaction():
            self._db.execute("UPDATE items SET state = ?, owner = NULL WHERE state = ?", (CANCELLED, WAITING))

    def revive(self, state: int) -> int:
        """Puts ended items back to the waiting, without what is held against them; how many. Of the FAILED, those that
        are no request stay."""
        with self.transaction():
            changed = self._db.execute(
                "UPDATE items SET state = 0, sent = 0, tries = 0, strikes = 0, points = 0 WHERE state = ?"
                " AND number NOT IN (SELECT number FROM results WHERE kind = ?)",
                (state, NO_REQUEST),
            ).rowcount
            self._db.execute("DELETE FROM results WHERE number IN (SELECT number FROM items WHERE state = 0)")
        return changed

    # What there is

    def counts(self) -> dict[int, int]:
        """Items by state. Reads all of them."""
        with self._told():
            found = dict(self._db.execute("SELECT state, count(*) FROM items GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in range(5)}

    def waiting(self) -> bool:
        """Whether any item waits."""
        return bool(self._one("SELECT EXISTS (SELECT 1 FROM items WHERE state = 0)"))

    def unfinished(self) -> bool:
        """Whether any item waits or is leased."""
        return self.waiting() or bool(self._one("SELECT EXISTS (SELECT 1 FROM items WHERE state = 1)"))

    def last_result(self) -> int:
        """Grows with every result, whoever committed it."""
        return self._one("SELECT coalesce(max(seq), 0) FROM results")

    def query(self, sql: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Rows of a SELECT, one at a time."""
        with self._told():
            cursor = self._db.execute(sql, values)
        while True:
            with self._told():
                rows = cursor.fetchmany(256)
            if not rows:
                return
            yield from rows

    def _one(self, sql: str, *values: Any) -> int:
        with self._told():
            row = self._db.execute(sql, values).fetchone()
        return int(row[0])

    def _insert(self, result: Result) -> None:
        self._db.execute(
            "INSERT OR IGNORE INTO results (number, status, kind, seconds, finished, tries, prompt_tokens,"
            " completion_tokens, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                result.number, result.status, result.kind, result.seconds, time.time(), result.tries,
                result.prompt_tokens, result.completion_tokens, result.body,
            ),
        )  # fmt: skip

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Keeps the time, and says what SQLite's errors mean."""
        begun = time.perf_counter()
        try:
            yield
        except sqlite3.OperationalError as error:
            raise _cannot_write(self.path, error) from error
        except sqlite3.DatabaseError as error:
            raise BadFile(
                "not a journal of lowbit's, or a damaged one", where=self.path, found=str(error),
                hint="Move it away, or use --restart to begin anew",
            ) from error  # fmt: skip
        except OSError as error:
            raise CannotWrite(f"cannot write: {error.strerror}", where=self.path) from error
        finally:
            self.seconds += time.perf_counter() - begun


def _cannot_write(path: Path, error: sqlite3.OperationalError) -> LowbitError:
    hints = {
        "SQLITE_FULL": "Free some disk space; the same command goes on from here",
        "SQLITE_IOERR": "Is the disk full, or a limit on file sizes reached? The same command goes on from here",
        "SQLITE_BUSY": "Another process holds it; the same command goes on from here",
        "SQLITE_READONLY": "Choose a place you may write to with --journal DIR",
        "SQLITE_CANTOPEN": "Choose a place you may write to with --journal DIR",
    }
    name = getattr(error, "sqlite_errorname", "") or ""
    hint = next((text for key, text in hints.items() if name.startswith(key)), None)
    return CannotWrite("cannot write the batch's journal", where=path, found=str(error), hint=hint)


def _no_request(number: int, place: Place, problem: str) -> Result:
    error = {"message": f"line {place.line}: {problem}", "type": "invalid_request_error", "param": None}
    body = json.dumps({"error": error | {"code": NO_REQUEST, "line": place.line}})
    return Result(number=number, status=0, kind=NO_REQUEST, body=body.encode(), tries=0)
