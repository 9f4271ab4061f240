"""The forms in which a reference's word on a token is kept, and what the loss makes of each again.

hidden:  its final hidden state, of which its head makes the exact probabilities
topk:K:  its K likeliest tokens
compact: a record of at most 287 bytes (``lowbit.compact``), which needs no head: the form for a file, or for a
         reference in another process
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from lowbit import compact
from lowbit.threads import in_shares
from lowbit.train.loss import CompactTargets, HiddenTargets, TopKTargets, capped, top_k_targets
from lowbit.train.options import TrainOptions

Targets = HiddenTargets | TopKTargets | CompactTargets
_POSITIONS = 64  # whose logits are held at once


class Form(ABC):
    """cap: of the reference's logits (final_logit_softcapping), or None."""

    cap: float | None = None
    needs_head = False  # whether ``targets`` needs the reference's head

    @abstractmethod
    def arrays(self, n: int, length: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name, shape and dtype of what is kept of n sequences."""

    @abstractmethod
    def said(self, hidden: torch.Tensor, head: torch.Tensor, tokens: np.ndarray, first: int) -> dict[str, torch.Tensor]:
        """What is kept, on the CPU, by name: of sequences ``first``, first + 1, ... of the data.

        hidden: (B, T, width) float32, the reference's final states; head: (vocabulary, width); tokens: (B, T).
        """

    @abstractmethod
    def targets(self, kept: dict[str, np.ndarray], head: torch.Tensor | None, device: torch.device) -> Targets:
        """Of the rows of the arrays that were asked for, one position after the other. head: the reference's."""


class Hidden(Form):
    """hidden: (n, length, width) float16."""

    needs_head = True

    def __init__(self, width: int, cap: float | None = None) -> None:
        self.width, self.cap = width, cap

    def arrays(self, n: int, length: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {"hidden": ((n, length, self.width), np.float16)}

    def said(self, hidden: torch.Tensor, head: torch.Tensor, tokens: np.ndarray, first: int) -> dict[str, torch.Tensor]:
        return {"hidden": hidden.half().cpu()}

    def targets(self, kept: dict[str, np.ndarray], head: torch.Tensor | None, device: torch.device) -> Targets:
        assert head is not None
        return HiddenTargets(torch.from_numpy(kept["hidden"]).to(device).flatten(0, 1), head, self.cap)


class TopK(Form):
    """tokens: (n, length, k) int32, and logp: (n, length, k) float32."""

    def __init__(self, k: int, cap: float | None = None) -> None:
        self.k, self.cap = k, cap

    def arrays(self, n: int, length: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {"tokens": ((n, length, self.k), np.int32), "logp": ((n, length, self.k), np.float32)}

    def said(self, hidden: torch.Tensor, head: torch.Tensor, tokens: np.ndarray, first: int) -> dict[str, torch.Tensor]:
        top, log_p = top_k_targets(hidden.flatten(0, 1), head, self.k, self.cap)
        shape = (*tokens.shape, self.k)
        return {"tokens": top.reshape(shape).cpu(), "logp": log_p.reshape(shape).cpu()}

    def targets(self, kept: dict[str, np.ndarray], head: torch.Tensor | None, device: torch.device) -> Targets:
        tokens = torch.from_numpy(kept["tokens"].astype(np.int64)).to(device)
        return TopKTargets(tokens.flatten(0, 1), torch.from_numpy(kept["logp"]).to(device).flatten(0, 1))


class Compact(Form):
    """records: (n, length, bytes of a record) uint8. What is drawn of a sequence depends on ``seed`` and its place."""

    def __init__(self, n_vocab: int, seed: int, cap: float | None = None) -> None:
        self.layout, self.seed, self.cap = compact.Layout.of(n_vocab), seed, cap

    def arrays(self, n: int, length: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {"records": ((n, length, self.layout.dtype.itemsize), np.uint8)}

    def said(self, hidden: torch.Tensor, head: torch.Tensor, tokens: np.ndarray, first: int) -> dict[str, torch.Tensor]:
        n, length = tokens.shape
        uniform = np.stack([np.random.default_rng((self.seed, first + i)).random(length) for i in range(n)]).reshape(-1)
        following = np.roll(tokens, -1, axis=1)
        following[:, -1] = 0  # what comes after a sequence is not known; only measuring asks for its probability
        records = np.zeros(n * length, self.layout.dtype)
        for start in range(0, len(records), _POSITIONS):
            states = hidden.flatten(0, 1)[start : start + _POSITIONS].to(head.dtype)
            logits = capped((states @ head.T).float(), self.cap)
            self._keep(logits.cpu().numpy(), following.reshape(-1), uniform, records, start)
        kept = records.view(np.uint8).reshape(n, length, self.layout.dtype.itemsize)
        return {"records": torch.from_numpy(kept)}

    def _keep(
        self, logits: np.ndarray, following: np.ndarray, uniform: np.ndarray, records: np.ndarray, start: int
    ) -> None:
        def some(begin: int, end: int) -> None:
            scratch = np.empty(self.layout.n_vocab, np.float32)
            for i in range(begin, end):
                at = start + i
                compact.keep(
                    self.layout, logits[i], int(following[at]), uniform[at], records[at : at + 1], scratch
                )  # fmt: skip

        in_shares(len(logits), torch.get_num_threads(), some)

    def targets(self, kept: dict[str, np.ndarray], head: torch.Tensor | None, device: torch.device) -> Targets:
        records = np.ascontiguousarray(kept["records"]).view(self.layout.dtype).reshape(-1)
        ids, log_p = compact.unpack(self.layout, records)
        parts = ids, log_p.astype(np.float32), records["head"].astype(np.int64), records["tail"].astype(np.float32)
        return CompactTargets(*(torch.from_numpy(part).to(device) for part in parts))


def chosen(options: TrainOptions, width: int, n_vocab: int, cap: float | None = None) -> Form:
    """The form that ``options.targets`` names."""
    if options.targets == "compact":
        return Compact(n_vocab, options.seed, cap)
    return Hidden(width, cap) if options.top_k is None else TopK(options.top_k, cap)
