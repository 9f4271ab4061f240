"""Readings of real models that others published, from the models' real sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.plan import Plan, PlanOptions

MIB, GB = 1 << 20, 1e9
SLIDING, FULL = "sliding_attention", "full_attention"


def _gemma4(layers: int, **sizes: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma4_text", "num_hidden_layers": layers, "head_dim": 256, "global_head_dim": 512,
        "sliding_window": 1024, "layer_types": ([SLIDING] * 5 + [FULL]) * (layers // 6), "rms_norm_eps": 1e-6,
        "vocab_size": 262_144, "max_position_embeddings": 262_144, "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True, **sizes,
    }  # fmt: skip


# From the released config.json files: google/gemma-3-4b-it, gemma-4-12b-it, gemma-4-26b-a4b-it.
GEMMA3_4B = {
    "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    "sliding_window": 1024, "vocab_size": 262_208, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6,
}  # fmt: skip
GEMMA4_12B = _gemma4(
    48, hidden_size=3840, intermediate_size=15_360, num_attention_heads=16, num_key_value_heads=8,
    num_global_key_value_heads=1,
)  # fmt: skip
GEMMA4_26B = _gemma4(
    30, hidden_size=2816, intermediate_size=2112, num_attention_heads=16, num_key_value_heads=8,
    num_global_key_value_heads=2, enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704,
)  # fmt: skip


def plan(tmp_path: Path, config: dict[str, Any], **options: Any) -> Plan:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    found: Plan = lowbit.plan(path, PlanOptions(**options))
    assert all(row.found == "formula" for row in found.rows if row.part == "kv")
    return found


def test_gemma_3_4b_at_128k_is_2734_mib(tmp_path: Path) -> None:
    """ollama/ollama issue 17037."""
    found = plan(tmp_path, GEMMA3_4B, context=131_072, slots=1)
    assert found.bytes_of("kv") == 2734 * MIB


@pytest.mark.parametrize(("context", "published"), [(4096, 0.40), (8192, 0.48), (32_768, 0.99), (131_072, 3.00)])
def test_gemma_4_26b_in_gigabytes(tmp_path: Path, context: int, published: float) -> None:
    """ollama/ollama pull request 16958, rounded to two digits there."""
    found = plan(tmp_path, GEMMA4_26B, context=context, slots=1)
    assert round(found.bytes_of("kv") / GB, 2) == published


def test_gemma_4_12b_with_llama_servers_own_slots(tmp_path: Path) -> None:
    """Four slots, unified: 4,608 cells of 40 sliding layers are 765 MiB at Q8_0, 92% of all at a context of 8k."""
    found = plan(tmp_path, GEMMA4_12B, context=8192, kv_type_k="q8_0", kv_type_v="q8_0")
    assert found.settings["slots"] == 4
    sliding = next(row for row in found.rows if "40 sliding layers" in row.what)
    assert sliding.bytes == 765 * MIB
    assert "4,608 cells" in sliding.why
    assert round(sliding.bytes / found.bytes_of("kv"), 2) == 0.92


def test_the_models_are_as_large_as_their_names_say(tmp_path: Path) -> None:
    """Text parameters: 3.88e9 of the 4B, 25.2e9 of the 26B-A4B, 11.9e9 of the 12B."""
    for config, published in ((GEMMA3_4B, 3.88e9), (GEMMA4_26B, 25.2e9), (GEMMA4_12B, 11.9e9)):
        weights = next(row for row in plan(tmp_path, config, context=512).rows if row.part == "weights").why
        assert int(weights.split()[0].replace(",", "")) == pytest.approx(published, rel=0.01)
