"""How a request is changed: for a server that cannot do a part of it, and after an answer that was wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from lowbit.harness.answer import Answer
from lowbit.harness.failures import Problem, UpstreamFailed
from lowbit.harness.in_words import with_system, written
from lowbit.harness.request import Request
from lowbit.harness.trace import Trace
from lowbit.harness.upstream import Upstream

_LONGEST = 2000  # characters of a wrong answer that are shown to the model again
_WARMER = 0.3  # added to the temperature where the same question would get the same answer


def shaped(asked: Request, upstream: Upstream) -> Request:
    """The request as this server can take it.

    A schema goes along as response_format where the server has a grammar for it, and in words where it has none or
    the grammar does not hold all of it. A call that must come is asked for by a schema of its own where the server
    is known not to enforce tool_choice. Tools are described in words where the template has none. A schema and tools
    together go without the grammar: with it, a server would allow no call.
    """
    grammar = asked.options.on("grammar") and "grammar" not in upstream.refused
    if asked.forced is not None and "required" in upstream.refused:
        return _forced_by_schema(asked, grammar)
    if asked.tools and "tools" in upstream.refused:
        asked = written(asked, upstream.dialect)
    if asked.schema is None:
        return asked
    if grammar and not asked.tools:
        return asked if asked.schema.whole_in_grammar else _told(asked, asked.schema.raw)
    return _told(asked, asked.schema.raw).changed(response_format=None)


def after_problem(asked: Request, answer: Answer, problem: Problem, upstream: Upstream) -> Request:
    """The same request, with the wrong answer and what was wrong with it."""
    if problem.kind == "no_tool_call":
        upstream.refused.add("required")
    if problem.kind in ("empty", "repetition"):
        # The same words would lead to the same end; and a text of repetitions shown again is an example to follow.
        return _warmer(asked)
    if problem.kind == "truncated":
        asked = _roomier(asked)
    said = answer.content or "\n".join(f"{call.name}({call.arguments})" for call in answer.calls)
    messages = [
        *asked.messages,
        {"role": "assistant", "content": said[:_LONGEST] or "..."},
        {"role": "user", "content": f"That was not right: {problem.detail}. {problem.advice}".strip()},
    ]
    return asked.changed(messages=messages)


def after_refusal(asked: Request, error: UpstreamFailed, upstream: Upstream, trace: Trace) -> Request | None:
    """The request without what the server may have stumbled over; None where asking again is of no use."""
    if error.again:
        return asked
    mentions = error.message.lower()
    schema_sent = asked.schema is not None and asked.options.on("grammar") and "grammar" not in upstream.refused
    if schema_sent and any(word in mentions for word in ("grammar", "schema", "response_format", "parser")):
        trace.add("grammar", "grammar_refused", error.message)
        if "grammar" not in upstream.holds:
            upstream.refused.add("grammar")
            return asked
        # A server that is known to have one has none of this schema: only this request goes without.
        return replace(asked, options=replace(asked.options, layers=asked.options.layers - {"grammar"}))
    return None


def without_tools(asked: Request, problem: Problem) -> Request:
    """The same request with no tool to call, and the reason said."""
    told = asked.changed(
        messages=[*asked.messages, {"role": "user", "content": problem.advice}],
        tools=None, tool_choice=None, parallel_tool_calls=None,
    )  # fmt: skip
    return replace(told, tools={}, forced=None)


def _forced_by_schema(asked: Request, grammar: bool) -> Request:
    """The call as JSON under a schema: {"name": ..., "arguments": {...}}."""
    tools = [tool for name, tool in asked.tools.items() if asked.forced in ("", name)]
    options = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": tool.parameters.raw},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = options[0] if len(options) == 1 else {"anyOf": options}
    listed = "\n".join(
        f"- {tool.name}: {tool.description} Arguments: {json.dumps(tool.parameters.raw)}" for tool in tools
    )
    words = (
        "Call one of these tools. Answer with JSON alone, an object with the name of the tool and its arguments: "
        f'{{"name": ..., "arguments": {{...}}}}\n{listed}'
    )
    changed = asked.changed(messages=with_system(asked.messages, words), tools=None, tool_choice=None)
    changed = changed.changed(parallel_tool_calls=None, response_format=None)
    if not grammar:
        return changed
    form = {"type": "json_schema", "json_schema": {"name": "call", "schema": schema, "strict": True}}
    return changed.changed(response_format=form)


def _told(asked: Request, schema: Any) -> Request:
    words = f"Answer with JSON alone, without any other text. It must follow this JSON Schema:\n{json.dumps(schema)}"
    return asked.changed(messages=with_system(asked.messages, words))


def _roomier(asked: Request) -> Request:
    """Twice the room for an answer that was cut off; the budget of tokens still bounds it."""
    key = "max_completion_tokens" if "max_completion_tokens" in asked.body else "max_tokens"
    limit = asked.body.get(key)
    return asked.changed(**{key: 2 * limit}) if type(limit) is int else asked


def _warmer(asked: Request) -> Request:
    temperature = asked.body.get("temperature")
    now = temperature if isinstance(temperature, int | float) else 0.7
    seed = asked.body.get("seed")
    again: dict[str, Any] = {"temperature": min(1.5, now + _WARMER)}
    if type(seed) is int:
        again["seed"] = seed + 1
    return asked.changed(**again)
