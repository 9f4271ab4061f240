"""Keys, values and their counterparts rescaled before training, so that a rounded cache costs less; the model stays
the same function.

A cache is rounded on one scale for 32 neighbours, after a rotation that spreads a head's energy evenly over them. So
the error of every value is about equal, and proportional to the size of the whole key or value. What it does is
proportional to the size of what it is multiplied by: the query, or the output projection. Hence:

* A rotary pair of a key may be scaled by s and that of the queries by 1/s, for both are turned by the same angle. The
  product of the two sizes is least at s^2 = |query pair| / |key pair|.
* A value head v may become A v and the output projection W A^-1. With C the second moments of v and G = W^T W, the
  product tr(A C A^T) tr(A^-T G A^-1) is least where A^T A = C^-1/2 (C^1/2 G C^1/2)^1/2 C^-1/2.

Sizes and moments are those of some text. The rows of the projections, or the norms' weights where queries and keys
have norms, take the factors. Rows on a grid of their own scales do not notice a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowbit.train.precision import autocast

_WATCHING = "lowbit_kv_watching"
_MOST = 16.0  # a factor beyond it is a channel that is hardly used on one side
_DAMPING = 1e-3  # of the mean, added to second moments that may be of less than full rank


class _Sizes:
    """Second moments of one layer's attention, summed over positions."""

    def __init__(self) -> None:
        self.queries: Any = 0.0  # (heads, head_dim) squares
        self.keys: Any = 0.0  # (kv_heads, head_dim) squares
        self.values: Any = 0.0  # (kv_heads, head_dim, head_dim)

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """query (rows, heads, n, head_dim); key and value (rows, kv_heads, n, head_dim)."""
        self.queries += query.double().square().sum((0, 2))
        self.keys += key.double().square().sum((0, 2))
        of_heads = value.float().transpose(0, 1).flatten(1, 2)  # (kv_heads, positions, head_dim)
        self.values += (of_heads.transpose(1, 2) @ of_heads).double()


_watching: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
) -> tuple[torch.Tensor, None]:
    if _watching is not None:
        _watching(module, query, key, value)
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, *rest, **more)
    return found


ALL_ATTENTION_FUNCTIONS.register(_WATCHING, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_WATCHING, sdpa_mask)


@contextmanager
def _watched(model: Any) -> Iterator[dict[nn.Module, _Sizes]]:
    """Within the block the sizes of every attention layer's queries, keys and values are summed up."""
    global _watching
    found: dict[nn.Module, _Sizes] = {}

    def watch(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        found.setdefault(module, _Sizes()).add(query, key, value)

    before, _watching = model.config._attn_implementation, watch
    model.config._attn_implementation = _WATCHING
    try:
        yield found
    finally:
        model.config._attn_implementation, _watching = before, None


@torch.no_grad()
def balance(model: Any, sequences: np.ndarray, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Rescales the attention of ``model``, not yet prepared, in place; gives the parameters that it changed, by name.

    sequences: (n, length) int32, the text that sizes are of. dtype: of the products. Layers that share keys and values
    with others (Gemma 4) stay as they are.
    """
    device = next(model.parameters()).device
    with _watched(model) as sizes, autocast(device, dtype):
        for row in sequences:
            model.model(torch.from_numpy(row.astype(np.int64))[None].to(device), use_cache=False)
    changed: set[nn.Parameter] = set()
    for module, found in sizes.items():
        if getattr(module, "is_kv_shared_layer", False) or getattr(module, "store_full_length_kv", False):
            continue
        changed |= _balance_keys(module, found) | _balance_values(module, found)
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p in changed}


def _balance_keys(module: Any, sizes: _Sizes) -> set[nn.Parameter]:
    kv_heads = sizes.keys.shape[0]
    queries = sizes.queries.unflatten(0, (kv_heads, -1)).sum(1)  # (kv_heads, head_dim)
    if hasattr(module, "k_norm"):  # its weights serve all heads
        factors = _of_pairs(queries.sum(0, keepdim=True), sizes.keys.sum(0, keepdim=True))[0]
        _scale_norm(module.k_norm, factors)
        _scale_norm(module.q_norm, 1 / factors)
        return {module.k_norm.weight, module.q_norm.weight}
    factors = _of_pairs(queries, sizes.keys)
    groups = sizes.queries.shape[0] // kv_heads
    return _scale_rows(module.k_proj, factors.flatten()) | _scale_rows(
        module.q_proj, (1 / factors).repeat_interleave(groups, 0).flatten()
    )


def _of_pairs(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Factors of keys (heads, head_dim), equal in the two halves, of geometric mean 1."""
    q, k = (x.unflatten(-1, (2, -1)).sum(-2) for x in (queries, keys))
    tiny = torch.finfo(torch.float32).tiny
    logs = 0.25 * ((q + tiny).log() - (k + tiny).log())
    logs = (logs - logs.mean(-1, keepdim=True)).clamp(-np.log(_MOST), np.log(_MOST))
    return logs.exp().repeat(1, 2)


def _scale_norm(norm: Any, factors: torch.Tensor) -> None:
    """Multiplies what a norm gives. Gemma 3 adds 1 to its weights."""
    offset = 1.0 if "Gemma3" in type(norm).__name__ else 0.0
    norm.weight.copy_((norm.weight.double() + offset) * factors - offset)


def _scale_rows(linear: Any, factors: torch.Tensor) -> set[nn.Parameter]:
    linear.weight.copy_(linear.weight.double() * factors[:, None])
    if linear.bias is None:
        return {linear.weight}
    linear.bias.copy_(linear.bias.double() * factors)
    return {linear.weight, linear.bias}


def _balance_values(module: Any, sizes: _Sizes) -> set[nn.Parameter]:
    if hasattr(module, "v_norm"):  # Gemma 4 divides values by their size: no factor would stay
        return set()
    kv_heads, head_dim = sizes.keys.shape
    groups = sizes.queries.shape[0] // kv_heads
    value, output = module.v_proj, module.o_proj
    columns = output.weight.double().unflatten(1, (kv_heads, groups, head_dim))  # (width, kv_heads, groups, head_dim)
    rows = value.weight.double().unflatten(0, (kv_heads, head_dim))
    for head in range(kv_heads):
        of_head = columns[:, head].flatten(0, 1)  # (width * groups, head_dim)
        change = _least_product(_damped(sizes.values[head]), _damped(of_head.T @ of_head))
        rows[head] = change @ rows[head]
        columns[:, head] = columns[:, head] @ torch.linalg.inv(change)
        if value.bias is not None:
            part = slice(head * head_dim, (head + 1) * head_dim)
            value.bias[part] = (change @ value.bias[part].double()).float()
    value.weight.copy_(rows.flatten(0, 1))
    output.weight.copy_(columns.flatten(1))
    return {value.weight, output.weight} | ({value.bias} if value.bias is not None else set())


def _damped(moments: torch.Tensor) -> torch.Tensor:
    return moments + _DAMPING * moments.diagonal().mean() * torch.eye(len(moments), device=moments.device)


def _least_product(moments: torch.Tensor, counterpart: torch.Tensor) -> torch.Tensor:
    """The symmetric A of the module's head: moments C and counterpart G, (n, n) float64; |v| stays what it was."""
    root = _power(moments, 0.5)
    inverse = _power(moments, -0.5)
    change = _power(inverse @ _power(root @ counterpart @ root, 0.5) @ inverse, 0.5)
    size = torch.trace(change @ moments @ change.T) / torch.trace(moments)
    return change / size.sqrt()


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp_min(values[-1] * 1e-12)
    return vectors * values**exponent @ vectors.T
