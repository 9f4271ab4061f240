"""Several sequences at once in one llama.cpp context: what a server's slots are, and what reuse of a prefix needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from lowbit.errors import BadOption, RuntimeFailed
from lowbit.run import _llama_h
from lowbit.run.llama_cpp import LlamaCpp

_BATCH = 2048  # llama.cpp's own default


class Slots(LlamaCpp):
    """A GGUF model with ``sequences`` independent sequences, numbered from 0.

    path:      the GGUF file
    sequences: how many
    context:   tokens each may have; in a unified cache, tokens all may have together, what they share counted once
    unified:   one cache for all (llama-server's --kv-unified): a copy of a sequence then costs nothing
    options:   as LlamaCpp has them

    Raises what LlamaCpp raises.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, sequences: int, context: int, unified: bool = False, **options: Any
    ) -> None:
        if sequences < 1:
            raise BadOption("impossible number of sequences", found=sequences, expected="at least 1")
        self.sequences, self.unified = sequences, unified
        super().__init__(path, context=context, logits_all=False, **options)
        self._batches = _Batches(_BATCH)
        self.lengths = [0] * sequences

    def beside(self, *, kv_type: str, flash_attention: bool | None = None) -> Self:
        """As LlamaCpp's: as many empty sequences in a cache of another type."""
        twin = super().beside(kv_type=kv_type, flash_attention=flash_attention)
        twin._batches, twin.lengths = _Batches(_BATCH), [0] * self.sequences
        return twin

    def _adjust(self, params: _llama_h.ContextParams) -> None:
        params.n_seq_max, params.kv_unified = self.sequences, self.unified
        if not self.unified:
            params.n_ctx = -(-self.context // 256) * 256 * self.sequences
        params.n_batch = self._n_batch = min(_BATCH, params.n_ctx)  # llama.cpp limits it so too
        params.n_outputs_max, params.n_outputs_max_per_seq = self.sequences, 1

    def extend(self, ids: np.ndarray | Sequence[int], sequences: Sequence[int], *, last: bool = True) -> np.ndarray:
        """Appends tokens to sequences, all in one batch where they fit it.

        ids:       (tokens,) appended to each of the sequences, or (sequences, tokens)
        sequences: their numbers
        last:      give the logits of each sequence's last token, float32 (sequences, n_vocab), in llama.cpp's own
                   buffer, valid until the next call; else an empty array
        """
        rows = np.broadcast_to(np.asarray(ids, np.int32), (len(sequences), np.shape(ids)[-1]))
        self._check_ids(rows.ravel())
        n = rows.shape[1]
        room = max(1, self._n_batch // len(sequences))
        out = np.empty((0, self.n_vocab), np.float32)
        for begin in range(0, n, room):
            end = min(n, begin + room)
            out = self._decode_batch(rows[:, begin:end], sequences, outputs=last and end == n)
        return out

    def copy(self, source: int, target: int) -> None:
        """Makes sequence ``target``, which must be empty, a copy of ``source``."""
        memory = self._lib.llama_get_memory(self._open_context())
        self._lib.llama_memory_seq_cp(memory, source, target, -1, -1)
        self.lengths[target] = self.lengths[source]

    def drop(self, sequence: int) -> None:
        """Empties a sequence."""
        memory = self._lib.llama_get_memory(self._open_context())
        self._lib.llama_memory_seq_rm(memory, sequence, -1, -1)
        self.lengths[sequence] = 0

    def reset(self) -> None:
        """Empties all sequences."""
        super().reset()
        self.lengths = [0] * self.sequences

    def _decode_batch(self, rows: np.ndarray, sequences: Sequence[int], *, outputs: bool) -> np.ndarray:
        """One llama_decode of (sequences, tokens) ids, sequence after sequence as llama-batched-bench has them."""
        context = self._open_context()
        past = [self.lengths[s] for s in sequences]
        status = self._lib.llama_decode(context, self._batches.fill(rows, past, sequences, outputs=outputs))
        if status != 0:
            said = f"status {status} {self._llama.log.take()}".strip()
            raise RuntimeFailed(
                "llama.cpp could not decode", where=self.path, found=said, hint="Is the context too small?"
            )
        for s in sequences:
            self.lengths[s] += rows.shape[1]
        if not outputs:
            return np.empty((0, self.n_vocab), np.float32)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(context), shape=(len(sequences), self.n_vocab))


class _Batches:
    """The arrays behind a llama_batch of up to ``size`` tokens of any sequences."""

    def __init__(self, size: int) -> None:
        self.token, self.pos = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.n_seq_id, self.logits = np.ones(size, np.int32), np.zeros(size, np.int8)
        self.sequence, self.seq_id = np.zeros(size, np.int32), np.zeros(size, np.uintp)

    def fill(self, rows: np.ndarray, past: Sequence[int], sequences: Sequence[int], *, outputs: bool) -> _llama_h.Batch:
        """rows: (sequences, tokens); past: tokens that each sequence has already."""
        count, n = rows.shape
        total = count * n
        self.token[:total] = rows.ravel()
        self.pos[:total] = (np.asarray(past)[:, None] + np.arange(n)).ravel()
        self.sequence[:total] = np.repeat(np.asarray(sequences), n)
        self.seq_id[:total] = self.sequence.ctypes.data + 4 * np.arange(total)
        self.logits[:total] = 0
        if outputs:
            self.logits[n - 1 : total : n] = 1
        return _llama_h.Batch(
            n_tokens=total,
            token=self.token.ctypes.data,
            pos=self.pos.ctypes.data,
            n_seq_id=self.n_seq_id.ctypes.data,
            seq_id=self.seq_id.ctypes.data,
            logits=self.logits.ctypes.data,
        )
