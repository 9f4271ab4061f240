"""``--check N``: some of a job's items asked of a stronger model as well, each once, kept in the job's journal.

The draw is made when the job is done (agreement.draw); a killed check goes on, and a larger one asks only for what is
new. Nothing is sent anywhere that was not named, and where it costs money a cap holds (harness.spend).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit import console
from lowbit.batch.agreement import Agreement, Pair, agreement, draw
from lowbit.batch.engines import Engine, EngineOptions, open_engine
from lowbit.batch.engines.base import Caller, Lost, NotReached
from lowbit.batch.items import Item, NoItem, Place
from lowbit.batch.job import Job
from lowbit.batch.journal import DONE, Lease
from lowbit.errors import BadOption, NotFound, RuntimeFailed
from lowbit.harness import Fallback, Harness, HarnessError, HarnessOptions, HttpUpstream, Ledger, Price, UpstreamFailed

_FACT = "check"  # what was checked last
_SLOTS = 4
_MOST_FIELDS = 64
_LONGEST = 2000  # characters of a question that is kept


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """n:         items that are checked. seed: of the draw
    model:     an artifact, served here for it
    endpoint:  or the URL of an OpenAI-compatible server, up to and with /v1; the items that were drawn are sent there
    endpoint_model, key: the model's name there, and what is sent as a bearer token
    slots:     requests to it at a time
    price, cap, ledger: dollars per million tokens there; the most that all bookings of the ledger together may reach
    """

    n: int
    seed: int = 0
    model: str | None = None
    endpoint: str | None = None
    endpoint_model: str | None = None
    key: str | None = None
    slots: int | None = None
    price: Price | None = None
    cap: float | None = None
    ledger: Path = Path("lowbit-spend.sqlite")

    def __post_init__(self) -> None:
        if type(self.n) is not int or not 1 <= self.n <= 100_000:
            raise BadOption("impossible number of items to check", found=self.n, expected="1 to 100000")
        if (self.model is None) == (self.endpoint is None):
            raise BadOption("what are the answers to be checked against?", expected="--check-model MODEL, which is "
                            "started here, or --check-endpoint URL, and not both")  # fmt: skip
        if self.cap is not None and self.price is None:
            raise BadOption("a cap without a price", expected="the prices of the reference's tokens",
                            hint="--check-price-in and --check-price-out, or a model of the price file")  # fmt: skip
        if self.cap is not None and self.endpoint is None:
            raise BadOption("a cap without an endpoint", expected="--check-endpoint URL")

    @property
    def reference(self) -> str:
        """The reference's name, for people and for the journal."""
        if self.model is not None:
            return Path(self.model).name
        return f"{self.endpoint_model} at {self.endpoint}" if self.endpoint_model else str(self.endpoint)


def check(job: Job, options: CheckOptions, harness: HarnessOptions | None = None) -> Agreement | None:
    """Asks the reference for what it has not said yet; what came of it, None where it answered nothing.

    harness: bounds and layers of its answers, the job's own

    Raises RuntimeFailed where the reference does not answer; the same call goes on.
    """
    fact = {
        "n": options.n, "seed": options.seed, "reference": options.reference, "key": _key(options), "stopped": None
    }  # fmt: skip
    job.journal.set(_FACT, fact)
    numbers, _ = _drawn(job, fact)
    kept = job.journal.facts(_prefix(fact))
    left = [number for number in numbers if f"{_prefix(fact)}{number}" not in kept]
    if left:
        console.log(f"Asking {options.reference} for {len(left)} of the {len(numbers)} items that were drawn")
        stopped = asyncio.run(_ask_all(job, fact, left, _engine(options, harness or HarnessOptions())))
        if stopped is not None:
            job.journal.set(_FACT, fact | {"stopped": stopped})
            console.log(f"The check ended early: {stopped}")
    return found(job)


def found(job: Job) -> Agreement | None:
    """What the last check found, from the journal; None where there was none."""
    fact = job.journal.get(_FACT)
    if fact is None:
        return None
    numbers, population = _drawn(job, fact)
    kept = job.journal.facts(_prefix(fact))
    pairs, failed = [], 0
    for number in numbers:
        told = kept.get(f"{_prefix(fact)}{number}")
        if told is None:
            continue
        if told.get("said") is None:
            failed += 1
            continue
        ours = said(told["url"], _ours(job, number))
        fields = None if told["fields"] is None else tuple(told["fields"])
        pairs.append(Pair(custom_id=told["custom_id"], question=told["question"], ours=ours, reference=told["said"],
                          fields=fields))  # fmt: skip
    return agreement(pairs, reference=fact["reference"], seed=fact["seed"], population=population, failed=failed)


def said(url: str, body: dict[str, Any]) -> str:
    """The text of an answer in the form of its URL; of tool calls, their names and arguments as JSON."""
    if url == "/v1/completions":
        return str(body["choices"][0].get("text") or "")
    if url == "/v1/responses":
        parts = [part.get("text") or "" for entry in body["output"] for part in entry.get("content") or ()]
        calls = [entry for entry in body["output"] if entry.get("type") == "function_call"]
        return "".join(parts) if not calls else _calls(calls)
    message = body["choices"][0]["message"]
    calls = [call.get("function") or {} for call in message.get("tool_calls") or ()]
    return _calls(calls) if calls else str(message.get("content") or "")


