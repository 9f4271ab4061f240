"""The contract of a runtime: one model, opened in the program that executes it.

A runtime is a file here whose name is its own ("llama.cpp" is llama_cpp.py) with ``RUNTIME``, a subclass of
``Runtime``; ``lowbit.run`` finds it by that. What a runtime cannot give is None, or raises Unsupported with a sentence.
Files that begin with an underscore are what runtimes share.
"""

from __future__ import annotations

import abc
import enum
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import numpy as np

from lowbit.errors import BadFile, BadOption, RuntimeFailed, Unsupported
from lowbit.run import _chat_template, _tokens
from lowbit.run._sampling import sample


class Suits(enum.IntEnum):
    """Whether a runtime runs an artifact: not at all, when it is asked for by name, or by default."""

    NO = 0
    BY_NAME = 1
    BY_DEFAULT = 2


class Runtime(abc.ABC):
    """A model, loaded and ready to run. A context manager; close() lets go of it.

    The constructor takes the artifact (a path or a URL) and keyword options; ``lowbit.run.open_artifact`` says which.
    Every runtime but an endpoint takes context, ubatch and threads.

    name:           as people and ``--runtime`` spell it
    gives_logits:   whether logits(), feed() and so KLD are to be had
    generates_as_shipped: whether generate() is how the runtime itself generates, so that its speed is the runtime's
    uses_threads:   whether ``threads`` may be more than one
    options_class:  the dataclass of its keyword options, where the constructor does not name them itself
    to_generate:    options for whoever generates only, which save it memory and time
    rewinds:        whether rewind() and rows() are, to score several continuations of one context
    path:           the artifact: a Path, of an endpoint its URL
    context:        tokens that a sequence may have
    n_vocab:        entries of a row of logits
    """

    name: ClassVar[str]
    gives_logits: ClassVar[bool] = True
    generates_as_shipped: ClassVar[bool] = True
    uses_threads: ClassVar[bool] = True
    options_class: ClassVar[Any] = None
    to_generate: ClassVar[Mapping[str, Any]] = {}
    rewinds: ClassVar[bool] = False
    path: Path | str
    context: int
    n_vocab: int

    # What every runtime says

    @classmethod
    @abc.abstractmethod
    def suits(cls, target: str | os.PathLike[str]) -> Suits:
        """By the looks of the artifact (suffix, first bytes, config.json), without opening it."""

    @classmethod
    @abc.abstractmethod
    def installed(cls) -> str | None:
        """The version of the program that computes; None where it is not installed. Imports nothing heavy."""

    @classmethod  # noqa: B027 - what has no library of its own loads none
    def load_library(cls) -> None:
        """Loads what computes, so that its memory can be told from a model's. Raises NotFound."""

    @abc.abstractmethod
    def close(self) -> None:
        """Lets go of the model; further calls raise RuntimeFailed."""

    @property
    def version(self) -> str | None:
        """The version of what computes; of an endpoint what it says of itself, None where it says nothing."""
        return self.installed()

    @property
    def model_bytes(self) -> int | None:
        """Bytes of all tensors as they are stored."""
        return None

    @property
    def n_weights(self) -> int | None:
        """Elements of all tensors; a tied embedding counts once."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Text

    @property
    def bos(self) -> int:
        """Id of the beginning-of-sequence token, -1 where there is none."""
        self._cannot("does not say which token begins a sequence")

    @property
    def eos(self) -> int:
        """Id of the end-of-sequence token, -1 where there is none."""
        self._cannot("does not say which token ends a sequence")

    @property
    def adds_bos(self) -> bool:
        """Whether tokenize() begins with BOS."""
        self._cannot("does not say whether texts begin with a token of their own")

    def ends(self, token: int) -> bool:
        """Whether generation ends at this token (end of sequence, of turn, ...)."""
        return token == self.eos

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        add_special:   put BOS (and EOS) where the model's tokenizer does
        parse_special: read "<|im_start|>" and the like as control tokens rather than as text
        Raises BadText for a lone surrogate.
        """
        self._cannot("does not tokenize")

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids; ``special`` spells control tokens out. Bytes that are not UTF-8 become U+FFFD."""
        self._cannot("does not turn tokens into text")

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the artifact's own chat template, None where it has none."""
        return None

    def prompt_of(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of a conversation in the artifact's own chat template, up to where the assistant's answer begins.

        messages: mappings with "role" and "content"; variables: what else the template reads ("tools", ...)
        Raises BadFile where there is no template, or one that cannot be rendered; BadOption where it refuses.
        """
        text = self.rendered(messages, **variables)
        # A template that spells BOS itself must not get a second one.
        spelled = self.bos >= 0 and text.startswith(self._spelled(self.bos))
        return self.tokenize(text, add_special=not spelled, parse_special=True)

    def rendered(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text behind ``prompt_of``, rendered in Jinja's sandbox."""
        source = self.chat_template
        if not source:
            raise BadFile("it has no chat template", where=self.path, hint="Give the model text instead of messages")
        bos, eos = self._spelled(self.bos), self._spelled(self.eos)
        return _chat_template.render(source, messages, bos_token=bos, eos_token=eos, where=self.path, **variables)

    # Running

    def logits(self, tokens: Sequence[int] | np.ndarray, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Full-vocabulary logits of a fresh sequence, streamed: (offset, float32 (k, n_vocab)) for consecutive runs.

        Row i of a run belongs to position offset + i and predicts the token at offset + i + 1. Only positions from
        ``start`` on are given. Each array is the caller's own. How many rows a run has is the runtime's affair.
        Raises BadOption for ids out of range, and for more tokens than the context holds.
        """
        self._cannot("does not give the logits of the whole vocabulary")

    def logits_of(
        self, tokens: Sequence[int] | np.ndarray, spans: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """As logits(), for the positions within ``spans`` only: (first, end) of each, ascending and apart."""
        for offset, rows in self.logits(tokens, spans[0][0]):
            for first, end in spans:
                inside = rows[max(0, first - offset) : max(0, end - offset)]
                if len(inside):
                    yield max(first, offset), inside

    def beside(self, *, kv_type: str) -> Self:
        """The same loaded weights with a KV cache of another type, in the runtime's own names.

        Closing it leaves this model open; closing this one closes it. Raises BadOption for a type the runtime lacks.
        """
        self._cannot("has one kind of KV cache")

    @property
    def cache_bytes(self) -> int | None:
        """Bytes that the KV cache holds now; None where the runtime does not say."""
        return None

    def reset(self) -> None:
        """Forgets the sequence: the next token is the first."""
        self._cannot("keeps no sequence to go on with")

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Appends tokens, int32 (n,), to the sequence; logits after the last, float32 (n_vocab,), valid until the next
        call. Does not check that they fit."""
        self._cannot("does not give the logits of the whole vocabulary")

    def rewind(self, n: int) -> bool:
        """Cuts the sequence back to its first ``n`` tokens. False where they are not all there any more: the sequence
        is then to be begun anew."""
        self._cannot("does not go back in a sequence")

    def rows(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Appends tokens, int32 (n,), to the sequence; logits after each of them, float32 (n_vocab,), valid until the
        next. To be exhausted. Does not check that they fit."""
        self._cannot("does not go back in a sequence")

    def generate(
        self,
        tokens: Sequence[int],
        max_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Collection[int] = (),
        ignore_end: bool = False,
    ) -> Iterator[int]:
        """Continues a prompt, a token at a time, from a fresh sequence.

        Ends before an end-of-generation token (unless ``ignore_end``) or a token in ``stop``, after ``max_tokens``,
        or when the context is full. temperature 0 is greedy and takes the lowest id of equals; otherwise the
        probabilities after temperature, then top_k (0: all), then top_p (1: all) are sampled with ``seed``.
        """
        check_sampling(temperature, top_k, top_p, seed)
        ids = self._fitting(tokens)
        self.reset()
        rng = np.random.default_rng(seed)
        row, past, produced = self.feed(ids), len(ids), 0
        while max_tokens is None or produced < max_tokens:
            token = sample(row, rng, temperature=temperature, top_k=top_k, top_p=top_p)
            if token in stop or (not ignore_end and self.ends(token)):
                return
            yield token
            produced += 1
            if past >= self.context or produced == max_tokens:
                return
            row = self.feed(np.array([token], np.int32))
            past += 1

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        **variables: Any,
    ) -> Iterator[str]:
        """The assistant's answer to a conversation, as pieces of text; options as generate() has them."""
        prompt = self.prompt_of(messages, **variables)
        answer = self.generate(prompt, max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return self.texts(answer)

    def texts(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens as they come, in pieces that end with whole characters."""
        made: list[int] = []
        given = ""
        for token in tokens:
            made.append(token)
            text = self.detokenize(made)
            if not text.endswith("\ufffd") and len(text) > len(given):
                yield text[len(given) :]
                given = text
        if made and (rest := self.detokenize(made)[len(given) :]):
            yield rest

    # For the runtimes' own files

    def _fitting(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        return _tokens.fitting(tokens, self.n_vocab, self.context, self.path)

    def _spelled(self, token: int) -> str:
        return self.detokenize([token], special=True) if token >= 0 else ""

    def _cannot(self, what: str) -> NoReturn:
        raise Unsupported(f"{self.name} {what}", where=self.path)

    def _closed(self) -> NoReturn:
        raise RuntimeFailed("this model was closed", where=self.path)


def check_sampling(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Raises BadOption for what cannot be sampled with."""
    if not 0 <= temperature < float("inf") or top_k < 0 or not 0 < top_p <= 1 or seed < 0:
        raise BadOption(
            "impossible sampling options",
            found=f"temperature={temperature}, top_k={top_k}, top_p={top_p}, seed={seed}",
            expected="temperature >= 0, top_k >= 0, 0 < top_p <= 1, seed >= 0",
        )


def check_sizes(**sizes: int) -> None:
    """Raises BadOption where context is negative, or another of the named sizes less than 1."""
    for name, value in sizes.items():
        least = 0 if name == "context" else 1
        if value < least:
            raise BadOption(f"impossible {name}", found=value, expected=f"at least {least}")


def first_line(error: BaseException) -> str:
    """What a foreign library said, in one line with the error's kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
