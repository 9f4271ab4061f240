"""llama.cpp's own server: what of a shared prompt it evaluates, and how often."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs
import pytest

from lowbit import batch
from lowbit.batch import probe
from lowbit.batch.job import Job, folder_of
from lowbit.batch.options import BatchOptions

RULES = " ".join(f"Rule {i}: weigh what the text says of part {i} before you answer." for i in range(16))


def many(path: Path, count: int, rules: tuple[str, ...]) -> Path:
    with open(path, "w") as handle:
        for i in range(count):
            request = jobs.request(str(i), f"Review {i}: it was fine.", max_tokens=2, temperature=0)
            request["body"]["messages"].insert(0, {"role": "system", "content": rules[i % len(rules)]})
            handle.write(json.dumps(request) + "\n")
    return path


def timings(out: Path) -> list[dict[str, Any]]:
    return [line["response"]["body"]["timings"] for line in jobs.read(out).values()]


def test_what_prompts_share_is_evaluated_once_not_in_each_slot(tmp_path: Path) -> None:
    source = many(tmp_path / "in.jsonl", 12, (RULES, "Be brief. " + RULES))
    ran = batch.run(source, tmp_path / "out.jsonl", model="smollm2-135m", options=BatchOptions(slots=3))
    assert ran.status.completed == 12
    told = timings(tmp_path / "out.jsonl")
    whole = max(t["prompt_n"] + t["cache_n"] for t in told)
    assert whole > 200
    # Two beginnings: each is evaluated before the first answer, which is then about one token of prompt.
    assert sum(t["prompt_n"] > whole / 2 for t in told) == 0
    assert sum(t["prompt_n"] for t in told) < 12 * 30


def test_without_slots_a_probe_finds_them_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, less in (("_ROUNDS", 1), ("_LEAST", 3), ("_SECONDS", 0.01)):
        monkeypatch.setattr(probe, name, less)
    source = many(tmp_path / "in.jsonl", 60, ("Answer.",))
    ran = batch.run(source, tmp_path / "out.jsonl", model="smollm2-135m")
    assert ran.status.completed == 60 and len(jobs.read(tmp_path / "out.jsonl")) == 60
    with Job(source, folder_of(source)) as job:
        assert job.journal.query("SELECT max(tries) FROM items").__next__() == (1,)
        found = job.journal.get("slots")
    assert found is not None and 1 <= found["slots"] <= 16
    assert [step["slots"] for step in found["steps"]] == [1, 2, 4, 8, 16][: len(found["steps"])]
