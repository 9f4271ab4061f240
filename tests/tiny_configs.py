"""Configs of the tiny random models that the tests make."""

from __future__ import annotations

from typing import Any

TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
TINY_GEMMA3: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

TINY_QWEN3: dict[str, Any] = TINY_LLAMA | {"head_dim": 32}

# Gemma 4's layouts, each in the proportions of the released size that it is named after.
TINY_GEMMA4: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 64, "sliding_window": 16, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 2, "max_position_embeddings": 512, "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
}  # fmt: skip
GEMMA4_LAYOUTS: dict[str, dict[str, Any]] = {
    "E2B": {
        "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 320, "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True, "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
    "31B": {"num_global_key_value_heads": 1, "attention_k_eq_v": True},
    "26B-A4B": {
        "num_global_key_value_heads": 1, "attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 8,
        "top_k_experts": 2, "moe_intermediate_size": 32,
    },
    "12B": {"num_global_key_value_heads": 1, "attention_k_eq_v": True},
}  # fmt: skip
