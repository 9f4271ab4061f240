"""Whether learned scales pay, and what serving two formats with one set of weights costs, matrix by matrix.

    lowbit calibrate MODEL -o FILE
    python benchmarks/learned_scales.py MODEL --calibration FILE [--rows N] [--steps N]

For some matrices of the model the loss is tr(E H E^T), E the error of the values on the grid and H the second moments
of what flows in, weighted by the gradient (to second order the KLD, see ``lowbit.train.importance``). Weights start
where ``lowbit train`` starts them and are trained by Adam through the fake quantizer, a cosine to zero. Printed for
each format: the loss after training weights alone over the loss at the start; that of weights and scales over that of
weights alone; for each pair of formats the loss of each where weights take turns over that where it has them alone, of
as many steps in all. Geometric means over the matrices, with 95% bootstrap intervals.

A proxy: one matrix at a time, and no model around it. It takes minutes where runs of the model take hours.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch

from lowbit import grid as grids
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.grid.base import Grid
from lowbit.measure.record import machine
from lowbit.train import frame_search
from lowbit.train.fake_quant import FakeQuantizer

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
FORMATS = ("q4_0", "mlx_affine4_g64", "q4_k", "channelwise4", "channelwise2")
PAIRS = (("q4_0", "mlx_affine4_g64"), ("q4_0", "channelwise4"))
DAMPING = 0.01
RATE = 1e-3  # of a weight's step, in parts of the matrix's standard deviation
ROW_RATE, BLOCK_RATE = 1e-4, 3e-5  # of a scale's, in parts of itself, as ``lowbit train --train both`` has them


@dataclass(frozen=True)
class Matrix:
    name: str
    weight: torch.Tensor  # (rows, n) float32
    moments: torch.Tensor  # (n, n) float32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--calibration", metavar="FILE", required=True, type=Path)
    parser.add_argument("--layers", metavar="N", type=int, default=4, help="layers, evenly spaced (default: 4)")
    parser.add_argument("--rows", metavar="N", type=int, default=96, help="of each matrix (default: 96)")
    parser.add_argument("--steps", metavar="N", type=int, default=120)
    args = parser.parse_args()
    torch.manual_seed(0)
    try:
        matrices = read(args)
        print(f"{len(matrices)} matrices of {args.model}, {args.rows} rows each, {args.steps} steps; {machine()}")
        for name in FORMATS:
            one_format(grids.get(name), matrices, args.steps)
        for pair in PAIRS:
            two_formats([grids.get(name) for name in pair], matrices, args.steps)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def read(args: argparse.Namespace) -> list[Matrix]:
    found = []
    with open_checkpoint(args.model) as checkpoint, safetensors.safe_open(args.calibration, "pt") as stored:
        n_layers = checkpoint.config["num_hidden_layers"]
        for layer, kind in itertools.product(np.linspace(0, n_layers - 1, args.layers).astype(int), KINDS):
            name = f"model.layers.{layer}.{kind}.weight"
            rows = checkpoint.specs[name].n_rows
            start = (rows - args.rows) // 2
            weight = torch.from_numpy(checkpoint.read_rows(name, start, start + args.rows))
            moments = stored.get_tensor(f"{name}.inputs")
            moments.diagonal().add_(DAMPING * moments.diagonal().mean())
            found.append(Matrix(name, weight, moments))
    return found


def fitting(matrices: list[Matrix], *formats: Grid) -> list[Matrix]:
    return [m for m in matrices if all(m.weight.shape[1] % grid.block_size == 0 for grid in formats)]


def one_format(grid: Grid, matrices: list[Matrix], steps: int) -> None:
    matrices = fitting(matrices, grid)
    starts, full, both = [], [], []
    for matrix in matrices:
        frame, moved = frame_search.compensated(matrix.weight, matrix.moments, grid, DAMPING)
        starts.append(loss_of(matrix, FakeQuantizer(grid, moved, frame)(moved)))
        full.append(trained(matrix, moved, [FakeQuantizer(grid, moved, frame, "full")], steps)[0])
        both.append(trained(matrix, moved, [FakeQuantizer(grid, moved, frame, "both")], steps)[0])
    print(
        f"{grid.name:16} weights alone x {ratio(full, starts)} of the start; scales learned too x {ratio(both, full)}"
    )
    sys.stdout.flush()


def two_formats(pair: list[Grid], matrices: list[Matrix], steps: int) -> None:
    matrices = fitting(matrices, *pair)
    alone: list[list[float]] = [[], []]
    shared: list[list[float]] = [[], []]
    for matrix in matrices:
        for which, grid in enumerate(pair):
            frame, moved = frame_search.compensated(matrix.weight, matrix.moments, grid, DAMPING)
            alone[which] += trained(matrix, moved, [FakeQuantizer(grid, moved, frame)], steps)
        counts = matrix.moments.diagonal().contiguous()
        each = [FakeQuantizer(g, matrix.weight, frame_search.search(matrix.weight, counts, g)) for g in pair]
        for which, value in enumerate(trained(matrix, matrix.weight, each, steps)):
            shared[which].append(value)
    costs = "; ".join(f"{g.name} x {ratio(s, a)}" for g, s, a in zip(pair, shared, alone, strict=True))
    print(f"{pair[0].name} and {pair[1].name} from one set of weights: {costs} of each alone")
    sys.stdout.flush()


def trained(matrix: Matrix, start: torch.Tensor, quantizers: list[FakeQuantizer], steps: int) -> list[float]:
    """The loss of each quantizer's format after ``steps`` steps, which they take in turns."""
    weight = torch.nn.Parameter(start.clone())
    rate = RATE * float(matrix.weight.std())
    groups = [{"params": [weight], "lr": rate}]
    for quantizer in quantizers:
        part = ROW_RATE if quantizer.grid.whole_rows else BLOCK_RATE
        groups += [{"params": [p], "lr": part * float(p.detach().abs().mean())} for p in quantizer.learned]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * min(1, i / steps))))
    for step in range(steps):
        values = quantizers[step % len(quantizers)](weight)
        error = values - matrix.weight
        loss = (error @ matrix.moments * error).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return [loss_of(matrix, quantizer(weight)) for quantizer in quantizers]


def loss_of(matrix: Matrix, values: torch.Tensor) -> float:
    error = values.detach() - matrix.weight
    return float((error @ matrix.moments * error).sum())


def ratio(new: list[float], old: list[float]) -> str:
    """Geometric mean of paired ratios, and its interval."""
    logs = np.log(np.array(new) / np.array(old))
    draws = np.random.default_rng(0).integers(0, len(logs), (4000, len(logs)))
    low, high = np.quantile(np.exp(logs[draws].mean(1)), [0.025, 0.975])
    return f"{math.exp(logs.mean()):.3f} [{low:.3f}, {high:.3f}] (n = {len(logs)})"


if __name__ == "__main__":
    sys.exit(main())
