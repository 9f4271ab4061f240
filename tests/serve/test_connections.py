"""The endpoint against who does not speak HTTP as one should: over raw sockets, with a model that a test scripts."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from endpoint import Endpoint, served
from scripted import Scripted

from lowbit.serve import ServeOptions

BODY = json.dumps({"messages": [{"role": "user", "content": "Hello"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
LAST = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def talk(
    asking: Callable[[Endpoint, int], Awaitable[Any]], upstream: Any = None, **options: Any
) -> tuple[Any, Scripted]:
    upstream = upstream or Scripted("Hi.")

    async def go() -> Any:
        async with served(upstream, ServeOptions(port=0, **options)) as endpoint:
            found = await asking(endpoint, int(endpoint.root.rpartition(":")[2]))
            assert (await endpoint.post("/chat/completions", json.loads(BODY)))[0] == 200  # it still serves
            return found

    return asyncio.run(go()), upstream


async def said(port: int, data: bytes, *, half_close: bool = False, seconds: float = 10.0) -> bytes:
    """What comes back until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    if half_close:
        writer.write_eof()
    try:
        async with asyncio.timeout(seconds):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_pipelined_requests_are_answered_in_order() -> None:
    async def asking(endpoint: Endpoint, port: int) -> bytes:
        return await said(port, WHOLE + HEALTH + LAST)

    found, upstream = talk(asking)
    assert found.count(b"HTTP/1.1 200") == 3 and len(upstream.sent) == 3
    assert found.index(b'"choices"') < found.index(b'"status": "ok"') < found.rindex(b'"choices"')


def test_a_chunked_body() -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:]))
    head = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    found, upstream = talk(lambda e, port: said(port, head + chunks + b"0\r\n\r\n"))
    assert found.startswith(b"HTTP/1.1 200") and upstream.sent[0]["messages"][0]["content"] == "Hello"


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 4\r\nContent-Length: 60\r\n\r\n" + BODY,
        HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + WHOLE,
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + WHOLE,
        HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
        HEAD + b"Content-Length: 1_0\r\n\r\n" + BODY,
        HEAD + b"Content-Length : 60\r\n\r\n" + BODY,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + BODY,
        HEAD + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        HEAD + b"".join(b"X%d: a\r\n" % i for i in range(5000)) + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"\x00" * 1000,
    ],
    ids=["two lengths", "length and chunks", "two codings", "negative", "underscore", "space", "no chunk", "large head",
         "many heads", "long path", "tls", "nul"],
)  # fmt: skip
def test_what_is_no_request_is_refused_and_never_reaches_the_model(data: bytes) -> None:
    found, upstream = talk(lambda e, port: said(port, data))
    assert found == b"" or found.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400")), found[:200]
    assert found.count(b"HTTP/1.") <= 1 and len(upstream.sent) == 1  # the one that talk() itself sends


def test_who_leaves_half_way_leaves_nothing_behind() -> None:
    async def asking(endpoint: Endpoint, port: int) -> str:
        await said(port, WHOLE[:-10], half_close=True)
        await said(port, HEAD[:40], half_close=True)
        for _ in range(100):
            async with endpoint.session.get(endpoint.root + "/metrics") as response:
                page = await response.text()
            if "lowbit_requests_open 1.0" in page:  # this one
                break
            await asyncio.sleep(0.02)
        return page

    page, upstream = talk(asking)
    assert "lowbit_requests_open 1.0" in page and len(upstream.sent) == 1


@pytest.mark.parametrize("data", [b"", HEAD[:30]], ids=["nothing", "a part"])
def test_a_head_that_does_not_come_is_not_waited_for(data: bytes) -> None:
    begun = time.monotonic()
    found, _ = talk(lambda e, port: said(port, data), head_seconds=0.3)
    assert time.monotonic() - begun < 8 and found == b""


def test_nor_is_that_of_a_second_request() -> None:
    async def asking(endpoint: Endpoint, port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(WHOLE)
        assert (await reader.read(4096)).startswith(b"HTTP/1.1 200")
        writer.write(HEAD[:30])
        async with asyncio.timeout(8):
            found = await reader.read()
        writer.close()
        return found

    assert talk(asking, head_seconds=0.3)[0] == b""


def test_a_head_that_comes_in_drops_is_not_waited_for() -> None:
    async def asking(endpoint: Endpoint, port: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for i in range(200):
            if reader.at_eof():
                writer.close()
                return i
            writer.write(HEAD[i : i + 1])
            await asyncio.sleep(0.05)
        return -1

    assert 0 < talk(asking, head_seconds=0.5)[0] < 100


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.serve import app

    monkeypatch.setattr(app.Limits, "__init__", _impatient(app.Limits.__init__))
    found, _ = talk(lambda e, port: said(port, WHOLE[:-10], seconds=20))
    assert found.startswith(b"HTTP/1.1 408") and b"body_timeout" in found


def _impatient(init: Any) -> Any:
    def changed(self: Any, **options: Any) -> None:
        init(self, **options | {"body_seconds": 0.3})

    return changed


def test_idle_connections_take_no_place_from_others() -> None:
    async def asking(endpoint: Endpoint, port: int) -> int:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(120)]
        assert (await said(port, LAST)).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.1)
        ended = sum(reader.at_eof() or reader.exception() is not None for reader, _ in idle)
        for _, writer in idle:
            writer.close()
        return ended

    ended, _ = talk(asking, open_connections=20)
    assert ended >= 100


def test_connections_at_work_are_not_closed_for_others() -> None:
    go_on = asyncio.Event()

    class Slow(Scripted):
        async def chat(self, body: dict[str, Any], seconds: float) -> dict[str, Any]:
            await go_on.wait()
            return await super().chat(body, seconds)

    async def asking(endpoint: Endpoint, port: int) -> tuple[list[bytes], bytes]:
        working = [asyncio.create_task(said(port, LAST)) for _ in range(3)]
        await asyncio.sleep(0.3)
        refused = await said(port, HEALTH)
        go_on.set()
        return await asyncio.gather(*working), refused

    (answers, refused), _ = talk(asking, Slow("Hi."), open_connections=3)
    assert all(b"HTTP/1.1 200" in answer for answer in answers) and refused.startswith(b"HTTP/1.1 503")


def test_a_packed_body_is_as_large_as_what_is_in_it() -> None:
    bomb = gzip.compress(b'{"messages": "' + b"a" * (8 << 20) + b'"}')
    head = HEAD + b"Connection: close\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    found, upstream = talk(lambda e, port: said(port, head + bomb), body_bytes=1 << 20)
    assert found.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400")) and len(upstream.sent) == 1
