"""Find out what each weight of a model does to its output, from text and gradients, for `lowbit pack --calibration`."""

from __future__ import annotations

import argparse

from lowbit.cli import output
from lowbit.cli.training import minutes, positive, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="smollm2-135m, gemma3-270m, a folder, a hub id or a GGUF")
    parser.add_argument("-o", "--out", metavar="FILE", required=True, help="the calibration to write (.safetensors)")
    parser.add_argument(
        "-f", "--file", metavar="TEXT", help="text, JSONL or Parquet, or a datasets id (default: comes with lowbit)"
    )
    parser.add_argument("--sequences", type=positive, metavar="N", default=96, help="sequences of it (default: 96)")
    parser.add_argument("--sequence-length", type=positive, metavar="N", default=512, help="tokens each (default: 512)")
    parser.add_argument("--minutes", type=minutes, metavar="N", help="after which the rest of the text is left out")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of the products")
    parser.add_argument("--seed", type=whole, metavar="N", default=0, help="of the labels that are drawn (default: 0)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's own)")


def run(args: argparse.Namespace) -> int:
    from lowbit.calibrate import calibrate

    names = ("sequences", "sequence_length", "minutes", "precision", "seed", "threads")
    with output.results_only():
        calibrate(args.model, args.out, text=args.file, **{name: getattr(args, name) for name in names})
    print(args.out)
    return 0
