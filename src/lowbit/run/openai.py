"""Any OpenAI-compatible endpoint: llama-server, vLLM, Ollama, LM Studio, or a hosted one.

An endpoint gives text, and log-probabilities of the few most likely tokens where it gives any. It never gives the whole
row of logits, so there is no KLD of it: ``next_tokens`` is what there is instead. What goes beyond OpenAI's interface
(token ids, tokenization) is used where the server is known to have it; ``server`` says which server it is taken for.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from lowbit.errors import BadOption, RuntimeFailed, Unsupported
from lowbit.run import _tokens, is_url
from lowbit.run._completion import Completion, TokenLogprob, entries, read_completion
from lowbit.run._http import Http, HttpFailed, key_for
from lowbit.run.base import Runtime, Suits, check_sampling

# What tells a server apart: a path beside /v1, and what its JSON has.
_SERVERS = (
    ("llama-server", "/props", "total_slots"),
    ("ollama", "/api/version", "version"),
    ("vllm", "/version", "version"),
)


class OpenAi(Runtime):
    """An endpoint. A context manager; close() lets go of its connections.

    url:         up to /v1 or without it: 'http://127.0.0.1:11434'
    model:       its name there; None means the only one that the server lists
    api_key_env: the environment variable with the API key; None means OPENAI_API_KEY, which is not sent in clear text
                 to another machine
    api_key:     the key itself, instead
    timeout:     seconds to wait for an answer, or for the next piece of a stream

    Raises BadOption, RuntimeFailed where the server cannot be asked or does not answer as one of this kind.
    """

    name: ClassVar[str] = "openai"
    gives_logits: ClassVar[bool] = False
    uses_threads: ClassVar[bool] = False

    @classmethod
    def suits(cls, target: str | os.PathLike[str]) -> Suits:
        return Suits.BY_DEFAULT if is_url(target) else Suits.NO

    @classmethod
    def installed(cls) -> str | None:
        return "OpenAI API v1"

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key_env: str | None = None,
        timeout: float = 600.0,
        api_key: str | None = None,
    ) -> None:
        if not 0 < timeout < math.inf:
            raise BadOption("impossible timeout", found=timeout, expected="seconds above 0")
        self.path = self.url = _base(url)
        self._http = Http(self.url.removesuffix("/v1"), key=api_key or key_for(self.url, api_key_env), timeout=timeout)
        self._v1 = "/v1" if self.url.endswith("/v1") else ""
        try:
            listed = self.models()
            self.model = model or _only(listed, self.url)
            self.server, self._version, self._props = self._recognised()
        except BaseException:
            self._http.close()
            raise
        meta = next((entry.get("meta") for entry in self._listed if entry.get("id") == self.model), None)
        self._meta: Mapping[str, Any] = meta if isinstance(meta, dict) else {}
        self.context = self._context_of()
        self._plain: int | None = None  # a token of whole characters

    def close(self) -> None:
        self._http.close()

    @property
    def version(self) -> str | None:
        return f"{self.server} {self._version or ''}".strip() if self.server else None

    @property
    def n_vocab(self) -> int:  # type: ignore[override]
        """Only llama-server says it."""
        found = self._meta.get("n_vocab")
        return found if isinstance(found, int) else self._cannot("does not say how many tokens the model has")

    @property
    def model_bytes(self) -> int | None:
        found = self._meta.get("size")
        return found if isinstance(found, int) else None

    @property
    def n_weights(self) -> int | None:
        found = self._meta.get("n_params")
        return found if isinstance(found, int) else None

    def models(self) -> list[str]:
        """Names of the models that the server lists. Raises HttpFailed."""
        found = self._http.get(f"{self._v1}/models", timeout=30)
        entries = found.get("data") if isinstance(found, dict) else None
        if not isinstance(entries, list):
            raise HttpFailed("this is no list of models", where=f"{self.url}/models", expected='{"data": [...]}')
        self._listed = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        return [entry["id"] for entry in self._listed]

    # Completions

    def complete(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 16,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = 0,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        echo: bool = False,
        **extra: Any,
    ) -> Completion:
        """POST /v1/completions, one choice.

        prompt:   text, or token ids where the server takes them (llama-server, vLLM)
        logprobs: how many of the most likely tokens to give at each place
        echo:     give the prompt back, with log-probabilities of its tokens (vLLM; llama-server ignores it)
        extra:    further keys of the body ("grammar", "n_probs", ...)
        Raises HttpFailed.
        """
        body = self._body(prompt=prompt if isinstance(prompt, str) else [int(t) for t in prompt], max_tokens=max_tokens)
        body |= {"temperature": temperature, "top_p": top_p} | ({"stop": list(stop)} if stop else {})
        body |= {"seed": seed} if seed is not None else {}
        body |= {"logprobs": logprobs} if logprobs is not None else {}
        body |= {"echo": True} if echo else {}
        begin = time.perf_counter()
        found = self._http.post(f"{self._v1}/completions", body | extra)
        choice = self._choice(found, "/completions")
        text = choice.get("text")
        if not isinstance(text, str):
            raise HttpFailed("a completion without text", where=f"{self.url}/completions", found=str(choice)[:120])
        return read_completion(text, choice, found, time.perf_counter() - begin)

    def stream(self, prompt: str | Sequence[int], max_tokens: int = 16, **body: Any) -> Iterator[str]:
        """The text of a completion in the pieces that the server sends, greedy unless ``body`` says otherwise.

        Raises HttpFailed, also where the stream breaks off.
        """
        for text, _ in self.stream_counted(prompt, max_tokens, **body):
            if text:
                yield text

    def stream_counted(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 16,
        *,
        ignore_end: bool = False,
        cached: bool = True,
        **body: Any,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """As stream, with "usage" where an event has it (the last, whose text is empty) and {} elsewhere.

        ignore_end: go on after an end of text, where the server is known to be able to
        cached:     False reads the prompt anew, where the server can be told so
        """
        given = prompt if isinstance(prompt, str) else [int(t) for t in prompt]
        options = self._body(prompt=given, max_tokens=max_tokens, stream=True, temperature=0.0)
        options["stream_options"] = {"include_usage": True}
        if ignore_end and self.server in ("llama-server", "vllm"):
            options["ignore_eos"] = True
        if not cached and self.server == "llama-server":
            options["cache_prompt"] = False
        for event in self._http.stream(f"{self._v1}/completions", options | body):
            usage = event.get("usage")
            texts = [text for choice in _choices(event) if isinstance(text := choice.get("text"), str)]
            yield "".join(texts), usage if isinstance(usage, dict) else {}

    def ask(self, messages: Sequence[Mapping[str, Any]], max_tokens: int | None = None, **body: Any) -> dict[str, Any]:
        """POST /v1/chat/completions: the server's whole answer, checked to have a message. ``body``: further keys
        ("temperature", "tools", "response_format", ...). Raises HttpFailed."""
        found = self._http.post(f"{self._v1}/chat/completions", self._chat_body(messages, max_tokens) | body)
        choice = self._choice(found, "/chat/completions")
        if not isinstance(choice.get("message"), dict):
            where = f"{self.url}/chat/completions"
            raise HttpFailed("an answer without a message", where=where, found=str(choice)[:120])
        answer: dict[str, Any] = found
        return answer

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
        """As Runtime.chat, in the server's own chat template; ``variables`` are keys of the request ("tools", ...)."""
        check_sampling(temperature, top_k, top_p, seed)
        body = self._chat_body(messages, max_tokens)
        body |= {"temperature": temperature, "top_p": top_p, "seed": seed, "stream": True} | variables
        if top_k:
            body["top_k"] = top_k
        for event in self._http.stream(f"{self._v1}/chat/completions", body):
            for choice in _choices(event):
                delta = choice.get("delta")
                if isinstance(delta, dict) and isinstance(text := delta.get("content"), str) and text:
                    yield text

    # Tokens, where the server has them

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """llama-server's and vLLM's; vLLM always parses special tokens."""
        if self.server == "llama-server":
            body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        elif self.server == "vllm":
            body = {"model": self.model, "prompt": text, "add_special_tokens": add_special}
        else:
            self._cannot("does not tokenize")
        return self._ids(self._http.post("/tokenize", body), "/tokenize")

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        """llama-server's and vLLM's, which spell control tokens out."""
        if self.server not in ("llama-server", "vllm"):
            self._cannot("does not turn tokens into text")
        found = self._http.post("/detokenize", {"model": self.model, "tokens": [int(t) for t in ids]})
        text = found.get("content", found.get("prompt")) if isinstance(found, dict) else None
        if not isinstance(text, str):
            raise HttpFailed("no text of these tokens", where=self._http.root + "/detokenize", found=str(found)[:120])
        return text

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
        """As Runtime.generate, by llama-server, which alone gives ids back. Its sampler draws from its own generator,
        and its top 1 may be another of two equals."""
        if self.server != "llama-server":
            self._cannot("does not give token ids back")
        check_sampling(temperature, top_k, top_p, seed)
        ids = _tokens.fitting(tokens, self.n_vocab, self.context, self.path)
        body = {
            "prompt": ids.tolist(), "n_predict": -1 if max_tokens is None else max_tokens, "temperature": temperature,
            "top_k": top_k, "top_p": top_p, "min_p": 0.0, "seed": seed, "ignore_eos": ignore_end, "stream": True,
            "return_tokens": True, "repeat_penalty": 1.0,
        }  # fmt: skip
        for event in self._http.stream("/completion", body):
            made = event.get("tokens")
            for token in made if isinstance(made, list) else []:
                if not isinstance(token, int) or token in stop:
                    return
                yield token
            if event.get("stop") is True:
                return

    def next_tokens(self, tokens: Sequence[int] | np.ndarray, k: int) -> list[tuple[int, float]]:
        """The endpoint's ``k`` most likely tokens after these, with log-probabilities in nats, most likely first.

        The probabilities are those of the whole vocabulary, before any sampler. llama-server and vLLM; vLLM limits k
        to 20 unless it was started with --max-logprobs. Raises Unsupported elsewhere: text cannot be cut at every
        token, so places would not be the same.
        """
        ids = [int(t) for t in tokens]
        if self.server == "llama-server":
            # It tells no probabilities where what it samples is an end or a part of a character. They are taken from
            # the logits before any bias, so a bias towards a plain token gets them told everywhere.
            if self._plain is None:
                self._plain = (self.tokenize("a", add_special=False) or [0])[-1]
            body = {
                "prompt": ids, "n_predict": 1, "n_probs": k, "temperature": 0.0, "cache_prompt": True,
                "samplers": ["temperature"], "post_sampling_probs": False, "logit_bias": [[self._plain, 1e5]],
            }  # fmt: skip
            found = self._http.post("/completion", body)
            places = found.get("completion_probabilities") if isinstance(found, dict) else None
            place = places[0] if isinstance(places, list) and places and isinstance(places[0], dict) else {}
            return self._ranked(tuple(entries(place.get("top_logprobs"))))
        if self.server == "vllm":
            answer = self.complete(ids, 1, logprobs=k, return_tokens_as_token_ids=True)
            return self._ranked(answer.tokens[0].top if answer.tokens else ())
        self._cannot("does not take token ids, so its predictions are not at the same places as a reference's")

    # Inside

    def _body(self, **more: Any) -> dict[str, Any]:
        return {"model": self.model, **more}

    def _chat_body(self, messages: Sequence[Mapping[str, Any]], max_tokens: int | None) -> dict[str, Any]:
        limit = {} if max_tokens is None else {"max_tokens": max_tokens}
        return self._body(messages=[dict(message) for message in messages], **limit)

    def _choice(self, found: Any, path: str) -> dict[str, Any]:
        choices = _choices(found)
        if not choices:
            what = "the server's answer has no choices"
            raise HttpFailed(what, where=self.url + path, found=str(found)[:120], expected='{"choices": [...]}')
        return choices[0]

    def _ids(self, found: Any, path: str) -> list[int]:
        ids = found.get("tokens") if isinstance(found, dict) else None
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise HttpFailed("no token ids", where=self._http.root + path, found=str(found)[:120])
        return ids

    def _ranked(self, top: Sequence[TokenLogprob]) -> list[tuple[int, float]]:
        """Distinct ids with log-probabilities, most likely first."""
        pairs = {entry.id: entry.logprob for entry in top if entry.id is not None and entry.id >= 0}
        # llama-server's float32 sum leaves a few millinats above 0 where one token is certain.
        if not pairs or len(pairs) != len(top) or max(pairs.values()) > 0.01:
            what = "no log-probabilities of the next token"
            raise HttpFailed(what, where=self.url, found=" ".join(str(list(top[:3])).split())[:120])
        return sorted(((token, min(0.0, p)) for token, p in pairs.items()), key=lambda pair: -pair[1])

    def _recognised(self) -> tuple[str | None, str | None, Mapping[str, Any]]:
        """(server, its version, what it says of itself); None where it is none of those that are known."""
        for server, path, key in _SERVERS:
            with contextlib.suppress(RuntimeFailed):
                found = self._http.get(path, timeout=10)
                if isinstance(found, dict) and key in found:
                    said = found.get("version", found.get("build_info"))
                    return server, said if isinstance(said, str) else None, found
        return None, None, {}

    def _context_of(self) -> int:
        settings = self._props.get("default_generation_settings")
        listed = next((entry for entry in self._listed if entry.get("id") == self.model), {})
        for holder, key in ((settings, "n_ctx"), (listed, "max_model_len"), (listed, "max_context_length")):
            if isinstance(holder, Mapping) and isinstance(found := holder.get(key), int) and found > 0:
                return found
        return 0  # it does not say


def _choices(found: Any) -> list[dict[str, Any]]:
    choices = found.get("choices") if isinstance(found, dict) else None
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _base(url: str) -> str:
    """'http://host:1' and 'http://host:1/v1/' are 'http://host:1/v1'; any other path is taken as it is."""
    url = url.strip().rstrip("/")
    rest = url.partition("://")[2]
    if not rest.partition("/")[0]:
        raise BadOption("not a URL", found=repr(url)[:100], expected="http://HOST:PORT/v1")
    return url if "/" in rest else f"{url}/v1"


def _only(listed: list[str], url: str) -> str:
    if not listed:
        raise Unsupported("the server has no model", where=url, hint="Load one there, or name it")
    if len(listed) > 1:
        some = ", ".join(listed[:8]) + (" ..." if len(listed) > 8 else "")
        raise BadOption("the server has several models", where=url, expected="the name of one", found=some)
    return listed[0]


RUNTIME = OpenAi
