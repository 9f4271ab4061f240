"""Write a checkpoint as GGUF, MLX, compressed-tensors or LiteRT-LM, with a certificate of what is lossless. Codes and
scales that training ended on are written as they are, never rounded again; those of a checkpoint that another program
trained are found again in its values. --verify proves an artifact that is there already, whoever made it."""

from __future__ import annotations

import argparse
import re
import sys

from lowbit.cli import output
from lowbit.cli.training import positive, positive_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a checkpoint folder, or any MODEL")
    parser.add_argument(
        "--recipe",
        help="type of the matrices: q4_0 (GGUF's default), q4_1, q5_0, q5_1, q8_0, iq4_nl, mxfp4, q2_k, "
        "q4_k, q5_k, q6_k; q4_k_m, llama-quantize's mix; mlx_affine4_g32 (MLX's default), "
        "mlx_affine4_g64, mlx_affine8_g32, mlx_affine8_g64; int4_g32 (compressed-tensors' default), int4_g128; "
        "mobile_w8 (LiteRT-LM's default), mobile, mobile_mlp2, mobile_w4; "
        "f16, bf16, f32; with --mmproj f16 (default), bf16, f32, q8_0",
    )
    parser.add_argument(
        "--to",
        metavar="CONTAINER",
        help="gguf or litert-lm (files), mlx or compressed-tensors (folders); without it the one that has the recipe's "
        "type, gguf before the others",
    )
    parser.add_argument(
        "--mmproj",
        action="store_true",
        help="write the vision or audio towers and the projector of a multimodal checkpoint, which llama.cpp loads "
        "beside the text model",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        help="what to write: a GGUF or .litertlm, and OUT.certificate.json beside it; or a folder",
    )
    parser.add_argument(
        "-c", "--context", type=positive, metavar="N",
        help="tokens that the caches of a .litertlm hold (default: 4096, or the model's own if that is less)",
    )  # fmt: skip
    parser.add_argument(
        "--naive",
        action="store_true",
        help="round all anew as llama.cpp's quantize (or MLX, or compressed-tensors) does, stored codes or not",
    )
    parser.add_argument(
        "--imatrix", metavar="FILE", help="round under this importance matrix, of `lowbit imatrix` or llama-imatrix"
    )
    parser.add_argument("--calibration", metavar="FILE", help="round by what `lowbit calibrate` measured of this model")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--bits", type=positive_number, metavar="N", help="choose each tensor's type: N bits a weight")
    budget.add_argument("--size", type=size_in_bytes, metavar="SIZE", help="... or a file of SIZE (4GiB, 105MB, bytes)")
    parser.add_argument(
        "--verify", metavar="ARTIFACT", help="write nothing; prove this GGUF or folder against --source"
    )
    parser.add_argument("--source", metavar="CHECKPOINT", help="with --verify: what it was made from")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: one a core)")
    parser.add_argument("--json", metavar="FILE", help="write the certificate to FILE too; - is standard output")


def size_in_bytes(text: str) -> int:
    """argparse type: '4GiB', '105MB' or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    power = " KMGT".index(match[2].upper() or " ") if match else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a size such as 4GiB, 105MB or a number of bytes")
    return size


def run(args: argparse.Namespace) -> int:
    _check(args)
    return _verify(args) if args.verify is not None else _pack(args)


def _check(args: argparse.Namespace) -> None:
    """Which options go together. Raises BadOption."""
    from lowbit.errors import BadOption

    if args.verify is None:
        missing = {"CHECKPOINT": args.checkpoint, "-o/--out": args.out}
        budgeted = args.bits is not None or args.size is not None
        if budgeted and args.recipe is not None:
            raise BadOption("--bits and --size choose the types", found="--recipe", hint="Leave out one of the two")
        if args.source is not None:
            raise BadOption("--source goes with --verify", hint="`lowbit pack --help` lists the options")
    else:
        missing = {"--source": args.source}
        others = {
            "CHECKPOINT": args.checkpoint, "--out": args.out, "--to": args.to, "--recipe": args.recipe,
            "--imatrix": args.imatrix, "--calibration": args.calibration, "--bits": args.bits, "--size": args.size,
            "--context": args.context,
        }  # fmt: skip
        given = [name for name, value in others.items() if value is not None]
        given += ["--naive"] * args.naive + ["--mmproj"] * args.mmproj
        if given:
            raise BadOption("--verify writes nothing", found=", ".join(given), expected="--source alone")
    for name, value in missing.items():
        if value is None:
            hint = "`lowbit pack --help` lists the options"
            raise BadOption(f"the following arguments are required: {name}", hint=hint)


def _pack(args: argparse.Namespace) -> int:
    from lowbit import console
    from lowbit.inspect import inspect
    from lowbit.pack import pack
    from lowbit.units import format_bytes

    with output.results_only():
        packed = pack(
            args.checkpoint,
            args.recipe,
            args.out,
            to=args.to,
            naive=args.naive,
            imatrix=args.imatrix,
            certificate=True,
            calibration=args.calibration,
            bits=args.bits,
            size=args.size,
            threads=args.threads,
            mmproj=args.mmproj,
            context=args.context,
        )
    assert packed.certificate is not None
    bits = inspect(packed.path)["bits_per_weight"]
    if not console.is_quiet():
        from lowbit.cli import tables

        if packed.mix is not None:
            tables.show_mix(packed.mix.table(), sys.stderr)
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
