"""The fidelity pass: the reference and the artifacts over the text, all at once or from a reference cache."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lowbit import console, files
from lowbit.errors import BadFile, BadOption
from lowbit.measure import endpoint, fidelity, opening, reference_cache
from lowbit.measure.fidelity import Scores
from lowbit.measure.reference_cache import Header, ReferenceCache
from lowbit.measure.text import Text, chunks_of, read_text
from lowbit.run.base import Runtime
from lowbit.run.openai import OpenAi
from lowbit.threads import thread_count

_OTHER = "Remove it or name another file to have one made, or measure what it was made for"


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a pass gave.

    reference, artifacts: what the models say of themselves (opening.described)
    chunks:               int32 (n, chunk)
    of_reference, scores: of the reference and of each artifact that gives logits
    """

    reference: dict[str, Any]
    artifacts: list[dict[str, Any]]
    text: Text
    chunks: np.ndarray
    of_reference: Scores
    scores: list[Scores]


class Asked(opening.Asked, endpoint.Asked, Protocol):
    """What of MeasureOptions decides how a pass is run."""

    @property
    def chunk(self) -> int: ...
    @property
    def chunks(self) -> int | None: ...


def together(artifacts: list[opening.Artifact], against: opening.Artifact, text_path: Path, asked: Asked) -> Pass:
    """All models are open and run in step: the KLD is exact. Endpoints are asked after that, one after the other, what
    they can be asked (``endpoint``); their entries have it in them already."""
    with contextlib.ExitStack() as stack:
        reference = stack.enter_context(against.open())
        text, chunks = _cut(reference, text_path, asked)
        models = [stack.enter_context(artifact.open()) for artifact in artifacts]
        local = [model for model in models if not isinstance(model, OpenAi)]
        for model in local:
            opening.check_vocabulary(model, reference)
            opening.check_tokens(model, reference, text)
        with console.progress("Measuring fidelity", total=len(chunks) * (1 + len(local))) as bar:
            of_reference, scores = fidelity.score(reference, local, chunks, bar.update, thread_count(asked.threads))
        entries = [opening.described(model) for model in models]
        for entry, model in zip(entries, models, strict=True):
            if isinstance(model, OpenAi):
                with console.progress(f"Asking {model.url}", total=len(chunks)) as bar:
                    entry |= endpoint.measured(model, reference, text, chunks, asked, bar.update)
        return Pass(
            reference=opening.described(reference),
            artifacts=entries,
            text=text,
            chunks=chunks,
            of_reference=of_reference,
            scores=scores,
        )


def from_cache(
    path: Path, artifacts: list[opening.Artifact], against: opening.Artifact | None, text_path: Path, asked: Asked
) -> Pass:
    """The reference's part is in the file ``path``, which is made first where it is not there; the artifacts run one
    after the other. The KLD is an estimate with known bounds (``sketch``).

    Raises BadFile for a cache of another reference, text or chunk, and BadOption where there is neither cache nor
    reference.
    """
    if not path.exists():
        if against is None:
            hint = "Give --against REFERENCE to have it made"
            raise BadOption("the reference cache is not there", where=path, hint=hint)
        _make(path, against, text_path, asked)
    with ReferenceCache(path) as cache:
        if against is not None:
            _check_reference(cache, against)
        described, scores = [], []
        for i, artifact in enumerate(artifacts):
            with artifact.open() as model:
                text, chunks = _cut(model, text_path, asked)
                _check_chunks(cache, model, chunks)
                with console.progress(f"Measuring fidelity, {i + 1} of {len(artifacts)}", total=len(chunks)) as bar:
                    threads = thread_count(asked.threads)
                    of_reference, found = fidelity.score_kept(cache, model, len(chunks), bar.update, threads)
                scores.append(found)
                described.append(opening.described(model))
        about = {"path": str(path), "sha256": files.sha256(path), "bytes_a_token": cache.bytes_a_token}
        return Pass(
            reference={**cache.header.reference, "cache": about},
            artifacts=described,
            text=text,
            chunks=chunks,
            of_reference=of_reference,
            scores=scores,
        )


def _make(path: Path, against: opening.Artifact, text_path: Path, asked: Asked) -> None:
    with against.open() as reference:
        text, chunks = _cut(reference, text_path, asked)
        header = Header(
            reference=opening.described(reference),
            settings=_settings(against),
            text={"name": text_path.name, "sha256": text.sha256},
            n_vocab=reference.n_vocab,
            bos=reference.bos if reference.adds_bos else None,
            chunk=chunks.shape[1],
            chunks=len(chunks),
        )
        with console.progress("Running the reference", total=len(chunks)) as bar:
            threads = thread_count(asked.threads)
            reference_cache.make(path, header, reference, chunks, threads=threads, advance=bar.update)


def _cut(model: Runtime, text_path: Path, asked: Asked) -> tuple[Text, np.ndarray]:
    text = read_text(text_path, model)
    bos = model.bos if model.adds_bos else None
    return text, chunks_of(text, chunk=asked.chunk, limit=asked.chunks, bos=bos)


def _settings(against: opening.Artifact) -> dict[str, Any]:
    """What it is opened with that its logits depend on."""
    apart = ("context", "ubatch", "threads")
    return {name: value for name, value in against.options.items() if name not in apart and value is not None}


def _check_reference(cache: ReferenceCache, against: opening.Artifact) -> None:
    known, target = cache.header.reference, Path(against.target)
    sha256 = files.folder_sha256(target) if target.is_dir() else files.sha256(target)
    runtime = {"name": against.runtime.name, "version": against.runtime.installed()}
    for what, found, expected in (
        ("another reference", known.get("sha256"), sha256),
        ("a reference in another runtime, or another version of it", known.get("runtime"), runtime),
        ("a reference with other settings", cache.header.settings, _settings(against)),
    ):
        if found != expected:
            raise BadFile(f"the cache is of {what}", where=cache.path, found=found, expected=expected, hint=_OTHER)


def _check_chunks(cache: ReferenceCache, model: Runtime, chunks: np.ndarray) -> None:
    header = cache.header
    if model.n_vocab != header.n_vocab:
        raise BadFile(
            "its vocabulary is not the reference's",
            where=model.path,
            found=f"{model.n_vocab} tokens",
            expected=f"{header.n_vocab} as in {cache.path}",
            hint="Measure an artifact against the model that it was made from",
        )
    for what, found, expected, good in (
        ("other chunks", f"{header.chunk} tokens a chunk", chunks.shape[1], header.chunk == chunks.shape[1]),
        ("fewer chunks", header.chunks, f"at least {len(chunks)}", header.chunks >= len(chunks)),
    ):
        if not good:
            raise BadFile(f"the cache has {what}", where=cache.path, found=found, expected=expected, hint=_OTHER)
    if not np.array_equal(cache.tokens[: len(chunks)], chunks):
        raise BadFile(
            "the cache is of another text, or of other tokens for it",
            where=cache.path,
            found=header.text.get("name"),
            expected=f"the tokens of {model.path}",
            hint=_OTHER,
        )
