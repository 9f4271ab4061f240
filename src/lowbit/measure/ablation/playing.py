"""One question, with one set of layers: asked, answered, judged from outside the harness."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lowbit.harness import Harness, HarnessError, HarnessOptions, Upstream
from lowbit.harness.answer import Answer
from lowbit.harness.structured import Schema
from lowbit.measure.ablation.questions import Question
from lowbit.measure.ablation.simulated import Checked
from lowbit.measure.tasks._call_checker import Call

Outcome = dict[str, Any]
_MOST_STEPS = 8  # rounds of calls in a turn of a conversation


class Model(Protocol):
    """What a question is put to: an Upstream of its own for every question and set of layers, so that nothing is
    carried over. seconds: that its answers took, once or from the memory of an equal request."""

    name: str

    def upstream(self, question: Question, variant: str) -> Counted: ...

    def fallbacks(self, question: Question, variant: str) -> Sequence[Counted]: ...


class Counted(Upstream, Protocol):
    """An upstream that counts: requests, completion tokens, seconds (None where they say nothing). turn: which turn of
    a conversation begins."""

    requests: int
    tokens: int
    seconds: float | None
    faults: list[str]

    def begin(self, turn: int) -> None: ...


async def play(
    question: Question, model: Model, variant: str, options: HarnessOptions | None, *, max_tokens: int
) -> Outcome:
    """options: None asks the model itself, without a harness.

    Returns {"group", "valid", "right", "error": a code or None, "tries", "tokens", "seconds", "faults", "events"}.
    valid: every answer was one that a program can use: something was said, and each call is of a tool that there is,
    with JSON arguments that follow its schema. right: by BFCL's rules.
    """
    upstream = model.upstream(question, variant)
    others = model.fallbacks(question, variant)
    talk = _Talk(question, upstream, others, options, max_tokens)
    error = None
    try:
        right = await (talk.conversation() if question.entry is not None else talk.single())
    except HarnessError as failed:
        error, right = failed.code, False
    models = (upstream, *others)
    return {
        "group": question.group,
        "valid": error is None and talk.valid,
        "right": error is None and talk.valid and right,
        "error": error,
        "tries": sum(m.requests for m in models),
        "tokens": sum(m.tokens for m in models),
        "seconds": None if upstream.seconds is None else sum(m.seconds or 0.0 for m in models),
        "faults": upstream.faults,
        "events": dict(talk.events),
    }


class _Talk:
    def __init__(
        self,
        question: Question,
        upstream: Counted,
        fallbacks: Sequence[Counted],
        options: HarnessOptions | None,
        max_tokens: int,
    ) -> None:
        self._question, self._upstream, self._models = question, upstream, (upstream, *fallbacks)
        self._extra = question.extra() | {"temperature": 0, "seed": 0, "max_tokens": max_tokens}
        self.valid, self.events = True, Counter[str]()
        self._harness = Harness(upstream, options, fallbacks=fallbacks) if options is not None else None

    def _begin(self, turn: int) -> None:
        for model in self._models:
            model.begin(turn)

    async def single(self) -> bool:
        self._begin(0)
        answer = await self._ask([dict(m) for m in self._question.turns[0]])
        calls = _read(answer)
        return calls is not None and self._question.right(calls, answer.content)

    async def conversation(self) -> bool:
        assert self._question.entry is not None
        checked, messages, right = Checked(self._question.entry), list[dict[str, Any]](), True
        for turn, said in enumerate(self._question.turns):
            self._begin(turn)
            messages += [dict(message) for message in said]
            made = await self._turn(messages, checked.call)
            right = checked.turn_is_right(turn, made) and right
        return right

    async def _turn(self, messages: list[dict[str, Any]], call: Callable[[str, dict[str, Any]], str]) -> int:
        """Answers and results until the model says something; how many calls it made."""
        made = 0
        for _ in range(_MOST_STEPS):
            answer = await self._ask(messages)
            messages.append(answer.as_message())
            calls = _read(answer)
            if not calls:
                break
            made += len(calls)
            for written, read in zip(answer.calls, calls, strict=True):
                result = call(read.name, dict(read.arguments))
                messages.append({"role": "tool", "tool_call_id": written.id, "content": result})
        return made

    async def _ask(self, messages: list[dict[str, Any]]) -> Answer:
        body = {"messages": messages, **self._extra}
        if self._harness is None:
            answer = Answer.of_response(await self._upstream.chat(body, 600.0))
        else:
            found = await self._harness.complete(body)
            self.events.update(event["what"] for event in found["lowbit"]["events"])
            answer = Answer.of_response(found)
        self.valid = self.valid and _is_valid(answer, self._question)
        return answer


def _read(answer: Answer) -> list[Call] | None:
    """The calls with their arguments as objects; None where one's are none."""
    found = []
    for call in answer.calls:
        try:
            arguments = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError):
            return None
        if not isinstance(arguments, dict):
            return None
        found.append(Call(name=call.name, arguments=arguments))
    return found


def _is_valid(answer: Answer, question: Question) -> bool:
    calls = _read(answer)
    if calls is None or not (calls or answer.content.strip()):
        return False
    if question.group == "as-json":
        try:
            value = json.loads(answer.content)
        except (ValueError, RecursionError):
            return False
        return Schema(question.tools[0]["function"]["parameters"]).problem(value) is None
    if question.group == "required" and not calls:
        return False
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in question.tools}
    return all(c.name in schemas and Schema(schemas[c.name]).problem(dict(c.arguments)) is None for c in calls)
