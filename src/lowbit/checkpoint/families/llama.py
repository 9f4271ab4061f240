"""Llama, SmolLM2 and what else is LlamaForCausalLM.

GGUF's ``llama`` rotates neighbouring pairs where Hugging Face rotates the two halves of a head, so the rows of q and
k are reordered in the file. Read from llama.cpp (src/llama-model.cpp, LLM_ARCH_LLAMA) and transformers' LlamaConfig.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit.checkpoint.decoder import Decoder, decoder_of, frequencies
from lowbit.checkpoint.families import _decoder_gguf
from lowbit.checkpoint.families.base import (
    Family,
    Gguf,
    Keys,
    LayerCache,
    TensorSpec,
    mlx_rope,
    rope_of,
    uint,
)
from lowbit.checkpoint.gguf_file import Field
from lowbit.errors import BadConfig, Unsupported

_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# The settings that released Llama 3.1 and 3.2 models have; a GGUF stores only what they compute.
_LLAMA3_RELEASED = tuple(
    {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0)
)
_ROPE_FREQS = "rope_freqs.weight"


class Llama(Family):
    name = "llama"
    arch = "llama"
    model_types = ("llama",)
    architectures = ("LlamaForCausalLM",)

    def text_config(self, config: Mapping[str, Any], where: object) -> dict[str, Any]:
        keys = Keys(config, where)
        hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
        kv_heads = keys.size("num_key_value_heads", heads)
        for key in ("intermediate_size", "vocab_size", "max_position_embeddings"):
            keys.size(key)
        keys.size("num_hidden_layers", most=10_000)
        keys.number("rms_norm_eps")
        keys.flag("tie_word_embeddings", False)
        keys.flag("attention_bias", False)
        keys.flag("mlp_bias", False)
        keys.only("hidden_act", "silu")
        keys.only("pretraining_tp", 1)
        keys.only("rope_interleaved", False)
        keys.only("is_llama_config", True)
        if "head_dim" not in config and hidden % heads:
            raise BadConfig("hidden_size is not a multiple of num_attention_heads", where=where, found=hidden)
        head_dim = keys.size("head_dim", hidden // heads)
        if head_dim % 2 or heads % kv_heads:
            raise BadConfig(
                "head_dim must be even and num_attention_heads a multiple of num_key_value_heads",
                where=where, found=f"head_dim {head_dim}, {heads} heads, {kv_heads} key-value heads",
            )  # fmt: skip
        for key in ("rope_parameters", "rope_scaling", "rope_theta"):
            keys.get(key)
        _rope(config, where)
        keys.finish()
        return dict(config)

    def tensors(self, config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        hidden, wide, head_dim = config["hidden_size"], config["intermediate_size"], _head_dim(config)
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        vocab = config["vocab_size"]
        attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
        # Hugging Face name, GGUF name, role, shape, heads whose rows GGUF interleaves, has a bias
        layer = (
            ("self_attn.q_proj", "attn_q", "attn_q", (heads * head_dim, hidden), heads, attention_bias),
            ("self_attn.k_proj", "attn_k", "attn_k", (kv_heads * head_dim, hidden), kv_heads, attention_bias),
            ("self_attn.v_proj", "attn_v", "attn_v", (kv_heads * head_dim, hidden), 0, attention_bias),
            ("self_attn.o_proj", "attn_output", "attn_o", (hidden, heads * head_dim), 0, attention_bias),
            ("mlp.gate_proj", "ffn_gate", "ffn_gate", (wide, hidden), 0, mlp_bias),
            ("mlp.up_proj", "ffn_up", "ffn_up", (wide, hidden), 0, mlp_bias),
            ("mlp.down_proj", "ffn_down", "ffn_down", (hidden, wide), 0, mlp_bias),
            ("input_layernorm", "attn_norm", "norm", (hidden,), 0, False),
            ("post_attention_layernorm", "ffn_norm", "norm", (hidden,), 0, False),
        )
        specs = [
            TensorSpec(
                name="model.embed_tokens.weight", gguf_name="token_embd.weight", role="embedding", shape=(vocab, hidden)
            )
        ]
        for i in range(config["num_hidden_layers"]):
            for ours, theirs, role, shape, n, has_bias in layer:
                ours, theirs = f"model.layers.{i}.{ours}", f"blk.{i}.{theirs}"
                weight, bias = (f"{ours}.weight", f"{theirs}.weight"), (f"{ours}.bias", f"{theirs}.bias")
                specs.append(TensorSpec(name=weight[0], gguf_name=weight[1], role=role, shape=shape, heads=n))
                if has_bias:
                    specs.append(TensorSpec(name=bias[0], gguf_name=bias[1], role="bias", shape=shape[:1], heads=n))
        specs.append(TensorSpec(name="model.norm.weight", gguf_name="output_norm.weight", role="norm", shape=(hidden,)))
        if not config.get("tie_word_embeddings"):
            specs.append(
                TensorSpec(name="lm_head.weight", gguf_name="output.weight", role="output", shape=(vocab, hidden))
            )
        return tuple(specs)

    def cache(self, config: Mapping[str, Any]) -> tuple[LayerCache, ...]:
        head_dim, kv_heads = _head_dim(config), config.get("num_key_value_heads") or config["num_attention_heads"]
        return (LayerCache(kv_heads=kv_heads, k_dim=head_dim, v_dim=head_dim),) * config["num_hidden_layers"]

    def ignorable(self, stored_name: str, config: Mapping[str, Any]) -> bool:
        tied_head = stored_name == "lm_head.weight" and bool(config.get("tie_word_embeddings"))
        return tied_head or stored_name.endswith(".rotary_emb.inv_freq")  # old releases saved this constant

    def metadata(self, config: Mapping[str, Any]) -> list[Field]:
        head_dim, rope = _head_dim(config), _rope(config, "config")
        own = [uint("llama.rope.dimension_count", head_dim), uint("llama.vocab_size", config["vocab_size"])]
        return _decoder_gguf.metadata("llama", config, rope, head_dim) + own

    def mlx_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, **mlx_rope(_rope(config, "config"))}

    def decoder(self, config: Mapping[str, Any]) -> Decoder:
        head_dim, rope = _head_dim(config), _rope(config, "config")
        factors = self.computed(config).get(_ROPE_FREQS)
        return decoder_of(config, head_dim, frequencies(rope, head_dim, factors))

    def config_from_gguf(self, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object) -> dict:
        keys = Gguf(values, "llama", where)
        keys.only(*_decoder_gguf.KEYS, "expert_count", "expert_used_count", "tensor_data_layout")
        if keys.get("expert_count", 0):
            raise Unsupported("mixture-of-experts models are not supported", where=where, found="llama.expert_count")
        sizes = _decoder_gguf.sizes(keys, shapes)
        head_dim = _decoder_gguf.whole_heads(keys, sizes["hidden_size"] // sizes["num_attention_heads"])
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": "blk.0.attn_q.bias" in shapes,
            "mlp_bias": "blk.0.ffn_up.bias" in shapes,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "model_type": "llama",
            "rope_parameters": _decoder_gguf.rope(keys, 10_000.0),
            **sizes,
        }

    def computed(self, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
        rope = _rope(config, "config")
        return {_ROPE_FREQS: _llama3_factors(rope, _head_dim(config))} if rope["rope_type"] == "llama3" else {}

    def adopt_computed(self, config: dict[str, Any], name: str, values: np.ndarray, where: object) -> None:
        """Finds the released rope setting that gives a GGUF's rope_freqs."""
        head_dim = _head_dim(config)
        fits = name == _ROPE_FREQS and values.shape == (head_dim // 2,)  # the config may claim any size still
        for setting in _LLAMA3_RELEASED if fits else ():
            rope = config["rope_parameters"] | {"rope_type": "llama3"} | setting
            if np.allclose(_llama3_factors(rope, head_dim), values, rtol=1e-5):
                config["rope_parameters"] = rope
                return
        raise Unsupported("this tensor does not follow from a known config", where=f"{where}: {name}")


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rope(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    return rope_of(config, where, _ROPE)


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """What each rotary frequency is divided by, (head_dim / 2,) float32.

    Llama 3.1's rule (transformers, modeling_rope_utils): wavelengths that the old context held many times stay, those
    it did not hold once are stretched by the factor, and those between are mixed.
    """
    frequency = rope["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the old context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    mix = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - mix) / rope["factor"] + mix)).astype(np.float32)


FAMILY = Llama()
