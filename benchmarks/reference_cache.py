"""How far the KLD from a reference cache is from the exact one, and what a cache takes.

    python benchmarks/reference_cache.py [--models NAME ...] [--chunks N] [--text FILE] [--threads N] [--folder DIR]

Of each model an F16 GGUF is the reference, cached; the artifacts are its Q8_0, its Q4_0 rounded to nearest with a
searched scale, and its Q4_0 as llama-quantize rounds it. Each is compared with the reference twice, exactly and from
the cache, on the same logits. "bound" is what the result states (error, 99.9%);
"certain" the bounds that hold whatever was drawn, in the mean, and how many rows were outside theirs (it must be none).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import lowbit
from lowbit import console
from lowbit.errors import LowbitError
from lowbit.measure import fidelity, reference_cache
from lowbit.measure.reference_cache import Header, ReferenceCache
from lowbit.measure.text import chunks_of, read_text
from lowbit.run.llama_cpp import LlamaCpp

CHUNK = 512
ARTIFACTS = ("q8_0", "q4_0", "naive")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", metavar="NAME", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--text", metavar="FILE", default=str(Path(__file__).parent / "texts" / "old-prose.txt"))
    parser.add_argument("--chunks", metavar="N", type=int, default=8, help="of 512 tokens (default: 8)")
    parser.add_argument("--threads", metavar="N", type=int, default=1)
    parser.add_argument("--artifacts", nargs="+", choices=ARTIFACTS, default=ARTIFACTS)
    parser.add_argument("--folder", metavar="DIR", help="where the packed files go and stay (default: a temporary one)")
    args = parser.parse_args()
    console.set_quiet(True)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            for model in args.models:
                compare(model, Path(args.folder or temporary), Path(temporary), args)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def packed(model: str, kind: str, folder: Path) -> Path:
    path = folder / f"{model}-{kind}.gguf"
    if not path.exists():
        recipe = "q4_0" if kind == "naive" else kind
        lowbit.pack(model, recipe, path, naive=kind == "naive", threads=1)  # type: ignore[operator]
    return path


def compare(model: str, folder: Path, scratch: Path, args: argparse.Namespace) -> None:
    options: dict[str, Any] = {"context": CHUNK, "ubatch": CHUNK, "threads": args.threads}
    with LlamaCpp(packed(model, "f16", folder), **options) as reference:
        bos = reference.bos if reference.adds_bos else None
        chunks = chunks_of(read_text(args.text, reference), chunk=CHUNK, limit=args.chunks, bos=bos)
        header = Header(
            reference={}, settings={}, text={}, n_vocab=reference.n_vocab, bos=bos, chunk=CHUNK, chunks=len(chunks)
        )
        path = scratch / f"{model}.cache"
        reference_cache.make(path, header, reference, chunks, threads=args.threads)
        with ReferenceCache(path) as cache:
            about = f"{len(chunks)} chunks, {len(chunks) * header.scored:,} scored tokens"
            print(f"\n{model}: vocabulary {header.n_vocab:,}, {about}, {cache.bytes_a_token:.1f} bytes a token")
            print(
                f"{'':8}{'exact KLD':>11}{'from cache':>12}{'difference':>12}{'bound':>10}{'certain':>20}{'outside':>9}"
            )
            for kind in args.artifacts:
                with LlamaCpp(packed(model, kind, folder), **options) as artifact:
                    _, (exact,) = fidelity.score(reference, [artifact], chunks, threads=args.threads)
                    _, kept = fidelity.score_kept(cache, artifact, len(chunks), threads=args.threads)
                show(kind, exact.kld, kept)


def show(kind: str, exact: np.ndarray, kept: fidelity.Scores) -> None:
    assert kept.kept is not None
    mean, low, high = exact.mean(), kept.kept.low, kept.kept.high
    outside = int(((exact < low) | (exact > high)).sum())
    print(
        f"{kind:8}{mean:11.6f}{kept.kld.mean():12.6f}{kept.kld.mean() - mean:+12.1e}{kept.kept.error_of_mean():10.1e}"
        f"{low.mean():10.4f} - {high.mean():.3f}{outside:9}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
