"""One of those that are talked to: a model behind the harness, and what was said so far."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from lowbit import model_server
from lowbit.harness import Harness, HarnessError, HarnessOptions, HttpUpstream
from lowbit.model_server import ModelOptions


@dataclass
class Turn:
    """What came of one question. notes: what the harness did, or why there is no answer; for the margin."""

    text: str = ""
    thoughts: str = ""
    notes: list[str] = field(default_factory=list)
    failed: bool = False


class Speaker:
    """name: for people. ask() adds a question and its answer to the conversation; reset() begins anew."""

    def __init__(self, name: str, harness: Harness, *, system: str | None, request: dict[str, Any]) -> None:
        self.name, self._harness, self._request = name, harness, request
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self._system)

    def reset(self) -> None:
        self.messages = list(self._system)

    async def ask(self, question: str) -> AsyncIterator[Turn]:
        """The turn as it grows; what is given last is whole. A failure is a turn too, and leaves no trace in the
        conversation."""
        turn = Turn()
        asked = [*self.messages, {"role": "user", "content": question}]
        try:
            async for chunk in self._harness.stream({"messages": asked, **self._request}):
                for choice in chunk["choices"]:
                    turn.text += choice["delta"].get("content") or ""
                    turn.thoughts += choice["delta"].get("reasoning_content") or ""
                if chunk.get("lowbit"):
                    turn.notes = [_note(event) for event in chunk["lowbit"]["events"]]
                yield turn
        except HarnessError as error:
            turn.failed = True
            events = error.trace.events if error.trace else []
            turn.notes = [*(_note(event) for event in events), error.message]
            yield turn
            return
        self.messages = [*asked, {"role": "assistant", "content": turn.text}]


@contextlib.asynccontextmanager
async def speaker(
    target: str, *, options: ModelOptions, harness: HarnessOptions, system: str | None, request: dict[str, Any]
) -> AsyncIterator[Speaker]:
    """target: an artifact or a packaged name, for which llama.cpp's server is started, or the URL of a server."""
    if target.startswith(("http://", "https://")):
        key = os.environ.get("LOWBIT_UPSTREAM_KEY") or os.environ.get("OPENAI_API_KEY")
        async with HttpUpstream(target, key=key) as upstream:
            yield Speaker(target, Harness(upstream, harness), system=system, request=request)
        return
    path = model_server.artifact(target)
    settled = model_server.settled(path, options)
    upstream, server, special = model_server.prepared(path, settled)
    async with upstream:
        try:
            await server.start()
            yield Speaker(path.name, Harness(upstream, harness, special=special), system=system, request=request)
        finally:
            await server.close()


def _note(event: dict[str, str]) -> str:
    what = event["what"].replace("_", " ")
    return f"{event['layer']}: {what}" + (f" ({event['detail']})" if event["detail"] else "")
