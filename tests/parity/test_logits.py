"""The packed file computes in llama.cpp what transformers computes: the test that matters most.

Weights in F32, an f32 cache, flash attention off: what is left is the order of float32 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit
from lowbit.run.llama_cpp import LlamaCpp

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LLAMAS: dict[str, dict[str, Any]] = {
    "untied, grouped queries": {},
    "tied": {"tie_word_embeddings": True},
    "one key-value head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 4},
    "head_dim of its own": {"head_dim": 32},
    "odd head count": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3},
    "rope llama3": {"rope_parameters": LLAMA3_ROPE},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "epsilon": {"rms_norm_eps": 1e-2},
}
QWENS: dict[str, dict[str, Any]] = {
    "untied, grouped queries": {},
    "tied": {"tie_word_embeddings": True},
    "one key-value head": {"num_key_value_heads": 1},
    "head_dim of its own": {"head_dim": 64},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "epsilon": {"rms_norm_eps": 1e-2},
}
_LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
GEMMAS: dict[str, dict[str, Any]] = {
    "window shorter than the text": {},
    "window longer than the text": {"sliding_window": 256},
    "one key-value head": {"num_key_value_heads": 1, "num_attention_heads": 2},
    "two full layers": {"num_hidden_layers": 12},
    "untied": {"tie_word_embeddings": False},
    "rope linear on the full layers": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": _LOCAL,
        }
    },
}


def transformers_logits(folder: Path, tokens: np.ndarray, **options: Any) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    options |= {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    if "quantization_config" in options:  # experts come in the dtype of their scales, and are computed with in it
        model = model.float()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None].long()).logits[0].numpy()


def llama_cpp_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    with LlamaCpp(path, context=256, threads=1, kv_type="f32", flash_attention=False) as model:
        return np.concatenate([rows for _, rows in model.logits(tokens)])


def compare(ours: np.ndarray, theirs: np.ndarray, record: Callable[[str, object], None], most: float) -> None:
    """Top-1 at every position, KL(theirs || ours) below ``most`` at every position; the largest difference is told."""
    assert ours.shape == theirs.shape

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x -= x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(theirs), log_softmax(ours)
    kl = (np.exp(p) * (p - q)).sum(-1)
    record("largest_logit_difference", float(np.abs(ours - theirs).max()))
    record("largest_kl", float(kl.max()))
    print(f"largest logit difference {np.abs(ours - theirs).max():.2e}, largest KL {kl.max():.2e}")
    # A model that says the same everywhere would pass whatever attention does.
    assert np.ptp(theirs, axis=0).max() > 0.5
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
    assert kl.max() < most


def tokens_of(vocab: int = 263, n: int = 120) -> np.ndarray:
    return np.random.default_rng(1).integers(3, vocab, n).astype(np.int32)


@pytest.mark.parametrize("variant", LLAMAS)
def test_llama(tiny_llama: Callable[..., Path], tmp_path: Path, record_property: Any, variant: str) -> None:
    folder, tokens = tiny_llama(**LLAMAS[variant]), tokens_of()
    lowbit.pack(folder, "f32", tmp_path / "f32.gguf")
    compare(llama_cpp_logits(tmp_path / "f32.gguf", tokens), transformers_logits(folder, tokens), record_property, 1e-6)


@pytest.mark.parametrize("variant", QWENS)
def test_qwen3(tiny_qwen3: Callable[..., Path], tmp_path: Path, record_property: Any, variant: str) -> None:
    folder, tokens = tiny_qwen3(**QWENS[variant]), tokens_of()
    lowbit.pack(folder, "f32", tmp_path / "f32.gguf")
    compare(llama_cpp_logits(tmp_path / "f32.gguf", tokens), transformers_logits(folder, tokens), record_property, 1e-6)


@pytest.mark.parametrize("variant", GEMMAS)
def test_gemma3(tiny_gemma3: Callable[..., Path], tmp_path: Path, record_property: Any, variant: str) -> None:
    folder, tokens = tiny_gemma3(**GEMMAS[variant]), tokens_of()
    lowbit.pack(folder, "f32", tmp_path / "f32.gguf")
    compare(llama_cpp_logits(tmp_path / "f32.gguf", tokens), transformers_logits(folder, tokens), record_property, 1e-5)


def test_a_packed_file_is_read_back_as_the_same_model(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """GGUF to folder: what open_checkpoint rebuilds from the packed file is the model that was packed."""
    from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint

    folder, tokens = tiny_llama(rope_parameters=LLAMA3_ROPE | {"original_max_position_embeddings": 8192}), tokens_of()
    lowbit.pack(folder, "f32", tmp_path / "f32.gguf")
    with open_checkpoint(tmp_path / "f32.gguf") as packed:
        write_checkpoint(tmp_path / "back", packed, (Tensor(name=n, values=packed.read(n)) for n in packed.names))
    assert (transformers_logits(tmp_path / "back", tokens) == transformers_logits(folder, tokens)).all()


def test_a_packed_qwen3_is_read_back_as_the_same_model(tiny_qwen3: Callable[..., Path], tmp_path: Path) -> None:
    from lowbit.checkpoint import open_checkpoint

    folder = tiny_qwen3(tie_word_embeddings=True)
    lowbit.pack(folder, "f32", tmp_path / "f32.gguf")
    with open_checkpoint(folder) as source, open_checkpoint(tmp_path / "f32.gguf") as packed:
        assert packed.names == source.names
        assert all(np.array_equal(packed.read(name), source.read(name)) for name in source.names)
        assert packed.family.metadata(packed.config) == source.family.metadata(source.config)


def test_smollm2(packaged_gguf: Callable[[str], Path], tmp_path: Path, record_property: Any) -> None:
    """The real SmolLM2: its weights, unpacked into a Hugging Face folder, against its F32 pack."""
    from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint

    with open_checkpoint(packaged_gguf("smollm2-135m")) as source:
        tensors = (Tensor(name=name, values=source.read(name)) for name in source.names)
        folder = write_checkpoint(tmp_path / "folder", source, tensors)
        lowbit.pack(source, "f32", tmp_path / "f32.gguf")
    with LlamaCpp(tmp_path / "f32.gguf", context=256, threads=1, kv_type="f32", flash_attention=False) as model:
        tokens = np.array(model.tokenize("In the beginning the Universe was created. This made people angry.\n" * 4))
    compare(llama_cpp_logits(tmp_path / "f32.gguf", tokens), transformers_logits(folder, tokens), record_property, 1e-6)
