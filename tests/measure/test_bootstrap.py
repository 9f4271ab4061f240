from __future__ import annotations

import numpy as np
import pytest

from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.record import repeated


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = {"mean": 0, "median": 0}
    for trial in range(300):
        # Positions of a chunk share a part, as tokens of a text do.
        values = rng.normal(size=(40, 1)) + rng.normal(size=(40, 10))
        bootstrap = Bootstrap(40, 10, resamples=300, seed=trial)
        mean, median = bootstrap.mean(values), bootstrap.quantile(values, 0.5)
        covered["mean"] += mean.low <= 0 <= mean.high
        covered["median"] += median.low <= 0 <= median.high
    assert 0.89 < covered["mean"] / 300 < 0.985
    assert 0.89 < covered["median"] / 300 < 0.99


def test_drawing_chunks_is_wider_than_drawing_tokens_would_be() -> None:
    values = np.repeat(np.random.default_rng(1).normal(size=(30, 1)), 50, axis=1)
    figure = Bootstrap(30, 50).mean(values)
    by_token = 1.96 * values.std() / values.size**0.5
    assert figure.high - figure.low > 4 * (2 * by_token)


@pytest.mark.parametrize("chunks", [1, 2, 15, 16, 17])
def test_few_chunks_still_have_an_interval(chunks: int) -> None:
    values = np.random.default_rng(2).normal(size=(chunks, 31)) + 5
    bootstrap = Bootstrap(chunks, 31)
    figure = bootstrap.mean(values)
    assert figure.low < figure.value < figure.high
    assert figure.value == pytest.approx(values.mean())
    assert chunks * bootstrap.parts >= 16


def test_a_quantile_of_resamples_is_that_of_the_drawn_observations() -> None:
    values = np.random.default_rng(3).exponential(size=(20, 7))
    bootstrap = Bootstrap(20, 7, resamples=200, seed=5)
    drawn = [
        np.quantile(np.repeat(values, weights, axis=0), 0.9, method="inverted_cdf") for weights in bootstrap.draws()
    ]
    figure = bootstrap.quantile(values, 0.9)
    assert (figure.low, figure.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))))
    assert figure.value == np.quantile(values, 0.9)


def test_repeats_use_students_t() -> None:
    figure = repeated([9.0, 10.0, 11.0], "tokens/s")
    assert (figure.value, figure.n) == (10, 3)
    assert figure.high - figure.value == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert repeated([1.0, 9.0], "x").low == 0
