"""What is kept of a row of the reference: the estimate, what it claims of its error, and the bounds."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit import compact
from lowbit.compact import Layout, softmax
from lowbit.measure import sketch
from lowbit.measure.divergence import kl
from lowbit.measure.sketch import Parts


def logits(rows: int, n_vocab: int, seed: int, spoil: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """A reference's rows, from peaked to flat, and an artifact's."""
    rng = np.random.default_rng(seed)
    heat = rng.uniform(0.3, 4, (rows, 1))
    first = rng.normal(size=(rows, n_vocab)) * heat + rng.exponential(heat, (rows, n_vocab))
    return first.astype(np.float32), (first + rng.normal(size=first.shape) * spoil).astype(np.float32)


def kept(layout: Layout, rows: np.ndarray, following: np.ndarray, seed: int) -> np.ndarray:
    records, scratch = np.zeros(len(rows), layout.dtype), np.empty(layout.n_vocab, np.float32)
    uniform = np.random.default_rng(seed).random(len(rows))
    for i, row in enumerate(rows):
        compact.keep(layout, row, int(following[i]), uniform[i], records[i : i + 1], scratch)
    return records


def exact(of_p: np.ndarray, of_q: np.ndarray) -> np.ndarray:
    scratch = np.empty((2, of_p.shape[1]), np.float32)
    found = []
    for p_row, q_row in zip(of_p, of_q, strict=True):
        p, q = softmax(p_row, scratch[0]), softmax(q_row, scratch[1])
        found.append(kl(p, q, p_row, q_row, scratch[1]))
    return np.array(found)


def estimated(layout: Layout, records: np.ndarray, of_q: np.ndarray) -> sketch.Divergence:
    ids, _ = compact.unpack(layout, records)
    log_sums = np.logaddexp.reduce(of_q.astype(np.float64), axis=1)
    log_q = np.take_along_axis(of_q, ids, 1) - log_sums[:, None]
    parts = Parts.empty(len(records))
    parts.put(slice(None), sketch.parts(layout, records, log_q, of_q.min(1) - log_sums))
    return parts.settled()


@pytest.mark.parametrize("n_vocab", [2, 53, 54, 300, 49_152, 151_936, 262_144, 300_000])
def test_a_scored_token_takes_at_most_300_bytes(n_vocab: int) -> None:
    layout = Layout.of(n_vocab)
    assert layout.dtype.itemsize <= compact.RECORD_BYTES
    assert layout.dtype.itemsize + 4 * 512 / 255 <= 300  # with the chunk's token ids
    assert layout.step < 1e-5
    rows, _ = logits(3, n_vocab, 0)
    records = kept(layout, rows, np.array([0, 1, n_vocab - 1]), 0)
    ids, log_p = compact.unpack(layout, records)
    expected = rows - np.logaddexp.reduce(rows.astype(np.float64), axis=1)[:, None]
    np.testing.assert_allclose(log_p, np.maximum(np.take_along_axis(expected, ids, 1), -32), atol=layout.step)
    np.testing.assert_allclose(records["nll"], -expected[np.arange(3), [0, 1, n_vocab - 1]], atol=1e-6)
    np.testing.assert_array_equal(records["top"], rows.argmax(1))
    np.testing.assert_allclose(records["entropy"], -(np.exp(expected) * expected).sum(1), atol=1e-5)
    assert compact.wrong(layout, records) is None


def test_the_estimate_is_right_in_the_mean_and_its_variance_is_claimed() -> None:
    n_vocab, rows, drawings = 2000, 60, 100
    layout = Layout.of(n_vocab)
    for spoil in (0.03, 0.5):
        of_p, of_q = logits(rows, n_vocab, 1, spoil)
        truth = exact(of_p, of_q)
        estimates, claims = [], []
        for seed in range(drawings):
            found = estimated(layout, kept(layout, of_p, np.zeros(rows, int), seed), of_q)
            estimates.append(found.estimate)
            claims.append(found.variance)
            assert (found.low <= truth).all()
            assert (truth <= found.high).all()
        errors = np.mean(estimates, axis=1) - truth.mean()
        assert abs(errors.mean()) < 0.4 * errors.std()  # three standard errors of it, and some for the fitted factor
        claimed = np.sqrt(np.sum(claims, axis=1)) / rows
        assert errors.std() < 1.1 * claimed.mean()
        assert (abs(errors) < 3.29 * claimed).mean() >= 0.99
        assert claimed.mean() < 0.05 * truth.mean()


def test_a_small_vocabulary_is_kept_whole_and_exactly() -> None:
    layout = Layout.of(40)
    of_p, of_q = logits(50, 40, 2)
    found = estimated(layout, kept(layout, of_p, np.zeros(50, int), 0), of_q)
    np.testing.assert_allclose(found.estimate, exact(of_p, of_q), atol=1e-5)
    assert (found.variance == 0).all()
    assert (found.high - found.low < 1e-4).all()


@pytest.mark.parametrize("kind", ["one token", "two tokens", "all equal", "impossible tokens", "far apart"])
def test_rows_of_every_shape(kind: str) -> None:
    n_vocab = 3000
    layout = Layout.of(n_vocab)
    of_p, of_q = logits(4, n_vocab, 3)
    if kind == "one token":
        of_p[:, 7] += 200
    elif kind == "two tokens":
        of_p[:, 7:9] = 300
    elif kind == "all equal":
        of_p[:] = 1
    elif kind == "impossible tokens":
        of_p[:, 100:] = -np.inf
    else:
        of_q[:, :1500] -= 60
    found = estimated(layout, kept(layout, of_p, np.zeros(4, int), 0), of_q)
    truth = exact(of_p, of_q)
    assert np.isfinite(found.estimate).all()
    assert (found.low <= truth + 1e-6).all()
    assert (truth <= found.high + 1e-6).all()
    if kind != "far apart":
        assert (abs(found.estimate - truth) < 0.2 * truth + 1e-4).all()


def test_mass_on_tokens_that_the_reference_excludes_is_not_corrected_for() -> None:
    """No draw sees those tokens, so the mean of q / p over the drawn falls short of what it should be."""
    layout = Layout.of(3000)
    of_p, of_q = logits(40, 3000, 6)
    of_p[:, 1500:] -= 60
    found = estimated(layout, kept(layout, of_p, np.zeros(40, int), 0), of_q)
    assert abs(found.estimate.mean() - exact(of_p, of_q).mean()) < found.error_of_mean()


def test_an_artifact_that_excludes_tokens_is_infinitely_far() -> None:
    layout = Layout.of(3000)
    of_p, of_q = logits(2, 3000, 4)
    of_q[:, of_p.argmax(1)] = -np.inf
    assert (estimated(layout, kept(layout, of_p, np.zeros(2, int), 0), of_q).estimate == np.inf).all()


def test_records_that_cannot_be_are_found() -> None:
    layout = Layout.of(3000)
    rows, _ = logits(5, 3000, 5)
    good = kept(layout, rows, np.zeros(5, int), 0)
    for field, value in (("nll", np.nan), ("entropy", -3), ("tail", 2), ("top", 3000), ("head", 54), ("entries", 255)):
        bad = good.copy()
        bad[field][3] = value
        assert "row 3" in (compact.wrong(layout, bad) or "")
