"""Will it fit: weights, KV cache, scratch, drafter and projector of a model in its runtime, before it is loaded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit import files
from lowbit.cli import output
from lowbit.cli.pack import size_in_bytes
from lowbit.cli.training import positive
from lowbit.errors import BadOption

if TYPE_CHECKING:
    from lowbit.plan import Fit, Plan, PlanOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a GGUF, a folder, a config.json, a hub id or a model's name (gemma-4-e2b); with --ram also a family's",
    )
    parser.add_argument(
        "--runtime", default="llama.cpp", metavar="NAME", help="llama.cpp (default), mlx, litert-lm or vllm"
    )
    turned = parser.add_argument_group("the question turned round")
    memory = turned.add_mutually_exclusive_group()
    memory.add_argument(
        "--ram", type=size_in_bytes, metavar="SIZE",
        help="the longest context that fits into SIZE (8GiB), for each KV type and number of slots; of a family's name "
        "(gemma-4), which models and formats fit",
    )  # fmt: skip
    memory.add_argument("--vram", type=size_in_bytes, metavar="SIZE", help="the same of a GPU's memory")
    turned.add_argument(
        "--margin", type=size_in_bytes, metavar="SIZE", help="what stays free (default: the runtime's habit, printed)"
    )
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
    parser.add_argument("--kv", metavar="TYPE", help="KV cache: f16 (default), q8_0, ..., or two of them as K:V")
    parser.add_argument("-ctk", "--cache-type-k", metavar="TYPE", help="of the keys alone")
    parser.add_argument("-ctv", "--cache-type-v", metavar="TYPE", help="of the values alone")
    parser.add_argument("-b", "--batch-size", type=positive, default=2048, metavar="N", help="default: 2048")
    parser.add_argument("-ub", "--ubatch-size", type=positive, default=512, metavar="N", help="default: 512")
    parser.add_argument("--swa-full", action="store_true", help="sliding layers keep all of the context")
    parser.add_argument("-fa", "--flash-attn", choices=("on", "off", "auto"), default="auto", help="default: auto")
    parser.add_argument("--recipe", metavar="NAME", help="plan for the weights packed so (a checkpoint: q4_0)")
    parser.add_argument("-md", "--drafter", "--model-draft", metavar="MODEL", help="a drafter loaded beside it")
    parser.add_argument("--mmproj", metavar="FILE", help="a projector loaded beside it")
    parser.add_argument("--no-mmap", action="store_true", help="the file is read instead of mapped")
    parser.add_argument("--html", metavar="FILE", help="write a page with a plot of memory against context")
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from lowbit.plan import FitOptions, fit, plan

    room = args.ram or args.vram
    if args.margin is not None and not room:
        raise BadOption("--margin goes with --ram or --vram", found="neither")
    if room and (args.ctx or args.cache_type_k or args.cache_type_v):
        expected = "no --ctx; --kv for both keys and values"
        raise BadOption(
            "--ram and --vram look for the longest context", found="a context or a type apart", expected=expected
        )
    options = _options(args)
    if args.html:
        files.check_writable(args.html)
    with output.results_only():
        if room:
            kv_types = tuple(args.kv.split(",")) if args.kv else None
            asked = FitOptions(
                room=room, margin=args.margin, gpu=bool(args.vram), kv_types=kv_types,
                slots=(args.slots,) if args.slots else None, recipes=(args.recipe,) if args.recipe else None,
            )  # fmt: skip
            found: Fit | Plan = fit(args.model, options, asked)
        else:
            found = plan(args.model, options)
        if args.html:
            from lowbit.report import plan_page

            plan_page.write(args.model, options, found, Path(args.html))
    if args.json:
        output.write_result(found.to_json(), args.json)
    if args.json != "-":
        from lowbit.cli import fit_table, plan_table

        if isinstance(found, plan_table.Plan):
            plan_table.show(found, sys.stdout)
        else:
            fit_table.show(found, sys.stdout)
    return 0


def _options(args: argparse.Namespace) -> PlanOptions:
    from lowbit.plan import PlanOptions

    kv_type_k, _, kv_type_v = (args.kv or "").partition(":")
    return PlanOptions(
        runtime=args.runtime,
        context=args.ctx,
        slots=args.slots,
        kv_unified=args.kv_unified,
        batch=args.batch_size,
        ubatch=args.ubatch_size,
        swa_full=args.swa_full,
        kv_type_k=args.cache_type_k or kv_type_k,
        kv_type_v=args.cache_type_v or kv_type_v or kv_type_k,
        flash_attention={"on": True, "off": False, "auto": None}[args.flash_attn],
        recipe=args.recipe,
        drafter=args.drafter,
        mmproj=args.mmproj,
        mmap=not args.no_mmap,
    )
