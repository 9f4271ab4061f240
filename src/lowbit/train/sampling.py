"""Text that the reference writes itself: many rows a step, so that its weights are read once for all of them.

transformers' own ``generate`` copies the whole key-value cache at every token and repeats keys and values for the
heads that share them, which on a CPU costs several times the products. Here the cache has its room from the start,
and the heads that share a key are one product.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowbit.train.loss import capped, softcap

_ATTENTION = "lowbit_sampling"


@torch.inference_mode()
def write(
    model: Any, prompt: torch.Tensor, length: int, seconds: float, *, agree: Callable[[bool], bool] = bool
) -> torch.Tensor:
    """Goes on from ``prompt`` at temperature 1 until rows are ``length`` tokens long or ``seconds`` have passed.

    model: a causal language model of transformers. prompt: (rows, n) int64, n < length, all rows whole. Returns
    (rows, at most length) int64. Random numbers are torch's global ones. agree: asked after each token whether time is
    up, given what this process thinks; processes that compute together must stop together.
    """
    begin = time.monotonic()
    cache = Cache(layers=[_RoomyLayer(length) for _ in range(model.config.num_hidden_layers)])
    tokens = last = prompt
    head = model.get_output_embeddings()
    cap = softcap(model)
    with _attention_of(model):
        while tokens.shape[1] < length:
            hidden = model.model(last, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            logits = head(hidden).float()
            last = _draw(capped(logits, cap))
            tokens = torch.cat([tokens, last], dim=1)
            if agree(time.monotonic() - begin > seconds):
                break
    return tokens


def _draw(logits: torch.Tensor) -> torch.Tensor:
    """(rows, vocabulary) float32 -> (rows, 1) int64 drawn from their softmax, by the inverse of its sum."""
    summed = torch.softmax(logits, dim=-1).cumsum(-1)
    at = torch.rand(len(logits), 1, device=logits.device) * summed[:, -1:]
    # Rounding can put the draw on the very end; the last token stands for what lies beyond it.
    return torch.searchsorted(summed, at, right=True).clamp_(max=logits.shape[-1] - 1)


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer, (rows, heads, room, head_dim), written in place."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._all_keys = key_states.new_empty(*key_states.shape[:2], self._room, key_states.shape[-1])
        self._all_values = value_states.new_empty(*value_states.shape[:2], self._room, value_states.shape[-1])
        self._filled = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._filled = self._filled, self._filled + key_states.shape[-2]
        self._all_keys[:, :, start : self._filled] = key_states
        self._all_values[:, :, start : self._filled] = value_states
        self.keys, self.values = self._all_keys[:, :, : self._filled], self._all_values[:, :, : self._filled]
        return self.keys, self.values


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; query (rows, heads, 1, head_dim), key and value (rows, kv_heads, n, head_dim).

    A mask is True (or 0) where the query may look. Prompts go the usual way.
    """
    rows, heads, queries, width = query.shape
    if queries > 1 or more.get("softcap") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    groups = key.shape[1]
    factor = width**-0.5 if scaling is None else scaling
    scores = (query * factor).view(rows, groups, heads // groups, width) @ key.transpose(-1, -2)
    scores = scores.float()
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[-2]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    found = torch.softmax(scores, dim=-1).to(value.dtype) @ value  # (rows, groups, heads of a group, head_dim)
    return found.reshape(rows, 1, heads, width), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, sdpa_mask)


@contextlib.contextmanager
def _attention_of(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before
