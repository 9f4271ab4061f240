"""What is loaded beside a model: drafters with and without a cache of their own, and projectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowbit
from layouts import LAYOUTS, drafter
from lowbit.errors import BadFile, BadOption, Unsupported
from lowbit.plan import Plan, PlanOptions, open_model, plan_open
from lowbit.plan.runtimes.llama_cpp import context_params
from random_gguf import Loaded, write_random

SMALL = {"context": 1024, "slots": 2}


def write(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(json.dumps(config))
    return path


def row(plan: Plan, what: str) -> int:
    return next(row.bytes for row in plan.rows if row.what == what)


def test_a_drafter_with_a_cache_of_its_own(tmp_path: Path) -> None:
    target, small = write(tmp_path / "t.json", LAYOUTS["Llama 3.1 8B"]), write_random(LAYOUTS["SmolLM2 135M"], tmp_path)
    plan = lowbit.plan(target, PlanOptions(**SMALL, drafter=small, kv_type_k="q8_0"))
    alone = lowbit.plan(small, PlanOptions(**SMALL))
    assert row(plan, "drafter: KV cache, 30 global layers") == alone.bytes_of("kv")
    assert row(plan, "drafter: weights") == alone.bytes_of("weights")
    assert row(plan, "drafter: compute buffer") == row(alone, "compute buffer")
    # A slot's last token and the three drafted ones are scored together.
    assert row(plan, "output buffer") == 4 * row(lowbit.plan(target, PlanOptions(**SMALL)), "output buffer")


@pytest.mark.parametrize("name", ["Gemma 4 E2B", "Gemma 4 12B"])
def test_a_drafter_of_gemma_4(name: str, tmp_path: Path) -> None:
    target = write_random(LAYOUTS[name], tmp_path / "target")
    draft = write_random(drafter(LAYOUTS[name]), tmp_path / "draft")
    options = PlanOptions(**SMALL, drafter=draft)
    plan = lowbit.plan(target, options)
    assert row(plan, "drafter: KV cache") == 0
    with (
        open_model(target) as model,
        open_model(draft) as small,
        Loaded(target) as first,
        Loaded(draft) as second,
        first.context(context_params(model, options, 8)) as of,
        second.context(context_params(small, options), of) as context,
    ):
        assert row(plan, "compute buffer") == first.allocated(of)[1]
        assert row(plan, "drafter: compute buffer") == second.allocated(context)[1]


def test_a_drafter_for_another_model_is_refused(tmp_path: Path) -> None:
    draft = write(tmp_path / "d.json", drafter(LAYOUTS["Gemma 4 E2B"] | {"hidden_size": 96}))
    for name in ("Gemma 4 E2B", "Gemma 3 1B"):
        with pytest.raises(BadOption, match=r"this drafter is for another model; found .*: a target of width 96"):
            lowbit.plan(write(tmp_path / "t.json", LAYOUTS[name]), PlanOptions(**SMALL, drafter=draft))


def test_a_projector(tiny_towers: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = tiny_towers("gemma3")
    mmproj = tmp_path / "mmproj.gguf"
    lowbit.pack(folder, "f16", mmproj, mmproj=True)
    target = write(tmp_path / "t.json", LAYOUTS["Gemma 3 4B"])
    with open_model(target) as model:
        plan = plan_open(model, PlanOptions(**SMALL, mmproj=mmproj))
    header = mmproj.stat().st_size - row(plan, "projector: weights")
    assert 0 < header < 8192
    assert row(plan, "projector: compute buffer") > 16 * 64 * 4
    with pytest.raises(Unsupported, match="not an mmproj"):
        lowbit.plan(target, PlanOptions(**SMALL, mmproj=write_random(LAYOUTS["Gemma 3 1B"], tmp_path / "text")))
    mmproj.write_bytes(mmproj.read_bytes()[:1000])
    with pytest.raises(BadFile):
        lowbit.plan(target, PlanOptions(**SMALL, mmproj=mmproj))
