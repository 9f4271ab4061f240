"""A response as server-sent events, with a status that is still true when it is sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from lowbit.harness import HarnessError

_SLOW = 60.0  # seconds that a caller may leave a chunk unread
_QUIET = 10.0  # seconds without a chunk after which a comment says that somebody is still there
_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def send(
    request: web.Request, chunks: AsyncIterator[dict[str, Any]], *, named: bool = False, done: bool = True
) -> web.StreamResponse:
    """Sends chunks as they come. The status goes out with the first of them, so that a failure before it has its own;
    a failure after it is an event with "error".

    named: each event is named by its chunk's "type", as /v1/responses does. done: whether [DONE] ends the stream
    """
    response = _Events(request)
    quiet = asyncio.create_task(response.stay())
    try:
        try:
            # One task for the whole stream: a task and a timer for each chunk were half of what a chunk cost.
            async for chunk in chunks:
                await response.write(_event(chunk, named))
        except HarnessError as error:
            await _ended(quiet)
            if not response.prepared:
                raise
            await response.write(_event(error.as_json() | ({"type": "error"} if named else {}), named))
        await response.write(b"data: [DONE]\n\n" if done else b"")
        await response.write_eof()
    except ConnectionError:
        pass  # the caller left; what was asked for it is given up below
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
    finally:
        await _ended(quiet)
        await chunks.aclose()  # type: ignore[attr-defined]
    return response


class _Events(web.StreamResponse):
    """Begun by the first thing that is written."""

    def __init__(self, request: web.Request) -> None:
        super().__init__(headers=_HEADERS)
        self._request, self._beginning, self._last = request, asyncio.Lock(), time.monotonic()

    async def write(self, data: Any) -> None:
        if not self.prepared:
            async with self._beginning:
                if not self.prepared:
                    await self.prepare(self._request)
        self._last = time.monotonic()
        if data:
            async with asyncio.timeout(_SLOW):
                await super().write(data)

    async def stay(self) -> None:
        """Says that somebody is still there, whenever nothing else was said for a while."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            while True:
                await asyncio.sleep(max(0.0, self._last + _QUIET - time.monotonic()))
                if time.monotonic() - self._last >= _QUIET:
                    await self.write(b": still working\n\n")


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _event(chunk: dict[str, Any], named: bool) -> bytes:
    data = json.dumps(chunk, ensure_ascii=False).encode("utf-8", "replace")
    head = b"event: " + str(chunk.get("type", "message")).encode() + b"\n" if named else b""
    return head + b"data: " + data + b"\n\n"
