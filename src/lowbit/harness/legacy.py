"""OpenAI's first form of tool calls: functions and function_call in the request, function_call in the answer."""

from __future__ import annotations

from typing import Any


def spoken(body: Any) -> bool:
    """Whether a request is in the old form: with functions, and without tools."""
    return isinstance(body, dict) and isinstance(body.get("functions"), list) and not body.get("tools")


def read(body: dict[str, Any]) -> dict[str, Any]:
    """The request in today's form; calls and results of its history too, joined by ids made of their positions.

    What is no call is left as it is, for request.read to refuse.
    """
    found = {key: value for key, value in body.items() if key not in ("functions", "function_call")}
    if spoken(body):
        found["tools"] = [{"type": "function", "function": function} for function in body["functions"]]
        found["parallel_tool_calls"] = False  # the old form has one call an answer
        choice = body.get("function_call")
        if choice is not None:
            found["tool_choice"] = {"type": "function", "function": choice} if isinstance(choice, dict) else choice
    if isinstance(body.get("messages"), list):
        found["messages"] = _messages(body["messages"])
    return found


def message(new: dict[str, Any]) -> dict[str, Any]:
    """An answer's message in the old form: its one call as function_call."""
    calls = new.get("tool_calls")
    if not calls:
        return new
    rest = {key: value for key, value in new.items() if key != "tool_calls"}
    return rest | {"function_call": calls[0]["function"]}


def response(new: dict[str, Any]) -> dict[str, Any]:
    """A chat completion in the old form."""
    choices = []
    for choice in new["choices"]:
        finish = "function_call" if choice.get("finish_reason") == "tool_calls" else choice.get("finish_reason")
        choices.append(choice | {"message": message(choice["message"]), "finish_reason": finish})
    return new | {"choices": choices}


def chunk(new: dict[str, Any]) -> dict[str, Any]:
    """A chunk of a stream in the old form."""
    choices = []
    for choice in new.get("choices") or []:
        finish = "function_call" if choice.get("finish_reason") == "tool_calls" else choice.get("finish_reason")
        choices.append(choice | {"delta": message(choice["delta"]), "finish_reason": finish})
    return new | {"choices": choices}


def _messages(messages: list[Any]) -> list[Any]:
    found, last = [], ""
    for i, entry in enumerate(messages):
        if not isinstance(entry, dict):
            found.append(entry)
        elif entry.get("role") == "assistant" and isinstance(entry.get("function_call"), dict):
            last = f"call_{i}"
            rest = {key: value for key, value in entry.items() if key != "function_call"}
            found.append(rest | {"tool_calls": [{"id": last, "type": "function", "function": entry["function_call"]}]})
        elif entry.get("role") == "function" and last:
            found.append({"role": "tool", "tool_call_id": last, "content": entry.get("content")})
        else:
            found.append(entry)
    return found
