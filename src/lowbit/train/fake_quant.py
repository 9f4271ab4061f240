"""Fake quantization: a module computes with the values that its weight will have in the file.

``prepare`` puts a parametrization around each weight that a recipe places on a grid. The forward pass sees
codes x scales, exactly as the runtime will; the backward pass hands the gradient straight through to the float32
master weight (straight-through estimator, Bengio et al. 2013). Scales are float16 values, fixed at their start or
learned with LSQ's gradient (Esser et al. 2020), rounded to float16 in every forward pass.

Any Trainer can train a prepared model: its parameters are the masters. What the file will hold is ``fq.blocks()``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from lowbit import grid as grids
from lowbit import recipe as recipes
from lowbit.checkpoint import families
from lowbit.errors import BadOption
from lowbit.grid.base import Blocks, Grid

# Weights rounded at a time: float32 values and scratch stay in a core's second-level cache.
_SLICE = 1 << 18

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# A fused optimizer changes parameters without raising their version, so versions alone cannot tell when to round anew.
register_optimizer_step_post_hook(_count_step)


class FakeQuantizer(nn.Module):
    """The parametrization of one weight.

    weight: (rows, n) float32, n a multiple of the grid's block size. scales: (rows, n / block_size) float16 values, or
    None for the grid's own choice. train: "full" (the weight moves, scales are fixed), "scales" (codes are fixed,
    scales move) or "both".
    """

    def __init__(
        self, grid: Grid, weight: torch.Tensor, scales: torch.Tensor | None = None, train: str = "full"
    ) -> None:
        super().__init__()
        self.grid, self.train_what = grid, train
        self.is_lookup = False
        with torch.no_grad():
            if grid.has_scales:
                start = grid.quantize(weight.detach()) if scales is None else grid.encode(weight.detach(), scales)
                assert start.scales is not None
                self.scales = nn.Parameter(start.scales.float(), requires_grad=train in ("scales", "both"))
                if train == "scales":
                    self.register_buffer("codes", start.codes)
        self._values: dict[torch.dtype, torch.Tensor] = {}
        self._state: tuple[Any, ...] = ()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        values = self._rounded(weight, self._dtype(weight))
        if not torch.is_grad_enabled():
            return values
        return _StraightThrough.apply(weight, getattr(self, "scales", None), values, self)

    def half_scales(self) -> torch.Tensor:
        """The scales as the file will hold them: (rows, n / block_size) float16."""
        return self.scales.detach().to(torch.float16)

    @torch.no_grad()
    def blocks(self, weight: torch.Tensor) -> Blocks:
        """Codes and scales that the forward pass computes with."""
        if not self.grid.has_scales:
            return self.grid.quantize(weight.detach())
        if self.train_what == "scales":
            return Blocks(codes=self.codes, scales=self.half_scales())
        return self.grid.encode(weight.detach(), self.half_scales())

    def _dtype(self, weight: torch.Tensor) -> torch.dtype:
        device = weight.device.type
        is_matrix_product = not self.is_lookup
        if is_matrix_product and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return weight.dtype

    @torch.inference_mode(False)  # what is made under inference_mode could not be trained with later
    @torch.no_grad()
    def _rounded(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The values on the grid, rounded once an optimizer step however often they are asked for."""
        scales = getattr(self, "scales", None)
        moves = weight.requires_grad or (scales is not None and scales.requires_grad)
        state = (
            _optimizer_steps if moves else 0,
            weight.data_ptr(),
            weight._version,
            None if scales is None else (scales.data_ptr(), scales._version),
        )
        if state != self._state:
            self._values, self._state = {}, state
        if dtype not in self._values:
            self._values[dtype] = self._round(weight.detach(), dtype)
        # A new tensor on the same memory: autograd marks what it is handed.
        return self._values[dtype].view(weight.shape)

    def _round(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        grid = self.grid
        if not grid.has_scales:
            return grid.dequantize(grid.quantize(weight)).to(dtype)
        scales = self.half_scales()
        if self.train_what == "scales":
            return grid.dequantize(Blocks(codes=self.codes, scales=scales)).to(dtype)
        values = torch.empty_like(weight, dtype=dtype)
        rows = max(1, _SLICE // weight.shape[-1])
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            values[part] = grid.nearest_values(weight[part], scales[part])
        return values


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, scales: torch.Tensor | None, values: torch.Tensor, owner: FakeQuantizer
    ) -> torch.Tensor:
        ctx.owner, ctx.dtype = owner, weight.dtype
        ctx.learned = scales is not None and scales.requires_grad
        if ctx.learned:
            ctx.save_for_backward(weight)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        gradient = gradients[0].to(ctx.dtype)
        for_weight = gradient if ctx.needs_input_grad[0] else None
        for_scales = _scale_gradient(ctx.owner, ctx.saved_tensors[0], gradient) if ctx.learned else None
        return for_weight, for_scales, None, None


def _scale_gradient(owner: FakeQuantizer, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """LSQ: the derivative of scale * round(w / scale) by the scale is code - w / scale inside the range, code outside.

    With fixed codes it is the code itself.
    """
    grid = owner.grid
    shape = (*owner.scales.shape, grid.block_size)
    if owner.train_what == "scales":
        slope = owner.codes.to(gradient.dtype)
    else:
        scales = owner.half_scales()
        ratio = weight.reshape(shape) * grid.inverse(scales).unsqueeze(-1)
        codes = grid.encode(weight, scales).codes.to(gradient.dtype)
        inside = (ratio >= grid.min_code - 0.5) & (ratio <= grid.max_code + 0.5)
        slope = torch.where(inside, codes - ratio, codes)
    return (gradient.reshape(shape) * slope).sum(-1)  # type: ignore[operator]


def prepare(
    model: nn.Module,
    recipe: str | recipes.Recipe = "q4_0",
    *,
    scales: Mapping[str, torch.Tensor] | None = None,
    train: str = "full",
) -> nn.Module:
    """Puts a fake quantizer around every weight of a Hugging Face model that ``recipe`` places on a grid; in place.

    scales: float16 scales by tensor name, (rows, n / block_size), where they were searched for; elsewhere the grid's
    own rule. train: "full", "scales" or "both". A tied embedding is wrapped once and serves both uses. Returns the
    model, which any Hugging Face Trainer or TRL trainer can train; ``lowbit.train.save`` then writes the checkpoint.
    Raises Unsupported (row length) or BadFile (NaN, Inf) naming the tensor, BadOption for a model prepared already.
    """
    if train not in ("full", "scales", "both"):
        raise BadOption("unknown train", found=train, expected="full, scales or both")
    scales = scales or {}
    for name, grid in assignment(model, recipe).items():
        if grid.name == "f32":
            continue
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if parametrize.is_parametrized(module, attribute):
            raise BadOption("the model is prepared already", where=name)
        weight = getattr(module, attribute)
        grids.check_finite(weight, name)
        quantizer = FakeQuantizer(grid, weight, scales.get(name), train)
        quantizer.is_lookup = isinstance(module, nn.Embedding)
        if train == "scales":
            weight.requires_grad_(False)
        parametrize.register_parametrization(module, attribute, quantizer, unsafe=True)
    _retie(model)
    return model


def assignment(model: nn.Module, recipe: str | recipes.Recipe) -> dict[str, Grid]:
    """Tensor name -> grid for a Hugging Face model (its own config class decides the tensors)."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    where = type(model).__name__
    family = families.by_config({"model_type": config.model_type}, where)
    text_config = family.text_config(config.to_dict(), where)
    chosen = recipes.get(recipe) if isinstance(recipe, str) else recipe
    return {name: grids.get(grid) for name, grid in chosen.assign_specs(family.tensors(text_config)).items()}


def quantized(model: nn.Module) -> Iterator[tuple[str, nn.Module, FakeQuantizer]]:
    """(tensor name, module, fake quantizer) of every wrapped weight."""
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for attribute, chain in module.parametrizations.items():  # type: ignore[union-attr]
            for quantizer in chain:
                if isinstance(quantizer, FakeQuantizer):
                    yield f"{path}.{attribute}", module, quantizer


def master(module: nn.Module, attribute: str = "weight") -> nn.Parameter:
    """The float32 parameter behind a wrapped weight."""
    return module.parametrizations[attribute].original  # type: ignore[union-attr, index, return-value]


def _retie(model: nn.Module) -> None:
    """Lets a tied output head read the wrapped embedding, so that one parameter and one rounding serve both."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or not parametrize.is_parametrized(embedding, "weight"):
        return
    if head._parameters.get("weight") is not master(embedding):
        return
    del head._parameters["weight"]
    # In a tuple, so that it is no submodule of the head; an attribute, so that a deep copy reads its own embedding.
    head._tied_to = (embedding,)
    head.__class__ = type(f"Tied{type(head).__name__}", (type(head),), {"weight": property(_weight_of_embedding)})


def _weight_of_embedding(head: Any) -> torch.Tensor:
    return head._tied_to[0].weight  # type: ignore[no-any-return]
