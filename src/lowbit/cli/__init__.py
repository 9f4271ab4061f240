"""The ``lowbit`` command: finds the verb, parses, calls, prints. No verb's work is done here.

Only the chosen verb's file is imported, and a verb's file imports its machinery when it runs, so that ``--help``
answers at once. Exit codes: 0 done, 1 a fault of lowbit's own, 2 bad input or options, 3 the runtime failed, 130
interrupted, 141 the reader of the output left.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, cast

from lowbit import __version__, console, files, launch
from lowbit.errors import LowbitError

# verb -> its line in `lowbit --help`; the verb's arguments are in the file of the same name.
VERBS = {
    "ship": "train, pack, measure and report: one command to the artifact that ships",
    "train": "quantization-aware training by distillation, on the exact grid of the target format",
    "reference": "ask a model once, for trainings that learn from a file or from another process",
    "pack": "write a checkpoint as GGUF, MLX or compressed-tensors, with a certificate",
    "calibrate": "measure what each weight does to the output, for pack --calibration",
    "imatrix": "what matters to a model: an importance matrix, collected in llama.cpp",
    "inspect": "what is this file: architecture, tensors, types, bits per weight",
    "plan": "will it fit: weights, KV cache and scratch, before anything is loaded",
    "measure": "fidelity, speed and memory of packed files in llama.cpp, with intervals",
    "check": "does a release belong together: base, artifacts, tokenizer, template, drafter, projector",
    "serve": "an OpenAI-compatible endpoint that makes a small model reliable",
    "batch": "thousands of bounded jobs, durable and resumable",
    "report": "make a run folder's report again and print it",
    "chat": "talk to one artifact in the terminal, or to two side by side",
}

_JOURNALED = {
    "--kv",
    "--retrieval",
    "--speed-depths",
    "--slots",
    "--harness",
}  # what measure keeps beside its --json file
INTERRUPTED = 130
BROKEN_PIPE = 141


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line, in the form every other lowbit error has."""

    def error(self, message: str) -> NoReturn:
        one_line = " ".join(message.split())
        self.exit(2, f"lowbit: {one_line}. `{self.prog} --help` lists the options\n")


def build_parser(verb: str | None) -> Parser:
    """The parser with every verb's line, and the arguments of ``verb`` alone."""
    parser = Parser(
        prog="lowbit",
        description="Take an open-weight language model to the low-bit artifact that will ship, and prove it.",
        epilog="`lowbit VERB --help` explains a verb. Start with: lowbit ship smollm2-135m --minutes 3. "
        "Exit codes: 0 done, 1 a fault of lowbit's own, 2 bad input or options, 3 the runtime failed, 130 interrupted, "
        "141 the reader of the output left.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lowbit {__version__}")
    _add_global_options(parser, default=False)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    for name, line in VERBS.items():
        if name == verb:
            module = importlib.import_module(f"lowbit.cli.{name}")
            sub = verbs.add_parser(name, help=line, description=module.__doc__, allow_abbrev=False)
            inner = module.add_arguments(sub) or ()  # of a verb that has verbs of its own
            sub.set_defaults(run=module.run)
            # After the verb as well, where people type them; SUPPRESS keeps what stood before the verb.
            for each in (sub, *inner):
                _add_global_options(each, default=argparse.SUPPRESS)
        else:
            verbs.add_parser(name, help=line, add_help=False)
    return parser


def _add_global_options(parser: argparse.ArgumentParser, default: bool | str) -> None:
    group = parser.add_argument_group("on every verb")
    group.add_argument("--quiet", action="store_true", default=default, help="no progress and no log lines")
    group.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # No global option takes a value, so the first word without a dash is the verb.
    verb = next((word for word in words if not word.startswith("-")), None)
    debug = "--debug" in words
    try:
        status = _run(words, verb)
        sys.stdout.flush()  # here, where a reader that left is still an exception to catch
        return status
    except BrokenPipeError:
        _give_up_stdout()  # the reader (head, a pager) left
        return BROKEN_PIPE
    except KeyboardInterrupt:
        if debug:
            raise
        resumable = verb in ("ship", "train", "batch", "reference") or (verb == "pack" and "--verify" not in words)
        resumable |= verb == "measure" and "--json" in words and bool(_JOURNALED & set(words))
        return _fail("interrupted" + ("; the same command goes on from here" if resumable else ""), INTERRUPTED)
    except LowbitError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.strerror:
            _give_up_stdout()  # it may be what failed, as on a full disk
            return _fail(": ".join(str(part) for part in (error.filename, error.strerror) if part), 2)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(f"a fault of lowbit's own: {text}. Add --debug for the traceback", 1)


def _run(words: list[str], verb: str | None) -> int:
    try:
        args = build_parser(verb).parse_args(words)
    except SystemExit as stop:  # --help, --version, bad usage
        return stop.code if isinstance(stop.code, int) else 2
    console.set_quiet(args.quiet or launch.rank() > 0)
    if getattr(args, "json", None) not in (None, "-"):
        files.check_writable(args.json)  # now, not when hours of work are to be written there
    return cast(int, args.run(args))


def _give_up_stdout() -> None:
    """Sends what is still buffered nowhere, so that the interpreter's own flush at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _fail(message: str, code: int) -> int:
    if launch.speaks():
        print(f"lowbit: {message}", file=sys.stderr, flush=True)
    return code
