"""A real model behind its server, asked each thing once: an equal request gets the answer that it got before.

At temperature 0 a server would answer an equal request alike but for the rounding of whatever else it computes at the
time. Remembered, two sets of layers differ by what the layers did and by nothing else, and what they ask alike costs
its time once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from lowbit import checkpoint, console, run
from lowbit.errors import Unsupported
from lowbit.files import sha256
from lowbit.harness import HttpUpstream, UpstreamFailed, of_model
from lowbit.measure.ablation.playing import Counted
from lowbit.measure.ablation.questions import Question
from lowbit.run._http import key_for
from lowbit.run.llama_server import LlamaServer
from lowbit.run.openai import OpenAi


class ServedModel:
    """name: for people. identity: what its answers depend on."""

    def __init__(self, upstream: HttpUpstream, identity: str) -> None:
        self._upstream, self.identity, self.name = upstream, identity, upstream.name
        self._known: dict[str, tuple[dict[str, Any] | UpstreamFailed, float]] = {}

    def upstream(self, question: Question, variant: str) -> Counted:
        return _Remembered(self._upstream, self._known)

    def fallbacks(self, question: Question, variant: str) -> Sequence[Counted]:
        return ()

    def changed(self, question: Question) -> Question:
        return question


@contextlib.asynccontextmanager
async def opened(
    target: str | os.PathLike[str], *, slots: int, context: int, threads: int | None, model: str | None,
    api_key_env: str | None,
) -> AsyncIterator[ServedModel]:  # fmt: skip
    """A GGUF in llama.cpp's server, started for this, or a URL. context: tokens of each slot.

    Raises NotFound, BadFile, RuntimeFailed, Unsupported.
    """
    if run.is_url(target):
        url = str(target)
        with OpenAi(url, model=model, api_key_env=api_key_env) as found:
            key = key_for(url, api_key_env)
            async with HttpUpstream(found.url, key=key, model=found.model, connections=slots) as upstream:
                yield ServedModel(upstream, f"{found.url} {found.model}")
        return
    path = Path(checkpoint.resolve(os.fspath(target)))
    if path.is_dir():
        listed = sorted(path.glob("*.gguf"))
        if len(listed) != 1:
            raise Unsupported("the harness is measured on a GGUF or a URL", where=path, expected="one GGUF")
        path = listed[0]
    console.log(f"Starting llama.cpp's server with {path.name}")
    with LlamaServer(path, context=context * slots, slots=slots, threads=threads) as server:
        async with HttpUpstream(server.url, connections=slots) as upstream:
            of_model.introduce(upstream, path, None)
            yield ServedModel(upstream, f"{sha256(path)} {server.version} {context}")


class _Remembered:
    """The upstream for one question and one set of layers."""

    def __init__(self, upstream: HttpUpstream, known: dict[str, tuple[dict[str, Any] | UpstreamFailed, float]]) -> None:
        self._upstream, self._known = upstream, known
        self.name, self.dialect = upstream.name, upstream.dialect
        self.holds, self.refused = set(upstream.holds), set(upstream.refused)
        self.requests, self.tokens = 0, 0
        self.seconds: float | None = 0.0
        self.faults: list[str] = []

    def begin(self, turn: int) -> None:
        pass

    async def stream(self, body: dict[str, Any], seconds: float) -> AsyncIterator[dict[str, Any]]:
        raise UpstreamFailed("not streamed", again=False)
        yield {}

    async def chat(self, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        self.requests += 1
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode("utf-8", "replace")).hexdigest()
        if key not in self._known:
            begun = time.monotonic()
            found: dict[str, Any] | UpstreamFailed
            try:
                found = await self._upstream.chat(body, seconds)
            except UpstreamFailed as error:
                found = error
            self._known[key] = found, time.monotonic() - begun
        found, took = self._known[key]
        self.seconds = (self.seconds or 0.0) + took
        if isinstance(found, UpstreamFailed):
            raise found
        used = found.get("usage")
        made = used.get("completion_tokens") if isinstance(used, dict) else None
        self.tokens += made if type(made) is int and made > 0 else 0
        # The harness mends answers in place.
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]
