"""Qwen 3 Coder: <tool_call><function=name><parameter=key>value</parameter></function></tool_call>.

Read from its chat template and from qwen3_coder.py of mlx-lm's tool_parsers. A value is text as it stands, of one line
or many; its type is the schema's to say. <function=name>{...}</function>, with JSON inside, is how Llama 3.1 calls the
functions of a prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from lowbit.harness.answer import Call
from lowbit.harness.dialects._json import arguments_of, quoted, value_at
from lowbit.harness.dialects.base import Dialect, Parsed

_BEGIN = re.compile(r"(?:<tool_call>\s*)?<function=([^<>\s]{1,128})>")
_END = re.compile(r"\s*(?:</function>)?\s*(?:</tool_call>)?")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\s]{1,128})>")
_BRACE = re.compile(r"\s*\{")
_AFTER_VALUE = re.compile(r"\s*(?:<parameter=|</function>|</tool_call>|\Z)")
# What ends a value whose own mark is missing.
_NEW_LINE_STOP = re.compile(r"\n(?=<parameter=[^<>\s]{1,128}>|</function>|</tool_call>)|(?=</function>\s*</tool_call>)")
_MAY_BE = re.compile(
    r"(?:<tool_call>\s*(?=<|\Z))?(?:<function=[^<>\s]{0,128}(?:\Z|>\s*(?:\Z|[{]|<(?:\Z|[/p])))|<?(?:f(?:u(?:n(?:c(?:t(?:i(?:on?)?)?)?)?)?)?)?\Z)"
)
_STOPS = ("</parameter>", "<parameter=", "</function>", "</tool_call>")


class QwenCoder(Dialect):
    name = "qwen_coder"
    marks = ("<tool_call>", "<function=")

    def parse(self, text: str, tools: Collection[str]) -> Parsed:
        parsed, rest, at, after = Parsed(content=""), [], 0, 0
        last = text.rfind(_STOPS[0])
        while match := _BEGIN.search(text, after):
            after = match.end()
            if quoted(text, match.start()):
                continue
            call, end = self._arguments(text, match, parsed, last)
            closing = _END.match(text, end)
            closed = closing is not None and "</function>" in closing[0]
            # A mark in a sentence: nothing of a call follows, and it is not cut off there.
            if end == match.end() and not closed and text[end:].strip():
                continue
            if not closed:
                parsed.notes.append("no closing </function>")
            parsed.calls.append(call)
            rest.append(text[at : match.start()])
            at = after = closing.end() if closing else end
        parsed.content = "".join(rest) + text[at:]
        return parsed

    def may_be(self, text: str, tools: Collection[str]) -> bool:
        return _MAY_BE.match(text) is not None

    def _arguments(self, text: str, begin: re.Match[str], parsed: Parsed, last: int) -> tuple[Call, int]:
        """The call whose name was read, and where it ends."""
        at = begin.end()
        if brace := _BRACE.match(text, at):
            read = value_at(text, brace.end() - 1)
            end = read[1] if read else next((p for m in _STOPS[2:] if (p := text.find(m, at)) >= 0), len(text))
            if read is None:
                parsed.notes.append("JSON that is broken")
            return Call(name=begin[1], arguments=text[brace.end() - 1 : end].strip()), end
        arguments, end = self._parameters(text, at, parsed, last)
        return Call(name=begin[1], arguments=json.dumps(arguments, ensure_ascii=False)), end

    def _parameters(self, text: str, at: int, parsed: Parsed, last: int) -> tuple[dict[str, str], int]:
        """last: where the last </parameter> of the text is, so that none is looked for in vain."""
        found: dict[str, str] = {}
        while match := _PARAMETER.match(text, at):
            begin = match.end()
            end, closed = self._value_end(text, begin, last)
            if not closed:
                parsed.notes.append(f"no closing {_STOPS[0]}")
            found[match[1]] = text[begin:end].removeprefix("\n").removesuffix("\n")
            at = end + len(_STOPS[0]) if text.startswith(_STOPS[0], end) else end
        return found, at

    def _value_end(self, text: str, begin: int, last: int) -> tuple[int, bool]:
        """Where a value ends, and whether its own mark ends it."""
        at = begin
        while at <= last:
            end = text.find(_STOPS[0], at)
            if stop := _NEW_LINE_STOP.search(text, at, end):
                return stop.start(), False
            at = end + len(_STOPS[0])
            # A value that holds the mark goes on to the one that something of the syntax follows.
            if end == last or _AFTER_VALUE.match(text, at):
                return end, True
        stop = _NEW_LINE_STOP.search(text, at)
        return (stop.start() if stop else len(text)), False

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
        values = arguments_of(call)
        values = {"arguments": call.arguments} if values is None else values
        inner = "".join(
            f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
            for key, value in values.items()
        )
        return f"<tool_call>\n<function={call.name}>\n{inner}</function>\n</tool_call>"

    def result_text(self, name: str, content: str) -> str:
        return f"<tool_response>\n{content}\n</tool_response>"


DIALECT = QwenCoder()
