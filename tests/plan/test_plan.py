"""Plans of tiny configs: what llama.cpp lays out is what the formula gives, and the sums are the rows'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.errors import BadOption
from lowbit.plan import PlanOptions, open_model, plan_open
from tiny_configs import GEMMA4_LAYOUTS, TINY_GEMMA3, TINY_GEMMA4, TINY_LLAMA

CONFIGS = {
    "llama": TINY_LLAMA | {"model_type": "llama", "head_dim": 32},
    "gemma3": TINY_GEMMA3 | {"model_type": "gemma3_text"},
    "E2B": TINY_GEMMA4 | GEMMA4_LAYOUTS["E2B"] | {"model_type": "gemma4_text"},
}
SETTINGS: list[dict[str, Any]] = [
    {"context": 1000},
    {"context": 4096, "slots": 3},
    {"context": 4096, "slots": 3, "kv_unified": True, "kv_type_k": "q8_0", "kv_type_v": "q4_0"},
    {"context": 2048, "slots": 1, "flash_attention": False, "ubatch": 64},
    {"context": 2048, "slots": 2, "swa_full": True},
]


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[request.param] | {"rms_norm_eps": 1e-6}))
    return path


def test_the_formula_is_what_llama_cpp_lays_out(config: Path) -> None:
    with open_model(config) as model:
        for settings in SETTINGS:
            plan = plan_open(model, PlanOptions(**settings))
            caches = [row for row in plan.rows if row.part == "kv"]
            assert all(row.found == "formula" for row in caches), [row.why for row in caches]


def test_the_sums_are_of_the_rows(config: Path) -> None:
    found = lowbit.plan(config, PlanOptions(context=2048, slots=2)).to_json()
    assert found["total_bytes"] == sum(row["bytes"] for row in found["rows"])
    assert found["total_bytes"] == sum(value for key, value in found.items() if key.endswith("_bytes")) / 2
    assert min(found[f"{part}_bytes"] for part in ("weights", "kv", "scratch", "process")) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"kv_type_k": "q3"},
        {"kv_type_v": "q8_0", "flash_attention": False},
        {"slots": 257},
        {"slots": 0},
        {"context": -1},
        {"runtime": "ollama"},
    ],
)
def test_what_cannot_work_is_refused(config: Path, options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        lowbit.plan(config, PlanOptions(**options))
