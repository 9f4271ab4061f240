"""How far a batch is: what status prints, and the rate and time left that a run shows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from lowbit.batch.job import Job
from lowbit.batch.journal import CANCELLED, DONE, FAILED, LEASED, WAITING, Journal
from lowbit.batch.owners import Owner

_WINDOW = 300.0  # seconds of which the rate is taken
_SUMS = "SELECT sum(prompt_tokens), sum(completion_tokens), sum(seconds), max(finished) FROM results"
_KINDS = "SELECT kind, count(*) FROM results WHERE kind IS NOT NULL GROUP BY kind ORDER BY 2 DESC, 1"
_MOST = 2000  # results of which it is


@dataclass(frozen=True, kw_only=True)
class Status:
    """state: completed, cancelled, paused, running (a process is at it), or stopped. per_second: items lately, None
    before there are two. seconds_left: at that rate. errors: how many of each kind. runners: who is at work. usage:
    tokens of all tries. call_seconds: that requests were under way, added up. slots: requests at a time, as a probe
    found them, with what it measured (probe.Probe.as_json). servers: of each where there are several, Engine.told."""

    source: str
    state: str
    total: int
    completed: int
    failed: int
    cancelled: int
    waiting: int
    in_flight: int
    per_second: float | None
    seconds_left: float | None
    errors: dict[str, int] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)
    call_seconds: float = 0.0
    runners: tuple[Owner, ...] = ()
    slots: dict[str, Any] | None = None
    servers: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    created: float | None = None
    finished: float | None = None

    def as_json(self) -> dict[str, Any]:
        found = dict(vars(self))
        found["runners"] = [{"host": r.host, "pid": r.pid, "begun": r.begun, "heard": r.heard} for r in self.runners]
        found["request_counts"] = {"total": self.total, "completed": self.completed, "failed": self.failed}
        return found


def status(job: Job) -> Status:
    """What there is to say of a job. Reads its journal alone."""
    journal = job.journal
    counts, settings = journal.counts(), journal.get("settings") or {}
    alive = tuple(owner for owner in journal.owners() if owner.alive())
    left = counts[WAITING] + counts[LEASED]
    state = journal.get("state") or "stopped"
    if not left and state != "cancelled":
        state = "completed"
    elif state == "running" and not alive:
        state = "stopped"
    speed = rate(journal)
    sums = next(
        journal.query("SELECT sum(prompt_tokens), sum(completion_tokens), sum(seconds), max(finished) FROM results")
    )
    kinds = journal.query("SELECT kind, count(*) FROM results WHERE kind IS NOT NULL GROUP BY kind ORDER BY 2 DESC, 1")
    return Status(
        source=str(job.source), state=state, total=sum(counts.values()), completed=counts[DONE], failed=counts[FAILED],
        cancelled=counts[CANCELLED], waiting=counts[WAITING], in_flight=counts[LEASED], per_second=speed,
        seconds_left=left / speed if speed and left else 0.0 if not left else None, errors=dict(kinds),
        usage={"prompt_tokens": sums[0] or 0, "completion_tokens": sums[1] or 0}, call_seconds=sums[2] or 0.0,
        runners=alive, slots=journal.get("slots"),
        servers=journal.get("servers") or [], settings=settings, created=journal.get("created"), finished=sums[3],
    )  # fmt: skip


def rate(journal: Journal) -> float | None:
    """Items a second of late: of the last minutes, and of all processes together."""
    since = time.time() - _WINDOW
    times = [
        row[0]
        for row in journal.query(
            "SELECT finished FROM results WHERE finished > ? AND status > 0 ORDER BY seq DESC LIMIT ?", since, _MOST
        )
    ]
    if len(times) < 2 or times[0] <= times[-1]:
        return None
    return (len(times) - 1) / (times[0] - times[-1])


class Counter:
    """The items that have ended, for a bar: cheap enough to ask every second."""

    def __init__(self, journal: Journal) -> None:
        counts = journal.counts()
        self.total = sum(counts.values())
        self._journal, self._before = journal, counts[DONE] + counts[FAILED] + counts[CANCELLED]
        self._first = journal.last_result()
        self._recent: list[tuple[float, int]] = []

    def done(self) -> int:
        return self._before + self._journal.last_result() - self._first

    def note(self, done: int) -> tuple[float | None, float | None]:
        """(items a second, seconds left) over the last minutes."""
        now = time.monotonic()
        self._recent.append((now, done))
        while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW:
            self._recent.pop(0)
        then, before = self._recent[0]
        if now - then < 1 or done <= before:
            return None, None
        speed = (done - before) / (now - then)
        return speed, (self.total - done) / speed
