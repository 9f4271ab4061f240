"""A server that runs already: anything that speaks OpenAI's API, here or elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from lowbit.batch.engines.base import Caller, CarefulUpstream, Engine, EngineOptions
from lowbit.batch.items import Item
from lowbit.errors import BadOption
from lowbit.harness import Harness, HttpUpstream, UpstreamFailed

_SLOTS = 4


class Endpoints(Engine):
    name: ClassVar[str] = "endpoints"

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        if len(options.endpoints) != 1 or options.model is not None:
            raise BadOption("which endpoint?", found=", ".join(options.endpoints) or "none", expected="--endpoint URL")
        self.slots = options.slots or _SLOTS
        upstream = CarefulUpstream(options.endpoints[0], key=options.key, model=options.endpoint_model)
        self._caller = Caller(upstream, Harness(upstream, options.harness), here=False)

    @classmethod
    def suits(cls, options: EngineOptions) -> bool:
        return bool(options.endpoints) and options.model is None

    async def deciding(self) -> dict[str, Any]:
        """The model's name where there is one: a server that moved is the same server."""
        if (named := self.options.endpoint_model) is None:
            try:
                async with HttpUpstream(self.options.endpoints[0], key=self.options.key) as upstream:
                    listed = (await upstream.get("/models", seconds=10.0)).get("data")
            except UpstreamFailed:
                return {}
            ids = [
                entry["id"] for entry in listed or [] if isinstance(entry, dict) and isinstance(entry.get("id"), str)
            ]
            named = ids[0] if len(ids) == 1 else None
        return {"endpoint_model": named} if named else {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._caller.upstream.close()

    async def ask(self, item: Item) -> dict[str, Any]:
        return await self._caller.ask(item)

    async def ready(self) -> bool:
        return await self._caller.ready()


ENGINE = Endpoints
