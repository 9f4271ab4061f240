"""Fake quantization: a module computes with the values that its weight will have in the file.

``prepare`` puts a parametrization around each weight that a recipe places on a grid. The forward pass sees
what the runtime will make of the codes and their frame (scales, minimums: see ``frames``); the backward pass hands the
gradient straight through to the float32 master weight (straight-through estimator, Bengio et al. 2013). A frame is
fixed at its start, or its scales and minimums are learned, rounded to what the format stores in every forward pass.

Any Trainer can train a prepared model: its parameters are the masters. What the file will hold is ``fq.blocks()``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from lowbit.train import frames as framing

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# A fused optimizer changes parameters without raising their version, so versions alone cannot tell when to round anew.
register_optimizer_step_post_hook(_count_step)


class FakeQuantizer(nn.Module):
    """The parametrization of one weight.

    weight: (rows, n) float32, n a multiple of the grid's block size; None where ``start`` follows later, and until then
    the weight passes as it is. frame: the blocks whose scales and minimums it is rounded on, or None for the grid's own
    choice. train: "full" (the weight moves, the frame is fixed), "scales" (codes
    are fixed, scales and minimums move) or "both" (weights and scales). Powers of two (MXFP4) never move.
    """

    scales: torch.Tensor | None
    mins: torch.Tensor | None
    sub_scales: torch.Tensor | None
    sub_mins: torch.Tensor | None

    def __init__(
        self, grid: Grid, weight: torch.Tensor | None, frame: Blocks | None = None, train: str = "full"
    ) -> None:
        super().__init__()
        self.grid, self.train_what = grid, train
        self.is_lookup = self.in_shards = self.is_on = False
        self._values: dict[torch.dtype, torch.Tensor] = {}
        self._state: tuple[Any, ...] = ()
        if weight is not None:
            self.start(weight, frame)

    @torch.no_grad()
    def start(self, weight: torch.Tensor, frame: Blocks | None = None) -> None:
        """Fixes what is fixed from here on; shapes as above, or those of the rows that this process has of them."""
        self.is_on = True
        if self.grid.is_trainable:
            weight = weight.detach()
            start = self.grid.quantize(weight) if frame is None else self.grid.encode_on(weight, frame)
            # Inside of the range of codes an offset's slope is 0 where codes may change: what is left is noise.
            learned = {"scales": ("scales", "mins"), "both": ("scales",)}.get(self.train_what, ())
            self._hold(start, learned)
            if self.train_what == "scales":
                self.register_buffer("codes", start.codes)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.in_shards or not self.is_on:  # in shards: each was rounded before the whole was gathered
            return weight
        values = self._rounded(weight, self._dtype(weight))
        if not torch.is_grad_enabled():
            return values
        scales, mins = (getattr(self, part, None) for part in ("scales", "mins"))
        return _StraightThrough.apply(weight, scales, mins, values, self)

    def _hold(self, start: Blocks, learned: tuple[str, ...]) -> None:
        """Scales and minimums as parameters in float32 where they are free numbers, the rest as it is."""
        for part in ("scales", "mins", "sub_scales", "sub_mins"):
            values: Any = getattr(start, part)
            if values is not None and values.is_floating_point():
                self.register_parameter(part, nn.Parameter(values.float(), requires_grad=part in learned))
            else:
                self.register_buffer(part, values)

    @torch.no_grad()
    def shard_values(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of the weight as they are computed with."""
        return self._round(rows.detach(), dtype) if self.is_on else rows.detach().to(dtype)

    @torch.no_grad()
    def frame_gradients(self, rows: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """By scales and by minimums, from the gradient of their rows' values; both (rows, n) float32."""
        codes: Any = self.codes if self.train_what == "scales" else None
        return framing.gradients(self.grid, rows.detach(), self.frame(), codes, slope)

    def frame(self) -> Blocks:
        """Scales and minimums as the file will hold them."""
        return Blocks(codes=None, **{name: self._stored(name) for name in ("scales", "mins", "sub_scales", "sub_mins")})

    def _stored(self, part: str) -> torch.Tensor | None:
        values: torch.Tensor | None = getattr(self, part)
        is_free = isinstance(values, nn.Parameter)
        return framing.stored(values, self.grid) if is_free else values  # type: ignore[arg-type]

    @property
    def learned(self) -> list[nn.Parameter]:
        """The frame's own parameters."""
        found = (getattr(self, part, None) for part in ("scales", "mins"))
        return [part for part in found if isinstance(part, nn.Parameter) and part.requires_grad]

    @torch.no_grad()
    def blocks(self, weight: torch.Tensor) -> Blocks:
        """Codes and scales that the forward pass computes with."""
        if not self.grid.is_trainable:
            return self.grid.quantize(weight.detach())
        if self.train_what == "scales":
            return replace(self.frame(), codes=self.codes)
        return self.grid.encode_on(weight.detach(), self.frame())

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
        parts = [part for part in (getattr(self, "scales", None), getattr(self, "mins", None)) if part is not None]
        moves = weight.requires_grad or any(part.requires_grad for part in parts)
        held = tuple((part.data_ptr(), part._version) for part in (weight, *parts))
        state = (_optimizer_steps if moves else 0, *held)
        if state != self._state:
            self._values, self._state = {}, state
        if dtype not in self._values:
            self._values[dtype] = self._round(weight.detach(), dtype)
        # A new tensor on the same memory: autograd marks what it is handed.
        return self._values[dtype].view(weight.shape)

    def _round(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not self.grid.is_trainable or self.train_what == "scales":
            return self.grid.dequantize(self.blocks(weight)).to(dtype)
        return framing.values_on(self.grid, weight, self.frame(), dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        mins: torch.Tensor | None,
        values: torch.Tensor,
        owner: FakeQuantizer,
    ) -> torch.Tensor:
        ctx.owner, ctx.dtype = owner, weight.dtype
        if owner.learned:
            ctx.save_for_backward(weight)
        return values

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slope, owner = given[0].to(ctx.dtype), ctx.owner
        for_weight = slope if ctx.needs_input_grad[0] else None
        if not owner.learned:
            return for_weight, None, None, None, None
        return for_weight, *owner.frame_gradients(ctx.saved_tensors[0], slope), None, None


class Chosen:
    """Which of the recipes a model computes with now: the same for all of its weights."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.index = names, 0

    @property
    def n(self) -> int:
        return len(self.names)

    @contextlib.contextmanager
    def use(self, index: int) -> Iterator[None]:
        """Within the block the model computes with that recipe's grids."""
        before, self.index = self.index, index
        try:
            yield
        finally:
            self.index = before


class Several(nn.Module):
    """The parametrization of one weight that is trained for several files at once: the master is one, and each file has
    a fake quantizer of its own, or leaves the weight as it is (None). ``chosen`` says whose turn it is.
    """

    def __init__(self, each: Sequence[FakeQuantizer | None], chosen: Chosen) -> None:
        super().__init__()
        self.each = nn.ModuleList([nn.Identity() if one is None else one for one in each])
        self.chosen = chosen

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.each[self.chosen.index](weight)
        return values


def prepare(
    model: nn.Module,
    recipe: str | recipes.Recipe = "q4_0",
    *,
    frames: Mapping[str, Blocks] | Sequence[Mapping[str, Blocks]] | None = None,
    train: str = "full",
) -> nn.Module:
    """Puts a fake quantizer around every weight of a Hugging Face model that ``recipe`` places on a grid; in place.

    recipe: several names, with commas between them, train one set of weights for all of these files: ``chosen(model)``
    then tells and sets which of them the model computes with. frames are one mapping a recipe then.

    frames: scales and minimums by tensor name where they were searched for; elsewhere the grid's own rule. train:
    "full", "scales" or "both". A tied embedding is wrapped once and serves both uses. Returns the model, which any
    Hugging Face Trainer or TRL trainer can train; ``lowbit.train.save`` then writes the checkpoint.
    Raises Unsupported (row length) or BadFile (NaN, Inf) naming the tensor, BadOption for a model prepared already.
    """
    if train not in ("full", "scales", "both"):
        raise BadOption("unknown train", found=train, expected="full, scales or both")
    wanted = recipes.several(recipe) if isinstance(recipe, str) else (recipe,)
    if train == "scales" and len(wanted) > 1:
        raise BadOption("several recipes share weights, and scales alone share none", found="train=scales")
    starts = [frames or {}] if isinstance(frames, Mapping | None) else list(frames)
    starts += [{}] * (len(wanted) - len(starts))
    each = [assignment(model, one) for one in wanted]
    turn = Chosen(tuple(one.name for one in wanted))
    for name in each[0]:
        if all(grids_of[name].name == "f32" for grids_of in each):
            continue
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if parametrize.is_parametrized(module, attribute):
            raise BadOption("the model is prepared already", where=name)
        weight = getattr(module, attribute)
        grids.check_finite(weight, name)
        made = [_quantizer(of[name], weight, at.get(name), train) for of, at in zip(each, starts, strict=True)]
        for quantizer in filter(None, made):
            quantizer.is_lookup = isinstance(module, nn.Embedding)
        if train == "scales":
            weight.requires_grad_(False)
        whole = Several(made, turn) if len(made) > 1 else made[0]
        assert whole is not None
        parametrize.register_parametrization(module, attribute, whole, unsafe=True)
    model.__dict__["_chosen_recipe"] = turn
    retie(model)
    return model


def chosen(model: nn.Module) -> Chosen:
    """Whose turn it is, of a prepared model; of another there is one turn."""
    found: Chosen = model.__dict__.get("_chosen_recipe") or Chosen(("",))
    return found


def _quantizer(grid: Grid, weight: torch.Tensor, frame: Blocks | None, train: str) -> FakeQuantizer | None:
    return None if grid.name == "f32" else FakeQuantizer(grid, weight, frame, train)


def assignment(model: nn.Module, recipe: str | recipes.Recipe) -> dict[str, Grid]:
    """Tensor name -> grid for a Hugging Face model (its own config class decides the tensors)."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    where = type(model).__name__
    family = families.by_config({"model_type": config.model_type}, where)
    text_config = family.text_config(config.to_dict(), where)
    chosen = recipes.get(recipe) if isinstance(recipe, str) else recipe
    return {name: grids.get(grid) for name, grid in chosen.assign_specs(family.tensors(text_config)).items()}


def quantized(model: nn.Module, which: int = 0) -> Iterator[tuple[str, nn.Module, FakeQuantizer]]:
    """(tensor name, module, fake quantizer) of every weight that the recipe of that number wraps."""
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for attribute, chain in module.parametrizations.items():  # type: ignore[union-attr]
            for outer in chain:
                quantizer = outer.each[which] if isinstance(outer, Several) else outer
                if isinstance(quantizer, FakeQuantizer):
                    yield f"{path}.{attribute}", module, quantizer


def master(module: nn.Module, attribute: str = "weight") -> nn.Parameter:
    """The float32 parameter behind a wrapped weight."""
    return module.parametrizations[attribute].original  # type: ignore[union-attr, index, return-value]


def retie(model: nn.Module) -> None:
    """Lets a tied output head read the wrapped embedding, so that one parameter and one rounding serve both."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or not parametrize.is_parametrized(embedding, "weight"):
        return
    if head._parameters.get("weight") is master(embedding):
        read_from(head, embedding)


def read_from(head: Any, embedding: nn.Module) -> None:
    """Gives an output head the embedding's weight at each use in place of a parameter of its own."""
    del head._parameters["weight"]
    # In a tuple, so that it is no submodule of the head; an attribute, so that a deep copy reads its own embedding.
    head._tied_to = (embedding,)
    head.__class__ = type(f"Tied{type(head).__name__}", (type(head),), {"weight": property(_weight_of_embedding)})


def _weight_of_embedding(head: Any) -> torch.Tensor:
    return head._tied_to[0].weight  # type: ignore[no-any-return]
