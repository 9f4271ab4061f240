"""How fast lowbit measure's fidelity pass is against llama-perplexity, whole commands in pairs.

    python benchmarks/measure_speed.py --llama-perplexity PATH [--only both|kept] [--pairs N] [--models NAME ...] ...

Of each model an F16 GGUF is the reference and a Q4_0 the artifact; both sides decode the same chunks on the same number
of threads (llama-perplexity compares rows on all cores, whatever -t says).

    both files      llama-perplexity --save-all-logits, then --kl-divergence; lowbit measure --against
    reference kept  --kl-divergence with that file; lowbit measure --reference-cache with a cache made before

Of each pair the commands follow one another, in an order that turns. A ratio is lowbit's tokens a second over
llama-perplexity's in the same pair, the median with its 95% bootstrap interval, of wall time and of CPU time, which a
busy neighbour moves less. Interpreter start, loading, hashing, the bootstrap and everything printed are in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import llama_perplexity
from llama_perplexity import Run
from lowbit import console
from lowbit.errors import LowbitError
from lowbit.measure.record import machine

CHUNK = 512


def main() -> int:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{llama_perplexity.BUILD}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    llama_perplexity.add_arguments(parser)
    parser.add_argument("--pairs", metavar="N", type=int, default=5)
    parser.add_argument("--only", choices=("both", "kept"), help="both files, or the reference kept (default: each)")
    args = parser.parse_args()
    llama_perplexity.check(parser, args)
    console.set_quiet(True)
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, xllamacpp {about['xllamacpp']}, {args.pairs} pairs")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            for model in args.models:
                compare(model, Path(args.folder or temporary), Path(temporary), args)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def compare(model: str, folder: Path, scratch: Path, args: argparse.Namespace) -> None:
    reference = llama_perplexity.packed(model, "f16", folder)
    artifact = llama_perplexity.packed(model, "q4_0", folder)
    logits, cache = scratch / "logits", scratch / f"{model}.cache"
    where = ["--reference-runtime", args.reference_runtime] if args.reference_runtime else []

    def lowbit(*more: object) -> Run:
        words = [sys.executable, "-m", "lowbit", "--quiet", "measure", artifact, "--text", args.text, "--no-speed"]
        words += ["--threads", args.threads, "--chunks", args.chunks, *more]
        return llama_perplexity.timed([str(word) for word in words], {})

    def save() -> Run:
        return llama_perplexity.run(args, reference, "--save-all-logits", logits)

    def divergence() -> Run:
        return llama_perplexity.run(args, artifact, "--kl-divergence", "--kl-divergence-base", logits)

    def both() -> Run:
        one, other = save(), divergence()
        return Run("", one.wall + other.wall, one.cpu + other.cpu)

    save()  # fills the page cache, and the kept reference's file
    kinds: list[tuple[str, int, Callable[[], Run], Callable[[], Run]]] = []
    if args.only != "kept":
        kinds.append(("both files", 2, both, lambda: lowbit("--against", reference, *where)))
    if args.only != "both":
        lowbit("--against", reference, "--reference-cache", cache)
        kinds.append(("reference kept", 1, divergence, lambda: lowbit("--reference-cache", cache)))
    for name, files, theirs, ours in kinds:
        seconds = np.empty((args.pairs, 2, 2))  # (pairs, side, wall and CPU)
        for pair in range(args.pairs):
            for side in (0, 1) if pair % 2 else (1, 0):
                run = (theirs, ours)[side]()
                seconds[pair, side] = run.wall, run.cpu
        show(f"{model}, {name}", files * args.chunks * CHUNK, seconds, args.threads)


def show(name: str, tokens: int, seconds: np.ndarray, threads: int) -> None:
    cells = []
    for kind in (0, 1):
        ratio = seconds[:, 0, kind] / seconds[:, 1, kind]
        drawn = np.random.default_rng(0).choice(ratio, (2000, len(ratio)))
        low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
        rates = tokens / np.median(seconds[:, :, kind], axis=0)
        cells.append(f"{rates[1]:7.0f} / {rates[0]:.0f} = {np.median(ratio):.2f} [{low:.2f}, {high:.2f}]")
    print(f"{name}, {threads} thread(s), {tokens} tokens: a second of wall {cells[0]}, of CPU {cells[1]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
