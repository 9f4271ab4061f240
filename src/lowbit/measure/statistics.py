"""What a difference between two files can be trusted for: tests, intervals, and the smallest that n can see.

Two kinds of observation: means over a text, whose tokens hang together, so that a stretch of text is what is counted
(``of_means``, on the units of ``Bootstrap``); and items of a task, each right or wrong on its own (``of_items``).
``corrected`` then gives the verdicts of a family of comparisons. "No measurable difference" is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.record import Figure

ALPHA = 0.05  # two-sided: how often equal files may be called different
POWER = 0.80  # how often the smallest detectable difference is detected
NO_DIFFERENCE = "no measurable difference"
BETTER, WORSE = "better", "worse"
_EXACT_PAIRS = 200  # unlike pairs up to which the power of McNemar's test is summed rather than approximated


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An artifact against a baseline.

    difference:          artifact minus baseline with its 95% interval
    p_value:             two-sided, of this comparison alone
    p_adjusted:          after Holm's correction for the family it was made in
    smallest_detectable: the true difference, either way, that would be found in 80% of such measurements at 5%
    higher_is_better:    what a positive difference means
    """

    difference: Figure
    p_value: float
    p_adjusted: float
    smallest_detectable: float
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """BETTER, WORSE or NO_DIFFERENCE, at 5% after the correction."""
        if self.p_adjusted >= ALPHA or self.difference.value == 0:
            return NO_DIFFERENCE
        return BETTER if (self.difference.value > 0) == self.higher_is_better else WORSE

    def as_json(self) -> dict[str, Any]:
        """The difference as a figure has it, and "verdict", "p_value", "p_adjusted", "smallest_detectable"
        (None where a single stretch of text cannot tell)."""
        return {
            **self.difference.as_json(),
            "verdict": self.verdict,
            "p_value": self.p_value,
            "p_adjusted": self.p_adjusted,
            "smallest_detectable": self.smallest_detectable if math.isfinite(self.smallest_detectable) else None,
        }


def of_means(differences: np.ndarray, bootstrap: Bootstrap, *, higher_is_better: bool, unit: str = "") -> Comparison:
    """Compares two files by a mean over a text. differences: artifact minus baseline at each position, float
    (chunks, positions). The interval is the bootstrap's; the test is Student's on the same stretches of text."""
    difference = bootstrap.mean(differences, unit)
    error, units = bootstrap.standard_error(differences)
    return Comparison(
        difference=difference,
        p_value=(p := student_p(difference.value, error, units - 1)),
        p_adjusted=p,
        smallest_detectable=smallest_mean_difference(error, units - 1),
        higher_is_better=higher_is_better,
    )


def of_items(baseline: np.ndarray, artifact: np.ndarray) -> Comparison:
    """Compares two files by the share of items each got right. baseline, artifact: bool (n,), item by item.

    The test is McNemar's, exact; the interval of the difference is Newcombe's (1998, method 10), from Wilson's.
    """
    baseline, artifact = np.asarray(baseline, bool), np.asarray(artifact, bool)
    n = len(baseline)
    if artifact.shape != baseline.shape or baseline.ndim != 1 or n == 0:
        raise ValueError(f"right and wrong of the same items are compared, not {baseline.shape} and {artifact.shape}")
    both, neither = int((baseline & artifact).sum()), int((~baseline & ~artifact).sum())
    lost, won = int((baseline & ~artifact).sum()), int((~baseline & artifact).sum())
    low, high = _newcombe(both, lost, won, neither)
    value = (won - lost) / n
    return Comparison(
        difference=Figure(value=value, low=min(low, value), high=max(high, value), unit="share", n=n),
        p_value=(p := mcnemar(lost, won)),
        p_adjusted=p,
        smallest_detectable=smallest_share_difference(n, lost + won),
        higher_is_better=True,
    )


