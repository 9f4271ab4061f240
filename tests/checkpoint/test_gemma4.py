"""Gemma 4: the released sizes, from their configs' numbers to tensors and metadata, and configs that are refused.

The numbers are those of transformers' conversion of the released weights; the 12B's and the E2B drafter's are their
config.json. What they must come to is published elsewhere: parameters in the model cards, tensor counts in llama.cpp's
load logs of released GGUFs (E2B, 26B-A4B and 31B).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit
from lowbit.checkpoint import families, open_checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.gguf_file import Field, GgufFile, TensorHead, write_header
from lowbit.errors import BadConfig, BadFile, LowbitError, Unsupported
from lowbit.pack import verify

_WINDOW, _FULL = "sliding_attention", "full_attention"
_ROPES = {
    _FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    _WINDOW: {"rope_theta": 10000.0, "rope_type": "default"},
}
_COMMON: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "dtype": "bfloat16", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "model_type": "gemma4_text",
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_parameters": _ROPES, "tie_word_embeddings": True,
    "use_cache": True, "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "moe_intermediate_size": None,
    "num_experts": None, "top_k_experts": None, "enable_moe_block": False, "use_double_wide_mlp": False,
    "num_global_key_value_heads": None, "attention_k_eq_v": False, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision", "max_position_embeddings": 262144,
    "sliding_window": 1024,
}  # fmt: skip
_SMALL = {
    "use_bidirectional_attention": None, "max_position_embeddings": 131072, "sliding_window": 512,
    "hidden_size_per_layer_input": 256, "num_attention_heads": 8,
}  # fmt: skip


def _layers(n: int, period: int = 6) -> dict[str, Any]:
    return {"num_hidden_layers": n, "layer_types": ([_WINDOW] * (period - 1) + [_FULL]) * (n // period)}


TEXT: dict[str, dict[str, Any]] = {
    "E2B": _COMMON | _SMALL | _layers(35, 5) | {
        "hidden_size": 1536, "intermediate_size": 6144, "num_key_value_heads": 1, "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
    },
    "E4B": _COMMON | _SMALL | _layers(42) | {
        "hidden_size": 2560, "intermediate_size": 10240, "num_key_value_heads": 2, "num_kv_shared_layers": 18,
    },
    "12B": _COMMON | _layers(48) | {
        "model_type": "gemma4_unified_text", "hidden_size": 3840, "intermediate_size": 15360,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
    "26B-A4B": _COMMON | _layers(30) | {
        "hidden_size": 2816, "intermediate_size": 2112, "num_attention_heads": 16, "num_key_value_heads": 8,
        "num_global_key_value_heads": 2, "attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 128,
        "top_k_experts": 8, "moe_intermediate_size": 704,
    },
    "31B": _COMMON | _layers(60) | {
        "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "num_key_value_heads": 16,
        "num_global_key_value_heads": 4, "attention_k_eq_v": True,
    },
}  # fmt: skip
_DRAFTER = _COMMON | _layers(4, 4) | {
    "num_kv_shared_layers": 4, "vocab_size_per_layer_input": 0, "hidden_size": 1024, "intermediate_size": 8192,
    "final_logit_softcapping": None, "architectures": None, "expert_intermediate_size": None,
}  # fmt: skip
_SMALL_DRAFTER = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4, "sliding_window": 512}
DRAFTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "E2B": (1536, _DRAFTER | _SMALL_DRAFTER | {"num_key_value_heads": 1}),
    "E4B": (2560, _DRAFTER | _SMALL_DRAFTER | {"num_key_value_heads": 2}),
    **{
        size: (
            TEXT[size]["hidden_size"],
            _DRAFTER | {
                key: TEXT[size][key] for key in (
                    "model_type", "num_attention_heads", "num_key_value_heads", "num_global_key_value_heads",
                    "attention_k_eq_v",
                )
            },
        )
        for size in ("12B", "26B-A4B", "31B")
    },
}  # fmt: skip


def whole(size: str) -> dict[str, Any]:
    """The released config.json: the text model's numbers within a multimodal model's."""
    kind = "gemma4_unified" if size == "12B" else "gemma4"
    name = "Gemma4UnifiedForConditionalGeneration" if size == "12B" else "Gemma4ForConditionalGeneration"
    others = {"audio_token_id": 258881, "image_token_id": 258880, "vision_config": {"model_type": f"{kind}_vision"}}
    return {"architectures": [name], "model_type": kind, "text_config": TEXT[size], **others}


def drafter(size: str) -> dict[str, Any]:
    kind, name = ("gemma4_unified", "Gemma4Unified") if size == "12B" else ("gemma4", "Gemma4")
    backbone, text = DRAFTERS[size]
    return {
        "architectures": [f"{name}AssistantForCausalLM"], "backbone_hidden_size": backbone, "text_config": text,
        "centroid_intermediate_top_k": 32, "model_type": f"{kind}_assistant", "num_centroids": 2048,
        "tie_word_embeddings": True, "use_ordered_embeddings": size in ("E2B", "E4B"), "dtype": "bfloat16",
        "audio_token_id": 258881, "boa_token_id": 256000, "boi_token_id": 255999, "eoa_token_id": 258883,
        "eoi_token_id": 258882, "image_token_id": 258880,
    }  # fmt: skip


def described(config: dict[str, Any]) -> tuple[dict[str, Any], tuple[TensorSpec, ...], dict[str, Any]]:
    family = families.by_config(config, "config.json")
    checked = family.text_config(config, "config.json")
    return checked, family.tensors(checked), {field.key: field.value for field in family.metadata(checked)}


def weights(specs: tuple[TensorSpec, ...], *roles: str) -> int:
    return sum(math.prod(spec.shape) for spec in specs if not roles or spec.role in roles)


@pytest.mark.parametrize(
    ("size", "billions", "tensors", "unused"),
    [("E2B", 4.63, 601, 20 * 3), ("E4B", 7.46, 720, 18 * 3), ("12B", 11.91, 667, 0), ("26B-A4B", 25.23, 658, 0),
     ("31B", 30.70, 833, 0)],
)  # fmt: skip
def test_a_released_size(size: str, billions: float, tensors: int, unused: int) -> None:
    """Released GGUFs also have rope_freqs, and the keys and values that sharing layers do not use."""
    checked, specs, _ = described(whole(size))
    assert round(weights(specs) / 1e9, 2) == billions
    assert len(specs) + 1 + unused == tensors
    assert len({spec.name for spec in specs}) == len({spec.gguf_name for spec in specs}) == len(specs)
    assert checked["model_type"] == ("gemma4_unified_text" if size == "12B" else "gemma4_text")
    # The text model's own config is the same model.
    assert described(TEXT[size])[1] == specs


def test_the_model_cards_figures() -> None:
    """2.3B effective, 25.2B with 3.8B active, 30.7B, and 2.35e9 and 2.82e9 weights of per-layer embeddings."""
    by_size = {size: described(whole(size))[1] for size in TEXT}
    embeddings = {size: weights(by_size[size], "per_layer_embedding") for size in ("E2B", "E4B")}
    assert embeddings == {"E2B": 262144 * 35 * 256, "E4B": 262144 * 42 * 256}
    assert round((weights(by_size["E2B"]) - embeddings["E2B"]) / 1e9, 1) == 2.3
    moe = by_size["26B-A4B"]
    experts = weights(moe, "experts_gate_up", "experts_down")
    assert round((weights(moe) - experts * 120 // 128) / 1e9, 1) == 3.8


@pytest.mark.parametrize(("size", "millions"), [("E2B", 77), ("E4B", 78), ("12B", 423), ("26B-A4B", 420), ("31B", 470)])
def test_a_released_drafter(size: str, millions: int) -> None:
    _, specs, values = described(drafter(size))
    assert round(weights(specs) / 1e6) == millions
    assert len(specs) == 48
    arch = "gemma4-assistant"
    assert values[f"{arch}.embedding_length_out"] == TEXT[size]["hidden_size"]
    assert values[f"{arch}.nextn_predict_layers"] == values[f"{arch}.attention.shared_kv_layers"] == 4
    # It reads the target's cache, so its layers have the target's key-value heads.
    target = described(whole(size))[2]["gemma4.attention.head_count_kv"]
    of_target = target[-2:] if isinstance(target, list) else [target] * 2
    own = values[f"{arch}.attention.head_count_kv"]
    assert (own[-2:] if isinstance(own, list) else [own] * 2) == of_target


def test_the_metadata_of_e2b_is_that_of_the_released_file() -> None:
    """As llama.cpp's load log shows the GGUF that its converter made."""
    _, _, values = described(whole("E2B"))
    assert values == {
        "gemma4.block_count": 35,
        "gemma4.context_length": 131072,
        "gemma4.embedding_length": 1536,
        "gemma4.feed_forward_length": [6144] * 15 + [12288] * 20,
        "gemma4.attention.head_count": 8,
        "gemma4.attention.head_count_kv": 1,
        "gemma4.rope.freq_base": 1000000.0,
        "gemma4.rope.freq_base_swa": 10000.0,
        "gemma4.attention.layer_norm_rms_epsilon": 1e-06,
        "gemma4.attention.key_length": 512,
        "gemma4.attention.value_length": 512,
        "gemma4.final_logit_softcapping": 30.0,
        "gemma4.attention.sliding_window": 512,
        "gemma4.attention.shared_kv_layers": 20,
        "gemma4.embedding_length_per_layer_input": 256,
        "gemma4.attention.sliding_window_pattern": [True, True, True, True, False] * 7,
        "gemma4.attention.key_length_swa": 256,
        "gemma4.attention.value_length_swa": 256,
        "gemma4.rope.dimension_count": 512,
        "gemma4.rope.dimension_count_swa": 256,
    }


