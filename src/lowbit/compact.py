"""What is kept of a row of the reference's logits, at most 287 bytes, whatever the vocabulary.

KL(p || q) of an artifact q is a mean over p, and all of q is at hand when it is wanted. So of p a sample is kept that
is good for any q: threshold sampling (Duffield, Lund and Thorup 2007) with systematic draws (Madow 1949). Of the k
entries the first are the head, every token whose probability is at least tau, each with that probability; the others
are drawn from the tail, the rest of the vocabulary, a token with p / tau, and each stands for tau. tau is what makes
the expected number k, so that a peaked row spends its entries on the head and a flat one on the tail. Every entry has
its log probability, in 22 bits or more.

``lowbit.measure.sketch`` estimates a divergence from it, ``lowbit.train.loss`` trains by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RECORD_BYTES = 287  # with 8 bytes of token ids a scored position in a file: 295
_FIXED = 8 + 4 + 4 + 4 + 2
_RANGE = 32.0  # nats: what is less probable than exp(-32) is kept as exp(-32)


@dataclass(frozen=True)
class Softmax:
    """A row's normalization.

    top:     the most probable token, the lowest id of equals
    peak:    its logit
    total:   sum over the vocabulary of exp(logit - peak)
    weights: float32 (n_vocab,), exp(logit - peak); the caller's scratch
    """

    top: int
    peak: float
    total: float
    weights: np.ndarray

    @property
    def log_sum(self) -> float:
        """log of the sum of exp(logit): a logit minus this is a log probability."""
        return self.peak + math.log(self.total)


def softmax(logits: np.ndarray, out: np.ndarray) -> Softmax:
    """logits: float32 (n_vocab,). out: float32 (n_vocab,), becomes ``weights``."""
    top = int(logits.argmax())
    peak = logits[top]
    np.subtract(logits, peak, out=out)
    np.exp(out, out=out)
    return Softmax(top, float(peak), float(out.sum(dtype=np.float64)), out)


@dataclass(frozen=True)
class Layout:
    """How a record is laid out for a vocabulary.

    entries:    tokens that are kept, the head's and the drawn
    bits:       of a log probability
    dtype:      nll: of the text's next token; entropy: of the row, nats; tail: its mass; top: the most probable token;
                head: how many entries are of it; entries: ids and log probabilities, packed
    """

    n_vocab: int
    entries: int
    bits: int
    dtype: np.dtype

    @classmethod
    def of(cls, n_vocab: int) -> Layout:
        id_bits = max(1, (n_vocab - 1).bit_length())
        wide = (id_bits + 22 + 7) // 8
        entries = min((RECORD_BYTES - _FIXED) // wide, n_vocab)
        dtype = np.dtype(
            [
                ("nll", "<f8"),
                ("entropy", "<f4"),
                ("tail", "<f4"),
                ("top", "<u4"),
                ("head", "<u2"),
                ("entries", "u1", (entries, wide)),
            ]
        )
        return cls(n_vocab, entries, 8 * wide - id_bits, dtype)

    @property
    def step(self) -> float:
        """Between two log probabilities that can be kept, nats."""
        return _RANGE / 2**self.bits


def keep(layout: Layout, logits: np.ndarray, token: int, uniform: float, into: np.ndarray, scratch: np.ndarray) -> None:
    """Fills a record, (1,) of ``layout.dtype``, from a row.

    logits: float32 (n_vocab,); token: the text's next; uniform: in 0 to 1, random, decides what is drawn
    scratch: float32 (n_vocab,)
    """
    p = softmax(logits, scratch)
    k = layout.entries
    likeliest = np.argpartition(p.weights, layout.n_vocab - k)[layout.n_vocab - k :]
    likeliest = likeliest[np.lexsort((likeliest, -p.weights[likeliest]))]
    mass = p.weights[likeliest].astype(np.float64) / p.total
    head = k
    if k < layout.n_vocab:
        left = 1 - np.concatenate([[0.0], np.cumsum(mass)[:-1]])
        head = int(np.argmax((mass <= left / (k - np.arange(k))) | (np.arange(k) == k - 1)))
    ids = likeliest
    into["entropy"] = _entropy(p, logits)  # before the weights of the head are cleared
    p.weights[likeliest[:head]] = 0
    reached = np.cumsum(p.weights, dtype=np.float64)
    if head < k and reached[-1] > 0:
        at = (np.arange(k - head) + uniform) * (reached[-1] / (k - head))
        drawn = np.minimum(np.searchsorted(reached, at, side="right"), layout.n_vocab - 1)
        ids = np.concatenate([likeliest[:head], drawn])
    log_p = logits[ids].astype(np.float64) - p.log_sum
    into["nll"] = p.log_sum - float(logits[token])
    into["tail"] = reached[-1] / p.total
    into["top"] = p.top
    into["head"] = head
    codes = np.clip(np.rint(-log_p / layout.step), 0, 2**layout.bits - 1).astype(np.uint64)
    packed = (ids.astype(np.uint64) << np.uint64(layout.bits)) | codes
    into["entries"] = packed.astype("<u8").view(np.uint8).reshape(k, 8)[:, : layout.dtype["entries"].shape[1]]


def _entropy(p: Softmax, logits: np.ndarray) -> float:
    possible = p.weights > 0
    seen = np.dot(p.weights[possible].astype(np.float64), logits[possible].astype(np.float64) - p.peak)
    return float(np.log(p.total) - seen / p.total)


def unpack(layout: Layout, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int64 (n, entries), and log probabilities, float64 (n, entries)."""
    wide = np.zeros((len(records), layout.entries, 8), np.uint8)
    wide[..., : layout.dtype["entries"].shape[1]] = records["entries"]
    packed = wide.view("<u8")[..., 0]
    ids = (packed >> np.uint64(layout.bits)).astype(np.int64)
    codes = packed & np.uint64(2**layout.bits - 1)
    return ids, codes.astype(np.float64) * -layout.step


def wrong(layout: Layout, records: np.ndarray) -> str | None:
    """What in records from a stranger's file cannot be, or None."""
    ids, _ = unpack(layout, records)
    for name, good in (
        ("nll", np.isfinite(records["nll"]) & (records["nll"] > -1e-3)),
        ("entropy", (records["entropy"] > -1e-3) & (records["entropy"] < 64)),
        ("tail", (records["tail"] >= 0) & (records["tail"] < 1 + 1e-3)),
        ("top", records["top"] < layout.n_vocab),
        ("head", records["head"] <= layout.entries),
        ("token id", (ids < layout.n_vocab).all(axis=1)),
    ):
        if not good.all():
            return f"{name} in row {int(np.argmin(good))}"
    return None
