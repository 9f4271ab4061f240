"""Plans where llama.cpp cannot be asked: the estimate of its compute buffer against its own layout, and rows that say
what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import lowbit
from lowbit.errors import RuntimeFailed
from lowbit.plan import Plan, PlanOptions, open_model, plan_open
from lowbit.plan.catalogue import listed
from lowbit.plan.runtimes import _llama_layout

MODELS = [model for model in listed() if model.name.endswith(("270m", "-e2b", "26b-a4b", "3.2-1b", "qwen3-8b", "-12b"))]
OPTIONS = [
    PlanOptions(context=context, slots=slots, flash_attention=flash)
    for context, slots, flash in ((2048, 1, None), (16_384, 4, None), (2048, 4, False), (16_384, 1, False))
]


def compute(plan: Plan) -> tuple[int, str]:
    return next((row.bytes, row.found) for row in plan.rows if row.what == "compute buffer")


@pytest.fixture
def no_llama(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def missing() -> None:
        raise RuntimeFailed("llama.cpp is not installed")

    return lambda: monkeypatch.setattr(_llama_layout, "DryRun", missing)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_estimate_is_as_good_as_it_says(model: object, no_llama: Callable[[], None], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model.config))  # type: ignore[attr-defined]
    with open_model(path) as opened:
        asked = [compute(plan_open(opened, options)) for options in OPTIONS]
    no_llama()
    with open_model(path) as opened:
        for options, (size, found) in zip(OPTIONS, asked, strict=True):
            estimated, said = compute(plan_open(opened, options))
            assert found == "llama.cpp's own layout"
            low = 0.17 if options.flash_attention is None else 0.35
            assert said == f"estimate, up to {low:.0%} low"
            assert 1 - low <= estimated / size <= 1.01


def test_caches_and_weights_need_no_llama_cpp(no_llama: Callable[[], None], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS[0].config))
    options = PlanOptions(context=4096, slots=2)
    asked = lowbit.plan(path, options)
    no_llama()
    alone = lowbit.plan(path, options)
    assert alone.bytes_of("kv") == asked.bytes_of("kv")
    assert alone.rows[0] == asked.rows[0]
    assert {row.found for row in alone.rows} <= {"formula", "file", "estimate", "estimate, up to 17% low"}
