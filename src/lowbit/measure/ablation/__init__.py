"""What each layer of the harness is worth: the same questions with each layer switched off in turn.

``harness(targets, options=...)``: BFCL's questions, put to a model through the whole harness, through it without each
layer, and with no harness at all; each compared with the whole one, question by question.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lowbit import console, files
from lowbit.errors import BadOption
from lowbit.harness import LAYERS, HarnessOptions
from lowbit.measure.ablation import questions as _questions
from lowbit.measure.ablation import served, summary
from lowbit.measure.ablation.noisy import NoisyModel
from lowbit.measure.ablation.playing import Outcome, play
from lowbit.measure.ablation.questions import GROUPS, Question
from lowbit.measure.journal import Journal
from lowbit.measure.record import machine

__all__ = ["GROUPS", "AblationOptions", "harness"]
BARE, WHOLE = "no harness", "whole harness"
_FORMAT = "lowbit-harness/1"
_DEFAULT = ("simple", "multiple", "parallel", "irrelevance", "multi-turn", "required", "as-json")


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """groups:     of GROUPS
    limit:      questions of each group, evenly spread over it; None means all
    layers:     which are switched off in turn
    tries:      requests for one answer
    max_tokens: of an answer
    noisy:      share of damaged answers of a noisy model that is measured too; None leaves it out
    seed:       of that damage
    minutes:    budget for each model; None is no limit
    slots, context, threads: of llama.cpp's server; context in tokens of each slot
    model, api_key_env: of a URL: the model's name there, the environment variable with the API key
    """

    groups: tuple[str, ...] = _DEFAULT
    limit: int | None = None
    layers: tuple[str, ...] = tuple(LAYERS)
    tries: int = 3
    max_tokens: int = 192
    noisy: float | None = None
    seed: int = 0
    minutes: float | None = None
    slots: int = 4
    context: int = 8192
    threads: int | None = None
    model: str | None = None
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "tries", "max_tokens", "slots", "context", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadOption(f"impossible {name}", found=value, expected="at least 1")
        if self.noisy is not None and not 0 <= self.noisy <= 1:
            raise BadOption("impossible noise", found=self.noisy, expected="a share from 0 to 1")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise BadOption("impossible minutes", found=self.minutes, expected="above 0")
        if not self.groups:
            raise BadOption("no group of questions was named", expected=", ".join(GROUPS))
        if unknown := sorted(set(self.layers) - set(LAYERS)):
            raise BadOption("unknown layer", found=unknown[0][:60], expected=", ".join(LAYERS))

    def variants(self) -> dict[str, HarnessOptions | None]:
        """By name: the harness's options, None for no harness."""
        whole = HarnessOptions(tries=self.tries, seconds=3600.0)
        without = {f"without {x}": HarnessOptions.without([x], tries=self.tries, seconds=3600.0) for x in self.layers}
        return {WHOLE: whole, **without, BARE: None}


def harness(
    targets: Sequence[str | os.PathLike[str]] = (),
    *,
    options: AblationOptions | None = None,
    json: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Measures the harness on models: GGUF files, packaged names, URLs, and options.noisy.

    json: where to write the result as well; what is finished is kept in <json>.work until then, and the same call goes
          on from there after a kill

    Returns {"format", "machine", "options", "questions", "models": [summary.of_model(...)]}.
    Raises BadOption, NotFound, BadFile, RuntimeFailed.
    """
    options = options or AblationOptions()
    if not targets and options.noisy is None:
        raise BadOption("nothing to measure the harness on", expected="an artifact, a URL, or a noisy model")
    asked = _questions.read(options.groups, options.limit)
    what = {"harness": metadata.version("lowbit"), "options": asdict(options), "ids": [q.id for q in asked]}
    path = Path(f"{os.fspath(json)}.work") if json is not None else None
    with Journal(path, what) as journal:
        models = [asyncio.run(_measured(opened, asked, options, journal)) for opened in _models(targets, options)]
        found = {
            "format": _FORMAT, "machine": machine(), "options": asdict(options), "models": models,
            "questions": {group: sum(q.group == group for q in asked) for group in options.groups},
        }  # fmt: skip
        if json is not None:
            files.write_json(json, found)
        journal.finish()
    return found


Opened = contextlib.AbstractAsyncContextManager[served.ServedModel | NoisyModel]


def _models(targets: Sequence[str | os.PathLike[str]], options: AblationOptions) -> Iterator[Opened]:
    for target in targets:
        yield served.opened(
            target, slots=options.slots, context=options.context, threads=options.threads, model=options.model,
            api_key_env=options.api_key_env,
        )  # fmt: skip
    if options.noisy is not None:
        yield _noisy(NoisyModel(options.noisy, options.seed))


@contextlib.asynccontextmanager
async def _noisy(model: NoisyModel) -> AsyncIterator[NoisyModel]:
    yield model


async def _measured(
    opening: Opened, asked: Sequence[Question], options: AblationOptions, journal: Journal
) -> dict[str, Any]:
    """Every question with every set of layers; questions that the budget leaves out are left out of all of them."""
    variants, begun = options.variants(), time.monotonic()
    async with opening as model:
        with console.progress(f"Harness: {model.name}", total=len(asked), unit="questions") as bar:
            gate, done = asyncio.Semaphore(options.slots), dict[str, dict[str, Outcome]]()

            async def one(question: Question) -> None:
                async with gate:
                    names = {v: f"{model.identity}/{question.id}/{v}" for v in variants}
                    whole = all(map(journal.has, names.values()))
                    if not whole and options.minutes is not None and time.monotonic() - begun > 60 * options.minutes:
                        return
                    put, outcomes = model.changed(question), dict[str, Outcome]()
                    for variant, layers in variants.items():
                        name = names[variant]
                        if not journal.has(name):
                            outcome = await play(put, model, variant, layers, max_tokens=options.max_tokens)
                            journal.cell(name, functools.partial(dict, outcome))
                        outcomes[variant] = journal.cell(name, dict)
                    done[question.id] = outcomes
                    bar.update(len(done))

            await asyncio.gather(*(one(question) for question in asked))
    return summary.of_model(model.name, done, whole=WHOLE, bare=BARE, left_out=len(asked) - len(done))
