"""How many requests at a time, found on the job's own first items: their answers count, and nothing is asked for the
probe alone.

One request at a time, then two, four, eight, sixteen, each for as long as a rate needs, until the rate falls. The two
that were best then take turns once more, as what else the machine does comes and goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_STEPS = (1, 2, 4, 8, 16, 32, 64)
_ROUNDS, _LEAST, _SECONDS = 3, 8, 3.0  # answers for each request under way, answers, seconds: a rate needs all three,
_LONG = 20.0  # or this many seconds, and an answer for each request under way
_FELL = 0.97  # of the best rate: it fell
_CLOSE = 0.85  # of the best rate: it may be the best one
_EQUAL = 0.98  # of the best rate: as good, and fewer requests at a time are better


@dataclass
class _Step:
    """A number of requests at a time, and what was timed with it."""

    slots: int
    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def enough(self) -> bool:
        if self.seconds >= _LONG and self.answers >= max(2, self.slots):
            return True
        return self.answers >= max(_LEAST, _ROUNDS * self.slots) and self.seconds >= _SECONDS


class Probe:
    """most: requests at a time that there may be. found: what an earlier run found, as ``as_json`` says it.

    slots: how many requests there are to be under way now. done: whether that is settled.
    """

    def __init__(self, most: int, found: Any = None) -> None:
        self._ladder = [_Step(slots) for slots in _STEPS if slots < most] + [_Step(most)]
        self._step, self._again = self._ladder[0], list[_Step]()
        self._turn, self._skip, self._begun, self._climbing = _Step(1), 1, 0.0, True
        self.slots, self.done = self._step.slots, len(self._ladder) == 1
        if isinstance(found, dict) and type(found.get("slots")) is int and 1 <= found["slots"] <= most:
            self.slots, self.done = found["slots"], True

    def answered(self, now: float, tokens: int) -> bool:
        """An answer came: at which second of a steady clock, and with how many tokens: those of the prompt that were
        evaluated, and those generated. Whether it is settled by that."""
        if self.done:
            return False
        if self._skip > 0:  # it was under way before, or is the first of all
            self._skip -= 1
            self._turn, self._begun = _Step(self.slots), now
            return False
        turn = self._turn
        turn.answers, turn.tokens, turn.seconds = turn.answers + 1, turn.tokens + max(1, tokens), now - self._begun
        if turn.enough():
            self._step.answers += turn.answers
            self._step.tokens += turn.tokens
            self._step.seconds += turn.seconds
            self._go_on()
        return self.done

    def as_json(self) -> dict[str, Any]:
        """What was found: slots, and of each step slots, answers, tokens and seconds."""
        return {"slots": self.slots, "steps": [dict(vars(step)) for step in self._ladder if step.answers]}

    def _go_on(self) -> None:
        tried = [step for step in self._ladder if step.answers]
        best = max(step.rate for step in tried)
        if self._climbing and self._step.rate >= _FELL * best and self._step is not self._ladder[-1]:
            following = self._ladder[len(tried)]
        else:
            if self._climbing:
                self._climbing = False
                close = sorted((s for s in tried if s.rate >= _CLOSE * best), key=lambda s: s.rate, reverse=True)
                self._again = close[:2] if len(close) > 1 else []
            if not self._again:
                self.slots = next(step.slots for step in tried if step.rate >= _EQUAL * best)
                self.done = True
                return
            following = self._again.pop(0)
        self._skip = max(self.slots, following.slots)
        self._step, self.slots = following, following.slots


def words(found: dict[str, Any]) -> str:
    """What a probe found, in a line: tokens a second with each number of requests at a time."""
    rates = (f"{s['tokens'] / max(1e-9, s['seconds']):.3g} with {s['slots']}" for s in found["steps"])
    return f"{found['slots']}; tokens a second were {', '.join(rates)}"
