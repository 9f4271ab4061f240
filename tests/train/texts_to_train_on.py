"""Texts for trainings of tiny models, the same at every run."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = ["block", "group", "scale", "zero", "point", "rounding", "cache", "slot", "template", "drafter", "nibble"]


def random_words(path: Path, count: int, seed: int = 0) -> Path:
    """Writes so many words, drawn at random."""
    path.write_text(" ".join(random.Random(seed).choices(WORDS, k=count)), encoding="utf-8")
    return path


def sentences(path: Path, count: int) -> Path:
    """Writes so many sentences of one pattern."""
    path.write_text("".join(f"Sentence {i} says that {i * i} is the square of {i}. " for i in range(count)), "utf-8")
    return path
