"""Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>.

Read from the chat templates of Hermes 2 Pro and Qwen 2.5 and 3, and from vLLM's hermes_tool_parser.py and mlx-lm's
json_tools.py. Unlike those, a closing mark inside a string of the arguments does not end the call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from lowbit.harness.answer import Call
from lowbit.harness.dialects._json import begins, broken_call, calls_of, quoted, value_at
from lowbit.harness.dialects.base import Dialect, Parsed

_BEGIN, _END = "<tool_call>", "</tool_call>"
_SPACE = re.compile(r"(?:\s|```(?:json)?)*")
_CLOSING = re.compile(r"[\s}\]]*(</tool_call>)?")


class Hermes(Dialect):
    name = "hermes"
    marks = (_BEGIN,)

    def parse(self, text: str, tools: Collection[str]) -> Parsed:
        parsed, rest, at, after = Parsed(content=""), [], 0, 0
        last = text.rfind(_END)
        while (mark := text.find(_BEGIN, after)) >= 0:
            after = mark + len(_BEGIN)
            begin = _SPACE.match(text, after).end()  # type: ignore[union-attr]
            if quoted(text, mark) or not begins(text, begin):  # the mark in a sentence, or another dialect's syntax
                continue
            if found := self._one(text, begin, parsed, last):
                rest.append(text[at:mark])
                at = after = found
        parsed.content = "".join(rest) + text[at:]
        return parsed

    def _one(self, text: str, begin: int, parsed: Parsed, last: int) -> int | None:
        """Takes in what stands at ``begin``; where the text goes on after it, None where it is no call. last: where
        the last closing mark is, so that none is looked for in vain."""
        read = value_at(text, begin)
        if read is not None:
            calls = calls_of(read[0], ())
            if calls is None:
                return None
            closing = _CLOSING.match(text, read[1])
            if closing is None or closing[1] is None:
                parsed.notes.append(f"no closing {_END}")
            parsed.calls += calls
            return closing.end() if closing and closing[1] else read[1]
        end = text.find(_BEGIN, begin)
        end = len(text) if end < 0 else end
        if begin <= last and (closing_mark := text.find(_END, begin, end)) >= 0:
            end = closing_mark
        call = broken_call(text[begin:end])
        if call is None:
            return None
        parsed.calls.append(call)
        parsed.notes.append("JSON that is broken")
        if not text.startswith(_END, end):
            parsed.notes.append(f"no closing {_END}")
            return end
        return end + len(_END)

    def may_be(self, text: str, tools: Collection[str]) -> bool:
        found = _SPACE.match(text, len(_BEGIN))
        at = found.end() if found else 0
        return begins(text, at) or "```json".startswith(text[at:])

    def describe(self, tools: Sequence[dict[str, Any]]) -> str:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        return (
            "You may call one or more functions to assist with the user query. They are given within <tools></tools>:\n"
            f"<tools>\n{listed}\n</tools>\nFor each call answer with a JSON object within <tool_call></tool_call>:\n"
            '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )

    def call_text(self, calls: Sequence[Call]) -> str:
        return "\n".join(
            f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments or "{}"}}}\n</tool_call>'
            for call in calls
        )

    def result_text(self, name: str, content: str) -> str:
        return f"<tool_response>\n{content}\n</tool_response>"


DIALECT = Hermes()
