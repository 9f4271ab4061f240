"""Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}], and since late 2025 [TOOL_CALLS]name[ARGS]{...}.

Read from Mistral's chat templates; the newer ones may put [CALL_ID]id before [ARGS].
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from lowbit.harness.answer import Call
from lowbit.harness.dialects._json import broken_call, calls_of, value_at
from lowbit.harness.dialects.base import Dialect, Parsed

_MARK = "[TOOL_CALLS]"
_NAMED = re.compile(r"\s*([\w.\-/]{1,128})\s*(?:\[CALL_ID\]([\w\-]{1,64}))?\s*\[ARGS\]\s*")


class Mistral(Dialect):
    name = "mistral"
    marks = (_MARK,)

    def parse(self, text: str, tools: Collection[str]) -> Parsed:
        before, *parts = text.split(_MARK)
        parsed = Parsed(content=before)
        for part in parts:
            self._part(part, parsed)
        return parsed if parsed.calls else Parsed(content=text)

    def _part(self, part: str, parsed: Parsed) -> None:
        """What follows one mark: a call by name, or a list of calls."""
        if named := _NAMED.match(part):
            read = value_at(part, named.end())
            arguments = part[named.end() :].strip() if read is None else part[named.end() : read[1]]
            if read is None:
                parsed.notes.append("JSON that is broken")
            parsed.calls.append(Call(name=named[1], arguments=arguments, id=named[2] or ""))
            return
        begin = len(part) - len(part.lstrip())
        read = value_at(part, begin)
        if read is None:
            if broken := broken_call(part):
                parsed.calls.append(broken)
                parsed.notes.append("JSON that is broken")
        elif found := calls_of(read[0], ()):
            parsed.calls += found
            parsed.content += part[read[1] :].lstrip()

    def describe(self, tools: Sequence[dict[str, Any]]) -> str:
        return f"[AVAILABLE_TOOLS]{json.dumps(list(tools), ensure_ascii=False)}[/AVAILABLE_TOOLS]"

    def call_text(self, calls: Sequence[Call]) -> str:
        listed = ", ".join(
            f'{{"name": {json.dumps(c.name)}, "arguments": {c.arguments or "{}"}, "id": {json.dumps(c.id)}}}'
            for c in calls
        )
        return f"{_MARK}[{listed}]"

    def result_text(self, name: str, content: str) -> str:
        return f"[TOOL_RESULTS]{json.dumps({'content': content}, ensure_ascii=False)}[/TOOL_RESULTS]"


DIALECT = Mistral()
