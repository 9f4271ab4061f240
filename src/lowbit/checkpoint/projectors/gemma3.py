"""Gemma 3's vision: a SigLIP tower and the projector of Gemma3ForConditionalGeneration.

llama.cpp takes from its code, not from the file, that queries are scaled by the head's size and that all patches
attend to all. Read from llama.cpp (tools/mtmd/models/siglip.cpp) and transformers' SiglipVisionModel and
Gemma3MultiModalProjector.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from lowbit.checkpoint.families.base import HARMLESS_KEYS, Keys, TensorSpec, uint
from lowbit.checkpoint.gguf_file import Field
from lowbit.checkpoint.projectors import preprocessor
from lowbit.checkpoint.projectors.base import (
    ALWAYS_F32,
    TRANSPOSED,
    Projector,
    ProjectorSpec,
    flag,
    layers,
    part,
    reals,
    text_hidden_size,
    tower_metadata,
)
from lowbit.errors import BadConfig

# What SiglipVisionConfig and Gemma3Config fill in.
_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
}  # fmt: skip
_TEXT_HIDDEN, _MM_TOKENS, _POOLING = 2304, 256, 4
_TOWER, _PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
# transformers 5 leaves vision_model out; some checkpoints keep a model. in front.
_TOWERS = (_TOWER, "vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower.")
_PROJECTORS = (_PROJECTOR, "model.multi_modal_projector.")
_OTHER_PARTS = ("language_model.", "model.language_model.", "lm_head.")
_POOLING_HEAD = "head."  # SigLIP's own classifier, which Gemma does not use


class Gemma3(Projector):
    name = "gemma3"
    model_types = ("gemma3",)
    architectures = ("Gemma3ForConditionalGeneration",)

    def own_config(self, config: Mapping[str, Any], where: object) -> dict[str, Any]:
        keys = Keys(part(config, "vision_config", where), where, _DEFAULTS)
        sizes: dict[str, Any] = {
            key: keys.size(key, most=1000 if key == "num_hidden_layers" else 1 << 20)
            for key in _DEFAULTS
            if key != "layer_norm_eps"
        }
        sizes["layer_norm_eps"] = keys.number("layer_norm_eps")
        keys.only("hidden_act", "gelu_pytorch_tanh")
        keys.only("num_channels", 3)
        keys.only("model_type", "siglip_vision_model")
        for key in ("vision_use_head", *HARMLESS_KEYS):
            keys.get(key)
        keys.finish()
        sizes["text_hidden_size"] = text_hidden_size(config, where, _TEXT_HIDDEN)
        sizes |= preprocessor.image_settings(config, where, resample=preprocessor.BILINEAR, mean=0.5, std=0.5)
        sizes["pooling"] = _pooling(sizes, Keys(config, where).size("mm_tokens_per_image", _MM_TOKENS), where)
        _check_sizes(sizes, config.get(preprocessor.KEY, {}).get("size"), where)
        return sizes

    def tensors(self, config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        hidden, wide, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
        n_patches = (config["image_size"] // patch) ** 2
        embeddings = [
            ("embeddings.patch_embedding.weight", "v.patch_embd.weight", "patch_embedding", (hidden, 3, patch, patch)),
            ("embeddings.patch_embedding.bias", "v.patch_embd.bias", "bias", (hidden,)),
            ("embeddings.position_embedding.weight", "v.position_embd.weight", "position", (n_patches, hidden)),
        ]
        layer = [
            (f"{hf}.{kind}", f"{gguf}.{kind}", role if kind == "weight" else "bias", shape if kind == "weight" else b)
            for hf, gguf, role, shape, b in (
                ("layer_norm1", "ln1", "norm", (hidden,), (hidden,)),
                ("layer_norm2", "ln2", "norm", (hidden,), (hidden,)),
                ("self_attn.q_proj", "attn_q", "attn_q", (hidden, hidden), (hidden,)),
                ("self_attn.k_proj", "attn_k", "attn_k", (hidden, hidden), (hidden,)),
                ("self_attn.v_proj", "attn_v", "attn_v", (hidden, hidden), (hidden,)),
                ("self_attn.out_proj", "attn_out", "attn_o", (hidden, hidden), (hidden,)),
                ("mlp.fc1", "ffn_up", "ffn_up", (wide, hidden), (wide,)),
                ("mlp.fc2", "ffn_down", "ffn_down", (hidden, wide), (hidden,)),
            )
            for kind in ("weight", "bias")
        ]
        return (
            *(
                ProjectorSpec(name=f"{_TOWER}{hf}", gguf_name=gguf, role=role, shape=shape, instead=ALWAYS_F32)
                for hf, gguf, role, shape in embeddings
            ),
            *layers(f"{_TOWER}encoder.layers", "v.blk", config["num_hidden_layers"], layer),
            *(
                ProjectorSpec(name=f"{_TOWER}post_layernorm.{kind}", gguf_name=f"v.post_ln.{kind}", role=role,
                              shape=(hidden,))
                for kind, role in (("weight", "norm"), ("bias", "bias"))
            ),
            ProjectorSpec(
                name=f"{_PROJECTOR}mm_input_projection_weight", gguf_name="mm.input_projection.weight",
                role="projection", shape=(hidden, config["text_hidden_size"]), instead=TRANSPOSED,
            ),
            # Gemma's own norm, which multiplies by (1 + weight); those of SigLIP do not.
            ProjectorSpec(
                name=f"{_PROJECTOR}mm_soft_emb_norm.weight", gguf_name="mm.soft_emb_norm.weight",
                role="norm", shape=(hidden,), gguf_offset=1.0,
            ),
        )  # fmt: skip

    def stored_name(self, name: str, stored: Collection[str]) -> str:
        for ours, prefixes in ((_TOWER, _TOWERS), (_PROJECTOR, _PROJECTORS)):
            if name.startswith(ours):
                bare = name.removeprefix(ours)
                return next((prefix + bare for prefix in prefixes if prefix + bare in stored), name)
        return name

    def ignorable(self, stored_name: str, config: Mapping[str, Any]) -> bool:
        heads = tuple(tower + _POOLING_HEAD for tower in _TOWERS)
        return stored_name.startswith((*_OTHER_PARTS, *heads))

    def metadata(self, config: Mapping[str, Any]) -> list[Field]:
        sizes = {
            "projection_dim": config["text_hidden_size"],
            "image_size": config["image_size"],
            "patch_size": config["patch_size"],
            "embedding_length": config["hidden_size"],
            "feed_forward_length": config["intermediate_size"],
            "block_count": config["num_hidden_layers"],
            "attention.head_count": config["num_attention_heads"],
        }
        fields = tower_metadata("vision", sizes=sizes, eps=config["layer_norm_eps"], projector="gemma3", only=True)
        fields += [
            flag("clip.use_gelu", True),
            reals("clip.vision.image_mean", config["image_mean"]),
            reals("clip.vision.image_std", config["image_std"]),
        ]
        if config["pooling"] != _POOLING:
            fields.append(uint("clip.vision.projector.scale_factor", config["pooling"]))
        return fields


def _pooling(sizes: Mapping[str, Any], n_tokens: int, where: object) -> int:
    """How many patches a side become one token."""
    a_side, tokens_a_side = sizes["image_size"] // sizes["patch_size"], math.isqrt(n_tokens)
    if tokens_a_side**2 != n_tokens or a_side % tokens_a_side:
        raise BadConfig(
            "mm_tokens_per_image is not a square that divides the patches",
            where=where, found=f"{n_tokens} tokens of {a_side} x {a_side} patches",
        )  # fmt: skip
    return a_side // tokens_a_side


def _check_sizes(sizes: Mapping[str, Any], size: Any, where: object) -> None:
    if sizes["image_size"] % sizes["patch_size"] or sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise BadConfig(
            "image_size must be a multiple of patch_size and hidden_size one of num_attention_heads",
            where=where, found={key: sizes[key] for key in _DEFAULTS},
        )  # fmt: skip
    side = sizes["image_size"]
    if size is not None and size not in (side, {"height": side, "width": side}, {"shortest_edge": side}):
        raise BadConfig(
            "the preprocessor's size is not the tower's image_size", where=where, found=str(size)[:60], expected=side
        )


PROJECTOR = Gemma3()
