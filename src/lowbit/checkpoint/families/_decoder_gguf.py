"""What the GGUFs of decoders whose layers are all alike share: Llama, Qwen 3 and Gemma 3 differ in a few keys.

Source: gguf-py's constants.py and llama.cpp's llama-model.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.checkpoint.families.base import Gguf, real, text, uint
from lowbit.checkpoint.gguf_file import Field
from lowbit.errors import BadFile, Unsupported

KEYS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "vocab_size",
)  # fmt: skip


def metadata(arch: str, config: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int) -> list[Field]:
    """``<arch>.*`` of a checked config; ``rope`` are the rotary parameters that GGUF has keys for."""
    heads = config["num_attention_heads"]
    fields = [
        uint(f"{arch}.block_count", config["num_hidden_layers"]),
        uint(f"{arch}.context_length", config["max_position_embeddings"]),
        uint(f"{arch}.embedding_length", config["hidden_size"]),
        uint(f"{arch}.feed_forward_length", config["intermediate_size"]),
        uint(f"{arch}.attention.head_count", heads),
        uint(f"{arch}.attention.head_count_kv", config.get("num_key_value_heads") or heads),
        real(f"{arch}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"]),
        uint(f"{arch}.attention.key_length", head_dim),
        uint(f"{arch}.attention.value_length", head_dim),
        real(f"{arch}.rope.freq_base", rope["rope_theta"]),
    ]
    if rope["rope_type"] == "linear":
        fields += [text(f"{arch}.rope.scaling.type", "linear"), real(f"{arch}.rope.scaling.factor", rope["factor"])]
    return fields


def sizes(keys: Gguf, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The part of a config that these keys and the tensors' shapes tell. Raises BadFile."""
    heads = keys.size("attention.head_count")
    if "token_embd.weight" not in shapes:
        raise BadFile("the tensor token_embd.weight is missing", where=keys.where)
    return {
        "hidden_size": keys.size("embedding_length"),
        "intermediate_size": keys.size("feed_forward_length"),
        "max_position_embeddings": keys.size("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": keys.size("block_count"),
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "vocab_size": shapes["token_embd.weight"][0],
        **keys.token_ids(),
    }


def rope(keys: Gguf, theta: float) -> dict[str, Any]:
    """Rotary parameters; ``theta`` where the file does not say. Raises Unsupported for a scaling that is not run."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", theta)}
    kind = keys.get("rope.scaling.type", "none")
    if kind == "linear":
        return found | {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    if kind != "none":
        raise Unsupported("this rope scaling is not supported", where=keys.where, found=kind)
    return found


def whole_heads(keys: Gguf, default: int) -> int:
    """The head size. Raises Unsupported where only a part of each head is rotated."""
    head_dim = keys.size("attention.key_length", default)
    if keys.size("rope.dimension_count", head_dim) != head_dim:
        raise Unsupported("rotary embedding of a part of the head is not supported", where=keys.where)
    return head_dim
