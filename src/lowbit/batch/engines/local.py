"""A model on this machine: llama.cpp's server, started for the batch, and started again when a request kills it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from lowbit import console, model_server
from lowbit.batch.engines._pinned import SHARED, PinnedUpstream
from lowbit.batch.engines.base import Caller, Engine, EngineOptions, NotReached, identity
from lowbit.batch.items import Item
from lowbit.errors import BadOption
from lowbit.harness import Harness
from lowbit.model_server import ModelOptions, ModelServer

_SLOTS = 16  # at most; a probe finds how many of them are worth it
_ROOM = 1024  # tokens of a slot beyond what the longest request needs, for an answer
_LARGEST = 1 << 30  # bytes that states of slots may take of the disk


class Local(Engine):
    name: ClassVar[str] = "local"

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        if options.model is None or options.endpoints:
            raise BadOption("which model?", expected="--model MODEL")
        self._path = model_server.artifact(options.model)
        self._slots = options.slots or options.server.slots or _SLOTS
        self._longest = 0
        self._caller: Caller | None = None
        self._server: ModelServer | None = None
        self._states: tempfile.TemporaryDirectory[str] | None = None

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def probed(self) -> bool:
        return self.options.slots is None and self.options.server.slots is None

    def expect(self, longest: int) -> None:
        self._longest = longest

    def place(self) -> str:
        return f"{super().place()}, {self.options.server.threads or 'all'} threads"

    @classmethod
    def suits(cls, options: EngineOptions) -> bool:
        return options.model is not None and not options.endpoints

    async def deciding(self) -> dict[str, Any]:
        server = self.options.server
        named = {"chat_template": server.template, "mmproj": server.mmproj}
        files = {name: identity(path) for name, path in named.items() if path is not None}
        return {"model": identity(self._path), "kv": server.kv_type, **files}

    async def __aenter__(self) -> Self:
        self._states = tempfile.TemporaryDirectory(prefix="lowbit-slots-")
        folder = Path(self._states.name)
        settled = replace(self._settled(), idle_cache=False, slot_folder=folder)
        self._slots = settled.slots or self._slots
        upstream = PinnedUpstream(model_server.NOWHERE)
        upstream.pin(self._slots, folder, min(_LARGEST, shutil.disk_usage(folder).free // 10))
        # What a request does to the server is counted by the runner, for each item.
        _, server, special = model_server.prepared(self._path, settled, restarts=1 << 30, upstream=upstream)
        console.log(f"Loading {self._path.name} with a context of {settled.context:,} for {settled.slots} slots ...")
        harness = Harness(upstream, self.options.harness, special=special)
        self._caller, self._server = Caller(upstream, harness, here=True), server
        try:
            await server.start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            await self._server.close()
        if self._caller is not None:
            await self._caller.upstream.close()
        if self._states is not None:
            self._states.cleanup()
        self._server = self._caller = self._states = None

    async def ask(self, item: Item) -> dict[str, Any]:
        caller = self._caller
        assert caller is not None
        if self.ended is not None:
            raise NotReached(self.ended, final=True)
        SHARED.set(item.shared)  # in this request's task alone
        return await caller.ask(item)

    async def ready(self) -> bool:
        assert self._caller is not None
        if self.ended is not None:
            return True  # ask() says why
        return await self._caller.ready()

    @property
    def ended(self) -> str | None:
        return None if self._server is None else self._server.given_up

    def _settled(self) -> ModelOptions:
        """A cache for each slot, with room for the longest request; one for all where that does not fit."""
        asked = replace(self.options.server, slots=self._slots, swa_full=True)
        if asked.context is None and asked.kv_unified is None:
            need = 2048  # tokens; one has more than two bytes, in any language
            while need < self._longest // 2 + _ROOM:
                need *= 2
            asked = model_server.apart(self._path, asked, need) or asked
        return model_server.settled(self._path, asked)


ENGINE = Local
