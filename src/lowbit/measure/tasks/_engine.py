"""How tasks talk to a model: probabilities of continuations, and greedy answers, whatever the runtime.

Conventions of lm-eval, so that figures agree with it: a continuation is tokenized together with its context and split
off again; spaces that end a context move to the continuation; an empty context is the token that begins a sequence;
what does not fit the runtime's context is cut from the left.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import BadOption, Unsupported
from lowbit.run.base import Runtime

_LEAST_SHARED = 16  # tokens: below, keeping them is not worth a second decode
Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """logprob: of all the continuation's tokens together, nats. tokens: how many. greedy: whether each of them was the
    most likely."""

    logprob: float
    tokens: int
    greedy: bool


class Engine(abc.ABC):
    """What a kind of task may ask of a model.

    scores:     whether loglikelihoods() is to be had
    constrains: whether chat() takes a schema that the answer must follow token by token
    templated:  whether the model has a chat template
    """

    scores: bool = True
    constrains: bool = False
    templated: bool = True

    @abc.abstractmethod
    def loglikelihoods(self, context: str, continuations: Sequence[str]) -> list[Likelihood]:
        """Of each continuation after the context."""

    @abc.abstractmethod
    def complete(self, prompt: str, *, max_tokens: int, stop: Sequence[str] = ()) -> str:
        """The greedy continuation of a text, up to the first of the ``stop`` strings, which is left out."""

    @abc.abstractmethod
    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> str:
        """The greedy answer to a conversation, tool calls included as the model writes them. With ``schema`` no token
        is chosen that leaves the JSON Schema's language. Without a chat template the messages' texts are continued."""

    @abc.abstractmethod
    def rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str | None:
        """The text of a conversation up to where the answer begins; None where only the server knows it."""

    def rolling(self, text: str) -> Likelihood:
        """Of a whole text, each token predicted once with as much context before it as the runtime has: windows of the
        full context, as lm-eval's loglikelihood_rolling cuts them."""
        raise Unsupported("this model gives no log-probabilities of a text")

    def letter(self, messages: Sequence[Message], letters: str) -> int | None:
        """The likeliest of the letters as the answer's first token, its index; None where that is not known."""
        return None

    def share(self, contexts: Iterable[str]) -> None:  # noqa: B027 - an engine that keeps nothing need not listen
        """Tells what contexts will come, so that what they begin with is computed once."""


