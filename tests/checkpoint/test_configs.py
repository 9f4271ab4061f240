"""Configs as released models carry them, written by transformers 4: accepted whole, and the right numbers in GGUF."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowbit.checkpoint import families
from lowbit.errors import Unsupported

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "transformers_version": "4.42.3",
    "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
LLAMA_3_2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN_3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}  # fmt: skip


def metadata(config: dict[str, Any]) -> dict[str, Any]:
    family = families.by_config(config, "config.json")
    return {field.key: field.value for field in family.metadata(family.text_config(config, "config.json"))}


def test_smollm2() -> None:
    values = metadata(SMOLLM2)
    assert values["llama.rope.freq_base"] == 100000.0
    assert values["llama.attention.key_length"] == values["llama.rope.dimension_count"] == 64


def test_llama_3_2() -> None:
    assert metadata(LLAMA_3_2)["llama.rope.freq_base"] == 500000.0
    factors = families.by_config(LLAMA_3_2, "config.json").computed(LLAMA_3_2)["rope_freqs.weight"]
    # Fast frequencies stay, slow ones are divided by the factor, and none in between goes back.
    assert factors.shape == (32,)
    assert (factors[:13] == 1.0).all()
    assert (factors[-10:] == 32.0).all()
    assert (np.diff(factors) >= 0).all()


def test_qwen_3() -> None:
    values = metadata(QWEN_3_0_6B)
    assert (values["qwen3.rope.freq_base"], values["qwen3.attention.key_length"]) == (1000000.0, 128)
    for changed in (
        {"use_sliding_window": True},
        {"attention_bias": True},
        {"layer_types": ["sliding_attention"] * 28},
    ):
        with pytest.raises(Unsupported, match=next(iter(changed))):
            metadata(QWEN_3_0_6B | changed)


def test_gemma_3_1b() -> None:
    values = metadata(GEMMA_3_1B)
    assert (values["gemma3.rope.freq_base"], values["gemma3.attention.sliding_window"]) == (1000000.0, 512)
    assert "gemma3.rope.scaling.type" not in values


def test_gemma_3_4b_fills_in_what_transformers_fills_in() -> None:
    from transformers import Gemma3TextConfig

    values = metadata(GEMMA_3_4B)
    filled = Gemma3TextConfig(**GEMMA_3_4B["text_config"])  # type: ignore[arg-type]
    assert values["gemma3.attention.head_count"] == filled.num_attention_heads == 8
    assert values["gemma3.attention.head_count_kv"] == filled.num_key_value_heads == 4
    assert values["gemma3.attention.key_length"] == filled.head_dim == 256
    assert values["gemma3.context_length"] == filled.max_position_embeddings == 131072
    assert (values["gemma3.rope.scaling.type"], values["gemma3.rope.scaling.factor"]) == ("linear", 8.0)
