"""Does a release belong together? Reads a folder, or a lowbit.lock, with a base, a QAT checkpoint, artifacts (GGUF,
MLX, compressed-tensors), a drafter, a projector, and proves that tokenizer, chat template, special tokens, positions,
weights and logits agree, in each runtime that is installed. Refuses pickles, remote code and hostile templates. Exit
code 1 where a check fails."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from lowbit.cli import output

FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("release", metavar="DIR|LOCK", help="a folder of files that ship together, or its lowbit.lock")
    parser.add_argument("--only", metavar="NAME,...", type=names, default=(), help="these checks alone")
    parser.add_argument("--skip", metavar="NAME,...", type=names, default=(), help="all checks but these")
    parser.add_argument("--quick", action="store_true", help="no check that has a runtime compute")
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument(
        "--write-lock",
        action="store_true",
        help="tell the members by what they are, check them, and write lowbit.lock where no check fails",
    )
    doing.add_argument(
        "--watch",
        action="store_true",
        help="check again whenever a file changes, until interrupted; with --json a line of JSON each time",
    )
    output.add_json(parser)


def names(text: str) -> tuple[str, ...]:
    """argparse type: names with commas between."""
    return tuple(name for name in (part.strip() for part in text.split(",")) if name)


def run(args: argparse.Namespace) -> int:
    if args.watch:
        return _watch(args)
    from lowbit import console
    from lowbit.check import check

    options = {"only": args.only, "skip": args.skip, "quick": args.quick}
    with output.results_only():
        result = check(
            args.release, write_lock=args.write_lock, tell=lambda name: console.log(f"{name} ..."), **options
        )
    if args.json:
        output.write_result(result, args.json)
    if args.json != "-":
        _show(result)
    return 0 if result["passed"] else FAILED


def _watch(args: argparse.Namespace) -> int:
    from lowbit import check as verb

    for result in verb.watch(args.release, only=args.only, skip=args.skip, quick=args.quick):
        if args.json == "-":
            print(json.dumps(result, ensure_ascii=False), flush=True)
            continue
        if args.json:
            with open(args.json, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(result, ensure_ascii=False) + "\n")
        if sys.stdout.isatty():
            print("\x1b[2J\x1b[H", end="")  # the table takes the place of the one before
        _show(result)
    return 0


def _show(result: dict[str, Any]) -> None:
    from lowbit.cli import check_table

    check_table.show(result, sys.stdout)
