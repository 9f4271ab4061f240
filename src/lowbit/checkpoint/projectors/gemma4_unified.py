"""Gemma 4 12B's eyes and ears: no towers, but an embedder of pixels and a linear map of samples, as
Gemma4UnifiedForConditionalGeneration has them.

Read from llama.cpp (tools/mtmd/models/gemma4uv.cpp, gemma4ua.cpp) and transformers' Gemma4UnifiedVisionEmbedder and
Gemma4UnifiedMultimodalEmbedder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.checkpoint.families.base import HARMLESS_KEYS, Keys, TensorSpec, uint
from lowbit.checkpoint.gguf_file import Field
from lowbit.checkpoint.projectors import preprocessor
from lowbit.checkpoint.projectors.base import (
    ALWAYS_F32,
    PATCHES,
    Projector,
    ProjectorSpec,
    check_attention,
    part,
    reals,
    text_hidden_size,
    tower_metadata,
)

# What Gemma4UnifiedVisionConfig and Gemma4UnifiedAudioConfig fill in.
_VISION = {"patch_size": 16, "pooling_kernel_size": 3, "mm_embed_dim": 3840, "mm_posemb_size": 1120}
_AUDIO = {"audio_embed_dim": 640}
_EPS, _TEXT_HIDDEN, _POOLING = 1e-6, 2304, 3
_SAMPLES_A_TOKEN = 640  # llama.cpp's own
_UNUSED_IMAGE_SIZE = 224
_EYES = "model.vision_embedder."
_OTHER_PARTS = ("model.language_model.", "lm_head.")


class Gemma4Unified(Projector):
    name = "gemma4_unified"
    model_types = ("gemma4_unified",)
    architectures = ("Gemma4UnifiedForConditionalGeneration",)
    parts = ("vision_config", "audio_config")

    def own_config(self, config: Mapping[str, Any], where: object) -> dict[str, Any]:
        own: dict[str, Any] = {"text_hidden_size": text_hidden_size(config, where, _TEXT_HIDDEN)}
        if config.get("vision_config") is not None:
            check_attention(config, where, "vision", runs="vision")
            keys = Keys(part(config, "vision_config", where), where, _VISION)
            own["vision"] = {key: keys.size(key, most=1 << 20) for key in _VISION}
            width = own["vision"]["mm_embed_dim"]
            keys.only("output_proj_dims", width)
            side = own["vision"]["patch_size"] * own["vision"]["pooling_kernel_size"]
            keys.only("model_patch_size", side)
            _finish(keys, "gemma4_unified_vision")
            own["vision"] |= {"side": side} | preprocessor.image_settings(
                config, where, resample=preprocessor.BICUBIC, mean=0.0, std=1.0
            )
        if config.get("audio_config") is not None:
            keys = Keys(part(config, "audio_config", where), where, _AUDIO)
            own["audio"] = {"audio_embed_dim": keys.size("audio_embed_dim")}
            for key in ("audio_embed_dim", "hidden_size", "output_proj_dims", "audio_samples_per_token"):
                keys.only(key, _SAMPLES_A_TOKEN)
            _finish(keys, "gemma4_unified_audio")
        return own

    def tensors(self, config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        text, specs = config["text_hidden_size"], list[ProjectorSpec]()
        if "vision" in config:
            specs += _vision_tensors(config["vision"], text)
        if "audio" in config:
            specs.append(
                ProjectorSpec(
                    name="model.embed_audio.embedding_projection.weight", gguf_name="mm.a.input_projection.weight",
                    role="projection", shape=(text, config["audio"]["audio_embed_dim"]),
                )
            )  # fmt: skip
        return tuple(specs)

    def ignorable(self, stored_name: str, config: Mapping[str, Any]) -> bool:
        return stored_name.startswith(_OTHER_PARTS)

    def metadata(self, config: Mapping[str, Any]) -> list[Field]:
        none = {"feed_forward_length": 0, "block_count": 0, "attention.head_count": 0}
        fields: list[Field] = []
        if "vision" in config:
            vision = config["vision"]
            sizes = {
                "projection_dim": config["text_hidden_size"], "image_size": _UNUSED_IMAGE_SIZE,
                "patch_size": vision["patch_size"], "embedding_length": vision["mm_embed_dim"],
            }  # fmt: skip
            fields += tower_metadata("vision", sizes=sizes | none, eps=_EPS, projector="gemma4uv")
            fields += [reals(f"clip.vision.{key}", vision[key]) for key in ("image_mean", "image_std")]
            if vision["pooling_kernel_size"] != _POOLING:
                fields.append(uint("clip.vision.projector.scale_factor", vision["pooling_kernel_size"]))
        if "audio" in config:
            width = config["audio"]["audio_embed_dim"]
            sizes = {"projection_dim": config["text_hidden_size"], "embedding_length": width}
            fields += tower_metadata("audio", sizes=sizes | none, eps=_EPS, projector="gemma4ua")
            fields.append(uint("clip.audio.num_mel_bins", 128))  # must be there; llama.cpp has 640 in its place
        return fields


def _finish(keys: Keys, model_type: str) -> None:
    keys.only("model_type", model_type)
    keys.only("rms_norm_eps", _EPS)
    for key in HARMLESS_KEYS:
        keys.get(key)
    keys.finish()


def _vision_tensors(vision: Mapping[str, Any], text: int) -> list[ProjectorSpec]:
    width, side = vision["mm_embed_dim"], vision["side"]
    pixels = 3 * side**2
    # Pixels come with the colours innermost in Hugging Face and outermost in llama.cpp.
    return [
        ProjectorSpec(
            name=f"{_EYES}patch_dense.weight", gguf_name="v.patch_embd.weight", role="patch_embedding",
            shape=(width, pixels), view=(width, side, side, 3), axes=(0, 3, 1, 2), instead=PATCHES,
        ),
        ProjectorSpec(name=f"{_EYES}patch_dense.bias", gguf_name="v.patch_embd.bias", role="bias", shape=(width,)),
        *(
            ProjectorSpec(
                name=f"{_EYES}patch_ln1.{kind}", gguf_name=f"v.patch_norm.1.{kind}", role="norm",
                shape=(pixels,), view=(side, side, 3), axes=(2, 0, 1),
            )
            for kind in ("weight", "bias")
        ),
        *(
            ProjectorSpec(
                name=f"{_EYES}{ours}.{kind}", gguf_name=f"v.patch_norm.{i}.{kind}", role="norm", shape=(width,)
            )
            for ours, i in (("patch_ln2", 2), ("pos_norm", 3))
            for kind in ("weight", "bias")
        ),
        ProjectorSpec(
            name=f"{_EYES}pos_embedding", gguf_name="v.position_embd.weight", role="position",
            shape=(vision["mm_posemb_size"], 2, width), stored=(2, vision["mm_posemb_size"], width),
            view=(vision["mm_posemb_size"], 2, width), axes=(1, 0, 2), instead=ALWAYS_F32,
        ),
        ProjectorSpec(
            name="model.embed_vision.embedding_projection.weight", gguf_name="mm.input_projection.weight",
            role="projection", shape=(text, width),
        ),
    ]  # fmt: skip


PROJECTOR = Gemma4Unified()
