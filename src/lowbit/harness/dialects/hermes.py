"""Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from lowbit.harness.answer import Call
from lowbit.harness.dialects._json import broken_call, call_of, value_at
from lowbit.harness.dialects.base import Dialect, Parsed

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)


class Hermes(Dialect):
    name = "hermes"
    marks = ("<tool_call>",)

    def parse(self, text: str, tools: Collection[str]) -> Parsed:
        parsed, rest, at = Parsed(content=""), [], 0
        for match in _CALL.finditer(text):
            read = value_at(match[1], 0)
            call = broken_call(match[1]) if read is None else call_of(read[0], ())
            if call is None:  # the mark in a sentence, or a syntax that another dialect reads
                continue
            parsed.calls.append(call)
            rest.append(text[at : match.start()])
            at = match.end()
            if read is None:
                parsed.notes.append("JSON that is broken")
            if not match[0].endswith("</tool_call>"):
                parsed.notes.append("no closing </tool_call>")
        parsed.content = "".join(rest) + text[at:]
        return parsed

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
