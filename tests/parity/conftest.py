"""Tells the largest differences that the parity tests met, also where all of them passed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # what test_logits.py compares with serves other files too


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines = []
    for report in terminalreporter.getreports("passed"):
        found = dict(report.user_properties)
        name = report.nodeid.rpartition("::")[2]
        if report.when != "call":
            continue
        if vision := [f"{key} {value:.1e}" for key, value in found.items() if key.startswith("largest difference")]:
            lines.append(f"{name}: {'; '.join(vision)}")
        if "largest_kl" in found:
            difference, kl = found["largest_logit_difference"], found["largest_kl"]
            lines.append(f"{name}: largest logit difference {difference:.1e}, largest KL {kl:.1e} nats")
    if lines:
        terminalreporter.section("parity with transformers")
        for line in lines:
            terminalreporter.write_line(line)
