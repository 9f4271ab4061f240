"""What a batch will take, before it is run: items, tokens, and with a probe time and cost.

Prompt tokens are counted with the model's own tokenizer and chat template, on a random sample where there are many
items, from the GGUF's vocabulary alone: no weight is read. How long answers are, and how long they take, only running
some tells: the probe asks the model for n items drawn at random, as the batch would. Its answers are not kept.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowbit import console, model_server
from lowbit.batch.agreement import draw
from lowbit.batch.costs import Work
from lowbit.batch.engines import Engine
from lowbit.batch.engines.base import Lost, NotReached
from lowbit.batch.items import Item, NoItem, Place, Reader, read_place
from lowbit.batch.meter import per_item
from lowbit.errors import BadFile, LowbitError, RuntimeFailed
from lowbit.harness import HarnessError, of_model
from lowbit.harness.escape import Escaper
from lowbit.measure.energy import EnergyMeter
from lowbit.measure.record import Figure, exact, repeated
from lowbit.run.base import Runtime

_FEW = 4  # requests at a time, where the run itself would find out how many are best
_SAMPLE = 400  # items whose tokens are counted


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """items: requests in IN; bad: lines that are none, first_problem of the first. prompt: tokens an item, n those
    counted; None without a model here. limit: completion tokens an item at most (its own max_tokens), None where some
    have none. completion, seconds: an item, by the probe. loading: seconds, likewise; joules: of the probe."""

    items: int
    bad: int
    first_problem: str | None
    prompt: Figure | None
    limit: float | None
    completion: Figure | None = None
    seconds: Figure | None = None
    loading: float = 0.0
    watts: float | None = None
    probed: int = 0
    probe_failed: int = 0

    def work(self) -> Work | None:
        """The whole batch as the probe has it; None without one."""
        if self.seconds is None or self.completion is None or self.prompt is None:
            return None
        seconds = self.loading + self.items * self.seconds.value
        prompt, completion = round(self.items * self.prompt.value), round(self.items * self.completion.value)
        return Work(
            items=self.items, seconds=seconds, loading=self.loading, prompt_tokens=prompt,
            completion_tokens=completion, spent_prompt_tokens=prompt, spent_completion_tokens=completion,
            joules=None if self.watts is None else self.watts * seconds, per_item=self.seconds,
            prompt_per_item=self.prompt, completion_per_item=self.completion,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        def shown(figure: Figure | None) -> Any:
            return figure.as_json() if figure else None

        return {
            "items": self.items,
            "bad_lines": self.bad,
            "first_problem": self.first_problem,
            "prompt_tokens_per_item": shown(self.prompt),
            "prompt_tokens": shown(_times(self.prompt, self.items)),
            "completion_tokens_limit_per_item": self.limit,
            "completion_tokens_per_item": shown(self.completion),
            "seconds_per_item": shown(self.seconds),
            "seconds": shown(_times(self.seconds, self.items)),
            "loading_seconds": self.loading,
            "watts": self.watts,
            "probe": {"items": self.probed, "failed": self.probe_failed},
        }


def estimate(
    reader: Reader, *, model: str | None = None, engine: Engine | None = None, probe: int = 0, seed: int = 0
) -> Estimate:
    """reader: of IN. model: whose tokenizer counts. engine: what the probe asks for so many items.

    Raises BadFile (IN is no batch), NotFound, RuntimeFailed (nothing answers the probe).
    """
    counts = {"items": 0, "bad": 0}
    first: list[str] = []

    def good() -> Iterator[tuple[Place, str]]:
        for place in reader.places(0, 1):
            if place.problem is None and place.custom_id is not None:
                counts["items"] += 1
                yield place, place.custom_id
            else:
                counts["bad"] += 1
                first.append(f"line {place.line}: {place.problem}") if not first else None

    drawn = draw(good(), max(_SAMPLE, probe), seed)
    if not drawn:
        said = first[0] if first else "no lines"
        raise BadFile("no request", where=reader.path, found=said, expected="a request in each line")
    sample = [_read(reader, place) for place in drawn]
    limits = [limit for item in sample if (limit := _limit(item)) is not None]
    found = Estimate(
        items=counts["items"], bad=counts["bad"], first_problem=first[0] if first else None,
        prompt=_prompt(sample[:_SAMPLE], model, counts["items"]) if model else None,
        limit=sum(limits) / len(limits) if len(limits) == len(sample) else None,
    )  # fmt: skip
    return asyncio.run(_probed(found, engine, sample[:probe])) if probe and engine is not None else found


def _read(reader: Reader, place: Place) -> Item:
    try:
        return reader.item(read_place(reader.path, place.offset, place.length), place.custom_id or "")
    except NoItem as error:
        raise BadFile("not a request", where=f"{reader.path}, line {place.line}", found=str(error)) from None


def _limit(item: Item) -> int | None:
    """Completion tokens that an answer may have at most, where the request says so."""
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = item.body.get(name)
        if type(value) is int and value > 0:
            return value
    return None


def _prompt(sample: Sequence[Item], model: str, items: int) -> Figure:
    """Prompt tokens an item, with an interval unless all were counted."""
    from lowbit.run._llama_vocab import LlamaVocab

    path = model_server.artifact(model)
    escaper = Escaper(of_model.control_tokens(path))  # the harness sends text with control tokens in it escaped
    with LlamaVocab(path) as vocab:
        counts = [float(_tokens(item, vocab, escaper)) for item in sample]
    if len(counts) == items or len(counts) < 2:
        return exact(sum(counts) / len(counts), "tokens", len(counts))
    return _of_population(repeated(counts, "tokens"), items)


def _tokens(item: Item, vocab: Runtime, escaper: Escaper) -> int:
    """Prompt tokens of a request, as the model's server counts them."""
    prompt = item.body.get("prompt")
    if item.url == "/v1/completions":
        return len(prompt) if isinstance(prompt, list) else len(vocab.tokenize(str(prompt), add_special=True))
    messages = item.body.get("messages") or [{"role": "user", "content": str(item.body.get("input") or "")}]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return 0  # refused in the batch as well
    try:
        return len(vocab.prompt_of([escaper.message(message)[0] for message in messages]))
    except LowbitError:  # a request that the template refuses fails in the batch too, or is mended by the harness
        text = "\n".join(str(message.get("content") or "") for message in messages)
        return len(vocab.tokenize(text, add_special=True))


