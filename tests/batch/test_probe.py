from __future__ import annotations

import random

import pytest

from lowbit.batch.probe import Probe


def run(probe: Probe, rate: dict[int, float], noise: float = 0.0, seed: int = 0) -> list[int]:
    """Plays a server whose answers of about 30 tokens come at so many tokens a second; the slots that were tried."""
    now, tried, rng = 0.0, [probe.slots], random.Random(seed)
    for _ in range(10_000):
        tokens = rng.randint(20, 40)
        now += tokens / rate[probe.slots] * (1 + rng.uniform(-noise, noise))
        settled = probe.answered(now, tokens)
        if probe.slots != tried[-1]:
            tried.append(probe.slots)
        assert settled == probe.done
        if probe.done:
            return tried
    raise AssertionError("never settled")


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({1: 50, 2: 80, 4: 120, 8: 150, 16: 100}, 8),
        ({1: 50, 2: 30, 4: 20, 8: 10, 16: 5}, 1),
        ({1: 50, 2: 80, 4: 120, 8: 150, 16: 300}, 16),
        ({1: 100, 2: 100, 4: 100, 8: 100, 16: 100}, 1),
        ({1: 50, 2: 100, 4: 101, 8: 60, 16: 10}, 2),
    ],
)
def test_it_finds_the_best_number(rates: dict[int, float], best: int) -> None:
    probe = Probe(16)
    tried = run(probe, rates)
    assert probe.slots == best
    fell = next((n for n in (2, 4, 8, 16) if rates[n] < 0.9 * max(rates[m] for m in rates if m < n)), 16)
    assert max(tried) <= fell, "nothing beyond where the rate fell"


def test_noise_does_not_lead_it_far_astray() -> None:
    rates = {1: 50, 2: 80, 4: 120, 8: 118, 16: 70}
    for seed in range(50):
        probe = Probe(16)
        run(probe, rates, noise=0.6, seed=seed)
        assert rates[probe.slots] >= 0.95 * 120, f"{probe.slots} with seed {seed}"


def test_what_was_found_is_kept_and_taken_up() -> None:
    probe = Probe(16)
    run(probe, {1: 50, 2: 80, 4: 120, 8: 150, 16: 100})
    found = probe.as_json()
    assert found["slots"] == 8 and [step["slots"] for step in found["steps"]] == [1, 2, 4, 8, 16]
    again = Probe(16, found)
    assert again.done and again.slots == 8 and not again.answered(0.0, 1)
    fewer = Probe(4, found)
    assert not fewer.done and fewer.slots == 1, "that many slots there are not"
    assert not Probe(16, {"slots": "8"}).done and not Probe(16, []).done


def test_few_answers_settle_nothing() -> None:
    probe = Probe(16)
    assert not any(probe.answered(i * 0.1, 30) for i in range(8)) and probe.slots == 1
    slow = Probe(16)
    answers = [slow.answered(i * 15.0, 30) or slow.slots for i in range(4)]
    assert answers[-1] == 2, "two answers and half a minute are a rate"


def test_one_slot_needs_no_probe() -> None:
    assert Probe(1).done and Probe(1).slots == 1
