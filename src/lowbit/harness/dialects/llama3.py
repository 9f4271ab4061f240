"""Llama 3: {"name": ..., "parameters": {...}}, after <|python_tag|> or alone, several with semicolons between.

Read from the chat templates of Llama 3.1 and 3.2. Without the tag it is bare JSON, which bare_json.py reads.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from lowbit.harness.answer import Call
from lowbit.harness.dialects._json import broken_call, calls_of, value_at
from lowbit.harness.dialects.base import Dialect, Parsed

_TAG = "<|python_tag|>"


class Llama3(Dialect):
    name = "llama3"
    marks = (_TAG,)
    opens = ("{",)

    def parse(self, text: str, tools: Collection[str]) -> Parsed:
        before, tag, after = text.partition(_TAG)
        if not tag:
            return Parsed(content=text)
        parsed, at = Parsed(content=before), 0
        while (begin := after.find("{", at)) >= 0:
            read = value_at(after, begin)
            if read is None:
                broken = broken_call(after[begin:])
                parsed.calls += [broken] if broken else []
                parsed.notes.append("JSON that is broken")
                break
            found = calls_of(read[0], ())
            if found is None:
                break
            parsed.calls += found
            at = read[1]
        if not parsed.calls:
            return Parsed(content=text)
        return parsed

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
