"""Checkpoints of any size with random BF16 weights, made quickly and in little memory, for the other benchmarks.

Weights are one tile of normal numbers, repeated from another place in every tensor; with a lattice, codes times a scale
a block as quantization-aware training leaves them. Rows start at a whole block of 32 of the tile.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.checkpoint import families
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.pack import lattice

# config.json of models that exist, in what decides about their tensors.
CONFIGS: dict[str, dict[str, Any]] = {
    # TinyLlama-1.1B
    "llama-1b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
    },
    # google/gemma-3-27b-it's text model, of as many layers as wanted; with its 62, query_pre_attn_scalar is 168
    "gemma3-27b": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262208,
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 1024,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}  # fmt: skip
_TILE = 1 << 24  # weights
RULES = {"extremum/-8": -8.0, "absmax/7": 7.0, "absmax/7.5": 7.5}


def make(folder: Path, config: dict[str, Any], *, rule: str | None = None, shard_bytes: int = 5 * 10**9) -> int:
    """Writes config.json, a tokenizer of bytes, BF16 shards and their index; returns the bytes of the largest tensor.

    rule: how a lattice's scales were chosen; None for weights on none.
    """
    family = families.by_config(config, folder)
    specs = family.tensors(family.text_config(config, folder))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    shards = _shards(specs, shard_bytes)
    tile, index = _tile(rule), {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write(folder / name, shard, tile, seed=i)
        index |= {spec.name: name for spec in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return max(_n_bytes(spec) for spec in specs)


def tokenizer() -> dict[str, Any]:
    """A byte-level tokenizer.json without merges."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in visible]
    characters = [chr(b) for b in visible] + [chr(256 + i) for i in range(len(rest))]
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {c: i for i, c in enumerate(characters)}, "merges": []}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": split, "model": model}


def _n_bytes(spec: TensorSpec) -> int:
    return spec.n_rows * spec.shape[-1] * 2


def _shards(specs: tuple[TensorSpec, ...], shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    room = shard_bytes
    for spec in specs:
        if shards[-1] and _n_bytes(spec) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= _n_bytes(spec)
    return shards


def _tile(rule: str | None) -> np.ndarray:
    """(_TILE,) uint16, the bits of BF16."""
    x = np.random.default_rng(0).standard_normal(_TILE, dtype=np.float32).reshape(-1, 32) * np.float32(0.02)
    if rule is not None:
        extreme = np.take_along_axis(x, np.abs(x).argmax(-1)[:, None], -1)
        step = (extreme if RULES[rule] < 0 else np.abs(extreme)) / np.float32(RULES[rule])
        step = lattice.round_to(step, "BF16")
        x = np.clip(np.rint(x / step), -8, 7) * step
    return (lattice.round_to(x.reshape(-1), "BF16").view(np.uint32) >> 16).astype(np.uint16)


def _write(path: Path, specs: list[TensorSpec], tile: np.ndarray, seed: int) -> None:
    header: dict[str, Any] = {}
    end = 0
    for spec in specs:
        begin, end = end, end + _n_bytes(spec)
        header[spec.name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    rng = np.random.default_rng(seed)
    with open(path, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for spec in specs:
            rest, at = spec.n_rows * spec.shape[-1], int(rng.integers(_TILE // 64)) * 32
            while rest:
                part = tile[at : at + rest]
                handle.write(part.data)
                rest, at = rest - part.size, 0