def corrected(family: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with Holm's correction for how many there are. A family is what one question asks: the
    same figure of every pair of artifacts, say."""
    adjusted = holm([comparison.p_value for comparison in family])
    return [replace(comparison, p_adjusted=p) for comparison, p in zip(family, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979): below alpha where the step-down test rejects at alpha."""
    adjusted, reached = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = reached
    return adjusted


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p of McNemar's test, the exact one: of the unlike pairs, each way is as likely under equality."""
    if lost == won:
        return 1.0
    return min(1.0, 2 * _binomial_cdf(min(lost, won), lost + won, 0.5))


def student_p(value: float, error: float, freedom: int) -> float:
    """Two-sided p of a value with that standard error, Student's t with ``freedom`` degrees."""
    if value == 0 or freedom < 1:
        return 1.0
    if error == 0:
        return 0.0
    t = value / error
    return _beta_inc(freedom / 2, 0.5, freedom / (freedom + t * t))


def wilson(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return (0.0 if right == 0 else max(0.0, middle - half), 1.0 if right == n else min(1.0, middle + half))


def clopper_pearson(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share (1934): it never covers less often than ``confidence``."""
    tail = (1 - confidence) / 2
    low = 0.0 if right == 0 else _root(lambda p: 1 - _binomial_cdf(right - 1, n, p) - tail)
    high = 1.0 if right == n else _root(lambda p: tail - _binomial_cdf(right, n, p))
    return low, high


def share(right: np.ndarray) -> Figure:
    """The share of True in bool (n,) with Wilson's 95% interval: items that are independent of each other."""
    n, hits = len(right), int(np.sum(right))
    low, high = wilson(hits, n)
    return Figure(value=hits / n, low=min(low, hits / n), high=max(high, hits / n), unit="share", n=n)


def smallest_mean_difference(error: float, freedom: int) -> float:
    """The difference of means that a measurement with this standard error finds with POWER at ALPHA."""
    if freedom < 1:
        return math.inf
    return (student_quantile(1 - ALPHA / 2, freedom) + student_quantile(POWER, freedom)) * error


def smallest_share_difference(n: int, unlike: int) -> float:
    """The difference of shares that McNemar's exact test finds with POWER at ALPHA in n items, between 0 and 1.

    unlike: pairs in which one is right and the other wrong, as they were seen; a difference needs at least as many as
    itself. 1 where n is too small for any.
    """
    seen = unlike / n
    if _power(n, 1.0, 1.0) < POWER:
        return 1.0
    return _root(lambda d: _power(n, max(seen, d), d) - POWER, steps=20)


def student_quantile(p: float, freedom: int) -> float:
    """The p-quantile of Student's t, p from 0.5 up."""
    tail = 2 * (1 - p)
    # x = freedom / (freedom + t^2) runs from 1 at t = 0 to 0
    x = _root(lambda x: _beta_inc(freedom / 2, 0.5, x) - tail)
    return math.sqrt(freedom * (1 - x) / x)


def _power(n: int, unlike: float, difference: float) -> float:
    """How often McNemar's exact test rejects equality where a share ``unlike`` of pairs differs, won minus lost being
    ``difference``."""
    if difference <= 0:
        return ALPHA
    won = min(1.0, (1 + difference / unlike) / 2)
    if n * unlike > _EXACT_PAIRS:  # Connor (1987)
        z = NormalDist()
        spread = math.sqrt(unlike - difference**2)
        return z.cdf((difference * math.sqrt(n) - z.inv_cdf(1 - ALPHA / 2) * math.sqrt(unlike)) / max(spread, 1e-12))
    reach = 6 * math.sqrt(n * unlike * (1 - unlike)) + 1
    total = 0.0
    for pairs in range(max(0, int(n * unlike - reach)), min(n, math.ceil(n * unlike + reach)) + 1):
        weight = _binomial(pairs, n, unlike)
        if weight < 1e-9 or (least := _least_rejected(pairs)) is None:
            continue
        # rejected where so few are lost; the other tail is nothing beside it at such a difference
        total += weight * (_binomial_cdf(least, pairs, 1 - won) + _binomial_cdf(least, pairs, won))
    return total


_rejected: dict[int, int | None] = {}


def _least_rejected(pairs: int) -> int | None:
    """The largest count of the rarer kind at which equality is still rejected; None where it never is."""
    if pairs not in _rejected:
        found = -1
        if pairs and 2 * 0.5**pairs < ALPHA:
            found = int(pairs / 2 - 0.98 * math.sqrt(pairs)) + 2
            while found >= 0 and mcnemar(found, pairs - found) >= ALPHA:
                found -= 1
        _rejected[pairs] = found if found >= 0 else None
    return _rejected[pairs]


def _newcombe(both: int, lost: int, won: int, neither: int) -> tuple[float, float]:
    """95% interval of the difference of two paired shares, won minus lost over n."""
    n = both + lost + won + neither
    first, second = (both + won) / n, (both + lost) / n
    (low1, high1), (low2, high2) = wilson(both + won, n), wilson(both + lost, n)
    product = (both + won) * (neither + lost) * (both + lost) * (neither + won)
    cross = both * neither - lost * won
    phi = 0.0
    if product:
        phi = (max(cross - n / 2, 0.0) if cross > 0 else float(cross)) / math.sqrt(product)

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    d = first - second
    return d - reach(first - low1, high2 - second), d + reach(high1 - first, second - low2)


def _binomial(k: int, n: int, p: float) -> float:
    if p <= 0 or p >= 1:
        return float(k == (0 if p <= 0 else n))
    chosen = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(chosen + k * math.log(p) + (n - k) * math.log1p(-p))


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k)."""
    if k >= n or p <= 0:
        return 1.0
    return 0.0 if k < 0 or p >= 1 else _beta_inc(n - k, k + 1, 1 - p)


def _beta_inc(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b), to about 1e-12: its continued fraction (DLMF 8.17.22)
    evaluated by Lentz's method."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_inc(b, a, 1 - x)
    scale = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = d
    for m in range(1, 10_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return scale * fraction


def _root(rising: Callable[[float], float], steps: int = 60) -> float:
    """Where a function that rises on 0 to 1 crosses zero, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return high
