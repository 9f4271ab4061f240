"""A response as server-sent events, with a status that is still true when it is sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
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
    response = web.StreamResponse(headers=_HEADERS)
    following = asyncio.ensure_future(anext(chunks))
    try:
        while True:
            while not (await asyncio.wait((following,), timeout=_QUIET))[0]:
                await _begin(response, request)
                await _write(response, b": still working\n\n")
            try:
                chunk = following.result()
            except StopAsyncIteration:
                break
            except HarnessError as error:
                if not response.prepared:
                    raise
                await _write(response, _event(error.as_json() | ({"type": "error"} if named else {}), named))
                break
            following = asyncio.ensure_future(anext(chunks))
            await _begin(response, request)
            await _write(response, _event(chunk, named))
        await _begin(response, request)
        if done:
            await _write(response, b"data: [DONE]\n\n")
        await response.write_eof()
    except ConnectionError:
        pass  # the caller left; what was asked for it is given up below
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, HarnessError):
            await following
        await chunks.aclose()  # type: ignore[attr-defined]
    return response


async def _begin(response: web.StreamResponse, request: web.Request) -> None:
    if not response.prepared:
        await response.prepare(request)


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(_SLOW):
        await response.write(data)


def _event(chunk: dict[str, Any], named: bool) -> bytes:
    data = json.dumps(chunk, ensure_ascii=False).encode("utf-8", "replace")
    head = b"event: " + str(chunk.get("type", "message")).encode() + b"\n" if named else b""
    return head + b"data: " + data + b"\n\n"
