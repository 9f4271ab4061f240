"""The layer patterns of released models, narrow: which layers slide, share and own keys, with the heads of each kind as
released and their sizes divided by 8 (or 4 where 8 would leave less than a block of 32), and the windows as they are.

Sources: the released config.json files; shared layers and patterns as in google-deepmind/gemma (gm/nn).
"""

from __future__ import annotations

import random
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
_NARROW: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768, "torch_dtype": "bfloat16",
}  # fmt: skip


def _llama(layers: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return _NARROW | {
        "model_type": "llama", "num_hidden_layers": layers, "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "tie_word_embeddings": True,
    }  # fmt: skip


def _gemma3(layers: int, kv_heads: int, window: int, head_dim: int = 32) -> dict[str, Any]:
    heads = 2 * kv_heads
    # llama.cpp takes the scale of the 27B from the width of the model.
    scale = head_dim if layers != 62 else _NARROW["hidden_size"] // heads
    return _NARROW | {
        "model_type": "gemma3_text", "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "query_pre_attn_scalar": scale,
        "sliding_window": window,
    }  # fmt: skip


def _gemma3n(layers: int) -> dict[str, Any]:
    return _NARROW | {
        "model_type": "gemma3n_text", "num_hidden_layers": layers, "num_kv_shared_layers": layers - 20,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 512,
        "vocab_size_per_layer_input": 300,
    }  # fmt: skip


def _gemma4(
    layers: int, kv_heads: int, full_heads: int, window: int, *, period: int = 6, **more: Any
) -> dict[str, Any]:
    types = [FULL if (i + 1) % period == 0 else SLIDING for i in range(layers)]
    types[-1] = FULL
    return _NARROW | {
        "model_type": "gemma4_text", "num_hidden_layers": layers, "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads, "num_global_key_value_heads": full_heads, "head_dim": 32,
        "global_head_dim": 64, "sliding_window": window, "layer_types": types, "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": full_heads != kv_heads, **more,
    }  # fmt: skip


_PER_LAYER = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 320}
LAYOUTS: dict[str, dict[str, Any]] = {
    "SmolLM2 135M": _llama(30, 3, 32),
    "Llama 3.2 1B": _llama(16, 8, 32),
    "Llama 3.1 8B": _llama(32, 8, 32),
    "Qwen 3 0.6B": _llama(28, 8, 32) | {"model_type": "qwen3"},
    "Qwen 3 32B": _llama(64, 8, 32) | {"model_type": "qwen3", "tie_word_embeddings": False},
    "Gemma 3 270M": _gemma3(18, 1, 512),
    "Gemma 3 1B": _gemma3(26, 1, 512),
    "Gemma 3 4B": _gemma3(34, 4, 1024),
    "Gemma 3 12B": _gemma3(48, 8, 1024),
    "Gemma 3 27B": _gemma3(62, 16, 1024),
    "Gemma 3n E2B": _gemma3n(30),
    "Gemma 3n E4B": _gemma3n(35),
    "Gemma 4 E2B": _gemma4(35, 1, 1, 512, period=5, num_kv_shared_layers=20, use_double_wide_mlp=True, **_PER_LAYER),
    "Gemma 4 E4B": _gemma4(42, 2, 2, 512, num_kv_shared_layers=18, **_PER_LAYER),
    "Gemma 4 12B": _gemma4(48, 8, 1, 1024) | {"model_type": "gemma4_unified_text"},
    "Gemma 4 26B-A4B": _gemma4(
        30, 8, 2, 1024, enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=32
    ),
    "Gemma 4 31B": _gemma4(60, 16, 4, 1024),
}


def drafter(target: dict[str, Any], *, layers: int = 4) -> dict[str, Any]:
    """A drafter for a Gemma 4 of these layouts."""
    kinds = [SLIDING] * (layers - 1) + [FULL]
    own = {"hidden_size": 32, "num_hidden_layers": layers, "num_kv_shared_layers": layers, "layer_types": kinds}
    text = target | own | {"hidden_size_per_layer_input": 0, "use_double_wide_mlp": False, "enable_moe_block": False}
    unified = target["model_type"] == "gemma4_unified_text"
    for key in ("num_experts", "top_k_experts", "moe_intermediate_size", "vocab_size_per_layer_input"):
        text.pop(key, None)
    return {
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant", "text_config": text,
        "backbone_hidden_size": target["hidden_size"],
    }  # fmt: skip


def combinations(n: int, seed: int) -> list[dict[str, Any]]:
    """``n`` different settings of plan.PlanOptions, drawn from all that llama.cpp accepts."""
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    while len(found) < n:
        flash = rng.random() < 0.75
        types = ["f16", "bf16", "f32"] + ["q8_0", "q4_0", "q5_1", "iq4_nl"] * flash
        settings = {
            "context": rng.choice([300, 512, 1000, 2048, 3000, 4096, 8192]), "slots": rng.choice([1, 2, 3, 4, 7]),
            "kv_unified": rng.random() < 0.5, "swa_full": rng.random() < 0.25, "ubatch": rng.choice([32, 100, 512]),
            "kv_type_k": rng.choice([*types, "q8_0", "q4_0"]), "kv_type_v": rng.choice(types),
            "flash_attention": rng.choice([True, None]) if flash else False,
        }  # fmt: skip
        if settings not in found:
            found.append(settings)
    return found
