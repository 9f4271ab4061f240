"""The training options, spelled once for ``ship`` and ``train``."""

from __future__ import annotations

import argparse
from typing import Any

NAMES = ("minutes", "steps", "recipe", "data", "seed", "threads", "start", "train")


def minutes(text: str) -> float:
    """argparse type: a positive number of minutes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a number of minutes above 0")
    return value


def positive(text: str) -> int:
    """argparse type: a whole number from 1 up."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number from 1 up")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--minutes",
        type=minutes,
        metavar="N",
        default=10.0,
        help="the dial: sampling, calibration and training together (default: 10)",
    )
    group.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="end distillation after N optimizer steps, however long they take (default: by --minutes)",
    )
    group.add_argument("--recipe", default="q4_0", help="which tensor goes on which grid (default: q4_0)")
    group.add_argument(
        "--data",
        metavar="SOURCE",
        help="a text file, JSONL (text or messages), Parquet, or a datasets id; default: sampled from the model itself",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling and training (default: 0)")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all cores)")
    group.add_argument(
        "--start",
        choices=("nearest", "calibrated"),
        default="calibrated",
        help="what distillation starts from: plain rounding, or calibrated rounding (default)",
    )
    group.add_argument(
        "--train",
        choices=("full", "scales"),
        default="full",
        help="what distillation moves: every weight (default), or the scales only",
    )


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The chosen options by the names the library gives them."""
    return {name: getattr(args, name) for name in NAMES}
