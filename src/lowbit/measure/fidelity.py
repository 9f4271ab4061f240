"""How far an artifact's predictions are from the reference's, on the same chunks of text, each in its runtime.

Convention of llama.cpp's perplexity tool (tools/perplexity, --kl-divergence): the text is cut into chunks; each chunk
is a fresh sequence that begins with BOS where the model has one; the second half's positions are scored, so that each
has at least half a chunk of context. With first = chunk // 2, position i in first .. chunk - 2 predicts token i + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lowbit import compact
from lowbit.compact import softmax
from lowbit.measure import sketch
from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.divergence import kl, kl_of_likely
from lowbit.measure.in_step import in_step
from lowbit.measure.record import Figure, exact
from lowbit.measure.reference_cache import ReferenceCache
from lowbit.run.base import Runtime
from lowbit.threads import in_shares


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one file did at every scored position; float64 (chunks, positions), but same_top is bool.

    nll:      -log p(next token), nats
    kld:      KL(reference || artifact), nats; None for the reference itself
    same_top: whether the most probable token is the reference's
    delta_p:  p(next token) minus the reference's
    kld_of_likely: the same without what is less probable than exp(-16), as llama-perplexity sums it
    kept:     where the reference came from a cache, what is known of ``kld``, which is then an estimate, and there is
              no kld_of_likely
    """

    nll: np.ndarray
    kld: np.ndarray
    same_top: np.ndarray
    delta_p: np.ndarray
    kld_of_likely: np.ndarray | None = None
    kept: sketch.Divergence | None = None

    @classmethod
    def empty(cls, chunks: int, positions: int) -> Scores:
        shape = (chunks, positions)
        nll, kld, delta_p, likely = np.zeros((4, *shape))
        return cls(nll=nll, kld=kld, same_top=np.ones(shape, bool), delta_p=delta_p, kld_of_likely=likely)


def score(
    reference: Runtime,
    artifacts: Sequence[Runtime],
    chunks: np.ndarray,
    advance: Callable[[int], None] = lambda done: None,
    threads: int = 1,
) -> tuple[Scores, list[Scores]]:
    """Runs every file over every chunk; the reference's scores and each artifact's.

    chunks:  int32 (n, chunk)
    advance: called with the number of chunks done, all files together
    threads: that compare the rows, once they are computed
    All models must share the vocabulary. They are decoded in step, each in slices of its own: at any time one slice of
    logits of every model is held.
    """
    n, chunk = chunks.shape
    first = chunk // 2
    scored = chunk - 1 - first
    of_reference = Scores.empty(n, scored)
    of_artifacts = [Scores.empty(n, scored) for _ in artifacts]
    done = 0
    for c, tokens in enumerate(chunks):
        for offset, logits in in_step(model.logits(tokens, first) for model in (reference, *artifacts)):
            compare(logits, tokens, offset, (of_reference, *of_artifacts), c, threads)
        done += 1 + len(artifacts)
        advance(done)
    return of_reference, of_artifacts


