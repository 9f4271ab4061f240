"""Recipes: which tensor is stored on which grid, as llama-quantize chooses.

Source: llama_tensor_get_type in llama.cpp (src/llama-quant.cpp), without an importance matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from lowbit import grid as grids
from lowbit.errors import BadOption, Unsupported

_NAMES = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32",
    "mlx_affine4_g32", "mlx_affine4_g64", "mlx_affine8_g32", "mlx_affine8_g64", "int4_g32", "int4_g128",
)  # fmt: skip
_HEADS = ("embedding", "per_layer_embedding")  # of a model without an output head of its own
_FLOATS = {"BF16": "bf16", "F16": "f16"}


class _Tensor(Protocol):
    """What a recipe looks at: lowbit.checkpoint's TensorInfo, or a family's TensorSpec."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class _Checkpoint(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...
    def info(self, name: str) -> _Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named rule from tensors to grids.

    weights: the grid of every matrix. The output head (or the embedding that serves as one, and the per-layer embedding
    with it) of a recipe below 8 bits is Q6_K where its rows are whole Q6_K blocks, else Q8_0; for MLX it has 8 bits in
    the same groups. int4 recipes leave embeddings and head unquantized (F32). Vectors (norms, biases) and the router of
    experts stay F32. The projection that makes the inputs of all layers is not quantized: it keeps the source's BF16 or
    F16, or is F32.
    """

    name: str
    weights: str

    def assign(self, checkpoint: _Checkpoint) -> dict[str, str]:
        """Tensor name -> grid name for every tensor. Raises Unsupported where a row is not whole blocks."""
        return self.assign_specs(checkpoint.info(name) for name in checkpoint.names)

    def assign_specs(self, tensors: Iterable[_Tensor]) -> dict[str, str]:
        """The same from all tensors of a model; the embedding is the head where none has the role 'output'."""
        tensors = tuple(tensors)
        heads = ("output",) if any(tensor.role == "output" for tensor in tensors) else _HEADS
        return {tensor.name: self._grid_of(tensor, is_head=tensor.role in heads) for tensor in tensors}

    def trained(self, checkpoint: _Checkpoint) -> tuple[str, ...]:
        """The tensors that quantization-aware training trains: those on a grid below 8 bits with trainable scales."""
        return tuple(name for name, grid in self.assign(checkpoint).items() if _is_trainable(grids.get(grid)))

    def _grid_of(self, info: _Tensor, *, is_head: bool) -> str:
        if len(info.shape) < 2 or info.role == "router":
            return "f32"
        if self.weights.startswith("int4_") and info.role in ("output", *_HEADS):
            return "f32"
        if info.role == "per_layer_model_proj" and grids.get(self.weights).bits_per_weight < 16:
            return _FLOATS.get(getattr(info, "dtype", ""), "f32")  # a TensorSpec has no dtype
        grid, row = grids.get(self.weights), info.shape[-1]
        if is_head and grid.bits_per_weight < 8:
            grid = _head_grid(grid.name, row)
        if row % grid.block_size:
            raise Unsupported(
                f"the rows are not whole {grid.name} blocks",
                where=info.name,
                found=f"rows of {row}",
                expected=f"a multiple of {grid.block_size}",
                hint="lowbit pack --recipe f16 packs it unquantized",
            )
        return grid.name


def get(name: str) -> Recipe:
    """The recipe of that name ('q4_0'). Raises BadOption, which lists the names, for another."""
    if name not in _NAMES:
        raise BadOption("no such recipe", found=repr(name), expected="one of " + ", ".join(_NAMES))
    return Recipe(name=name, weights=name)


def names() -> tuple[str, ...]:
    """Every recipe's name."""
    return _NAMES


def _head_grid(weights: str, row: int) -> grids.Grid:
    if weights.startswith("mlx_affine4_"):
        return grids.get(weights.replace("affine4", "affine8"))
    if "q6_k" in grids.names() and row % grids.get("q6_k").block_size == 0:
        return grids.get("q6_k")
    return grids.get("q8_0")


def _is_trainable(grid: grids.Grid) -> bool:
    return grid.has_scales and grid.bits_per_weight < 8
