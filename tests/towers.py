"""Tiny random multimodal models of real transformers classes, and images as transformers' towers take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

TEXT: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 16, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
TEXT_3 = TEXT | {"query_pre_attn_scalar": 32}
TEXT_4 = TEXT | {"global_head_dim": 32, "use_bidirectional_attention": "vision"}
PER_LAYER = {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16}
PER_LAYER_OF: dict[str, dict[str, Any]] = {"gemma4": PER_LAYER, "gemma4_unified": {}}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 32, "patch_size": 4, "vision_use_head": False,
}  # fmt: skip
VISION_4: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64,
    "use_clipped_linears": True, "standardize": True,
}  # fmt: skip
AUDIO_4: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "output_proj_dims": 48,
    "subsampling_conv_channels": [128, 32],
}  # fmt: skip
UNIFIED: dict[str, Any] = {"patch_size": 4, "mm_embed_dim": 96, "mm_posemb_size": 32, "output_proj_dims": 96}
IMAGE_TOKEN = 310


def config_of(family: str, vision: dict[str, Any], **changes: Any) -> Any:
    """The transformers config of a tiny model; ``vision`` changes its vision_config, ``changes`` the whole."""
    if family == "gemma3":
        whole = {
            "text_config": TEXT_3, "vision_config": SIGLIP | vision, "mm_tokens_per_image": 16,
            "image_token_index": IMAGE_TOKEN, "boi_token_index": 311, "eoi_token_index": 312,
        }  # fmt: skip
        return transformers.Gemma3Config(**whole | changes)
    tokens = {"image_token_id": IMAGE_TOKEN, "boi_token_id": 311, "eoi_token_id": 312, "audio_token_id": 313}
    tokens |= {"boa_token_id": 314, "eoa_token_index": 315, "video_token_id": 316}
    if family == "gemma4":
        whole = tokens | {"text_config": TEXT_4 | PER_LAYER_OF[family], "vision_config": VISION_4 | vision}
        return transformers.Gemma4Config(**whole | {"audio_config": AUDIO_4} | changes)
    whole = tokens | {
        "text_config": TEXT_4 | PER_LAYER_OF[family],
        "vision_config": UNIFIED | vision,
        "audio_config": {},
    }
    return transformers.Gemma4UnifiedConfig(**whole | changes)


def like_trained(model: Any) -> None:
    """Bounds that clip a few values, a standardization that is none of an identity; and in Gemma 4's text model, which
    does not divide attention by the root of the head's size, small norms of queries and keys: else a difference in an
    image's last bits grows from layer to layer."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            kind = name.rpartition(".")[2]
            if kind == "std_bias":
                buffer.copy_(torch.randn_like(buffer))
            elif kind == "std_scale":
                buffer.copy_(1 + torch.randn_like(buffer) * 0.2)
            elif kind in ("input_max", "output_max"):
                buffer.copy_(1.5 + torch.rand_like(buffer))
            elif kind in ("input_min", "output_min"):
                buffer.copy_(-1.2 - torch.rand_like(buffer))
        for name, parameter in model.named_parameters():
            is_text_norm = "language_model" in name and name.endswith(("q_norm.weight", "k_norm.weight"))
            if is_text_norm and "gemma4" in model.config.model_type:
                parameter.mul_(0.5)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random pixels, uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def normalized(image: np.ndarray) -> torch.Tensor:
    """Pixels as Gemma3ImageProcessor makes them, without resizing: (1, 3, height, width), -1 to 1."""
    values = (image.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def patches(image: np.ndarray, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels as Gemma4ImageProcessor makes them, without resizing: (1, n, 3 size²), 0 to 1; and each patch's (x, y)."""
    height, width = image.shape[0] // size, image.shape[1] // size
    values = image.astype(np.float32) / np.float32(255)
    cut = values.reshape(height, size, width, size, 3).swapaxes(1, 2).reshape(height * width, -1)
    x, y = np.meshgrid(np.arange(width), np.arange(height), indexing="xy")
    return torch.from_numpy(cut)[None], torch.from_numpy(np.stack([x, y], -1).reshape(1, -1, 2))
