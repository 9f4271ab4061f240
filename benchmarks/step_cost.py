"""What fake quantization costs: a training step of a prepared model over the same step unprepared, in pairs.

    python benchmarks/step_cost.py [MODEL] [--pairs N] [--batch-size N] [--sequence-length N] [--precision P]

Two copies of the model, the same tokens, loss (KL to the same targets), clipping and fused AdamW; one is prepared for
Q4_0. Steps alternate, and which of the two goes first alternates too, so that a busy neighbour hits both. Prints the
median of the paired ratios with its 95% bootstrap interval.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

import lowbit.train
from lowbit import recipe as recipes
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.errors import LowbitError
from lowbit.train import precision
from lowbit.train.pipeline import choose_parameters

RECIPE = "q4_0"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default="smollm2-135m")
    parser.add_argument("--pairs", metavar="N", type=int, default=15)
    parser.add_argument("--batch-size", metavar="N", type=int, default=lowbit.train.TrainOptions().batch_size)
    parser.add_argument("--sequence-length", metavar="N", type=int, default=512)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    args = parser.parse_args()
    try:
        with open_checkpoint(args.model) as checkpoint:
            measure(checkpoint, args)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def measure(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    plain = lowbit.train.load(checkpoint)
    dtype = precision.choose(args.precision, torch.device("cpu"), plain.config.hidden_size)
    shape = (args.batch_size, args.sequence_length)
    tokens = torch.randint(0, plain.config.vocab_size, shape)
    head = plain.get_output_embeddings().weight.detach().to(dtype)
    with torch.no_grad(), precision.autocast(tokens.device, dtype):
        hidden = plain.model(tokens, use_cache=False).last_hidden_state.float().flatten(0, 1)
    targets = lowbit.train.HiddenTargets(hidden + 0.05 * torch.randn_like(hidden), head)

    names = recipes.get(RECIPE).trained(checkpoint)
    prepared = lowbit.train.prepare(lowbit.train.load(checkpoint), RECIPE)
    choose_parameters(prepared, "full", names)
    trained = set(names)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trained or parameter.ndim == 1)
    steps = [stepper(model, tokens, head, targets, dtype) for model in (plain, prepared)]

    print(
        f"{checkpoint.name}, {shape[0]} x {shape[1]} tokens, products in {str(dtype).removeprefix('torch.')},"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
    )
    for step in steps:  # memory is allocated, the optimizer's state made
        step()
        step()
    seconds = np.empty((args.pairs, 2))
    for pair in range(args.pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            begin = time.perf_counter()
            steps[which]()
            seconds[pair, which] = time.perf_counter() - begin
    ratio = seconds[:, 1] / seconds[:, 0]
    resampled = np.random.default_rng(0).choice(ratio, (2000, len(ratio)))
    low, high = np.quantile(np.median(resampled, axis=1), (0.025, 0.975))
    print(f"unprepared step: median {np.median(seconds[:, 0]):.3f} s; prepared: {np.median(seconds[:, 1]):.3f} s")
    print(f"prepared / unprepared: median {np.median(ratio):.3f} [{low:.3f}, {high:.3f}] of {len(ratio)} pairs")


def stepper(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    head: torch.Tensor,
    targets: lowbit.train.HiddenTargets,
    dtype: torch.dtype,
) -> Callable[[], None]:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)

    def step() -> None:
        with precision.autocast(tokens.device, dtype):
            hidden = model.model(tokens, use_cache=False).last_hidden_state
        loss = lowbit.train.distillation_loss(hidden.flatten(0, 1).float(), head, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    sys.exit(main())
