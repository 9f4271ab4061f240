"""A conversation with tools for a chat template that knows none: as plain messages, in the model's own syntax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lowbit.harness import dialects
from lowbit.harness.answer import Call, arguments_text, text_of
from lowbit.harness.request import Request

_DEFAULT = "hermes"


def written(asked: Request, dialect: str | None) -> Request:
    """The request without tools in its body: they are described in the system message, calls of the history are the
    assistant's text, results are messages of the user. ``asked.tools`` stay, for what comes back to be read by."""
    spoken = dialects.get(asked.options.dialect or dialect or _DEFAULT)
    described = [{"type": "function", "function": _function(tool)} for tool in asked.body.get("tools") or []]
    messages = _messages(asked.messages, spoken)
    if described:
        messages = with_system(messages, spoken.describe(described))
    changed = asked.changed(messages=messages, tools=None, tool_choice=None, parallel_tool_calls=None)
    return replace(changed, tools=asked.tools)


def with_system(messages: Sequence[dict[str, Any]], words: str) -> list[dict[str, Any]]:
    """The messages with words added to the system message, which templates take at the beginning alone."""
    first = messages[0]
    if first["role"] in ("system", "developer") and isinstance(first.get("content"), str):
        return [first | {"content": f"{first['content']}\n\n{words}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def _messages(messages: Sequence[dict[str, Any]], spoken: dialects.Dialect) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in messages:
        calls = message.get("tool_calls") or []
        if calls:
            made = [_call(call) for call in calls]
            names |= {call.id: call.name for call in made}
            text = "\n".join(filter(None, (text_of(message.get("content")), spoken.call_text(made))))
            _add(found, "assistant", text)
        elif message["role"] in ("tool", "function"):
            name = names.get(str(message.get("tool_call_id")), str(message.get("name") or "the tool"))
            _add(found, "user", spoken.result_text(name, text_of(message.get("content"))))
        elif isinstance(message.get("content"), str):
            _add(found, message["role"], message["content"])
        else:
            found.append(message)
    return found


def _add(found: list[dict[str, Any]], role: str, text: str) -> None:
    """Adds a message; two of one role in a row become one, since many templates refuse them."""
    if found and found[-1]["role"] == role and isinstance(found[-1].get("content"), str):
        found[-1] = found[-1] | {"content": f"{found[-1]['content']}\n{text}"}
    else:
        found.append({"role": role, "content": text})


def _call(raw: Mapping[str, Any]) -> Call:
    function = raw["function"]
    return Call(name=function["name"], arguments=arguments_text(function.get("arguments")), id=str(raw.get("id") or ""))


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": "", "description": "", "parameters": {}, **tool["function"]}
