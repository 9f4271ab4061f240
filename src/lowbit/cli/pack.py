"""Write a checkpoint as GGUF. Codes and scales that training ended on are written as they are, never rounded again."""

from __future__ import annotations

import argparse

from lowbit.cli import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint folder, or any MODEL")
    parser.add_argument(
        "--recipe", default="q4_0", help="type of the matrices: q4_0 (default), q4_1, q5_0, q5_1, q8_0, f16, bf16, f32"
    )
    parser.add_argument("-o", "--out", metavar="FILE", required=True, help="the GGUF to write")
    parser.add_argument(
        "--naive",
        action="store_true",
        help="round all anew as llama.cpp's quantize does, stored codes or not",
    )


def run(args: argparse.Namespace) -> int:
    from lowbit import console
    from lowbit.inspect import inspect
    from lowbit.pack import pack
    from lowbit.units import format_bytes

    with output.results_only():
        packed = pack(args.checkpoint, args.recipe, args.out, naive=args.naive)
    bits = inspect(packed.path)["bits_per_weight"]
    console.log(f"{format_bytes(packed.size_bytes)}, {bits:.2f} bits per weight")
    print(packed.path)
    return 0
