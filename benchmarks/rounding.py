"""How much closer to its source lowbit's 4-bit file of an untrained model is than llama-quantize's, in llama.cpp.

    python benchmarks/rounding.py MODEL --calibration FILE --imatrix FILE --llama-quantize PATH --text FILE...

Two pairs of files, each measured against the unquantized GGUF on every text: Q4_0, lowbit's with the calibration over
llama-quantize's with the imatrix; and lowbit's mix of at most the size of llama-quantize's Q4_K_M over that. The
calibration and the imatrix are to be of the same text, which is none of those measured on:

    lowbit calibrate MODEL -f TEXT -o FILE
    lowbit imatrix MODEL -f TEXT -o FILE          (or llama-imatrix)

llama-quantize is built from llama.cpp's source, for example that in the sdist of llama-cpp-python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import lowbit
from lowbit import console
from lowbit.errors import LowbitError
from lowbit.measure import MeasureOptions
from lowbit.units import format_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--calibration", metavar="FILE", required=True, type=Path)
    parser.add_argument("--imatrix", metavar="FILE", required=True, type=Path)
    parser.add_argument("--llama-quantize", metavar="PATH", required=True)
    parser.add_argument("--text", metavar="FILE", nargs="+", required=True, type=Path, help="held-out texts")
    parser.add_argument("--folder", metavar="DIR", type=Path, default=Path("rounding"), help="for the files made")
    parser.add_argument("--chunks", metavar="N", type=int, help="chunks of each text (default: all)")
    parser.add_argument("--threads", metavar="N", type=int)
    args = parser.parse_args()
    console.set_quiet(True)
    try:
        measure(args, pack(args))
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def pack(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Makes the files that are not there yet: the pairs (llama-quantize's, lowbit's)."""
    args.folder.mkdir(exist_ok=True)
    source = args.folder / "source.gguf"
    if not source.exists():
        lowbit.pack(args.model, "source", source)
    pairs = []
    for name in ("Q4_0", "Q4_K_M"):
        theirs, ours = args.folder / f"llama-{name.lower()}.gguf", args.folder / f"lowbit-{name.lower()}.gguf"
        if not theirs.exists():
            command = [args.llama_quantize, "--imatrix", args.imatrix, source, theirs, name]
            subprocess.run([str(part) for part in command], check=True, capture_output=True)
        if not ours.exists():
            begin = time.monotonic()
            options = {} if name == "Q4_0" else {"size": theirs.stat().st_size}
            # From the values, as llama-quantize: a packaged model may hold codes of its own, which would be copied.
            made = lowbit.pack(source, "q4_0", ours, calibration=args.calibration, threads=args.threads, **options)
            print(f"{ours.name}: made in {time.monotonic() - begin:.0f} s")
            if made.mix is not None:
                kinds = sorted(set(made.types.values()))
                print("  types:", ", ".join(f"{list(made.types.values()).count(kind)} x {kind}" for kind in kinds))
        pairs.append((theirs, ours))
    return pairs


def measure(args: argparse.Namespace, pairs: list[tuple[Path, Path]]) -> None:
    options = MeasureOptions(chunks=args.chunks, threads=args.threads, speed=False, memory=False)
    for text in args.text:
        for pair in pairs:
            result = lowbit.measure(list(pair), against=args.folder / "source.gguf", text=text, options=options)
            ratio = result["pairs"][0]["kld_mean_ratio"]
            interval = f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
            print(f"{text.name}: {pair[1].name}: mean KLD x {interval} of {pair[0].name}")
            for path, entry in zip(pair, result["artifacts"], strict=True):
                kld = entry["fidelity"]["kld_mean"]["value"]
                top = entry["fidelity"]["top1"]["value"]
                size = format_bytes(entry["size_bytes"])
                print(
                    f"  {path.name:20} {entry['size_bytes']:>12,} bytes ({size}), mean KLD {kld:.5f}, top-1 {top:.4f}"
                )
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