def test_layers_differ_as_the_cards_say() -> None:
    shapes = {spec.name: spec.shape for spec in described(whole("26B-A4B"))[1]}
    window, full = "model.layers.0.", "model.layers.5."
    assert shapes[window + "self_attn.k_proj.weight"] == shapes[window + "self_attn.v_proj.weight"] == (8 * 256, 2816)
    assert shapes[full + "self_attn.k_proj.weight"] == (2 * 512, 2816)
    assert full + "self_attn.v_proj.weight" not in shapes
    assert shapes[full + "experts.gate_up_proj"] == (128, 2 * 704, 2816)
    assert shapes[full + "experts.down_proj"] == (128, 2816, 704)
    shapes = {spec.name: spec.shape for spec in described(whole("E2B"))[1]}
    assert shapes["model.layers.14.mlp.gate_proj.weight"] == (6144, 1536)
    assert shapes["model.layers.15.mlp.gate_proj.weight"] == (12288, 1536)
    assert "model.layers.14.self_attn.k_proj.weight" in shapes
    assert "model.layers.15.self_attn.k_proj.weight" not in shapes
    factors = families.by_arch("gemma4", "x").computed(described(whole("E2B"))[0])["rope_freqs.weight"]
    assert factors.tolist() == [1.0] * 64 + [float(np.float32(1e30))] * 192


