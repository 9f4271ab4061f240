"""Gemma 4's vision and audio towers, as Gemma4ForConditionalGeneration has them.

llama.cpp takes from its code, not from the file: the rotary base of the vision tower, that its attention is not scaled,
and the audio tower's chunks, softcap and half-steps; a config must agree. Its own conversion leaves out
``clip.use_gelu``, with which the vision tower computes the activation it was trained with rather than quick GELU. Read
from llama.cpp (tools/mtmd/models/gemma4v.cpp, gemma4a.cpp) and transformers' Gemma4VisionModel and Gemma4AudioModel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowbit.checkpoint.families.base import HARMLESS_KEYS, Keys, TensorSpec, uint
from lowbit.checkpoint.gguf_file import Field
from lowbit.checkpoint.projectors import preprocessor
from lowbit.checkpoint.projectors.base import (
    ALWAYS_F32,
    PATCHES,
    Projector,
    ProjectorSpec,
    check_attention,
    flag,
    layers,
    part,
    reals,
    text_hidden_size,
    tower_metadata,
)
from lowbit.errors import BadConfig

# What Gemma4VisionConfig and Gemma4AudioConfig fill in.
_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
    "num_key_value_heads": 12, "head_dim": 64, "pooling_kernel_size": 3, "patch_size": 16,
    "position_embedding_size": 10_240, "rms_norm_eps": 1e-6,
}  # fmt: skip
_AUDIO = {
    "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8, "output_proj_dims": 1536,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
_TEXT_HIDDEN, _POOLING, _MEL_BINS, _ROPE_THETA = 2304, 3, 128, 100.0
# How llama.cpp makes a spectrogram for this tower (mtmd-audio.cpp), in the words of Gemma4AudioFeatureExtractor.
_SOUND = {
    "feature_size": _MEL_BINS, "sampling_rate": 16_000, "frame_length_ms": 20.0, "hop_length_ms": 10.0,
    "min_frequency": 0.0, "max_frequency": 8000.0, "preemphasis": 0.0, "fft_overdrive": False, "dither": 0.0,
    "input_scale_factor": 1.0, "mel_floor": 1e-3, "per_bin_mean": None, "per_bin_stddev": None,
}  # fmt: skip
# llama.cpp reads an image size of every tower and does not use this one's.
_UNUSED_IMAGE_SIZE = 224
_CAUSAL_WIDTHS = (1536, 2560)  # E2B and E4B, by which llama.cpp knows them (mtmd_decode_use_non_causal)
_TOWER, _EARS = "model.vision_tower.", "model.audio_tower."
_OTHER_PARTS = ("model.language_model.", "lm_head.")
_BOUNDS = ("input_max", "input_min", "output_max", "output_min")
_NO_BOUND = float(np.finfo(np.float32).max)


class Gemma4(Projector):
    name = "gemma4"
    model_types = ("gemma4",)
    architectures = ("Gemma4ForConditionalGeneration",)
    parts = ("vision_config", "audio_config")

    def own_config(self, config: Mapping[str, Any], where: object) -> dict[str, Any]:
        width = text_hidden_size(config, where, _TEXT_HIDDEN)
        own: dict[str, Any] = {"text_hidden_size": width}
        if config.get("vision_config") is not None:
            check_attention(config, where, None, runs=None if width in _CAUSAL_WIDTHS else "vision")
            own["vision"] = _vision(part(config, "vision_config", where), where)
            own["vision"] |= preprocessor.image_settings(
                config, where, resample=preprocessor.BICUBIC, mean=0.0, std=1.0
            )
        if config.get("audio_config") is not None:
            own["audio"] = _audio(part(config, "audio_config", where), where)
            preprocessor.check_sound_settings(config, where, _SOUND)
        return own

    def tensors(self, config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        text = config["text_hidden_size"]
        vision = _vision_tensors(config["vision"], text) if "vision" in config else []
        audio = _audio_tensors(config["audio"], text) if "audio" in config else []
        return (*vision, *audio)

    def ignorable(self, stored_name: str, config: Mapping[str, Any]) -> bool:
        return stored_name.startswith(_OTHER_PARTS)

    def metadata(self, config: Mapping[str, Any]) -> list[Field]:
        fields: list[Field] = []
        if "vision" in config:
            fields += _vision_metadata(config["vision"], config["text_hidden_size"])
        if "audio" in config:
            audio = config["audio"]
            sizes = _tower_sizes(audio, 4 * audio["hidden_size"], config["text_hidden_size"])
            fields += tower_metadata("audio", sizes=sizes, eps=audio["rms_norm_eps"], projector="gemma4a")
            fields.append(uint("clip.audio.num_mel_bins", _MEL_BINS))
        return fields


def _vision(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    keys = Keys(config, where, _VISION)
    sizes = _sizes(keys, _VISION)
    keys.only("hidden_activation", "gelu_pytorch_tanh")
    keys.only("attention_bias", False)
    keys.only("model_type", "gemma4_vision")
    keys.only("rope_parameters", {"rope_type": "axial", "rope_theta": _ROPE_THETA})
    sizes |= {key: keys.flag(key, False) for key in ("use_clipped_linears", "standardize")}
    for key in ("max_position_embeddings", *HARMLESS_KEYS):
        keys.get(key)
    keys.finish()
    heads, head_dim = sizes["num_attention_heads"], sizes["head_dim"]
    if heads != sizes["num_key_value_heads"] or heads * head_dim != sizes["hidden_size"] or head_dim % 4:
        raise BadConfig(
            "llama.cpp runs a vision tower whose heads, of one kind, make up hidden_size; each a multiple of 4 wide",
            where=where, found={key: sizes[key] for key in _VISION if "head" in key or key == "hidden_size"},
        )  # fmt: skip
    return sizes


def _audio(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    keys = Keys(config, where, _AUDIO)
    sizes = _sizes(keys, _AUDIO)
    channels = keys.get("subsampling_conv_channels", [128, 32])
    if not isinstance(channels, list | tuple) or len(channels) != 2 or not all(_is_size(n) for n in channels):
        raise BadConfig("bad value for subsampling_conv_channels", where=where, found=repr(channels)[:60])
    # What llama.cpp's code has in place of these keys.
    fixed = {
        "hidden_act": "silu", "conv_kernel_size": 5, "residual_weight": 0.5, "attention_chunk_size": 12,
        "attention_context_left": 13, "attention_context_right": 0, "attention_logit_cap": 50.0, "rms_norm_eps": 1e-6,
        "model_type": "gemma4_audio",
    }  # fmt: skip
    for key, value in fixed.items():
        keys.only(key, value)
    clipped = keys.flag("use_clipped_linears", True)
    for key in ("attention_invalid_logits_value", "gradient_clipping", *HARMLESS_KEYS):
        keys.get(key)
    keys.finish()
    if channels[0] != _MEL_BINS:
        # transformers computes the width after the convolutions from the channels, where the mel bins are meant.
        raise BadConfig("subsampling_conv_channels must begin with the mel bins", where=where, found=channels)
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise BadConfig("hidden_size must be a multiple of num_attention_heads", where=where, found=sizes)
    return sizes | {"channels": list(channels), "use_clipped_linears": clipped}


def _sizes(keys: Keys, defaults: Mapping[str, Any]) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        key: keys.size(key, most=1000 if key == "num_hidden_layers" else 1 << 20)
        for key in defaults
        if key != "rms_norm_eps"
    }
    return sizes | {"rms_norm_eps": keys.number("rms_norm_eps")}


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 16


def _vision_tensors(vision: Mapping[str, Any], text: int) -> list[ProjectorSpec]:
    hidden, wide, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    head_dim, n_layers = vision["head_dim"], vision["num_hidden_layers"]
    embeddings = [
        ProjectorSpec(
            # A linear map of a patch's pixels, colours innermost, is a convolution with the colours outermost.
            name=f"{_TOWER}patch_embedder.input_proj.weight", gguf_name="v.patch_embd.weight", role="patch_embedding",
            shape=(hidden, 3 * patch**2), stored=(hidden, 3, patch, patch), view=(hidden, patch, patch, 3),
            axes=(0, 3, 1, 2), instead=PATCHES,
        ),
        ProjectorSpec(
            name=f"{_TOWER}patch_embedder.position_embedding_table", gguf_name="v.position_embd.weight",
            role="position", shape=(2, vision["position_embedding_size"], hidden), instead=ALWAYS_F32,
        ),
    ]  # fmt: skip
    norms = [
        ("input_layernorm", "ln1", hidden), ("post_attention_layernorm", "attn_post_norm", hidden),
        ("pre_feedforward_layernorm", "ln2", hidden), ("post_feedforward_layernorm", "ffn_post_norm", hidden),
        ("self_attn.q_norm", "attn_q_norm", head_dim), ("self_attn.k_norm", "attn_k_norm", head_dim),
    ]  # fmt: skip
    linears = [
        ("self_attn.q_proj", "attn_q", "attn_q", (hidden, hidden)),
        ("self_attn.k_proj", "attn_k", "attn_k", (hidden, hidden)),
        ("self_attn.v_proj", "attn_v", "attn_v", (hidden, hidden)),
        ("self_attn.o_proj", "attn_out", "attn_o", (hidden, hidden)),
        ("mlp.gate_proj", "ffn_gate", "ffn_gate", (wide, hidden)),
        ("mlp.up_proj", "ffn_up", "ffn_up", (wide, hidden)),
        ("mlp.down_proj", "ffn_down", "ffn_down", (hidden, wide)),
    ]
    standardize = [
        ProjectorSpec(name=f"{_TOWER}std_{kind}", gguf_name=f"v.std_{kind}", role="norm", shape=(hidden,))
        for kind in ("bias", "scale")
        if vision["standardize"]
    ]
    return [
        *embeddings,
        *_layers(f"{_TOWER}encoder.layers", "v.blk", n_layers, norms, linears, clipped=vision["use_clipped_linears"]),
        *standardize,
        ProjectorSpec(
            name="model.embed_vision.embedding_projection.weight", gguf_name="mm.input_projection.weight",
            role="projection", shape=(text, hidden),
        ),
    ]  # fmt: skip


def _audio_tensors(audio: Mapping[str, Any], text: int) -> list[ProjectorSpec]:
    hidden, n_layers, width = audio["hidden_size"], audio["num_hidden_layers"], audio["output_proj_dims"]
    head_dim, (first, second) = hidden // audio["num_attention_heads"], audio["channels"]
    front, kernels = f"{_EARS}subsample_conv_projection.", ((first, 1, 3, 3), (second, first, 3, 3))
    conv = [
        ProjectorSpec(
            name=f"{front}layer{i}.{kind}.weight",
            gguf_name=f"a.conv1d.{i}.{'' if kind == 'conv' else 'norm.'}weight",
            role=kind,
            shape=shape if kind == "conv" else shape[:1],
            instead=ALWAYS_F32,
        )
        for i, shape in enumerate(kernels)
        for kind in ("conv", "norm")
    ]
    conv.append(
        ProjectorSpec(
            name=f"{front}input_proj_linear.weight", gguf_name="a.input_projection.weight",
            role="projection", shape=(hidden, first // 4 * second), instead=ALWAYS_F32,
        )
    )  # fmt: skip
    norms = [
        ("feed_forward1.pre_layer_norm", "ffn_norm", hidden),
        ("feed_forward1.post_layer_norm", "ffn_post_norm", hidden),
        ("feed_forward2.pre_layer_norm", "ffn_norm_1", hidden),
        ("feed_forward2.post_layer_norm", "ffn_post_norm_1", hidden),
        ("norm_pre_attn", "attn_pre_norm", hidden), ("norm_post_attn", "attn_post_norm", hidden),
        # llama.cpp's files have these two under each other's name, and its reader knows.
        ("lconv1d.pre_layer_norm", "conv_norm", hidden), ("lconv1d.conv_norm", "norm_conv", hidden),
        ("norm_out", "ln2", hidden),
    ]  # fmt: skip
    linears = [
        ("feed_forward1.ffw_layer_1", "ffn_up", "ffn_up", (4 * hidden, hidden)),
        ("feed_forward1.ffw_layer_2", "ffn_down", "ffn_down", (hidden, 4 * hidden)),
        ("feed_forward2.ffw_layer_1", "ffn_up_1", "ffn_up", (4 * hidden, hidden)),
        ("feed_forward2.ffw_layer_2", "ffn_down_1", "ffn_down", (hidden, 4 * hidden)),
        ("self_attn.q_proj", "attn_q", "attn_q", (hidden, hidden)),
        ("self_attn.k_proj", "attn_k", "attn_k", (hidden, hidden)),
        ("self_attn.v_proj", "attn_v", "attn_v", (hidden, hidden)),
        ("self_attn.post", "attn_out", "attn_o", (hidden, hidden)),
        ("lconv1d.linear_start", "conv_pw1", "conv", (2 * hidden, hidden)),
        ("lconv1d.linear_end", "conv_pw2", "conv", (hidden, hidden)),
    ]
    own = [
        spec
        for i in range(n_layers)
        for spec in _audio_layer_extras(f"{_EARS}layers.{i}", f"a.blk.{i}", hidden, head_dim)
    ]
    ends = [
        (f"{_EARS}output_proj.weight", "a.pre_encode.out.weight", (width, hidden)),
        (f"{_EARS}output_proj.bias", "a.pre_encode.out.bias", (width,)),
        ("model.embed_audio.embedding_projection.weight", "mm.a.input_projection.weight", (text, width)),
    ]
    return [
        *conv,
        *_layers(f"{_EARS}layers", "a.blk", n_layers, norms, linears, clipped=audio["use_clipped_linears"]),
        *own,
        *(ProjectorSpec(name=hf, gguf_name=gguf, role="projection", shape=shape) for hf, gguf, shape in ends),
    ]


def _audio_layer_extras(ours: str, theirs: str, hidden: int, head_dim: int) -> list[ProjectorSpec]:
    return [
        ProjectorSpec(
            name=f"{ours}.self_attn.relative_k_proj.weight", gguf_name=f"{theirs}.attn_k_rel.weight",
            role="attn_k", shape=(hidden, hidden),
        ),
        ProjectorSpec(
            name=f"{ours}.self_attn.per_dim_scale", gguf_name=f"{theirs}.per_dim_scale.weight",
            role="norm", shape=(head_dim,), compute=_softplus,
        ),
        ProjectorSpec(
            name=f"{ours}.lconv1d.depthwise_conv1d.weight", gguf_name=f"{theirs}.conv_dw.weight",
            role="conv", shape=(hidden, 1, 5), stored=(hidden, 5), instead=ALWAYS_F32,
        ),
    ]  # fmt: skip


def _layers(
    ours: str,
    theirs: str,
    n_layers: int,
    norms: Sequence[tuple[str, str, int]],
    linears: Sequence[tuple[str, str, str, tuple[int, ...]]],
    *,
    clipped: bool,
) -> list[ProjectorSpec]:
    """Equal layers of norms and clippable linears, and the four bounds of each linear where they are clipped."""
    named: list[tuple[str, str, str, tuple[int, ...]]] = [
        (f"{hf}.weight", f"{gguf}.weight", "norm", (n,)) for hf, gguf, n in norms
    ]
    named += [(f"{hf}.linear.weight", f"{gguf}.weight", role, shape) for hf, gguf, role, shape in linears]
    bounds = [
        ProjectorSpec(
            name=f"{ours}.{i}.{hf}.{bound}", gguf_name=f"{theirs}.{i}.{gguf}.{bound}",
            role="bound", shape=(), stored=(1,), compute=_bound,
        )
        for i in range(n_layers if clipped else 0)
        for hf, gguf, _, _ in linears
        for bound in _BOUNDS
    ]  # fmt: skip
    return [*layers(ours, theirs, n_layers, named), *bounds]


def _softplus(values: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)), which transformers computes at each forward pass and GGUF stores; float32."""
    wide = values.astype(np.float64)
    return (np.maximum(wide, 0.0) + np.log1p(np.exp(-np.abs(wide)))).astype(np.float32)


