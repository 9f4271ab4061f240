"""Another model, asked when the first one's tries are spent. Off unless its URL was named; capped; each use logged."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from lowbit.harness.failures import UpstreamFailed
from lowbit.harness.spend import Ledger, Price, used
from lowbit.harness.upstream import HttpUpstream

REASON: ContextVar[str] = ContextVar("lowbit_fallback_reason", default="")
_MAX_TOKENS = 4096  # where the request names no limit: without one a cap could not hold


class Fallback:
    """An Upstream that costs money.

    upstream: the model. price: of its tokens; None costs nothing (a local one). ledger: with the cap; None has none
    log:      a file that gets a JSON line for each request: time, model, reason, tokens, dollars, outcome; no text
    """

    def __init__(
        self,
        upstream: HttpUpstream,
        *,
        price: Price | None = None,
        ledger: Ledger | None = None,
        log: str | os.PathLike[str] | None = None,
    ) -> None:
        self._upstream, self._price, self._ledger = upstream, price, ledger
        self._log = Path(log) if log is not None else None
        self.name, self.holds, self.refused = upstream.name, upstream.holds, upstream.refused
        self.dialect = upstream.dialect

    async def chat(self, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        """As HttpUpstream.chat; raises UpstreamFailed with status 402 where the cap would be passed."""
        body = _limited(body)
        worst = self._worst(body)
        number = 0
        if self._ledger is not None:  # in a thread: another process may hold the file
            number = await asyncio.to_thread(self._ledger.set_aside, self.name, worst)
        # What a request that failed cost is not known: it stays booked at its worst.
        tokens, cost, outcome = None, worst, "failed"
        try:
            found = await self._upstream.chat(body, seconds)
            tokens = used(found.get("usage"))
            if tokens is not None and self._price is not None:
                cost = self._price.of(*tokens)
            outcome = "answered"
            return found
        except UpstreamFailed as error:
            outcome = error.code
            if 400 <= error.status < 500:  # refused before anything was computed
                cost = 0
            raise
        finally:
            if self._ledger is not None:
                # Not in a thread: where the request is cancelled, nothing more can be waited for.
                self._ledger.book(number, cost)
            self._write(tokens, cost, outcome)

    async def stream(self, body: dict[str, Any], seconds: float) -> AsyncIterator[dict[str, Any]]:
        """Not used: what a fallback says is judged whole before it is given on."""
        raise UpstreamFailed("a fallback is not streamed", again=False)
        yield {}

    async def close(self) -> None:
        await self._upstream.close()

    def _worst(self, body: dict[str, Any]) -> int:
        """A token is at least a byte of what is sent."""
        if self._price is None:
            return 0
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        return self._price.of(len(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")), limit or 0)

    def _write(self, tokens: tuple[int, int] | None, cost: int, outcome: str) -> None:
        if self._log is None:
            return
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "model": self.name,
            "reason": REASON.get(),
            "prompt_tokens": tokens[0] if tokens else None,
            "completion_tokens": tokens[1] if tokens else None,
            "dollars": cost / 1e6,
            "outcome": outcome,
        }
        with open(self._log, "a", encoding="utf-8") as file:  # one write of a line: whole beside those of others
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _limited(body: dict[str, Any]) -> dict[str, Any]:
    named = body.get("max_completion_tokens") or body.get("max_tokens")
    return body if named else body | {"max_tokens": _MAX_TOKENS}
