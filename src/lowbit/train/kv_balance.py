"""Keys and queries rescaled before training, so that a rounded cache costs less; the model stays the same function.

llama.cpp turns a key before it rounds it, which spreads the key's energy over the head: the error of every value is
about equal, and in proportion to the size of the whole key. What it does to a score is in proportion to the size of
the query. A rotary pair of the keys may be scaled by s and that of the queries by 1/s, for both are turned by the same
angle. So with x = log s^2 the error of attention's output is, for one head,

    the sum over pairs i, j of B[i, j] exp(x[j] - x[i])
    with B[i, j] the sum over queries s and keys t of w[s, t] q[s, i]^2 k[t, j]^2

where w = p^2 |v[t] - o[s]|^2 is what an error of that score does to the output o. This is convex; it is least where
the sums of B's rows and columns agree (matrix balancing: Osborne 1960), found pair by pair. The rows of the projections
take the factors, or the norms' weights where queries and keys have norms. Rows on a grid of their own scales do not
notice. Models with such norms gain much (of Gemma 3's error a seventh is left), others little (dev/LOG.md).
"""

from __future__ import annotations

import math
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
_MOST = 16.0  # a factor beyond it is of a pair that is hardly used on one side
_SWEEPS = 20
_TINY = 1e-12  # of all of B: what a pair that is never used counts

Watch = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor, float], None]
_watch: Watch | None = None


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
) -> tuple[torch.Tensor, None]:
    if _watch is not None:
        scaling = more.get("scaling")
        _watch(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, *rest, **more)
    return found


ALL_ATTENTION_FUNCTIONS.register(_WATCHING, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_WATCHING, sdpa_mask)


@contextmanager
def _watched(model: Any, watch: Watch) -> Iterator[None]:
    """Within the block ``watch`` is shown what every attention layer is given."""
    global _watch
    before, _watch = model.config._attn_implementation, watch
    model.config._attn_implementation = _WATCHING
    try:
        yield
    finally:
        model.config._attn_implementation, _watch = before, None


@torch.no_grad()
def balance(model: Any, sequences: np.ndarray, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Rescales keys and queries of ``model``, not yet prepared, in place; gives the changed parameters, by name.

    sequences: (n, length) int32, the text that B is of. dtype: of the products. Layers of Gemma 4 that share their keys
    with others stay as they are.
    """
    device = next(model.parameters()).device
    found: dict[nn.Module, torch.Tensor] = {}

    def watch(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> None:
        if getattr(module, "is_kv_shared_layer", False) or getattr(module, "store_full_length_kv", False):
            return
        window = getattr(module, "sliding_window", None)
        costs = torch.stack([_costs(*of_row, scaling, window) for of_row in zip(query, key, value, strict=True)]).sum(0)
        found[module] = found[module] + costs if module in found else costs

    with _watched(model, watch), autocast(device, dtype):
        for row in sequences:
            model.model(torch.from_numpy(row.astype(np.int64))[None].to(device), use_cache=False)
    changed: set[nn.Parameter] = set()
    for module, costs in found.items():
        changed |= _rescale(module, costs)
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p in changed}


def _costs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """B of each key-value head: query (heads, n, d), key and value (kv_heads, n, d) -> (kv_heads, d / 2, d / 2)."""
    n, groups = query.shape[1], query.shape[0] // key.shape[0]
    seen = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
    if window:
        seen &= torch.ones_like(seen).triu(1 - window)
    per_head = []
    for head, of_head in enumerate(query.float()):
        k, v = key[head // groups].float(), value[head // groups].float()
        p = torch.softmax((of_head @ k.T * scaling).masked_fill(~seen, -torch.inf), -1)
        o = p @ v
        distance = o.square().sum(-1)[:, None] + v.square().sum(-1) - 2 * o @ v.T
        per_head.append(_pairs(of_head).T @ (p.square() * distance.clamp_min(0)) @ _pairs(k))
    return torch.stack(per_head).double().unflatten(0, (-1, groups)).sum(1)


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """Squares of rotary pairs, the two halves of a head added: (n, d) -> (n, d / 2)."""
    return x.square().unflatten(-1, (2, -1)).sum(-2)


def _rescale(module: Any, costs: torch.Tensor) -> set[nn.Parameter]:
    if hasattr(module, "k_norm"):  # its weights serve all heads
        factors = balancing_factors(costs.sum(0, keepdim=True))[0].repeat(2)
        _scale_norm(module.k_norm, factors)
        _scale_norm(module.q_norm, 1 / factors)
        return {module.k_norm.weight, module.q_norm.weight}
    factors = balancing_factors(costs).repeat(1, 2)  # (kv_heads, d)
    groups = module.q_proj.weight.shape[0] // factors.numel()
    return _scale_rows(module.k_proj, factors.flatten()) | _scale_rows(
        module.q_proj, (1 / factors).repeat_interleave(groups, 0).flatten()
    )


def balancing_factors(costs: torch.Tensor) -> torch.Tensor:
    """s (heads, n), of geometric mean 1, that makes the sum of B[i, j] s[j]^2 / s[i]^2 least.

    costs: B, (heads, n, n) float64.
    """
    n = costs.shape[-1]
    apart = costs * (1 - torch.eye(n, dtype=costs.dtype, device=costs.device)) + _TINY * costs.sum((-2, -1), True)
    x = torch.zeros_like(costs[:, 0])
    for _ in range(_SWEEPS):
        for i in range(n):
            leaving, arriving = (apart[:, i] * x.exp()).sum(-1), (apart[:, :, i] * (-x).exp()).sum(-1)
            x[:, i] = (leaving.log() - arriving.log()) / 2
    most = 2 * math.log(_MOST)
    return ((x - x.mean(-1, keepdim=True)).clamp(-most, most) / 2).exp()


def _scale_norm(norm: Any, factors: torch.Tensor) -> None:
    """Multiplies what a norm gives. Gemma 3 adds 1 to its weights."""
    offset = 1.0 if type(norm).__name__.startswith("Gemma3") else 0.0
    norm.weight.copy_((norm.weight.double() + offset) * factors - offset)


def _scale_rows(linear: Any, factors: torch.Tensor) -> set[nn.Parameter]:
    linear.weight.copy_(linear.weight.double() * factors[:, None])
    if linear.bias is None:
        return {linear.weight}
    linear.bias.copy_(linear.bias.double() * factors)
    return {linear.weight, linear.bias}
