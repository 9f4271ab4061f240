"""Measure packed artifacts in the runtime that will run them, against a reference, on a text neither has seen.

``lowbit.measure(artifacts, against=..., text=...)``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import console, files, verbs
from lowbit.errors import BadFile, BadOption
from lowbit.measure import fidelity
from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.record import Figure, machine
from lowbit.measure.speed import probe
from lowbit.measure.text import Text, chunks_of, read_text
from lowbit.run.llama_cpp import LlamaCpp
from lowbit.units import bits_per_weight


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How to measure.

    chunk:         tokens a chunk; the second half of each is scored
    chunks:        how many chunks of the text; None means all
    threads:       None means the physical cores this process may use
    kv_type:       KV cache of the artifacts; the reference's is always f16
    speed:         measure tokens per second
    memory:        measure peak memory
    repeats:       how often the speed run is repeated, at least 2
    prompt_tokens, generate_tokens: its lengths; the prompt is at most a chunk
    resamples, seed: of the bootstrap
    """

    chunk: int = 512
    chunks: int | None = None
    threads: int | None = None
    kv_type: str = "f16"
    speed: bool = True
    memory: bool = True
    repeats: int = 3
    prompt_tokens: int = 256
    generate_tokens: int = 32
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"chunk": 4, "chunks": 1, "threads": 1, "repeats": 2, "prompt_tokens": 1, "generate_tokens": 1}
        for name, smallest in {**least, "resamples": 100}.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise BadOption(f"impossible {name}", found=value, expected=f"at least {smallest}")


def measure(
    artifacts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    against: str | os.PathLike[str],
    text: str | os.PathLike[str],
    json: str | os.PathLike[str] | None = None,
    options: MeasureOptions | None = None,
) -> dict[str, Any]:
    """Fidelity, size, memory and speed of GGUF files against a reference, all run in llama.cpp.

    artifacts: one path or several
    against:   the reference: a GGUF file, which is run as it is (F32, F16 or BF16 for the truth about the weights), or
               a checkpoint (Hugging Face folder or name), whose weights are packed as F32 to a temporary file first
    text:      held-out UTF-8 text of at least one chunk of tokens
    json:      where to write the result as well

    Returns {"format", "artifacts": [{"path", "sha256", "size_bytes", "bits_per_weight", "fidelity", "memory",
    "speed"}], "reference": {...}, "pairs": [...], "text", "machine", "options"}. Each figure is {"value", "low",
    "high", "unit", "n"}, low to high the 95% interval; "fidelity" has fidelity.figures(), "pairs" has
    fidelity.paired() for every two artifacts, the earlier as "baseline". The same inputs give the same figures, but
    for speed and memory.

    A difference below about 0.005 nats of mean KLD may be the runtime's own: llama.cpp rounds activations to 8 bits
    against quantized weights, and a change of kernel alone moves SmolLM2-135M by that much.

    Raises BadText (empty, binary, too short), BadFile (not a GGUF, other vocabulary than the reference's), NotFound,
    BadOption, RuntimeFailed.
    """
    options = options or MeasureOptions()
    paths = [Path(p) for p in ([artifacts] if isinstance(artifacts, str | os.PathLike) else artifacts)]
    if not paths:
        raise BadOption("no artifact was given", expected="at least one GGUF file")
    with _reference_file(against) as reference_path:
        result = _measure(paths, reference_path, str(against), Path(text), options)
    if json is not None:
        files.write_json(json, result)
    return result


