"""Which tensor of an mmproj is stored as which type: as llama.cpp's own conversion chooses.

Source: conversion/base.py and conversion/gemma.py of llama.cpp (tensor_force_quant, prepare_tensors).
"""

from __future__ import annotations

from lowbit import grid as grids
from lowbit.checkpoint.projector import ProjectorCheckpoint
from lowbit.checkpoint.projectors.base import ProjectorSpec
from lowbit.errors import BadOption

RECIPES = ("f16", "bf16", "f32", "q8_0")


def assign(checkpoint: ProjectorCheckpoint, recipe: str) -> dict[str, str]:
    """Tensor name -> grid name for every tensor. Raises BadOption for a recipe that mtmd's kernels do not take."""
    if recipe not in RECIPES:
        raise BadOption("an mmproj has no such recipe", found=repr(recipe), expected="one of " + ", ".join(RECIPES))
    return {name: _type_of(spec, recipe) for name, spec in checkpoint.specs.items() if isinstance(spec, ProjectorSpec)}


def _type_of(spec: ProjectorSpec, recipe: str) -> str:
    """Vectors stay F32; rows that are not whole Q8_0 blocks become F16."""
    if len(spec.gguf_shape) < 2:
        return "f32"
    chosen = spec.instead.get(recipe, recipe)
    return chosen if spec.gguf_shape[-1] % grids.get(chosen).block_size == 0 else "f16"
