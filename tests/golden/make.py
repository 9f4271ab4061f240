"""Makes the golden blocks: inputs.npy and, for every grid, what the library that executes it stores for them.

    python tests/golden/make.py          writes the files beside this one
    python tests/golden/make.py --check  says whether they are what it would write

inputs.npy: (len(KINDS) * ROWS, 256) float32; <grid>.npy: the same rows as bytes (see libraries.py). The inputs are
stored as well, so that a generator of random numbers may change.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from libraries import stored

from lowbit import grid
from lowbit.checkpoint import open_checkpoint

HERE = Path(__file__).parent
ROWS, WIDTH = 4, 256
KINDS = ("normal", "ties", "zero", "subnormal", "tiny", "huge", "past_f16", "halves", "bits", "real")


def inputs() -> np.ndarray:
    """ROWS rows of every kind, in the order of KINDS."""
    rng = np.random.default_rng(20261123)
    shape = (ROWS, WIDTH)
    normal = rng.standard_normal(shape, dtype=np.float32)
    sign = rng.choice(np.array([-1, 1], np.float32), shape)
    zero = np.zeros(shape, np.float32)
    zero[1] = -0.0
    zero[2, ::3] = -0.0
    zero[3, 40] = -1e-3  # one block of eight is not zero
    bits = rng.integers(0, 1 << 32, shape, dtype=np.uint64).astype(np.uint32).view(np.float32)
    made = {
        "normal": normal * np.float32(0.02),
        "ties": rng.integers(-3, 4, shape).astype(np.float32) * np.float32(0.37),  # extremes of both signs
        "zero": zero,
        "subnormal": rng.integers(0, 1 << 23, shape, dtype=np.uint32).view(np.float32) * sign,
        "tiny": normal * np.exp2(rng.uniform(-149, -100, (ROWS, 1))).astype(np.float32),  # where 1/d overflows
        "huge": np.clip(normal.astype(np.float64) * 1e38, -3.4e38, 3.4e38).astype(np.float32),
        "past_f16": np.power(10, rng.uniform(3, 8, shape)).astype(np.float32) * sign,  # scales round to Inf
        "halves": rng.integers(-254, 255, shape).astype(np.float32) * np.float32(0.5),  # codes between two values
        "bits": np.where(np.isfinite(bits), bits, np.float32(1)),
        "real": _real(),
    }
    return np.concatenate([made[kind] for kind in KINDS])


def _real() -> np.ndarray:
    """Weights of SmolLM2-135M (Apache-2.0), from the start of matrices of four kinds."""
    layer = "model.layers.11"
    names = (f"{layer}.self_attn.v_proj.weight", f"{layer}.mlp.down_proj.weight", "model.embed_tokens.weight")
    with open_checkpoint("smollm2-135m") as checkpoint:
        rows = [checkpoint.read(name)[7, :WIDTH] for name in names]
        return np.stack([*rows, checkpoint.read(f"{layer}.input_layernorm.weight")[:WIDTH]])


def main() -> int:
    x = inputs()
    files = {"inputs": x} | {name: stored(name, x) for name in grid.names()}
    stale = []
    for name, values in files.items():
        path = HERE / f"{name}.npy"
        if "--check" not in sys.argv:
            np.save(path, values)
        elif not path.exists() or np.load(path).tobytes() != values.tobytes():
            stale.append(path.name)
    if stale:
        print("not what the libraries make now:", ", ".join(stale))
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
