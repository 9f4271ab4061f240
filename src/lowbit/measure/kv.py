"""What a quantized KV cache costs this artifact: KLD per cache type, context length and position.

Each sequence of text runs through the reference (f16 cache) and through every artifact once per cache type, in step.
Two distances are kept of each scored position: to the reference, and to the same artifact with an f16 cache. The first
says what a user gets; their paired difference is what the cache adds; the second is what the cache alone does, and is
much sharper, because the weights' own error is in both.

Scored are spans of 64 positions spread evenly over the sequence, so that a long one has a curve of KLD against
position at the price of few logits. The figures of a context length are over the spans of its second half, as
llama.cpp's perplexity tool scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lowbit.compact import softmax
from lowbit.errors import BadOption
from lowbit.measure import statistics
from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.divergence import kl
from lowbit.measure.in_step import in_step
from lowbit.run.base import Runtime
from lowbit.threads import in_order

BASE = "f16"
SPAN = 64  # positions: fewer at a time would run another kernel of llama.cpp's
_SPANS = 16
_KEPT = ("nll", "kld", "same_top", "kld_to_f16", "same_top_as_f16")
# What a change of kernel alone does to SmolLM2-135M (docs/measuring.md): below it nothing can be told from chance.
NOISE = 0.005
UNDECIDED = "undecided: the interval holds the limit, and more text would tell"


@dataclass(frozen=True, kw_only=True)
class KvOptions:
    """Which caches to measure.

    types:    as the runtime names them: in llama.cpp f16, q8_0, q4_0, ... or K:V pairs; in MLX f16, q8_g64, ...;
              f16 is always measured too, as what others are compared with
    contexts: lengths of the sequences, tokens; at least 256 each
    tokens:   of text to read at each length: 8192 are 16 sequences of 512 or one of 8192
    limit:    nats that a cache may change predictions by, on the mean, to be recommended
    """

    types: tuple[str, ...] = ("f16", "q8_0", "q4_0")
    contexts: tuple[int, ...] = (512, 2048)
    tokens: int = 8192
    limit: float = 0.02

    def __post_init__(self) -> None:
        if not self.types or not self.contexts:
            raise BadOption("nothing to measure", expected="at least one KV cache type and one context length")
        for context in self.contexts:
            if context < 4 * SPAN:
                raise BadOption("a context too short for its KV cache to matter", found=context, expected="256 or more")
        if self.tokens < 1:
            raise BadOption("impossible number of tokens", found=self.tokens, expected="at least 1")
        if not 0 < self.limit < float("inf"):
            raise BadOption("impossible limit", found=self.limit, expected="nats above 0")

    @property
    def ordered(self) -> tuple[str, ...]:
        """The types without repeats, f16 first."""
        return tuple(
            dict.fromkeys((BASE, *(k if k == v else name for name in self.types for k, _, v in [name.partition(":")])))
        )


def spans_of(context: int) -> list[tuple[int, int]]:
    """(first, end) of the scored spans, ascending: position i of them predicts token i + 1."""
    count = min(_SPANS, context // (2 * SPAN))
    ends = [(i + 1) * (context - 1) // count for i in range(count)]
    return [(end - SPAN, end) for end in ends]


def sequences(ids: np.ndarray, context: int, tokens: int, bos: int | None) -> np.ndarray:
    """The text's first full sequences, int32 (n, context), as many as ``tokens`` pays for, one at least."""
    n = min(max(1, tokens // context), len(ids) // context)
    found = ids[: n * context].reshape(n, context).copy()
    if bos is not None:
        found[:, 0] = bos
    return found


def score(
    reference: Runtime,
    artifacts: Sequence[Sequence[Runtime]],
    tokens: np.ndarray,
    advance: Callable[[int], None] = lambda done: None,
    threads: int = 1,
) -> np.ndarray:
    """Runs one sequence, int32 (context,), through all models; float64 (artifacts, types, 5, positions).

    artifacts: of each the models that differ in their cache's type, f16 first
    advance:   called with a number of positions as they are scored
    threads:   that compare rows
    The five are _KEPT: nats, nats, 0 or 1, nats, 0 or 1.
    """
    spans = spans_of(len(tokens))
    place = {first + k: i * SPAN + k for i, (first, _) in enumerate(spans) for k in range(SPAN)}
    found = np.zeros(shape_of(len(artifacts), len(artifacts[0]), len(tokens)))
    models = [reference, *itertools.chain.from_iterable(artifacts)]
    for offset, logits in in_step(model.logits_of(tokens, spans) for model in models):
        share = -(-len(logits[0]) // threads)

        def some(begin: int, offset: int = offset, logits: list[np.ndarray] = logits, share: int = share) -> None:
            scratch = np.empty((3, logits[0].shape[1]), np.float32)
            for i in range(begin, min(begin + share, len(logits[0]))):
                at, token = place[offset + i], int(tokens[offset + i + 1])
                _score_row([rows[i] for rows in logits], token, found[..., at], scratch)

        for _ in in_order((partial(some, begin) for begin in range(0, len(logits[0]), share)), threads):
            pass
        advance(len(logits[0]))
    return found


def _score_row(rows: Sequence[np.ndarray], token: int, into: np.ndarray, scratch: np.ndarray) -> None:
    """rows: the reference's, then each artifact's, f16 first. into: (artifacts, types, 5)."""
    p = softmax(rows[0], scratch[0])
    others = iter(rows[1:])
    for of_artifact in into:
        base, base_row = None, rows[0]
        for kept in of_artifact:
            row = next(others)
            q = softmax(row, scratch[1 if base is None else 2])
            kept[:3] = q.log_sum - float(row[token]), 0, q.top == p.top
            if base is None:
                base, base_row = q, row
                kept[3:] = 0, 1
                # its weights are needed below, so the scratch that is overwritten is another
                kept[1] = kl(p, q, rows[0], row, scratch[2])
            else:
                # kl() overwrites its scratch: q's own weights, which only its sum is needed of
                kept[1] = kl(p, q, rows[0], row, scratch[2])
                kept[3:] = kl(base, q, base_row, row, scratch[2]), q.top == base.top


def shape_of(artifacts: int, types: int, context: int) -> tuple[int, ...]:
    """The shape of what ``score`` gives."""
    return artifacts, types, len(_KEPT), SPAN * len(spans_of(context))


def summarize(
    found: np.ndarray, context: int, bootstrap: Callable[[int, int], Bootstrap]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of one artifact with one cache at one context length, and the same by position.

    found:     float64 (sequences, 2, 5, positions): [:, 0] with the f16 cache, [:, 1] with this one
    bootstrap: makes one of (sequences, positions)
    """
    half = len(spans_of(context)) // 2 * SPAN
    base, this = ({key: found[:, i, k] for k, key in enumerate(_KEPT)} for i in (0, 1))
    n = len(found)
    draws = bootstrap(n, found.shape[-1] - half)
    figures = {
        "perplexity": draws.mean(this["nll"][:, half:], via=np.exp),
        "kld": draws.mean(this["kld"][:, half:], "nats"),
        "kld_to_f16": draws.mean(this["kld_to_f16"][:, half:], "nats"),
        "top1": draws.mean(this["same_top"][:, half:], "share"),
        "top1_as_f16": draws.mean(this["same_top_as_f16"][:, half:], "share"),
    }
    result = {key: figure.as_json() for key, figure in figures.items()}
    added = (this["kld"] - base["kld"])[:, half:]
    result["kld_added"] = statistics.of_means(added, draws, higher_is_better=False, unit="nats").as_json()
    draws = bootstrap(n, SPAN)
    by_position = []
    for i, (first, end) in enumerate(spans_of(context)):
        at = slice(i * SPAN, (i + 1) * SPAN)
        of_span = {key: draws.mean(this[key][:, at], "nats").as_json() for key in ("kld", "kld_to_f16")}
        by_position.append({"from": first, "to": end, **of_span})
    return result, by_position


def verdict(kld_to_f16: dict[str, Any], limit: float) -> str:
    """What the interval of a cache's own KLD says against the two thresholds."""
    low, high = kld_to_f16["low"], kld_to_f16["high"]
    if high <= NOISE:
        return "no measurable difference"
    if high <= limit:
        return "within the limit"
    return "above the limit" if low > limit else UNDECIDED


def recommend(cells: Sequence[dict[str, Any]], limit: float) -> dict[str, Any]:
    """The cache of fewest bytes that stays within the limit at every context measured, and why.

    cells: of one artifact, as in the result
    """
    by_type: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        by_type.setdefault(cell["type"], []).append(cell)
    longest = max(cell["context"] for cell in cells)
    fits = [
        name
        for name, those in by_type.items()
        if name == BASE or all(c["verdict"] in ("no measurable difference", "within the limit") for c in those)
    ]
    size = {name: those[-1]["cache_bytes"] for name, those in by_type.items()}
    # Where a runtime does not say, the last named stands for the smallest.
    best = min(fits, key=lambda name: size[name]) if all(size.values()) else fits[-1]
    return {
        "type": best,
        "limit": limit,
        "context": longest,
        "cache_bytes": size[best],
        "f16_bytes": size[BASE],
        "why": [_said(name, those, limit) for name, those in by_type.items() if name != BASE],
    }


def _said(name: str, cells: list[dict[str, Any]], limit: float) -> str:
    worst = max(cells, key=lambda cell: cell["kld_to_f16"]["high"])
    figure = worst["kld_to_f16"]
    if worst["verdict"] == "no measurable difference":
        return f"{name}: no measurable difference (below {NOISE} nats at every context)"
    place = f"{figure['value']:.3g} nats [{figure['low']:.3g}, {figure['high']:.3g}] at {worst['context']}"
    said = f"; the limit, {limit:g}, lies within: more text would tell"
    if worst["verdict"] != UNDECIDED:
        said = f", {worst['verdict']} of {limit:g}"
    return f"{name}: changes predictions by {place}{said}"
