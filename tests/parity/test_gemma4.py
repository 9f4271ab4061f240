"""Gemma 4 in llama.cpp against transformers, in the layout of every released size, the drafters beside their target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_logits import compare, llama_cpp_logits, tokens_of, transformers_logits

import lowbit
from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint
from lowbit.run.llama_cpp import LlamaCpp

_WINDOW, _FULL = "sliding_attention", "full_attention"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "E2B": ("E2B", {}),
    "E2B, window longer than the text": ("E2B", {"sliding_window": 256}),
    "E2B in a multimodal model": ("E2B", {"multimodal": True}),
    "E4B": ("E2B", {"use_double_wide_mlp": False, "num_key_value_heads": 2}),
    "per-layer embeddings, nothing shared": ("E2B", {"num_kv_shared_layers": 0}),
    "31B": ("31B", {}),
    "31B, logits not capped": ("31B", {"final_logit_softcapping": None}),
    "31B, untied": ("31B", {"tie_word_embeddings": False}),
    "31B, values of their own": ("31B", {"attention_k_eq_v": False}),
    "31B, whole heads rotated": (
        "31B",
        {
            "rope_parameters": {
                _FULL: {"rope_type": "default", "rope_theta": 10000.0},
                _WINDOW: {"rope_type": "default", "rope_theta": 5000.0},
            }
        },
    ),
    "26B-A4B": ("26B-A4B", {}),
    "26B-A4B, one expert a token": ("26B-A4B", {"top_k_experts": 1}),
    "12B": ("12B", {}),
    "12B in a multimodal model": ("12B", {"multimodal": True}),
}


def decided_tokens(folder: Path) -> np.ndarray:
    """Random tokens on which no two experts are so close that rounding chooses between them.

    llama.cpp looks GELU up in a table of float16, so router logits (0.05 from each other, about) differ by 3e-5; one
    token sent to another expert changes all that follow.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if not config.get("enable_moe_block"):
        return tokens_of()
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    k = config["top_k_experts"]
    for seed in range(1000):
        tokens = np.random.default_rng(seed).integers(3, 263, 60).astype(np.int32)
        with torch.no_grad():
            routers = model(torch.from_numpy(tokens)[None].long(), output_router_logits=True).router_logits
        ranked = torch.cat(routers).log().sort(-1, descending=True).values
        if (ranked[:, k - 1] - ranked[:, k]).min() > 2e-4:
            return tokens
    raise AssertionError("every text leaves a token undecided")


@pytest.mark.parametrize("case", CASES)
def test_same_logits(tiny_gemma4: Callable[..., Path], tmp_path: Path, record_property: Any, case: str) -> None:
    layout, changes = CASES[case]
    folder = tiny_gemma4(layout, **changes)
    tokens = decided_tokens(folder)
    lowbit.pack(folder, "f32", tmp_path / "f32.gguf")
    compare(llama_cpp_logits(tmp_path / "f32.gguf", tokens), transformers_logits(folder, tokens), record_property, 5e-6)


@pytest.mark.parametrize("layout", ["E2B", "31B", "26B-A4B", "12B"])
def test_a_q4_0_file_computes_what_its_blocks_say(
    tiny_gemma4: Callable[..., Path], tmp_path: Path, record_property: Any, layout: str
) -> None:
    """llama.cpp loads it, and its weights as F32 give what transformers computes from what the blocks decode to."""
    lowbit.pack(tiny_gemma4(layout), "q4_0", tmp_path / "q4_0.gguf")
    with open_checkpoint(tmp_path / "q4_0.gguf") as source:
        tensors = (Tensor(name=name, values=source.read(name)) for name in source.names)
        back = write_checkpoint(tmp_path / "back", source, tensors)
        lowbit.pack(source, "f32", tmp_path / "f32.gguf")
    tokens = decided_tokens(back)
    reference = transformers_logits(back, tokens)
    compare(llama_cpp_logits(tmp_path / "f32.gguf", tokens), reference, record_property, 5e-6)
    # Against quantized weights llama.cpp rounds activations to 8 bits; what is far off would be other weights.
    quantized = llama_cpp_logits(tmp_path / "q4_0.gguf", tokens)
    assert np.corrcoef(quantized.ravel(), reference.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("layout", ["E2B", "31B", "26B-A4B", "12B"])
def test_a_packed_file_is_read_back_as_the_same_model(
    tiny_gemma4: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    folder = tiny_gemma4(layout)
    lowbit.pack(folder, "f32", tmp_path / "f32.gguf")
    with open_checkpoint(folder) as source, open_checkpoint(tmp_path / "f32.gguf") as packed:
        assert packed.names == source.names
        assert all(np.array_equal(packed.read(name), source.read(name)) for name in source.names)
        assert packed.family.metadata(packed.config) == source.family.metadata(source.config)
        computed, again = source.family.computed(source.config), packed.family.computed(packed.config)
        assert all(np.array_equal(again[name], values) for name, values in computed.items())
    for path in (folder, tmp_path / "f32.gguf"):
        found = lowbit.inspect(path)
        assert (found["problem"], found["architecture"], found["tied"], found["layers"]) == (None, "gemma4", True, 6)


def test_special_tokens(tiny_gemma4: Callable[..., Path]) -> None:
    """What ends an answer, what is shown of one, and text in between, as llama.cpp takes them from the file."""
    from transformers import AutoTokenizer

    folder = tiny_gemma4("31B")
    lowbit.pack(folder, "f32", folder / "f32.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = (
        '<|turn>user\n\nthe  thing é<turn|>\n<|channel>thought<channel|><|tool_call>call:f{x:<|"|>v<|"|>}<tool_call|>'
    )
    with LlamaCpp(folder / "f32.gguf", context=64, threads=1, logits_all=False) as model:
        assert model.tokenize(turn, parse_special=True) == tokenizer(turn).input_ids
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
        ids |= {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|turn>", "<turn|>", "<|tool_response>")}
        assert {token for token, i in ids.items() if model.ends(i)} == {"<eos>", "<turn|>", "<|tool_response>"}
        assert model.adds_bos and model.bos == ids["<bos>"] and model.eos == ids["<eos>"]
        shown = [tokenizer.convert_tokens_to_ids(token) for token in ("<|channel>", "<|turn>", "<|tool_call>")]
        assert model.detokenize(shown) == "<|channel><|tool_call>"


def test_keys_and_values_of_layers_that_share_them_are_left_out(
    tiny_gemma4: Callable[..., Path], tmp_path: Path
) -> None:
    """The released checkpoints of E2B and E4B have them; nothing reads them."""
    folder = tiny_gemma4("E2B")
    lowbit.pack(folder, "f32", tmp_path / "without.gguf")
    tensors = load_file(folder / "model.safetensors")
    for part, shape in (("k_proj", (32, 64)), ("v_proj", (32, 64)), ("k_norm", (32,))):
        tensors[f"model.layers.3.self_attn.{part}.weight"] = np.ones(shape, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    lowbit.pack(folder, "f32", tmp_path / "with.gguf")
    assert (tmp_path / "with.gguf").read_bytes() == (tmp_path / "without.gguf").read_bytes()


def test_older_spellings_of_the_full_layers_sizes(tiny_gemma4: Callable[..., Path]) -> None:
    """What the released config.json files say, and what transformers 5.23 makes of it, are one config."""
    folder = tiny_gemma4("31B")
    with open_checkpoint(folder) as source:
        new = source.config
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["per_layer_config"]
    config |= {"global_head_dim": 64, "num_global_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with open_checkpoint(folder) as source:
        assert source.config == new
