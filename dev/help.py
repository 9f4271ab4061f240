"""Writes docs/help.md from the real ``--help`` of every verb: ``python dev/help.py`` (``-`` prints instead)."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"

from lowbit.cli import VERBS, main

PAGE = Path(__file__).parent.parent / "docs" / "help.md"


def help_of(words: list[str]) -> str:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        main([*words, "--help"])
    return stream.getvalue().strip()


def commands(verb: str) -> tuple[str, ...]:
    """Of a verb that has verbs of its own."""
    return tuple(getattr(importlib.import_module(f"lowbit.cli.{verb}"), "COMMANDS", ()))


def render() -> str:
    parts = ["# The command line", "Made by `python dev/help.py` from the program's own `--help`; do not edit."]
    for words in ([], *(words for verb in VERBS for words in ([verb], *([verb, inner] for inner in commands(verb))))):
        title = " ".join(["lowbit", *words])
        parts += [f"## {title}", f"```\n{help_of(words)}\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["-"]:
        sys.stdout.write(render())
    else:
        PAGE.write_text(render(), encoding="utf-8")
