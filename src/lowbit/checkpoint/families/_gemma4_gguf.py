"""Gemma 4's text config read back from a GGUF, whose key-values say each layer's sizes and no rule for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit.checkpoint.families._gemma4 import FULL, ROPE_FREQS, WINDOW, checked_layer_types, layers, rope_freqs
from lowbit.checkpoint.families.base import Gguf
from lowbit.errors import BadFile, Unsupported

KEYS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "attention.key_length_swa", "attention.value_length_swa", "attention.sliding_window",
    "attention.sliding_window_pattern", "attention.shared_kv_layers", "embedding_length_per_layer_input",
    "expert_count", "expert_used_count", "expert_feed_forward_length", "final_logit_softcapping", "rope.freq_base",
    "rope.freq_base_swa", "rope.dimension_count", "rope.dimension_count_swa", "vocab_size",
)  # fmt: skip
_SOFTCAP = 30.0  # llama.cpp's, where a file does not say


def config_from_gguf(keys: Gguf, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A text config rebuilt from a GGUF's key-values; the caller has refused unknown keys."""
    n_layers = keys.size("block_count")
    pattern = keys.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list) or len(pattern) != n_layers:
        what = f"bad value for {keys.arch}.attention.sliding_window_pattern"
        raise BadFile(what, where=keys.where, found=repr(pattern)[:60], expected=f"{n_layers} truth values")
    for name in ("token_embd.weight", ROPE_FREQS):
        if name not in shapes:
            raise BadFile(f"the tensor {name} is missing", where=keys.where)
    kinds = checked_layer_types([WINDOW if window else FULL for window in pattern], n_layers, keys.where)
    wide, kv_heads = keys.each("feed_forward_length", n_layers), keys.each("attention.head_count_kv", n_layers)
    dims = {FULL: keys.size("attention.key_length"), WINDOW: keys.size("attention.key_length_swa")}
    _check_dims(keys, dims)
    shared, per_layer = keys.count("attention.shared_kv_layers"), keys.count("embedding_length_per_layer_input")
    vocab, by_kind = shapes["token_embd.weight"][0], dict(zip(kinds, kv_heads, strict=True))
    owners = [i for i, kind in enumerate(kinds) if kind == FULL and i < n_layers - shared]
    config: dict[str, Any] = {
        "attention_bias": False,
        "attention_k_eq_v": any(f"blk.{i}.attn_v.weight" not in shapes for i in owners),
        "final_logit_softcapping": _softcap(keys),
        "global_head_dim": dims[FULL],
        "head_dim": dims[WINDOW],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": keys.size("embedding_length"),
        "hidden_size_per_layer_input": per_layer,
        "intermediate_size": wide[0],
        "layer_types": kinds,
        "max_position_embeddings": keys.size("context_length"),
        "model_type": "gemma4_text",
        "num_attention_heads": keys.size("attention.head_count"),
        "num_global_key_value_heads": by_kind[FULL],
        "num_hidden_layers": n_layers,
        "num_key_value_heads": by_kind[WINDOW],
        "num_kv_shared_layers": shared,
        "per_layer_config": {
            str(i): {"head_dim": dims[FULL], "num_key_value_heads": by_kind[FULL]}
            for i, kind in enumerate(kinds)
            if kind == FULL
        },
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10_000.0)},
            WINDOW: {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10_000.0)},
        },
        "sliding_window": keys.size("attention.sliding_window"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "use_bidirectional_attention": None,
        "use_double_wide_mlp": wide[-1] == 2 * wide[0],
        "vocab_size": vocab,
        "vocab_size_per_layer_input": vocab if per_layer else 0,
        **keys.token_ids(),
    }
    config |= _experts(keys)
    _check_rule(config, keys, list(zip(kv_heads, wide, strict=True)))
    return config


def _experts(keys: Gguf) -> dict[str, Any]:
    if not keys.count("expert_count"):
        return {"enable_moe_block": False}
    return {
        "enable_moe_block": True,
        "num_experts": keys.size("expert_count"),
        "top_k_experts": keys.size("expert_used_count"),
        "moe_intermediate_size": keys.size("expert_feed_forward_length"),
    }


def _check_rule(config: Mapping[str, Any], keys: Gguf, found: list[tuple[int, int]]) -> None:
    """Refuses layers whose (key-value heads, size of the MLP) are not what the config's few numbers make of them."""
    if [(layer.kv_heads, layer.wide) for layer in layers(config)] != found:
        raise Unsupported("the layers' sizes follow no rule that Gemma 4 has", where=keys.where)


def _softcap(keys: Gguf) -> float | None:
    key = "final_logit_softcapping"
    return None if keys.get(key) == 0 else keys.number(key, _SOFTCAP)


def _check_dims(keys: Gguf, dims: Mapping[str, int]) -> None:
    for key, kind in (
        ("attention.value_length", FULL),
        ("rope.dimension_count", FULL),
        ("attention.value_length_swa", WINDOW),
        ("rope.dimension_count_swa", WINDOW),
    ):
        if keys.size(key, dims[kind]) != dims[kind]:
            raise Unsupported(
                "a head whose keys, values and rotation differ in size is not run for Gemma 4", where=keys.where,
                found=f"{keys.arch}.{key} {keys.get(key)}", expected=dims[kind],
            )  # fmt: skip


def adopt_rope_freqs(config: dict[str, Any], values: np.ndarray, where: object) -> None:
    """Puts the part of a head that a GGUF's rope_freqs rotates into the config rebuilt from that GGUF."""
    part = float((values == 1.0).mean())
    rope = config["rope_parameters"][FULL]
    fits = part and values.shape == (config["global_head_dim"] // 2,)  # the config may claim any size still
    # The product with the head's size is rounded down, so a quotient may need its next number.
    for factor in (part, float(np.nextafter(part, 1.0))) if fits else ():
        rope |= {"rope_type": "proportional", "partial_rotary_factor": factor}
        if np.array_equal(rope_freqs(config), values):
            return
    raise Unsupported("this tensor does not follow from a known config", where=f"{where}: {ROPE_FREQS}")
