"""Failures that come with HTTP 200: nothing said, the same said again and again, the same call made again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lowbit.harness.answer import Answer, text_of
from lowbit.harness.failures import Problem
from lowbit.harness.request import Request, canonical

_TAIL = 4096  # characters of a text that are searched for repetition
_SHORTEST = 256  # characters that a repeated passage must cover
_TIMES = 6  # and how often it must stand there
_RULER = 1024  # a run of one or two characters (a line of dashes, padding) may be this long


def empty(answer: Answer) -> Problem | None:
    """A model that says nothing, or thinks and then says nothing."""
    if answer.content.strip() or answer.calls:
        return None
    thought = " after thinking" if answer.reasoning.strip() else ""
    if answer.finish == "length":
        return Problem(
            kind="truncated",
            detail=f"the answer was cut off at the token limit{thought} before anything was said",
            advice="Answer directly and briefly.",
        )
    return Problem(kind="empty", detail=f"the answer is empty{thought}", advice="Answer the last message.")


def repetition(text: str) -> Problem | None:
    """A text that ends in the same passage at least six times over, at least 256 characters of it.

    The smallest period of the text's reversed tail is found by the prefix function (Knuth, Morris and Pratt 1977).
    """
    tail = text[: -_TAIL - 1 : -1]
    if len(tail) < _SHORTEST:
        return None
    longest, best = 0, 0
    border = [0] * len(tail)
    for i in range(1, len(tail)):
        k = border[i - 1]
        while k and tail[i] != tail[k]:
            k = border[k - 1]
        border[i] = k + (tail[i] == tail[k])
        period, length = i + 1 - border[i], i + 1
        enough = _RULER if period <= 2 else max(_SHORTEST, _TIMES * period)
        if border[i] and length >= enough and length > longest:
            longest, best = length, period
    if not best:
        return None
    passage = tail[:best][::-1]
    return Problem(
        kind="repetition",
        detail=f"the text ends in the same {best} characters {longest // best} times over: {passage[:60]!r}",
        advice="Do not repeat yourself. Say each thing once, then stop.",
    )


def history(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Every call of a conversation as (name, canonical arguments), in order."""
    found = []
    for message in messages:
        for call in message.get("tool_calls") or []:
            function = call.get("function") or {}
            found.append((text_of(function.get("name")), canonical(function.get("arguments"))))
    return found


def steps(messages: Sequence[Mapping[str, Any]]) -> int:
    """Rounds of tool calls since the last message of the user."""
    count = 0
    for message in reversed(messages):
        if message.get("role") == "user":
            break
        count += bool(message.get("tool_calls"))
    return count


def identical_call(answer: Answer, request: Request) -> Problem | None:
    """A call that was made as often as the options allow since the user last said something: who asks for a thing
    again means it."""
    asked = [i for i, message in enumerate(request.messages[: request.own]) if message.get("role") == "user"]
    made = Counter(history(request.messages[asked[-1] :] if asked else request.messages))
    for call in answer.calls:
        times = made[call.name, canonical(call.arguments)]
        if times >= request.options.same_call:
            return Problem(
                kind="identical_call",
                detail=f"{call.name} was already called {times} times with the same arguments",
                advice=f"You have already called {call.name} with these arguments; its result is above. "
                "Use that result, call something else, or give the final answer.",
            )
    return None


def missing_step(answer: Answer, request: Request) -> Problem | None:
    """A final answer although a required tool was not called."""
    if answer.calls:
        return None
    called = {name for name, _ in history(request.messages)}
    missing = [name for name in request.options.required if name not in called]
    if not missing:
        return None
    names = " and ".join(missing)
    return Problem(
        kind="missing_step",
        detail=f"the answer came before {names} was called",
        advice=f"Call {names} before you answer.",
    )


def over_budget(request: Request) -> Problem | None:
    """A conversation that has had its rounds of tool calls."""
    most = request.options.max_steps
    if most is None or steps(request.messages) < most:
        return None
    return Problem(
        kind="steps_spent",
        detail=f"the conversation has had its {most} rounds of tool calls",
        advice="Give your final answer now, without calling any tool.",
    )


def without_duplicates(answer: Answer) -> Collection[str]:
    """Takes calls out that the same answer already has; their names."""
    seen: set[tuple[str, str]] = set()
    kept, dropped = [], []
    for call in answer.calls:
        key = (call.name, canonical(call.arguments))
        if key in seen:
            dropped.append(call.name)
        else:
            seen.add(key)
            kept.append(call)
    answer.calls = kept
    return dropped
