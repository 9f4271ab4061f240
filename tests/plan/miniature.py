"""Every public model's layers in miniature: their order and key-value heads, with small sizes."""

from __future__ import annotations

from typing import Any

from lowbit.plan import catalogue

_SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "head_dim": 16, "global_head_dim": 32,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_experts": 4, "top_k_experts": 2,
    "moe_intermediate_size": 16, "query_pre_attn_scalar": 16, "laurel_rank": 4, "max_position_embeddings": 8192,
}  # fmt: skip


def small(name: str, *, window: int | None = None, layers: int | None = None, **changes: Any) -> dict[str, Any]:
    """The config of a public model with its layers (or the first ``layers``) and key-value heads, all else small."""
    [listed] = catalogue.find(name)
    config = {key: _SMALL.get(key, value) for key, value in listed.config.items()}
    if not listed.config.get("hidden_size_per_layer_input", 1):
        config["hidden_size_per_layer_input"] = 0
    if isinstance(listed.config["intermediate_size"], list):
        config["intermediate_size"] = [32] * config["num_hidden_layers"]
    if window and "sliding_window" in config:
        config["sliding_window"] = window
    if layers:
        if config.get("num_kv_shared_layers"):
            config["num_kv_shared_layers"] = layers // 4
        for key in ("layer_types", "intermediate_size"):
            if isinstance(config.get(key), list):
                config[key] = config[key][:layers]
        config["num_hidden_layers"] = layers
    return {**config, **changes}
