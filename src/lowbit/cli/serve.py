"""An OpenAI-compatible endpoint that makes a small model reliable: schema, tool calls, retries, guards, fallback."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.cli.model_flags import add_harness, add_server, harness_options, model_options

if TYPE_CHECKING:
    from lowbit.harness import Fallback


_OF_FALLBACKS = (
    "fallback_model", "fallback_price_in", "fallback_price_out", "fallback_prices", "spend_cap", "fallback_log",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="ARTIFACT|MODEL", nargs="?", help="a GGUF, a run folder or a packaged name")
    parser.add_argument("--upstream", metavar="URL", help="instead: an OpenAI-compatible server, up to /v1")
    parser.add_argument("--upstream-model", metavar="NAME", help="the model's name there, put into every request")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="default: 8080; 0 takes a free one")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="what callers must send; better in LOWBIT_API_KEY, where no list of processes shows it. "
        "LOWBIT_UPSTREAM_KEY is what is sent to the upstream",
    )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="the key is this file's one line")
    parser.add_argument("--cors-origin", metavar="ORIGIN", action="append", default=[],
                        help="web pages of this origin may ask (https://app.example; * is any)")  # fmt: skip
    parser.add_argument("--files", type=Path, metavar="DIR", default=Path("lowbit-files"), help="of what is uploaded "
                        "to /v1/files and done by /v1/batches (default: %(default)s)")  # fmt: skip
    parser.add_argument("--no-files", action="store_true", help="without /v1/files and /v1/batches")
    parser.add_argument("--log-bodies", action="store_true", help="show the bodies of requests on standard error")
    group = add_server(parser)
    group.add_argument("--no-ui", "--no-webui", action="store_true", help="without llama-server's web page at /")
    add_harness(parser)
    group = parser.add_argument_group("another model, asked when the tries are spent; off unless named")
    group.add_argument("--fallback", metavar="URL", help="an OpenAI-compatible server, up to /v1; its key comes from "
                       "LOWBIT_FALLBACK_KEY")  # fmt: skip
    group.add_argument("--fallback-model", metavar="NAME", help="the model's name there")
    group.add_argument("--fallback-price-in", type=float, metavar="USD", help="of a million prompt tokens")
    group.add_argument("--fallback-price-out", type=float, metavar="USD", help="of a million completion tokens")
    group.add_argument("--fallback-prices", metavar="FILE", help="instead: a dated file of prices, by the model's name")
    group.add_argument("--spend-cap", type=float, metavar="USD", help="what all fallbacks of the ledger may cost")
    group.add_argument("--spend-ledger", metavar="FILE", default="lowbit-spend.sqlite", help="default: %(default)s")
    group.add_argument("--fallback-log", metavar="FILE", help="a JSON line for each use, and why; no text")


def run(args: argparse.Namespace) -> int:
    from lowbit.serve import ServeOptions, serve

    options = ServeOptions(
        host=args.host,
        port=args.port,
        key=_key(args.api_key, args.api_key_file),
        upstream_key=os.environ.get("LOWBIT_UPSTREAM_KEY"),
        model=args.upstream_model,
        harness=harness_options(args),
        log_bodies=args.log_bodies,
        page=not args.no_ui,
        files=None if args.no_files else args.files,
        origins=tuple(args.cors_origin),
        fallbacks=_fallbacks(args),
    )
    serve(args.model, upstream=args.upstream, options=options, model_options=model_options(args))
    return 0


def _key(given: str | None, file: Path | None) -> str | None:
    from lowbit.serve.keys import key_in

    if given is not None and file is not None:
        from lowbit.errors import BadOption

        raise BadOption("the key is given twice", expected="--api-key or --api-key-file")
    return key_in(file) if file is not None else given or os.environ.get("LOWBIT_API_KEY") or None


def _fallbacks(args: argparse.Namespace) -> tuple[Fallback, ...]:
    from lowbit import console
    from lowbit.errors import BadOption
    from lowbit.harness import Fallback, HttpUpstream, Ledger, prices

    if args.fallback is None:
        given = [name for name in _OF_FALLBACKS if getattr(args, name) is not None]
        if given:
            raise BadOption(f"--{given[0].replace('_', '-')} without a fallback", expected="--fallback URL")
        return ()
    price, dated = prices.chosen(
        args.fallback_price_in, args.fallback_price_out, args.fallback_prices, args.fallback_model
    )
    if args.spend_cap is not None and price is None:
        raise BadOption(
            "a cap without a price", expected="--fallback-price-in and --fallback-price-out, or --fallback-prices"
        )
    if dated is not None:
        console.log(f"Prices of {args.fallback_model} as of {dated}")
    ledger = Ledger(args.spend_ledger, args.spend_cap) if args.spend_cap is not None else None
    upstream = HttpUpstream(args.fallback, key=os.environ.get("LOWBIT_FALLBACK_KEY"), model=args.fallback_model)
    return (Fallback(upstream, price=price, ledger=ledger, log=args.fallback_log),)
