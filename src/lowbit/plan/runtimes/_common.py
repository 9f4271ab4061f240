"""What runtimes that are planned by formula share: refusals, context for each slot, weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lowbit.checkpoint.families.base import LayerCache
from lowbit.errors import BadOption, Unsupported
from lowbit.plan.model import PlanModel, PlannedTensor
from lowbit.plan.options import PlanOptions
from lowbit.plan.result import Row
from lowbit.units import format_bytes

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(PlanOptions)}


def refuse(runtime: str, options: PlanOptions, names: Sequence[str]) -> None:
    """Raises BadOption for the first of these options that was set: the runtime has nothing like it."""
    for name in names:
        if getattr(options, name) != _DEFAULTS[name]:
            raise BadOption(f"{runtime} has no such setting", found=f"{name}={getattr(options, name)}")


def one_kv_type(runtime: str, kv_types: Sequence[str], options: PlanOptions) -> str:
    """The type of keys and values, which this runtime caches alike."""
    keys, values = options.kv_type_k or kv_types[0], options.kv_type_v or kv_types[0]
    for kind in (keys, values):
        if kind not in kv_types:
            raise BadOption(f"{runtime} has no such KV type", found=kind[:40], expected=", ".join(kv_types))
    if keys != values:
        raise BadOption(f"{runtime} caches keys and values in one type", found=f"{keys} and {values}")
    return keys


def contexts(model: PlanModel, options: PlanOptions, slots: int) -> dict[str, int]:
    """``context`` of all slots, ``context_per_slot`` and ``slots``, as every runtime's settings have them."""
    context = options.context or model.trained_context
    if context < slots:
        raise BadOption("the context is shorter than one token a slot", found=f"{context} tokens, {slots} slots")
    return {"context": context, "context_per_slot": context // slots, "slots": slots}


def owners(model: PlanModel) -> list[LayerCache]:
    """The layers that keep keys and values of their own. Raises Unsupported where they are not known."""
    if model.family is None:
        what = "what this architecture caches is known to llama.cpp alone"
        raise Unsupported(what, where=model.path, found=model.architecture, hint="Plan for llama.cpp")
    return [layer for layer in model.cache if layer.owner is None]


def layers_of(count: int, window: int | None) -> str:
    kind = "global" if window is None else "sliding"
    return f"KV cache, {count} {kind} layer{'s' if count > 1 else ''}"


def weights_row(tensors: Sequence[PlannedTensor], why: str, found: str) -> Row:
    """One row for all tensors: how many weights, in which types, and ``why`` they are in memory."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.n_bytes
    largest = sorted(sizes, key=lambda kind: -sizes[kind])[:3]
    mostly = ", ".join(f"{kind} {format_bytes(sizes[kind])}" for kind in largest)
    total = sum(sizes.values())
    return Row(part="weights", what="weights", bytes=total, why=f"{mostly}; {why}", found=found)


def beyond_training(model: PlanModel, per_slot: int) -> list[str]:
    if per_slot <= model.trained_context:
        return []
    return [f"a slot may go beyond the {model.trained_context:,} tokens that the model was trained for"]


def sizes(model: PlanModel) -> dict[str, Any]:
    """``hidden``, ``wide`` and ``heads`` of the text model: what activations are made of."""
    wide = model.config["intermediate_size"]
    return {
        "hidden": model.config["hidden_size"],
        "wide": max(wide) if isinstance(wide, list) else wide,
        "heads": model.config["num_attention_heads"],
    }
