"""The flags of ``lowbit batch`` about money and trust: what the machine costs, hosted prices, a check, an estimate."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.output import results_only, write_result
from lowbit.cli.training import positive, whole
from lowbit.errors import BadOption

if TYPE_CHECKING:
    from lowbit.batch.agreement import Agreement
    from lowbit.batch.checking import CheckOptions
    from lowbit.batch.costs import Cost, Machine
    from lowbit.harness import Price

_OF_CHECK = (
    "check_model", "check_endpoint", "check_endpoint_model", "check_slots", "check_price_in", "check_price_out",
    "check_spend_cap",
)  # fmt: skip


def add_money(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("money: the machine against hosted models")
    group.add_argument("--machine-price", type=float, metavar="USD", help="of an hour of this machine")
    group.add_argument("--machine-cost", type=float, metavar="USD", help="what it cost to buy, for the break-even")
    group.add_argument("--watts", type=float, metavar="W", help="what it draws at work, at the wall (default: what "
                       "the processor's counters say, where they can be read)")  # fmt: skip
    group.add_argument("--kwh-price", type=float, metavar="USD", help="of a kilowatt-hour")
    group.add_argument("--prices", type=Path, metavar="FILE", help="a dated file of hosted prices (default: the one "
                       "that comes with lowbit; copy and edit it)")  # fmt: skip
    group.add_argument("--hosted", metavar="NAME", action="append", default=[], help="a model of that file to compare "
                       "with (default: all)")  # fmt: skip
    group.add_argument("--html", type=Path, metavar="FILE", help="write a page with the plot of cost against volume")


def add_check(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quality: the same of a stronger model, for some items, when all are done")
    group.add_argument("--check", type=positive, metavar="N", help="items, drawn at random")
    group.add_argument("--check-model", metavar="MODEL|ARTIFACT", help="the stronger model, served here for it")
    group.add_argument("--check-endpoint", metavar="URL", help="or an OpenAI-compatible server, up to /v1, to which "
                       "the items that were drawn are sent; LOWBIT_CHECK_KEY is its key")  # fmt: skip
    group.add_argument("--check-endpoint-model", metavar="NAME", help="the model's name there")
    group.add_argument("--check-slots", type=positive, metavar="N", help="requests to it at once (default: 4)")
    group.add_argument("--check-seed", type=whole, default=0, metavar="N", help="of the draw (default: 0)")
    group.add_argument("--check-price-in", type=float, metavar="USD", help="of a million prompt tokens there (default: "
                       "that of --check-endpoint-model in the file of prices, where it is)")  # fmt: skip
    group.add_argument("--check-price-out", type=float, metavar="USD", help="of a million completion tokens")
    group.add_argument("--check-spend-cap", type=float, metavar="USD", help="what all checks of the ledger may cost")
    group.add_argument("--check-ledger", type=Path, metavar="FILE", default=Path("lowbit-spend.sqlite"),
                       help="default: %(default)s")  # fmt: skip


def machine_of(args: argparse.Namespace) -> Machine:
    from lowbit.batch.costs import Machine

    return Machine(price=args.machine_price, bought=args.machine_cost, watts=args.watts, kwh_price=args.kwh_price)


def check_of(args: argparse.Namespace) -> CheckOptions | None:
    """Raises BadOption where flags of a check stand without one."""
    if args.check is None:
        if given := [name for name in _OF_CHECK if getattr(args, name) is not None]:
            raise BadOption(f"--{given[0].replace('_', '-')} without a check", expected="--check N")
        return None
    from lowbit.batch.checking import CheckOptions

    return CheckOptions(
        n=args.check,
        seed=args.check_seed,
        model=args.check_model,
        endpoint=args.check_endpoint,
        endpoint_model=args.check_endpoint_model,
        key=os.environ.get("LOWBIT_CHECK_KEY"),
        slots=args.check_slots,
        price=_price(args),
        cap=args.check_spend_cap,
        ledger=args.check_ledger,
    )


def _price(args: argparse.Namespace) -> Price | None:
    from lowbit.harness import prices

    given = prices.chosen(args.check_price_in, args.check_price_out, None, None)[0]
    if given is not None or args.check_endpoint_model is None:
        return given
    known = prices.PriceFile.read(args.prices or prices.bundled()).models
    return known.get(args.check_endpoint_model)


def wanted(args: argparse.Namespace) -> bool:
    """Whether a run is to end with what it cost."""
    said = (args.machine_price, args.machine_cost, args.watts, args.kwh_price, args.prices, args.html, args.check)
    return any(value is not None for value in said) or bool(args.hosted)


def show_cost(args: argparse.Namespace, *, to: Any = None) -> dict[str, Any]:
    """What a batch cost, and its last check, in the terminal and as a page; the same for JSON. to: a stream instead of
    standard output, None where nothing is to be printed on it."""
    from lowbit import batch
    from lowbit.measure import record

    cost, agreement = batch.cost(
        args.source, machine_of(args), prices=args.prices, hosted=args.hosted, journal=args.journal
    )
    machine = record.machine()
    if to is not None:
        _print(cost, agreement, machine, to)
    if args.html is not None:
        from lowbit.report import batch_page

        batch_page.write(args.html, Path(args.source).name, cost, agreement, machine)
    return _as_json(cost, machine) | {"agreement": agreement.as_json() if agreement else None}


def _as_json(cost: Cost, machine: dict[str, Any]) -> dict[str, Any]:
    from lowbit.batch.break_even import break_even

    return {"cost": cost.as_json(), "break_even": [found.as_json() for found in break_even(cost)], "machine": machine}


def _print(cost: Cost, agreement: Agreement | None, machine: dict[str, Any], to: Any) -> None:
    from lowbit.cli import cost_table

    cost_table.show(cost, to, f"{machine['cpu']}, {machine['cores']} cores")
    if agreement is not None:
        cost_table.show_agreement(agreement, to)


def run_cost(args: argparse.Namespace) -> int:
    found = show_cost(args, to=None if args.json == "-" else sys.stdout)
    if args.json is not None:
        write_result(found, args.json)
    return 0


def run_estimate(args: argparse.Namespace) -> int:
    from lowbit import batch
    from lowbit.batch.costs import cost
    from lowbit.batch.options import BatchOptions
    from lowbit.cli import cost_table
    from lowbit.cli.model_flags import harness_options, model_options
    from lowbit.cli.table_flags import table_options
    from lowbit.harness.prices import PriceFile, bundled
    from lowbit.measure import record

    prices, machine = PriceFile.read(args.prices or bundled()), machine_of(args)
    options = BatchOptions(slots=args.slots, harness=harness_options(args))
    with results_only():
        found = batch.estimate(
            args.source, model=args.model, endpoint=args.endpoint, endpoint_model=args.endpoint_model,
            probe=args.probe, seed=args.seed, table=table_options(args), form=args.format, options=options,
            model_options=model_options(args),
        )  # fmt: skip
        work, here = found.work(), record.machine()
        costs = None if work is None else cost(work, machine, prices, args.hosted)
        if args.html is not None:
            if costs is None:
                raise BadOption(
                    "a page wants a probe", expected="--probe N", hint="Without one there is no time to plot"
                )
            from lowbit.report import batch_page

            batch_page.write(args.html, f"Estimate of {Path(args.source).name}", costs, None, here)
    if args.json != "-":
        cost_table.show_estimate(found, costs, prices, sys.stdout, f"{here['cpu']}, {here['cores']} cores")
    if args.json is not None:
        more = {"machine": here} if costs is None else _as_json(costs, here)
        write_result({"estimate": found.as_json()} | more, args.json)
    return 0
