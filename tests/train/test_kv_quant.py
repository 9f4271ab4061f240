"""The simulated KV cache against llama.cpp's own: the same bytes for the same keys and values, the same attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_state import Layer, cache_of

import lowbit
from lowbit import grid as grids
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadOption, Unsupported
from lowbit.grid import _hadamard, _on_the_fly
from lowbit.run._hf_model import load
from lowbit.run._kv_types import UNQUANTIZED
from lowbit.run.llama_cpp import LlamaCpp
from lowbit.train import kv_quant

TOKENS = np.random.default_rng(0).integers(3, 300, 100).astype(np.int32)
TYPES = ("q4_0", "q8_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "f16", "bf16", "q8_0:q4_0", "f16:q5_1")


def silent(folder: Path) -> Path:
    """Takes the attention out of a checkpoint's residual stream, so that keys and values are the same for any cache."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "o_proj" in name:
            tensors[name].zero_()
    save_file(tensors, path, {"format": "pt"})
    return folder


def packed(folder: Path) -> Path:
    return lowbit.pack(folder, "f32", folder.parent / f"{folder.name}.gguf").path


def stored(values: np.ndarray, name: str, head_dim: int, width: int | None) -> np.ndarray:
    """The bytes that values (cells, n) float32 have in a cache of that type, by lowbit's arithmetic."""
    grid = grids.get(name)
    x = torch.from_numpy(np.array(values)).unflatten(-1, (-1, head_dim))
    if width is not None:
        x = _hadamard.rotate(x, width)
    blocks = _on_the_fly.cache_blocks(grid, x.numpy())
    return grid.pack(blocks).reshape(len(values), -1)


def floats(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.float32)


def check_bytes(path: Path, kv_type: str, head_dims: Callable[[int], int]) -> list[Layer]:
    k, _, v = kv_type.partition(":")
    exact, found = cache_of(path, TOKENS, "f32"), cache_of(path, TOKENS, kv_type)
    assert len(exact) == len(found) > 0
    for i, (given, got) in enumerate(zip(exact, found, strict=True)):
        assert given.positions == got.positions and len(got.positions) > 8
        head_dim = head_dims(i)
        of_keys = None if k in UNQUANTIZED else _hadamard.width_of_keys(head_dim)
        of_values = None if (v or k) in UNQUANTIZED else _hadamard.width_of_values(head_dim)
        assert got.turned == (of_keys or 0, of_values or 0)
        keys = stored(floats(given.keys), k, head_dim, of_keys)
        values = stored(floats(given.values), v or k, head_dim, of_values)
        np.testing.assert_array_equal(keys, got.keys)
        np.testing.assert_array_equal(values, got.values)
    return exact


@pytest.mark.parametrize(
    ("kv_type", "head_dim"), [*((name, 64) for name in TYPES), ("q4_0", 32), ("q4_0", 192), ("q8_0:q5_1", 192)]
)
def test_the_same_bytes_as_llama_cpps_cache(tiny_llama: Callable[..., Path], kv_type: str, head_dim: int) -> None:
    """Zero differing bytes, in every layer, turned (whole 64s) or not."""
    exact = check_bytes(packed(silent(tiny_llama(head_dim=head_dim))), kv_type, lambda _: head_dim)
    assert len({bytes(layer.keys) for layer in exact}) == 3  # layers are not copies of one another


@pytest.mark.parametrize("kv_type", ["q4_0", "q8_0:q5_1"])
def test_the_same_bytes_with_sliding_windows(tiny_gemma3: Callable[..., Path], kv_type: str) -> None:
    exact = check_bytes(packed(silent(tiny_gemma3(head_dim=256, query_pre_attn_scalar=256))), kv_type, lambda _: 256)
    assert {len(layer.positions) for layer in exact} == {16, 100}


@pytest.mark.parametrize("layout", ["E2B", "31B"])
def test_the_same_bytes_in_gemma_4(tiny_gemma4: Callable[..., Path], layout: str) -> None:
    """Global layers have other heads, later layers share, keys are values: each cache is turned in its own way."""
    folder = silent(tiny_gemma4(layout, head_dim=64, global_head_dim=128))
    n_global = {"E2B": 1, "31B": 1}[layout]
    check_bytes(packed(folder), "q4_0", lambda i: 128 if i < n_global else 64)


