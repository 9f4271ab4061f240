"""Measure packed artifacts in the runtimes that will run them, against a reference, on a text neither has seen.

``lowbit.measure(artifacts, against=..., text=...)``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import console, files, verbs
from lowbit.errors import BadOption
from lowbit.measure import fidelity, long, opening, passes
from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.kv import KvOptions
from lowbit.measure.pairs import pairs, perplexity_against
from lowbit.measure.record import as_json, machine
from lowbit.measure.retrieval import RetrievalOptions
from lowbit.measure.sketch import Divergence
from lowbit.measure.slot_speed import SpeedOptions
from lowbit.measure.speed import probe
from lowbit.measure.tasks import TaskOptions, open_tasks
from lowbit.measure.tasks import model_of as task_model
from lowbit.measure.tasks import run as run_tasks
from lowbit.run.openai import OpenAi


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How to measure.

    chunk:         tokens a chunk; the second half of each is scored
    chunks:        how many chunks of the text; None means all
    threads:       None means the physical cores this process may use
    kv_type:       KV cache of the artifacts; the reference's is always f16
    runtime:       of the artifacts, a name of ``run.runtimes()``; None means what each is for
    reference_runtime: of the reference; None means what a file is for, and for a checkpoint the first artifact's
    speed:         measure tokens per second
    memory:        measure peak memory
    repeats:       how often the speed run is repeated, at least 2
    prompt_tokens, generate_tokens: its lengths; the prompt is at most a chunk
    resamples, seed: of the bootstrap
    model, api_key_env: of endpoints: the model's name there, the environment variable with the API key
    top_logprobs:  how many of its most likely tokens an endpoint is asked for, at each of
    endpoint_places: of every chunk
    cache_error:   nats that a reference cache may add to the mean KLD; the result says where its bound is larger
    kv, retrieval, speed_at: what else to measure, by the options of it: KV cache types, facts to find in long texts,
                   speed against context depth and slot count
    minutes:       for those, in equal parts; None means all that their options ask for
    """

    chunk: int = 512
    chunks: int | None = None
    threads: int | None = None
    kv_type: str = "f16"
    runtime: str | None = None
    reference_runtime: str | None = None
    speed: bool = True
    memory: bool = True
    repeats: int = 3
    prompt_tokens: int = 256
    generate_tokens: int = 32
    resamples: int = 1000
    seed: int = 0
    model: str | None = None
    api_key_env: str | None = None
    top_logprobs: int = 100
    endpoint_places: int = 32
    cache_error: float = 0.001
    kv: KvOptions | None = None
    retrieval: RetrievalOptions | None = None
    speed_at: SpeedOptions | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        least = {"chunk": 4, "chunks": 1, "threads": 1, "repeats": 2, "prompt_tokens": 1, "generate_tokens": 1}
        least |= {"resamples": 100, "top_logprobs": 1, "endpoint_places": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise BadOption(f"impossible {name}", found=value, expected=f"at least {smallest}")
        if not 0 < self.cache_error < float("inf"):
            raise BadOption("impossible cache_error", found=self.cache_error, expected="nats, more than 0")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise BadOption("impossible minutes", found=self.minutes, expected="above 0")


def measure(
    artifacts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    against: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    reference_cache: str | os.PathLike[str] | None = None,
    tasks: TaskOptions | None = None,
    json: str | os.PathLike[str] | None = None,
    options: MeasureOptions | None = None,
) -> dict[str, Any]:
    """Fidelity, size, memory, speed and tasks of artifacts against a reference, each run in its runtime.

    artifacts: one path or several: GGUF files, MLX, compressed-tensors and Hugging Face folders; and URLs of
               OpenAI-compatible endpoints, of which less can be measured (see endpoint.py)
    against:   the reference: a GGUF file, which is run as it is (F32, F16 or BF16 for the truth about the weights), or
               a checkpoint (Hugging Face folder or name), which is computed in float32 (see opening.reference)
    text:      held-out UTF-8 text of at least one chunk of tokens; wants a reference. None leaves fidelity out, and
               with it memory and speed, which are measured on the text
    reference_cache: a file that keeps what the reference says of the text, made where it is not there; with one that
               is, ``against`` may be left out. The KLD is then an estimate (see ``sketch``)
    tasks:     sets of questions to put to all of them, the reference included where there is one
    json:      where to write the result as well; with the long measurements (options.kv, ...), what is finished
               is kept in <json>.work until then, and the same call goes on from there after a kill

    Returns {"format", "artifacts": [{"path", "runtime": {"name", "version"}, "sha256", "size_bytes",
    "bits_per_weight", "fidelity", "memory", "speed"}], "reference": {...}, "pairs": [...], "text", "machine",
    "options", "tasks"}. Each figure is {"value", "low", "high", "unit", "n"}, low to high the 95% interval; "fidelity"
    has fidelity.figures(), "pairs" has pairs.pairs() for every two artifacts, the earlier as "baseline", with a
    "verdict" on each difference; with a cache an artifact has "kld_from_cache": {"error", "confidence", "certain_low",
    "certain_high", "asked", "within"}; "tasks" is what measure.tasks.run() returns, "kv", "retrieval" and "speed"
    what long.measure() does. The same inputs give the same figures, but for speed and memory.

    A difference below about 0.005 nats of mean KLD may be the runtime's own: llama.cpp rounds activations to 8 bits
    against quantized weights, and a change of kernel alone moves SmolLM2-135M by that much.

    Raises BadText (empty, binary, too short), BadFile (damaged, other vocabulary than the reference's), NotFound,
    Unsupported, BadOption, RuntimeFailed.
    """
    options = options or MeasureOptions()
    listed = [artifacts] if isinstance(artifacts, str | os.PathLike) else list(artifacts)
    if not listed:
        raise BadOption("no artifact was given", expected="at least one file or folder")
    if text is None and tasks is None and options.speed_at is None:
        raise BadOption("nothing to measure", expected="a text (--text), tasks (--tasks), or both")
    if text is not None and against is None and reference_cache is None:
        raise BadOption("a text needs a reference", expected="--against, or a --reference-cache that is there")
    if text is None and reference_cache is not None:
        raise BadOption("a reference cache is of a text", expected="--text")
    if (options.kv or options.retrieval) and (text is None or against is None):
        raise BadOption("KV caches and retrieval are measured on a text", expected="--text and --against")
    questions = open_tasks(tasks) if tasks is not None else []
    opened = [opening.artifact(target, options) for target in listed]
    long.check(opened, options)
    cache = Path(reference_cache) if reference_cache is not None else None
    with contextlib.ExitStack() as stack:
        reference = None
        if against is not None:
            reference = stack.enter_context(opening.reference(against, opened[0], options))
        journal = stack.enter_context(long.journal(opened, reference, text, json, options))
        name = str(against) if against is not None else None
        if text is not None:
            path = Path(text)
            result = journal.cell("fidelity", lambda: _measure(opened, reference, name, path, cache, options))
        else:
            result = _described(opened, reference, str(against), options)
        result = {**result, **long.measure(opened, reference, None if text is None else Path(text), options, journal)}
        if tasks is not None:
            models = [
                *([(reference, result["reference"])] if reference else []),
                *zip(opened, result["artifacts"], strict=True),
            ]
            result["tasks"] = run_tasks(questions, [task_model(a, entry, tasks) for a, entry in models], tasks)
        if json is not None:
            files.write_json(json, result)
        journal.finish()
    return result


def _described(
    artifacts: list[opening.Artifact],
    reference: opening.Artifact | None,
    reference_name: str,
    options: MeasureOptions,
) -> dict[str, Any]:
    """The result without what a text gives: which files, where."""
    entries = []
    for artifact in [*([reference] if reference else []), *artifacts]:
        with artifact.open() as model:
            entries.append(opening.described(model))
    if reference:
        entries[0]["path"] = reference_name
    return {
        "format": "lowbit-measure/1",
        "artifacts": entries[1:] if reference else entries,
        "reference": entries[0] if reference else None,
        "pairs": [],
        "machine": machine(),
        "options": asdict(options),
    }


def _measure(
    artifacts: list[opening.Artifact],
    against: opening.Artifact | None,
    reference_name: str | None,
    text_path: Path,
    cache: Path | None,
    options: MeasureOptions,
) -> dict[str, Any]:
    local = [artifact for artifact in artifacts if not issubclass(artifact.runtime, OpenAi)]
    if cache is not None:
        if len(local) < len(artifacts):
            raise BadOption("an endpoint is compared with the reference itself, not with its cache", where=cache)
        found = passes.from_cache(cache, artifacts, against, text_path, options)
    else:
        assert against is not None
        found = passes.together(artifacts, against, text_path, options)
    bootstrap = Bootstrap(*found.of_reference.nll.shape, resamples=options.resamples, seed=options.seed)
    reference, entries = found.reference, found.artifacts
    if reference_name is not None:
        reference["path"] = reference_name
    reference["perplexity"] = bootstrap.mean(found.of_reference.nll, via=np.exp).as_json()
    scored = [entry for entry, artifact in zip(entries, artifacts, strict=True) if artifact in local]
    for entry, score in zip(scored, found.scores, strict=True):
        lost = perplexity_against(found.of_reference, score, bootstrap)
        entry["fidelity"] = as_json(fidelity.figures(score, bootstrap))
        entry["against_reference"] = {"log_perplexity_difference": lost.as_json()}
        if score.kept is not None:
            entry["kld_from_cache"] = _of_cache(score.kept, options.cache_error)
    run_too = [(reference, against)] if against is not None else []
    run_too += zip(scored, local, strict=True)
    _add_speed_and_memory(run_too, found.chunks[0], options)
    return {
        "format": "lowbit-measure/1",
        "artifacts": entries,
        "reference": reference,
        "pairs": pairs([str(artifact.target) for artifact in local], found.scores, bootstrap),
        "text": {
            "path": str(text_path),
            "name": text_path.name,
            "sha256": found.text.sha256,
            "tokens": len(found.text.ids),
            "chunks": len(found.chunks),
        },
        "machine": machine(),
        "options": {**asdict(options), "bootstrap_units": len(found.chunks) * bootstrap.parts},
    }


def _of_cache(kept: Divergence, asked: float) -> dict[str, Any]:
    """How far the mean KLD may be from the exact one because the reference came from a cache."""
    error = kept.error_of_mean()
    return {
        "error": error,
        "confidence": 0.999,
        "certain_low": float(kept.low.mean()),
        "certain_high": float(kept.high.mean()),
        "asked": asked,
        "within": error <= asked,
    }


def _add_speed_and_memory(
    listed: list[tuple[dict[str, Any], opening.Artifact]], tokens: np.ndarray, options: MeasureOptions
) -> None:
    """Each file alone, after the fidelity run has let go of its memory."""
    if not options.speed and not options.memory:
        return
    with console.progress("Measuring speed and memory", total=len(listed)) as bar:
        for i, (entry, artifact) in enumerate(listed):
            if not artifact.runtime.generates_as_shipped:
                entry["not_measured"] = f"speed and memory: lowbit runs it otherwise than {artifact.runtime.name} does"
                continue
            found = probe(
                artifact.target,
                tokens[: options.prompt_tokens].tolist(),
                generate=options.generate_tokens,
                repeats=options.repeats,
                runtime=artifact.runtime.name,
                options={**artifact.options, "context": None},
                speed=options.speed,
            )
            if options.memory:
                entry["memory"] = as_json({"peak_bytes": found.peak_bytes, "baseline_bytes": found.baseline_bytes})
            if options.speed:
                entry["speed"] = as_json(
                    {
                        "prompt_tokens_per_second": found.prompt_tokens_per_second,
                        "generation_tokens_per_second": found.generation_tokens_per_second,
                    }
                )
            bar.update(i + 1)


verbs.make_callable(__name__)
