"""Talk to an artifact, or to two side by side (the reference and what ships). An empty line or Ctrl-D ends the talk."""

from __future__ import annotations

import argparse

from lowbit.cli.training import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="a GGUF, a run folder, a packaged name, or the URL of a server")
    parser.add_argument("second", metavar="B", nargs="?", help="another, asked the same beside it")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--prompt", metavar="TEXT", help="ask once, print the answer and end")
    parser.add_argument("--context", type=positive, default=2048, metavar="N", help="tokens of context (default: 2048)")
    parser.add_argument("--max-tokens", type=positive, default=512, metavar="N", help="of one answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all it may use)")
    parser.add_argument("--without", metavar="LAYER", action="append", default=[], help="switch a harness layer off")


def run(args: argparse.Namespace) -> int:
    from lowbit.chat import ChatOptions, chat
    from lowbit.harness import HarnessOptions

    options = ChatOptions(
        system=args.system,
        context=args.context,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
        threads=args.threads,
        harness=HarnessOptions.without(args.without),
    )
    targets = [args.first] if args.second is None else [args.first, args.second]
    return 0 if chat(targets, prompt=args.prompt, options=options) else 3
