"""Thousands of bounded jobs, durable and resumable: OpenAI's Batch JSONL in, results out, errors apart."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from lowbit.cli import batch_money
from lowbit.cli.model_flags import add_harness, add_server, harness_options, model_options
from lowbit.cli.output import add_json, write_result
from lowbit.cli.table_flags import add_table, table_options
from lowbit.cli.training import minutes, positive, positive_number, whole

if TYPE_CHECKING:
    from lowbit.batch.progress import Status

COMMANDS = {
    "run": "run a batch; stopped or killed, the same command goes on from there",
    "estimate": "before it is run: items, tokens, and with a probe time and cost",
    "cost": "what it cost against hosted models, the break-even, and what its check found",
    "status": "how far it is: counts, rate, time left, errors by kind",
    "results": "write the results that there are so far",
    "pause": "have it end what is under way, free the model's memory, and wait",
    "resume": "have it go on after pause, or take up a batch that was cancelled",
    "cancel": "end it: what is not done yet ends as cancelled",
}
_IN = "OpenAI's Batch JSONL; with --template also JSONL, CSV or Parquet, .gz too; - is standard input"


def add_arguments(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The sub-verbs' own parsers are given back."""
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    made = []
    for name, line in COMMANDS.items():
        sub = verbs.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.", allow_abbrev=False)
        made.append(sub)
        if name == "run":
            _add_run(sub)
            continue
        if name == "estimate":
            _add_estimate(sub)
            continue
        sub.add_argument("source", metavar="IN.jsonl", help="the batch's input")
        if name == "cost":
            batch_money.add_money(sub)
        if name == "results":
            sub.add_argument("-o", "--out", metavar="FILE", required=True, help="OUT.jsonl or OUT.parquet")
        if name == "status":
            sub.add_argument("--watch", action="store_true", help="again every two seconds, until it is done")
        if name != "results":
            add_json(sub)
        _add_journal(sub)
    return made


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help=_IN)
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="OUT.jsonl, OUT.parquet or -, written when all is done; errors go to OUT.errors.jsonl too, with what was "
        "tried",
    )
    _add_answering(parser)
    parser.add_argument("--engine", metavar="NAME", help="what runs it: local, endpoints (default: told by --model or "
                        "--endpoint), or ray, for --model on the nodes of a Ray cluster")  # fmt: skip
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="the cluster's head (default: RAY_ADDRESS, or the "
                        "cluster that this machine is a node of)")  # fmt: skip
    parser.add_argument("--minutes", type=minutes, metavar="N", help="stop after so long; the same command goes on")
    parser.add_argument("--patience", type=positive_number, default=600.0, metavar="S",
                        help="seconds to wait for a server that does not answer (default: 600)")  # fmt: skip
    parser.add_argument("--item-tries", type=positive, default=3, metavar="N",
                        help="sends of a request that times out or meets a server's fault (default: 3)")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="a line that is no request refuses the whole file")
    parser.add_argument("--retry-failed", action="store_true", help="ask again what had failed")
    parser.add_argument("--restart", action="store_true", help="forget what was done, and begin anew")
    _add_journal(parser)
    add_json(parser)
    add_table(parser)
    batch_money.add_money(parser)
    batch_money.add_check(parser)
    add_server(parser, "default: a probe finds them")
    add_harness(parser)


def _add_estimate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help=_IN)
    _add_answering(parser, ": its tokenizer counts, and the probe asks it")
    parser.add_argument("--probe", type=whole, default=0, metavar="N",
                        help="ask for N items, drawn at random, and measure; nothing is kept (default: 0)")  # fmt: skip
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of the draw (default: 0)")
    add_json(parser)
    add_table(parser, seed=False)
    batch_money.add_money(parser)
    add_server(parser)
    add_harness(parser)


def _add_answering(parser: argparse.ArgumentParser, of: str = "") -> None:
    said = f"a GGUF, a run folder or a packaged name{of}"
    parser.add_argument("--model", "-m", metavar="MODEL|ARTIFACT", help=said)
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        action="append",
        help="instead: an OpenAI-compatible server, up to /v1; LOWBIT_UPSTREAM_KEY is its key",
    )
    parser.add_argument("--endpoint-model", metavar="NAME", help="the model's name there, put into every request")


def _add_journal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--journal", metavar="DIR", help="what was done is kept there (default: IN.jsonl.lowbit-batch)")


def run(args: argparse.Namespace) -> int:
    if args.command == "run":
        return _run(args)
    if args.command in ("estimate", "cost"):
        return batch_money.run_estimate(args) if args.command == "estimate" else batch_money.run_cost(args)
    from lowbit import batch, console

    if args.command == "results":
        count = batch.write_results(args.source, args.out, journal=args.journal)
        console.log(f"Wrote {args.out}" + (f"; {count:,} errors" if count else ""))
        return 0
    if args.command == "status" and args.watch:
        return _watch(args)
    _show(getattr(batch, args.command)(args.source, journal=args.journal), args.json)
    return 0


def _run(args: argparse.Namespace) -> int:
    from lowbit import batch, console
    from lowbit.batch.options import BatchOptions
    from lowbit.errors import BadOption

    if args.out == args.json == "-":
        raise BadOption("results and status cannot both be standard output", expected="a file for one of the two")
    check = batch_money.check_of(args)
    if args.source == args.out == "-" and (check is not None or batch_money.wanted(args)):
        raise BadOption("costs and checks want a job that stays", expected="-o FILE, where IN is standard input")
    batch_money.machine_of(args)  # now, not when the work is done
    options = BatchOptions(
        slots=args.slots, harness=harness_options(args), tries=args.item_tries, minutes=args.minutes,
        patience=args.patience, strict=args.strict, restart=args.restart, retry_failed=args.retry_failed,
    )  # fmt: skip
    ran = batch.run(
        args.source, args.out, model=args.model, endpoint=args.endpoint, endpoint_model=args.endpoint_model,
        engine=args.engine, ray_address=args.ray_address, table=table_options(args), form=args.format, options=options,
        model_options=model_options(args), journal=args.journal,
    )  # fmt: skip
    from lowbit.batch.terminal import ended

    args.source, args.journal = ran.source, ran.folder  # standard input, too, is now a file
    for line in ended(ran):
        console.log(line)
    found = ran.status.as_json()
    if check is not None and ran.stop == "completed":
        batch.check(args.source, check, harness=options.harness, journal=args.journal)
    if batch_money.wanted(args):
        free = args.out != "-" and args.json != "-"
        found |= batch_money.show_cost(args, to=sys.stdout if free else sys.stderr)
    if args.json is not None:
        write_result(found, args.json)
    return ran.exit_code


def _show(status: Status, json_to: str | None) -> None:
    if json_to is not None:
        write_result(status.as_json(), json_to)
    if json_to != "-":
        from lowbit.batch.terminal import lines

        print("\n".join(lines(status)))


def _watch(args: argparse.Namespace) -> int:
    from lowbit import batch
    from lowbit.batch.terminal import watch

    def found() -> Any:
        return batch.status(args.source, journal=args.journal)

    status = watch(found)
    if args.json is not None:
        write_result(status.as_json(), args.json)
    return 0
