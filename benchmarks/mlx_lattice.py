"""What MLX loses of a quantization-aware checkpoint: converted by its own rule, and with the lattice's codes kept.

    python benchmarks/mlx_lattice.py [--model MODEL] [--rule absmax/7] [--chunks N] [--chunk N] [--text FILE]

The model's matrices are put on a 4-bit lattice (groups of 32, BF16 scales, values rounded to BF16), as training under
simulated 4 bit leaves them. That checkpoint is packed as MLX by mx.quantize's rule in groups of 64 and 32, and by
lattice recovery. Printed of each: bits per weight, blocks proved bit-exact, and mean KLD and top-1 agreement with the
unquantized checkpoint, all in MLX in float32 on the second half of each chunk of text, with 95% intervals.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

import lowbit
from lowbit import console
from lowbit.checkpoint import Checkpoint, Tensor, open_checkpoint, write_checkpoint
from lowbit.measure import fidelity
from lowbit.measure.bootstrap import Bootstrap
from lowbit.pack.lattice import round_to
from lowbit.run.mlx import Mlx

GROUP = 32
DIVISORS = {"extremum/-8": -8.0, "absmax/7": 7.0, "absmax/7.5": 7.5}
ARTIFACTS = (("mlx_affine4_g64", True), ("mlx_affine4_g32", True), ("mlx_affine4_g32", False))  # recipe, naive


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rule", choices=DIVISORS, default="absmax/7")
    parser.add_argument("--chunks", metavar="N", type=int, default=8)
    parser.add_argument("--chunk", metavar="N", type=int, default=128, help="tokens a chunk (default: 128)")
    parser.add_argument("--text", type=Path, default=Path(__file__).parent / "texts" / "old-prose.txt")
    args = parser.parse_args()
    console.set_quiet(True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with open_checkpoint(args.model) as source:
            write_checkpoint(work / "qat", source, on_lattice(source, DIVISORS[args.rule]))
        lowbit.pack(work / "qat", "f32", work / "reference", to="mlx")
        packed = [
            lowbit.pack(work / "qat", recipe, work / f"{recipe}-{naive}", naive=naive, certificate=True)
            for recipe, naive in ARTIFACTS
        ]
        models = [
            Mlx(path, context=args.chunk, dtype="float32") for path in (work / "reference", *(p.path for p in packed))
        ]
        tokens = np.array(models[0].tokenize(args.text.read_text("utf-8"), add_special=False), np.int32)
        chunks = tokens[: args.chunks * args.chunk].reshape(args.chunks, args.chunk)
        _, scores = fidelity.score(models[0], models[1:], chunks)
        bits = [lowbit.inspect(result.path)["bits_per_weight"] for result in packed]
    print(f"{args.model} on {args.rule}, {scores[0].kld.size:,} tokens of {args.text.name}")
    print(f"{'':24}{'bits':>6}{'exact':>9}   mean KLD, nats               top-1")
    for (recipe, naive), result, size, found in zip(ARTIFACTS, packed, bits, scores, strict=True):
        assert result.certificate is not None
        totals = result.certificate.totals
        figures = fidelity.figures(found, Bootstrap(*found.kld.shape))
        kld, top = figures["kld_mean"], figures["top1"]
        name = recipe + (" naive" if naive else "")
        print(
            f"{name:24}{size:6.2f}{totals['exact'] / totals['blocks']:9.2%}"
            f"   {kld.value:.2e} [{kld.low:.2e}, {kld.high:.2e}]   {top.value:.4f} [{top.low:.4f}, {top.high:.4f}]"
        )
    return 0


def on_lattice(source: Checkpoint, divisor: float) -> Iterator[Tensor]:
    """Every tensor in BF16, matrices as code times a BF16 scale a group."""
    for name in source.names:
        values = source.read(name)
        if values.ndim == 2:
            groups = values.reshape(len(values), -1, GROUP)
            extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
            scales = round_to((extreme if divisor < 0 else np.abs(extreme)) / np.float32(divisor), "BF16")
            with np.errstate(divide="ignore", invalid="ignore"):
                codes = np.clip(np.nan_to_num(np.rint(groups / scales)), -8, 7)
            values = (codes * scales).reshape(values.shape)
        yield Tensor(name=name, values=round_to(values.astype(np.float32), "BF16"))


if __name__ == "__main__":
    sys.exit(main())