def test_what_a_multimodal_config_leaves_out_is_filled_in() -> None:
    from transformers import Gemma4TextConfig, Gemma4UnifiedTextConfig

    for kind, config_class in (("gemma4", Gemma4TextConfig), ("gemma4_unified", Gemma4UnifiedTextConfig)):
        filled = config_class().to_dict()
        checked, _, _ = described({"model_type": kind, "text_config": {"model_type": f"{kind}_text"}})
        for key in ("hidden_size", "num_hidden_layers", "head_dim", "sliding_window", "max_position_embeddings"):
            assert checked[key] == filled[key], key
        assert checked["hidden_size_per_layer_input"] == filled.get("hidden_size_per_layer_input", 0)
        assert checked["layer_types"] == filled["layer_types"]
        assert checked["rope_parameters"] == filled["rope_parameters"]
        changed = {str(int(i)): values for i, values in filled["per_layer_config"].items()}
        assert checked["per_layer_config"] == changed


REFUSED: dict[str, tuple[str, dict[str, Any], type[LowbitError], str]] = {
    "everything attends to everything": ("31B", {"use_bidirectional_attention": "all"}, Unsupported, "bidirectional"),
    "biases": ("31B", {"attention_bias": True}, Unsupported, "attention_bias"),
    "another activation": ("31B", {"hidden_activation": "silu"}, Unsupported, "hidden_activation"),
    "an unknown key": ("31B", {"altup": 1}, BadConfig, "unknown key altup"),
    "a window at the end": ("31B", {"layer_types": [_WINDOW] * 60}, Unsupported, "layer_types"),
    "no window": ("31B", {"layer_types": [_FULL] * 60}, Unsupported, "layer_types"),
    "too few layer types": ("31B", {"layer_types": [_FULL]}, BadConfig, "layer_types"),
    "layers of another kind": ("31B", {"layer_types": ["linear_attention"] * 60}, BadConfig, "layer_types"),
    "layers of no kind": ("31B", {"layer_types": [[]] * 60}, BadConfig, "layer_types"),
    "sharing from another layer": ("E2B", {"num_kv_shared_layers": 19}, Unsupported, "num_kv_shared_layers"),
    "more sharing layers than layers": ("E2B", {"num_kv_shared_layers": 36}, BadConfig, "num_kv_shared_layers"),
    "nothing but sharing layers": ("E2B", {"num_kv_shared_layers": 35}, Unsupported, "35 of 35 layers share"),
    "a smaller per-layer vocabulary": ("E2B", {"vocab_size_per_layer_input": 1000}, Unsupported, "per-layer embedding"),
    "more experts used than there are": ("26B-A4B", {"top_k_experts": 129}, BadConfig, "contradict"),
    "experts of two sizes": ("26B-A4B", {"expert_intermediate_size": 96}, BadConfig, "contradict"),
    "experts without a size": ("26B-A4B", {"moe_intermediate_size": None}, BadConfig, "moe_intermediate_size"),
    "a head of odd size": ("31B", {"global_head_dim": 511}, BadConfig, "head sizes must be even"),
    "heads that do not divide": ("31B", {"num_global_key_value_heads": 5}, BadConfig, "multiple of the key-value"),
    "layers that differ otherwise": ("31B", {"per_layer_config": {"5": {"head_dim": 512}}}, Unsupported, "per_layer"),
    "a window layer of its own": ("31B", {"per_layer_config": {"0": {"head_dim": 512}}}, Unsupported, "per_layer"),
    "an unknown change of layers": (
        "31B", {"per_layer_config": {str(i): {"sliding_window": 5} for i in range(5, 60, 6)}}, BadConfig,
        "sliding_window",
    ),
    "a rotation of more than the head": (
        "31B", {"rope_parameters": {_FULL: {"rope_type": "proportional", "partial_rotary_factor": 2.0}}}, BadConfig,
        "partial_rotary_factor",
    ),
    "another rope": ("31B", {"rope_parameters": {_FULL: {"rope_type": "yarn", "factor": 2.0}}}, Unsupported, "yarn"),
    "one rope for all": ("31B", {"rope_parameters": {"rope_type": "default"}}, BadConfig, "rope_parameters"),
    "a cap below zero": ("31B", {"final_logit_softcapping": -1.0}, BadConfig, "final_logit_softcapping"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(case: str) -> None:
    size, changes, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        described(TEXT[size] | changes)


REFUSED_DRAFTERS: dict[str, tuple[dict[str, Any], dict[str, Any], type[LowbitError], str]] = {
    "layers of its own": ({}, {"num_kv_shared_layers": 2}, Unsupported, "keys and values of their own"),
    "experts": (
        {}, {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}, Unsupported,
        "enable_moe_block",
    ),
    "per-layer embeddings": (
        {}, {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 262144}, Unsupported, "per_layer_input",
    ),
    "the target's width": ({"backbone_hidden_size": 1024}, {}, Unsupported, "equal to backbone_hidden_size"),
    "a head of its own": ({"tie_word_embeddings": False}, {}, Unsupported, "tie_word_embeddings"),
    "an unknown key": ({"depth": 2}, {}, BadConfig, "unknown key depth"),
    "an unknown key within": ({}, {"depth": 2}, BadConfig, "text_config: unknown key depth"),
    "no text": ({"text_config": None}, {}, BadConfig, "text_config"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_DRAFTERS)
def test_a_drafter_that_is_refused(case: str) -> None:
    outer, inner, error, text = REFUSED_DRAFTERS[case]
    config = drafter("31B")
    with pytest.raises(error, match=text):
        described(config | {"text_config": config["text_config"] | inner} | outer)


def rewritten(path: Path, out: Path, changes: Mapping[str, Any], drop: str = "") -> Path:
    """A GGUF with other values of some keys (None drops one), and without the tensor ``drop``."""
    file = GgufFile(path)
    fields = [Field(f.key, changes.get(f.key, f.value), f.type, f.subtype) for f in file.fields]
    fields = [field for field in fields if field.value is not None]
    names = [name for name in file.entries if name != drop]
    with open(out, "wb") as handle:
        heads = [TensorHead(name, file.entries[name].shape, 0) for name in names]  # F32
        for name, offset in zip(names, write_header(handle, fields, heads), strict=True):
            handle.seek(offset)
            handle.write(file.raw(name).tobytes())
    return out


LIES: dict[str, tuple[dict[str, Any], str, type[LowbitError], str]] = {
    "no pattern": ({"gemma4.attention.sliding_window_pattern": None}, "", BadFile, "sliding_window_pattern"),
    "a short pattern": ({"gemma4.attention.sliding_window_pattern": [True]}, "", BadFile, "sliding_window_pattern"),
    "only windows": ({"gemma4.attention.sliding_window_pattern": [True] * 6}, "", Unsupported, "layer_types"),
    "more layers": ({"gemma4.block_count": 1 << 30}, "", BadFile, "more layers than the file has tensors"),
    "huge heads": ({"gemma4.attention.key_length": 1 << 30, "gemma4.attention.value_length": 1 << 30,
                    "gemma4.rope.dimension_count": 1 << 30}, "", Unsupported, "rope_freqs"),
    "sizes without a rule": ({"gemma4.feed_forward_length": [96, 96, 96, 192, 96, 192]}, "", Unsupported, "no rule"),
    "a size a layer for fewer layers": ({"gemma4.feed_forward_length": [96]}, "", BadFile, "feed_forward_length"),
    "values of another size": ({"gemma4.attention.value_length": 32}, "", Unsupported, "value_length"),
    "a part of a window's head rotated": ({"gemma4.rope.dimension_count_swa": 16}, "", Unsupported, "dimension_count"),
    "no rope_freqs": ({}, "rope_freqs.weight", BadFile, "rope_freqs.weight is missing"),
    "a missing tensor": ({}, "blk.3.inp_gate.weight", BadFile, "a tensor of the model is missing"),
    "a missing tensor of values": ({}, "blk.0.attn_v.weight", BadFile, "a tensor of the model is missing"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_gguf_that_lies(tiny_gemma4: Callable[..., Path], tmp_path: Path, lie: str) -> None:
    changes, drop, error, text = LIES[lie]
    whole_file = lowbit.pack(tiny_gemma4("E2B"), "f32", tmp_path / "whole.gguf").path
    with open_checkpoint(rewritten(whole_file, tmp_path / "same.gguf", {})) as same:
        assert same.names
    with pytest.raises(error, match=text):
        open_checkpoint(rewritten(whole_file, tmp_path / "lie.gguf", changes, drop))


def test_a_gguf_without_a_cap_has_llama_cpps(tiny_gemma4: Callable[..., Path], tmp_path: Path) -> None:
    path = lowbit.pack(tiny_gemma4("31B", final_logit_softcapping=None), "f32", tmp_path / "none.gguf").path
    with open_checkpoint(path) as found:
        assert found.config["final_logit_softcapping"] is None
    silent = rewritten(path, tmp_path / "silent.gguf", {"gemma4.final_logit_softcapping": None})
    with open_checkpoint(silent) as found:
        assert found.config["final_logit_softcapping"] == 30.0


def test_unused_tensors_of_released_ggufs_are_passed_over(tiny_gemma4: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp's converter writes the keys and values of sharing layers too."""
    folder = tiny_gemma4("E2B")
    path = lowbit.pack(folder, "f32", tmp_path / "own.gguf").path
    file = GgufFile(path)
    extra = {"blk.5.attn_k.weight": np.ones((64, 64), np.float32), "blk.5.attn_k_norm.weight": np.ones(64, np.float32)}
    heads = [TensorHead(name, entry.shape, 0) for name, entry in file.entries.items()]
    heads += [TensorHead(name, values.shape, 0) for name, values in extra.items()]
    data = [file.raw(name).tobytes() for name in file.entries] + [values.tobytes() for values in extra.values()]
    with open(tmp_path / "released.gguf", "wb") as handle:
        for raw, offset in zip(data, write_header(handle, file.fields, heads), strict=True):
            handle.seek(offset)
            handle.write(raw)
    with open_checkpoint(tmp_path / "released.gguf") as released, open_checkpoint(folder) as source:
        assert released.names == source.names
    proof = verify(tmp_path / "released.gguf", folder)
    assert proof.totals["exact"] == proof.totals["blocks"]
    assert json.dumps(proof.to_json())


@pytest.mark.parametrize("size", [64, 96, 144, 176])
@pytest.mark.parametrize("part", [0.05, 0.25, 1 / 3, 0.7, 1.0])
def test_the_rotated_part_is_read_back(size: int, part: float) -> None:
    from lowbit.checkpoint.families import _gemma4, _gemma4_gguf

    config: dict[str, Any] = {"global_head_dim": size, "rope_parameters": {_FULL: {"partial_rotary_factor": part}}}
    values = _gemma4.rope_freqs(config)
    assert (values == 1.0).sum() == int(part * size // 2)
    again: dict[str, Any] = {"global_head_dim": size, "rope_parameters": {_FULL: {}}}
    _gemma4_gguf.adopt_rope_freqs(again, values, "x")
    assert np.array_equal(_gemma4.rope_freqs(again), values)
    for wrong in (values[:-1], np.where(values == 1.0, 2.0, values), values[::-1] if part < 1 else values * 3):
        with pytest.raises(Unsupported, match="rope_freqs"):
            _gemma4_gguf.adopt_rope_freqs(again, wrong, "x")
