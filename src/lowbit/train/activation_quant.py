"""Activations as llama.cpp's products read them: rounded to Q8_0 before a Q4_0 matrix, to Q8_K before a K-quant.

``round_activations(model)`` puts that rounding before every prepared linear layer (grid/_on_the_fly.py has the
arithmetic, which is that of the kernels for x86, repacked weights included). The gradient goes straight through.
Experts' products and the output head are left as they are: transformers and the loss compute them without a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowbit.grid import _on_the_fly
from lowbit.train.fake_quant import quantized


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kind: str) -> torch.Tensor:
        return _on_the_fly.activations(kind, x.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _Rounder:
    """A pre-hook of all layers; what several are given in a row (query, key and value) is rounded once."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, str, bool, torch.Tensor] | None = None

    def hook(self, kind: str) -> Any:
        def rounded(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x, grad = inputs[0], torch.is_grad_enabled()
            last = self._last
            if last is None or last[0] is not x or last[1:3] != (kind, grad):
                self._last = last = x, kind, grad, _Through.apply(x, kind)  # type: ignore[no-untyped-call]
            return (last[3], *inputs[1:])

        return rounded

    def forget(self, *_: Any) -> None:
        self._last = None


def round_activations(model: nn.Module) -> list[str]:
    """Rounds, from now on, what flows into every linear layer of a prepared model; gives the layers' tensors by name.

    Weights that stay float32 see their inputs as they are.
    """
    rounder, names = _Rounder(), []
    for name, module, quantizer in quantized(model):
        kind = _on_the_fly.ACTIVATIONS.get(quantizer.grid.name)
        if kind is not None and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(rounder.hook(kind))
            names.append(name)
    model.register_forward_hook(rounder.forget)
    return names