def question(item: Item) -> str:
    """What was asked, for people: the last message's text."""
    asked = item.body.get("prompt") or item.body.get("input") or item.body.get("messages")
    if isinstance(asked, list) and asked and isinstance(asked[-1], dict):
        asked = asked[-1].get("content")
    if isinstance(asked, list):
        texts = [part.get("text") for part in asked if isinstance(part, dict)]
        asked = " ".join(text for text in texts if isinstance(text, str))
    return asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)


def fields_of(item: Item) -> list[str] | None:
    """Names of the object that an answer to it must be, by its schema; None for free text."""
    form = item.body.get("response_format")
    if item.url == "/v1/responses":
        text = item.body.get("text")
        form = text.get("format") if isinstance(text, dict) else None
    if not isinstance(form, dict) or form.get("type") not in ("json_schema", "json_object"):
        return None
    inner = form.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else form.get("schema")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return list(properties)[:_MOST_FIELDS] if isinstance(properties, dict) else []


class _Endpoint(Engine):
    """A reference elsewhere, which may cost money: each request's worst case is set aside before it is sent."""

    name = "reference"

    def __init__(self, options: EngineOptions, upstream: HttpUpstream, price: Price | None, ledger: Ledger | None):
        super().__init__(options)
        self._upstream, self._priced = upstream, price is not None
        asked = Fallback(upstream, price=price, ledger=ledger) if price is not None else upstream
        self._caller = Caller(upstream, Harness(asked, options.harness), here=False)

    @classmethod
    def suits(cls, options: EngineOptions) -> bool:
        return False

    async def deciding(self) -> dict[str, Any]:
        return {}

    async def __aenter__(self) -> _Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._upstream.close()

    async def ask(self, item: Item) -> dict[str, Any]:
        if item.url == "/v1/completions" and self._priced:
            raise HarnessError("text to be gone on with is not sent where it costs money", status=400, code="unpriced")
        return await self._caller.ask(item)

    async def ready(self) -> bool:
        return await self._caller.ready()


def _engine(options: CheckOptions, harness: HarnessOptions) -> Engine:
    engine = EngineOptions(model=options.model, slots=options.slots or _SLOTS, harness=harness)
    if options.endpoint is None:
        return open_engine(engine, "local")
    upstream = HttpUpstream(options.endpoint, key=options.key, model=options.endpoint_model)
    ledger = Ledger(options.ledger, options.cap) if options.cap is not None else None
    return _Endpoint(engine, upstream, options.price, ledger)


async def _ask_all(job: Job, fact: dict[str, Any], numbers: list[int], engine: Engine) -> str | None:
    """Why it ended before all were asked, None where it did not. Raises RuntimeFailed."""
    todo: Iterator[int] = iter(numbers)
    stopped: list[str] = []

    async def worker(bar: console.Progress) -> None:
        for number in todo:
            if stopped:
                return
            told = await _ask(engine, _item(job, number))
            if "stopped" in told:
                stopped.append(told["stopped"])
                return
            job.journal.set(f"{_prefix(fact)}{number}", told)
            bar.advance(1)

    with console.progress("check", len(numbers), unit="items") as bar:
        async with engine:
            await asyncio.gather(*(worker(bar) for _ in range(min(engine.slots, len(numbers)))))
    return stopped[0] if stopped else None


async def _ask(engine: Engine, item: Item) -> dict[str, Any]:
    """{"said"}, {"said": None, "failed"} of an item that gets no answer, {"stopped"} where no other will either."""
    try:
        body = await engine.ask(item)
    except (NotReached, Lost) as error:
        return {"stopped": f"the reference does not answer: {error}"}
    except HarnessError as error:
        if error.status in (401, 402, 403, 429) or (isinstance(error, UpstreamFailed) and error.status >= 502):
            return {"stopped": error.message}
        return {"said": None, "failed": error.message[:300]}
    return {
        "said": said(item.url, body),
        "custom_id": item.custom_id,
        "url": item.url,
        "question": question(item)[:_LONGEST],
        "fields": fields_of(item),
        "usage": body.get("usage"),
    }


def _key(options: CheckOptions) -> str:
    """Tells references apart in the journal; a file by its size too."""
    size = Path(options.model).stat().st_size if options.model and Path(options.model).is_file() else 0
    asked = json.dumps([options.reference, size])
    return hashlib.sha256(asked.encode()).hexdigest()[:12]


def _prefix(fact: dict[str, Any]) -> str:
    return f"checked.{fact['key']}."


def _drawn(job: Job, fact: dict[str, Any]) -> tuple[list[int], int]:
    """Numbers of the items drawn, and of how many. Raises NotFound where no item was answered."""
    population = next(job.journal.query("SELECT COUNT(*) FROM items WHERE state = ?", DONE))[0]
    if not population:
        raise NotFound("no item was answered yet: there is nothing to check", where=job.source)
    rows = job.journal.query("SELECT number, custom_id FROM items WHERE state = ?", DONE)
    return draw(rows, fact["n"], fact["seed"]), population


def _item(job: Job, number: int) -> Item:
    place = Place(
        *next(job.journal.query("SELECT line, offset, length, custom_id FROM items WHERE number = ?", number))
    )
    try:
        return job.item(Lease(number, place, 0, 0, False))
    except NoItem as error:  # it was one when it was answered
        raise RuntimeFailed("an item that was answered is none any more", where=job.source, found=str(error)) from None


def _ours(job: Job, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(job.journal.query("SELECT body FROM results WHERE number = ?", number))[0])
    return found


def _calls(calls: list[dict[str, Any]]) -> str:
    return json.dumps([{"name": call.get("name"), "arguments": call.get("arguments")} for call in calls])
