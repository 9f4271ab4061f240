"""The KLD that can be had from what is kept of the reference's rows (``lowbit.compact``).

For each row come
    the estimate: the head's sum of p log(p / q), plus the tail's mass times the mean over the drawn of log(p / q). Its
                  expectation over the draws is the KLD itself, whatever q is. Much of its noise is then taken out
                  (``Parts.settled``): the mean of q / p over the tail is known exactly, q's mass over p's, so where the
                  drawn have a mean that is too large or small, that of log(p / q) is corrected in proportion.
    its variance: that of as many independent draws, which systematic ones do not exceed here (tests).
    bounds:       two that hold with certainty. What is not listed has the mass m under p and M under q. By the log sum
                  inequality it adds at least m log(m / M); and as its sum of p log p is known from p's entropy, at most
                  that plus m times the largest -log q.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lowbit.compact import Layout, unpack


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KLD of rows, each float64 (...), nats: the estimate, its variance over the draws, and the certain bounds."""

    estimate: np.ndarray
    variance: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def error_of_mean(self, z: float = 3.29) -> float:
        """What the mean of the estimates is within of the mean of the KLD; by default in 999 of 1000 drawings."""
        return z * float(np.sqrt(self.variance.sum())) / self.variance.size


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Of rows, each float64 (...), what an estimate is made of once all rows are known.

    plain, control:           the estimate without correction; how much too large the tail's mean of q / p came out
    noise, of_control, joint: variance of ``plain``, of ``control``, and their covariance
    low, high:                bounds of the KLD
    """

    plain: np.ndarray
    control: np.ndarray
    noise: np.ndarray
    of_control: np.ndarray
    joint: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def empty(cls, *shape: int) -> Parts:
        return cls(**{field.name: np.zeros(shape) for field in fields(cls)})

    def put(self, at: Any, part: Parts) -> None:
        """Sets rows."""
        for field in fields(self):
            getattr(self, field.name)[at] = getattr(part, field.name)

    def settled(self) -> Divergence:
        """The estimates, with the one factor for all rows that leaves the least variance.

        It is found from the same draws, of which there are dozens a row; what that biases falls with their number,
        what is left of the noise with its root. Where the controls are not zero in the mean, as they should be, the
        artifact gives much of its mass to tokens that the reference all but excludes, which no draw sees; then
        nothing is corrected.
        """
        total = float(self.of_control.sum())
        sound = 0 < total < np.inf and abs(float(self.control.sum())) < 3 * total**0.5
        factor = float(np.clip(-self.joint.sum() / total, 0, 1)) if sound else 0.0
        taken_out = 2 * factor * self.joint + factor**2 * self.of_control
        return Divergence(
            estimate=self.plain + factor * self.control,
            variance=np.maximum(self.noise + taken_out, 0),
            low=self.low,
            high=self.high,
        )


def parts(layout: Layout, records: np.ndarray, log_q: np.ndarray, least: np.ndarray) -> Parts:
    """Of KL(reference || artifact), for rows of which ``records`` were kept.

    log_q: the artifact's log probabilities of the entries, float64 (n, entries), in the order of ``unpack``
    least: the smallest log probability of all its vocabulary, float64 (n,)
    """
    ids, log_p = unpack(layout, records)
    tail, head = records["tail"].astype(np.float64), records["head"].astype(np.int64)
    in_head = np.arange(layout.entries) < head[:, None]
    number = np.maximum(layout.entries - head, 1)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        apart, p, q = log_p - log_q, np.exp(log_p), np.exp(log_q)
        mean, noise, ratio, of_ratio, joint = _of_drawn(apart, np.exp(-apart), ~in_head, number)
        plain = np.where(in_head, p * apart, 0).sum(1) + np.where(tail > 0, tail * mean, 0.0)
        control = tail * ratio - np.maximum(0.0, 1 - np.where(in_head, q, 0).sum(1))
        low, high = _bounds(layout, records, (ids, in_head), (log_p, p), (log_q, q), least)
    scale = np.where(layout.entries > head, tail**2 / number, 0.0)
    finite = np.isfinite(of_ratio)
    return Parts(
        plain=plain,
        control=np.where((scale > 0) & finite, control, 0.0),
        noise=np.where(scale > 0, scale * noise, 0.0),
        of_control=np.where((scale > 0) & finite, scale * of_ratio, 0.0),
        joint=np.where((scale > 0) & finite, scale * joint, 0.0),
        low=low,
        high=high,
    )


def _of_drawn(
    apart: np.ndarray, ratio: np.ndarray, drawn: np.ndarray, number: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean and variance of log(p / q) over the drawn, of q / p, and their covariance, each (n,)."""
    one, other = np.where(drawn, apart, 0), np.where(drawn, ratio, 0)
    means = one.sum(1) / number, other.sum(1) / number
    away = np.where(drawn, apart - means[0][:, None], 0), np.where(drawn, ratio - means[1][:, None], 0)
    # of a single draw the spread is not known: as if it were as large as what was drawn
    single, freedom = number == 1, np.maximum(number - 1, 1)
    noise = np.where(single, means[0] ** 2, (away[0] ** 2).sum(1) / freedom)
    of_ratio = np.where(single, 0, (away[1] ** 2).sum(1) / freedom)
    joint = np.where(single, 0, (away[0] * away[1]).sum(1) / freedom)
    return means[0], noise, means[1], of_ratio, joint


def _bounds(
    layout: Layout,
    records: np.ndarray,
    entries: tuple[np.ndarray, np.ndarray],
    reference: tuple[np.ndarray, np.ndarray],
    artifact: tuple[np.ndarray, np.ndarray],
    least: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of each row; of reference and artifact (log probabilities, probabilities) of the entries."""
    (ids, in_head), (log_p, p), (log_q, q) = entries, reference, artifact
    # a token that was drawn twice, which takes a rounding, is listed once
    again = np.zeros_like(in_head)
    again[:, 1:] = (ids[:, 1:] == ids[:, :-1]) & ~in_head[:, :-1]
    p, q = np.where(again, 0, p), np.where(again, 0, q)
    m = np.maximum(0.0, records["tail"].astype(np.float64) - np.where(in_head, 0, p).sum(1))
    other = np.maximum(1e-12, 1 - q.sum(1))
    each = np.where(p > 0, p * (log_p - log_q), 0)
    listed = each.sum(1)
    low = listed + np.where(m > 0, m * np.log(m / other), 0.0)
    rest = -records["entropy"].astype(np.float64) - (p * log_p).sum(1)
    high = listed + rest + np.where(m > 0, -m * least, 0.0)
    slack = layout.step * (2 + np.abs(each).sum(1)) + 4e-6  # what is stored is rounded, and float32 has been at work
    return np.maximum(0.0, low - slack), np.maximum(low, high) + slack
