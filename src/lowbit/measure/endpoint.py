"""What can be measured of an endpoint, which gives text and a few log-probabilities but no logits.

**Agreement** where it takes token ids (llama-server, vLLM): it is asked what comes next after the reference's own
tokens, at places spread evenly over those that ``fidelity`` scores, and gives its K most likely tokens with
log-probabilities of the whole vocabulary. The most likely one is compared with the reference's. Of the KLD a lower
bound is known: merging tokens never raises a divergence (Cover and Thomas 2006, theorem 2.7.1), so the divergence
between the two distributions over {each of the K tokens, everything else} is at most the true one. It is named
``kld_lower_bound`` and never kld_mean, unless K is the whole vocabulary, which makes it the KLD itself.

llama-server adds its vocabulary up in float32, one after the other, where up to 2**-25 a token is lost: its
probabilities may all be too large by the same factor. The bound allows for that (see ``_lower_bound``).

**Speed** as a client sees it, the network included: time to the first token, and tokens a second from there on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lowbit.compact import softmax
from lowbit.errors import BadOption, RuntimeFailed, Unsupported
from lowbit.measure._probe import peak_bytes_of
from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.in_step import in_step
from lowbit.measure.opening import check_tokens, check_vocabulary
from lowbit.measure.record import Figure, as_json, exact, repeated
from lowbit.measure.text import Text
from lowbit.run.base import Runtime
from lowbit.run.llama_server import LlamaServer
from lowbit.run.openai import OpenAi

_LOST_A_TOKEN = 2.0**-25


class Asked(Protocol):
    """What of MeasureOptions is about endpoints."""

    @property
    def chunk(self) -> int: ...
    @property
    def endpoint_places(self) -> int: ...
    @property
    def top_logprobs(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def generate_tokens(self) -> int: ...
    @property
    def repeats(self) -> int: ...
    @property
    def speed(self) -> bool: ...
    @property
    def memory(self) -> bool: ...
    @property
    def resamples(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """At each asked place, (chunks, places): whether both find the same token most likely, the lower bound of the KLD
    in nats, and how much of the reference's probability lies on the tokens that the endpoint named."""

    same_top: np.ndarray
    bound: np.ndarray
    covered: np.ndarray
    k: int
    whole: bool

    def figures(self, *, resamples: int, seed: int) -> dict[str, Figure]:
        """tokens, top1, kld_lower_bound (kld_mean where the endpoint gave the whole vocabulary), covered."""
        bootstrap = Bootstrap(*self.bound.shape, resamples=resamples, seed=seed)
        return {
            "tokens": exact(self.bound.size, "tokens"),
            "kld_mean" if self.whole else "kld_lower_bound": bootstrap.mean(self.bound, "nats"),
            "top1": bootstrap.mean(self.same_top.astype(np.float64), "share"),
            "covered": bootstrap.mean(self.covered, "share"),
        }


def places(chunk: int, wanted: int) -> np.ndarray:
    """``wanted`` positions, or all there are, spread evenly over those that fidelity.score scores: int64, ascending."""
    first, end = chunk // 2, chunk - 1
    count = min(wanted, end - first)
    return first + (np.arange(count) * (end - first)) // count


def agreement(
    reference: Runtime,
    endpoint: OpenAi,
    chunks: np.ndarray,
    *,
    at: np.ndarray,
    k: int,
    advance: Callable[[int], None] = lambda done: None,
) -> Agreement:
    """Asks the endpoint at the places ``at`` of every chunk, int32 (n, chunk). advance: gets the chunks done.

    Raises Unsupported where the endpoint takes no token ids, HttpFailed.
    """
    shape = (len(chunks), len(at))
    same_top, bound, covered = np.zeros(shape, bool), np.zeros(shape), np.zeros(shape)
    whole = True
    for c, tokens in enumerate(chunks):
        for offset, (rows,) in in_step([reference.logits(tokens, int(at[0]))]):
            for i in np.flatnonzero((at >= offset) & (at < offset + len(rows))):
                found = endpoint.next_tokens(tokens[: at[i] + 1], k)
                ids = np.array([token for token, _ in found])
                if ids.max() >= rows.shape[1]:
                    what = "the endpoint names a token that the reference does not have"
                    raise RuntimeFailed(what, where=endpoint.url, found=ids.max(), expected=f"below {rows.shape[1]}")
                row = rows[at[i] - offset]
                same_top[c, i] = ids[0] == row.argmax()
                bound[c, i], covered[c, i] = _lower_bound(row, ids, np.array([p for _, p in found]))
                whole = whole and len(ids) == len(row)
        advance(c + 1)
    return Agreement(same_top=same_top, bound=bound, covered=covered, k=k, whole=whole)


