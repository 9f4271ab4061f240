"""Fidelity, speed and memory of packed artifacts, each in its runtime, against a reference on a held-out text."""

from __future__ import annotations

import argparse
import sys

from lowbit.cli import output
from lowbit.cli.training import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifacts", metavar="ARTIFACT", nargs="+", help="GGUF files, MLX or Hugging Face folders")
    parser.add_argument("--against", metavar="REFERENCE", required=True, help="a GGUF of high precision or a MODEL")
    parser.add_argument(
        "--runtime",
        metavar="NAME",
        help="run the artifacts in llama.cpp, llama-server, mlx, transformers or openai (default: what each is for)",
    )
    parser.add_argument(
        "--reference-runtime",
        metavar="NAME",
        help="run the reference there (default: what a file is for; a MODEL in the first artifact's)",
    )
    parser.add_argument("--text", metavar="FILE", required=True, help="held-out text, UTF-8")
    parser.add_argument("--chunk", type=positive, default=512, metavar="N", help="tokens a chunk (default: 512)")
    parser.add_argument("--chunks", type=positive, metavar="N", help="how many chunks (default: the whole text)")
    parser.add_argument(
        "--kv-type",
        default="f16",
        metavar="TYPE",
        help="KV cache of the artifacts: f16 (default), q8_0, ...",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all it may use)")
    parser.add_argument("--no-speed", action="store_true", help="leave out speed and memory")
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from lowbit.measure import MeasureOptions, measure

    costs = not args.no_speed
    options = MeasureOptions(
        chunk=args.chunk,
        chunks=args.chunks,
        kv_type=args.kv_type,
        threads=args.threads,
        runtime=args.runtime,
        reference_runtime=args.reference_runtime,
        speed=costs,
        memory=costs,
    )
    with output.results_only():
        measured = measure(args.artifacts, against=args.against, text=args.text, options=options)
    if args.json:
        output.write_result(measured, args.json)
    if args.json != "-":
        from lowbit.report import terminal  # type: ignore[attr-defined]

        terminal.show_measurement(measured, sys.stdout)
    return 0
