"""Money: what tokens cost at a hosted model, and a cap that holds over restarts and between processes.

Before a request its worst case is set aside, after it what it really cost is booked. So the cap can only be reached
from below: what is set aside is never more than what is left.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import BadFile, BadOption, CannotWrite
from lowbit.harness.failures import UpstreamFailed

_MICRO = 1_000_000  # amounts are whole millionths of a dollar: sums are exact
_FORGOTTEN = 3600  # seconds after which what a killed process had set aside counts as spent


@dataclass(frozen=True, kw_only=True)
class Price:
    """US dollars per million tokens."""

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            value = getattr(self, name)
            if not 0 <= value < 1e6:
                raise BadOption(f"impossible price of {name} tokens", found=value, expected="dollars per million")

    def of(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Millionths of a dollar, rounded up."""
        return -int(-(self.prompt * prompt_tokens + self.completion * completion_tokens) // 1)


class Ledger:
    """path: an SQLite file; made where it is not there. cap: dollars that all its bookings together may reach.

    Raises BadFile, CannotWrite.
    """

    def __init__(self, path: str | os.PathLike[str], cap: float) -> None:
        if not 0 <= cap < 1e9:
            raise BadOption("impossible spend cap", found=cap, expected="dollars, 0 or more")
        self.path, self.cap = Path(path), round(cap * _MICRO)
        with closing(self._open()) as db, db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS spend (id INTEGER PRIMARY KEY, time REAL NOT NULL, model TEXT NOT NULL,"
                " amount INTEGER NOT NULL, open INTEGER NOT NULL)"
            )

    def _open(self) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            db.execute("PRAGMA journal_mode=WAL")
            return db
        except sqlite3.OperationalError as error:
            raise CannotWrite("cannot open the ledger", where=self.path, found=str(error)) from None
        except sqlite3.DatabaseError:
            hint = "Name another file, or move this one away"
            raise BadFile("not a ledger", where=self.path, expected="an SQLite file of lowbit's", hint=hint) from None

    @property
    def spent(self) -> float:
        """Dollars, what is set aside included."""
        with closing(self._open()) as db:
            return self._sum(db) / _MICRO

    def set_aside(self, model: str, amount: int) -> int:
        """Takes the worst case of a request out of what is left; the booking's number. Raises UpstreamFailed (402)."""
        with closing(self._open()) as db:
            db.execute("BEGIN IMMEDIATE")  # one process at a time from here to the commit
            db.execute("UPDATE spend SET open = 0 WHERE open = 1 AND time < ?", (time.time() - _FORGOTTEN,))
            left = self.cap - self._sum(db)
            if amount > left:
                db.execute("COMMIT")
                message = f"the spend cap of ${self.cap / _MICRO:.2f} leaves ${max(0, left) / _MICRO:.4f}"
                message += f", and this request may cost ${amount / _MICRO:.4f}"
                raise UpstreamFailed(message, status=402, code="spend_cap", again=False)
            entry = (time.time(), model, amount)
            number = db.execute("INSERT INTO spend (time, model, amount, open) VALUES (?, ?, ?, 1)", entry).lastrowid
            db.execute("COMMIT")
            return int(number or 0)

    def book(self, number: int, amount: int) -> None:
        """What the request really cost, in place of what was set aside for it."""
        with closing(self._open()) as db:
            db.execute("UPDATE spend SET amount = ?, open = 0 WHERE id = ?", (amount, number))

    @staticmethod
    def _sum(db: sqlite3.Connection) -> int:
        return int(db.execute("SELECT COALESCE(SUM(amount), 0) FROM spend").fetchone()[0])


def used(usage: Any) -> tuple[int, int] | None:
    """Prompt and completion tokens as a server counted them; None where it did not."""
    if not isinstance(usage, Mapping):
        return None
    counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
    return (counts[0], counts[1]) if all(type(n) is int and n >= 0 for n in counts) else None  # type: ignore[return-value]