def _lower_bound(row: np.ndarray, ids: np.ndarray, log_q: np.ndarray) -> tuple[float, float]:
    """(a lower bound of KL(reference || endpoint) in nats, the reference's probability on ``ids``).

    row: the reference's logits, float32 (n_vocab,). log_q: of the endpoint's tokens ``ids``. Its true log-probabilities
    lie between log_q - slack and log_q, slack = n_vocab 2**-25. Lower ones only raise the sum over ``ids``, which so
    stays a bound with log_q itself; of everything else the endpoint has at most 1 - exp(-slack) sum exp(log_q), and
    the more it has the lower the bound. With the whole vocabulary there is nothing else: log_q is normalized.
    """
    found = softmax(row, np.empty_like(row))
    log_p = row[ids].astype(np.float64) - found.log_sum
    p = np.exp(log_p)
    named = math.fsum(p)
    given = math.fsum(np.exp(log_q))
    if len(ids) == len(row):
        return max(0.0, math.fsum(p * (log_p - log_q + math.log(given)))), 1.0
    bound = math.fsum(p * (log_p - log_q))
    # What is left of p is added up by itself: 1 - named would lose its digits where little is left.
    weights = found.weights.astype(np.float64)
    weights[ids] = 0.0
    rest = float(weights.sum()) / found.total
    rest_of_q = 1.0 - given * math.exp(-len(row) * _LOST_A_TOKEN)
    if rest > 0 and rest_of_q > 0:
        bound += rest * math.log(rest / rest_of_q)
    return max(0.0, bound), min(1.0, named)


def speed(endpoint: OpenAi, prompts: Sequence[str | list[int]], *, generate: int) -> dict[str, Figure | None]:
    """time_to_first_token (s), prompt_tokens_per_second (the prompt's tokens over that time) and
    generation_tokens_per_second (from the first token on) of greedy streamed completions, one a prompt after the first,
    which warms up. Each prompt is another text: a server would answer a prompt it has seen from its cache.

    Rates are None where the server does not count its tokens, or the answers ended at once.
    """
    firsts: list[float] = []
    rates: dict[str, list[float]] = {"prompt": [], "generation": []}
    for i, prompt in enumerate(prompts):
        first, last, used = _timed(endpoint, prompt, generate)
        if i == 0 or first is None:
            continue
        firsts.append(first)
        made, read = used.get("completion_tokens"), used.get("prompt_tokens")
        if isinstance(read, int) and read > 0:
            rates["prompt"].append(read / first)
        if isinstance(made, int) and made > 1 and last > first:
            rates["generation"].append((made - 1) / (last - first))
    if len(firsts) < 2:
        raise RuntimeFailed("the endpoint generated nothing", where=endpoint.url, hint="Does the model end at once?")
    found = {f"{name}_tokens_per_second": repeated(r, "tokens/s") if len(r) > 1 else None for name, r in rates.items()}
    return {"time_to_first_token": repeated(firsts, "s"), **found}


def _timed(endpoint: OpenAi, prompt: str | list[int], generate: int) -> tuple[float | None, float, dict[str, Any]]:
    """(seconds to the first piece of text, to the last, what the server counted)"""
    first: float | None = None
    last, used = 0.0, dict[str, Any]()
    begin = time.perf_counter()
    for piece, usage in endpoint.stream_counted(prompt, generate, ignore_end=True, cached=False):
        if piece:
            last = time.perf_counter() - begin
            first = last if first is None else first
        used = usage or used
    return first, last, used


def measured(
    endpoint: OpenAi,
    reference: Runtime,
    text: Text,
    chunks: np.ndarray,
    options: Asked,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """What ``measure`` says of an endpoint: "fidelity" and "speed" as of a file, as far as there is any, and
    "not_measured", a sentence on what there is not. The memory is that of a server of our own, on Linux."""
    entry: dict[str, Any] = {"fidelity": {}}
    if reason := _incomparable(endpoint, reference, text, options.chunk):
        entry["not_measured"] = f"fidelity: {reason}"
    else:
        at = places(options.chunk, options.endpoint_places)
        found = agreement(reference, endpoint, chunks, at=at, k=options.top_logprobs, advance=advance)
        entry["fidelity"] = as_json(found.figures(resamples=options.resamples, seed=options.seed))
    if options.speed:
        room = endpoint.context - options.generate_tokens - 1 if endpoint.context else options.chunk
        n = max(1, min(options.prompt_tokens, options.chunk, room))
        # From another token on than what was asked before: no prefix of it lies in a server's cache.
        starts = [chunks[i % len(chunks), 1 + i // len(chunks) :][:n].tolist() for i in range(options.repeats + 1)]
        takes_ids = endpoint.server in ("llama-server", "vllm")
        prompts: Any = starts if takes_ids else [reference.detokenize(tokens) for tokens in starts]
        entry["speed"] = as_json(speed(endpoint, prompts, generate=options.generate_tokens))
    if options.memory and isinstance(endpoint, LlamaServer) and (peak := peak_bytes_of(endpoint.pid)):
        entry["memory"] = as_json({"peak_bytes": exact(peak, "bytes")})
    return entry


def _incomparable(endpoint: OpenAi, reference: Runtime, text: Text, chunk: int) -> str | None:
    """Why the endpoint's predictions are not at the reference's places; None where they are.

    Raises BadFile where it has another vocabulary or cuts the text otherwise, BadOption where a chunk does not fit.
    """
    if endpoint.context and endpoint.context < chunk:
        raise BadOption(
            "a chunk does not fit the endpoint's context", where=endpoint.url, found=f"{chunk} tokens",
            expected=f"at most {endpoint.context}", hint="Give a smaller --chunk",
        )  # fmt: skip
    try:
        if endpoint.server == "llama-server":
            check_vocabulary(endpoint, reference)
        check_tokens(endpoint, reference, text)
    except Unsupported as error:
        return f"{error.what}; token ids are needed to ask at the reference's places"
    return None
