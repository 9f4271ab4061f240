"""What a drafter brings in llama.cpp's server: how many of its guesses are accepted, and how much time they save."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from lowbit.errors import RuntimeFailed
from lowbit.run.llama_server import LlamaServer

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5, 6,",
    "Once upon a time there was a",
)
_CONTEXT = 1024


def measure(model: Path, drafter: Path, prompts: Sequence[str], n: int) -> dict[str, float]:
    """{drafted, accepted, alone, helped}: tokens guessed and accepted, and tokens a second without and with the
    drafter, greedy, of ``n`` tokens after each prompt; ``same``: 1 where both gave the same answers.

    Raises RuntimeFailed.
    """
    with LlamaServer(model, context=_CONTEXT) as server:
        texts, alone, _, _ = _answers(server, prompts, n)
    with LlamaServer(model, context=_CONTEXT, drafter=drafter) as server:
        helped_texts, helped, drafted, accepted = _answers(server, prompts, n)
    if not drafted:
        raise RuntimeFailed("llama.cpp took the drafter and never used it", where=drafter)
    return {
        "drafted": drafted, "accepted": accepted, "alone": alone, "helped": helped,
        "same": float(texts == helped_texts),
    }  # fmt: skip


def _answers(server: LlamaServer, prompts: Sequence[str], n: int) -> tuple[list[str], float, float, float]:
    """The answers, tokens a second, tokens drafted and accepted; the first answer warms up and does not count."""
    server.complete_native(prompts[0], n, ignore_eos=True)
    texts, made, drafted, accepted = [], 0, 0.0, 0.0
    start = time.monotonic()
    for prompt in prompts:
        found = server.complete_native(prompt, n, ignore_eos=True, cache_prompt=False)
        timings = found.get("timings", {})
        texts.append(str(found.get("content")))
        made += int(timings.get("predicted_n", n))
        drafted += float(timings.get("draft_n", 0))
        accepted += float(timings.get("draft_n_accepted", 0))
    return texts, made / (time.monotonic() - start), drafted, accepted
