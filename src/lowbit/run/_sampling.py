"""Choosing the next token from its logits."""

from __future__ import annotations

import numpy as np


def sample(logits: np.ndarray, rng: np.random.Generator, *, temperature: float, top_k: int, top_p: float) -> int:
    """One token id drawn from a row of logits, (n_vocab,) float32; temperature 0 takes the largest."""
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    scaled = logits[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    keep = int(np.searchsorted(np.cumsum(p), top_p)) + 1 if top_p < 1 else len(p)
    p = p[:keep] / p[:keep].sum()
    return int(order[:keep][rng.choice(len(p), p=p)])
