"""The fresh process behind slot_speed.py: a job as JSON on standard input, a report as JSON on standard output."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.measure.energy import EnergyMeter
from lowbit.run._llama_slots import Slots

_WARM_UP = 32


def main() -> None:
    """Runs the job that slot_speed.probe() describes."""
    job = json.load(sys.stdin)
    depths, counts = sorted(set(job["depths"])), sorted(set(job["slots"]))
    sequences = max(counts) + 1  # the first only holds what the others are copies of
    context = job["context"] * (sequences if job["kv_unified"] else 1)
    with Slots(
        job["path"],
        sequences=sequences,
        context=context,
        unified=job["kv_unified"],
        threads=job["threads"],
        kv_type=job["kv_type"],
        trusted=True,
    ) as model:
        json.dump(_rows(model, job, depths, counts), sys.stdout)


def _rows(model: Slots, job: dict[str, Any], depths: list[int], counts: list[int]) -> list[dict[str, Any]]:
    meter = EnergyMeter(Path(job["powercap"]))
    # As llama-bench: what the tokens are makes no difference to a dense model's speed.
    rng = np.random.default_rng(0)
    model.extend(rng.integers(0, model.n_vocab, _WARM_UP), [0])
    model.reset()
    rows, filled, depth_before = [], 0.0, 0
    for depth in depths:
        begin = time.perf_counter()
        if depth > depth_before:
            model.extend(rng.integers(0, model.n_vocab, depth - depth_before), [0], last=False)
        filled, depth_before = filled + time.perf_counter() - begin, depth
        for slots in counts:
            row = {"depth": depth, "slots": slots, **_timed(model, job, slots, meter, rng)}
            if slots == 1:
                row["first_token_seconds_cold"] = filled + row["first_token_seconds"]
            rows.append(row)
    return rows


def _timed(
    model: Slots, job: dict[str, Any], slots: int, meter: EnergyMeter, rng: np.random.Generator
) -> dict[str, float]:
    """What FIGURES of slot_speed.py names, for that many slots at the depth that sequence 0 has."""
    taking_part = list(range(1, slots + 1))
    tokens = rng.integers(0, model.n_vocab, (slots, job["prompt"]))
    _start(model, taking_part, tokens[:, :1])
    energy, begin = meter.read(), time.perf_counter()
    model.extend(tokens, taking_part).argmax(-1)
    seconds, joules = time.perf_counter() - begin, meter.joules(energy)
    found = {"prompt_tokens_per_second": slots * job["prompt"] / seconds, "first_token_seconds": seconds}
    if joules is not None:
        found["prompt_joules_per_token"] = joules / (slots * job["prompt"])
    _start(model, taking_part, tokens[:, :1])
    step = tokens[:, 0]
    energy, begin = meter.read(), time.perf_counter()
    for _ in range(job["generate"]):
        step = model.extend(step[:, None], taking_part).argmax(-1)
    seconds, joules = time.perf_counter() - begin, meter.joules(energy)
    found["generation_tokens_per_second"] = slots * job["generate"] / seconds
    if joules is not None:
        found["generation_joules_per_token"] = joules / (slots * job["generate"])
    return found


def _start(model: Slots, taking_part: list[int], first: np.ndarray) -> None:
    """Makes the slots copies of sequence 0 and gives each a token more: copies are made when they are first used,
    which is not to be timed."""
    for slot in taking_part:
        model.drop(slot)
        if model.lengths[0]:
            model.copy(0, slot)
    model.extend(first, taking_part)
