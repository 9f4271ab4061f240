"""95% intervals by resampling chunks of the text, the same resamples for every file so that differences are paired.

Tokens of one chunk are not independent of each other; chunks nearly are. So whole chunks are drawn with replacement
(Efron and Tibshirani 1993, percentile intervals). Where a text has few chunks, each is cut into equal runs of
positions, which are drawn instead: the interval is then somewhat too narrow, but it is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lowbit.measure.record import Figure

_FEWEST_UNITS = 16


class Bootstrap:
    """Resamples of (chunks, positions) observations.

    chunks, positions: shape of the observations
    resamples, seed:   how many draws, and where they start; the same numbers give the same intervals
    """

    def __init__(self, chunks: int, positions: int, *, resamples: int = 1000, seed: int = 0) -> None:
        self.parts = min(positions, 1 if chunks >= _FEWEST_UNITS else -(-_FEWEST_UNITS // chunks))
        units = chunks * self.parts
        self.n = chunks * positions
        part_of = np.arange(positions) * self.parts // positions  # (positions,)
        self._unit_of = (np.arange(chunks)[:, None] * self.parts + part_of).ravel()  # (n,)
        self._sizes = np.bincount(self._unit_of, minlength=units)  # (units,)
        self._resamples, self._seed = resamples, seed

    def draws(self) -> Iterator[np.ndarray]:
        """Each resample as how often each unit was drawn, (units,); the same ones every time.

        Drawn anew rather than kept: a table of all of them would be the largest thing that grows with the text.
        """
        rng, units = np.random.default_rng(self._seed), len(self._sizes)
        for _ in range(self._resamples):
            yield np.bincount(rng.integers(0, units, units), minlength=units)

    def means(self, values: np.ndarray) -> np.ndarray:
        """The mean of (n,) observations in every resample: float64 (resamples,)."""
        sums = np.bincount(self._unit_of, weights=values.ravel(), minlength=len(self._sizes))
        return np.array([(drawn @ sums) / (drawn @ self._sizes) for drawn in self.draws()])

    def standard_error(self, values: np.ndarray) -> tuple[float, int]:
        """The standard error of the mean of (n,) observations when units are drawn, and how many units there are.

        In closed form, with units - 1 in the denominator: what the spread of ``means`` tends to, but for that.
        """
        sums, units = np.bincount(self._unit_of, weights=values.ravel(), minlength=len(self._sizes)), len(self._sizes)
        if units < 2:
            return float("nan"), units
        away = sums - self._sizes * (sums.sum() / self.n)
        return float(np.sqrt((away**2).sum() * units / (units - 1)) / self.n), units

    def mean(self, values: np.ndarray, unit: str = "", via: Callable[[Any], Any] | None = None) -> Figure:
        """The mean with its interval, after ``via`` (np.exp for a perplexity, np.sqrt for a root mean square)."""
        change = via or (lambda x: x)
        return self.figure(float(change(np.mean(values, dtype=np.float64))), change(self.means(values)), unit)

    def quantile(self, values: np.ndarray, q: float, unit: str = "") -> Figure:
        """The q-quantile with its interval: in each resample the smallest value that q of the observations reach."""
        order = np.argsort(values, axis=None, kind="stable")
        sorted_values, units = values.ravel()[order], self._unit_of[order]
        found = []
        for drawn in self.draws():
            reached = np.cumsum(drawn[units])
            found.append(sorted_values[np.searchsorted(reached, q * reached[-1])])
        return self.figure(float(np.quantile(values, q)), np.array(found), unit)

    def figure(self, value: float, drawn: np.ndarray, unit: str = "") -> Figure:
        """A value with the middle 95% of what the resamples gave, which always includes the value itself."""
        low, high = np.quantile(drawn, (0.025, 0.975))
        return Figure(value=value, low=min(float(low), value), high=max(float(high), value), unit=unit, n=self.n)
