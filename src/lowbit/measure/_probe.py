"""The fresh process behind speed.py: a job as JSON on standard input, a report as JSON on standard output."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from lowbit import run

_WARM_UP = 16  # tokens: enough to touch every weight once


def main() -> None:
    """Runs the job that speed.probe() describes."""
    job = json.load(sys.stdin)
    prompt, n = job["prompt"], job["generate"]
    runtime = run.runtime_for(job["target"], job["runtime"])
    runtime.load_library()
    baseline = peak_bytes()
    rates: dict[str, list[float]] = {"prompt": [], "generation": []}
    options = {**job["options"], **runtime.to_generate, "context": len(prompt) + n + 1}
    with run.open_artifact(job["target"], runtime.name, **options) as model:
        for _ in model.generate(prompt[:_WARM_UP], 2, ignore_end=True):
            pass
        for _ in range(job["repeats"]):
            answer = model.generate(prompt, n + 1, ignore_end=True)
            begin = time.perf_counter()
            next(answer)
            read = time.perf_counter()
            for _ in answer:
                pass
            end = time.perf_counter()
            rates["prompt"].append(len(prompt) / (read - begin))
            rates["generation"].append(n / (end - read))
    json.dump({"baseline_bytes": baseline, "peak_bytes": peak_bytes(), **rates}, sys.stdout)


def peak_bytes() -> int:
    """The most memory this process ever had resident."""
    # Not ru_maxrss first: Linux starts that at the size of the process that started this one.
    if found := peak_bytes_of("self"):
        return found
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes_of(pid: int | str) -> int | None:
    """The most memory a process ever had resident, file mappings included; None where the system does not tell."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
