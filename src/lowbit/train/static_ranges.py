"""Static int8 activations, as phones run them: what flows into and out of a matrix, and the cache's keys and values, on
one scale each that was chosen beforehand.

value = clamp(round(x / scale), -128, 127) * scale, in the dtype of x. Scales are calibrated on some text and then
trained (LSQ, Esser et al. 2020). Source: apply_srq in transformers/integrations/gemma_quant.py, whose names the
checkpoint keeps: MODULE.input_activation_scale, .output_activation_scale, .k_cache_scale, .v_cache_scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowbit.checkpoint.static_activations import OF_CACHE, OF_MATRIX
from lowbit.train.precision import autocast

ATTENTION = "lowbit_static_cache"
PARAMETER = "range_scale"
_NAMES = {f"{kind}_range": name for kind, name in OF_MATRIX.items()}
_NAMES |= {f"{kind}_cache_range": name for kind, name in OF_CACHE.items()}
_LOW, _HIGH = -128.0, 127.0
_ROWS = 192  # of an activation kept to choose its scale by, at most
_ROWS_A_CALL = 24
_NARROWER = tuple(2.0 ** (-k / 2) for k in range(25))  # of the widest range, tried


class StaticRange(nn.Module):
    """Rounds what passes through it to int8 on one scale; until it is ``settled`` it watches, and changes nothing."""

    def __init__(self, scale: torch.Tensor | None = None) -> None:
        super().__init__()
        self.range_scale = nn.Parameter(torch.zeros(()) if scale is None else scale.detach().float().reshape(()))
        self._rows: list[torch.Tensor] | None = [] if scale is None else None
        self._widest = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._rows is not None:
            self._watch(x.detach())
            return x
        return _Round.apply(x, self.range_scale)  # type: ignore[no-any-return, no-untyped-call]

    def settled(self) -> torch.Tensor:
        """The scale with the least error of what was seen, every position counted by its own size: a first token with
        activations a thousand times the others' does not choose for all."""
        if not self._rows or self._widest == 0:
            return torch.zeros(())
        rows = torch.cat(self._rows)
        sizes = rows.square().sum(-1).clamp_min(1e-12)
        found = []
        for narrower in _NARROWER:
            scale = self._widest / _HIGH * narrower
            rounded = (rows / scale).round_().clamp_(_LOW, _HIGH).mul_(scale)
            found.append(float((rounded.sub_(rows).square_().sum(-1) / sizes).mean()))
        return torch.tensor(self._widest / _HIGH * _NARROWER[int(np.argmin(found))])

    def _watch(self, x: torch.Tensor) -> None:
        assert self._rows is not None
        rows = x.reshape(-1, x.shape[-1])
        self._widest = max(self._widest, float(rows.abs().max()))
        if sum(map(len, self._rows)) < _ROWS:
            step = max(1, len(rows) // _ROWS_A_CALL)
            self._rows.append(rows[::step][:_ROWS_A_CALL].float().clone())


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        return rounded(x, scale)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, scale = ctx.saved_tensors
        if scale == 0:
            return given[0], torch.zeros_like(scale)
        ratio = x.float() / scale
        inside = (ratio >= _LOW - 0.5) & (ratio <= _HIGH + 0.5)
        for_scale = None
        if ctx.needs_input_grad[1]:
            codes = ratio.round().clamp_(_LOW, _HIGH)
            for_scale = (given[0].float() * torch.where(inside, codes - ratio, codes)).sum()
        return given[0] * inside, for_scale


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x`` as the runtime rounds it, in its own dtype; as it is where the scale is 0."""
    if scale == 0:
        return x.view_as(x)
    scale = scale.to(x.dtype)
    return (x / scale).round_().clamp_(_LOW, _HIGH).mul_(scale)


def attach(model: Any, modules: tuple[str, ...], scales: Mapping[str, torch.Tensor] | None = None) -> None:
    """Puts ranges around the linear layers ``modules`` of ``model`` and into its attention, in place.

    scales: by the checkpoint's names; without them the ranges watch, for ``calibrate``.
    """
    owners: dict[str, nn.Module] = {}  # of a cache that later layers share, by the kind of attention
    for path, module in list(model.named_modules()):
        if path in modules and isinstance(module, nn.Linear):
            _add(module, path, ("input_range", "output_range"), scales)
            module._range_hooks = (  # type: ignore[assignment]
                module.register_forward_pre_hook(_before), module.register_forward_hook(_after)
            )  # fmt: skip
        elif hasattr(module, "k_proj") and hasattr(module, "o_proj"):
            _add(module, path, ("k_cache_range", "v_cache_range"), scales)
        if hasattr(module, "o_proj"):
            kind = getattr(module, "layer_type", "")
            if not getattr(module, "is_kv_shared_layer", False):
                owners[kind] = module
            module.__dict__["_range_owner"] = owners[kind]  # not as a submodule of this one
    model._attention_before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION


def detach(model: Any) -> None:
    """Takes the ranges off again."""
    for module in model.modules():
        module.__dict__.pop("_range_owner", None)
        for hook in module.__dict__.pop("_range_hooks", ()):
            hook.remove()
        for name in _NAMES:
            if isinstance(module._modules.get(name), StaticRange):
                del module._modules[name]
    model.config._attn_implementation = model.__dict__.pop("_attention_before")


@torch.no_grad()
def calibrate(
    model: Any, modules: tuple[str, ...], sequences: np.ndarray, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Scales by the checkpoint's names, of what the model's activations are on ``sequences`` (n, length)."""
    attach(model, modules)
    try:
        device = next(model.parameters()).device
        with autocast(device, dtype):
            for row in sequences:
                model.model(torch.from_numpy(row.astype(np.int64))[None].to(device), use_cache=False)
        return {name: each.settled().cpu() for name, each in ranges(model)}
    finally:
        detach(model)


def ranges(model: nn.Module) -> Iterator[tuple[str, StaticRange]]:
    """Every range by the name of its scale in the checkpoint."""
    for path, module in model.named_modules():
        if isinstance(module, StaticRange):
            inside, _, name = path.rpartition(".")
            yield f"{inside}.{_NAMES[name]}", module


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The scales as the checkpoint holds them: float32, no dimension."""
    return {name: each.range_scale.detach().float().cpu().clone() for name, each in ranges(model)}


def _add(module: nn.Module, path: str, names: tuple[str, ...], scales: Mapping[str, torch.Tensor] | None) -> None:
    for name in names:
        scale = None if scales is None else scales[f"{path}.{_NAMES[name]}"]
        module.add_module(name, StaticRange(scale))


def _before(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (module.input_range(inputs[0]), *inputs[1:])


def _after(module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = module.output_range(output)
    return found


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
) -> tuple[torch.Tensor, None]:
    """Keys and values as an int8 cache gives them back; layers that share a cache see what its owner put there."""
    owner = module.__dict__.get("_range_owner")
    if owner is not None:
        key, value = owner.k_cache_range(key), owner.v_cache_range(value)
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, *rest, **more)
    return found


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
