"""The training options, spelled once for ``ship`` and ``train``."""

from __future__ import annotations

import argparse
from typing import Any

NAMES = ("minutes", "steps", "recipe", "data", "seed", "threads", "start", "train", "activations")
# Left to TrainOptions where they are not given, so that a default is written once and --help needs no torch.
FINER = (
    "targets", "learning_rate", "scale_rate", "warmup_steps", "batch_size", "accumulate", "sequence_length", "clip",
    "precision", "kv", "kv_share", "reference",
)  # fmt: skip


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


def whole(text: str) -> int:
    """argparse type: a whole number from 0 up."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number from 0 up")
    return int(text)


def positive_number(text: str) -> float:
    """argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a number above 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--minutes",
        type=minutes,
        metavar="N",
        default=10.0,
        help="the dial: sampling, calibration and training together; packing and measuring come on top (default: 10)",
    )
    group.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="end distillation after N optimizer steps, however long they take (default: by --minutes)",
    )
    group.add_argument(
        "--recipe",
        "--grid",
        metavar="NAME[,NAME]",
        default="q4_0",
        help="the type of the trained matrices (default: q4_0); several train one checkpoint for several files",
    )
    group.add_argument(
        "--data",
        metavar="SOURCE",
        help="a text file, JSONL (text or messages), Parquet, or a datasets id; default: sampled from the model itself",
    )
    group.add_argument(
        "--reference",
        metavar="FILE|URL",
        help="what to learn from: a file of `lowbit reference`, which holds the data too, or the URL where one answers "
        "(default: the model itself, asked before it is trained)",
    )
    group.add_argument("--seed", type=whole, default=0, metavar="N", help="of sampling and training (default: 0)")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all it may use)")
    group.add_argument(
        "--start",
        choices=("nearest", "calibrated"),
        default="calibrated",
        help="what distillation starts from: plain rounding, or calibrated rounding (default)",
    )
    group.add_argument(
        "--train",
        choices=("full", "scales", "both"),
        default="full",
        help="what distillation moves: every weight (default), the scales only, or both",
    )
    group.add_argument(
        "--kv",
        metavar="TYPE",
        help="train for a quantized KV cache of llama.cpp: q4_0, q8_0, ..., or K:V (default: no rounding)",
    )
    group.add_argument(
        "--activations",
        choices=("float", "static", "runtime"),
        default="float",
        help="static: int8 activations and cache on trained scales, as phones run the mobile recipes; runtime: rounded "
        "before products, as llama.cpp does (default: float)",
    )
    finer = parser.add_argument_group("training, finer", "the defaults suit a model of some hundred million weights")
    finer.add_argument("--targets", metavar="T", help="hidden (exact probabilities, the default), topk:K or compact")
    finer.add_argument(
        "--learning-rate",
        type=positive_number,
        metavar="X",
        help="peak (default: 1e-4, for scales 5e-5)",
    )
    finer.add_argument(
        "--scale-rate",
        type=positive_number,
        metavar="X",
        help="peak of scales, in parts of their magnitude a step (default with --train both: 1e-4 of rows, else 3e-5)",
    )
    finer.add_argument("--warmup-steps", type=whole, metavar="N", help="linear warm-up (default: 8)")
    finer.add_argument("--batch-size", type=positive, metavar="N", help="sequences a forward pass (default: 2)")
    finer.add_argument("--accumulate", type=positive, metavar="N", help="forward passes an optimizer step (default: 1)")
    finer.add_argument("--sequence-length", type=positive, metavar="N", help="tokens a sequence (default: 512)")
    finer.add_argument("--clip", type=positive_number, metavar="X", help="largest gradient norm (default: 1)")
    finer.add_argument(
        "--kv-share",
        type=positive_number,
        metavar="X",
        help="with --kv, the part of a batch's sequences that is read through that cache (default: 1)",
    )
    finer.add_argument("--precision", choices=("auto", "float32", "bfloat16"), help="of the products (default: auto)")


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The chosen options by the names the library gives them."""
    finer = {name: getattr(args, name) for name in FINER if getattr(args, name) is not None}
    return {name: getattr(args, name) for name in NAMES} | finer
