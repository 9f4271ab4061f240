"""Train, pack, measure and report, into one run folder. Kill it at any moment: the same command goes on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lowbit import launch
from lowbit.cli import output, training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="smollm2-135m, gemma3-270m, a folder, a hub id or a GGUF")
    parser.add_argument("--out", metavar="DIR", help="the run folder (default: runs/ and the model's name)")
    parser.add_argument("--text", metavar="FILE", help="held-out text to measure on; training never sees it")
    parser.add_argument("--no-speed", action="store_true", help="leave out the speed and memory measurements")
    output.add_json(parser)
    training.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from lowbit.ship import ship

    out = Path(args.out) if args.out else Path("runs") / default_name(args.model)
    with output.results_only():
        ship(args.model, out=out, text=args.text, speed=not args.no_speed, **training.options(args))
        if launch.rank() > 0:
            return 0
        record = _finish(out)
    if args.json:
        output.write_result(record, args.json)
    if args.json != "-":
        print((out / "report.html").resolve())
    return 0


def default_name(model: str) -> str:
    """'org/Model-1B' -> 'Model-1B'; 'x/model.gguf' -> 'model'; '.' -> the folder's name."""
    path = Path(model).resolve() if Path(model).exists() else Path(model)
    return (path.stem if path.suffix == ".gguf" else path.name) or "model"


def _finish(out: Path) -> dict[str, object]:
    """The terminal summary, to standard error; gives the record back."""
    from lowbit import console
    from lowbit.report import read_record, terminal

    record = read_record(out)
    if not console.is_quiet():
        terminal.show(record, sys.stderr)
    return record
