"""The planned KV cache against what llama.cpp allocates, to the byte; the same over many more settings is
benchmarks/plan_kv.py. Narrow models of the layouts of released ones, with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from layouts import LAYOUTS, combinations, drafter
from lowbit.plan import PlanOptions, open_model, plan_open
from lowbit.plan.runtimes.llama_cpp import context_params
from random_gguf import Loaded, write_random

MIB = 1 << 20
SLOW = 300 * MIB  # of a cache, which llama.cpp fills with zeros


@pytest.mark.parametrize("name", LAYOUTS)
def test_caches_and_compute_buffers_are_llama_cpps_to_the_byte(name: str, tmp_path: Path) -> None:
    path = write_random(LAYOUTS[name], tmp_path)
    with open_model(path) as model, Loaded(path) as loaded:
        for settings in combinations(6, seed=len(name)):
            options = PlanOptions(**settings)
            plan = plan_open(model, options)
            if plan.bytes_of("kv") > SLOW:
                continue
            with loaded.context(context_params(model, options)) as context:
                kv, compute = loaded.allocated(context)
                assert plan.bytes_of("kv") == kv, settings
                assert loaded.decodes(context)
            assert all(row.found == "formula" for row in plan.rows if row.part == "kv")
            assert next(row.bytes for row in plan.rows if row.what == "compute buffer") == compute
            assert sum(loaded.logged) == pytest.approx(kv / MIB, abs=0.01 * len(loaded.logged))


def test_a_drafter_of_gemma_4_allocates_no_cache(tmp_path: Path) -> None:
    target = write_random(LAYOUTS["Gemma 4 E2B"], tmp_path / "target")
    draft = write_random(drafter(LAYOUTS["Gemma 4 E2B"]), tmp_path / "draft")
    settings = {"n_ctx": 1024, "n_seq_max": 2, "swa_full": False}
    with (
        Loaded(target) as first,
        Loaded(draft) as second,
        first.context(settings) as of,
        second.context(settings, of) as context,
    ):
        assert second.allocated(context)[0] == 0