class InProcess(Engine):
    """A runtime of lowbit's in this process."""

    def __init__(self, model: Runtime) -> None:
        self.model = model
        self.scores = model.gives_logits
        self.constrains = hasattr(model, "grammar")
        self.templated = bool(model.chat_template)
        self._shared: list[int] = []
        self._holds = False  # whether the runtime's cache begins with the shared tokens
        self.encode = functools.lru_cache(4096)(self._encode)

    # Probabilities

    def loglikelihoods(self, context: str, continuations: Sequence[str]) -> list[Likelihood]:
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for i, continuation in enumerate(continuations):
            before, after = self._fitting(*self.pair(context, continuation))
            groups.setdefault(tuple(before), []).append((i, after))
        found: dict[int, Likelihood] = {}
        for shared, members in groups.items():
            scored = self._score(list(shared), [after for _, after in members])
            found |= {i: likelihood for (i, _), likelihood in zip(members, scored, strict=True)}
        return [found[i] for i in range(len(continuations))]

    def rolling(self, text: str) -> Likelihood:
        ids = [self.first, *self.encode(text, False)]
        total, count, at = 0.0, 0, 1
        room = self.model.context
        while at < len(ids):
            end = min(len(ids), at + room)
            begin = max(0, end - room - 1)
            scored = self._score(ids[begin:at], [ids[at:end]])[0]
            total, count, at = total + scored.logprob, count + scored.tokens, end
        return Likelihood(logprob=total, tokens=count, greedy=False)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what follows it, split as lm-eval splits them."""
        if not context:
            alone = list(self.encode(continuation, False))
            return ([self.first], alone) if alone[:1] != [self.first] else (alone[:1], alone[1:])
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        if not context:
            return self.pair("", continuation)
        before, whole = self.encode(context, None), self.encode(context + continuation, None)
        return list(before), list(whole[len(before) :])

    def share(self, contexts: Iterable[str]) -> None:
        common: Sequence[int] | None = None
        for context in contexts:
            kept = context.rstrip()
            ids: Sequence[int] = self.encode(kept, None) if kept else (self.first,)
            common = ids if common is None else common[: _agree(common, ids)]
            common = common[: len(ids) - 1]  # one is left to read, whose logits are wanted
        useful = common is not None and len(common) >= _LEAST_SHARED and self.model.rewinds
        self._shared, self._holds = list(common or ()) if useful else [], False

    @functools.cached_property
    def first(self) -> int:
        """The token that stands for an empty context: BOS, or EOS where there is none."""
        return self.model.bos if self.model.bos >= 0 else self.model.eos

    def _encode(self, text: str, special: bool | None) -> tuple[int, ...]:
        """special None: as the tokenizer does, but no second BOS before a text that spells it."""
        if special is None:
            special = not (self._bos and text.startswith(self._bos))
        return tuple(self.model.tokenize(text, add_special=special, parse_special=True))

    @functools.cached_property
    def _bos(self) -> str:
        return self.model.detokenize([self.model.bos], special=True) if self.model.bos >= 0 else ""

    def _fitting(self, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        room = self.model.context
        if len(after) > room:
            raise BadOption(
                "an answer is longer than the context", where=self.model.path,
                found=f"{len(after)} tokens", expected=f"{room} at most", hint="Give a larger --context",
            )  # fmt: skip
        return before[max(0, len(before) + len(after) - 1 - room) :] or [self.first], after

    def _score(self, before: list[int], continuations: list[list[int]]) -> list[Likelihood]:
        if not self.model.rewinds:
            return [self._score_afresh(before, after) for after in continuations]
        start, found = self._read(before), []
        for after in continuations:
            rows: Iterator[np.ndarray] = iter([start])
            if len(after) > 1:
                if not self.model.rewind(len(before)):
                    self._holds = False
                    self.model.reset()
                    self.model.feed(np.array(before, np.int32))
                rows = _chained(start, self.model.rows(np.array(after[:-1], np.int32)))
            found.append(_likelihood(rows, after))
        return found

    def _read(self, before: list[int]) -> np.ndarray:
        """Decodes a context; logits after it, (n_vocab,), a copy. The shared beginning is always decoded by itself, so
        that the result does not depend on whether it was there already."""
        n = len(self._shared)
        if n and before[:n] == self._shared and len(before) > n:
            if not (self._holds and self.model.rewind(n)):
                self.model.reset()
                self.model.feed(np.array(self._shared, np.int32))
                self._holds = True
            before = before[n:]
        else:
            self._holds = False
            self.model.reset()
        return self.model.feed(np.array(before, np.int32)).copy()

    def _score_afresh(self, before: list[int], after: list[int]) -> Likelihood:
        ids = np.array([*before, *after[:-1]], np.int32)
        runs = self.model.logits(ids, len(before) - 1)
        return _likelihood((row for _, run in runs for row in run), after)

    # Answers

    def complete(self, prompt: str, *, max_tokens: int, stop: Sequence[str] = ()) -> str:
        return self._answer(list(self.encode(prompt, None)), max_tokens, stop, None)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> str:
        text = self.rendered(messages, tools)
        assert text is not None
        return self._answer(list(self.encode(text, None)), max_tokens, (), schema)

    def rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str | None:
        if not self.templated:
            return "\n\n".join([*(str(m["content"]) for m in messages), ""])
        more: dict[str, Any] = {"tools": list(tools)} if tools else {}
        return self.model.rendered(messages, add_generation_prompt=add_generation_prompt, **more)

    def _answer(self, ids: list[int], max_tokens: int, stop: Sequence[str], schema: Mapping[str, Any] | None) -> str:
        self._holds = False
        ids = ids[-max(1, self.model.context - max_tokens) :]
        tokens = self.model.generate(ids, max_tokens) if schema is None else self._constrained(ids, max_tokens, schema)
        text = ""
        for piece in self.model.texts(tokens):
            text += piece
            found = [at for s in stop if s and (at := text.find(s)) >= 0]
            if found:
                return text[: min(found)]
        return text

    def _constrained(self, ids: list[int], max_tokens: int, schema: Mapping[str, Any]) -> Iterator[int]:
        with self.model.grammar(schema) as grammar:  # type: ignore[attr-defined]
            self.model.reset()
            row = self.model.feed(np.array(ids, np.int32))
            for _ in range(max_tokens):
                token = grammar.choose(row)
                if token is None or self.model.ends(token):
                    return
                yield token
                row = self.model.feed(np.array([token], np.int32))


def _likelihood(rows: Iterable[np.ndarray], tokens: Sequence[int]) -> Likelihood:
    """rows: logits before each of the tokens, float32 (n_vocab,)."""
    total, greedy = 0.0, True
    for row, token in zip(rows, tokens, strict=False):  # no row is read for a continuation without tokens
        top = float(row.max())
        total += float(row[token]) - top - float(np.log(np.exp(row - top, dtype=np.float64).sum()))
        greedy = greedy and int(row.argmax()) == token
    return Likelihood(logprob=total, tokens=len(tokens), greedy=greedy)


def _chained(first: np.ndarray, rest: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def _agree(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
