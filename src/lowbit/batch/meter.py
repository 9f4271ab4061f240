"""The time that a job took, and the energy: stretches in which a process worked on it, in the job's journal.

A stretch grows by the second, so that a killed process loses no more than the last one. The time while a job is paused
is in none. Stretches of several processes at once are the machine's time once.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from lowbit.batch.costs import Work
from lowbit.batch.journal import DONE, FAILED, Journal
from lowbit.measure.energy import EnergyMeter
from lowbit.measure.record import Figure, repeated

_KEY = "span."
_MOST, _LEAST = 20, 5  # stretches of a run that are compared with each other, and items in one of them
# The usage of an answer; /v1/responses has newer words for it.
_PROMPT = "COALESCE(json_extract(body, '$.usage.prompt_tokens'), json_extract(body, '$.usage.input_tokens'))"
_COMPLETION = "COALESCE(json_extract(body, '$.usage.completion_tokens'), json_extract(body, '$.usage.output_tokens'))"
_USAGE = f"""
SELECT COALESCE(SUM({_PROMPT}), 0), COALESCE(SUM({_COMPLETION}), 0) FROM
(SELECT CAST(r.body AS TEXT) AS body FROM results r JOIN items i ON i.number = r.number WHERE i.state = ?)"""


class Meter:
    """Writes down how long this process works. ``tick`` is called about once a second."""

    def __init__(self, journal: Journal) -> None:
        self._journal, self._energy = journal, EnergyMeter()
        self._begin()

    def _begin(self) -> None:
        self._key = _KEY + secrets.token_hex(8)
        self._begun, self._clock, self._counters = time.time(), time.monotonic(), self._energy.read()

    def tick(self, *, working: bool = True) -> None:
        """working: False while the job is paused. Raises CannotWrite."""
        if not working:
            self._begin()
            return
        seconds = time.monotonic() - self._clock
        joules = self._energy.joules(self._counters)
        self._journal.set(self._key, {"begun": self._begun, "seconds": seconds, "joules": joules})


Stretch = tuple[float, float]  # begun, ended


def work(journal: Journal) -> Work:
    """What the job took so far. Raises BadFile."""
    found = journal.facts(_KEY)
    spans = sorted((s["begun"], s["begun"] + s["seconds"], s["joules"]) for s in found.values())
    stretches = _joined([(begun, ended) for begun, ended, _ in spans])
    seconds, each = sum(ended - begun for begun, ended in stretches), sum(ended - begun for begun, ended, _ in spans)
    known = [joules for _, _, joules in spans if joules is not None]
    waits = [_until_asked(journal, stretch) for stretch in stretches]
    finished = [row[0] for row in journal.query(
        "SELECT finished FROM results JOIN items USING (number) WHERE state = ? ORDER BY finished", DONE
    )]  # fmt: skip
    usage = next(journal.query(_USAGE, DONE))
    spent = next(journal.query(
        "SELECT COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0) FROM results"
    ))  # fmt: skip
    failed = next(journal.query("SELECT COUNT(*) FROM items WHERE state = ?", FAILED))[0]
    return Work(
        items=len(finished),
        failed=failed,
        seconds=seconds,
        loading=sum(waits),
        prompt_tokens=usage[0],
        completion_tokens=usage[1],
        spent_prompt_tokens=max(spent[0], usage[0]),
        spent_completion_tokens=max(spent[1], usage[1]),
        # Two processes on one machine read the same counters.
        joules=sum(known) * seconds / each if known and len(known) == len(spans) and each else None,
        per_item=per_item(finished, stretches, waits),
    )


def per_item(finished: Sequence[float], stretches: Sequence[Stretch], waits: Sequence[float]) -> Figure | None:
    """Seconds an item with an interval: the items in the order they ended, cut into up to 20 equal parts, each part's
    seconds an item one observation. None where they are too few for that. waits: of each stretch, loading."""
    parts = min(_MOST, len(finished) // _LEAST)
    if parts < 3 or not stretches:
        return None
    at = [_worked_until(moment, stretches, waits) for moment in finished]
    edges = [round(i * len(at) / parts) for i in range(parts + 1)]
    times = [0.0, *(at[edge - 1] for edge in edges[1:])]
    counts = [edges[i + 1] - edges[i] for i in range(parts)]
    return repeated([(times[i + 1] - times[i]) / counts[i] for i in range(parts)], "s")


def _joined(spans: Sequence[Stretch]) -> list[Stretch]:
    """Times at which at least one process worked; spans in the order of their beginnings."""
    found: list[Stretch] = []
    for begun, ended in spans:
        if found and begun <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], ended))
        else:
            found.append((begun, ended))
    return found


def _until_asked(journal: Journal, stretch: Stretch) -> float:
    """Seconds of a stretch before its first request: the model is loaded, IN is read."""
    asked = "SELECT MIN(finished - seconds) FROM results WHERE finished BETWEEN ? AND ? AND tries > 0"
    first = next(journal.query(asked, *stretch))[0]
    return max(0.0, first - stretch[0]) if first is not None else 0.0


def _worked_until(moment: float, stretches: Sequence[Stretch], waits: Sequence[float]) -> float:
    """Seconds of work, loading apart, that lie before a moment."""
    pairs = zip(stretches, waits, strict=True)
    return sum(max(0.0, min(moment, ended) - begun - wait) for (begun, ended), wait in pairs)
