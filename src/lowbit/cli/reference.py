"""Ask a model about text once, for trainings to learn from: into a file, or as a process that answers them."""

from __future__ import annotations

import argparse

from lowbit.cli import output
from lowbit.cli.training import positive, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="smollm2-135m, gemma3-270m, a folder, a hub id or a GGUF")
    parser.add_argument("-o", "--out", metavar="FILE", help="the file to write, for train --reference FILE")
    parser.add_argument(
        "--port", type=whole, metavar="N",
        help="instead: answer there, for train --reference http://127.0.0.1:N; 0 takes a free one",
    )  # fmt: skip
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="with -o: text, JSONL or Parquet, or a datasets id (default: comes with lowbit)",
    )
    parser.add_argument("--sequences", type=positive, metavar="N", help="with -o: sequences of it (default: all)")
    parser.add_argument("--sequence-length", type=positive, metavar="N", default=512, help="tokens each (default: 512)")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of the products")
    parser.add_argument("--seed", type=whole, metavar="N", default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's own)")


def run(args: argparse.Namespace) -> int:
    from lowbit import console
    from lowbit.reference import reference

    def say(url: str) -> None:
        console.log(f"The reference answers on {url}. Ctrl-C ends it.")

    names = ("data", "sequences", "sequence_length", "precision", "seed", "threads")
    options = {name: getattr(args, name) for name in names}
    with output.results_only():
        reference(args.model, args.out, port=args.port, ready=say, **options)
    if args.out is not None:
        print(args.out)
    return 0
