"""Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}], and since late 2025 [TOOL_CALLS]name[ARGS]{...}.

Read from the chat template of Mistral Small 3.1 and from mistral.py of mlx-lm's tool_parsers; the newer templates may
put [CALL_ID]id before [ARGS]. A mark inside a string of the arguments begins no call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from lowbit.harness.answer import Call
from lowbit.harness.dialects._json import begins, broken_call, calls_of, quoted, value_at
from lowbit.harness.dialects.base import Dialect, Parsed

_MARK = "[TOOL_CALLS]"
_NAMED = re.compile(r"\s*([\w.\-/]{1,128})\s*(?:\[CALL_ID\]([\w\-]{1,64}))?\s*\[ARGS\]\s*")

_SPACE = re.compile(r"\s*")
_MAY_BE_NAMED = re.compile(r"\s*[\w.\-/]{0,128}\s*(?:\Z|\[(?:\Z|[CA](?:\Z|[A-Z])))")


def _next(text: str, at: int) -> int:
    """Where the next mark stands, or the end of the text."""
    found = text.find(_MARK, at)
    return found if found >= 0 else len(text)


class Mistral(Dialect):
    name = "mistral"
    marks = (_MARK,)

    def parse(self, text: str, tools: Collection[str]) -> Parsed:
        parsed, rest, at, after = Parsed(content=""), [], 0, 0
        while (mark := text.find(_MARK, after)) >= 0:
            after = mark + len(_MARK)
            if quoted(text, mark):
                continue
            while (end := self._one(text, after, parsed)) is not None:
                rest.append(text[at:mark])
                # One mark may stand before several calls by name.
                at = after = mark = end
                if not _NAMED.match(text, end):
                    break
        parsed.content = "".join(rest) + text[at:]
        return parsed

    def _one(self, text: str, at: int, parsed: Parsed) -> int | None:
        """Takes in what follows a mark, a call by name or a list of calls; where the text goes on, None for neither."""
        if named := _NAMED.match(text, at):
            read = value_at(text, named.end())
            end = read[1] if read is not None else _next(text, named.end())
            if read is None:
                parsed.notes.append("JSON that is broken")
            arguments = text[named.end() : end].strip()
            parsed.calls.append(Call(name=named[1], arguments=arguments or "{", id=named[2] or ""))
            return end
        begin = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if not begins(text, begin):
            return None
        read = value_at(text, begin)
        if read is not None:
            parsed.calls += (found := calls_of(read[0], ()) or [])
            return read[1] if found else None
        end = _next(text, begin)
        broken = broken_call(text[begin:end])
        if broken is None:
            return None
        parsed.calls.append(broken)
        parsed.notes.append("JSON that is broken")
        return end

    def may_be(self, text: str, tools: Collection[str]) -> bool:
        at = len(_MARK)
        return begins(text, at) or _MAY_BE_NAMED.match(text, at) is not None

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
