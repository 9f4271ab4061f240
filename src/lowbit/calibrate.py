"""``lowbit calibrate``: what each weight of a model does to its output, in a file that ``lowbit pack`` rounds by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit import files, verbs
from lowbit.checkpoint import open_checkpoint


def calibrate(model: str | Path, out: str | Path, *, text: str | None = None, **options: Any) -> int:
    """Writes the calibration of ``model`` to ``out``, a safetensors file, and returns the tokens that it is of.

    text: a text, JSONL or Parquet file, or a datasets id; by default text that comes with lowbit. options: fields of
    ``lowbit.train.importance.CollectOptions`` (sequences, sequence_length, minutes, precision, threads, seed). The
    model is in memory in float32, with a step's activations. Raises LowbitError.
    """
    files.check_writable(out)
    from lowbit.train.importance import CollectOptions, collect

    with open_checkpoint(model) as checkpoint:
        return collect(checkpoint, Path(out), text, CollectOptions(**options))


verbs.make_callable(__name__)
