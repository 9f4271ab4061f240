"""Rows of a table as requests of a batch: the flags, and what they ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lowbit.cli.training import positive

if TYPE_CHECKING:
    from lowbit.batch.table import TableOptions


def add_table(parser: argparse.ArgumentParser, *, seed: bool = True) -> None:
    """seed: whether the answers have one; an estimate has a seed of its own."""
    group = parser.add_argument_group("rows of a table as requests")
    group.add_argument("--template", metavar="FILE|TEXT", help="what is asked of each row: Jinja, with its columns as "
                       "names, as in 'Good or bad? {{ text }}'")  # fmt: skip
    group.add_argument("--system", metavar="FILE|TEXT", help="the system message, likewise")
    group.add_argument("--schema", metavar="FILE|MODULE:MODEL", help="JSON Schema, or a Pydantic model, of the answers")
    group.add_argument("--id", metavar="COLUMN", help="whose values are the custom_ids (default: line-N)")
    group.add_argument("--format", choices=("jsonl", "csv", "parquet"), help="of IN, where its name does not tell")
    group.add_argument("--max-tokens", type=positive, metavar="N", help="of each answer")
    group.add_argument("--temperature", type=float, metavar="T", help="default: 0")
    if seed:
        group.add_argument("--seed", type=int, metavar="N", help="for temperatures above 0")


def table_options(args: argparse.Namespace) -> TableOptions | None:
    from lowbit.batch import prompts
    from lowbit.batch.table import TableOptions
    from lowbit.errors import BadOption

    if args.template is None:
        own = ["seed"] if args.command == "run" else []
        for name in ("system", "schema", "id", "max_tokens", "temperature", *own):
            if getattr(args, name) is not None:
                raise BadOption(f"--{name.replace('_', '-')} is for rows of a table", expected="--template with it",
                                hint="The requests of a Batch JSONL say it themselves")  # fmt: skip
        return None
    schema, name, check = (None, "answer", None) if args.schema is None else prompts.schema(args.schema)
    body = {"max_tokens": args.max_tokens, "temperature": args.temperature or 0.0}
    body["seed"] = args.seed if args.command == "run" else None
    return TableOptions(
        template=prompts.template(args.template),
        system=None if args.system is None else prompts.template(args.system, plain=True),
        id_column=args.id, schema=schema, schema_name=name, check=check,
        body={key: value for key, value in body.items() if value is not None},
    )  # fmt: skip
