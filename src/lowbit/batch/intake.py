"""Items on their way to the engine: leased a window at a time, put in order, and how many of them may be under way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from lowbit import console
from lowbit.batch import order
from lowbit.batch.engines.base import Engine
from lowbit.batch.items import Item, NoItem
from lowbit.batch.job import Job
from lowbit.batch.journal import Lease
from lowbit.batch.probe import Probe, words

_FEW = 2  # items leased for each request under way, where others want some too


class Intake:
    """The engine must have been entered. on_problem: called with a lease that is no item, and why.

    slots: requests that there are to be under way now
    """

    def __init__(self, job: Job, engine: Engine, on_problem: Callable[[Lease, str], Any]) -> None:
        self._job, self._journal, self._engine, self._on_problem = job, job.journal, engine, on_problem
        self._queue: deque[tuple[Lease, Item]] = deque()
        self._probe: Probe | None = None
        if engine.probed:
            self._key = f"slots: {(job.journal.get('settings') or {}).get('model')}, {engine.place()}"
            self._probe = Probe(engine.slots, job.journal.get(self._key))

    @property
    def slots(self) -> int:
        return self._engine.slots if self._probe is None else min(self._engine.slots, self._probe.slots)

    def first(self) -> Lease | None:
        """The item that is next, None where none waits."""
        while not self._queue and (leases := self._leased()):
            self._queue.extend(self._read(leases))
        return self._queue[0][0] if self._queue else None

    def take(self) -> tuple[Lease, Item]:
        return self._queue.popleft()

    def give_back(self) -> list[int]:
        """The numbers of those that will not be taken."""
        numbers = [lease.number for lease, _ in self._queue]
        self._queue.clear()
        return numbers

    def answered(self, body: dict[str, Any]) -> None:
        """A response came."""
        if self._probe is not None and self._probe.answered(time.monotonic(), _evaluated(body)):
            found = self._probe.as_json()
            self._journal.set(self._key, found)
            self._journal.set("slots", found)
            console.log(f"Requests at a time: {words(found)}")

    def _leased(self) -> list[Lease]:
        # In the order of IN while the probe goes on: its steps are to meet like items.
        if self._unsettled() or len(self._journal.owners()) > 1:
            return self._journal.lease(_FEW * self.slots, order.LARGEST)
        return self._journal.lease(order.WINDOW * self.slots, order.LARGEST)

    def _read(self, leases: list[Lease]) -> list[tuple[Lease, Item]]:
        found = []
        for lease in leases:
            try:
                found.append((lease, self._job.item(lease)))
            except NoItem as error:
                self._on_problem(lease, str(error))
        return found if self._unsettled() else order.arranged(found)

    def _unsettled(self) -> bool:
        return self._probe is not None and not self._probe.done


def _evaluated(body: dict[str, Any]) -> int:
    """Tokens that a response cost: of the prompt without those that were in a cache, and those generated."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return 1
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    read, made = (n if type(n) is int else 0 for n in counts)
    return max(1, read - (cached if type(cached) is int else 0) + made)