def _measure(
    paths: list[Path], reference_path: Path, reference_name: str, text_path: Path, options: MeasureOptions
) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        reference = stack.enter_context(_open(reference_path, options, kv_type="f16"))
        text = read_text(text_path, reference)
        bos = reference.bos if reference.adds_bos else None
        chunks = chunks_of(text, chunk=options.chunk, limit=options.chunks, bos=bos)
        models = [stack.enter_context(_open(path, options, kv_type=options.kv_type)) for path in paths]
        for model in models:
            _check_same_tokens(model, reference, text)
        with console.progress("Measuring fidelity", total=len(chunks) * (1 + len(models))) as bar:
            of_reference, scores = fidelity.score(reference, models, chunks, bar.update)
        described = [_described(model) for model in [reference, *models]]
    bootstrap = Bootstrap(*scores[0].kld.shape, resamples=options.resamples, seed=options.seed)
    described[0]["path"] = reference_name
    described[0]["perplexity"] = bootstrap.mean(of_reference.nll, via=np.exp).as_json()
    for entry, score in zip(described[1:], scores, strict=True):
        entry["fidelity"] = _json(fidelity.figures(score, bootstrap))
    _add_speed_and_memory(described, [reference_path, *paths], chunks[0], options)
    return {
        "format": "lowbit-measure/1",
        "artifacts": described[1:],
        "reference": described[0],
        "pairs": [
            {
                "baseline": str(paths[b]),
                "artifact": str(paths[a]),
                **_json(fidelity.paired(scores[b], scores[a], bootstrap)),
            }
            for b, a in itertools.combinations(range(len(paths)), 2)
        ],
        "text": {
            "path": str(text_path),
            "name": text_path.name,
            "sha256": text.sha256,
            "tokens": len(text.ids),
            "chunks": len(chunks),
        },
        "machine": machine(),
        "options": {**asdict(options), "bootstrap_units": len(chunks) * bootstrap.parts},
    }


@contextlib.contextmanager
def _reference_file(against: str | os.PathLike[str]) -> Iterator[Path]:
    """The reference as a GGUF; a checkpoint is packed as F32 into a temporary folder."""
    if Path(against).is_file():
        yield Path(against)
        return
    from lowbit import checkpoint, pack

    found = checkpoint.resolve(os.fspath(against))
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        console.log(f"Packing {against} as F32 to measure against ...")
        packed = Path(folder) / "reference.gguf"
        pack.pack(found, "f32", packed)
        yield packed


def _open(path: Path, options: MeasureOptions, *, kv_type: str) -> LlamaCpp:
    return LlamaCpp(
        path, context=options.chunk, ubatch=min(512, options.chunk), threads=options.threads, kv_type=kv_type
    )


def _check_same_tokens(model: LlamaCpp, reference: LlamaCpp, text: Text) -> None:
    hint = "Measure an artifact against the model that it was made from"
    if model.n_vocab != reference.n_vocab:
        raise BadFile(
            "its vocabulary is not the reference's",
            where=model.path,
            found=f"{model.n_vocab} tokens",
            expected=f"{reference.n_vocab} as in {reference.path}",
            hint=hint,
        )
    ids = read_text(text.path, model).ids
    if model.adds_bos != reference.adds_bos or model.bos != reference.bos or not np.array_equal(ids, text.ids):
        raise BadFile(
            "its tokenizer cuts the text otherwise than the reference's",
            where=model.path,
            found=f"{len(ids)} tokens",
            expected=f"the {len(text.ids)} tokens of {reference.path}",
            hint=hint,
        )


def _described(model: LlamaCpp) -> dict[str, Any]:
    return {
        "path": str(model.path),
        "sha256": files.sha256(model.path),
        "size_bytes": model.path.stat().st_size,
        "bits_per_weight": bits_per_weight(model.model_bytes, model.n_weights),
    }


def _add_speed_and_memory(
    entries: list[dict[str, Any]], paths: list[Path], tokens: np.ndarray, options: MeasureOptions
) -> None:
    """Each file alone, after the fidelity run has let go of its memory."""
    if not options.speed and not options.memory:
        return
    with console.progress("Measuring speed and memory", total=len(paths)) as bar:
        for i, (entry, path) in enumerate(zip(entries, paths, strict=True)):
            found = probe(
                path,
                tokens[: options.prompt_tokens].tolist(),
                generate=options.generate_tokens,
                repeats=options.repeats,
                threads=options.threads,
                kv_type=options.kv_type,
                speed=options.speed,
            )
            if options.memory:
                entry["memory"] = _json({"peak_bytes": found.peak_bytes, "baseline_bytes": found.baseline_bytes})
            if options.speed:
                entry["speed"] = _json(
                    {
                        "prompt_tokens_per_second": found.prompt_tokens_per_second,
                        "generation_tokens_per_second": found.generation_tokens_per_second,
                    }
                )
            bar.update(i + 1)


def _json(figures: dict[str, Figure] | dict[str, Figure | None]) -> dict[str, Any]:
    return {name: figure.as_json() if figure else None for name, figure in figures.items()}


verbs.make_callable(__name__)
