"""Quantization-aware training by distillation, to a checkpoint that `lowbit pack` writes without rounding again."""

from __future__ import annotations

import argparse

from lowbit import launch
from lowbit.cli import output, training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="smollm2-135m, gemma3-270m, a folder, a hub id or a GGUF")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="the checkpoint folder to write")
    parser.add_argument(
        "--drafter",
        metavar="D",
        help="train a drafter for MODEL, which is what ships: D, a model of its vocabulary, or layers:N of MODEL's own",
    )
    training.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from lowbit.train import TrainOptions, train

    if args.drafter is not None:
        from lowbit.train.drafter import train_drafter

        with output.results_only():
            train_drafter(args.model, args.drafter, args.out, options=TrainOptions(**training.options(args)))
        print(args.out)
        return 0
    with output.results_only():
        train(args.model, args.out, options=TrainOptions(**training.options(args)))
    if launch.rank() == 0:
        print(args.out)
    return 0
