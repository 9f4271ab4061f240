"""The tasks of child processes (see child.py): each takes JSON and gives JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import LowbitError
from lowbit.release.child import answer


def load_projector(model: str, mmproj: str) -> str:
    """Loads a model with its mmproj and encodes a picture; what came of it, in words. Raises RuntimeFailed."""
    from lowbit.run.vision.llama_cpp import LlamaCppVision

    with LlamaCppVision(model, mmproj, context=256, threads=1, logits_all=False, trusted=True) as opened:
        if not opened.sees:
            return "it hears" if opened.hears else "it takes no media"
        picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        n = len(opened.embed(picture))
        return f"a picture of 96 x 96 became {n} tokens"


def logits(artifacts: list[str], reference: str | None, ids: list[int]) -> list[dict[str, float]]:
    """For each artifact, its runtime's logits of a sequence against transformers' on the artifact's own values; see
    parity.py. Raises LowbitError."""
    from lowbit.release import parity

    return parity.compare([Path(path) for path in artifacts], Path(reference) if reference else None, ids)


def draft(model: str, drafter: str, prompts: list[str], n: int) -> dict[str, float]:
    """What a drafter brings; see drafting.py. Raises LowbitError."""
    from lowbit.release import drafting

    return drafting.measure(Path(model), Path(drafter), prompts, n)


TASKS: dict[str, Callable[..., Any]] = {"load_projector": load_projector, "logits": logits, "draft": draft}


def main() -> None:
    arguments: dict[str, Any] = json.load(sys.stdin)
    try:
        result = TASKS[sys.argv[1]](**arguments)
    except LowbitError as error:
        answer(error=error)
    else:
        answer(result)


if __name__ == "__main__":
    main()
