"""Make a run folder's report.html again from its lowbit.json, or the page of a measurement, and print the table."""

from __future__ import annotations

import argparse
import sys

from lowbit.cli import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", metavar="DIR|FILE", help="a folder that `lowbit ship` made, or what `measure --json` wrote"
    )
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from lowbit import console
    from lowbit.report import read_record, report, terminal  # type: ignore[attr-defined]

    with output.results_only():
        page = report(args.run_folder)
        record = read_record(args.run_folder)
        if not console.is_quiet():
            terminal.show(record, sys.stderr)
    if args.json:
        output.write_result(record, args.json)
    if args.json != "-":
        print(page.resolve())
    return 0