def _of_population(figure: Figure, population: int) -> Figure:
    """The interval of a mean over a sample that is drawn from so many without being put back: narrower by
    sqrt(1 - n / N), and nothing where all were drawn."""
    share = math.sqrt(max(0.0, 1 - figure.n / population))
    low, high = (figure.value + share * (end - figure.value) for end in (figure.low, figure.high))
    return replace(figure, low=low, high=high)


def _times(figure: Figure | None, count: int) -> Figure | None:
    if figure is None:
        return None
    low, value, high = (count * part for part in (figure.low, figure.value, figure.high))
    return replace(figure, value=value, low=low, high=high)


# The probe


async def _probed(found: Estimate, engine: Engine, sample: Sequence[Item]) -> Estimate:
    console.log(f"Asking for {len(sample)} items, drawn at random ...")
    begun = time.monotonic()
    async with engine:
        ready = time.monotonic()
        energy = EnergyMeter()
        counters = energy.read()
        usages, finished = await _answers(engine, sample)
        seconds, joules = time.monotonic() - ready, energy.joules(counters)
    if not usages:
        raise RuntimeFailed("no item of the probe was answered", hint="Run one item to see why")
    prompt, completion = ([float(usage.get(name) or 0) for usage in usages] for name in _USAGE)
    return replace(
        found,
        prompt=found.prompt or _mean(prompt, "tokens"),
        completion=_mean(completion, "tokens"),
        seconds=per_item(finished, [(ready, ready + seconds)], [0.0]) or exact(seconds / len(usages), "s"),
        loading=ready - begun,
        watts=joules / seconds if joules is not None else None,
        probed=len(sample),
        probe_failed=len(sample) - len(usages),
    )


_USAGE = ("prompt_tokens", "completion_tokens")


async def _answers(engine: Engine, sample: Sequence[Item]) -> tuple[list[dict[str, Any]], list[float]]:
    """The usage of each answer, and when it came. Raises RuntimeFailed where the model does not answer."""
    usages: list[dict[str, Any]] = []
    finished: list[float] = []
    todo = iter(sample)

    async def worker(bar: console.Progress) -> None:
        for item in todo:
            try:
                body = await engine.ask(item)
            except (NotReached, Lost) as error:
                raise RuntimeFailed("no answer", where=engine.name, found=str(error)) from None
            except HarnessError:
                continue
            finally:
                bar.advance(1)
            usage = body.get("usage") or {}
            usages.append(usage | {name: usage.get(name, usage.get(other)) for name, other in _OTHERS})
            finished.append(time.monotonic())

    at_a_time = min(engine.slots, _FEW) if engine.probed else engine.slots
    with console.progress("probe", len(sample), unit="items") as bar:
        await asyncio.gather(*(worker(bar) for _ in range(min(at_a_time, len(sample)))))
    return usages, finished


_OTHERS = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))


def _mean(values: Sequence[float], unit: str) -> Figure:
    return repeated(list(values), unit) if len(values) > 1 else exact(values[0], unit)
