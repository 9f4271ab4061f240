"""Servers that run already, one or several: anything that speaks OpenAI's API, here or elsewhere.

Each takes as many requests as it has slots, and the next when one of them is answered: the faster gets more. One that
fails is rested, for longer each time, and its requests go to the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, ClassVar, Self

from lowbit import console
from lowbit.batch.engines.base import Caller, CarefulUpstream, Engine, EngineOptions, Lost, NotReached
from lowbit.batch.items import Item
from lowbit.errors import BadOption
from lowbit.harness import Harness, HarnessError, UpstreamFailed
from lowbit.harness.upstream import shown

_SLOTS = 16  # where a server does not say how many it has
_FAULTS = 3  # answers of 5xx, or none in time, one after the other: it is the server
_REST, _LONGEST = 1.0, 60.0  # seconds, doubled each time


class Endpoint:
    """One server. slots: what it has, or is taken to have. known: whether it told them. answered, under_way: requests.
    why: of its rest, None while it is not known to fail."""

    def __init__(self, url: str, options: EngineOptions) -> None:
        self.upstream = CarefulUpstream(url, key=options.key, model=options.endpoint_model)
        self._caller = Caller(self.upstream, Harness(self.upstream, options.harness), here=False)
        self.url, self.known = self.upstream.url, options.slots is not None
        self.slots = options.slots or _SLOTS
        self.under_way = self.answered = self._faults = 0
        self.why: str | None = None
        self.final = False
        self._rest, self._until = 0.0, 0.0

    @property
    def room(self) -> int:
        """Requests that it may have under way now."""
        return 0 if self.final or self.left else self.slots

    @property
    def left(self) -> float:
        """Seconds of its rest."""
        return max(0.0, self._until - time.monotonic())

    async def look(self) -> None:
        """Asks how many slots it has: llama-server tells."""
        if self.known:
            return
        with contextlib.suppress(UpstreamFailed):
            told = (await self.upstream.get("/props", 10.0, root=self.upstream.root)).get("total_slots")
            if type(told) is int and 1 <= told <= 4096:
                self.slots, self.known = told, True

    async def models(self) -> list[str]:
        """Their names. Raises UpstreamFailed."""
        listed = (await self.upstream.get("/models", seconds=10.0)).get("data")
        return [entry["id"] for entry in listed or [] if isinstance(entry, dict) and isinstance(entry.get("id"), str)]

    async def ask(self, item: Item) -> dict[str, Any]:
        """Raises what Engine.ask does; its rest follows from that."""
        self.under_way += 1
        try:
            body = await self._caller.ask(item)
        except (NotReached, Lost) as error:
            self.final = isinstance(error, NotReached) and error.final
            self._tire(str(error), getattr(error, "after", 0.0))
            raise
        except HarnessError as error:
            self._faults = self._faults + 1 if error.status >= 500 else 0
            if self._faults >= _FAULTS:
                self._tire(error.message, 0.0)
            raise
        finally:
            self.under_way -= 1
        if self.why is not None:
            console.log(f"{self.upstream.name} answers again")
        self.why, self._rest, self._faults = None, 0.0, 0
        self.answered += 1
        return body

    async def ready(self) -> bool:
        if not self.final and await self._caller.ready():
            self._until = 0.0
            return True
        return False

    def told(self) -> dict[str, Any]:
        """For status."""
        state = "answers" if self.why is None else "refuses" if self.final else "rests"
        return {
            "url": shown(self.url),
            "slots": self.slots,
            "answered": self.answered,
            "state": state,
            "why": self.why,
        }

    def _tire(self, why: str, after: float) -> None:
        if self.left > 0:  # others that were under way
            return
        if self.why is None:
            console.log(f"{shown(self.url)} is given a rest: {why}")
        self._rest = max(after, min(_LONGEST, max(_REST, 2 * self._rest)))
        self.why, self._faults, self._until = why, 0, time.monotonic() + self._rest


class Endpoints(Engine):
    name: ClassVar[str] = "endpoints"

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        if not options.endpoints or options.model is not None:
            raise BadOption("which endpoint?", found=", ".join(options.endpoints) or "none", expected="--endpoint URL")
        self._all: list[Endpoint] = []
        self._changed = asyncio.Condition()

    @classmethod
    def suits(cls, options: EngineOptions) -> bool:
        return bool(options.endpoints) and options.model is None

    @property
    def slots(self) -> int:
        if not self._all:
            return (self.options.slots or _SLOTS) * len(self.options.endpoints)
        return max(1, sum(endpoint.room for endpoint in self._all))

    @property
    def probed(self) -> bool:
        return not all(endpoint.known for endpoint in self._all)

    def place(self) -> str:
        return ", ".join(sorted(shown(url) for url in self.options.endpoints))

    def told(self) -> list[dict[str, Any]]:
        return [endpoint.told() for endpoint in self._all]

    async def deciding(self) -> dict[str, Any]:
        """The model's name where there is one: a server that moved is the same server. Raises BadOption where one
        server has another model than the others."""
        named = self.options.endpoint_model
        if named is None:
            one: dict[str, str] = {}
            for url in self.options.endpoints:
                endpoint = Endpoint(url, self.options)
                with contextlib.suppress(UpstreamFailed):
                    if len(ids := await endpoint.models()) == 1:
                        one.setdefault(ids[0], endpoint.upstream.name)
                await endpoint.upstream.close()
            if len(one) > 1:
                found = ", ".join(f"{model} at {url}" for model, url in one.items())
                raise BadOption("the endpoints have different models", found=found, hint="--endpoint-model names one")
            named = next(iter(one), None)
        return {"endpoint_model": named} if named else {}

    async def __aenter__(self) -> Self:
        self._all = [Endpoint(url, self.options) for url in dict.fromkeys(self.options.endpoints)]
        await asyncio.gather(*(endpoint.look() for endpoint in self._all))
        return self

    async def __aexit__(self, *_: object) -> None:
        for endpoint in self._all:
            await endpoint.upstream.close()

    async def ask(self, item: Item) -> dict[str, Any]:
        tried: NotReached | None = None
        while True:
            endpoint = await self._free(tried)
            try:
                return await endpoint.ask(item)
            except NotReached as error:
                tried = error
            finally:
                async with self._changed:
                    self._changed.notify_all()

    async def ready(self) -> bool:
        return any(await asyncio.gather(*(endpoint.ready() for endpoint in self._all)))

    async def _free(self, tried: NotReached | None) -> Endpoint:
        """The endpoint of which the largest share is free. Raises NotReached where all rest."""
        while True:
            awake = [endpoint for endpoint in self._all if endpoint.room]
            if not awake:
                failed = [endpoint for endpoint in self._all if not endpoint.final]
                why = str(tried) if tried is not None else self._all[0].why or "no endpoint answers"
                raise NotReached(why, after=min((e.left for e in failed), default=0.0), final=not failed)
            free = [endpoint for endpoint in awake if endpoint.under_way < endpoint.room]
            if free:
                return min(free, key=lambda endpoint: endpoint.under_way / endpoint.room)
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 1.0)


ENGINE = Endpoints
