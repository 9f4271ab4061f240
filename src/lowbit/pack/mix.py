"""A mix under a budget: the type of each tensor that costs the output least, all together within so many bytes.

What a type costs a tensor is measured: some of its rows are rounded to it as packing will, and their errors weighed by
the calibration, in nats a token. Tensors are taken to add up. The choice is a multiple-choice knapsack (Sinha and
Zoltners 1979), solved exactly by dynamic programming over bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from lowbit import console
from lowbit import grid as grids
from lowbit import recipe as recipes
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.errors import BadOption
from lowbit.pack.calibration import Calibration, n_matrices
from lowbit.pack.rows import file_rows
from lowbit.threads import in_order
from lowbit.units import format_bytes

TYPES = ("q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "f16")
_HEAD = ("q4_k", "q5_k", "q6_k", "q8_0", "f16")  # llama-quantize never goes lower with it
_SAMPLED_WEIGHTS = 1 << 18  # of a tensor, rounded to each type
_SAMPLED_EXPERTS = 8  # of a layer
_UNITS = 1 << 21  # of the budget: with more, sizes are rounded up to a part of it


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One type that a tensor may have. cost: nats a token."""

    type: str
    n_bytes: int
    cost: float


@dataclass(frozen=True, kw_only=True)
class Mix:
    """``choices``: by tensor name, what was tried of it; ``types``: what was chosen."""

    types: dict[str, str]
    choices: dict[str, tuple[Choice, ...]]
    name: str = "mix"

    def table(self) -> list[dict[str, object]]:
        """A row a tensor: name, type, bytes, cost, and the cost of each type tried."""
        rows = []
        for name, choices in self.choices.items():
            chosen = next(choice for choice in choices if choice.type == self.types[name])
            rows.append({
                "name": name, "type": chosen.type, "bytes": chosen.n_bytes, "cost": chosen.cost,
                "tried": {choice.type: choice.cost for choice in choices},
            })  # fmt: skip
        return rows


def choose(
    checkpoint: Checkpoint, calibration: Calibration, room: int, *, threads: int, types: Sequence[str] = TYPES
) -> Mix:
    """The mix whose tensors take at most ``room`` bytes. Raises BadOption where no choice of types is that small.

    What every recipe leaves in floats (vectors, routers) stays so, and a matrix that the calibration does not know
    (per-layer embeddings) gets Q6_K, or Q8_0 where its rows are not blocks of 256.
    """
    fixed: dict[str, str] = {}
    asked: dict[str, list[str]] = {}
    usual = recipes.get("q6_k").assign(checkpoint)
    for spec in checkpoint.specs.values():
        if grids.get(usual[spec.name]).block_size == 1 or not calibration.knows(spec.name):
            fixed[spec.name] = usual[spec.name]
        else:
            allowed = [t for t in types if t in _HEAD] if spec.name == calibration.head else types
            asked[spec.name] = list(dict.fromkeys(_for_row(t, spec.shape[-1]) for t in allowed))
    room -= sum(_n_bytes(checkpoint.specs[name], type_) for name, type_ in fixed.items())
    choices: dict[str, list[Choice]] = {}
    jobs = (functools.partial(_measured, checkpoint, calibration, checkpoint.specs[n], asked[n]) for n in asked)
    with threadpool_limits(1, "blas"), console.progress("Measuring", len(asked), "tensors") as bar:
        for name, found in zip(asked, in_order(jobs, threads), strict=True):
            choices[name] = found
            bar.advance(1)
    least = sum(min(choice.n_bytes for choice in each) for each in choices.values())
    if least > room:
        fixed_bytes = sum(_n_bytes(checkpoint.specs[name], type_) for name, type_ in fixed.items())
        raise BadOption(
            "no mix of types is so small", found=f"room for {format_bytes(room + fixed_bytes)}",
            expected=f"at least {format_bytes(least + fixed_bytes)} ({', '.join(types)})",
        )  # fmt: skip
    picked = solve([[(c.n_bytes, c.cost) for c in each] for each in choices.values()], room)
    chosen = {name: each[i].type for (name, each), i in zip(choices.items(), picked, strict=True)}
    named = {name: fixed.get(name) or chosen[name] for name in checkpoint.specs}
    return Mix(types=named, choices={name: tuple(each) for name, each in choices.items()})


