from __future__ import annotations

import io
from typing import Any

from lowbit.report import terminal, verdicts


def test_a_difference_is_shown_with_its_verdict_and_what_it_could_see(sample: dict[str, Any]) -> None:
    (compared,) = verdicts.of(sample["measure"])
    assert (compared.artifact, compared.baseline) == ("model-q4_0.gguf", "naive-q4_0.gguf")
    kld, top1, perplexity = compared.verdicts
    assert (kld.value, kld.interval, kld.verdict, kld.smallest) == (
        "-0.276 nats",
        "-0.296 to -0.256",
        "better",
        "0.03 nats",
    )
    assert (top1.value, top1.smallest) == ("+14.4 %", "3 %")
    assert perplexity.verdict == verdicts.NO_DIFFERENCE


def test_the_terminal_says_that_there_is_none(sample: dict[str, Any]) -> None:
    stream = io.StringIO()
    terminal.show_measurement(sample["measure"], stream)
    assert "no measurable difference" in stream.getvalue()
    assert "model-q4_0.gguf against naive-q4_0.gguf" in stream.getvalue()


def test_what_a_record_lacks_is_left_out(sample: dict[str, Any]) -> None:
    pair = sample["measure"]["pairs"][0]
    pair["kld_mean_difference"]["verdict"] = "splendid"
    pair["top1_difference"] = 7
    pair["log_perplexity_difference"]["smallest_detectable"] = None
    (compared,) = verdicts.of(sample["measure"])
    assert [(v.what, v.smallest) for v in compared.verdicts] == [("Log perplexity", "")]
    for broken in ({}, {"pairs": 3}, {"pairs": [None, {}], "artifacts": [None]}):
        assert verdicts.of(broken) == verdicts.of_cache(broken) == []


def test_an_error_above_what_was_asked_is_named(sample: dict[str, Any]) -> None:
    kept = {"error": 0.004, "asked": 0.001, "certain_low": 0.1, "certain_high": 5.0, "within": False}
    sample["measure"]["artifacts"][0]["kld_from_cache"] = kept
    (line,) = verdicts.of_cache(sample["measure"])
    assert "0.004 nats" in line
    assert "MORE than the 0.001 asked" in line
    kept["error"] = 0.0004
    assert "MORE" not in verdicts.of_cache(sample["measure"])[0]
