"""Recipes: which tensor is stored on which grid, as llama-quantize chooses.

Source: llama_tensor_get_type in llama.cpp (src/llama-quant.cpp), without an importance matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lowbit import grid as grids
from lowbit.errors import BadOption, Unsupported

_NAMES = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4", "q2_k", "q4_k", "q5_k", "q6_k", "q4_k_m", "f16", "bf16",
    "f32",
    "mlx_affine4_g32", "mlx_affine4_g64", "mlx_affine8_g32", "mlx_affine8_g64", "int4_g32", "int4_g128",
    "mobile", "mobile_mlp2", "mobile_w4", "mobile_w8",
)  # fmt: skip
_ALIASES = {"mlx_affine4": "mlx_affine4_g64", "mlx_affine8": "mlx_affine8_g64"}  # mlx-lm's own groups
# Bits of the mobile schema, one scale a row: of embedding and head, of attention, of the feed-forward matrices in the
# first three sevenths of the layers (15 of Gemma 4 E2B's 35) and in the others. "mobile" is Gemma 4 E2B's own.
_MOBILE = {"mobile": (2, 4, 4, 2), "mobile_mlp2": (4, 4, 2, 2), "mobile_w4": (4, 4, 4, 4), "mobile_w8": (8, 8, 8, 8)}
_GATES = ("per_layer_gate", "per_layer_proj")  # in 8 bits on phones
_KEPT_HEAD = 6  # bits a weight from which an embedding or head stays as it is while the rest is trained
# What most of a mix is.
_MIXED = {"q4_k_m": "q4_k", **{name: f"channelwise{bits[1]}" for name, bits in _MOBILE.items()}}
_MIXED_ROLES = ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_down", "experts_down")
# For rows that are not whole blocks of 256.
FALLBACK = {"q2_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
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

    weights: the grid of every matrix, of most in a mix. Rows that are not whole blocks of 256 are on IQ4_NL instead of
    Q2_K, on Q5_0 instead of Q4_K, on Q5_1 instead of Q5_K, on Q8_0 instead of Q6_K. The output head (or the embedding
    that serves as one, and the per-layer embedding with it) of a recipe below 8 bits is Q6_K where its rows are whole
    Q6_K blocks, else Q8_0; for MLX it has 8 bits in the same groups. int4 recipes leave embeddings and head unquantized
    (F32). The mobile recipes put every class of matrices on channelwise integers of its own bits, and per-layer
    embeddings on 4 bits with a scale for 256 weights. Vectors (norms, biases) and the router of experts stay F32. The
    projection that makes the inputs of all layers is not quantized: it keeps the source's BF16 or F16, or is F32.
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
        more = _q4_k_m(tensors) if self.name == "q4_k_m" else {}
        if self.name in _MOBILE:
            more = _mobile(tensors, _MOBILE[self.name])
        return {
            tensor.name: self._grid_of(tensor, more.get(tensor.name, self.weights), is_head=tensor.role in heads)
            for tensor in tensors
        }

    def trained(self, checkpoint: _Checkpoint) -> tuple[str, ...]:
        """The tensors that quantization-aware training trains: those on a trainable grid below 8 bits; of embeddings
        and heads those below 6."""
        return tuple(
            name
            for name, grid in self.assign(checkpoint).items()
            if _is_trainable(grids.get(grid), is_head=checkpoint.info(name).role in ("output", *_HEADS))
        )

    def _grid_of(self, info: _Tensor, weights: str, *, is_head: bool) -> str:
        if len(info.shape) < 2 or info.role == "router":
            return "f32"
        if self.weights.startswith("int4_") and info.role in ("output", *_HEADS):
            return "f32"
        if info.role == "per_layer_model_proj" and grids.get(self.weights).bits_per_weight < 16:
            return _FLOATS.get(getattr(info, "dtype", ""), "f32")  # a TensorSpec has no dtype
        grid, row = grids.get(weights), info.shape[-1]
        if is_head and grid.bits_per_weight < 8 and self.name not in _MOBILE:
            grid = _head_grid(grid.name, row)
        elif row % grid.block_size and weights in FALLBACK:
            grid = grids.get(FALLBACK[weights])
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
    name = _ALIASES.get(name, name)
    if name not in _NAMES:
        raise BadOption("no such recipe", found=repr(name), expected="one of " + ", ".join(_NAMES))
    return Recipe(name=name, weights=_MIXED.get(name, name))


def several(text: str) -> tuple[Recipe, ...]:
    """The recipes of names with commas between them ('q4_0,mlx_affine4'), each once. Raises BadOption."""
    found = tuple(dict.fromkeys(get(name.strip()) for name in text.split(",")))
    return found


def names() -> tuple[str, ...]:
    """Every recipe's name."""
    return _NAMES


