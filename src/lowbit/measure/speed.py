"""Peak memory and speed of an artifact, each file in a fresh process of its own that runs nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import RuntimeFailed
from lowbit.measure.record import Figure, exact, repeated

_CHILD = "from lowbit.measure._probe import main; main()"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the fresh process reports.

    peak_bytes:      the most memory it ever had resident, file mappings included
    baseline_bytes:  the part of it that Python and the library took before the model was opened
    prompt_tokens_per_second, generation_tokens_per_second: mean of the repeats; None where speed was not asked for
    """

    peak_bytes: Figure
    baseline_bytes: Figure
    prompt_tokens_per_second: Figure | None
    generation_tokens_per_second: Figure | None


def probe(
    target: str | Path,
    prompt: Sequence[int],
    *,
    generate: int = 32,
    repeats: int = 3,
    runtime: str | None = None,
    options: Mapping[str, Any] | None = None,
    speed: bool = True,
) -> Probe:
    """Opens the artifact in a new process, reads ``prompt`` (token ids) and generates, ``repeats`` times.

    runtime, options: as ``run.open_artifact`` has them; the context is what the run needs.

    Raises RuntimeFailed with the process's last words where it fails (out of memory, killed).
    """
    job = {
        "target": str(target),
        "prompt": [int(token) for token in prompt],
        "generate": generate,
        "repeats": max(2, repeats) if speed else 1,
        "runtime": runtime,
        "options": dict(options or {}),
    }
    child = subprocess.run(
        [sys.executable, "-c", _CHILD], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if child.returncode != 0:
        said = child.stderr.strip().splitlines()
        raise RuntimeFailed(
            "the process that measures memory and speed failed",
            where=target,
            found=f"exit code {child.returncode}" + (f", {said[-1]}" if said else ""),
        )
    report = json.loads(child.stdout)
    return Probe(
        peak_bytes=exact(report["peak_bytes"], "bytes"),
        baseline_bytes=exact(report["baseline_bytes"], "bytes"),
        prompt_tokens_per_second=repeated(report["prompt"], "tokens/s") if speed else None,
        generation_tokens_per_second=repeated(report["generation"], "tokens/s") if speed else None,
    )