def _bound(values: np.ndarray) -> np.ndarray:
    """No bound is infinite in Hugging Face and the largest float32 in llama.cpp."""
    return np.clip(values, -_NO_BOUND, _NO_BOUND)


def _tower_sizes(tower: Mapping[str, Any], feed_forward: int, text: int) -> dict[str, int]:
    return {
        "projection_dim": text,
        "embedding_length": tower["hidden_size"],
        "feed_forward_length": feed_forward,
        "block_count": tower["num_hidden_layers"],
        "attention.head_count": tower["num_attention_heads"],
    }


def _vision_metadata(vision: Mapping[str, Any], text: int) -> list[Field]:
    sizes = _tower_sizes(vision, vision["intermediate_size"], text)
    sizes |= {"image_size": _UNUSED_IMAGE_SIZE, "patch_size": vision["patch_size"]}
    fields = tower_metadata("vision", sizes=sizes, eps=vision["rms_norm_eps"], projector="gemma4v")
    fields += [
        flag("clip.use_gelu", True),
        reals("clip.vision.image_mean", vision["image_mean"]),
        reals("clip.vision.image_std", vision["image_std"]),
    ]
    if vision["pooling_kernel_size"] != _POOLING:
        fields.append(uint("clip.vision.projector.scale_factor", vision["pooling_kernel_size"]))
    return fields


PROJECTOR = Gemma4()
