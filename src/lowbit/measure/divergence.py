"""Rows of logits as probabilities: their logarithms, and the Kullback-Leibler divergence of one row from another.

Exponentials are taken in float32, where a vector unit does sixteen at a time, and added up in float64. What that costs,
with u = 2**-24: an exponential is wrong by at most 5 u (numpy's bound, 2.52 ulp), and by |x| u for the rounding of its
argument x = z - max z; weighted with the probabilities themselves the mean of |x| is at most the entropy, so that a
logarithm of a sum is wrong by at most u (5 + ln n_vocab), 1.1e-6 nats for 262,144 tokens. A divergence has two of
these, and u (7 + |x|) of every difference it adds up: below 3e-6 nats a row even if all roundings fell the same way,
as long as the two rows differ by a nat or so. They do not; tests hold every row to 1e-6 and means to 1e-7.
"""

from __future__ import annotations

import math

import numpy as np

from lowbit.compact import Softmax


def kl(p: Softmax, q: Softmax, of_p: np.ndarray, of_q: np.ndarray, scratch: np.ndarray) -> float:
    """KL(p || q) in nats, of_p and of_q their logits. Overwrites ``scratch``, which may be q's weights but not p's."""
    with np.errstate(invalid="ignore"):
        np.subtract(of_p, of_q, out=scratch)
        np.multiply(scratch, p.weights, out=scratch)
    value = float(scratch.sum(dtype=np.float64)) / p.total - p.log_sum + q.log_sum
    return value if math.isfinite(value) else _with_impossible_tokens(p, q, of_p, of_q)


def kl_of_likely(p: Softmax, q: Softmax, of_p: np.ndarray, of_q: np.ndarray) -> float:
    """KL(p || q) without the tokens whose p is below exp(-16), as llama-perplexity sums it: its file of the reference
    keeps log probabilities in 16 bits, and what that cannot hold is left out (tools/perplexity/perplexity.cpp)."""
    likely = np.flatnonzero(p.weights > math.exp(-16) * p.total)
    weights = p.weights[likely].astype(np.float64)
    differences = of_p[likely].astype(np.float64) - of_q[likely] + (q.log_sum - p.log_sum)
    return float(weights @ differences) / p.total


def _with_impossible_tokens(p: Softmax, q: Softmax, of_p: np.ndarray, of_q: np.ndarray) -> float:
    """The same where logits are -inf: what p excludes counts nothing, what q alone excludes makes it infinite."""
    possible = p.weights > 0
    differences = of_p[possible].astype(np.float64) - of_q[possible]
    return float(p.weights[possible] @ differences) / p.total - p.log_sum + q.log_sum
