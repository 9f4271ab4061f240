"""How much closer to its reference the trained Q4_0 file is than the naive one, in llama.cpp.

    python benchmarks/fidelity.py RUN_DIR... --text FILE...

For every run folder of ``lowbit ship`` and every text: the mean KLD of model-q4_0.gguf over that of naive-q4_0.gguf,
both against the folder's reference.gguf, with its paired 95% interval, then each file's own figures and sizes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import lowbit
from lowbit import console
from lowbit.errors import LowbitError
from lowbit.measure import MeasureOptions
from lowbit.units import format_bytes

FILES = ("naive-q4_0.gguf", "model-q4_0.gguf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", type=Path)
    parser.add_argument("--text", metavar="FILE", nargs="+", required=True, type=Path, help="held-out texts")
    parser.add_argument("--chunks", metavar="N", type=int, help="chunks of each text (default: all)")
    parser.add_argument("--threads", metavar="N", type=int)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args()
    console.set_quiet(args.quiet)
    options = MeasureOptions(chunks=args.chunks, threads=args.threads, speed=False, memory=False)
    try:
        for run in args.runs:
            for text in args.text:
                result = lowbit.measure(
                    [run / name for name in FILES], against=run / "reference.gguf", text=text, options=options
                )
                show(run, text, result)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def show(run: Path, text: Path, result: dict[str, Any]) -> None:
    pair, chunks = result["pairs"][0], result["text"]["chunks"]
    print(f"{run.name} on {text.name}: mean KLD x {interval(pair['kld_mean_ratio'])} of naive ({chunks} chunks)")
    for entry in result["artifacts"]:
        found = entry["fidelity"]
        print(
            f"  {Path(entry['path']).name:16} {entry['size_bytes']:>12,} bytes ({format_bytes(entry['size_bytes'])}),"
            f" {entry['bits_per_weight']:.2f} bits per weight"
        )
        for name, figure in found.items():
            if name != "tokens":
                print(f"    {name:12} {interval(figure)}")
        print(f"    {'tokens':12} {found['tokens']['value']}")
    print(f"    reference perplexity {interval(result['reference']['perplexity'])}")
    smaller = result["artifacts"][1]["size_bytes"] <= result["artifacts"][0]["size_bytes"]
    print(f"  the trained file is {'no larger than' if smaller else 'LARGER THAN'} the naive one")
    sys.stdout.flush()


def interval(figure: dict[str, float] | None) -> str:
    if figure is None:
        return "undefined"
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]"


if __name__ == "__main__":
    sys.exit(main())
