"""What a decoder-only model computes, for containers that hold the computation and not only the weights (LiteRT-LM).

A family says it once (``Family.decoder``); which tensors there are, biases, norms of queries and keys and norms after
attention and feed-forward, is told by its list of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The numbers of a model whose layers are attention, then a gated feed-forward, each behind an RMS norm.

    heads, kv_heads, head_dim: of attention. epsilon: of the norms; norm_offset: what is added to a stored norm before
    it multiplies (1 of Gemma). embedding_scale: what a token's row is multiplied by. query_scale: what queries are
    multiplied by before they meet keys. activation: 'silu' or 'gelu_tanh'.
    frequencies: for each layer the rotary frequencies (head_dim / 2,) float32, halves rotated against each other.
    windows: for each layer the tokens that it attends to, None for all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    activation: str
    query_scale: float
    frequencies: tuple[np.ndarray, ...]
    windows: tuple[int | None, ...]
    embedding_scale: float = 1.0
    norm_offset: float = 0.0


def frequencies(rope: Mapping[str, Any], head_dim: int, factors: np.ndarray | None = None) -> np.ndarray:
    """Rotary frequencies (head_dim / 2,) float32 of a rope of type default or linear; ``factors`` divide them further.

    Source: transformers, modeling_rope_utils.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    found = np.float32(1) / np.float32(rope["rope_theta"]) ** exponents
    if rope["rope_type"] == "linear":
        found = found / np.float32(rope["factor"])
    return found if factors is None else found / factors


def decoder_of(config: Mapping[str, Any], head_dim: int, rotary: np.ndarray) -> Decoder:
    """That of Llama and its like: SiLU, all layers alike, attention to everything."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    return Decoder(
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        epsilon=config["rms_norm_eps"],
        activation="silu",
        query_scale=head_dim**-0.5,
        frequencies=(rotary,) * layers,
        windows=(None,) * layers,
    )
