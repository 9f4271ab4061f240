"""Checks the speeds of `lowbit measure --speed-depths --slots` against llama-batched-bench.

python benchmarks/slot_speed.py model.gguf --batched-bench PATH: prompt and generation, tokens a second of processor
time, of this package's llama.cpp and of the given build, on one thread, a run of each in turn, with Student's intervals
of the ratio. Processor time, and of llama-batched-bench differences of two runs of unlike lengths, so that neither a
busy machine nor starting up counts. The build must use the vector instructions that the package's does, or the ratio is
that of the kernels.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lowbit.measure import SpeedOptions
from lowbit.measure.record import repeated

_CHILD = "import time; time.perf_counter = time.process_time; from lowbit.measure._slot_probe import main; main()"
DEPTH = 256  # tokens that are there when generation is timed
LONG, SHORT = 320, 64  # prompts
MORE, FEWER = 68, 4  # tokens generated


def seconds(run: Callable[[], object]) -> float:
    """Processor time of the child processes that ``run`` starts and waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(model: Path, slots: int) -> tuple[float, float]:
    """(prompt, generation) tokens a second of all slots, as the probe itself reports them, by another clock."""
    options = SpeedOptions(depths=(0, DEPTH), slots=(slots,), prompt=LONG, generate=MORE)
    job = {"path": str(model), "kv_type": "f16", "threads": 1, "context": options.context, **asdict(options)}
    child = [sys.executable, "-c", _CHILD]
    done = subprocess.run(child, input=json.dumps(job), capture_output=True, text=True, check=True)
    empty, behind = json.loads(done.stdout)
    return empty["prompt_tokens_per_second"], behind["generation_tokens_per_second"]


def theirs(tool: str, model: Path, slots: int) -> tuple[float, float]:
    """The same of llama-batched-bench, which generates behind its prompt."""

    def run(prompt: int, generate: int) -> float:
        words = [tool, "-m", str(model), "-c", str(512 * slots), "-npp", str(prompt), "-ntg", str(generate)]
        words += ["-npl", str(slots), "-t", "1"]
        return seconds(lambda: subprocess.run(words, capture_output=True, check=True))

    prompt = slots * (LONG - SHORT) / (run(LONG, FEWER) - run(SHORT, FEWER))
    return prompt, slots * (MORE - FEWER) / (run(DEPTH, MORE) - run(DEPTH, FEWER))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batched-bench", required=True)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for slots in args.slots:
        pairs = [(ours(args.model, slots), theirs(args.batched_bench, args.model, slots)) for _ in range(args.repeats)]
        for i, what in enumerate(("prompt", "generation")):
            ratio = repeated([own[i] / other[i] for own, other in pairs], "ratio")
            own, other = (repeated([pair[k][i] for pair in pairs], "tokens/s") for k in (0, 1))
            print(
                f"{slots} slots, {what}: lowbit {own.value:.0f}, llama-batched-bench {other.value:.0f} tokens/s; "
                f"ratio {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], {ratio.n} pairs",
                flush=True,
            )


if __name__ == "__main__":
    main()
