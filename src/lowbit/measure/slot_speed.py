"""Speed against context depth and slot count, in llama.cpp, each run in a fresh process.

As llama-batched-bench: every slot has ``depth`` tokens behind it; then all read a prompt at once, and all generate a
token at a time. Runs of different files and KV caches take turns, forwards and backwards, so that what else the
machine does hits all alike.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import BadOption, RuntimeFailed
from lowbit.measure.energy import POWERCAP
from lowbit.measure.record import repeated

_CHILD = "from lowbit.measure._slot_probe import main; main()"
# name in a report -> unit
FIGURES = {
    "prompt_tokens_per_second": "tokens/s",
    "generation_tokens_per_second": "tokens/s",
    "first_token_seconds": "s",
    "first_token_seconds_cold": "s",
    "prompt_joules_per_token": "J/token",
    "generation_joules_per_token": "J/token",
}


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """What to time.

    depths:     tokens that every slot has in its cache before it is timed
    slots:      sequences at a time, each as long
    prompt:     tokens of the prompt that each slot then reads
    generate:   tokens that each slot then generates, greedily
    repeats:    fresh processes for each file and cache, at least 2
    kv_unified: one cache for all slots (llama-server's --kv-unified) instead of one each
    powercap:   folder of the energy counters
    """

    depths: tuple[int, ...] = (0, 1024)
    slots: tuple[int, ...] = (1,)
    prompt: int = 256
    generate: int = 32
    repeats: int = 3
    kv_unified: bool = False
    powercap: str = str(POWERCAP)

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 0 or not self.slots or min(self.slots) < 1:
            raise BadOption(
                "impossible depths or slots", found=f"{self.depths}, {self.slots}", expected="0 or more, 1 or more"
            )
        for name, least in (("prompt", 1), ("generate", 1), ("repeats", 2)):
            if getattr(self, name) < least:
                raise BadOption(f"impossible {name}", found=getattr(self, name), expected=f"at least {least}")

    @property
    def context(self) -> int:
        """Tokens that one slot needs."""
        return max(self.depths) + max(self.prompt, self.generate) + 1


def turns(kinds: Sequence[Any], repeats: int) -> list[tuple[int, Any]]:
    """(repeat, kind) in the order of measurement: every other round backwards."""
    return [(r, kind) for r in range(repeats) for kind in (kinds if r % 2 == 0 else list(reversed(kinds)))]


def probe(path: Path, kv_type: str, options: SpeedOptions, threads: int | None) -> list[dict[str, Any]]:
    """One fresh process: of each depth and slot count {"depth", "slots", and those of FIGURES that were measured}.

    Raises RuntimeFailed with the process's last words.
    """
    job = {"path": str(path), "kv_type": kv_type, "threads": threads, "context": options.context, **asdict(options)}
    child = subprocess.run(
        [sys.executable, "-c", _CHILD], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if child.returncode != 0:
        said = child.stderr.strip().splitlines()
        raise RuntimeFailed(
            "the process that measures speed failed",
            where=path,
            found=f"exit code {child.returncode}" + (f", {said[-1]}" if said else ""),
            hint="Fewer --slots or smaller --speed-depths need less memory",
        )
    found: list[dict[str, Any]] = json.loads(child.stdout)
    return found


def makes_sense(report: Any, options: SpeedOptions) -> bool:
    """Whether a journal's cell is what ``probe`` gives."""
    wanted = [(depth, slots) for depth in sorted(set(options.depths)) for slots in sorted(set(options.slots))]
    if not isinstance(report, list) or not all(isinstance(row, dict) for row in report):
        return False
    numbers = [value for row in report for key, value in row.items() if key in FIGURES]
    return [(row.get("depth"), row.get("slots")) for row in report] == wanted and all(
        isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in numbers
    )


def summarize(reports: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The repeats of one file and cache as figures with Student's intervals, a row per depth and slot count."""
    rows = []
    for alike in zip(*reports, strict=True):
        row: dict[str, Any] = {"depth": alike[0]["depth"], "slots": alike[0]["slots"]}
        for name, unit in FIGURES.items():
            if all(name in report for report in alike):
                row[name] = repeated([report[name] for report in alike], unit).as_json()
        rows.append(row)
    return rows
