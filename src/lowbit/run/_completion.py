"""What an OpenAI-compatible server answers to a completion, with the log-probabilities in one form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token with its log-probability (nats) and those of the most likely tokens at its place, most likely first.

    id is None where the server does not give ids; text is lossy where a token is not whole characters.
    """

    text: str
    logprob: float
    id: int | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """text; finish_reason as the server says it; tokens where log-probabilities were asked for and given; the server's
    own count of the prompt's and the answer's tokens, None where it gives none; seconds that the request took."""

    text: str
    finish_reason: str | None
    tokens: tuple[TokenLogprob, ...]
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    raw: Mapping[str, Any] = field(repr=False)


def read_completion(text: str, choice: Mapping[str, Any], found: Mapping[str, Any], seconds: float) -> Completion:
    """The first choice of an answer that took ``seconds``."""
    usage = found.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    reason = choice.get("finish_reason")
    return Completion(
        text=text,
        finish_reason=reason if isinstance(reason, str) else None,
        tokens=tuple(_logprobs(choice.get("logprobs"))),
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
        seconds=seconds,
        raw=found,
    )


def _logprobs(found: Any) -> Iterator[TokenLogprob]:
    """Both forms: {"content": [{"token", "logprob", "top_logprobs": [...]}]} of chat (and llama-server's completions),
    and OpenAI's {"tokens", "token_logprobs", "top_logprobs": [{token: logprob}]} of completions. A place without a
    log-probability (the first of an echoed prompt) is left out of the former and nan in the latter."""
    if not isinstance(found, dict):
        return
    if isinstance(content := found.get("content"), list):
        yield from entries(content)
        return
    tokens, values = found.get("tokens"), found.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list):
        return
    tops = found.get("top_logprobs")
    tops = tops if isinstance(tops, list) else [None] * len(tokens)
    for token, value, top in zip(tokens, values, tops, strict=False):
        pairs = [(text, number(p)) for text, p in top.items()] if isinstance(top, dict) else []
        ranked = sorted((pair for pair in pairs if not math.isnan(pair[1])), key=lambda pair: -pair[1])
        listed = tuple(TokenLogprob(text=text, logprob=p, id=_id_of(text)) for text, p in ranked)
        yield TokenLogprob(text=str(token), logprob=number(value), id=_id_of(str(token)), top=listed)


def entries(found: Any) -> Iterator[TokenLogprob]:
    """A list of {"token", "logprob", "id", "top_logprobs"}; what is none of these is left out."""
    for raw in found if isinstance(found, list) else ():
        if not isinstance(raw, dict) or not isinstance(text := raw.get("token"), str):
            continue
        if not math.isnan(logprob := number(raw.get("logprob"))):
            given = raw.get("id")
            token = given if isinstance(given, int) else _id_of(text)
            yield TokenLogprob(text=text, logprob=logprob, id=token, top=tuple(entries(raw.get("top_logprobs"))))


def number(value: Any) -> float:
    """A number of a stranger's JSON; nan for what is none."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    return math.nan


def _id_of(text: str) -> int | None:
    """vLLM's return_tokens_as_token_ids: 'token_id:42'."""
    digits = text.removeprefix("token_id:")
    return int(digits) if digits != text and digits.isdecimal() and len(digits) < 10 else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