def solve(items: Sequence[Sequence[tuple[int, float]]], room: int) -> list[int]:
    """One option (size, cost) of each item with the least sum of costs, sizes at most ``room`` together.

    Returns the options' indices. Exact where the sizes beyond each item's least have a common divisor that goes at most
    2^21 times into the room; else exact for sizes rounded up to the 2^21st part of it. Raises ValueError if none fits.
    """
    least = [min(size for size, _ in item) for item in items]
    room = min(room, sum(max(size for size, _ in item) for item in items)) - sum(least)  # more is of no use
    if room < 0:
        raise ValueError("no choice fits")
    extra = [[size - low for size, _ in item] for item, low in zip(items, least, strict=True)]
    unit = math.gcd(*(size for item in extra for size in item)) or 1
    unit = max(unit, -(-room // _UNITS))
    capacity = room // unit
    best = np.zeros(capacity + 1)  # least cost of the items so far within each room
    taken = np.zeros((len(items), capacity + 1), np.uint8)
    for i, item in enumerate(items):
        so_far = np.full(capacity + 1, np.inf)
        for k, (_, cost) in enumerate(item):
            size = -(-extra[i][k] // unit)
            if size > capacity:
                continue
            with_it = best[: capacity + 1 - size] + cost
            better = with_it < so_far[size:]
            so_far[size:][better] = with_it[better]
            taken[i, size:][better] = k
        best = so_far
    picked, left = [0] * len(items), capacity
    for i in reversed(range(len(items))):
        picked[i] = int(taken[i, left])
        left -= -(-extra[i][picked[i]] // unit)
    return picked


def _measured(checkpoint: Checkpoint, calibration: Calibration, spec: TensorSpec, types: Sequence[str]) -> list[Choice]:
    """What each type costs a tensor, from some of its rows; of the head from all, for its rows differ much in use."""
    rows, n = spec.n_rows, spec.shape[-1]
    if n_matrices(spec) > 1:
        costs = _of_experts(checkpoint, calibration, spec, types)
    else:
        costs, looked_at = np.zeros(len(types)), 0
        for start, stop in _parts(rows, n) if spec.name == calibration.head else [_sample(rows, n)]:
            index = np.concatenate([np.arange(a, b) for a, b in zip(start, stop, strict=True)])
            values = np.concatenate([file_rows(checkpoint, spec, a, b) for a, b in zip(start, stop, strict=True)])
            # The calibration has Hugging Face's order of rows, the values the file's.
            order = spec.gguf_rows()
            index = index if order is None else order[index]
            costs += calibration.costs(spec.name, index, _errors(calibration, spec.name, values, types))
            looked_at += len(index)
        costs *= rows / looked_at
    return [Choice(type=t, n_bytes=_n_bytes(spec, t), cost=float(c)) for t, c in zip(types, costs, strict=True)]


def _of_experts(checkpoint: Checkpoint, calibration: Calibration, spec: TensorSpec, types: Sequence[str]) -> np.ndarray:
    """The costs of a layer's experts together, from some rows of some experts: of eight spread over the order of their
    use, the most used among them, each standing for as much use as there is. Experts differ in it by orders of
    magnitude, and in what a type costs for the same use by little."""
    experts, height, n = spec.shape
    use = calibration.use(spec.name)
    order = np.argsort(use, kind="stable")
    chosen = order[np.linspace(0, experts - 1, min(experts, _SAMPLED_EXPERTS)).round().astype(int)]
    costs, seen = np.zeros(len(types)), 0.0
    for expert in chosen.tolist():
        start, stop = _sample(height, n, _SAMPLED_WEIGHTS // len(chosen))
        index = np.concatenate([np.arange(a, b) for a, b in zip(start, stop, strict=True)])
        first = expert * height
        values = np.concatenate(
            [file_rows(checkpoint, spec, first + a, first + b) for a, b in zip(start, stop, strict=True)]
        )
        errors = _errors(calibration, spec.name, values, types, expert)
        costs += calibration.costs(spec.name, index, errors, expert) * (height / len(index))
        seen += use[expert]
    return costs * (use.sum() / seen) if seen else costs


def _errors(
    calibration: Calibration, name: str, values: np.ndarray, types: Sequence[str], matrix: int = 0
) -> list[np.ndarray]:
    """What rounding to each type leaves of rows: float32 (rows, n) each."""
    errors = []
    for grid in map(grids.get, types):
        raw = calibration.rounded(name, values, grid, matrix)
        errors.append(values - grid.dequantize(grid.unpack(raw)).reshape(values.shape))
    return errors


def _sample(rows: int, n: int, weights: int = _SAMPLED_WEIGHTS) -> tuple[list[int], list[int]]:
    """Starts and ends of eight ranges of rows, about ``weights`` in all, spread evenly, or of all rows."""
    wanted = max(8, weights // n) // 8 * 8
    if rows <= wanted:
        return [0], [rows]
    starts = np.linspace(0, rows - wanted // 8, 8).astype(int).tolist()
    return starts, [start + wanted // 8 for start in starts]


def _parts(rows: int, n: int) -> Iterator[tuple[list[int], list[int]]]:
    """All rows, some at a time."""
    step = max(1, (1 << 22) // n)
    return (([start], [min(rows, start + step)]) for start in range(0, rows, step))


def _for_row(type_: str, n: int) -> str:
    return recipes.FALLBACK.get(type_, type_) if n % grids.get(type_).block_size else type_


def _n_bytes(spec: TensorSpec, type_: str) -> int:
    n_bytes = spec.n_rows * grids.get(type_).row_bytes(spec.shape[-1])
    return -(-n_bytes // 32) * 32  # GGUF aligns every tensor
