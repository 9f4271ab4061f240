"""Tasks on the page and in the terminal, whatever the record holds."""

from __future__ import annotations

import copy
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from lowbit.report import report, task_view, terminal  # type: ignore[attr-defined]

SHARE = {"value": 0.5, "low": 0.3, "high": 0.7, "unit": "share", "n": 20}
NATS = {"value": 1.25, "low": 1.0, "high": 1.5, "unit": "nats", "n": 20}
EVIL = "<script>alert(1)</script>\x1b[31m"


def result() -> dict[str, Any]:
    outcome = {"scores": {"acc": 1.0}, "answer": "a"}
    scores = {"acc": SHARE, "margin": NATS}
    comparison = {
        **{**SHARE, "value": -0.1, "low": -0.3, "high": 0.1}, "verdict": "no measurable difference", "p_value": 0.2,
        "p_adjusted": 0.4, "smallest_detectable": 0.25,
    }  # fmt: skip
    flips = [
        {
            "id": str(i), "group": "g", "question": f"Question {i} {EVIL}", "expected": "yes", "baseline_answer": "yes",
            "artifact_answer": "no", "turned": "wrong",
        }
        for i in range(7)
    ]  # fmt: skip
    entry = {
        "name": f"facts {EVIL}", "kind": "facts", "source": "x", "items": 20, "total": 40, "shots": 2, "main": "acc",
        "metrics": {"acc": {"label": "Right", "note": "by log-probability"}, "margin": {"label": "Margin", "note": ""}},
        "results": [
            {"path": f"{folder}/model.gguf", "way": "log-likelihood", "scores": scores,
             "groups": {"geography": scores, "sums": scores}, "outcomes": [outcome]}
            for folder in ("a", "b")
        ],
        "pairs": [{"baseline": "a/model.gguf", "artifact": "b/model.gguf", "metrics": {"acc": comparison}, "won": 1,
                   "lost": 7, "changed": 9, "flips": flips}],
    }  # fmt: skip
    return {"format": "lowbit-measure/1", "artifacts": [], "machine": {"cpu": "x"}, "tasks": [entry]}


def shown(measured: dict[str, Any]) -> str:
    stream = io.StringIO()
    terminal.show_measurement(measured, stream)
    return stream.getvalue()


def test_the_terminal_says_what_was_measured() -> None:
    text = shown(result())
    for said in ("20 items of 40, 2 shots", "a/model.gguf", "b/model.gguf", "50 %", "30–70, n 20", "1.2", "geography",
                 "no measurable difference", "8 flipped between right and wrong, 9 answered otherwise",
                 "now wrong", "… 3 more"):  # fmt: skip
        assert said in text, said
    assert "\x1b" not in text


def test_the_page_has_a_section_and_escapes(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(result()))
    page = report(tmp_path / "r.json").read_text(encoding="utf-8")
    for said in ("20 items of 40", "no measurable difference", "Question 6", "8 flipped", "n 20", "0.4"):
        assert said in page, said
    assert "<script>alert" not in page


def test_a_figure_without_its_interval_or_machine_is_not_shown() -> None:
    measured = result()
    del measured["tasks"][0]["results"][0]["scores"]["acc"]["low"]  # the same dict in both results
    assert [row.key for row in task_view.build(measured)[0].rows] == ["margin"]
    measured["machine"] = None
    assert task_view.build(measured) == []


@pytest.mark.parametrize("seed", range(40))
def test_any_record_is_survived(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    measured = copy.deepcopy(result())
    for _ in range(6):
        place: Any = measured["tasks"]
        while isinstance(place, dict | list) and place:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if rng.random() < 0.25 or not isinstance(place[key], dict | list):
                place[key] = rng.choice([None, [], {}, "x", 3, -1e300, True, [[]], {"a": None}])
                break
            place = place[key]
    shown(measured)
    (tmp_path / "r.json").write_text(json.dumps(measured))
    report(tmp_path / "r.json")
