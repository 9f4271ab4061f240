"""How llama.cpp's server is started and what the harness may do: the flags that serve and batch share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.cli.training import positive

if TYPE_CHECKING:
    from lowbit.harness import HarnessOptions
    from lowbit.model_server import ModelOptions


def add_server(parser: argparse.ArgumentParser, slots: str = "default: 4") -> argparse._ArgumentGroup:
    group = parser.add_argument_group("llama.cpp's server, in llama-server's words")
    group.add_argument("--ctx", "-c", type=positive, metavar="N", help="tokens of all slots (default: what fits)")
    group.add_argument("--slots", "--parallel", "-np", type=positive, metavar="N", help=f"requests at once ({slots})")
    group.add_argument("--kv", default="f16", metavar="TYPE", help="KV cache: f16 (default), q8_0, ..., or K:V")
    group.add_argument("--kv-unified", action=argparse.BooleanOptionalAction, help="one cache for all slots")
    group.add_argument("--swa-full", action="store_true", help="sliding layers keep all, and prefixes are reused")
    group.add_argument(
        "--cache-ram", "-cram", type=_mib, metavar="MIB",
        help="for prompts that lost their slot (default: half of what the plan leaves free, 8192 at most)",
    )  # fmt: skip
    group.add_argument("--threads", "-t", type=positive, metavar="N", help="CPU threads (default: all it may use)")
    group.add_argument("--drafter", "-md", type=Path, metavar="FILE", help="a GGUF that guesses ahead")
    group.add_argument("--mmproj", "-mm", type=Path, metavar="FILE", help="projector for images and sound")
    group.add_argument("--chat-template", type=Path, metavar="FILE", help="instead of the model's own")
    group.add_argument("--llama-server", metavar="PATH", help="this binary instead of the installed library's server")
    return group


def _mib(text: str) -> int:
    if not text.isdecimal():  # llama-server's -1, no limit, is what this is there to prevent
        raise argparse.ArgumentTypeError(f"must be 0 or more, found {text}")
    return int(text)


def model_options(args: argparse.Namespace) -> ModelOptions:
    from lowbit.model_server import ModelOptions

    return ModelOptions(
        context=args.ctx,
        slots=args.slots,
        kv_type=args.kv,
        kv_unified=args.kv_unified,
        swa_full=args.swa_full,
        cache_ram=args.cache_ram,
        threads=args.threads,
        drafter=args.drafter,
        mmproj=args.mmproj,
        template=args.chat_template,
        llama_server=args.llama_server,
    )


def add_harness(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the harness")
    group.add_argument("--tries", type=positive, default=3, metavar="N", help="requests for one answer (default: 3)")
    group.add_argument("--seconds", type=float, default=300.0, metavar="S", help="time for one answer (default: 300)")
    group.add_argument("--token-budget", type=positive, metavar="N", help="completion tokens of all tries together")
    group.add_argument("--max-steps", type=positive, metavar="N", help="rounds of tool calls (default: any number)")
    group.add_argument("--require", metavar="TOOL", action="append", default=[], help="must be called before an answer")
    group.add_argument("--dialect", metavar="NAME", help="how the model writes tool calls (default: all are tried)")
    group.add_argument("--without", metavar="LAYER", action="append", default=[], help="switch a layer off")


def harness_options(args: argparse.Namespace) -> HarnessOptions:
    from lowbit.harness import HarnessOptions

    return HarnessOptions.without(
        args.without,
        tries=args.tries,
        seconds=args.seconds,
        token_budget=args.token_budget,
        max_steps=args.max_steps,
        required=tuple(args.require),
        dialect=args.dialect,
    )
