"""A plan's total against the measured peak of a process that serves the model (more: benchmarks/plan_total.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import plan_total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_the_total_is_within_3_percent_of_the_peak(name: str, packaged_gguf: Callable[[str], Path]) -> None:
    packaged_gguf(name)
    assert max(plan_total.of_model(name, [{"context": 256, "slots": 1}])) < 0.03
