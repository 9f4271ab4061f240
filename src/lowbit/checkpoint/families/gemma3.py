"""Gemma 3, the text model: Gemma3ForCausalLM, and the text part of Gemma3ForConditionalGeneration.

llama.cpp takes these from nowhere but its code, so a config must agree with them: every sixth layer attends to
everything and the others to a window, window layers rotate with base 10,000, logits are not capped, queries are
scaled by the head's size. Read from llama.cpp (src/models/gemma3.cpp) and transformers' Gemma3TextConfig.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lowbit.checkpoint.decoder import Decoder, frequencies
from lowbit.checkpoint.families import _decoder_gguf
from lowbit.checkpoint.families.base import (
    Family,
    Gguf,
    Keys,
    LayerCache,
    TensorSpec,
    decoder_tensors,
    mlx_rope,
    multimodal_name,
    rope_parameters,
    uint,
)
from lowbit.checkpoint.gguf_file import Field
from lowbit.errors import BadConfig, Unsupported

_PERIOD = 6
_LOCAL_THETA, _GLOBAL_THETA = 10_000.0, 1_000_000.0
_GLOBAL_ROPE = {"default": (), "linear": ("factor",)}
_LOCAL_ROPE: dict[str, tuple[str, ...]] = {"default": ()}
# What Gemma3TextConfig fills in; the released multimodal configs leave these out of their text_config.
_DEFAULTS = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_27B_LAYERS = 62


class Gemma3(Family):
    name = "gemma3"
    arch = "gemma3"
    model_types = ("gemma3_text", "gemma3")
    architectures = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")

    def text_config(self, config: Mapping[str, Any], where: object) -> dict[str, Any]:
        defaults: dict[str, Any] = {}
        if config.get("model_type") == "gemma3":
            config, defaults = _text_part(config, where), _DEFAULTS
        keys = Keys(config, where, defaults)
        sizes: dict[str, Any] = {
            key: keys.size(key, most=10_000 if key == "num_hidden_layers" else 1 << 31)
            for key in _DEFAULTS
            if key != "rms_norm_eps"
        }
        sizes["rms_norm_eps"] = keys.number("rms_norm_eps")
        if not keys.flag("tie_word_embeddings", True):
            # llama.cpp would read an output.weight, but no released Gemma 3 has one and transformers ties by default.
            sizes["tie_word_embeddings"] = False
        keys.only("hidden_activation", "gelu_pytorch_tanh")
        keys.only("hidden_act", "gelu_pytorch_tanh")
        for key, value in (("attention_bias", False), ("use_bidirectional_attention", False)):
            keys.only(key, value)
        keys.only("attn_logit_softcapping")
        keys.only("final_logit_softcapping")
        keys.only("cache_implementation", "hybrid")
        keys.only("sliding_window_pattern", _PERIOD)
        keys.only("_sliding_window_pattern", _PERIOD)
        _check_layers(keys.get("layer_types"), sizes["num_hidden_layers"], where)
        _check_heads(sizes, where)
        for key in ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"):
            keys.get(key)
        _ropes(config, where)
        keys.finish()
        return {**config, **sizes}

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
            ("post_attention_layernorm", "post_attention_norm", "norm", (hidden,)),
            ("pre_feedforward_layernorm", "ffn_norm", "norm", (hidden,)),
            ("post_feedforward_layernorm", "post_ffw_norm", "norm", (hidden,)),
        )
        tied = config.get("tie_word_embeddings") is not False
        # Hugging Face multiplies by (1 + norm), llama.cpp by what the file holds.
        return decoder_tensors(layer, config["num_hidden_layers"], hidden, vocab, tied=tied, norm_offset=1.0)

    def cache(self, config: Mapping[str, Any]) -> tuple[LayerCache, ...]:
        head_dim, kv_heads = config["head_dim"], config["num_key_value_heads"]
        return tuple(
            LayerCache(
                kv_heads=kv_heads, k_dim=head_dim, v_dim=head_dim,
                window=config["sliding_window"] if kind == "sliding_attention" else None,
            )
            for kind in _layer_types(config["num_hidden_layers"])
        )  # fmt: skip

    def stored_name(self, name: str, stored: Collection[str]) -> str:
        return multimodal_name(name, stored)

    def ignorable(self, stored_name: str, config: Mapping[str, Any]) -> bool:
        tied = config.get("tie_word_embeddings") is not False
        return stored_name.startswith(_OTHER_PARTS) or (tied and stored_name.endswith("lm_head.weight"))

    def metadata(self, config: Mapping[str, Any]) -> list[Field]:
        fields = _decoder_gguf.metadata("gemma3", config, _ropes(config, "config")[0], config["head_dim"])
        return [*fields, uint("gemma3.attention.sliding_window", config["sliding_window"])]

    def mlx_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        full, local = _ropes(config, "config")
        return {
            **config, **mlx_rope(full), "rope_local_base_freq": local["rope_theta"], "sliding_window_pattern": _PERIOD,
        }  # fmt: skip

    def decoder(self, config: Mapping[str, Any]) -> Decoder:
        head_dim, cache = config["head_dim"], self.cache(config)
        full, local = (frequencies(rope, head_dim) for rope in _ropes(config, "config"))
        return Decoder(
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=head_dim,
            epsilon=config["rms_norm_eps"],
            activation="gelu_tanh",
            query_scale=config["query_pre_attn_scalar"] ** -0.5,
            frequencies=tuple(full if layer.window is None else local for layer in cache),
            windows=tuple(layer.window for layer in cache),
            embedding_scale=config["hidden_size"] ** 0.5,
            norm_offset=1.0,
        )

    def config_from_gguf(self, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object) -> dict:
        keys = Gguf(values, "gemma3", where)
        own = ("attention.sliding_window", "rope.freq_base_swa", "attention.sliding_window_pattern")
        keys.only(*_decoder_gguf.KEYS, *own)
        period, local_theta = keys.get("attention.sliding_window_pattern", _PERIOD), keys.get("rope.freq_base_swa")
        if period != _PERIOD or local_theta not in (None, _LOCAL_THETA):
            found = f"pattern {period}, base {local_theta}"
            raise Unsupported("this window pattern or base is not supported", where=where, found=found)
        sizes = _decoder_gguf.sizes(keys, shapes)
        layers, head_dim = sizes["num_hidden_layers"], keys.size("attention.key_length", 256)
        wide = sizes["hidden_size"] // sizes["num_attention_heads"]
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "head_dim": head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": _layer_types(layers),
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": wide if layers == _27B_LAYERS else head_dim,
            "rope_parameters": {
                "full_attention": _decoder_gguf.rope(keys, _GLOBAL_THETA),
                "sliding_attention": {"rope_type": "default", "rope_theta": _LOCAL_THETA},
            },
            "sliding_window": keys.size("attention.sliding_window"),
            **sizes,
        }


def _text_part(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        raise BadConfig("missing key text_config", where=where, expected="an object with the text model's config")
    outer = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    head = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    return {**outer, **nested, **head}


def _layer_types(n_layers: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % _PERIOD else "full_attention" for i in range(n_layers)]


def _check_layers(layer_types: Any, n_layers: int, where: object) -> None:
    if layer_types is not None and layer_types != _layer_types(n_layers):
        raise Unsupported(
            "layer_types has a pattern that llama.cpp does not run for gemma3", where=where,
            found=str(layer_types)[:80], expected="full_attention at every sixth layer, sliding_attention elsewhere",
        )  # fmt: skip


def _check_heads(sizes: Mapping[str, Any], where: object) -> None:
    heads, kv_heads, head_dim = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["head_dim"]
    if head_dim % 2 or heads % kv_heads:
        raise BadConfig(
            "head_dim must be even and num_attention_heads a multiple of num_key_value_heads",
            where=where, found=f"head_dim {head_dim}, {heads} heads, {kv_heads} key-value heads",
        )  # fmt: skip
    scale = sizes["hidden_size"] // heads if sizes["num_hidden_layers"] == _27B_LAYERS else head_dim
    if sizes["query_pre_attn_scalar"] != scale:
        raise Unsupported(
            "query_pre_attn_scalar is not what llama.cpp computes for gemma3",
            where=where, found=sizes["query_pre_attn_scalar"], expected=scale,
        )  # fmt: skip


def _ropes(config: Mapping[str, Any], where: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rope of the full and of the window layers, from transformers 5's rope_parameters or 4's separate keys."""
    both = config.get("rope_parameters")
    if both is not None and not isinstance(both, dict):
        raise BadConfig("bad value for rope_parameters", where=where, found=repr(both)[:60], expected="an object")
    if both is not None and set(both) - {"full_attention", "sliding_attention"}:
        raise BadConfig("rope_parameters has other keys than full_attention and sliding_attention", where=where)
    both = both or {"full_attention": config.get("rope_scaling")}
    global_theta = config.get("rope_theta") or _GLOBAL_THETA
    local_theta = config.get("rope_local_base_freq") or _LOCAL_THETA
    key = "rope_parameters." if config.get("rope_parameters") is not None else "rope_scaling:"
    full = rope_parameters(both.get("full_attention"), where, _GLOBAL_ROPE, global_theta, f"{key}full_attention")
    local = rope_parameters(both.get("sliding_attention"), where, _LOCAL_ROPE, local_theta, f"{key}sliding_attention")
    if local["rope_theta"] != _LOCAL_THETA:
        raise Unsupported(
            "window layers rotate with a base that llama.cpp does not run for gemma3",
            where=where, found=local["rope_theta"], expected=_LOCAL_THETA,
        )  # fmt: skip
    return full, local


FAMILY = Gemma3()
