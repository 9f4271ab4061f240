"""The valid files that changes start from: a checkpoint of a few kilobytes for each family, in every form it comes in.

Made without torch, so that the fuzzer starts in a second and follows no code but lowbit's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

import lowbit
from fuzzing.mutate import safetensors
from lowbit.checkpoint import families, open_checkpoint, projectors
from lowbit.checkpoint.families.base import Family
from lowbit.checkpoint.write import Tensor, write_checkpoint
from lowbit.grid import get
from lowbit.measure import reference_cache
from lowbit.measure.reference_cache import Header
from lowbit.pack import imatrix
from lowbit.run.base import Runtime

VOCAB = 16
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": [2], "torch_dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_GEMMA3 = {
    "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": ["sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
_GEMMA4 = {
    "model_type": "gemma4_text", "head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"], "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 1e4},
    "llama3": _SIZES | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_parameters": _LLAMA3,
        "tie_word_embeddings": False, "attention_bias": True,
    },
    "gemma3": _SIZES | _GEMMA3 | {"architectures": ["Gemma3ForCausalLM"]},
    "gemma3_whole": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 2],
        "text_config": _SIZES | _GEMMA3, "vision_config": {"hidden_size": 8},
    },
    "qwen3": _SIZES | {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "use_sliding_window": False,
        "layer_types": ["full_attention"], "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "gemma4": _SIZES | _GEMMA4 | {  # as E2B: per-layer embeddings, shared keys and values, MLPs of double width
        "architectures": ["Gemma4ForCausalLM"], "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB,
    },
    "gemma4_moe": _SIZES | _GEMMA4 | {  # as 26B-A4B: experts, keys as values
        "architectures": ["Gemma4ForCausalLM"], "enable_moe_block": True, "num_experts": 2, "top_k_experts": 1,
        "moe_intermediate_size": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
    },
    "gemma4_whole": {
        "model_type": "gemma4_unified", "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "text_config": _SIZES | _GEMMA4 | {"model_type": "gemma4_unified_text"}, "vision_config": {"mm_embed_dim": 8},
    },
    "gemma4_drafter": {
        "model_type": "gemma4_assistant", "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": 64, "text_config": _SIZES | _GEMMA4 | {"num_kv_shared_layers": 2},
    },
}  # fmt: skip
# Checkpoints of which an mmproj is made: towers and projectors, no text model beside them.
PROJECTORS: dict[str, dict[str, Any]] = {
    "towers_gemma3": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 1,
        "text_config": _SIZES | _GEMMA3, "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_use_head": False,
        },
    },
    "towers_gemma4": {
        "model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"],
        "text_config": _SIZES | _GEMMA4 | {"use_bidirectional_attention": "vision"},
        "vision_config": {
            "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4,
            "position_embedding_size": 4, "use_clipped_linears": True, "standardize": True,
        },
        "audio_config": {
            "model_type": "gemma4_audio", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "output_proj_dims": 32, "subsampling_conv_channels": [128, 1],
        },
    },
    "towers_unified": {
        "model_type": "gemma4_unified", "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "text_config": _SIZES | _GEMMA4 | {"model_type": "gemma4_unified_text"},
        "vision_config": {
            "patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 4, "output_proj_dims": 32,
        },
        "audio_config": {},
    },
}  # fmt: skip
PREPROCESSOR = {
    "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.5, 0.5, 0.25],
}  # fmt: skip
SCHEME = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
    }}},
}  # fmt: skip
_TEMPLATE = "{{ messages[0]['content'] }}"
SETTINGS = {
    "bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "add_bos_token": True,
    "chat_template": [{"name": "default", "template": _TEMPLATE}],
}  # fmt: skip


def make(folder: Path) -> None:
    """Writes every material below ``folder``: a checkpoint folder and a GGUF of each config (of towers an mmproj), a
    sharded checkpoint, one that lowbit trained, one of compressed-tensors, and a certificate beside each GGUF."""
    rng = np.random.default_rng(0)
    for name, config in CONFIGS.items():
        checkpoint(folder / name, config, rng)
        lowbit.pack(folder / name, "q4_0", folder / f"{name}.gguf", certificate=True)
    for name, config in PROJECTORS.items():
        checkpoint(folder / name, config, rng)
        _write_json(folder / name / "preprocessor_config.json", PREPROCESSOR)
        lowbit.pack(folder / name, "q8_0", folder / f"{name}.gguf", certificate=True, mmproj=True)
    lowbit.pack(folder / "llama", "q8_0", folder / "llama-q8_0.gguf", certificate=True)
    _shard(folder / "llama", folder / "shards")
    _train(folder / "llama.gguf", folder / "trained")
    _compress(folder / "llama", folder / "compressed")
    lowbit.pack(folder / "gemma4_moe", None, folder / "compressed_moe", to="compressed-tensors")
    _record(folder / "record")
    lowbit.pack(folder / "llama", None, folder / "mlx", to="mlx")
    _measured(folder / "llama", folder)
    _calibrate(folder / "llama", folder / "calibration-llama.safetensors")
    _calibrate(folder / "gemma4_moe", folder / "calibration-gemma4_moe.safetensors")
    _reference_cache(folder / "reference.cache")


def tokenizer(kind: str) -> dict[str, Any]:
    """A tokenizer.json of a few tokens: 'bytes' (SmolLM2's kind), 'split' (Llama 3's) or 'spm' (Gemma's)."""
    special = [{"id": i, "content": token, "special": True} for i, token in enumerate(("<unk>", "<s>", "</s>"))]
    words = ["a", "b", "ab", "Ġ", "Ġa", "▁", "▁a", "<0x0A>", "c"]
    model = {
        "type": "BPE", "unk_token": "<unk>" if kind == "spm" else None, "byte_fallback": kind == "spm",
        "ignore_merges": False, "vocab": {word: 3 + i for i, word in enumerate(words)},
        "merges": ["a b", ["Ġ", "a"]] if kind != "spm" else [["▁", "a"], "a b"],
    }  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": kind == "bytes"}
    digits = {"type": "Digits", "individual_digits": True}
    from lowbit.pack.tokenizer import _LLAMA3 as expression

    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    steps = {"bytes": [digits, byte_level], "split": [split, byte_level]}
    return {
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [replace]} if kind == "spm" else None,
        "pre_tokenizer": None if kind == "spm" else {"type": "Sequence", "pretokenizers": steps[kind]},
        "post_processor": {"type": "TemplateProcessing", "single": single},
        "model": model,
    }


