"""Tasks on an OpenAI-compatible endpoint, as far as it goes: answers always; log-probabilities of a prompt where the
server echoes them (vLLM does); elsewhere choices are asked for by their letter."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowbit.errors import Unsupported
from lowbit.harness import dialects
from lowbit.harness.answer import Call
from lowbit.measure.tasks._engine import Engine, Likelihood, Message
from lowbit.run._completion import TokenLogprob, entries
from lowbit.run._http import HttpFailed
from lowbit.run.openai import OpenAi

_TOP = 20  # the most that OpenAI's interface gives
_SYNTAX = "hermes"  # that calls are written in which the server has parsed


class Endpoint(Engine):
    """A server that runs somewhere."""

    constrains = True

    def __init__(self, model: OpenAi) -> None:
        self.model = model

    @functools.cached_property
    def scores(self) -> bool:  # type: ignore[override]
        """Whether the server gives log-probabilities of a prompt's tokens: it is asked once."""
        try:
            found = self.model.complete("The sun rises in the east.", 1, logprobs=1, echo=True)
        except HttpFailed:
            return False
        return "".join(t.text for t in found.tokens).startswith("The sun rises in the")

    def loglikelihoods(self, context: str, continuations: Sequence[str]) -> list[Likelihood]:
        return [self._echoed(context, continuation) for continuation in continuations]

    def _echoed(self, context: str, continuation: str) -> Likelihood:
        """The tokens that begin at or after the end of the context, or reach over it."""
        found = self.model.complete(context + continuation, 1, logprobs=1, echo=True)
        at, end, total, count, greedy = 0, len(context) + len(continuation), 0.0, 0, True
        for token in found.tokens:
            begin, at = at, at + len(token.text)
            if at > len(context) and begin < end:
                total, count = total + token.logprob, count + 1
                greedy = greedy and all(other.logprob <= token.logprob for other in token.top)
        if not count:
            raise Unsupported("the server gave no log-probabilities of a prompt", where=self.model.url)
        return Likelihood(logprob=total, tokens=count, greedy=greedy)

    def complete(self, prompt: str, *, max_tokens: int, stop: Sequence[str] = ()) -> str:
        text = self.model.complete(prompt, max_tokens, stop=tuple(stop)[:4]).text  # OpenAI's interface takes four
        found = [at for s in stop if s and (at := text.find(s)) >= 0]
        return text[: min(found)] if found else text

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> str:
        body: dict[str, Any] = {"temperature": 0.0, "seed": 0}
        if tools:
            body["tools"] = list(tools)
        if schema is not None:
            form = {"name": "answer", "schema": dict(schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        try:
            message = self._message(messages, max_tokens, body)
        except HttpFailed as error:
            if schema is not None and error.status == 400:
                raise Unsupported("the server does not take this schema", where=self.model.url) from error
            raise
        calls = [c for raw in message.get("tool_calls") or () if (c := _call(raw)) is not None]
        return str(message.get("content") or "") + (dialects.get(_SYNTAX).call_text(calls) if calls else "")

    def letter(self, messages: Sequence[Message], letters: str) -> int | None:
        """The likeliest of the letters as the answer's first token; None where the server tells no probabilities."""
        body = {"temperature": 0.0, "seed": 0, "logprobs": True, "top_logprobs": _TOP}
        try:
            answer = self.model.ask(messages, 1, **body)
        except HttpFailed:
            return None
        best = {t.text.strip(): t.logprob for t in reversed(list(_first_place(answer))) if t.text.strip() in letters}
        found = {letters.index(text): p for text, p in best.items() if len(text) == 1}
        return max(found, key=lambda i: found[i]) if found else None

    def rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str | None:
        return None

    def _message(self, messages: Sequence[Message], max_tokens: int, body: Mapping[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self.model.ask(messages, max_tokens, **body)
        message: dict[str, Any] = answer["choices"][0]["message"]
        return message


def _first_place(answer: Mapping[str, Any]) -> Iterator[TokenLogprob]:
    choice = answer["choices"][0]
    logprobs = choice.get("logprobs")
    places = logprobs.get("content") if isinstance(logprobs, dict) else None
    if isinstance(places, list) and places and isinstance(places[0], dict):
        yield from entries(places[0].get("top_logprobs"))


def _call(raw: Any) -> Call | None:
    about = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(about, dict) or not isinstance(about.get("name"), str):
        return None
    arguments = about.get("arguments")
    return Call(about["name"], arguments if isinstance(arguments, str) else json.dumps(arguments or {}))
