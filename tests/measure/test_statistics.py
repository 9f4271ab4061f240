"""Tests and intervals against what they promise: exact sums where they are short, simulation where they are not."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.measure import statistics
from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.record import _T95
from lowbit.measure.statistics import NO_DIFFERENCE, Comparison, corrected, holm, mcnemar, of_items, of_means


def tail(k: int, n: int, p: Fraction) -> Fraction:
    """P(X <= k), in whole numbers."""
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), Fraction(0))


@given(lost=st.integers(0, 60), won=st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_mcnemar_is_the_sum_of_the_binomials(lost: int, won: int) -> None:
    expected = min(Fraction(1), 2 * tail(min(lost, won), lost + won, Fraction(1, 2)))
    assert mcnemar(lost, won) == pytest.approx(float(expected), rel=1e-9)
    assert mcnemar(won, lost) == mcnemar(lost, won)


def test_mcnemar_of_many_pairs() -> None:
    assert mcnemar(50_000, 50_000) == 1
    # far out the normal distribution says the same
    z = (50_700 - 50_000 - 0.5) / math.sqrt(100_000 / 4)
    assert mcnemar(49_300, 50_700) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


@pytest.mark.parametrize("freedom", range(1, len(_T95) + 1))
def test_students_quantiles_are_those_of_the_tables(freedom: int) -> None:
    assert statistics.student_quantile(0.975, freedom) == pytest.approx(_T95[freedom - 1], abs=6e-4)
    assert statistics.student_p(_T95[freedom - 1], 1.0, freedom) == pytest.approx(0.05, abs=1e-4)


def test_student_with_many_degrees_is_the_normal_distribution() -> None:
    assert statistics.student_quantile(0.975, 10**6) == pytest.approx(1.95996, abs=1e-5)
    assert statistics.student_p(-3.0, 1.0, 10**6) == pytest.approx(math.erfc(3 / math.sqrt(2)), rel=1e-4)


def test_students_p_is_how_often_it_happens() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(200_000, 6))
    t = drawn.mean(1) / (drawn.std(1, ddof=1) / 6**0.5)
    for value in (0.5, 2.0, 4.0):
        assert statistics.student_p(value, 1.0, 5) == pytest.approx((abs(t) >= value).mean(), abs=0.004)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_intervals_of_shares_cover(n: int) -> None:
    """Coverage at each true share, summed over every outcome."""
    exact = [statistics.clopper_pearson(k, n) for k in range(n + 1)]
    score = [statistics.wilson(k, n) for k in range(n + 1)]
    covered = []
    for p in np.linspace(0.01, 0.99, 99):
        weights = np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
        assert weights @ [low <= p <= high for low, high in exact] >= 0.95 - 1e-9
        covered.append(weights @ [low <= p <= high for low, high in score])
    assert 0.93 < np.mean(covered) < 0.985
    assert exact[0][0] == score[0][0] == 0
    assert exact[n][1] == score[n][1] == 1
    for (a, b), (c, d) in zip(exact, exact[::-1], strict=True):  # right and wrong may change names
        assert (a, b) == pytest.approx((1 - d, 1 - c))


def test_the_exact_interval_ends_where_the_tail_is_a_fortieth() -> None:
    low, high = statistics.clopper_pearson(3, 20)
    assert float(tail(3, 20, Fraction(high))) == pytest.approx(0.025, rel=1e-9)
    assert 1 - float(tail(2, 20, Fraction(low))) == pytest.approx(0.025, rel=1e-9)


@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_holm_rejects_what_the_step_down_test_rejects(p_values: list[float]) -> None:
    rejected = set()
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] * (len(p_values) - rank) >= 0.05:
            break
        rejected.add(i)
    adjusted = holm(p_values)
    assert {i for i, p in enumerate(adjusted) if p < 0.05} == rejected
    assert all(own <= p <= 1 for own, p in zip(p_values, adjusted, strict=True))


def test_equal_files_are_called_different_at_most_once_in_twenty_families() -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for trial in range(300):
        bootstrap = Bootstrap(30, 4, resamples=20, seed=trial)
        family = [of_means(rng.normal(size=(30, 4)), bootstrap, higher_is_better=False) for _ in range(5)]
        wrong += any(comparison.verdict != NO_DIFFERENCE for comparison in corrected(family))
    assert wrong / 300 < 0.08  # 0.05 and three standard errors


def test_a_mean_difference_of_the_smallest_size_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(2)
    chunks, positions = 24, 10

    def measured(shift: float) -> Comparison:
        # positions of a chunk share a part; counted one by one they would seem to be ten times as many
        values = rng.normal(size=(chunks, 1)) + 0.3 * rng.normal(size=(chunks, positions)) + shift
        return of_means(values, Bootstrap(chunks, positions, resamples=20), higher_is_better=True)

    smallest = np.mean([measured(0).smallest_detectable for _ in range(300)])
    verdicts = [measured(float(smallest)).verdict for _ in range(1000)]
    assert verdicts.count("better") / 1000 == pytest.approx(0.8, abs=0.05)
    assert verdicts.count("worse") == 0


@pytest.mark.parametrize(("n", "unlike"), [(100, 0.0), (100, 0.1), (400, 0.2), (1000, 0.4), (3000, 0.2)])
def test_a_share_difference_of_the_smallest_size_is_found_four_times_in_five(n: int, unlike: float) -> None:
    rng = np.random.default_rng(3)
    smallest = statistics.smallest_share_difference(n, round(n * unlike))
    assert 0 < smallest < 1
    unlike = max(unlike, smallest)
    pairs = rng.binomial(n, unlike, 4000)
    won = rng.binomial(pairs, (1 + smallest / unlike) / 2)
    p_values = {key: mcnemar(*key) for key in set(zip((pairs - won).tolist(), won.tolist(), strict=True))}
    found = [p_values[key] < 0.05 for key in zip((pairs - won).tolist(), won.tolist(), strict=True)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_more_items_see_smaller_differences() -> None:
    sizes = [statistics.smallest_share_difference(n, n // 10) for n in (5, 50, 100, 500, 1900, 2100, 50_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 1  # of five pairs all must be unlike and even then the test cannot reject
    assert sizes[4] == pytest.approx(sizes[5], rel=0.1)  # where the exact sum hands over to the formula


def test_intervals_of_paired_shares_cover() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(1500):
        kind = rng.choice(4, 60, p=(0.5, 0.2, 0.1, 0.2))  # both, lost, won, neither
        low, high = statistics._newcombe(*np.bincount(kind, minlength=4).tolist())
        covered += low <= -0.1 <= high
    assert 0.93 < covered / 1500 < 0.98


def test_verdicts() -> None:
    right = np.arange(200) % 2 == 0
    same = of_items(right, right)
    assert (same.verdict, same.p_value) == (NO_DIFFERENCE, 1)
    assert same.as_json()["verdict"] == NO_DIFFERENCE
    worse = right.copy()
    worse[:60] = False
    assert of_items(right, worse).verdict == "worse"
    assert of_items(worse, right).verdict == "better"
    bootstrap = Bootstrap(20, 3)
    rng = np.random.default_rng(5)
    lower = rng.normal(size=(20, 3)) - 5
    assert of_means(lower, bootstrap, higher_is_better=False).verdict == "better"
    assert of_means(lower, bootstrap, higher_is_better=True).verdict == "worse"
    none = of_means(np.zeros((20, 3)), bootstrap, higher_is_better=True)
    assert (none.verdict, none.p_value, none.smallest_detectable) == (NO_DIFFERENCE, 1, 0)


def test_one_stretch_of_text_says_nothing() -> None:
    alone = of_means(np.ones((1, 1)), Bootstrap(1, 1), higher_is_better=True)
    assert alone.verdict == NO_DIFFERENCE
    assert alone.as_json()["smallest_detectable"] is None


def test_items_that_are_not_the_same_are_refused() -> None:
    for shapes in ((3, 4), (0, 0)):
        with pytest.raises(ValueError, match="the same items"):
            of_items(np.zeros(shapes[0], bool), np.zeros(shapes[1], bool))


def test_the_standard_error_is_that_of_the_resamples() -> None:
    values = np.random.default_rng(6).normal(size=(40, 1)) + np.random.default_rng(7).normal(size=(40, 5))
    bootstrap = Bootstrap(40, 5, resamples=4000)
    error, units = bootstrap.standard_error(values)
    assert units == 40
    assert error == pytest.approx(bootstrap.means(values).std() * (40 / 39) ** 0.5, rel=0.04)
