"""Are perplexity and KLD those that llama.cpp's own llama-perplexity prints, on the same chunks?

    python benchmarks/perplexity.py --llama-perplexity PATH [--models NAME ...] [--chunks N] [--text FILE] [--threads N]

Of each model an F16 GGUF is the reference and a Q4_0 (rounded as llama-quantize rounds) the artifact.
llama-perplexity runs twice, --save-all-logits and --kl-divergence; lowbit.measure once.

llama-perplexity keeps the reference's log probabilities in 16 bits, and leaves out of the KLD whatever has a
probability below exp(-16); kld_mean_llama_cpp of lowbit's result is summed so too, in full precision. "its coding" is
lowbit's logits put through that coding and that sum, written out in numpy here: where it agrees and the exact figure
does not, the difference is the file's. The line below says how far the two runtimes' logits are apart, from the 16-bit
file itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import llama_perplexity
import lowbit
from lowbit import console
from lowbit.errors import LowbitError
from lowbit.measure import MeasureOptions
from lowbit.measure.text import chunks_of, read_text
from lowbit.run.llama_cpp import LlamaCpp

CHUNK = 512


def main() -> int:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{llama_perplexity.BUILD}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    llama_perplexity.add_arguments(parser)
    args = parser.parse_args()
    llama_perplexity.check(parser, args)
    console.set_quiet(True)
    differ = 0
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(args.folder or temporary)
            for model in args.models:
                differ += compare(model, folder, Path(temporary) / "logits", args)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return int(differ > 0)


def compare(model: str, folder: Path, logits: Path, args: argparse.Namespace) -> int:
    """Prints the table of one model; how many figures are not equal to 4 significant digits."""
    reference = llama_perplexity.packed(model, "f16", folder)
    artifact = llama_perplexity.packed(model, "q4_0", folder)
    base = llama_perplexity.run(args, reference, "--save-all-logits", logits)
    theirs = llama_perplexity.run(args, artifact, "--kl-divergence", "--kl-divergence-base", logits)
    options = MeasureOptions(
        chunks=args.chunks, threads=args.threads, speed=False, memory=False, reference_runtime=args.reference_runtime
    )
    ours = lowbit.measure(artifact, against=reference, text=args.text, options=options)  # type: ignore[operator]
    coded, apart = through_16_bits(reference, artifact, logits, args)
    found = ours["artifacts"][0]["fidelity"]
    rows: list[tuple[str, float, float, float | None]] = [
        ("perplexity of the F16", base.number("PPL"), ours["reference"]["perplexity"]["value"], None),
        ("perplexity of the Q4_0", theirs.number(r"Mean PPL\(Q\)"), found["perplexity"]["value"], None),
        ("mean KLD, as it sums it", theirs.number("Mean    KLD"), found["kld_mean_llama_cpp"]["value"], None),
        ("mean KLD", theirs.number("Mean    KLD"), found["kld_mean"]["value"], coded["mean"]),
        ("median KLD", theirs.number("Median  KLD"), found["kld_median"]["value"], coded["median"]),
        ("99th percentile KLD", theirs.number("99.0%   KLD"), found["kld_p99"]["value"], coded["p99"]),
        ("top-1 agreement, %", theirs.number("Same top p"), 100 * found["top1"]["value"], None),
        ("RMS delta p, %", theirs.number("RMS Δp "), 100 * found["rms_delta_p"]["value"], None),
    ]
    tokens = found["tokens"]["value"]
    print(f"\n{model}, {ours['text']['chunks']} chunks of {CHUNK}, {tokens} scored tokens, {args.threads} thread(s)")
    print(f"{'':24}{'llama-perplexity':>18}{'lowbit':>14}{'difference':>13}{'its coding':>14}   4 digits")
    differ = 0
    for name, their, our, coding in rows:
        best = our if coding is None else coding
        equal = same_digits(their, our) or same_digits(their, best)
        differ += not equal
        said = "equal" if same_digits(their, our) else "equal by its coding" if equal else "DIFFERENT"
        print(f"{name:24}{their:18.6f}{our:14.6f}{our / their - 1:+13.1e}{best:14.6f}   {said}")
    print(f"reference's log probabilities, its file against lowbit: {apart}", flush=True)
    return differ


def same_digits(one: float, other: float) -> bool:
    """Equal to 4 significant digits: less than half a unit of the fourth apart."""
    return abs(one - other) <= 0.5 * 10.0 ** (np.floor(np.log10(abs(one))) - 3)


def through_16_bits(
    reference: Path, artifact: Path, logits: Path, args: argparse.Namespace
) -> tuple[dict[str, float], str]:
    """KLD of lowbit's own logits, coded and summed as llama-perplexity does; and how its file's differ from them."""
    klds: list[np.ndarray] = []
    largest, beyond, total = 0.0, 0, 0
    options: dict[str, Any] = {"context": CHUNK, "ubatch": CHUNK, "threads": args.threads}
    with (
        LlamaCpp(reference, **options) as p_model,
        LlamaCpp(artifact, **options) as q_model,
        open(logits, "rb") as file,
    ):
        bos = p_model.bos if p_model.adds_bos else None
        chunks = chunks_of(read_text(args.text, p_model), chunk=CHUNK, limit=args.chunks, bos=bos)
        scored, width = CHUNK // 2 - 1, 2 * ((p_model.n_vocab + 1) // 2) + 4
        file.seek(8 + 12 + 4 * chunks.size)
        for tokens in chunks:
            p = np.concatenate([rows for _, rows in p_model.logits(tokens, CHUNK // 2)])[:scored]
            q = np.concatenate([rows for _, rows in q_model.logits(tokens, CHUNK // 2)])[:scored]
            stored = np.frombuffer(file.read(2 * width * scored), "<u2").reshape(scored, width)
            for i in range(scored):
                steps, scale, least = coded(p[i])
                klds.append(summed(steps, scale, least, q[i]))
                its_scale, its_least = stored[i, :4].view("<f4")
                theirs = stored[i, 4 : 4 + p.shape[1]]
                mine, its = scale * steps + least, its_scale * theirs + its_least
                kept = (mine > -16) & (its > -16)
                away = np.abs(mine[kept] - its[kept])
                largest, total = max(largest, float(away.max())), total + kept.sum()
                beyond += int((away > 1.01 * its_scale).sum())
    values = np.array(klds, np.float32)
    figures = {"mean": float(values.mean(dtype=np.float64)), "median": float(np.median(values))}
    figures["p99"] = float(np.percentile(values, 99))
    return figures, f"at most {largest:.2g} nats apart, {beyond / total:.2%} by more than one of its steps"


def coded(logits: np.ndarray) -> tuple[np.ndarray, np.float32, np.float32]:
    """A row as --save-all-logits stores it: (steps, scale, least): a log probability is scale * steps + least."""
    largest = logits.max()
    smallest = max(logits.min(), largest - np.float32(16))
    log_sum = np.float32(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    scale = np.float32((largest - smallest) / np.float32(65535))
    above = np.maximum(logits - smallest, 0)
    return np.rint(above * (1 / scale)).astype(np.float32), scale, np.float32(smallest - largest - log_sum)


def summed(steps: np.ndarray, scale: np.float32, least: np.float32, q: np.ndarray) -> float:
    """KLD as --kl-divergence sums it: over what the coding puts above -16."""
    log_p = scale * steps + least
    log_sum = q.max() + np.float32(np.log(np.exp(q - q.max()).sum(dtype=np.float64)))
    kept = log_p > -16
    return float((np.exp(log_p[kept]) * (log_p[kept] - q[kept] + log_sum)).sum(dtype=np.float64))


if __name__ == "__main__":
    sys.exit(main())
