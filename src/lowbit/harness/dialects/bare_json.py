"""Calls as nothing but JSON: {"name": ..., "arguments": {...}}, alone, in a list, or in a code fence.

What small models write whose template knows no tools. Only a whole JSON value that names one of the tools counts, and
only where nothing but such values, fences and white space follows the words before it: JSON inside an explanation is an
explanation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from lowbit.harness.answer import Call
from lowbit.harness.dialects._json import begins, calls_of, value_at
from lowbit.harness.dialects.base import Dialect, Parsed

_FENCES = ("```json", "```tool_code", "```tool_call", "```")
_BETWEEN = re.compile(r"(?:\s|;|,|```)*")
# What the text of a call begins with; the second group, a fence whose word may not be whole.
_HEAD = re.compile(r"(```(?:json|tool_code|tool_call)?[ \t]*(?:\n\s*)?)?")
_CUT_FENCE = re.compile(r"`{1,3}\Z|```(?:j(?:s(?:on?)?)?|t(?:o(?:o(?:l(?:_(?:c(?:o(?:de?)?|a(?:ll?)?)?)?)?)?)?)?)\Z")
_MOST = 64  # positions at which a value may begin that are looked at


class BareJson(Dialect):
    name = "bare_json"
    marks = ()
    opens = ("{", "[", "```")

    def parse(self, text: str, tools: Collection[str]) -> Parsed:
        for begin in self._begins(text):
            found, at = [], begin
            while (read := value_at(text, at)) is not None and (calls := calls_of(read[0], tools)) is not None:
                found += calls
                at = _BETWEEN.match(text, read[1]).end()  # type: ignore[union-attr]
                if at >= len(text):
                    break
            if found and at >= len(text):
                return Parsed(content=_without_fence(text[:begin].rstrip()), calls=found)
        return Parsed(content=text)

    def may_be(self, text: str, tools: Collection[str]) -> bool:
        if _CUT_FENCE.match(text):
            return True
        at = _HEAD.match(text).end()  # type: ignore[union-attr]
        while at < len(text):
            if not begins(text, at):
                return False
            read = value_at(text, at)
            if read is None:
                return True
            if calls_of(read[0], tools) is None:
                return False
            at = _BETWEEN.match(text, read[1]).end()  # type: ignore[union-attr]
            if _CUT_FENCE.match(text, at):
                return True
        return True

    def _begins(self, text: str) -> list[int]:
        """Where lines begin with a bracket."""
        found = []
        for match in re.finditer(r"(?m)^[ \t]*(?=[\[{])", text):
            found.append(match.end())
            if len(found) == _MOST:
                break
        return found

    def describe(self, tools: Sequence[dict[str, Any]]) -> str:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        return (
            "You can call these functions:\n"
            f"{listed}\n"
            'To call one, answer with JSON alone: {"name": <function name>, "arguments": {<arguments>}}'
        )

    def call_text(self, calls: Sequence[Call]) -> str:
        return "\n".join(f'{{"name": {json.dumps(c.name)}, "arguments": {c.arguments or "{}"}}}' for c in calls)

    def result_text(self, name: str, content: str) -> str:
        return f"The result of {name}:\n{content}"


def _without_fence(text: str) -> str:
    """The text without the fence that is its last line."""
    before, _, last = text.rpartition("\n")
    return before.rstrip() if last.strip() in _FENCES else text


DIALECT = BareJson()
