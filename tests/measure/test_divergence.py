"""The fast arithmetic of rows against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit.compact import softmax
from lowbit.measure.divergence import kl, kl_of_likely
from lowbit.measure.fidelity import Scores, compare


def exactly(of_p: np.ndarray, of_q: np.ndarray) -> tuple[float, float, float]:
    """KL(p || q), log sum of p and of q."""

    def log_sum(logits: np.ndarray) -> float:
        wide = logits.astype(np.longdouble)
        return float(wide.max() + np.log(np.exp(wide - wide.max()).sum()))

    p = np.exp(of_p.astype(np.longdouble) - log_sum(of_p))
    differences = (of_p.astype(np.longdouble) - log_sum(of_p)) - (of_q.astype(np.longdouble) - log_sum(of_q))
    return float((p * differences).sum()), log_sum(of_p), log_sum(of_q)


def rows(kind: str, n_vocab: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a model and of a somewhat worse one; the kinds have tails of every sort."""
    rng = np.random.default_rng(seed)
    if kind == "flat":
        first = rng.normal(size=n_vocab) * 0.01
    elif kind == "peaked":
        first = rng.normal(size=n_vocab)
        first[rng.integers(n_vocab)] += 40
    elif kind == "far from zero":
        first = rng.normal(size=n_vocab) * 3 + 500
    else:  # as language models have it
        first = rng.normal(size=n_vocab) * 2 + rng.exponential(2, n_vocab)
    spoilt = first + rng.normal(size=n_vocab) * 0.3 + rng.normal()
    return first.astype(np.float32), spoilt.astype(np.float32)


@pytest.mark.parametrize("n_vocab", [3, 49_152, 262_144])
@pytest.mark.parametrize("kind", ["flat", "peaked", "far from zero", "usual"])
def test_every_row_is_within_a_millionth_of_a_nat_and_means_much_nearer(kind: str, n_vocab: int) -> None:
    errors = []
    for seed in range(8):
        of_p, of_q = rows(kind, n_vocab, seed)
        scratch = np.empty((2, n_vocab), np.float32)
        p, q = softmax(of_p, scratch[0]), softmax(of_q, scratch[1])
        expected, log_sum_p, log_sum_q = exactly(of_p, of_q)
        assert abs(p.log_sum - log_sum_p) < 5e-7
        assert abs(q.log_sum - log_sum_q) < 5e-7
        errors.append(kl(p, q, of_p, of_q, scratch[1]) - expected)
    assert max(map(abs, errors)) < 1e-6
    assert abs(np.mean(errors)) < 1e-7


def test_what_llama_perplexity_leaves_out() -> None:
    of_p, of_q = rows("usual", 49_152, 0)
    scratch = np.empty((2, len(of_p)), np.float32)
    p, q = softmax(of_p, scratch[0]), softmax(of_q, scratch[1])
    expected, log_sum_p, log_sum_q = exactly(of_p, of_q)
    log_p = of_p.astype(np.float64) - log_sum_p
    each = np.exp(log_p) * (log_p - of_q + log_sum_q)
    assert kl_of_likely(p, q, of_p, of_q) == pytest.approx(each[log_p > -16].sum(), abs=1e-6)
    assert abs(each[log_p <= -16].sum()) > 1e-6
    assert each.sum() == pytest.approx(expected, abs=1e-9)


def test_equal_rows_are_not_apart_at_all() -> None:
    of_p, _ = rows("usual", 262_144, 0)
    scratch = np.empty((2, len(of_p)), np.float32)
    p, q = softmax(of_p, scratch[0]), softmax(of_p.copy(), scratch[1])
    assert kl(p, q, of_p, of_p.copy(), scratch[1]) == 0


def test_impossible_tokens() -> None:
    """-inf as logit: excluded by the reference it counts nothing, excluded by the other alone the divergence is."""
    of_p, of_q = rows("usual", 100, 0)
    scratch = np.empty((2, 100), np.float32)
    of_p[:10] = -np.inf
    both = of_q.copy()
    both[:5] = -np.inf
    for row, expected in ((of_q, exactly(of_p[10:], of_q[10:])[0]), (both, None)):
        p, q = softmax(of_p, scratch[0]), softmax(row, scratch[1])
        found = kl(p, q, of_p, row, scratch[1])
        rest = np.log(np.exp(row.astype(float)).sum()) - np.log(np.exp(row[10:].astype(float)).sum())
        assert found == pytest.approx((expected or exactly(of_p[10:], row[10:])[0]) + rest, abs=1e-6)
    p, q = softmax(of_q, scratch[0]), softmax(of_p, scratch[1])
    assert kl(p, q, of_q, of_p, scratch[1]) == np.inf


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 500, 22).astype(np.int32)
    logits = [rng.normal(size=(11, 500)).astype(np.float32) for _ in range(3)]

    def scores(threads: int) -> list[Scores]:
        into = [Scores.empty(2, 10) for _ in logits]
        compare(logits, tokens, 11, into, 1, threads)
        return into

    for alone, together in zip(scores(1), scores(threads), strict=True):
        for name in ("nll", "kld", "same_top", "delta_p"):
            assert np.array_equal(getattr(alone, name), getattr(together, name))
        assert alone.nll[1].all()
        assert not alone.nll[0].any()  # the other chunk's
