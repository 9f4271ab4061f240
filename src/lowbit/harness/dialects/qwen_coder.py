"""Qwen 3 Coder: <tool_call><function=name><parameter=key>value</parameter></function></tool_call>.

Read from its chat template. A value is text as it stands, of one line or many; its type is the schema's to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from lowbit.harness.answer import Call
from lowbit.harness.dialects.base import Dialect, Parsed

_BEGIN = re.compile(r"(?:<tool_call>\s*)?<function=([^<>\s]{1,128})>")
_END = re.compile(r"\s*(?:</function>)?\s*(?:</tool_call>)?")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\s]{1,128})>")
_STOPS = ("</parameter>", "<parameter=", "</function>", "</tool_call>")


class QwenCoder(Dialect):
    name = "qwen_coder"
    marks = ("<tool_call>", "<function=")

    def parse(self, text: str, tools: Collection[str]) -> Parsed:
        parsed, rest, at = Parsed(content=""), [], 0
        while match := _BEGIN.search(text, at):
            rest.append(text[at : match.start()])
            arguments, at = self._parameters(text, match.end(), parsed)
            parsed.calls.append(Call(name=match[1], arguments=json.dumps(arguments, ensure_ascii=False)))
            closing = _END.match(text, at)
            if closing and "</function>" not in closing[0]:
                parsed.notes.append("no closing </function>")
            at = closing.end() if closing else at
        parsed.content = "".join(rest) + text[at:]
        return parsed

    def _parameters(self, text: str, at: int, parsed: Parsed) -> tuple[dict[str, str], int]:
        found: dict[str, str] = {}
        while match := _PARAMETER.match(text, at):
            begin = match.end()
            # The value's own end, or else whatever could only come after it.
            end = text.find(_STOPS[0], begin)
            following = text.find(_STOPS[1], begin)
            if end < 0 or (0 <= following < end and "\n" in text[begin:following]):
                stops = [p for mark in _STOPS[1:] if (p := text.find(mark, begin)) >= 0]
                end = min(stops, default=len(text)) if end < 0 else end
                if text.find(_STOPS[0], begin) < 0:
                    parsed.notes.append(f"no closing {_STOPS[0]}")
            value = text[begin:end]
            found[match[1]] = value.removeprefix("\n").removesuffix("\n")
            at = end + (len(_STOPS[0]) if text.startswith(_STOPS[0], end) else 0)
        return found, at

    def describe(self, tools: Sequence[dict[str, Any]]) -> str:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        return (
            f"# Tools\n\nYou have access to the following functions:\n\n<tools>\n{listed}\n</tools>\n\n"
            "If you choose to call a function, reply in the following format with no suffix:\n\n<tool_call>\n"
            "<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n</function>\n"
            "</tool_call>"
        )

    def call_text(self, calls: Sequence[Call]) -> str:
        return "\n".join(self._one(call) for call in calls)

    def _one(self, call: Call) -> str:
        values = json.loads(call.arguments or "{}")
        inner = "".join(
            f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
            for key, value in values.items()
        )
        return f"<tool_call>\n<function={call.name}>\n{inner}</function>\n</tool_call>"

    def result_text(self, name: str, content: str) -> str:
        return f"<tool_response>\n{content}\n</tool_response>"


DIALECT = QwenCoder()
