"""The long measurements: KV cache types, retrieval, speed against depth; with one text, time budget and journal.

Work is cut into cells that belong together (one sequence through all models, one haystack through all caches), taken
in an order that keeps the sections balanced wherever the budget ends.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit import console, files, plan, run
from lowbit.checkpoint.gguf_file import read_fields
from lowbit.errors import BadOption, BadText, LowbitError, NotFound, Unsupported
from lowbit.measure import journal as work
from lowbit.measure import kv, needles, retrieval, slot_speed
from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.budget import Budget
from lowbit.measure.journal import Journal
from lowbit.measure.opening import Artifact
from lowbit.measure.record import machine
from lowbit.measure.text import Text, read_text
from lowbit.plan.options import PlanOptions
from lowbit.run import _kv_types
from lowbit.run._llama_slots import Slots
from lowbit.run.llama_cpp import LlamaCpp, check_file
from lowbit.threads import thread_count

if TYPE_CHECKING:
    from lowbit.measure import MeasureOptions

_SECTIONS = ("kv", "retrieval", "speed_at")
_UBATCH = 512  # llama.cpp's own default


def sections(options: MeasureOptions) -> list[str]:
    """Which of the long measurements are asked for."""
    return [name for name in _SECTIONS if getattr(options, name) is not None]


def journal(
    artifacts: Sequence[Artifact],
    reference: Artifact | None,
    text: str | os.PathLike[str] | None,
    json: str | os.PathLike[str] | None,
    options: MeasureOptions,
) -> Journal:
    """<json>.work, which belongs to these files' contents, the text, the options but for the budget, and what computes.
    In memory only where there is no such file, or nothing long to measure."""
    if json is None or not sections(options):
        return Journal(None, {})
    opened = [*artifacts, *([reference] if reference else [])]
    what = {
        "files": [_sha256(Path(a.target)) for a in opened],
        "names": [str(a.target) for a in artifacts],
        "text": _sha256(Path(text)) if text is not None else None,
        "options": {key: value for key, value in asdict(options).items() if key != "minutes"},
        "machine": machine(),
    }
    return Journal(Path(f"{os.fspath(json)}.work"), what)


def _sha256(path: Path) -> str:
    if not path.exists():
        raise NotFound("no such file", where=path)
    return files.folder_sha256(path) if path.is_dir() else files.sha256(path)


def check(artifacts: Sequence[Artifact], options: MeasureOptions) -> None:
    """Raises at once what the long measurements would raise after the others: a KV cache type or a runtime that cannot
    be, a context that the model was not trained for."""
    asked = sections(options)
    lengths = [
        *(options.kv.contexts if options.kv else ()),
        *(options.retrieval.lengths if options.retrieval else ()),
        *([options.speed_at.context] if options.speed_at else ()),
    ]
    for artifact in artifacts if asked else ():
        if artifact.runtime is not LlamaCpp:
            if asked != ["kv"]:
                what = "retrieval and speed at a depth are measured in llama.cpp only"
                raise Unsupported(what, where=artifact.target, found=artifact.runtime.name)
            continue
        for name in _types(options):
            _kv_types.parse(name)
        if max(lengths) > (trained := _trained_context(Path(artifact.target))):
            raise BadOption(
                "longer than the model was trained for", where=artifact.target, found=f"{max(lengths)} tokens",
                expected=f"at most {trained:.0f}", hint="Give smaller --contexts or --speed-depths",
            )  # fmt: skip


def _types(options: MeasureOptions) -> tuple[str, ...]:
    return options.kv.ordered if options.kv is not None else (options.kv_type,)


def _trained_context(path: Path) -> float:
    """As the file says; infinite where it does not."""
    check_file(path)
    values = {field.key: field.value for field in read_fields(path)}
    found = values.get(f"{values.get('general.architecture')}.context_length")
    return found if isinstance(found, int) and found > 0 else float("inf")


def measure(
    artifacts: Sequence[Artifact],
    reference: Artifact | None,
    text_path: Path | None,
    options: MeasureOptions,
    journal: Journal,
) -> dict[str, Any]:
    """The sections asked for: {"kv", "retrieval", "speed"}; the first two want a reference and a text."""
    asked = sections(options)
    seconds = None if options.minutes is None else 60 * options.minutes / len(asked)
    budgets = {name: Budget(journal, name, seconds) for name in asked}
    result: dict[str, Any] = {}
    if reference is not None and text_path is not None:
        if options.kv is not None:
            result["kv"] = _kv(artifacts, reference, text_path, options, journal, budgets["kv"])
        if options.retrieval is not None:
            result["retrieval"] = _retrieval(artifacts, reference, text_path, options, journal, budgets["retrieval"])
    if options.speed_at is not None:
        result["speed"] = _speed(artifacts, options, journal, budgets["speed_at"])
    return result


# KV cache types


def _kv(
    artifacts: Sequence[Artifact],
    reference: Artifact,
    text_path: Path,
    options: MeasureOptions,
    journal: Journal,
    budget: Budget,
) -> dict[str, Any]:
    asked = options.kv
    assert asked is not None
    contexts, types = sorted(set(asked.contexts)), asked.ordered
    with contextlib.ExitStack() as stack:
        judge = stack.enter_context(_opened(reference, max(contexts)))
        models = [_with_caches(stack.enter_context(_opened(a, max(contexts))), types) for a in artifacts]
        text = read_text(text_path, judge)
        bos = judge.bos if judge.adds_bos else None
        texts = {context: _sequences(text, context, asked.tokens, bos) for context in contexts}
        cells = sorted((j / len(texts[c]), c, j) for c in contexts for j in range(len(texts[c])))
        found: dict[int, list[np.ndarray]] = {context: [] for context in contexts}
        held: dict[int, list[list[int | None]]] = {}
        with console.progress("Measuring KV caches", total=sum(c for _, c, _ in cells), unit="tokens") as bar:
            for _, context, j in cells:
                name = f"kv/{context}/{j}"
                if found[context] and not budget.left([name]):
                    continue
                shape = kv.shape_of(len(models), len(types), context)
                if journal.has(name) and _scores(journal.cell(name, dict), shape) is None:
                    journal.forget(name)
                tokens = texts[context][j]
                value = journal.cell(name, lambda tokens=tokens: _kv_cell(judge, models, tokens, options.threads))  # type: ignore[misc]
                scores = _scores(value, shape)
                assert scores is not None
                found[context].append(scores)
                held[context] = value.get("cache_bytes") or []
                bar.advance(context)
        room = {c: [_cache_bytes(a, types, c, held[c][i]) for i, a in enumerate(artifacts)] for c in contexts}
    entries = []
    for i, artifact in enumerate(artifacts):
        rows = [
            _kv_row(np.stack(found[c])[:, i][:, [0, t]], c, name, room[c][i][t], asked.limit, options)
            for t, name in enumerate(types)
            for c in contexts
        ]
        entries.append({"path": str(artifact.target), "cells": rows, "recommendation": kv.recommend(rows, asked.limit)})
    return {"types": list(types), "contexts": contexts, "limit": asked.limit, "noise": kv.NOISE, "artifacts": entries}


def _kv_cell(judge: Any, models: list[list[Any]], tokens: np.ndarray, threads: int | None) -> dict[str, Any]:
    scores = kv.score(judge, models, tokens, threads=thread_count(threads))
    return {"scores": work.pack(scores), "cache_bytes": [[model.cache_bytes for model in of] for of in models]}


def _scores(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    return work.unpack(value.get("scores"), shape) if isinstance(value, dict) else None


def _kv_row(
    found: np.ndarray, context: int, kind: str, cache_bytes: int | None, limit: float, options: MeasureOptions
) -> dict[str, Any]:
    def bootstrap(chunks: int, positions: int) -> Bootstrap:
        return Bootstrap(chunks, positions, resamples=options.resamples, seed=options.seed)

    figures, by_position = kv.summarize(found, context, bootstrap)
    return {
        "type": kind,
        "context": context,
        "sequences": len(found),
        "cache_bytes": cache_bytes,
        **figures,
        "verdict": kv.verdict(figures["kld_to_f16"], limit),
        "by_position": by_position,
    }


def _cache_bytes(
    artifact: Artifact, types: Sequence[str], context: int, held: Sequence[int | None]
) -> list[int | None]:
    """Bytes of the cache of one sequence of ``context`` tokens: llama.cpp's by ``lowbit plan``, to the byte; of another
    runtime what it held."""
    if artifact.runtime is not LlamaCpp:
        return list(held)
    found: list[int | None] = []
    try:
        with plan.open_model(artifact.target) as model:
            for name in types:
                pair = _kv_types.parse(name)
                asked = PlanOptions(
                    context=context, slots=1, kv_unified=False, ubatch=_UBATCH, kv_type_k=pair.k, kv_type_v=pair.v
                )
                found.append(plan.plan_open(model, asked).bytes_of("kv"))
    except LowbitError as error:  # an architecture that plan does not know
        console.log(f"The bytes of the KV cache are not known: {error}")
        return [None] * len(types)
    return found


def _opened(artifact: Artifact, context: int) -> Any:
    asked = {"context": context, "ubatch": _UBATCH, "kv_type": None}
    return run.open_artifact(artifact.target, artifact.runtime.name, **{**artifact.options, **asked})


def _with_caches(model: Any, types: Sequence[str]) -> list[Any]:
    return [model, *(model.beside(kv_type=name) for name in types[1:])]


def _sequences(text: Text, context: int, tokens: int, bos: int | None) -> np.ndarray:
    found = kv.sequences(text.ids, context, tokens, bos)
    if not len(found):
        raise BadText(
            "the text is too short", where=text.path, found=f"{len(text.ids)} tokens", expected=f"at least {context}",
            hint="Give a longer text, or smaller --contexts",
        )  # fmt: skip
    return found


# Retrieval


def _retrieval(
    artifacts: Sequence[Artifact],
    reference: Artifact,
    text_path: Path,
    options: MeasureOptions,
    journal: Journal,
    budget: Budget,
) -> dict[str, Any]:
    asked = options.retrieval
    assert asked is not None
    types = _types(options)
    if reference.runtime is LlamaCpp:
        probed = [(reference, (kv.BASE,)), *((a, types) for a in artifacts)]
    else:
        probed = [(a, types) for a in artifacts]
    lengths, shape = sorted(set(asked.lengths)), (sum(len(t) for _, t in probed), len(asked.depths), 3)
    found: dict[int, list[np.ndarray]] = {length: [] for length in lengths}
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_slots(a, max(lengths), of[0], options.threads)) for a, of in probed]
        models = [m for first, (_, of) in zip(opened, probed, strict=True) for m in _with_caches(first, of)]
        filler = read_text(text_path, opened[0]).ids
        cells = list(itertools.product(range(asked.haystacks), lengths))
        with console.progress("Looking for needles", total=sum(n for _, n in cells), unit="tokens") as bar:
            for j, length in cells:
                name = f"retrieval/{length}/{j}"
                if found[length] and not budget.left([name]):
                    continue
                if journal.has(name) and work.unpack(journal.cell(name, str), shape) is None:
                    journal.forget(name)
                rng = np.random.default_rng([asked.seed, length, j])
                bos = opened[0].bos if opened[0].adds_bos else None

                def compute(length: int = length, rng: Any = rng, bos: int | None = bos) -> str:
                    stack_of = needles.haystack(opened[0], filler, length=length, depths=asked.depths, bos=bos, rng=rng)
                    return work.pack(np.array([retrieval.ask(model, stack_of) for model in models]))

                answers = work.unpack(journal.cell(name, compute), shape)
                assert answers is not None
                found[length].append(answers)
                bar.advance(length)
    entries = []
    row = itertools.count()
    for artifact, of in probed:
        grids = []
        base: dict[int, np.ndarray] = {}
        for kind in of:
            at = next(row)
            for length in lengths:
                these = np.stack(found[length])[:, at]
                figures = retrieval.summarize(these, base.get(length), asked.depths)
                grids.append({"type": kind, "length": length, "haystacks": len(these), **figures})
                if kind == kv.BASE:
                    base[length] = these
        entries.append({"path": str(artifact.target), "cells": grids})
    reference_cells = entries.pop(0)["cells"] if len(probed) > len(artifacts) else None
    return {
        "lengths": lengths,
        "depths": sorted(asked.depths),
        "candidates": needles.CANDIDATES,
        "chance": retrieval.CHANCE,
        "reference": reference_cells,
        "artifacts": entries,
    }


def _slots(artifact: Artifact, length: int, kv_type: str, threads: int | None) -> Slots:
    room = length + 64  # one cache for the text, a question and an answer
    return Slots(artifact.target, sequences=3, context=room, unified=True, threads=threads, kv_type=kv_type)


# Speed


def _speed(artifacts: Sequence[Artifact], options: MeasureOptions, journal: Journal, budget: Budget) -> dict[str, Any]:
    asked = options.speed_at
    assert asked is not None
    types = _types(options)
    kinds = [(i, kind) for i in range(len(artifacts)) for kind in types]
    reports: dict[tuple[int, str], list[list[dict[str, Any]]]] = {kind: [] for kind in kinds}
    order = slot_speed.turns(kinds, asked.repeats)
    with console.progress("Measuring speed at depths", total=len(order), unit="runs") as bar:
        for r, (i, kind) in order:
            name = f"speed_at/{i}/{kind}/{r}"
            # An interval needs two of each.
            if r >= 2 and not budget.left([f"speed_at/{k}/{other}/{r}" for k, other in kinds]):
                continue
            if journal.has(name) and not slot_speed.makes_sense(journal.cell(name, list), asked):
                journal.forget(name)
            path = Path(artifacts[i].target)
            probe = partial(slot_speed.probe, path, kind, asked, options.threads)
            reports[i, kind].append(journal.cell(name, probe))
            bar.advance(1)
    return {
        "depths": sorted(set(asked.depths)),
        "slots": sorted(set(asked.slots)),
        "prompt": asked.prompt,
        "generate": asked.generate,
        "kv_unified": asked.kv_unified,
        "artifacts": [
            {
                "path": str(artifact.target),
                "cells": [{"type": kind, **row} for kind in types for row in slot_speed.summarize(reports[i, kind])],
            }
            for i, artifact in enumerate(artifacts)
        ],
    }
