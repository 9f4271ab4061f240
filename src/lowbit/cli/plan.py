"""Will it fit: weights, KV cache, scratch, drafter and projector of a model in its runtime, before it is loaded."""

from __future__ import annotations

import argparse
import sys

from lowbit.cli import output
from lowbit.cli.training import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a GGUF, a folder, a config.json, a hub id or a model's name")
    parser.add_argument("--runtime", default="llama.cpp", metavar="NAME", help="llama.cpp (default)")
    parser.add_argument(
        "-c", "--ctx", "--ctx-size", type=int, default=0, metavar="N",
        help="context, as llama-server's -c: of all slots together (default: 0, what the model was trained for)",
    )  # fmt: skip
    parser.add_argument(
        "-np", "--slots", "--parallel", type=positive, metavar="N", help="sequences at a time (default: the runtime's)"
    )
    parser.add_argument(
        "--kv-unified", action=argparse.BooleanOptionalAction, help="one cache that all slots share, or one for each"
    )
    parser.add_argument("--kv", metavar="TYPE", help="KV cache: f16 (default), q8_0, ...")
    parser.add_argument("-ctk", "--cache-type-k", metavar="TYPE", help="of the keys alone")
    parser.add_argument("-ctv", "--cache-type-v", metavar="TYPE", help="of the values alone")
    parser.add_argument("-b", "--batch-size", type=positive, default=2048, metavar="N", help="default: 2048")
    parser.add_argument("-ub", "--ubatch-size", type=positive, default=512, metavar="N", help="default: 512")
    parser.add_argument("--swa-full", action="store_true", help="sliding layers keep all of the context")
    parser.add_argument("-fa", "--flash-attn", choices=("on", "off", "auto"), default="auto", help="default: auto")
    parser.add_argument("--recipe", metavar="NAME", help="plan for the weights packed so (a checkpoint: q4_0)")
    parser.add_argument("--no-mmap", action="store_true", help="the file is read instead of mapped")
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from lowbit.plan import PlanOptions, plan

    options = PlanOptions(
        runtime=args.runtime,
        context=args.ctx,
        slots=args.slots,
        kv_unified=args.kv_unified,
        batch=args.batch_size,
        ubatch=args.ubatch_size,
        swa_full=args.swa_full,
        kv_type_k=args.cache_type_k or args.kv or "f16",
        kv_type_v=args.cache_type_v or args.kv or "f16",
        flash_attention={"on": True, "off": False, "auto": None}[args.flash_attn],
        recipe=args.recipe,
        mmap=not args.no_mmap,
    )
    with output.results_only():
        found = plan(args.model, options)
    if args.json:
        output.write_result(found.to_json(), args.json)
    if args.json != "-":
        from lowbit.cli import plan_table

        plan_table.show(found, sys.stdout)
    return 0