def checkpoint(folder: Path, config: Mapping[str, Any], rng: np.random.Generator) -> None:
    """A BF16 checkpoint of ``config`` whose matrices lie on an absmax/7 grid, with a tokenizer."""
    family: Family = (projectors if config in PROJECTORS.values() else families).by_config(dict(config), "config.json")
    values: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for spec in family.tensors(family.text_config(config, "config.json")):
        codes = rng.integers(-7, 8, spec.shape)
        values[spec.name] = "BF16", spec.shape, _bf16(codes * np.float32(2.0**-6))
    folder.mkdir(parents=True)
    _write_tensors(folder / "model.safetensors", values)
    _write_json(folder / "config.json", config)
    _write_json(folder / "tokenizer.json", tokenizer("spm" if "gemma" in config["model_type"] else "bytes"))
    _write_json(folder / "tokenizer_config.json", SETTINGS)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")


def _shard(source: Path, folder: Path) -> None:
    tensors = _stored(source)
    folder.mkdir()
    weight_map = {}
    for part in range(2):
        name = f"model-0000{part + 1}-of-00002.safetensors"
        mine = dict(list(tensors.items())[part::2])
        _write_tensors(folder / name, mine)
        weight_map |= dict.fromkeys(mine, name)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())


def _train(gguf: Path, folder: Path) -> None:
    with open_checkpoint(gguf) as source:
        tensors = []
        for name in source.names:
            grid, values = source.info(name).grid, source.read(name)
            tensors.append(Tensor(name=name, values=values, grid=grid, blocks=source.blocks(name)))
        write_checkpoint(folder, source, tensors)


