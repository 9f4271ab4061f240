"""Talk to a packed file in llama.cpp, with the chat template it carries. An empty line or Ctrl-D ends the talk."""

from __future__ import annotations

import argparse
import sys

from lowbit.cli.training import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a GGUF")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--prompt", metavar="TEXT", help="ask once, print the answer and end")
    parser.add_argument("--context", type=positive, default=2048, metavar="N", help="tokens of context (default: 2048)")
    parser.add_argument("--max-tokens", type=positive, default=512, metavar="N", help="of one answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all it may use)")


def run(args: argparse.Namespace) -> int:
    from lowbit.run.llama_cpp import LlamaCpp

    messages = [{"role": "system", "content": args.system}] if args.system else []
    with LlamaCpp(args.file, context=args.context, threads=args.threads, logits_all=False) as model:
        while question := args.prompt if args.prompt is not None else _ask():
            messages.append({"role": "user", "content": question})
            answer = ""
            pieces = model.chat(messages, max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
            print(flush=True)
            messages.append({"role": "assistant", "content": answer})
            if args.prompt is not None:
                break
    return 0


def _ask() -> str:
    """One line from the user; empty at the end of the input. The prompt sign appears on a terminal only."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()
