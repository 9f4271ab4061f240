"""The KV cache of `lowbit plan` against what llama.cpp allocates, to the byte.

    python benchmarks/plan_kv.py [--each N] [--seed N]

For every layout of tests/layouts.py (the layer patterns of released models, narrow, with random weights) the model is
loaded in llama.cpp and N contexts are made of it, with settings drawn at random: context, slots, unified or not,
swa-full, ubatch, types of keys and values, flash attention. What llama.cpp's memory breakdown says of each is compared
with plan's formula and with the load log's MiB; the compute buffers with those of the dry run. A few tokens are decoded
in each context. Ends with 1 where a byte differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from layouts import LAYOUTS, combinations, drafter
from lowbit.plan import PlanOptions, open_model, plan_open
from lowbit.plan.runtimes.llama_cpp import context_params
from random_gguf import Loaded, write_random

MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", metavar="N", type=int, default=30, help="settings a layout (default: 30)")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    args = parser.parse_args()
    n = wrong = 0
    print(f"{'layout':18} {'settings':>8} {'KV to the byte':>14} {'compute':>8}   smallest and largest cache")
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(LAYOUTS):
            found = compare(name, Path(folder) / str(i), args.each, args.seed + i)
            same, compute = sum(a == b for a, b, *_ in found), sum(c == d for _, _, c, d in found)
            sizes = sorted(a for a, *_ in found)
            print(f"{name:18} {len(found):8} {same:14} {compute:8}   {sizes[0]:,} to {sizes[-1]:,} bytes", flush=True)
            n, wrong = n + len(found), wrong + len(found) - same
        print(f"{n - wrong} of {n} equal to the byte; and {drafters(Path(folder))} drafters allocate no cache")
    return 1 if wrong else 0


def compare(name: str, folder: Path, each: int, seed: int) -> list[tuple[int, int, int, int]]:
    """For each setting planned and allocated bytes of the cache, planned and allocated bytes of compute buffers."""
    found = []
    path = write_random(LAYOUTS[name], folder)
    with open_model(path) as model, Loaded(path) as loaded:
        for settings in combinations(each, seed):
            options = PlanOptions(**settings)
            plan = plan_open(model, options)
            with loaded.context(context_params(model, options)) as context:
                kv, compute = loaded.allocated(context)
                assert loaded.decodes(context), settings
            assert abs(sum(loaded.logged) - kv / MIB) < 0.01 * len(loaded.logged), (loaded.logged, kv)
            assert all(row.found == "formula" for row in plan.rows if row.part == "kv"), settings
            buffer = next(row.bytes for row in plan.rows if row.what == "compute buffer")
            found.append((plan.bytes_of("kv"), kv, buffer, compute))
    path.unlink()
    return found


def drafters(folder: Path) -> int:
    """Drafters of the Gemma 4 layouts that have no cache, beside their targets."""
    n = 0
    for name in ("Gemma 4 E2B", "Gemma 4 12B", "Gemma 4 31B"):
        target = write_random(LAYOUTS[name], folder / "target")
        draft = write_random(drafter(LAYOUTS[name]), folder / "draft")
        settings = {"n_ctx": 2048, "n_seq_max": 2, "swa_full": False}
        with (
            Loaded(target) as first,
            Loaded(draft) as second,
            first.context(settings) as of,
            second.context(settings, of) as context,
        ):
            n += second.allocated(context)[0] == 0
    return n


if __name__ == "__main__":
    sys.exit(main())
