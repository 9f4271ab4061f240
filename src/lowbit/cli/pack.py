"""Write a checkpoint as GGUF, and beside it a certificate of what is lossless. Codes and scales that training ended on
are written as they are, never rounded again; those of a checkpoint that another program trained are found again in its
values. --verify proves a GGUF that is there already, whoever made it."""

from __future__ import annotations

import argparse
import sys

from lowbit.cli import output
from lowbit.cli.training import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a checkpoint folder, or any MODEL")
    parser.add_argument(
        "--recipe",
        help="type of the matrices: q4_0 (default), q4_1, q5_0, q5_1, q8_0, f16, bf16, f32; with --mmproj f16 "
        "(default), bf16, f32, q8_0",
    )
    parser.add_argument(
        "--mmproj",
        action="store_true",
        help="write the vision or audio towers and the projector of a multimodal checkpoint, which llama.cpp loads "
        "beside the text model",
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="the GGUF to write, and FILE.certificate.json beside it")
    parser.add_argument(
        "--naive",
        action="store_true",
        help="round all anew as llama.cpp's quantize does, stored codes or not",
    )
    parser.add_argument("--verify", metavar="ARTIFACT", help="write nothing; prove this GGUF against --source")
    parser.add_argument("--source", metavar="CHECKPOINT", help="with --verify: what the GGUF was made from")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: one a core)")
    parser.add_argument("--json", metavar="FILE", help="write the certificate to FILE too; - is standard output")


def run(args: argparse.Namespace) -> int:
    _check(args)
    return _verify(args) if args.verify is not None else _pack(args)


def _check(args: argparse.Namespace) -> None:
    """Which options go together. Raises BadOption."""
    from lowbit.errors import BadOption

    if args.verify is None:
        missing = {"CHECKPOINT": args.checkpoint, "-o/--out": args.out}
        if args.source is not None:
            raise BadOption("--source goes with --verify", hint="`lowbit pack --help` lists the options")
    else:
        missing = {"--source": args.source}
        if args.checkpoint is not None or args.out is not None or args.naive or args.mmproj:
            found = "CHECKPOINT, --out, --naive or --mmproj"
            raise BadOption("--verify writes nothing", found=found, expected="--source alone")
    for name, value in missing.items():
        if value is None:
            hint = "`lowbit pack --help` lists the options"
            raise BadOption(f"the following arguments are required: {name}", hint=hint)


def _pack(args: argparse.Namespace) -> int:
    from lowbit import console
    from lowbit.inspect import inspect
    from lowbit.pack import pack
    from lowbit.units import format_bytes

    recipe = args.recipe or ("f16" if args.mmproj else "q4_0")
    with output.results_only():
        packed = pack(
            args.checkpoint,
            recipe,
            args.out,
            naive=args.naive,
            certificate=True,
            threads=args.threads,
            mmproj=args.mmproj,
        )
    assert packed.certificate is not None
    bits = inspect(packed.path)["bits_per_weight"]
    if not console.is_quiet():
        from lowbit.cli import tables

        tables.show_certificate(packed.certificate.to_json(), sys.stderr)
    console.log(f"{format_bytes(packed.size_bytes)}, {bits:.2f} bits per weight")
    if args.json:
        output.write_result(packed.certificate.to_json(), args.json)
    if args.json != "-":
        print(packed.path)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from lowbit.pack import verify

    with output.results_only():
        proved = verify(args.verify, args.source, threads=args.threads)
    if args.json:
        output.write_result(proved.to_json(), args.json)
    if args.json != "-":
        from lowbit.cli import tables

        tables.show_certificate(proved.to_json(), sys.stdout)
    return 0
