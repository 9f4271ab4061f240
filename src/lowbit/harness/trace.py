"""What the harness did for one answer, in order: what a response carries under ``"lowbit"`` and /metrics counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_LONGEST = 300  # characters of a detail


@dataclass
class Trace:
    """Events of one answer. Each is {"layer", "what", "detail"}, layer one of options.LAYERS or "upstream"."""

    events: list[dict[str, str]] = field(default_factory=list)
    tries: int = 0
    completion_tokens: int = 0
    prompt_tokens: int = 0
    fallback: str | None = None

    def add(self, layer: str, what: str, detail: object = "") -> None:
        """what: a word that metrics count by ("json_repaired"). detail: for a person; never a whole message."""
        self.events.append({"layer": layer, "what": what, "detail": " ".join(str(detail).split())[:_LONGEST]})

    def used(self, usage: dict[str, Any] | None) -> None:
        """Adds a try's tokens as the upstream counted them."""
        for name in ("completion_tokens", "prompt_tokens"):
            value = (usage or {}).get(name)
            if type(value) is int and value > 0:
                setattr(self, name, getattr(self, name) + value)

    def counts(self) -> Counter[str]:
        return Counter(event["what"] for event in self.events)

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "tries": self.tries,
            "events": self.events,
            "usage": {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens},
        }
        return found | ({"fallback": self.fallback} if self.fallback else {})
