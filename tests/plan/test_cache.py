"""What each family says its layers cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lowbit.checkpoint import families, open_checkpoint
from lowbit.checkpoint.families.base import TARGET, LayerCache
from lowbit.errors import Unsupported
from tiny_configs import GEMMA4_LAYOUTS, TINY_GEMMA3, TINY_GEMMA4, TINY_LLAMA, TINY_QWEN3

EPS = {"rms_norm_eps": 1e-6}


def cache_of(model_type: str, config: dict[str, Any]) -> tuple[LayerCache, ...]:
    family = families.by_config({"model_type": model_type}, "test", to_plan=True)
    return family.cache(family.text_config({**config, "model_type": model_type}, "test"))


@pytest.mark.parametrize(
    ("model_type", "config", "dim"), [("llama", TINY_LLAMA | EPS, 16), ("qwen3", TINY_QWEN3 | EPS, 32)]
)
def test_layers_that_are_all_alike(model_type: str, config: dict[str, Any], dim: int) -> None:
    assert cache_of(model_type, config) == (LayerCache(kv_heads=2, k_dim=dim, v_dim=dim),) * 3


def test_every_sixth_layer_of_gemma_3_is_global() -> None:
    windows = [layer.window for layer in cache_of("gemma3_text", TINY_GEMMA3 | EPS)]
    assert windows == [16, 16, 16, 16, 16, None, 16]


def test_gemma_4_shares_the_last_layers_that_have_keys() -> None:
    layers = cache_of("gemma4_text", TINY_GEMMA4 | EPS | GEMMA4_LAYOUTS["E2B"])
    assert [layer.owner for layer in layers] == [None, None, None, 1, 1, 2]
    assert [(layer.window, layer.k_dim) for layer in layers] == [(16, 32), (16, 32), (None, 64)] * 2


def test_gemma_4_keeps_keys_that_are_values_twice() -> None:
    layers = cache_of("gemma4_text", TINY_GEMMA4 | EPS | GEMMA4_LAYOUTS["31B"])
    assert layers[0] == LayerCache(kv_heads=2, k_dim=32, v_dim=32, window=16)
    assert layers[5] == LayerCache(kv_heads=1, k_dim=64, v_dim=64)


def test_a_drafter_caches_nothing_of_its_own() -> None:
    text = TINY_GEMMA4 | EPS | {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    layers = cache_of("gemma4_assistant", {"text_config": text, "backbone_hidden_size": 128})
    assert [layer.owner for layer in layers] == [TARGET, TARGET]


def test_gemma_3n_shares_all_but_twenty_layers() -> None:
    layers = cache_of("gemma3n_text", {})
    assert [layer.owner for layer in layers] == [None] * 20 + [18, 18, 18, 18, 19] * 3
    assert layers[4] == LayerCache(kv_heads=2, k_dim=256, v_dim=256)
    assert layers[0].window == 512


# Parameters of the text models: E2B and E4B, as their model cards and exports count them.
@pytest.mark.parametrize(("layers", "wide", "published"), [(30, 8192, 4.46e9), (35, 16384, 6.87e9)], ids=["E2B", "E4B"])
def test_gemma_3n_has_as_many_weights_as_published(layers: int, wide: int, published: float) -> None:
    family = families.by_config({"model_type": "gemma3n_text"}, "test", to_plan=True)
    config = {"num_hidden_layers": layers, "num_kv_shared_layers": layers - 20, "intermediate_size": wide}
    specs = family.tensors(family.text_config(config, "test"))
    assert sum(math.prod(spec.shape) for spec in specs) == pytest.approx(published, rel=0.002)


def test_a_family_that_is_only_planned_for_is_refused_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n_text"}))
    with pytest.raises(Unsupported, match=r"only plans for models of this family; found gemma3n"):
        open_checkpoint(tmp_path)