def _compress(source: Path, folder: Path) -> None:
    folder.mkdir()
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name, (dtype, shape, data) in _stored(source).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = dtype, shape, data
            continue
        rows, n = shape
        codes = np.arange(rows * n).reshape(rows, -1, 32) % 16 - 8
        nibbles = (codes + 8).astype(np.uint8).reshape(rows, -1, 2)
        words = (nibbles[..., 0] | nibbles[..., 1] << 4).tobytes()
        tensors[name + "_packed"] = "I32", (rows, n // 8), words
        tensors[name + "_scale"] = "BF16", (rows, n // 32), _bf16(np.full((rows, n // 32), 0.01, np.float32))
        tensors[name + "_shape"] = "I64", (2,), np.array([rows, n], "<i8").tobytes()
    _write_tensors(folder / "model.safetensors", tensors)
    _write_json(folder / "config.json", CONFIGS["llama"] | {"quantization_config": SCHEME})


def _record(folder: Path) -> None:
    """The report's invented run, cut short: its lists say the same thing many times."""
    record = json.loads((Path(__file__).parents[2] / "report" / "sample-run.json").read_text(encoding="utf-8"))
    record["training"]["curve"] = record["training"]["curve"][:3]
    record["grids"] = dict(list(record["grids"].items())[:3])
    folder.mkdir()
    _write_json(folder / "lowbit.json", record)


def _measured(source: Path, folder: Path) -> None:
    """An importance matrix in both forms of the checkpoint ``source``."""
    sums = np.linspace(0.5, 2, 32, dtype=np.float32)
    with open_checkpoint(source) as checkpoint:
        specs = [spec for spec in checkpoint.specs.values() if spec.role not in ("norm", "embedding")]
    entries = {spec.gguf_name: imatrix.Entry(sums[None], np.array([8])) for spec in specs}
    for form in ("gguf", "dat"):
        made = imatrix.Imatrix(entries=entries, datasets=("text.txt",), chunk_count=2, chunk_size=4, name="made")
        imatrix.write(made, folder / f"imatrix.{form}", format=form)


def _calibrate(source: Path, path: Path) -> None:
    """A calibration of every matrix of the checkpoint ``source``, and of its experts."""
    with open_checkpoint(source) as checkpoint:
        specs = [spec for spec in checkpoint.specs.values() if spec.role.startswith(("attn", "ffn", "experts"))]
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}

    def add(name: str, shape: tuple[int, ...], values: np.ndarray) -> None:
        tensors[name] = "F32", shape, np.broadcast_to(values.astype("<f4"), shape).tobytes()

    for spec in specs:
        *lead, rows, n = spec.shape
        inputs = np.diag(np.linspace(0.5, 2, n))
        add(f"{spec.name}.inputs", (*lead, n, n), inputs)
        add(f"{spec.name}.outputs", (*lead, rows), np.ones(1))
        if lead:
            add(f"{spec.name}.tokens", (*lead,), np.full(1, 8.0))
            add(f"{spec.name}.pooled", (n, n), inputs)
    _write_tensors(path, tensors)


def _reference_cache(path: Path) -> None:
    """Of two chunks of a model whose logits are random."""

    class Random:
        def logits(self, tokens: np.ndarray, start: int) -> Iterator[tuple[int, np.ndarray]]:
            rows = np.random.default_rng(int(tokens[0])).normal(size=(len(tokens) - start, 70)).astype(np.float32)
            yield start, 3 * rows

    chunks = np.arange(16, dtype=np.int32).reshape(2, 8)
    header = Header(reference={"path": "r.gguf"}, settings={}, text={}, n_vocab=70, bos=1, chunk=8, chunks=2)
    reference_cache.make(path, header, cast(Runtime, Random()), chunks)


def _stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    from lowbit.checkpoint.safetensors_file import SafetensorsFile

    file = SafetensorsFile(folder / "model.safetensors")
    return {name: (entry.dtype, entry.shape, file.raw(name).tobytes()) for name, entry in file.entries.items()}


def _write_tensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    path.write_bytes(safetensors(json.dumps(header).encode(), data))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _bf16(values: np.ndarray) -> bytes:
    grid = get("bf16")
    return grid.pack(grid.quantize(values.astype(np.float32).reshape(1, -1))).tobytes()
