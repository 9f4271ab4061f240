"""How many blocks lattice recovery certifies on checkpoints made on each grid that training may use, and how fast.

    python benchmarks/lattice.py [--rows N] [--seed N]

A table for each dtype of the checkpoint: rules times scale dtypes times group sizes, normal weights in rows of 1,024.
A cell is the share of blocks proved exact and, after a plus, of those within the float16 scale's own rounding.
'naive' is what ggml's rule, as llama-quantize applies it, keeps exactly. Then weights a second on one core: recovery on
a lattice, off any, and the check of a packed file.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from lowbit import grid as grids
from lowbit.pack import lattice

N = 1024
DTYPES = ("BF16", "F16", "F32")
RULES = {"extremum/-8": -8.0, "absmax/7": 7.0, "absmax/7.5": 7.5, "free scales": None}
GROUPS = (32, 64, 128, 256, N)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", metavar="N", type=int, default=512, help="rows of 1,024 a cell (default: 512)")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    print(f"{platform.machine()}, numpy {np.__version__}, {args.rows * N // 32:,} blocks a cell")
    for dtype in DTYPES:
        show(rng, args.rows, dtype)
    show_speed(rng, args.rows)
    return 0


def show(rng: np.random.Generator, rows: int, dtype: str) -> None:
    grid = grids.get("q4_0")
    heads = [("row" if group == N else str(group)) for group in GROUPS]
    print(f"\n{dtype} checkpoint{'':<22}" + "".join(f"{head:>17}" for head in heads))
    for rule in RULES:
        for scales in DTYPES:
            cells, naive = [], []
            for group in GROUPS:
                values = synthesise(rng, rows, rule, scales, group, dtype)
                status = lattice.recover(values, dtype, grid)[1]
                exact, within = ((status == s).mean() for s in (lattice.EXACT, lattice.WITHIN_SCALE_ROUNDING))
                cells.append(percent(exact) + (f"+{percent(within)}" if within else ""))
                naive.append(percent((lattice.judge(values, grid.quantize(values), dtype) == lattice.EXACT).mean()))
            print(f"{rule:12} {scales.lower():4} scales  {'':10}" + "".join(f"{cell:>17}" for cell in cells))
            print(f"{'':26}naive   " + "".join(f"{cell:>17}" for cell in naive))
    sys.stdout.flush()


def show_speed(rng: np.random.Generator, rows: int) -> None:
    print("\nmillion weights a second, the best of three on one core")
    grid = grids.get("q4_0")
    for dtype in DTYPES:
        cases = {rule: synthesise(rng, rows, rule, "BF16", 32, dtype) for rule in RULES}
        cases["no lattice"] = lattice.round_to(rng.standard_normal((rows, N), dtype=np.float32), dtype)
        for name, values in cases.items():
            blocks = lattice.recover(values, dtype, grid)[0]
            recovery = speed(values, lambda v=values, d=dtype: lattice.recover(v, d, grid))
            proof = speed(values, lambda v=values, b=blocks, d=dtype: lattice.judge(v, b, d))
            print(f"{dtype:5} {name:12} recover {recovery:6.1f}   judge {proof:6.1f}")


def speed(values: np.ndarray, work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return values.size / min(seconds) / 1e6


def synthesise(rng: np.random.Generator, rows: int, rule: str, scales: str, group: int, dtype: str) -> np.ndarray:
    """(rows, N) float32: normal weights on the lattice (see ``on_lattice``)."""
    x = rng.standard_normal((rows, N), dtype=np.float32) * np.float32(0.02)
    return on_lattice(x, rule, scales, group, dtype, rng)


def on_lattice(
    x: np.ndarray, rule: str, scales: str, group: int, dtype: str, rng: np.random.Generator | None = None
) -> np.ndarray:
    """``x`` (rows, n) float32 on the lattice of ``rule``; the scale rounded to ``scales``, the product to ``dtype``.

    rng: draws the scales of the rule 'free scales'.
    """
    shape, x = x.shape, x.reshape(len(x), -1, group)
    extreme = np.take_along_axis(x, abs(x).argmax(-1)[..., None], -1)
    divisor = RULES[rule]
    if divisor is None:
        assert rng is not None
        divisor = rng.uniform(5.5, 9.5, extreme.shape)
    step = (extreme if rule == "extremum/-8" else abs(extreme)) / divisor
    step = lattice.round_to(step.astype(np.float32), scales)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(step == 0, 0, np.clip(np.rint(x / step), -8, 7)).astype(np.float32)
    return lattice.round_to((codes * step).reshape(shape), dtype)


def percent(share: float) -> str:
    return "100%" if share == 1 else f"{min(99.99, 100 * share):.2f}%" if share else "0%"


if __name__ == "__main__":
    sys.exit(main())
