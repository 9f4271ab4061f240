"""Qwen 3, dense: Qwen3ForCausalLM.

Like Llama, but each query and key head has a norm of its own, and llama.cpp rotates the two halves of a head as Hugging
Face does, so no rows are reordered. Read from llama.cpp (src/models/qwen3.cpp) and transformers' Qwen3Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.checkpoint.decoder import Decoder, decoder_of, frequencies
from lowbit.checkpoint.families import _decoder_gguf
from lowbit.checkpoint.families.base import (
    Family,
    Gguf,
    Keys,
    LayerCache,
    TensorSpec,
    decoder_tensors,
    mlx_rope,
    rope_of,
)
from lowbit.checkpoint.gguf_file import Field
from lowbit.errors import BadConfig, Unsupported

_ROPE: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",)}
_HEAD_DIM = 128  # what Qwen3Config fills in


class Qwen3(Family):
    name = "qwen3"
    arch = "qwen3"
    model_types = ("qwen3",)
    architectures = ("Qwen3ForCausalLM",)

    def text_config(self, config: Mapping[str, Any], where: object) -> dict[str, Any]:
        keys = Keys(config, where)
        heads = keys.size("num_attention_heads")
        kv_heads = keys.size("num_key_value_heads", heads)
        for key in ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"):
            keys.size(key)
        layers = keys.size("num_hidden_layers", most=10_000)
        keys.number("rms_norm_eps")
        keys.flag("tie_word_embeddings", False)
        keys.only("hidden_act", "silu")
        # llama.cpp has neither for this architecture.
        keys.only("attention_bias", False)
        keys.only("use_sliding_window", False)
        for key in ("sliding_window", "max_window_layers"):  # of no effect without use_sliding_window
            keys.get(key)
        if keys.get("layer_types", ["full_attention"] * layers) != ["full_attention"] * layers:
            raise Unsupported("layer_types has layers that do not attend to everything", where=where)
        head_dim = keys.size("head_dim", _HEAD_DIM)
        if head_dim % 2 or heads % kv_heads:
            raise BadConfig(
                "head_dim must be even and num_attention_heads a multiple of num_key_value_heads",
                where=where, found=f"head_dim {head_dim}, {heads} heads, {kv_heads} key-value heads",
            )  # fmt: skip
        for key in ("rope_parameters", "rope_scaling", "rope_theta"):
            keys.get(key)
        _rope(config, where)
        keys.finish()
        return {**config, "head_dim": head_dim, "num_key_value_heads": kv_heads}

    def tensors(self, config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        hidden, wide, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        heads, kv_heads, vocab = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
        layer = (
            ("self_attn.q_proj", "attn_q", "attn_q", (heads * head_dim, hidden)),
            ("self_attn.k_proj", "attn_k", "attn_k", (kv_heads * head_dim, hidden)),
            ("self_attn.v_proj", "attn_v", "attn_v", (kv_heads * head_dim, hidden)),
            ("self_attn.o_proj", "attn_output", "attn_o", (hidden, heads * head_dim)),
            ("self_attn.q_norm", "attn_q_norm", "norm", (head_dim,)),
            ("self_attn.k_norm", "attn_k_norm", "norm", (head_dim,)),
            ("mlp.gate_proj", "ffn_gate", "ffn_gate", (wide, hidden)),
            ("mlp.up_proj", "ffn_up", "ffn_up", (wide, hidden)),
            ("mlp.down_proj", "ffn_down", "ffn_down", (hidden, wide)),
            ("input_layernorm", "attn_norm", "norm", (hidden,)),
            ("post_attention_layernorm", "ffn_norm", "norm", (hidden,)),
        )
        return decoder_tensors(
            layer, config["num_hidden_layers"], hidden, vocab, tied=bool(config.get("tie_word_embeddings"))
        )

    def cache(self, config: Mapping[str, Any]) -> tuple[LayerCache, ...]:
        head_dim, kv_heads = config["head_dim"], config["num_key_value_heads"]
        return (LayerCache(kv_heads=kv_heads, k_dim=head_dim, v_dim=head_dim),) * config["num_hidden_layers"]

    def ignorable(self, stored_name: str, config: Mapping[str, Any]) -> bool:
        return stored_name == "lm_head.weight" and bool(config.get("tie_word_embeddings"))

    def metadata(self, config: Mapping[str, Any]) -> list[Field]:
        return _decoder_gguf.metadata("qwen3", config, _rope(config, "config"), config["head_dim"])

    def mlx_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, **mlx_rope(_rope(config, "config"))}

    def decoder(self, config: Mapping[str, Any]) -> Decoder:
        head_dim = config["head_dim"]
        return decoder_of(config, head_dim, frequencies(_rope(config, "config"), head_dim))

    def config_from_gguf(self, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object) -> dict:
        keys = Gguf(values, "qwen3", where)
        keys.only(*_decoder_gguf.KEYS)
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": _decoder_gguf.whole_heads(keys, _HEAD_DIM),
            "hidden_act": "silu",
            "model_type": "qwen3",
            "rope_parameters": _decoder_gguf.rope(keys, 10_000.0),
            "use_sliding_window": False,
            **_decoder_gguf.sizes(keys, shapes),
        }


def _rope(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    return rope_of(config, where, _ROPE)


FAMILY = Qwen3()
