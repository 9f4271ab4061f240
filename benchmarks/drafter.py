"""What a drafter's guesses are worth to the unquantized target and to the one that ships, before and after adaptation.

    python benchmarks/drafter.py MODEL QUANTIZED.gguf --out DIR --text FILE... [--layers 4] [--minutes M] [--adapt A]

MODEL is the unquantized target, QUANTIZED.gguf what ships of it. Made in DIR, where they are not there yet: ``first``,
a drafter of N of the target's layers trained for M minutes on MODEL; ``more``, trained A minutes more on MODEL;
``adapted``, trained A minutes more on QUANTIZED.gguf instead; minutes are CPU time of one core. Each is packed to Q8_0,
has the target's vocabulary, and guesses for both targets in llama.cpp's server, greedy, after the same prompts out of
held-out text. Printed for each pair: the share of guessed tokens accepted, and tokens a second over those without a
drafter; all servers of a target answer each prompt in turn, in an order that goes round. 95% intervals by bootstrap
over prompts.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import lowbit
from _cpu_clock import cpu_clock
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.run.llama_server import LlamaServer
from lowbit.train import TrainOptions
from lowbit.train.drafter import check_vocabulary, train_drafter

_CONTEXT = 1024
_CHARACTERS = 240  # of held-out text before each answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("quantized", metavar="QUANTIZED.gguf", type=Path)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--text", nargs="+", required=True, type=Path, metavar="FILE")
    parser.add_argument("--layers", type=int, default=4, metavar="N")
    parser.add_argument("--minutes", type=float, default=20.0, metavar="M", help="of the first training (default: 20)")
    parser.add_argument("--adapt", type=float, default=10.0, metavar="A", help="of each of the others (default: 10)")
    parser.add_argument("--prompts", type=int, default=24, metavar="N", help="of each text (default: 24)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each answer (default: 64)")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    args = parser.parse_args()
    try:
        drafters = make(args)
        prompts = [prompt for text in args.text for prompt in prompts_of(text, args.prompts)]
        source = args.out / "target.gguf"
        for target in (source, args.quantized):
            show(target, drafters, prompts, args)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def make(args: argparse.Namespace) -> dict[str, Path]:
    """The three drafters as files."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "target.gguf").exists():
        lowbit.pack(args.model, "bf16", out / "target.gguf")
    first = out / "first"
    plans = {
        "first": (args.model, f"layers:{args.layers}", args.minutes),
        "more": (args.model, first, args.adapt),
        "adapted": (args.quantized, first, args.adapt),
    }
    made = {}
    for name, (target, drafter, minutes) in plans.items():
        made[name] = out / f"{name}.gguf"
        if not made[name].exists():
            options = TrainOptions(minutes=minutes, threads=1, seed=len(made))
            with cpu_clock():
                train_drafter(target, drafter, out / name, options=options)
            lowbit.pack(out / name, "q8_0", made[name])
        with open_checkpoint(args.quantized) as of, open_checkpoint(made[name]) as opened:
            check_vocabulary(of, opened)
    return made


def prompts_of(text: Path, n: int) -> list[str]:
    """Passages from all over a text, each from the beginning of a word."""
    whole = text.read_text("utf-8")
    starts = np.linspace(0, len(whole) - 2 * _CHARACTERS, n).astype(int)
    return [whole[start : start + _CHARACTERS].partition(" ")[2] for start in starts]


def show(target: Path, drafters: dict[str, Path], prompts: list[str], args: argparse.Namespace) -> None:
    found = measure(target, drafters, prompts, args.tokens, args.threads)
    print(f"{target.name}, {len(prompts)} prompts, {args.tokens} tokens each, {args.threads} thread(s)")
    alone = found["alone"]
    for name in drafters:
        drafted, accepted, seconds = found[name].T
        share = resampled(lambda i, a=accepted, d=drafted: a[i].sum() / d[i].sum(), len(prompts))
        speed = resampled(lambda i, s=seconds: alone[i, 2].sum() / s[i].sum(), len(prompts))
        print(
            f"  {name:8} accepted {share} of {drafted.sum():.0f} guessed tokens; {speed} times the speed alone, "
            f"{len(prompts) * args.tokens / alone[:, 2].sum():.0f} tokens/s"
        )
    for name in list(drafters)[:2]:
        ours, theirs = found["adapted"].T, found[name].T
        gain = resampled(
            lambda i, o=ours, t=theirs: o[1][i].sum() / o[0][i].sum() - t[1][i].sum() / t[0][i].sum(), len(prompts)
        )
        print(f"  adapted less {name}: {gain} of the guessed tokens")
    sys.stdout.flush()


def measure(target: Path, drafters: dict[str, Path], prompts: list[str], n: int, threads: int) -> dict[str, np.ndarray]:
    """(prompts, 3) float64 for each drafter and 'alone': tokens guessed, accepted, and seconds."""
    found = {name: np.zeros((len(prompts), 3)) for name in ("alone", *drafters)}
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                LlamaServer(target, context=_CONTEXT, threads=threads, drafter=drafters.get(name))
            )
            for name in found
        }
        for server in servers.values():
            server.complete_native(prompts[0], n, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            names = list(servers)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                begin = time.perf_counter()
                timings = servers[name].complete_native(prompt, n, ignore_eos=True, cache_prompt=False)["timings"]
                seconds = time.perf_counter() - begin
                found[name][i] = timings.get("draft_n", 0), timings.get("draft_n_accepted", 0), seconds
    return found


def resampled(statistic: Callable[[np.ndarray], float], n: int) -> str:
    rng = np.random.default_rng(0)
    draws = [statistic(rng.integers(0, n, n)) for _ in range(2000)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{statistic(np.arange(n)):.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
