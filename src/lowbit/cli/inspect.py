"""What is this file or folder: architecture, tensors, types, bits per weight, and on which lattice its weights sit."""

from __future__ import annotations

import argparse
import sys

from lowbit.cli import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL|FILE", help="a GGUF, a folder, a hub id or a model's name")
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from lowbit.inspect import inspect

    with output.results_only():
        found = inspect(args.model)
    if args.json:
        output.write_result(found, args.json)
    if args.json != "-":
        from lowbit.cli import tables
        from lowbit.report import terminal  # type: ignore[attr-defined]

        terminal.show_inspection(found, sys.stdout)
        tables.show_lattices(found["tensors"], sys.stdout)
    return 0
