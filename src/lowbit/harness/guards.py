"""Failures that come with HTTP 200: nothing said, the same said again and again, the same call made again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lowbit.harness.answer import Answer, text_of
from lowbit.harness.failures import Problem
from lowbit.harness.request import Request, canonical

_TAIL = 8192  # characters of a text that are searched for repetition
_SHORTEST = 256  # characters that a repeated passage must cover
_TIMES = 6  # and how often it must stand there
_LONG, _LONG_TIMES = 400, 4  # a passage of so many characters: so often
_COUNTED, _COUNTED_TIMES = 1024, 12  # the same but for its numbers: characters of it in all, and how often
_LETTERS = 4  # a passage of fewer is a rule, a row of a table, of a matrix, encoded zeros
_END = 32  # characters
_NUMBER = re.compile(r"\d+")
_ANNOUNCED = re.compile(
    r"\b(?:I(?:'ll| will|'m going to| am going to)|let me|let's|we will|we'll)(?: now| first| then)?"
    r" (?:call|use|invoke|run|query|look up|check with)\b[^.!?\n]{0,80}",
    re.IGNORECASE,
)
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
    """A text that ends in the same passage at least six times over (a long one: four), at least 256 characters of it;
    or in one that differs in its numbers alone, twelve times over and at least 1,024 characters."""
    tail = text[-_TAIL:]
    if (found := _repeated(tail, exact=True)) or (
        (counted := _NUMBER.sub("0", tail)) != tail and (found := _repeated(counted, exact=False))
    ):
        passage, times = found
    else:
        return None
    return Problem(
        kind="repetition",
        detail=f"the text ends in the same {len(passage)} characters {times} times over: {passage[:60]!r}",
        advice="Do not repeat yourself. Say each thing once, then stop.",
    )


def _repeated(text: str, *, exact: bool) -> tuple[str, int] | None:
    """The passage that a text ends in again and again, and how often.

    The smallest period of the reversed text is found by the prefix function (Knuth, Morris and Pratt 1977).
    """
    # Looked at with every few hundred characters of a stream: most texts are told by their end alone.
    if len(text) < _SHORTEST or text.count(text[-_END:]) < 3:
        return None
    back = text[::-1]
    longest, best = 0, 0
    border = [0] * len(back)
    for i in range(1, len(back)):
        k = border[i - 1]
        while k and back[i] != back[k]:
            k = border[k - 1]
        border[i] = k + (back[i] == back[k])
        period, length = i + 1 - border[i], i + 1
        if border[i] and length > longest and length >= _enough(back, period, exact):
            longest, best = length, period
    return (back[:best][::-1], longest // best) if best else None


def _enough(back: str, period: int, exact: bool) -> int:
    """Characters that a passage of this period must cover to count as repetition."""
    letters = sum(char.isalpha() for char in back[: min(period, 64)])
    if not exact:
        # Rows of numbers are data: only a sentence that is said again with another number counts.
        data = letters < 20 or any(char in "{}[]<>|=;" for char in back[:period])
        return _TAIL + 1 if data else max(_COUNTED, _COUNTED_TIMES * period)
    if period <= 2 or letters < _LETTERS:
        return max(_RULER, _TIMES * period)
    return max(_SHORTEST, (_LONG_TIMES if period >= _LONG else _TIMES) * period)


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
    made = Counter(map(_plain, history(_since_user(request))))
    for call in answer.calls:
        times = made[_plain((call.name, canonical(call.arguments)))]
        if times >= request.options.same_call:
            return Problem(
                kind="identical_call",
                detail=f"{call.name} was already called {times} times with the same arguments",
                advice=f"You have already called {call.name} with these arguments; its result is above. "
                "Use that result, call something else, or give the final answer.",
            )
    return None


def ping_pong(answer: Answer, request: Request) -> Problem | None:
    """Two or three calls in turn, A B A B, with the same results, that are about to go round once more."""
    if len(answer.calls) != 1:
        return None
    made = rounds(_since_user(request))
    next_call = _plain((answer.calls[0].name, canonical(answer.calls[0].arguments)))
    for length in (2, 3):
        last, before = made[-length:], made[-2 * length : -length]
        if len(before) == length and last == before and len({call for call, _ in last}) > 1 and last[0][0] == next_call:
            names = ", ".join(call[0] for call, _ in last)
            return Problem(
                kind="ping_pong",
                detail=f"{names} were called in turn twice, with the same arguments and results",
                advice="You are going round in circles; the results are above. Do something else with them, or answer.",
            )
    return None


def _since_user(request: Request) -> list[dict[str, Any]]:
    """The conversation since the user last spoke; what the harness added to it in the user's name does not count."""
    spoke = [i for i, message in enumerate(request.messages[: request.own]) if message.get("role") == "user"]
    return request.messages[spoke[-1] :] if spoke else request.messages


def rounds(messages: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[str, str], str]]:
    """Every call with its result, in order."""
    results = {str(m.get("tool_call_id")): text_of(m.get("content")) for m in messages if m.get("role") == "tool"}
    found = []
    for message in messages:
        for call in message.get("tool_calls") or []:
            function = call.get("function") or {}
            key = text_of(function.get("name")), canonical(function.get("arguments"))
            found.append((_plain(key), results.get(str(call.get("id")), "")))
    return found


def _plain(call: tuple[str, str]) -> tuple[str, str]:
    """A call without what escaping added: arguments that hold special tokens are the same with and without it."""
    return call[0], call[1].replace("\u200b", "").replace("\\u200b", "")


def announced(answer: Answer, request: Request) -> Problem | None:
    """An answer that ends by saying that a tool will be called, and calls none. English alone."""
    if answer.calls or not request.tools:
        return None
    end = answer.content.rstrip()[-300:]
    said = max(_ANNOUNCED.finditer(end), key=lambda match: match.start(), default=None)
    if said is None or end[said.end() :].strip(" .:!\n").count(" ") > 4:
        return None
    if not any(name.casefold() in said[0].casefold() for name in (*request.tools, "tool", "function")):
        return None
    return Problem(
        kind="announced",
        detail="a call was announced and not made",
        advice="Do not say that you will call it. Call it now, or give the final answer.",
    )


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
