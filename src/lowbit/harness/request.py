"""A chat request as the harness reads it: what of OpenAI's body it must understand, checked; the rest goes through."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lowbit.errors import BadOption
from lowbit.harness.failures import BadRequest
from lowbit.harness.options import HarnessOptions
from lowbit.harness.structured import Schema

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call. parameters: the schema of its arguments, always an object's."""

    name: str
    description: str
    parameters: Schema


@dataclass(frozen=True, kw_only=True)
class Request:
    """body: what goes to the model's server, without "lowbit". tools: by name. forced: a tool that must be called, ""
    for any of them, None where none must. schema: what the content must follow, or None. check: says what else is
    wrong with a value that follows it, or None. parallel: whether one answer may hold several calls. own: how many of
    the messages the caller sent; what follows them is the harness's."""

    body: dict[str, Any]
    options: HarnessOptions
    tools: Mapping[str, Tool] = field(default_factory=dict)
    forced: str | None = None
    schema: Schema | None = None
    check: Callable[[Any], str | None] | None = None
    parallel: bool = True
    own: int = 0

    @property
    def messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.body["messages"]
        return found

    @property
    def n(self) -> int:
        return int(self.body.get("n") or 1)

    def changed(self, **keys: Any) -> Request:
        """The same request with other keys in its body; None takes a key out."""
        body = {key: value for key, value in (self.body | keys).items() if value is not None or key not in keys}
        return replace(self, body=body)


def read(body: Any, options: HarnessOptions) -> Request:
    """Raises BadRequest naming the parameter."""
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    options = read_options(body.get("lowbit"), options)
    rest = {key: value for key, value in body.items() if key != "lowbit"}
    _check_messages(rest.get("messages"))
    n = rest.get("n")
    if n is not None and (type(n) is not int or not 1 <= n <= 128):
        raise BadRequest("n must be a whole number from 1 to 128", param="n")
    limit = rest.get("max_completion_tokens", rest.get("max_tokens"))
    if limit is not None and (type(limit) is not int or limit < 1):
        raise BadRequest("max_tokens must be a positive whole number", param="max_tokens")
    tools = _tools(rest.get("tools"))
    forced = _forced(rest.get("tool_choice"), tools)
    active = {} if rest.get("tool_choice") == "none" else tools
    return Request(
        body=rest,
        options=options,
        tools=active,
        forced=forced,
        schema=_schema(rest.get("response_format")),
        parallel=rest.get("parallel_tool_calls") is not False,
        own=len(rest["messages"]),
    )


def read_options(own: Any, base: HarnessOptions) -> HarnessOptions:
    """The options with what a request's "lowbit" object says. Raises BadRequest."""
    if own is None:
        return base
    if not isinstance(own, dict):
        raise BadRequest("lowbit must be an object", param="lowbit")
    try:
        return HarnessOptions.read(own, base)
    except BadOption as error:
        raise BadRequest(str(error), param="lowbit") from None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message", param="messages")
    ids: frozenset[str] = frozenset()
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadRequest(f"{where} must be an object with a role of {', '.join(ROLES)}", param=where)
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content):
                raise BadRequest(f"{where}.content must be text or a list of typed parts", param=where)
        elif content is not None and not isinstance(content, str):
            raise BadRequest(f"{where}.content must be text or a list of typed parts", param=where)
        ids = _check_result(message, ids, where)
        calls = message.get("tool_calls")
        if calls is not None and (not isinstance(calls, list) or not all(_is_call(call) for call in calls)):
            raise BadRequest(f"{where}.tool_calls must be a list of function calls", param=where)


def _check_result(message: dict[str, Any], ids: frozenset[str], where: str) -> frozenset[str]:
    """Ids of the calls that a result may answer from here on. Raises BadRequest for a result of a call that there is
    not: a model would be told of something that it never asked for."""
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        ids |= {str(call.get("id")) for call in calls if isinstance(call, dict) and call.get("id") is not None}
    named = message.get("tool_call_id")
    if message["role"] == "tool" and named is not None and ids and str(named) not in ids:
        raise BadRequest(f"{where}.tool_call_id names no call before it: {str(named)[:60]}", param=where)
    return ids


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _tools(given: Any) -> dict[str, Tool]:
    if given is None:
        return {}
    if not isinstance(given, list):
        raise BadRequest("tools must be a list", param="tools")
    found: dict[str, Tool] = {}
    for i, entry in enumerate(given):
        where = f"tools[{i}]"
        function = entry.get("function") if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRequest(f"{where} must be {{type: function, function: {{name, parameters}}}}", param=where)
        name, description = function["name"], function.get("description") or ""
        if name in found:
            raise BadRequest(f"two tools have the name {name[:60]}", param=where)
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        parameters = Schema.read(schema, f"{where}.function.parameters")
        found[name] = Tool(name=name, description=str(description), parameters=parameters)
    return found


def _forced(choice: Any, tools: Mapping[str, Tool]) -> str | None:
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        if not tools:
            raise BadRequest("tool_choice is required and there are no tools", param="tool_choice")
        return ""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in tools:
        raise BadRequest(
            "tool_choice must be auto, none, required or one of the tools",
            param="tool_choice",
        )
    return str(name)


def _schema(response_format: Any) -> Schema | None:
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    where = "response_format"
    if kind == "text":
        return None
    if kind == "json_object":  # llama.cpp's server takes a schema here too
        return Schema.read(response_format.get("schema") or {"type": "object"}, where)
    if kind == "json_schema":
        inner = response_format.get("json_schema")
        # OpenAI nests the schema; some servers and clients do not.
        schema = inner.get("schema") if isinstance(inner, dict) else response_format.get("schema")
        if schema is None:
            raise BadRequest("response_format has no json_schema.schema", param=where)
        return Schema.read(schema, f"{where}.json_schema.schema")
    raise BadRequest("response_format.type must be text, json_object or json_schema", param=where)


def canonical(arguments: Any) -> str:
    """Arguments as one text that is equal where they are equal: for finding identical calls."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return arguments
    return json.dumps(arguments, sort_keys=True, ensure_ascii=False)