def _q4_k_m(tensors: Sequence[_Tensor]) -> dict[str, str]:
    """The grids of those matrices that the mix Q4_K_M does not put on Q4_K, but for the head."""
    layers = {tensor.name: int(match[1]) for tensor in tensors if (match := re.search(r"layers\.(\d+)\.", tensor.name))}
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    ordered = sorted((t for t in tensors if t.name in layers), key=lambda t: layers[t.name])
    names = {role: [t.name for t in ordered if t.role == role] for role in _MIXED_ROLES}
    n_layers = 1 + max(layers.values(), default=0)
    n_experts = max((shape[0] for shape in shapes.values() if len(shape) == 3), default=1)
    values, found = names["attn_v"], dict[str, str]()
    for i, name in enumerate(values):
        if _takes_more_bits(i, len(values)):
            found[name] = "q6_k"
        elif n_layers == 80 and _groups_queries(shapes, names["attn_q"][:1] + values[:1]):
            found[name] = "q5_k"  # in the 70B models eight heads share these weights, so that more bits cost little
    if n_experts == 8:
        found |= dict.fromkeys(names["attn_v"] + names["attn_k"], "q8_0") | dict.fromkeys(names["attn_o"], "q5_k")
    # With experts the layer's number counts, without them the place among the tensors of this kind.
    down = [(layers[name] if n_experts > 1 else i, name) for i, name in enumerate(names["ffn_down"])]
    down += [(layers[name], name) for name in names["experts_down"]]
    return found | {name: "q6_k" for i, name in down if _takes_more_bits(i, n_layers)}


def _groups_queries(shapes: Mapping[str, tuple[int, ...]], query_and_value: Sequence[str]) -> bool:
    return len({shapes[name][0] for name in query_and_value}) > 1


def _takes_more_bits(i: int, n: int) -> bool:
    """The first and the last eighth of the layers, and every third between: use_more_bits of llama-quant.cpp."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _head_grid(weights: str, row: int) -> grids.Grid:
    if weights.startswith("mlx_affine4_"):
        return grids.get(weights.replace("affine4", "affine8"))
    if "q6_k" in grids.names() and row % grids.get("q6_k").block_size == 0:
        return grids.get("q6_k")
    return grids.get("q8_0")


def _mobile(tensors: Sequence[_Tensor], bits: tuple[int, int, int, int]) -> dict[str, str]:
    """The grids of those matrices that are not in as many bits as the schema gives to attention."""
    head, _, early, late = bits
    layers = {tensor.name: int(match[1]) for tensor in tensors if (match := re.search(r"layers\.(\d+)\.", tensor.name))}
    n_layers = 1 + max(layers.values(), default=0)
    found = {}
    for tensor in tensors:
        if tensor.role == "per_layer_embedding":
            found[tensor.name] = "int4_g256" if tensor.shape[-1] % 256 == 0 else "channelwise4"
        elif tensor.role in ("output", "embedding"):
            found[tensor.name] = f"channelwise{head}"
        elif tensor.role in _GATES:
            found[tensor.name] = "channelwise8"
        elif tensor.role.startswith(("ffn_", "experts_")):
            found[tensor.name] = f"channelwise{early if 7 * layers[tensor.name] < 3 * n_layers else late}"
    return found


def _is_trainable(grid: grids.Grid, *, is_head: bool) -> bool:
    return grid.is_trainable and grid.bits_per_weight < (_KEPT_HEAD if is_head else 8)
