"""The KV cache as llama.cpp keeps it, inside a model that is trained: attention over rounded keys and values.

llama.cpp rounds keys after their rotary embedding and values as they are, heads one after the other, in blocks along
the head. Where heads are whole 64s it first turns both (grid/_hadamard.py), turns queries likewise, and turns what
attention gives back. Turning back the rounded keys and values instead is the same sum, and leaves attention as it is.
The gradient goes straight through the rounding, and to a block's extremes as they set its step.

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

_FROM_LEAST = ("q4_1", "q5_1")  # steps from a block's least value to its greatest; others from zero to the extreme
_TINY = 1e-20


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
    return _turn(_turned_and_rounded(x, name, width)[1], name, width)


def _turned_and_rounded(x: torch.Tensor, name: str, width: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What is rounded, bit for bit as llama.cpp turns it, and what comes of it: both like ``x``, float32."""
    turned = x.detach().float()
    if width is not None and name not in UNQUANTIZED:
        turned = _hadamard.rotate(turned, width)
    grid = grids.get(name)
    return turned, grid.dequantize(_on_the_fly.cache_blocks(grid, turned))


def _turn(x: torch.Tensor, name: str, width: int | None) -> torch.Tensor:
    """Turns ``x`` float32, or a gradient, back: a product, for llama.cpp does neither, so there are no bits to keep."""
    if width is None or name in UNQUANTIZED:
        return x
    with torch.autocast(x.device.type, enabled=False):
        return (x.reshape(-1, width) @ _matrix(width, x.device)).view(x.shape)


@functools.cache
def _matrix(width: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(_hadamard.matrix(width)).to(device)


class _Through(torch.autograd.Function):
    """The gradient of each value as if it were not rounded, and what the range of its block does to the others.

    A block's values are rounded on a step that its extremes set, and their errors grow with the step. The straight-
    through estimator alone would not know: it would make queries smaller and keys larger, to no avail.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, width: int | None) -> torch.Tensor:
        turned, rounded = _turned_and_rounded(x, name, width)
        ctx.name, ctx.width = name, width
        if ctx.needs_input_grad[0] and name not in UNQUANTIZED:
            ctx.save_for_backward(turned, rounded)
        return _turn(rounded, name, width).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradients[0]
        if ctx.name in UNQUANTIZED:
            return gradient, None, None
        turned, rounded = ctx.saved_tensors
        through = _turn(gradient.float().contiguous(), ctx.name, ctx.width)
        through += _of_range(through, turned, rounded, ctx.name)
        return _turn(through, ctx.name, ctx.width).to(gradient.dtype), None, None


def _of_range(gradient: torch.Tensor, x: torch.Tensor, rounded: torch.Tensor, name: str) -> torch.Tensor:
    """The gradient that reaches a block's extremes through its step: errors are in proportion to it.

    d error / d log step = error, and the step is in proportion to the extreme, or to greatest - least (q4_1, q5_1).
    """
    shape = (*x.shape[:-1], -1, grids.get(name).block_size)
    blocks = x.reshape(shape)
    of_step = (gradient.reshape(shape) * (rounded.reshape(shape) - blocks)).sum(-1, keepdim=True)
    found = torch.zeros_like(blocks)
    if name in _FROM_LEAST:
        (low, least), (high, greatest) = blocks.min(-1, keepdim=True), blocks.max(-1, keepdim=True)
        of_step = of_step / (high - low).clamp_min(_TINY)
        found.scatter_(-1, least, -of_step).scatter_(-1, greatest, of_step)
    else:
        at = blocks.abs().argmax(-1, keepdim=True)
        extreme = blocks.gather(-1, at)
        found.scatter_(-1, at, torch.where(extreme.abs() > _TINY, of_step / extreme, 0.0))
    return found.view(x.shape)


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
    """transformers' attention interface: query (rows, heads, n, head_dim); key, value (rows, kv_heads, n, head_dim)."""

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
    ) -> tuple[torch.Tensor, None]:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, quantizer.keys(key), quantizer.values(value), *rest, **more
        )
        return found

    return attention
