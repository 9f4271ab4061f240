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
    group = parser.add_argument_group("several processes, where no torchrun or accelerate starts them")
    group.add_argument("--launcher", choices=("ray",), help="ray: Ray Train starts them on a Ray cluster")
    group.add_argument("--processes", type=training.positive, metavar="N", help="with --launcher: how many")
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="the cluster's head (default: RAY_ADDRESS, or the cluster that runs on this machine)",
    )


def run(args: argparse.Namespace) -> int:
    from lowbit.train import TrainOptions, train

    if args.launcher is not None or args.processes is not None or args.ray_address is not None:
        return _on_ray(args)
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


def _on_ray(args: argparse.Namespace) -> int:
    from lowbit.errors import BadOption
    from lowbit.train import TrainOptions
    from lowbit.train.ray_entry import train_on_ray

    if args.launcher is None or args.processes is None:
        raise BadOption("half of a launcher", expected="--launcher ray and --processes N")
    if args.drafter is not None:
        raise BadOption("a drafter is trained by one process", found=f"--launcher {args.launcher}")
    options = TrainOptions(**training.options(args))
    with output.results_only():
        train_on_ray(args.model, args.out, processes=args.processes, address=args.ray_address, options=options)
    print(args.out)
    return 0
