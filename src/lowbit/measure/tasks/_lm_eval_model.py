"""An lm-eval model class around an engine: lm-eval builds the requests and scores the answers, the engine computes."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from lowbit.errors import Unsupported
from lowbit.measure.tasks._engine import Engine
from lowbit.measure.tasks._journal import Journal

_MAX_TOKENS = 256  # lm-eval's own, where a task does not say


class EngineLM(LM):
    """What ``lm_eval.simple_evaluate(model=...)`` takes.

    engine:  whatever the model runs in
    journal: answers that an earlier run had are taken from it, and new ones are kept there
    """

    def __init__(self, engine: Engine, journal: Journal) -> None:
        super().__init__()
        self._engine, self._journal = engine, journal

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval has it; requests of one context are scored together, and what all contexts begin with is kept."""
        if not self._engine.scores:
            raise Unsupported(
                "this endpoint gives no log-probabilities of a prompt, which the task needs",
                hint="Measure the file itself, or take a task that generates",
            )
        pairs: list[tuple[str, str]] = [request.args for request in requests]
        self._engine.share(dict.fromkeys(context for context, _ in pairs))
        by_context: dict[str, list[str]] = {}
        for context, continuation in pairs:
            by_context.setdefault(context, []).append(continuation)
        found: dict[tuple[str, str], tuple[float, bool]] = {}
        for context, continuations in by_context.items():
            compute = functools.partial(self._scored, context, continuations)
            answer = self._kept(["loglikelihood", context, *continuations], compute)
            found |= {(context, x): (float(a), bool(b)) for x, (a, b) in zip(continuations, answer, strict=True)}
        return [found[pair] for pair in pairs]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval has it."""
        return [
            float(self._kept(["rolling", text], functools.partial(self._rolling, text)))
            for (text,) in (request.args for request in requests)
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval has it, greedily. Raises Unsupported for a task that wants samples."""
        return [self._generated(*request.args) for request in requests]

    def _generated(self, prompt: str, wanted: dict[str, Any]) -> str:
        if wanted.get("do_sample") and float(wanted.get("temperature", 1.0)) > 0:
            raise Unsupported("the task wants sampled answers", found=json.dumps(wanted, default=str)[:200],
                              expected="greedy ones: do_sample: false")  # fmt: skip
        until = wanted.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        n = int(wanted.get("max_gen_toks", wanted.get("max_tokens", _MAX_TOKENS)))
        key = ["generate", prompt, n, *stop]
        return str(self._kept(key, lambda: self._engine.complete(prompt, max_tokens=n, stop=stop)))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self._engine.rendered(chat_history, add_generation_prompt=add_generation_prompt)
        if text is None:
            raise Unsupported("an endpoint's chat template cannot be applied here")
        return text

    @property
    def tokenizer_name(self) -> str:
        return "the model's own"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "the model's own"

    def _scored(self, context: str, continuations: list[str]) -> list[list[Any]]:
        return [[found.logprob, found.greedy] for found in self._engine.loglikelihoods(context, continuations)]

    def _rolling(self, text: str) -> float:
        return self._engine.rolling(text).logprob

    def _kept(self, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
        name = "request " + hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        if name not in self._journal.done:
            self._journal.add(name, {"scores": {}, "response": compute()})
        return self._journal.done[name]["response"]
