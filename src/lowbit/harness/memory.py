"""Thoughts that a client does not send back: kept here, and put where the model's chat template needs them.

Templates of thinking models write the thoughts before a tool call back into the prompt until the turn ends; without
them a model answers otherwise than it was trained to (llama.cpp issue 25072). OpenAI's clients drop the field.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from lowbit.harness.answer import Answer

_MOST = 4096  # answers remembered
_LONGEST = 64 << 10  # characters of one


class Memory:
    """The thoughts before the last few thousand tool calls, by the ids of the calls."""

    def __init__(self, most: int = _MOST) -> None:
        self._thoughts: OrderedDict[str, str] = OrderedDict()
        self._most = most

    def keep(self, answer: Answer) -> None:
        """Remembers why a call was made."""
        if not answer.reasoning or not answer.calls or len(answer.reasoning) > _LONGEST:
            return
        self._thoughts[answer.calls[0].id] = answer.reasoning
        while len(self._thoughts) > self._most:
            self._thoughts.popitem(last=False)

    def restored(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages, with thoughts where an assistant's calls have lost theirs."""
        return [self._with_thoughts(message) for message in messages]

    def _with_thoughts(self, message: dict[str, Any]) -> dict[str, Any]:
        calls = message.get("tool_calls")
        if not calls or message.get("reasoning_content"):
            return message
        thoughts = self._thoughts.get(str(calls[0].get("id")))
        return message | {"reasoning_content": thoughts} if thoughts else message
