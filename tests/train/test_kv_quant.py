"""The simulated KV cache against llama.cpp's own: the same bytes for the same keys and values, the same attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_state import Layer, cache_of

import lowbit
from lowbit import grid as grids
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadOption, Unsupported
from lowbit.grid import _hadamard, _on_the_fly
from lowbit.run._kv_types import UNQUANTIZED
from lowbit.run.llama_cpp import LlamaCpp
from lowbit.train import kv_quant
from lowbit.train.model import load

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


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 192])
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
    """Global layers are of other head sizes, later layers share, keys are values: each cache is turned in its own way."""
    folder = silent(tiny_gemma4(layout, head_dim=64, global_head_dim=128))
    n_global = {"E2B": 1, "31B": 1}[layout]
    check_bytes(packed(folder), "q4_0", lambda i: 128 if i < n_global else 64)
