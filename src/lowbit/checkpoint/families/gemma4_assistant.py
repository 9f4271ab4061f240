"""Gemma 4's drafters (multi-token prediction): Gemma4AssistantForCausalLM and Gemma4UnifiedAssistantForCausalLM.

A few layers without keys and values of their own: they attend to those of the target model's last two layers. The input
is the target's embedding of the last token beside its last hidden state, through ``pre_projection``; the output goes
back to the target's width through ``post_projection``. llama.cpp runs a drafter only beside its target.
The drafters of E2B and E4B can score some tokens only, those of the nearest centroids; llama.cpp scores all and its
converter leaves the centroids out, and so does lowbit. Read from llama.cpp (src/models/gemma4-assistant.cpp,
conversion/gemma.py) and transformers (models/gemma4_assistant).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit.checkpoint.families import _gemma4, _gemma4_gguf
from lowbit.checkpoint.families._gemma4 import FULL, WINDOW, tensor
from lowbit.checkpoint.families.base import TARGET, Family, Gguf, Keys, LayerCache, TensorSpec, uint
from lowbit.checkpoint.gguf_file import Field
from lowbit.errors import BadConfig, Unsupported

_ARCHITECTURES = {
    "gemma4_assistant": "Gemma4AssistantForCausalLM",
    "gemma4_unified_assistant": "Gemma4UnifiedAssistantForCausalLM",
}
_BACKBONES = {"gemma4_assistant": 1536, "gemma4_unified_assistant": 3840}  # what transformers fills in
_CENTROIDS = ("masked_embedding.", "masked_embd_")  # in a folder, in a GGUF


class Gemma4Assistant(Family):
    name = "gemma4_assistant"
    arch = "gemma4-assistant"
    model_types = tuple(_ARCHITECTURES)
    architectures = tuple(_ARCHITECTURES.values())
    spm_model = "gemma4"

    def text_config(self, config: Mapping[str, Any], where: object) -> dict[str, Any]:
        """The drafter's config.json; what other families have at its top is in its ``text_config``."""
        keys = Keys(config, where)
        nested, kind = keys.get("text_config"), config["model_type"]
        if not isinstance(nested, dict):
            raise BadConfig("missing key text_config", where=where, expected="an object with the drafter's layers")
        backbone = keys.size("backbone_hidden_size", _BACKBONES[kind])
        for key in ("use_ordered_embeddings", "num_centroids", "centroid_intermediate_top_k"):
            keys.get(key)
        for key in config:
            if key.endswith(("_token_id", "_token_index")):  # the target's, of images and sound
                keys.get(key)
        keys.only("tie_word_embeddings", True)
        keys.finish()
        n_layers = nested.get("num_hidden_layers")
        shared = nested.get("num_kv_shared_layers") or n_layers  # as transformers reads it
        text = _gemma4.checked({**nested, "num_kv_shared_layers": shared}, f"{where}: text_config", {})
        _check(text, backbone, where)
        return {
            **config,
            "architectures": [_ARCHITECTURES[kind]],
            "backbone_hidden_size": backbone,
            "text_config": text,
            "tie_word_embeddings": True,
            "use_ordered_embeddings": False,
        }

    def tensors(self, config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        text, backbone = config["text_config"], config["backbone_hidden_size"]
        hidden = text["hidden_size"]
        return (
            tensor("model.embed_tokens.weight", "token_embd.weight", "embedding", text["vocab_size"], hidden),
            *_gemma4.layer_tensors(text),
            tensor("model.norm.weight", "output_norm.weight", "norm", hidden),
            tensor("pre_projection.weight", "nextn.pre_projection.weight", "pre_projection", hidden, 2 * backbone),
            tensor("post_projection.weight", "nextn.post_projection.weight", "post_projection", backbone, hidden),
        )

    def cache(self, config: Mapping[str, Any]) -> tuple[LayerCache, ...]:
        return _gemma4.cache(config["text_config"], {WINDOW: TARGET, FULL: TARGET})

    def ignorable(self, stored_name: str, config: Mapping[str, Any]) -> bool:
        return stored_name == "lm_head.weight" or stored_name.startswith(_CENTROIDS)

    def unused_in_gguf(self, gguf_name: str, config: Mapping[str, Any]) -> bool:
        return gguf_name.startswith(_CENTROIDS)

    def metadata(self, config: Mapping[str, Any]) -> list[Field]:
        return [
            *_gemma4.metadata(config["text_config"], self.arch),
            uint(f"{self.arch}.embedding_length_out", config["backbone_hidden_size"]),
            uint(f"{self.arch}.nextn_predict_layers", config["text_config"]["num_hidden_layers"]),
        ]

    def config_from_gguf(self, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object) -> dict:
        keys = Gguf(values, self.arch, where)
        keys.only(*_gemma4_gguf.KEYS, "embedding_length_out", "nextn_predict_layers")
        text = {"architectures": ["Gemma4ForCausalLM"], **_gemma4_gguf.config_from_gguf(keys, shapes)}
        if keys.size("nextn_predict_layers") != text["num_hidden_layers"]:
            found = f"{self.arch}.nextn_predict_layers {keys.get('nextn_predict_layers')}"
            raise Unsupported(
                "not a drafter of layers that all predict", where=where, found=found,
                expected=text["num_hidden_layers"],
            )  # fmt: skip
        return {
            "architectures": ["Gemma4AssistantForCausalLM"],
            "backbone_hidden_size": keys.size("embedding_length_out"),
            "model_type": "gemma4_assistant",
            "text_config": text,
            "tie_word_embeddings": True,
            "use_ordered_embeddings": False,
        }

    def computed(self, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {_gemma4.ROPE_FREQS: _gemma4.rope_freqs(config["text_config"])}

    def adopt_computed(self, config: dict[str, Any], name: str, values: np.ndarray, where: object) -> None:
        if name != _gemma4.ROPE_FREQS:
            super().adopt_computed(config, name, values, where)
        _gemma4_gguf.adopt_rope_freqs(config["text_config"], values, where)


def _check(text: Mapping[str, Any], backbone: int, where: object) -> None:
    """Refuses what transformers or llama.cpp refuse of a drafter."""
    for wrong, found in (
        (text["num_kv_shared_layers"] != text["num_hidden_layers"], "layers with keys and values of their own"),
        (text["hidden_size_per_layer_input"], "hidden_size_per_layer_input"),
        (text["enable_moe_block"], "enable_moe_block"),
        (text["use_double_wide_mlp"], "use_double_wide_mlp"),
        (not text["tie_word_embeddings"], "an output head of its own"),
        (text["hidden_size"] == backbone, "hidden_size equal to backbone_hidden_size"),
    ):
        if wrong:
            raise Unsupported("a drafter with this is not run", where=where, found=found)


FAMILY = Gemma4Assistant()
