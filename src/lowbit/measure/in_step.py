"""Logits of several models over the same tokens, cut to common slices: each runtime has rows of its own number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from lowbit.errors import RuntimeFailed

Run = tuple[int, np.ndarray]


def in_step(streams: Iterable[Iterable[Run]]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(offset, one float32 (rows, n_vocab) a stream) for consecutive rows, as ``Runtime.logits`` streams them.

    At any time one run of each stream is held. Raises RuntimeFailed where one has other positions than the first, or
    rows of another length.
    """
    runs = [iter(stream) for stream in streams]
    held: list[Run | None] = [None] * len(runs)
    while True:
        held = [next(run, None) if have is None else have for run, have in zip(runs, held, strict=True)]
        there = [have for have in held if have is not None]
        if not there:
            return
        offset, first = there[0]
        if len(there) < len(held) or any((at, rows.shape[1]) != (offset, first.shape[1]) for at, rows in there):
            found = ", ".join("none" if have is None else f"{have[1].shape} from {have[0]}" for have in held)
            raise RuntimeFailed("the reference and the artifacts fell out of step", found=found)
        n = min(len(rows) for _, rows in there)
        yield offset, [rows[:n] for _, rows in there]
        held = [(offset + n, rows[n:]) if len(rows) > n else None for _, rows in there]
