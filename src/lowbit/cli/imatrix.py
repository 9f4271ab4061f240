"""Collect an importance matrix: how large the inputs of every weight are while llama.cpp reads a text. `lowbit pack
--imatrix` and llama-quantize round under it. The options are llama-imatrix's."""

from __future__ import annotations

import argparse

from lowbit.cli import output
from lowbit.cli.training import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a GGUF, run as it is; or any MODEL, run unquantized")
    parser.add_argument(
        "-f", "--file", metavar="TEXT", help="UTF-8 text (default: 100 chunks of the bundled text; none with --in-file)"
    )
    parser.add_argument("-o", "--out", metavar="FILE", required=True, help="the importance matrix to write")
    parser.add_argument(
        "--chunks", type=positive, metavar="N", help="how many chunks to read (default: the whole text)"
    )
    parser.add_argument(
        "-c", "--ctx-size", type=positive, default=512, metavar="N", help="tokens a chunk (default: 512)"
    )
    parser.add_argument("--process-output", action="store_true", help="collect for output.weight too")
    parser.add_argument(
        "--output-format", default="gguf", metavar="FORMAT", help="gguf (default), or dat: the old form"
    )
    parser.add_argument(
        "--in-file", action="append", default=[], metavar="FILE", help="an earlier matrix to add to; may be repeated"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: one a core)")


def run(args: argparse.Namespace) -> int:
    from lowbit import console
    from lowbit.imatrix import imatrix

    with output.results_only():
        found = imatrix(
            args.model,
            args.out,
            args.file,
            chunks=args.chunks,
            context_size=args.ctx_size,
            process_output=args.process_output,
            output_format=args.output_format,
            in_files=args.in_file,
            threads=args.threads,
        )
    console.log(f"{len(found.entries)} weights, {found.chunk_count} chunks of {found.chunk_size} tokens")
    print(args.out)
    return 0
