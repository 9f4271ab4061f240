"""Top-1 agreement and KLD of a QAT checkpoint's Q4_0 files with the checkpoint itself, in llama.cpp.

    python benchmarks/qat_top1.py [--model NAME ...] [--rule RULE ...] [--chunks N] [--perplexity PATH] [--work DIR]

Of a packaged model's weights this makes checkpoints as quantization-aware training leaves them: every matrix but the
embedding on a 4-bit grid of groups of 32 with BF16 scales, the products rounded to BF16, saved as a BF16 folder. It is
packed twice: 'naive' as llama-quantize does it, 'recovered' as `lowbit pack` does. The embedding stays BF16 in both, so
that the matrices alone differ; 'shipped' is `lowbit pack`'s own q4_0 recipe, whose head is Q6_K or Q8_0.

llama.cpp's CPU kernels multiply Q4_0 by activations rounded to 8 bits, and BF16 by activations rounded to BF16, so that
files of the very same weights already differ. Hence three measurements, on benchmarks/texts:

  kernels  the files as they are, against the checkpoint as BF16, in the installed llama.cpp
  weights  the same files' weights as F32, so that no activation is rounded, against the checkpoint as F32; with it
           the floor: the checkpoint's own BF16 file against that reference, and the recovered file rounded to BF16
           (which is that file). 'simulated' is code x scale in float32, before the checkpoint rounds it to BF16.
  blas     (--perplexity: a llama-perplexity built with -DGGML_BLAS=ON) the files as they are, in a build of llama.cpp
           that dequantizes a matrix and multiplies in float32 where a batch is of 32 tokens or more
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

import lowbit
from fidelity import interval
from lattice import RULES, on_lattice
from lowbit import console, files
from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.checkpoint.gguf_file import GgufFile, write_header
from lowbit.checkpoint.model import METADATA
from lowbit.checkpoint.safetensors_file import write_files
from lowbit.errors import LowbitError
from lowbit.measure import MeasureOptions
from lowbit.recipe import Recipe

TEXTS = tuple(sorted((Path(__file__).parent / "texts").glob("*.txt")))
FIGURES = ("top1", "kld_mean")


@dataclass(frozen=True, kw_only=True)
class WithHead(Recipe):
    """A recipe whose embedding, which is the head of both models here, is on a grid of its own."""

    head: str

    def assign_specs(self, tensors: Any) -> dict[str, str]:
        tensors = tuple(tensors)
        assigned = super().assign_specs(tensors)
        return assigned | {t.name: self.head for t in tensors if t.role in ("embedding", "output")}


Q4_0 = WithHead(name="q4_0", weights="q4_0", head="bf16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rules = [rule for rule, divisor in RULES.items() if divisor is not None]
    parser.add_argument("--model", metavar="NAME", action="append", help="smollm2-135m (default), gemma3-270m; again")
    parser.add_argument("--rule", choices=rules, action="append", help="default: all three")
    parser.add_argument("--chunks", metavar="N", type=int, help="chunks of 512 tokens of each text (default: all)")
    parser.add_argument("--blas-chunks", metavar="N", type=int, help="the same for --perplexity (default: all)")
    parser.add_argument("--threads", metavar="N", type=int, default=1)
    parser.add_argument("--perplexity", metavar="PATH", type=Path, help="a llama-perplexity with the BLAS backend")
    parser.add_argument("--only-blas", action="store_true", help="leave out what the installed llama.cpp measures")
    parser.add_argument("--work", metavar="DIR", type=Path, help="where the files go and stay (default: a temporary)")
    args = parser.parse_args()
    console.set_quiet(True)
    try:
        for model in args.model or ["smollm2-135m"]:
            for rule in args.rule or rules:
                with tempfile.TemporaryDirectory(prefix="lowbit-top1-") as folder:
                    place = (args.work or Path(folder)) / f"{model}-{rule.replace('/', '')}"
                    run(model, rule, place, args)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def run(model: str, rule: str, place: Path, args: argparse.Namespace) -> None:
    print(f"\n{model}, {rule}, BF16 scales, groups of 32")
    made = make(model, rule, place)
    if not args.only_blas:
        measure("kernels", made, "bf16", ("naive", "recovered", "shipped"), args)
        measure("weights", made, "f32", ("bf16", "recovered-bf16", "naive-f32", "recovered-f32", "simulated"), args)
    if args.perplexity is not None:
        for text in TEXTS:
            blas(made, text, args)


def make(model: str, rule: str, place: Path) -> dict[str, Path]:
    """The checkpoint and every file of it, by name; says what of it lattice recovery proved."""
    place.mkdir(parents=True, exist_ok=True)
    checkpoint = place / "checkpoint"
    with open_checkpoint(model) as source:
        write_qat_checkpoint(source, rule, "BF16", checkpoint)
        write_qat_checkpoint(source, rule, "F32", place / "simulated")
    made = {
        name: place / f"{name}.gguf"
        for name in (
            "bf16",
            "f32",
            "simulated",
            "naive",
            "recovered",
            "shipped",
            "naive-f32",
            "recovered-f32",
            "recovered-bf16",
        )
    }
    lowbit.pack(place / "simulated", "f32", made["simulated"])
    lowbit.pack(checkpoint, "bf16", made["bf16"])
    lowbit.pack(checkpoint, "f32", made["f32"])
    lowbit.pack(checkpoint, Q4_0, made["naive"], naive=True)
    packed = lowbit.pack(checkpoint, Q4_0, made["recovered"], certificate=True)
    lowbit.pack(checkpoint, "q4_0", made["shipped"])
    for name, recipe in (("naive-f32", "f32"), ("recovered-f32", "f32"), ("recovered-bf16", "bf16")):
        lowbit.pack(made[name.partition("-")[0]], recipe, made[name])
    assert packed.certificate is not None
    for name, proved in (("recovered", packed.certificate), ("naive", lowbit.pack.verify(made["naive"], checkpoint))):
        matrices = [t for t in proved.tensors if t.type == "q4_0"]
        exact, blocks = (sum(getattr(t, key) for t in matrices) for key in ("exact", "blocks"))
        print(f"  {name:14} {exact:,} of {blocks:,} Q4_0 blocks exact ({100 * exact / blocks:.2f}%)")
    for name, other, whose in (("recovered-bf16", "bf16", "checkpoint"), ("recovered-f32", "simulated", "training")):
        different = count_different(made[name], made[other])
        print(f"  {name:14} {different:,} of {packed.n_weights:,} weights are not the {whose}'s", flush=True)
    return made


def write_qat_checkpoint(source: Checkpoint, rule: str, dtype: str, folder: Path) -> None:
    """``source`` with its matrices, but for the embedding, on the grid of ``rule``, the products rounded to ``dtype``;
    everything else is BF16 in either."""
    bf16, grid = grids.get("bf16"), grids.get(dtype.lower())
    trained = {name for name, grid in Q4_0.assign(source).items() if grid == "q4_0"}

    def fill(writers: Mapping[str, Any]) -> None:
        for name in source.names:
            values = source.read(name)
            rows = bf16.dequantize(bf16.quantize(values.reshape(-1, values.shape[-1])))
            if name in trained:
                rows = on_lattice(values, rule, "BF16", 32, dtype)
            stored = grid.pack(grid.quantize(rows)).view("<u2" if dtype == "BF16" else "<f4")
            writers["model"].add(name, stored.reshape(values.shape), dtype)

    folder.mkdir(parents=True, exist_ok=True)
    write_files({"model": folder / "model.safetensors"}, source.names, fill)
    files.write_json(folder / "config.json", source.config)
    with files.replacing(folder / METADATA) as partial, open(partial, "wb") as handle:
        write_header(handle, source.gguf_metadata() or [], [])


def count_different(a: Path, b: Path) -> int:
    """Weights of which two files of the same types hold different bits, but for the sign of a zero: no code has one."""
    one, other = GgufFile(a), GgufFile(b)
    different = 0
    for name, entry in one.entries.items():
        assert (entry.dtype, entry.shape) == (other.entries[name].dtype, other.entries[name].shape)
        word = np.dtype("<u4" if entry.dtype == "F32" else "<u2")
        sign = word.type(1 << 8 * word.itemsize - 1)
        bits = [np.where(raw == sign, 0, raw) for raw in (one.raw(name).view(word), other.raw(name).view(word))]
        different += int((bits[0] != bits[1]).sum())
    return different


def measure(
    label: str, made: Mapping[str, Path], against: str, names: tuple[str, ...], args: argparse.Namespace
) -> None:
    options = MeasureOptions(chunks=args.chunks, threads=args.threads, speed=False, memory=False)
    for text in TEXTS:
        found = lowbit.measure([made[name] for name in names], against=made[against], text=text, options=options)
        print(f"  {label}, against {against}, {text.stem}, {found['text']['chunks']} chunks")
        for name, entry in zip(names, found["artifacts"], strict=True):
            fidelity = entry["fidelity"]
            figures = "  ".join(f"{figure} {interval(fidelity[figure])}" for figure in FIGURES)
            print(f"    {name:14} {figures}  n {fidelity['tokens']['value']}", flush=True)


def blas(made: Mapping[str, Path], text: Path, args: argparse.Namespace) -> None:
    """llama-perplexity's own figures, with its standard errors."""
    print(f"  blas, against bf16, {text.stem}")
    with tempfile.TemporaryDirectory(prefix="lowbit-top1-") as folder:
        base = Path(folder) / "base.kld"
        words = ["-f", text, "-c", 512, "-b", 512, "-t", args.threads, "-fa", "off", "--no-repack"]
        words += ["--chunks", args.blas_chunks] if args.blas_chunks else []
        perplexity(args.perplexity, made["bf16"], [*words, "--kl-divergence-base", base])
        for name in ("naive", "recovered", "shipped", "recovered-bf16"):
            out = perplexity(args.perplexity, made[name], [*words, "--kl-divergence-base", base, "--kl-divergence"])
            top = re.search(r"Same top p:\s*([\d.]+) ± ([\d.]+)", out)
            kld = re.search(r"Mean\s+KLD:\s*(-?[\d.]+) ±\s*([\d.]+)", out)
            if top is None or kld is None:
                raise LowbitError("no figures in the output", where=args.perplexity, found=out[-300:])
            print(f"    {name:14} top1 {top[1]}% ± {top[2]}  kld_mean {kld[1]} ± {kld[2]}", flush=True)


def perplexity(program: Path, model: Path, words: list[Any]) -> str:
    command = [str(word) for word in (program, "-m", model, *words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LowbitError("llama-perplexity failed", where=program, found=done.stderr[-300:])
    return done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
