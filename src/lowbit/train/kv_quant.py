"""The KV cache as llama.cpp keeps it, inside a model that is trained: attention over rounded keys and values.

llama.cpp rounds keys after their rotary embedding and values as they are, heads one after the other, in blocks along
the head. Where heads are whole 64s it first turns both (grid/_hadamard.py), turns queries likewise, and turns what
attention gives back. Turning back the rounded keys and values instead is the same sum, and leaves attention as it is.
The gradient goes straight through the rounding.

``simulated(model, kv, ...)`` is a context manager; within it the model's attention is that. Gemma 4's shared layers are
given the keys and values of the layer that owns them, so they see the same rounded ones.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.errors import Unsupported
from lowbit.grid import _hadamard, _on_the_fly
from lowbit.run._kv_types import UNQUANTIZED, KvTypes, parse


@dataclass(frozen=True, kw_only=True)
class KvQuantizer:
    """Rounds keys and values (..., head_dim) as the cache of these types does.

    interleaved: whether llama.cpp keeps a head's two halves interleaved (its llama; others keep them as they are)
    share: of the rows of a batch, the first ones, that are rounded; the rest stay as they are
    """

    types: KvTypes
    interleaved: bool
    share: float = 1.0

    def keys(self, key: torch.Tensor) -> torch.Tensor:
        """What attention reads back of ``key`` (rows, kv_heads, n, head_dim), the rotary embedding being in it."""
        if not self.interleaved:
            return self._rounded(key, self.types.k, _hadamard.width_of_keys(key.shape[-1]))
        half = key.shape[-1] // 2
        pairs = key.unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2)
        rounded = self._rounded(pairs, self.types.k, _hadamard.width_of_keys(key.shape[-1]))
        return rounded.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(-2)

    def values(self, value: torch.Tensor) -> torch.Tensor:
        """The same of values."""
        return self._rounded(value, self.types.v, _hadamard.width_of_values(value.shape[-1]))

    def _rounded(self, x: torch.Tensor, name: str, width: int | None) -> torch.Tensor:
        rows = math.ceil(self.share * len(x))
        if rows == len(x):
            return _through(x, name, width)
        return torch.cat([_through(x[:rows], name, width), x[rows:]])


def cached(x: torch.Tensor, name: str, width: int | None) -> torch.Tensor:
    """``x`` (..., n) as a cache of that type gives it back, turned back; float32. width: of the rotation, or None."""
    grid = grids.get(name)
    if width is None or name in UNQUANTIZED:
        return grid.dequantize(_on_the_fly.cache_blocks(grid, x.detach().float()))
    rounded = grid.dequantize(_on_the_fly.cache_blocks(grid, _hadamard.rotate(x.detach().float(), width)))
    # The product, not the sums: llama.cpp turns nothing back here, so there are no bits to keep.
    with torch.autocast(x.device.type, enabled=False):
        return (rounded.reshape(-1, width) @ _matrix(width, x.device)).view(x.shape)


@functools.cache
def _matrix(width: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(_hadamard.matrix(width)).to(device)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, width: int | None) -> torch.Tensor:
        return cached(x, name, width).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0], None, None


def _through(x: torch.Tensor, name: str, width: int | None) -> torch.Tensor:
    return _Through.apply(x, name, width)  # type: ignore[no-any-return, no-untyped-call]


def quantizer_of(checkpoint: Checkpoint, kv: str, share: float = 1.0) -> KvQuantizer:
    """For a model of this checkpoint. ``kv``: TYPE or K:V. Raises BadOption, and Unsupported where a cache cannot be of
    such a type, as llama.cpp does."""
    types = parse(kv)
    interleaved = any(spec.heads for spec in checkpoint.specs.values())
    for layer in checkpoint.family.cache(checkpoint.config):
        for name, head_dim in ((types.k, layer.k_dim), (types.v, layer.v_dim)):
            block = grids.get(name).block_size
            if head_dim % block:
                raise Unsupported(
                    f"heads are not whole blocks of a {name} cache", where=checkpoint.path,
                    found=f"{head_dim} values a head", expected=f"a multiple of {block}", hint="--kv f16",
                )  # fmt: skip
    return KvQuantizer(types=types, interleaved=interleaved, share=share)


@contextlib.contextmanager
def simulated(model: Any, quantizer: KvQuantizer | None) -> Iterator[None]:
    """Within the block ``model``'s attention reads keys and values out of the cache; with None, as it is."""
    if quantizer is None:
        yield
        return
    before = model.config._attn_implementation
    model.config._attn_implementation = _registered(quantizer)
    try:
        yield
    finally:
        model.config._attn_implementation = before


@functools.cache
def _registered(quantizer: KvQuantizer) -> str:
    """The name under which transformers finds attention over such a cache."""
    name = f"lowbit_kv_{quantizer.types.k}_{quantizer.types.v}" + "_interleaved" * quantizer.interleaved
    ALL_ATTENTION_FUNCTIONS.register(name, _attention_with(quantizer))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
    return name


def _attention_with(quantizer: KvQuantizer) -> Callable[..., tuple[torch.Tensor, None]]:
    """transformers' attention interface; query (rows, heads, n, head_dim), key and value (rows, kv_heads, n, head_dim)."""

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
    ) -> tuple[torch.Tensor, None]:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, quantizer.keys(key), quantizer.values(value), *rest, **more
        )
        return found

    return attention
