"""What dialects share that write calls as JSON: reading objects out of text, and calls out of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from lowbit.harness.answer import Call, arguments_text

NAMES = ("name", "function", "tool", "tool_name", "function_name")
ARGUMENTS = ("arguments", "parameters", "args", "input", "tool_input")
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]{1,128})"')
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*')
_BEGINS = re.compile(r"\s*(?:\[\s*)?(?:\{\s*(?:[\"'}]|\Z)|\]|\Z)")
_WINDOW = 4096  # characters
_decoder = json.JSONDecoder(strict=False)


def value_at(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value that begins at a position, and where it ends; None where it is none or is cut off.

    Read from a window that grows: an error counts the lines before it, and many errors in a long text would add up.
    """
    size = _WINDOW
    while True:
        piece = text[at : at + size]
        whole = at + size >= len(text)
        try:
            value, end = _decoder.raw_decode(piece)
            if whole or end < len(piece):
                return value, at + end
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated") or error.pos > len(piece) - 64
            if whole or not cut:
                return None
        except (ValueError, RecursionError):
            return None
        size *= 8


def calls_of(value: Any, tools: Collection[str]) -> list[Call] | None:
    """The calls that a JSON value is: an object or a list of objects, each with the name of a tool. None where it is
    anything else. tools: the names that count; none means any."""
    entries = value if isinstance(value, list) else [value]
    found = []
    for entry in entries:
        call = call_of(entry, tools)
        if call is None:
            return None
        found.append(call)
    return found or None


def begins(text: str, at: int) -> bool:
    """Whether what stands at a position is, or may still become, an object or a list of objects."""
    return _BEGINS.match(text, at) is not None


def arguments_of(call: Call) -> dict[str, Any] | None:
    """The arguments of a call of the history; None where what a client sent is no JSON object."""
    try:
        found = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def quoted(text: str, at: int) -> bool:
    """Whether a mark is inline code (`<tool_call>`): an explanation, not a call."""
    return text[at - 1 : at] == "`" and text[at - 3 : at] != "```"


def broken_call(text: str) -> Call | None:
    """The call in JSON that does not end, or is broken: its name, if that is whole, and its arguments as they stand,
    for healing to judge. None where the text does not begin as an object or a list of them."""
    head = _NAME.search(text) if begins(text, 0) else None
    if head is None:
        return None
    arguments = _ARGUMENTS.search(text, head.end())
    return Call(name=head[1], arguments=text[arguments.end() :].strip() if arguments else "{")


def call_of(entry: Any, tools: Collection[str]) -> Call | None:
    """{"name": ..., "arguments": {...}} under its many spellings, OpenAI's {"function": {...}} too."""
    if not isinstance(entry, dict):
        return None
    if isinstance(entry.get("function"), dict):
        entry = entry["function"]
    name = next((entry[key] for key in NAMES if isinstance(entry.get(key), str)), None)
    if name is None or (tools and name not in tools):
        return None
    arguments = next((entry[key] for key in ARGUMENTS if key in entry), None)
    if arguments is None:
        if len(entry) > 1:  # a name beside other keys is an object of the application's
            return None
        arguments = {}
    return Call(name=name, arguments=arguments_text(arguments))
