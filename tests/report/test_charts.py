"""Plots: every name is read whole, and every line of one is seen."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.report import charts
from lowbit.report.figures import Figure, figure


def of(value: float) -> Figure:
    made = figure({"value": value, "low": 0.9 * value, "high": 1.1 * value, "n": 10})
    assert made is not None
    return made


@pytest.mark.parametrize("name", ["a.gguf", "gemma3-270m-q4_0.gguf", "some-organisation-model-27b-it-qat-q4_0.gguf"])
@pytest.mark.parametrize("draw", ["interval", "bar"])
def test_a_name_has_its_room(name: str, draw: str) -> None:
    """Left of the plot on wide pages; of a long one the beginning and the end are kept."""
    if draw == "interval":
        drawn = str(charts.interval_plot([charts.Row(label=name, series="model", figure=of(0.3))], "nats"))
    else:
        drawn = str(charts.bar_plot([(name, "model", 3.0, "3 MiB")], "size"))
    found = re.search(r'class="name"[^>]* x="([\d.]+)"[^>]*>([^<]*)<', drawn)
    assert found is not None
    assert len(found[2]) <= 32 and found[2].endswith(".gguf") and found[2][:6] == name[:6]
    assert float(found[1]) >= 8.2 * len(found[2])


def test_names_of_lines_are_apart_and_above_the_axis() -> None:
    ends: list[list[Any]] = [[298.0, 10.0, "a", "model"], [299.0, 10.0, "b", "naive"], [120.0, 10.0, "c", "loss"]]
    labels = charts.end_labels(ends, 296.0)
    heights = [float(re.search(r' y="([\d.]+)"', str(label))[1]) for label in labels]  # type: ignore[index]
    assert heights == sorted(heights) and heights[-1] <= 300.0
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 16.9


def test_a_file_of_any_name_shows_its_interval(tmp_path: Path) -> None:
    """Its series is one that the style sheet has a colour for."""
    kld = {"value": 0.38, "low": 0.35, "high": 0.41, "n": 255}
    artifacts = [{"path": "gemma3-270m-q4_0.gguf", "sha256": "0" * 64, "fidelity": {"kld_mean": kld}}]
    result = {"format": "lowbit-measure/1", "artifacts": artifacts, "pairs": [], "machine": {"cpu": "some"}}
    (tmp_path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    lowbit.report(tmp_path / "result.json")
    drawn = re.findall(r'class="range s-([a-z0-9]+)"', (tmp_path / "result.html").read_text("utf-8"))
    assert drawn and set(drawn) <= charts.SERIES.keys()
