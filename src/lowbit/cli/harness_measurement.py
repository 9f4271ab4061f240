"""The options of `lowbit measure --harness`: what each layer of the harness is worth."""

from __future__ import annotations

import argparse
import sys

from lowbit.cli import output
from lowbit.errors import BadOption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "the harness", "takes --limit, --max-tokens, --minutes, --threads, --model and --api-key-env too; with --json "
        "FILE a killed run goes on from FILE.work"
    )  # fmt: skip
    group.add_argument(
        "--harness",
        action="store_true",
        help="measure the harness of `lowbit serve` on BFCL's questions, with each of its layers switched off in turn",
    )
    group.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, up to /v1, as an artifact")
    group.add_argument(
        "--noisy",
        type=float,
        nargs="?",
        const=0.5,
        metavar="SHARE",
        help="measure it on a model too that gives right answers, of which this share is damaged (default: 0.5)",
    )
    group.add_argument("--groups", metavar="NAME,...", help="of questions: simple, multiple, parallel, irrelevance, "
                       "multi-turn, required, as-json (default: all)")  # fmt: skip
    group.add_argument("--without", metavar="LAYER,...", help="layers to switch off in turn (default: all)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the damage (default: 0)")


def wanted(args: argparse.Namespace) -> bool:
    """Whether it is the harness that is to be measured. Raises BadOption for its options without --harness."""
    given = [name for name in ("endpoint", "noisy", "groups", "without") if getattr(args, name) is not None]
    if given and not args.harness:
        raise BadOption(f"--{given[0]} is about the harness", expected="--harness")
    return bool(args.harness)


def run(args: argparse.Namespace) -> int:
    from lowbit.measure.ablation import AblationOptions, harness
    from lowbit.report import ablation_table

    if args.text or args.tasks or args.against or args.kv or args.retrieval:
        raise BadOption("--harness is a measurement of its own", hint="Leave out --text, --tasks, --against, --kv ...")
    lists = {"groups": _words(args.groups), "layers": _words(args.without)}
    sizes = {"limit": args.limit, "max_tokens": args.max_tokens, "minutes": args.minutes, "threads": args.threads}
    options = AblationOptions(
        noisy=args.noisy, seed=args.seed, model=args.model, api_key_env=args.api_key_env,
        **{name: value for name, value in {**lists, **sizes}.items() if value is not None},
    )  # fmt: skip
    targets = [*args.artifacts, *([args.endpoint] if args.endpoint else [])]
    with output.results_only():
        found = harness(targets, options=options, json=None if args.json == "-" else args.json)
    if args.json == "-":
        output.write_result(found, args.json)
    else:
        ablation_table.show(found, sys.stdout)
    return 0


def _words(value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(word.strip() for word in value.split(",") if word.strip())
