"""What prompts have in common: which slot, or which saved state of a slot, a request can go on from.

A slot of llama.cpp's server keeps the cache of its last prompt, and a request that begins like it is only evaluated
from where they differ. What a slot has can be saved and given to others, which costs milliseconds where evaluating 300
tokens costs seconds. Lengths here are characters, of which a token has about four.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WORTH = 512  # characters in common that are worth a saved state


def text_of(body: Mapping[str, Any]) -> str:
    """What of a request becomes its prompt, in one text: two that begin alike have prompts that begin alike."""
    parts = [body.get(name) for name in ("tools", "chat_template_kwargs", "instructions")]
    said = body.get("messages", body.get("prompt", body.get("input")))
    return json.dumps([*parts, said], ensure_ascii=False, default=str)


def common(a: str, b: str) -> int:
    """Characters with which both begin."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # the first `low` are alike, the first `high + 1` are not
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def best(text: str, others: Iterable[str]) -> int:
    """The most characters that one of the others has in common with the text."""
    return max((common(text, other) for other in others), default=0)


@dataclass(eq=False)
class Slot:
    """A slot of the server. text: the prompt that its cache has. used: when, in requests."""

    number: int
    text: str = ""
    used: int = 0


@dataclass(eq=False)
class State:
    """A slot's cache in a file."""

    text: str
    file: str
    size: int
    used: int = 0


@dataclass(frozen=True)
class Move:
    """What a request is to do. slot: which it takes. restore: the state that the slot gets first. save: whether what
    the slot has now, the prompt ``had``, is to be saved first. lead: whether to evaluate the prompt and save that
    before it is answered, since others that begin alike wait for it."""

    slot: Slot
    had: str
    restore: State | None = None
    save: bool = False
    lead: bool = False


@dataclass
class Cache:
    """The slots' prompts and the saved states, and what follows from them for a request.

    slots: how many the server has. largest: bytes that all states may have together; most: how many there may be
    free:  slots without a request
    """

    slots: int
    largest: int = 1 << 30
    most: int = 16
    free: list[Slot] = field(init=False)
    states: list[State] = field(default_factory=list)
    _all: list[Slot] = field(init=False)
    _clock: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The server is a new one: its slots are empty and free. What is in files stays of use."""
        self._all = [Slot(number) for number in range(self.slots)]
        self.free = list(self._all)

    def move(self, text: str, beside: Sequence[str], *, shared: bool = False, saving: bool = True) -> Move:
        """For a request, for which there must be a free slot. beside: the prompts of those that wait or are under way.
        shared: whether it is known that others will begin alike. saving: whether the server can save states."""
        length, slot = max(((common(text, s.text), s) for s in self.free), key=lambda pair: (pair[0], pair[1].used))
        oldest = min(self.free, key=lambda other: other.used)
        found = slot if length >= WORTH else oldest
        if not saving or self.slots == 1:
            return Move(found, found.text)
        saved, state = max(((common(text, s.text), s) for s in self.states), key=lambda p: p[0], default=(0, None))
        if state is not None and saved >= length + WORTH:
            state.used = self._clock
            return Move(oldest, oldest.text, restore=state)
        if length >= WORTH:
            return Move(slot, slot.text, save=saved + WORTH <= length)
        return Move(oldest, oldest.text, lead=len(text) >= WORTH and (shared or best(text, beside) >= WORTH))

    def take(self, slot: Slot, text: str) -> None:
        self.free.remove(slot)
        self._clock += 1
        slot.text, slot.used = text, self._clock

    def give_back(self, slot: Slot) -> None:
        """Its request has ended; of a server that is no more, nothing comes back."""
        if any(slot is one for one in self._all):
            self.free.append(slot)

    def keep(self, state: State) -> list[State]:
        """Takes in a saved state; those that had to go for it."""
        state.used = self._clock
        self.states.append(state)
        gone = []
        while len(self.states) > self.most or sum(s.size for s in self.states) > self.largest:
            oldest = min(self.states, key=lambda s: s.used)
            self.states.remove(oldest)
            gone.append(oldest)
        return gone
