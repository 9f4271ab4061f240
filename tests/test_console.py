"""Progress where there is no terminal: lines that say how far it is, and how fast it goes."""

from __future__ import annotations

import pytest

from lowbit import console


def test_progress_tells_the_rate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress("Packing", 800e6, "weights") as bar:
        now += 29
        bar.advance(200e6)  # not yet time for a line
        now += 11
        bar.advance(200e6)
        now += 40
        bar.advance(400e6)
    assert capsys.readouterr().err.splitlines() == [
        "Packing ...",
        "Packing: 50%, 10 million weights a second, 0:40 left",
        "Packing: 100%, 10 million weights a second, 0:00 left",
    ]


def test_few_units_have_a_rate_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress("Collecting", 96, "sequences") as bar:
        now += 60
        bar.advance(12)
    assert capsys.readouterr().err.splitlines()[-1] == "Collecting: 12%, 0.2 sequences a second, 7:00 left"
