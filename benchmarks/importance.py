"""How much weighted error the scale search leaves against ggml's rounding under the same importance matrix.

    python benchmarks/importance.py MODEL IMATRIX [--tensors N] [--compare OTHER]

A row for each of N matrices and each of Q4_0, Q5_0 and Q8_0: the error weighted with the importance, of ggml under the
matrix and of the search, both as a share of ggml's without it; then millions of weights a second on one core, of both.
--compare shows instead how far another imatrix of the same model and text, such as llama-imatrix's, is from this one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from lowbit import ggml
from lowbit import grid as grids
from lowbit.checkpoint import open_checkpoint
from lowbit.pack import imatrix, scale_search
from lowbit.pack.imatrix import Imatrix


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("imatrix")
    parser.add_argument("--tensors", metavar="N", type=int, default=3, help="matrices to try (default: 3)")
    parser.add_argument("--compare", metavar="OTHER", help="another importance matrix")
    args = parser.parse_args()
    matrix = imatrix.read(args.imatrix)
    if args.compare:
        compare(matrix, imatrix.read(args.compare))
        return 0
    with open_checkpoint(args.model) as checkpoint:
        matrix.check_model(checkpoint)
        known = [s for s in checkpoint.specs.values() if len(s.shape) == 2 and s.gguf_name in matrix.entries]
        for place in np.linspace(0, len(known) - 1, min(len(known), args.tensors)):
            spec = known[int(place)]
            importance = matrix.importance_of(spec.gguf_name, spec.shape)
            assert importance is not None
            for name in ("q4_0", "q5_0", "q8_0"):
                measure(spec.gguf_name, name, checkpoint.read(spec.name), importance[0])
    return 0


def compare(ours: Imatrix, theirs: Imatrix) -> None:
    same = ours.entries.keys() & theirs.entries.keys()
    counts = all((ours.entries[n].counts == theirs.entries[n].counts).all() for n in same)
    pairs = [(ours.entries[n].sums, theirs.entries[n].sums) for n in same]
    of_one = max(float((abs(a - b) / np.maximum(b, np.finfo(np.float32).tiny)).max()) for a, b in pairs)
    of_all = max(float(abs(a - b).sum() / b.sum()) for a, b in pairs)
    print(f"{len(same)} of {len(ours.entries)} and {len(theirs.entries)} weights; counts equal: {counts}")
    print(f"largest relative difference of an input {of_one:.1e}, of a weight's inputs together {of_all:.1e}")


def measure(tensor: str, name: str, w: np.ndarray, importance: np.ndarray) -> None:
    grid = grids.get(name)
    kind = ggml.type_of(grid)

    def error(values: np.ndarray) -> float:
        return float((np.square(values - w) @ importance).sum())

    plain = grid.quantize(w)
    everywhere = np.ones(plain.codes.shape[:2], bool)
    theirs, slow = timed(lambda: grid.unpack(ggml.quantize(w, kind, importance)))
    ours, fast = timed(lambda: scale_search.search(w, importance, grid, plain, everywhere))
    shares = [error(grid.dequantize(blocks)) / error(grid.dequantize(plain)) for blocks in (theirs, ours)]
    speeds = [w.size / seconds / 1e6 for seconds in (slow, fast)]
    print(
        f"{tensor:32} {name}  error: ggml {shares[0]:.3f}, search {shares[1]:.3f} "
        f"({1 - shares[1] / shares[0]:.0%} less); million a second: ggml {speeds[0]:.1f}, search {speeds[1]:.1f}"
    )


def timed(call: Callable[[], grids.Blocks]) -> tuple[grids.Blocks, float]:
    begun = time.perf_counter()
    return call(), time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main())
