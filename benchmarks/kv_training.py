"""What a quantized KV cache adds to the KLD, in llama.cpp, of a model trained for it and of one trained without.

    python benchmarks/kv_training.py WITHOUT WITH --text FILE... [--contexts 512,2048] [--tokens 2048] [--kv q4_0]

WITHOUT and WITH are run folders of ``lowbit ship``, the second with --kv. From each text come --tokens tokens in
sequences of each length (one at least). Both models read them with an f16 and with the quantized cache, against
WITHOUT's reference.gguf with an f16 cache; scored are spans in the second half (docs/kv.md). All is paired position by
position, and intervals are of one bootstrap. A sequence that is scored is kept in --work: a killed run goes on there.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np

from lowbit import console
from lowbit.errors import LowbitError
from lowbit.measure import kv
from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.record import Figure
from lowbit.run.llama_cpp import LlamaCpp

NAME = "model-q4_0.gguf"
KLD = 1  # of what kv.score gives


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("without", metavar="WITHOUT", type=Path)
    parser.add_argument("with_it", metavar="WITH", type=Path)
    parser.add_argument("--text", metavar="FILE", nargs="+", required=True, type=Path, help="held-out texts")
    parser.add_argument("--contexts", default="512,2048", metavar="N,...")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="of each text at each length")
    parser.add_argument("--kv", default="q4_0", metavar="TYPE", help="TYPE or K:V (default: q4_0)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("kv_training.work"))
    args = parser.parse_args()
    try:
        for context in (int(n) for n in args.contexts.split(",")):
            show(context, args.kv, np.stack([found for text in args.text for found in scores(args, text, context)]))
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def scores(args: argparse.Namespace, text: Path, context: int) -> list[np.ndarray]:
    """(models, caches, figures, positions) of each sequence of a text."""
    paths = [args.without / "reference.gguf", args.without / NAME, args.with_it / NAME]
    room = {"context": context, "threads": args.threads}
    args.work.mkdir(parents=True, exist_ok=True)
    with LlamaCpp(paths[0], **room) as judge, LlamaCpp(paths[1], **room) as first, LlamaCpp(paths[2], **room) as second:
        models = [[model, model.beside(kv_type=args.kv)] for model in (first, second)]
        ids = np.array(judge.tokenize(text.read_text(encoding="utf-8")), np.int32)
        rows = kv.sequences(ids, context, args.tokens, judge.bos if judge.adds_bos else None)
        found = []
        for i, row in enumerate(rows):
            stamps = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
            key = hashlib.sha256(repr((stamps, args.kv, row.tobytes())).encode()).hexdigest()[:16]
            kept = args.work / f"{key}.npy"
            if not kept.exists():
                console.log(f"{text.name}, {context} tokens, sequence {i + 1} of {len(rows)}")
                np.save(kept, kv.score(judge, models, row, threads=args.threads))
            found.append(np.load(kept))
    return found


def show(context: int, kind: str, found: np.ndarray) -> None:
    """found: (sequences, models, caches, figures, positions)."""
    half = len(kv.spans_of(context)) // 2 * kv.SPAN
    kld = found[:, :, :, KLD, half:]  # (sequences, models, caches, positions)
    draws = Bootstrap(len(kld), kld.shape[-1])
    print(f"{context} tokens, {len(kld)} sequences, n = {kld[:, 0, 0].size} positions, {kind} cache")
    means = [[draws.means(kld[:, m, c]) for c in (0, 1)] for m in (0, 1)]
    for m, name in enumerate(("trained without", "trained with it")):
        plain, rounded = draws.mean(kld[:, m, 0]), draws.mean(kld[:, m, 1])
        added = draws.mean(kld[:, m, 1] - kld[:, m, 0])
        print(f"  {name}: KLD f16 {interval(plain)}, {kind} {interval(rounded)}, added {interval(added)}")
    of = [(float(kld[:, m, 1].mean() - kld[:, m, 0].mean()), means[m][1] - means[m][0]) for m in (0, 1)]
    ratio = draws.figure(of[1][0] / of[0][0], of[1][1] / of[0][1])
    plain = draws.figure(float(kld[:, 1, 0].mean() / kld[:, 0, 0].mean()), means[1][0] / means[0][0])
    print(f"  added, with over without: {interval(ratio)}; KLD with f16, with over without: {interval(plain)}")
    sys.stdout.flush()


def interval(figure: Figure) -> str:
    return f"{figure.value:.4f} [{figure.low:.4f}, {figure.high:.4f}]"


if __name__ == "__main__":
    sys.exit(main())