def compare(
    logits: Sequence[np.ndarray], tokens: np.ndarray, offset: int, into: Sequence[Scores], c: int, threads: int = 1
) -> None:
    """Scores rows of logits against the first file's and the tokens that follow.

    logits: of each file, the reference first, float32 (rows, n_vocab) for the positions from ``offset`` on
    tokens: the chunk's, (chunk,); c: which chunk it is
    into:   the files' scores, in the same order
    """
    chunk = len(tokens)
    rows = min(len(logits[0]), chunk - 1 - offset)  # the last position predicts nothing that is known

    def some(begin: int, end: int) -> None:
        scratch = np.empty((2, logits[0].shape[1]), np.float32)
        for i in range(begin, end):
            _compare_row([of[i] for of in logits], tokens[offset + i + 1], into, (c, offset + i - chunk // 2), scratch)

    in_shares(rows, threads, some)


def _compare_row(
    rows: Sequence[np.ndarray], token: int, into: Sequence[Scores], at: tuple[int, int], scratch: np.ndarray
) -> None:
    p = softmax(rows[0], scratch[0])
    log_p = float(rows[0][token]) - p.log_sum
    into[0].nll[at] = -log_p
    for row, scores in zip(rows[1:], into[1:], strict=True):
        q = softmax(row, scratch[1])
        log_q = float(row[token]) - q.log_sum
        scores.nll[at] = -log_q
        scores.delta_p[at] = math.exp(log_q) - math.exp(log_p)
        scores.same_top[at] = q.top == p.top
        scores.kld[at] = kl(p, q, rows[0], row, scratch[1])
        if scores.kld_of_likely is not None:
            scores.kld_of_likely[at] = kl_of_likely(p, q, rows[0], row)


def score_kept(
    cache: ReferenceCache,
    artifact: Runtime,
    chunks: int,
    advance: Callable[[int], None] = lambda done: None,
    threads: int = 1,
) -> tuple[Scores, Scores]:
    """Runs an artifact over the first ``chunks`` chunks of a cache; the reference's scores and the artifact's.

    advance: called with the number of chunks done. The artifact must have the cache's vocabulary.
    """
    shape = chunks, cache.header.scored
    of_reference, scores, parts = Scores.empty(*shape), Scores.empty(*shape), sketch.Parts.empty(*shape)
    for c, tokens in enumerate(cache.tokens[:chunks]):
        records = cache.records(c)
        of_reference.nll[c] = records["nll"]
        for offset, rows in artifact.logits(tokens, cache.header.first):
            at = offset - cache.header.first
            here = records[at : at + len(rows)]
            following = tokens[offset + 1 : offset + 1 + len(here)]
            _score_rows(cache.layout, here, rows, following, (scores, parts), (c, slice(at, at + len(here))), threads)
        advance(c + 1)
    kept = parts.settled()
    np.exp(-scores.nll, out=scores.delta_p)
    scores.delta_p[...] -= np.exp(-of_reference.nll)
    return of_reference, replace(scores, kld=kept.estimate, kld_of_likely=None, kept=kept)


def _score_rows(
    layout: compact.Layout,
    records: np.ndarray,
    rows: np.ndarray,
    following: np.ndarray,
    into: tuple[Scores, sketch.Parts],
    at: tuple[int, slice],
    threads: int,
) -> None:
    ids, _ = compact.unpack(layout, records)
    log_q, least = np.empty(ids.shape), np.empty(len(records))
    scores, parts = into
    nll, same_top = scores.nll[at], scores.same_top[at]  # views

    def some(begin: int, end: int) -> None:
        scratch = np.empty(layout.n_vocab, np.float32)
        for i in range(begin, end):
            q = softmax(rows[i], scratch)
            log_q[i] = rows[i][ids[i]] - q.log_sum
            least[i] = rows[i].min() - q.log_sum
            nll[i] = q.log_sum - float(rows[i][following[i]])
            same_top[i] = q.top == records["top"][i]

    in_shares(len(records), threads, some)
    parts.put(at, sketch.parts(layout, records, log_q, least))


def figures(scores: Scores, bootstrap: Bootstrap) -> dict[str, Figure]:
    """The summary of one artifact.

    perplexity:  exp of the mean nll
    kld_mean, kld_median, kld_p99: nats
    kld_mean_llama_cpp: of kld_of_likely, where there is one: what llama-perplexity prints for the same logits
    top1:        share of positions with the reference's most probable token, 0 to 1
    rms_delta_p: root mean square of delta_p, 0 to 1 (llama.cpp's perplexity tool prints it in percent)
    """
    likely = scores.kld_of_likely
    return {
        "tokens": exact(scores.nll.size, "tokens"),
        "perplexity": bootstrap.mean(scores.nll, via=np.exp),
        "kld_mean": bootstrap.mean(scores.kld, "nats"),
        "kld_median": bootstrap.quantile(scores.kld, 0.5, "nats"),
        "kld_p99": bootstrap.quantile(scores.kld, 0.99, "nats"),
        **({"kld_mean_llama_cpp": bootstrap.mean(likely, "nats")} if likely is not None else {}),
        "top1": bootstrap.mean(scores.same_top.astype(np.float64), "share"),
        "rms_delta_p": bootstrap.mean(scores.delta_p**2, "probability", via=np.sqrt),
    }
