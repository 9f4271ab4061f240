"""Checks of token ids before a runtime gets them: past its table it would read what is not there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowbit.errors import BadOption


def check_ids(tokens: Sequence[int] | np.ndarray, n_vocab: int) -> None:
    """Raises BadOption where an id is out of range."""
    ids = np.asarray(tokens)
    if ids.size and (ids.min() < 0 or ids.max() >= n_vocab):
        raise BadOption("a token id is out of range", found=int(ids.max()), expected=f"0 to {n_vocab - 1}")


def fitting(tokens: Sequence[int] | np.ndarray, n_vocab: int, context: int, where: object) -> np.ndarray:
    """A sequence's ids, int32. Raises BadOption where one is out of range, and where there are none or too many."""
    check_ids(tokens, n_vocab)
    if not 0 < len(tokens) <= context:
        raise BadOption(
            "the sequence does not fit the context",
            where=where,
            found=f"{len(tokens)} tokens",
            expected=f"1 to {context}",
            hint="Open the model with a larger context",
        )
    return np.ascontiguousarray(tokens, np.int32)
