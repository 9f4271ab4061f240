"""llama.cpp's server, each request in a slot of our choice: what prompts have in common is evaluated once, not once in
every slot.

What makes llama.cpp use a prompt again, as measured (dev/LOG.md): the slot's last prompt must have begun like it, slots
at rest must not be emptied (--no-cache-idle-slots), layers with a sliding window must keep everything (--swa-full).
Slots do not learn from each other, but a slot's state can be saved to a file, and any slot can be given that.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from lowbit.batch.engines.base import CarefulUpstream, Lost, NotReached
from lowbit.batch.prefixes import WORTH, Cache, Move, Slot, State, best, text_of
from lowbit.harness import UpstreamFailed

SHARED: ContextVar[bool] = ContextVar("shared", default=False)  # whether requests to come begin like this one
_PROMPTS = ("/chat/completions", "/completions")
_GATHER = 0.005  # seconds in which those that come at the same time are seen


class PinnedUpstream(CarefulUpstream):
    """A server that lowbit started. Until pin() it is as any other."""

    _cache: Cache | None = None

    def pin(self, slots: int, folder: Path, largest: int) -> None:
        """slots: of the server. folder: where it saves states (--slot-save-path), largest: bytes of them at most."""
        self._cache, self._folder = Cache(slots, largest=largest), folder
        self._changed = asyncio.Condition()
        self._known: str | None = self.url
        self._saving, self._files = True, 0
        self._waiting: list[str] = []
        self._under_way: list[str] = []
        self._leading: list[str] = []

    async def ask(self, path: str, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Raises what CarefulUpstream's does."""
        if self._cache is None or path not in _PROMPTS:
            return await super().ask(path, body, seconds)
        deadline = time.monotonic() + seconds
        async with self._slot(path, body, deadline) as slot:
            try:
                return await super().ask(path, _pinned(body, slot), max(0.1, deadline - time.monotonic()))
            except (Lost, NotReached):
                self._known = None  # slots and all; there will be another server
                raise

    @contextlib.asynccontextmanager
    async def _slot(self, path: str, body: dict[str, Any], deadline: float) -> AsyncIterator[Slot]:
        """A free slot, with as much of the prompt in its cache as there is anywhere."""
        assert self._cache is not None
        text = text_of(body)
        move = await self._move(text)
        self._under_way.append(text)
        if move.lead:
            self._leading.append(text)
        try:
            with contextlib.suppress(UpstreamFailed):  # if it is the request's fault, the request will say so
                await self._prepare(move, text, path, body, deadline)
            yield move.slot
        finally:
            self._under_way.remove(text)
            self._led(text, move)
            self._cache.give_back(move.slot)
            await self._tell()

    async def _move(self, text: str) -> Move:
        cache = self._cache
        assert cache is not None
        self._waiting.append(text)
        try:
            # Only a prompt that no slot has begun is worth waiting with: it may be read for others too.
            is_cold = not self._under_way and best(text, (slot.text for slot in cache.free)) < WORTH
            await asyncio.sleep(_GATHER if is_cold else 0)
            async with self._changed:
                while True:
                    if self._known != self.url:
                        self._known = self.url
                        cache.forget()
                    if cache.free:
                        beside = [other for other in self._waiting if other is not text] + self._under_way
                        move = cache.move(text, beside, shared=SHARED.get(), saving=self._saving)
                        if not (move.lead and best(text, self._leading) >= WORTH):
                            cache.take(move.slot, text)
                            return move
                    await self._changed.wait()
        finally:
            self._waiting.remove(text)

    async def _prepare(self, move: Move, text: str, path: str, body: dict[str, Any], deadline: float) -> None:
        if move.restore is not None:
            await self._act(move.slot, "restore", move.restore.file)
        elif move.save:
            await self._save(move.slot, move.had)
        elif move.lead:
            try:
                only_read = {k: v for k, v in body.items() if k != "max_completion_tokens"} | {"max_tokens": 0}
                await super().ask(path, _pinned(only_read, move.slot), max(0.1, deadline - time.monotonic()))
                await self._save(move.slot, text)
            finally:
                self._led(text, move)
                await self._tell()

    async def _save(self, slot: Slot, text: str) -> None:
        assert self._cache is not None
        self._files += 1
        name = f"state-{self._files}"
        found = await self._act(slot, "save", name)
        if found is not None:
            for gone in self._cache.keep(State(text, name, int(found.get("n_written") or 0))):
                (self._folder / gone.file).unlink(missing_ok=True)

    async def _act(self, slot: Slot, action: str, name: str) -> dict[str, Any] | None:
        """None where the server cannot: without the states every slot reads the prompt once, and all is well."""
        try:
            path = f"/slots/{slot.number}?action={action}"
            return await self.post(path, {"filename": name}, 30.0, root=self.root)
        except UpstreamFailed:
            self._saving = False
            return None

    def _led(self, text: str, move: Move) -> None:
        if move.lead and text in self._leading:
            self._leading.remove(text)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _pinned(body: dict[str, Any], slot: Slot) -> dict[str, Any]:
    return body | {"id_slot": slot.number, "cache_prompt": True}
