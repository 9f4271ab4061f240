"""Standard output belongs to results: JSON goes there or to a file, and nothing else gets in between."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON to FILE; - is standard output")


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """While the block runs, whatever writes to standard output, C libraries included, writes to standard error."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # no standard output at all
        yield
        return
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def write_result(value: Any, where: str) -> None:
    """JSON to the file ``where``, or to standard output if ``where`` is ``-``."""
    if where == "-":
        print(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        from lowbit.files import write_json

        write_json(Path(where), value)
