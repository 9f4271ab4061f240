"""The record of a training run, as ship and the report show it."""

from __future__ import annotations

from typing import Any

from lowbit.train import data
from lowbit.train.ledger import Ledger
from lowbit.train.options import TrainOptions


def describe(
    options: TrainOptions, ledger: Ledger, curve: list[dict[str, Any]], distilled: float, sequences: int
) -> dict[str, Any]:
    """What training did, in plain values.

    curve: the trainer's entries, each with step, seconds, loss, lr, and kld where the unseen sequences were looked at.
    distilled: seconds. sequences: how many there were to train on.
    """
    facts, stages = ledger.facts, ledger.stages
    steps = curve[-1]["step"] if curve else 0
    rows = steps * options.batch_size * options.accumulate
    phases = [{"name": "nearest", "seconds": 0.0, "tokens": 0, "detail": "ggml's own rounding"}]
    if options.start == "calibrated":
        detail = "error compensation, tokens weighted by gradients"
        tokens = facts.get("calibration_tokens", 0)
        phases.append({"name": "calibrated", "seconds": stages["calibrate"], "tokens": tokens, "detail": detail})
    tokens = rows * options.sequence_length
    why = "no help with unseen text" if steps else "too little time"
    detail = f"{steps} steps" + (f", {why}: the start was kept" if "kept" in facts else "")
    phases.append({"name": "distilled", "seconds": distilled, "tokens": tokens, "detail": detail})
    return {
        "minutes": options.minutes,
        "precision": facts["dtype"],
        "learning_rate": options.peak_learning_rate,
        "trained_for": options.trained_for,
        "phases": phases,
        "stages": dict(stages),
        "curve": curve,
        **({"reference": facts["reference"]} if "reference" in facts else {}),
        "data": facts["data"] | _used(options, facts["data"], sequences, min(rows, sequences)),
    }


def _used(options: TrainOptions, gathered: dict[str, Any], sequences: int, trained: int) -> dict[str, int]:
    """Tokens of what was trained on; not all that was gathered, where time was short."""
    length = options.sequence_length
    n_sampled, n_text = gathered["sampled_tokens"] // length, gathered["text_tokens"] // length
    first_epoch = data.order(sequences, options.seed)[:trained]  # as SequenceOrder takes them
    of_model = int((data.order(n_sampled + n_text, options.seed)[first_epoch] < n_sampled).sum())
    counted = {"sampled_tokens": of_model, "text_tokens": trained - of_model, "unique_tokens": trained}
    return {name: rows * length for name, rows in counted.items()}
