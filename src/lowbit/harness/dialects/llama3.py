"""Llama 3: {"name": ..., "parameters": {...}}, after <|python_tag|> or alone, several with semicolons between.

Read from the chat templates of Llama 3.1 and 3.2 and vLLM's llama_tool_parser.py, which joins calls with semicolons.
Without the tag it is bare JSON, which bare_json.py reads; <function=name>{...}</function> is read by qwen_coder.py.
What else follows the tag is Python for the code interpreter, no call of a function.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from lowbit.harness.answer import Call
from lowbit.harness.dialects._json import begins, broken_call, calls_of, quoted, value_at
from lowbit.harness.dialects.base import Dialect, Parsed

_TAG = "<|python_tag|>"
_BETWEEN = re.compile(r"(?:\s|;|,|<\|python_tag\|>)*")


class Llama3(Dialect):
    name = "llama3"
    marks = (_TAG,)

    def parse(self, text: str, tools: Collection[str]) -> Parsed:
        at = text.find(_TAG)
        while at >= 0 and (quoted(text, at) or not begins(text, at + len(_TAG))):
            at = text.find(_TAG, at + len(_TAG))
        if at < 0:
            return Parsed(content=text)
        parsed, end = Parsed(content=text[:at]), at + len(_TAG)
        while begins(text, begin := _BETWEEN.match(text, end).end()) and begin < len(text):  # type: ignore[union-attr]
            read = value_at(text, begin)
            if read is None:
                broken = broken_call(text[begin:])
                parsed.calls += [broken] if broken else []
                parsed.notes.append("JSON that is broken")
                end = len(text) if broken else end
                break
            found = calls_of(read[0], ())
            if found is None:
                break
            parsed.calls += found
            end = read[1]
        if not parsed.calls:
            return Parsed(content=text)
        parsed.content += text[end:].lstrip("; \n")
        return parsed

    def may_be(self, text: str, tools: Collection[str]) -> bool:
        return not text.startswith(_TAG) or begins(text, len(_TAG))

    def describe(self, tools: Sequence[dict[str, Any]]) -> str:
        listed = "\n\n".join(json.dumps(tool, indent=4, ensure_ascii=False) for tool in tools)
        return (
            "Given the following functions, please respond with a JSON for a function call with its proper arguments "
            'that best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": '
            "dictionary of argument name and its value}. Do not use variables.\n\n"
            f"{listed}"
        )

    def call_text(self, calls: Sequence[Call]) -> str:
        return "; ".join(f'{{"name": {json.dumps(c.name)}, "parameters": {c.arguments or "{}"}}}' for c in calls)

    def result_text(self, name: str, content: str) -> str:
        return json.dumps({"output": content}, ensure_ascii=False)


DIALECT = Llama3()
