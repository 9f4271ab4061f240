"""How far an artifact's predictions are from the reference's, on the same chunks of text, each in its runtime.

Convention of llama.cpp's perplexity tool (tools/perplexity, --kl-divergence): the text is cut into chunks; each chunk
is a fresh sequence that begins with BOS where the model has one; the second half's positions are scored, so that each
has at least half a chunk of context. With first = chunk // 2, position i in first .. chunk - 2 predicts token i + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.in_step import in_step
from lowbit.measure.record import Figure, exact
from lowbit.run.base import Runtime


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one file did at every scored position; float64 (chunks, positions), but same_top is bool.

    nll:      -log p(next token), nats
    kld:      KL(reference || artifact), nats; None for the reference itself
    same_top: whether the most probable token is the reference's
    delta_p:  p(next token) minus the reference's
    """

    nll: np.ndarray
    kld: np.ndarray
    same_top: np.ndarray
    delta_p: np.ndarray

    @classmethod
    def empty(cls, chunks: int, positions: int) -> Scores:
        shape = (chunks, positions)
        return cls(nll=np.zeros(shape), kld=np.zeros(shape), same_top=np.ones(shape, bool), delta_p=np.zeros(shape))


def score(
    reference: Runtime,
    artifacts: Sequence[Runtime],
    chunks: np.ndarray,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[Scores, list[Scores]]:
    """Runs every file over every chunk; the reference's scores and each artifact's.

    chunks:  int32 (n, chunk)
    advance: called with the number of chunks done, all files together
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
        for offset, (expected, *found) in in_step(model.logits(tokens, first) for model in (reference, *artifacts)):
            rows = min(len(expected), chunk - 1 - offset)
            at = (c, slice(offset - first, offset - first + rows))
            following = tokens[offset + 1 : offset + 1 + rows]
            for i in range(rows):
                of_reference.nll[c, offset - first + i] = -_log_probability(expected[i], following[i])
            for logits, scores in zip(found, of_artifacts, strict=True):
                compare(expected[:rows], logits[:rows], following, scores, at)
        done += 1 + len(artifacts)
        advance(done)
    return of_reference, of_artifacts


def compare(
    reference: np.ndarray, artifact: np.ndarray, following: np.ndarray, into: Scores, at: tuple[int, slice]
) -> None:
    """Scores rows of logits, float32 (rows, n_vocab) each, against each other and the tokens that follow, (rows,).

    A row at a time in float64: exact to 1e-12 nats, and the few arrays of one row stay in the processor's cache.
    """
    c, span = at
    for i, (r, a, token) in enumerate(zip(reference, artifact, following, strict=True), start=span.start):
        log_p, log_q = _log_softmax(r), _log_softmax(a)
        into.nll[c, i] = -log_q[token]
        into.delta_p[c, i] = np.exp(log_q[token]) - np.exp(log_p[token])
        into.same_top[c, i] = r.argmax() == a.argmax()
        np.subtract(log_p, log_q, out=log_q)
        into.kld[c, i] = np.dot(np.exp(log_p, out=log_p), log_q)


def figures(scores: Scores, bootstrap: Bootstrap) -> dict[str, Figure]:
    """The summary of one artifact.

    perplexity:  exp of the mean nll
    kld_mean, kld_median, kld_p99: nats
    top1:        share of positions with the reference's most probable token, 0 to 1
    rms_delta_p: root mean square of delta_p, 0 to 1 (llama.cpp's perplexity tool prints it in percent)
    """
    return {
        "tokens": exact(scores.nll.size, "tokens"),
        "perplexity": bootstrap.mean(scores.nll, via=np.exp),
        "kld_mean": bootstrap.mean(scores.kld, "nats"),
        "kld_median": bootstrap.quantile(scores.kld, 0.5, "nats"),
        "kld_p99": bootstrap.quantile(scores.kld, 0.99, "nats"),
        "top1": bootstrap.mean(scores.same_top.astype(np.float64), "share"),
        "rms_delta_p": bootstrap.mean(scores.delta_p**2, "probability", via=np.sqrt),
    }


def paired(baseline: Scores, artifact: Scores, bootstrap: Bootstrap) -> dict[str, Figure | None]:
    """An artifact against a baseline, both measured on the same chunks: differences and the ratio of mean KLD.

    The ratio is None where the baseline's KLD is 0 (it is the reference).
    """
    base, mean = bootstrap.means(baseline.kld), float(np.mean(baseline.kld))
    ratio = None
    if mean > 0 and np.all(base > 0):
        ratio = bootstrap.figure(float(np.mean(artifact.kld)) / mean, bootstrap.means(artifact.kld) / base, "ratio")
    tops = artifact.same_top.astype(np.float64) - baseline.same_top
    return {
        "kld_mean_difference": bootstrap.mean(artifact.kld - baseline.kld, "nats"),
        "kld_mean_ratio": ratio,
        "top1_difference": bootstrap.mean(tops, "share"),
        "log_perplexity_difference": bootstrap.mean(artifact.nll - baseline.nll, "nats"),
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 (n_vocab,) -> float64 (n_vocab,)"""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def _log_probability(logits: np.ndarray, token: int) -> float:
    return float(_log_softmax(logits)[token])