@pytest.mark.parametrize("kv_type", ["q4_0", "q8_0:q4_0"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "E2B", "31B", "26B-A4B"])
def test_attention_is_llama_cpps(of_family: Callable[[str], Path], family: str, kv_type: str) -> None:
    """The whole model against llama.cpp with that cache: what is left is its rounding of queries to Q8_0 and sums in
    another order, which move keys near the middle between two codes. It is a small part of what the cache does."""
    folder = of_family(family)
    path = packed(folder)
    with open_checkpoint(folder) as checkpoint, torch.no_grad():
        model = load(checkpoint)
        quantizer = kv_quant.quantizer_of(checkpoint, kv_type)
        tokens = torch.from_numpy(TOKENS.astype(np.int64))[None]
        plain = log_softmax(model(tokens).logits[0])
        with kv_quant.simulated(model, quantizer):
            simulated = log_softmax(model(tokens).logits[0])
        again = log_softmax(model(tokens).logits[0])
    with LlamaCpp(path, context=256, threads=1, kv_type=kv_type, flash_attention=True) as runtime:
        real = log_softmax(torch.from_numpy(np.concatenate([rows for _, rows in runtime.logits(TOKENS)])))
    assert torch.equal(plain, again)
    done, missed = divergence(plain, real), divergence(simulated, real)
    most = 0.5 if family == "26B-A4B" else 0.25  # its tokens may be sent to other experts
    assert done > 1e-4 and missed < most * done, (done, missed)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), -1)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kv_type", ["q4_0", "q8_0", "q4_1", "q5_0", "q5_1", "iq4_nl"])
def test_the_gradient_goes_through_and_to_the_extremes(tiny_llama: Callable[..., Path], kv_type: str) -> None:
    """What is left beside the gradient itself says what a larger block would cost: errors grow with it."""
    with open_checkpoint(tiny_llama(head_dim=64)) as checkpoint:
        quantizer = kv_quant.quantizer_of(checkpoint, kv_type)
    assert quantizer.interleaved
    for rounding in (quantizer.keys, quantizer.values):
        x = torch.randn(2, 2, 5, 64, requires_grad=True)
        weight = torch.randn(2, 2, 5, 64)
        found = rounding(x)
        (found * weight).sum().backward()
        assert x.grad is not None
        error = (found - x).detach()
        assert 0 < float(error.square().mean() / x.detach().square().mean()) < 0.02
        # Summed over all blocks, a step's growth is that of x, but for q4_1 and q5_1 where the least value moves too.
        extra = ((x.grad - weight) * x.detach()).sum(-1)
        torch.testing.assert_close(extra, (error * weight).sum(-1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(rounding(1.7 * x.detach()), 1.7 * found.detach(), rtol=2e-2, atol=2e-2)


def test_a_share_of_a_batch(tiny_llama: Callable[..., Path]) -> None:
    with open_checkpoint(tiny_llama(head_dim=64)) as checkpoint:
        whole, half = kv_quant.quantizer_of(checkpoint, "q4_0"), kv_quant.quantizer_of(checkpoint, "q4_0", 0.5)
    x = torch.randn(4, 2, 5, 64)
    assert torch.equal(half.keys(x)[2:], x[2:]) and torch.equal(half.keys(x)[:2], whole.keys(x)[:2])
    assert not torch.equal(whole.keys(x)[2:], x[2:])


def test_what_cannot_be_is_refused(tiny_llama: Callable[..., Path], tiny_qwen3: Callable[..., Path]) -> None:
    with open_checkpoint(tiny_llama(head_dim=16)) as checkpoint:
        with pytest.raises(Unsupported, match="whole blocks"):
            kv_quant.quantizer_of(checkpoint, "f16:q4_0")
        with pytest.raises(BadOption, match="unknown KV cache type"):
            kv_quant.quantizer_of(checkpoint, "q3_0")
        assert kv_quant.quantizer_of(checkpoint, "f16") is not None
    with open_checkpoint(tiny_qwen3()) as checkpoint:
        assert not kv_quant.quantizer_of(checkpoint, "q8_0").interleaved
