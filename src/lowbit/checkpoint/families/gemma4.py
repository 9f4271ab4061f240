"""Gemma 4, the text model: E2B, E4B, 12B (unified), 26B-A4B and 31B; of a multimodal checkpoint the text part.

E2B and E4B have an embedding for each layer (PLE), keys and values shared by the last layers, and E2B MLPs of double
width there. 12B, 26B-A4B and 31B use keys as values in the layers that attend to everything. 26B-A4B has experts beside
the MLP of every layer; all of a layer's experts are one tensor with a dimension more. Read from llama.cpp
(src/models/gemma4.cpp, conversion/gemma.py) and transformers (models/gemma4, models/gemma4_unified).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from lowbit.checkpoint.families import _gemma4, _gemma4_gguf
from lowbit.checkpoint.families._gemma4 import FULL, WINDOW, tensor
from lowbit.checkpoint.families.base import Family, Gguf, LayerCache, TensorSpec, multimodal_name
from lowbit.checkpoint.gguf_file import Field
from lowbit.errors import BadConfig, Unsupported

# The text model of a multimodal one: its model_type and class, and what transformers fills in where keys are left out.
_TEXT_PARTS = {
    "gemma4": ("gemma4_text", "Gemma4ForCausalLM"),
    "gemma4_unified": ("gemma4_unified_text", "Gemma4UnifiedForCausalLM"),
}
_DEFAULTS = {
    "vocab_size": 262_144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
}  # fmt: skip
_OWN_DEFAULTS = {
    "gemma4": {"max_position_embeddings": 131_072, "sliding_window": 512, "hidden_size_per_layer_input": 256},
    "gemma4_unified": {"max_position_embeddings": 262_144, "sliding_window": 1024},
}
_OTHER_PARTS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "vision_embedder.")
_SHARED_PARTS = re.compile(
    r"\.(\d+)\.(?:self_attn\.(?:[kv]_proj|[kv]_norm)|attn_[kv]|attn_k_norm)\.weight(?:_packed|_scale|_shape)?$"
)


class Gemma4(Family):
    name = "gemma4"
    arch = "gemma4"
    model_types = ("gemma4_text", "gemma4", "gemma4_unified_text", "gemma4_unified")
    architectures = (
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForCausalLM",
        "Gemma4UnifiedForConditionalGeneration",
    )
    spm_model = "gemma4"

    def text_config(self, config: Mapping[str, Any], where: object) -> dict[str, Any]:
        kind, defaults = config.get("model_type"), {}
        if kind in _TEXT_PARTS:
            config, defaults = _text_part(config, where), _DEFAULTS | _OWN_DEFAULTS[kind]
        checked = _gemma4.checked(config, where, defaults)
        if checked["num_kv_shared_layers"] > checked["num_hidden_layers"] - 2:
            raise Unsupported(
                "llama.cpp needs two layers with keys and values of their own", where=where,
                found=f"{checked['num_kv_shared_layers']} of {checked['num_hidden_layers']} layers share",
            )  # fmt: skip
        _gemma4.check_sharing(checked, where)
        return checked

    def tensors(self, config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        found = [tensor("model.embed_tokens.weight", "token_embd.weight", "embedding", vocab, hidden)]
        found += [*_per_layer_tensors(config), *_gemma4.layer_tensors(config), *_expert_tensors(config)]
        found.append(tensor("model.norm.weight", "output_norm.weight", "norm", hidden))
        if not config["tie_word_embeddings"]:
            found.append(tensor("lm_head.weight", "output.weight", "output", vocab, hidden))
        return tuple(found)

    def cache(self, config: Mapping[str, Any]) -> tuple[LayerCache, ...]:
        first_shared = config["num_hidden_layers"] - config["num_kv_shared_layers"]
        return _gemma4.cache(config, {WINDOW: first_shared - 2, FULL: first_shared - 1})

    def stored_name(self, name: str, stored: Collection[str]) -> str:
        return multimodal_name(name, stored)

    def ignorable(self, stored_name: str, config: Mapping[str, Any]) -> bool:
        tied_head = config["tie_word_embeddings"] and stored_name.endswith("lm_head.weight")
        other_part = stored_name.removeprefix("model.").startswith(_OTHER_PARTS)
        return other_part or tied_head or _of_sharing_layer(stored_name, config)

    def unused_in_gguf(self, gguf_name: str, config: Mapping[str, Any]) -> bool:
        return _of_sharing_layer(gguf_name, config)

    def metadata(self, config: Mapping[str, Any]) -> list[Field]:
        return _gemma4.metadata(config, self.arch)

    def mlx_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # mlx-lm fills in a cap where the key is absent, and has one text model for both model types.
        cap = config.get("final_logit_softcapping")
        return {
            **config, "model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"],
            "final_logit_softcapping": cap,
        }  # fmt: skip

    def config_from_gguf(self, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object) -> dict:
        keys = Gguf(values, self.arch, where)
        keys.only(*_gemma4_gguf.KEYS)
        return {"architectures": ["Gemma4ForCausalLM"], **_gemma4_gguf.config_from_gguf(keys, shapes)}

    def computed(self, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {_gemma4.ROPE_FREQS: _gemma4.rope_freqs(config)}

    def adopt_computed(self, config: dict[str, Any], name: str, values: np.ndarray, where: object) -> None:
        if name != _gemma4.ROPE_FREQS:
            super().adopt_computed(config, name, values, where)
        _gemma4_gguf.adopt_rope_freqs(config, values, where)


def _text_part(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        raise BadConfig("missing key text_config", where=where, expected="an object with the text model's config")
    carried = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    outer = {key: config[key] for key in carried if key in config}
    model_type, architecture = _TEXT_PARTS[config["model_type"]]
    return {**outer, **nested, "model_type": model_type, "architectures": [architecture]}


def _per_layer_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    size, n_layers, hidden = config["hidden_size_per_layer_input"], config["num_hidden_layers"], config["hidden_size"]
    if not size:
        return
    yield tensor(
        "model.embed_tokens_per_layer.weight", "per_layer_token_embd.weight", "per_layer_embedding",
        config["vocab_size"], n_layers * size,
    )  # fmt: skip
    yield tensor(
        "model.per_layer_model_projection.weight", "per_layer_model_proj.weight", "per_layer_model_proj",
        n_layers * size, hidden,
    )  # fmt: skip
    yield tensor("model.per_layer_projection_norm.weight", "per_layer_proj_norm.weight", "norm", size)
    for i in range(n_layers):
        ours, theirs = f"model.layers.{i}", f"blk.{i}"
        yield tensor(f"{ours}.per_layer_input_gate.weight", f"{theirs}.inp_gate.weight", "per_layer_gate", size, hidden)
        yield tensor(f"{ours}.per_layer_projection.weight", f"{theirs}.proj.weight", "per_layer_proj", hidden, size)
        yield tensor(f"{ours}.post_per_layer_input_norm.weight", f"{theirs}.post_norm.weight", "norm", hidden)


def _expert_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    if not config["enable_moe_block"]:
        return
    n, hidden, wide = config["num_experts"], config["hidden_size"], config["moe_intermediate_size"]
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{i}", f"blk.{i}"
        yield tensor(f"{ours}.router.proj.weight", f"{theirs}.ffn_gate_inp.weight", "router", n, hidden)
        yield tensor(f"{ours}.router.scale", f"{theirs}.ffn_gate_inp.scale", "scale", hidden)
        yield tensor(f"{ours}.router.per_expert_scale", f"{theirs}.ffn_down_exps.scale", "scale", n)
        yield tensor(
            f"{ours}.experts.gate_up_proj", f"{theirs}.ffn_gate_up_exps.weight", "experts_gate_up", n, 2 * wide, hidden
        )
        yield tensor(f"{ours}.experts.down_proj", f"{theirs}.ffn_down_exps.weight", "experts_down", n, hidden, wide)
        for norm, gguf_norm in (
            ("pre", "pre_ffw_norm_2"),
            ("post_1", "post_ffw_norm_1"),
            ("post_2", "post_ffw_norm_2"),
        ):
            side, _, number = norm.partition("_")
            name = f"{ours}.{side}_feedforward_layernorm_{number or 2}.weight"
            yield tensor(name, f"{theirs}.{gguf_norm}.weight", "norm", hidden)


def _of_sharing_layer(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is of the keys or values of a layer that takes them from another; released files have them."""
    match = _SHARED_PARTS.search(name)
    first_shared = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    return match is not None and first_shared <= int(match[1]) < config["num_hidden_layers"]


FAMILY = Gemma4()
